"""Eight of Quantus' metrics on digits: nrm beside gradient x input and random heatmaps.

    python benchmarks/quantus_metrics.py [--samples 24] [--json quantus_metrics.json]

Trains the demo's network on scikit-learn's digits, and asks each metric of the same unseen digits
and classes. A metric says something of an explanation only as far as random heatmaps do worse.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nrm import composites
from nrm.cli.demo import trained
from nrm.interop.quantus import Array, Explain
from nrm.torchvision_mismatch import import_torchvision

Explanation = Callable[..., Array]

QUIET = {"disable_warnings": True, "display_progressbar": False}


def gradient_times_input(model: nn.Module, inputs: Array, targets: Array, **_: Any) -> Array:
    x = torch.as_tensor(inputs, dtype=torch.float32).requires_grad_()
    chosen = model(x).gather(1, torch.as_tensor(targets, dtype=torch.long)[:, None])
    found: Array = (x * torch.autograd.grad(chosen.sum(), x)[0]).detach().numpy()
    return found


class Random:
    """Normal noise, drawn anew at every call: knows neither the network nor the picture."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, model: nn.Module, inputs: Array, targets: Array, **_: Any) -> Array:
        return self._generator.standard_normal(np.shape(inputs)).astype(np.float32)


METHODS: dict[str, Callable[[], Explanation]] = {
    "nrm, GammaFlat": lambda: Explain(composites.GammaFlat()),
    "nrm, EpsilonPlusFlat": lambda: Explain(composites.EpsilonPlusFlat()),
    "gradient x input": lambda: gradient_times_input,
    "random": lambda: Random(0),
}


def metrics(quantus: Any) -> dict[str, tuple[Any, str]]:
    """Each metric by name, with which way is better."""
    return {
        "FaithfulnessCorrelation": (
            quantus.FaithfulnessCorrelation(
                nr_runs=40, subset_size=40, perturb_baseline="black", **QUIET
            ),
            "higher",
        ),
        "PixelFlipping, mean of the curve": (
            quantus.PixelFlipping(features_in_step=20, perturb_baseline="black", **QUIET),
            "lower",
        ),
        "MonotonicityCorrelation": (
            quantus.MonotonicityCorrelation(
                nr_samples=5, features_in_step=20, perturb_baseline="black", **QUIET
            ),
            "higher",
        ),
        "MaxSensitivity": (quantus.MaxSensitivity(nr_samples=5, **QUIET), "lower"),
        "RandomLogit": (quantus.RandomLogit(num_classes=10, seed=1, **QUIET), "lower"),
        "MPRT, last layer": (
            quantus.MPRT(skip_layers=False, return_last_correlation=True, **QUIET),
            "lower",
        ),
        "Sparseness": (quantus.Sparseness(**QUIET), "higher"),
        "Complexity": (quantus.Complexity(**QUIET), "lower"),
    }


def scores(samples: int) -> tuple[dict[str, dict[str, float]], dict[str, str], float]:
    """The mean of each metric for each method, which way is better, and the net's accuracy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_torchvision()  # which Quantus imports, on a torch that may not fit it
        import quantus

        of = trained()
        x, y = of.x[:samples].numpy(), of.y[:samples].numpy()
        found: dict[str, dict[str, float]] = {}
        better = {}
        for name, (metric, way) in metrics(quantus).items():
            better[name] = way
            for method, make in METHODS.items():
                np.random.seed(0)  # the same perturbations for all methods
                given = metric(
                    model=of.model, x_batch=x, y_batch=y, explain_func=make(), device="cpu"
                )
                found.setdefault(name, {})[method] = float(np.nanmean(given))
    return found, better, of.accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found, better, accuracy = scores(options.samples)
    lines = [f"{options.samples} digits, accuracy {accuracy:.3f}", ""]
    lines += [f"| metric | better | {' | '.join(METHODS)} |", f"|---|---|{'---|' * len(METHODS)}"]
    for name, row in found.items():
        lines.append(
            f"| {name} | {better[name]} | {' | '.join(f'{v:.3g}' for v in row.values())} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    if options.json:
        options.json.write_text(json.dumps({"accuracy": accuracy, "scores": found}, indent=1))


if __name__ == "__main__":
    main()
