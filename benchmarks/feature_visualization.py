"""Reference samples of two layers over a data set, beside zennit-crp's FeatureVisualization.

Both find the samples with the most relevance and activation of every channel, and statistics by
class, over the same random pictures with the same labels explained, by the z+ rule for
convolutions and LRP-0 for linear layers, in batches of one size, in turn. zennit-crp keeps 40
samples of each channel and saves loose arrays; nrm keeps as many, with histograms and classes, and
commits Parquet. Both are timed from the data to the files on disk, once nrm has captured the model
(that time is a row of its own). Weights are random, without biases. The mean relevance of channels
is compared before anything is timed.

    python -m benchmarks.feature_visualization --json feature_visualization.json
    python -m benchmarks.feature_visualization --models digits --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nrm
from benchmarks.dataset import digits, squeezenet, vgg16
from benchmarks.environment import ROOT, inside_crp, run_inside_crp

KEPT = 40
"""Samples of a channel, as many as zennit-crp keeps."""


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str], int]] = {
    "digits": (digits, (1, 28, 28), ["3", "7"], 2048),
    "squeezenet": (squeezenet, (3, 224, 224), ["features.9", "features.10"], 64),
    "vgg16": (vgg16, (3, 224, 224), ["features.26", "features.28"], 32),
}
"""By name: what makes it, a sample's shape, two layers, how many samples."""


class Ways:
    """The ways over one data set.

    Arguments:
        batch: samples explained at once.
    """

    def __init__(self, name: str, samples: int | None, batch: int) -> None:
        make, shape, self.layers, count = MODELS[name]
        torch.manual_seed(0)
        self.model = make().eval().requires_grad_(False)
        for module in self.model.modules():
            if getattr(module, "bias", None) is not None:
                module.register_parameter("bias", None)  # zennit counts biases, z+ walks do not
        self.count, self.batch = samples or count, batch
        generator = torch.Generator().manual_seed(1)
        self.x = torch.rand((self.count, *shape), generator=generator)
        self.y = torch.randint(0, 10, (self.count,), generator=generator)
        self.explainer = nrm.Explainer(self.model, nrm.composites.EpsilonPlus())

    def plain(self) -> None:
        """Forward and backward, and nothing else."""
        for first in range(0, self.count, self.batch):
            x, y = (each[first : first + self.batch] for each in (self.x, self.y))
            x = x.clone().requires_grad_()
            self.model(x).gather(1, y[:, None]).sum().backward()  # type: ignore[no-untyped-call]

    def ours(self) -> Tensor:
        """`nrm.dataset.relmax`; the mean relevance of the second layer's channels."""
        from nrm.dataset import relmax

        with tempfile.TemporaryDirectory() as folder:
            found = relmax(
                self.explainer, (self.x, self.y), self.layers, Path(folder) / "out", target="true",
                k=KEPT, batch=self.batch, activation="sum", threads=torch.get_num_threads(),
            )  # fmt: skip
            return torch.tensor(found.statistics(self.layers[1])["mean"].to_pylist())

    def theirs(self) -> None:
        """zennit-crp's FeatureVisualization, both kinds of samples and its statistics."""
        from crp.attribution import CondAttribution
        from crp.concepts import ChannelConcept
        from crp.visualization import FeatureVisualization

        samples = list(zip(self.x, self.y.tolist(), strict=True))
        with tempfile.TemporaryDirectory() as folder, silence():
            found = FeatureVisualization(
                CondAttribution(self.model), samples,
                {layer: ChannelConcept() for layer in self.layers}, abs_norm=False, path=folder,
            )  # fmt: skip
            found.run(rules(), 0, len(samples), batch_size=self.batch)

    def difference(self) -> float:
        """Of relevance of channels between the two, in logits, to the largest of them.

        Of strong inputs, beside which what zennit adds to denominators is nothing.
        """
        from crp.attribution import CondAttribution
        from crp.concepts import ChannelConcept

        from benchmarks.methods.hooks import STRONG

        layer, attribution = self.layers[1], CondAttribution(self.model)
        some = slice(0, min(8, self.count))
        worst, strong = 0.0, self.x[some] * STRONG
        R = self.explainer(strong, target=self.y[some])
        ours = nrm.methods.conrel(R, self.layers[1], scale="logit")
        for row, (x, y) in enumerate(zip(strong, self.y[some].tolist(), strict=True)):
            seen = attribution(
                x[None].clone().requires_grad_(), [{"y": [y]}], rules(), record_layer=[layer]
            ).relevances[layer]
            theirs = ChannelConcept().attribute(seen, abs_norm=False)[0]
            gap = (ours[row] - theirs).abs().max() / theirs.abs().max()
            worst = max(worst, float(gap))
        return worst


def rules() -> Any:
    """z+ for convolutions, LRP-0 for linear layers and averages."""
    from zennit.rules import Norm
    from zennit.types import AvgPool

    from benchmarks.methods.hooks import composite

    found = composite()
    found.layer_map.append((AvgPool, Norm()))
    return found


@contextlib.contextmanager
def silence() -> Any:
    """It prints, and draws bars."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        first_seconds: what captures and compares.
        difference: of the relevance of channels between the two, to the largest of them.
        samples_per_second, processor_seconds: by the way.
        nrm_is_faster, nrm_is_faster_by_processor: than zennit-crp, so many times.
        nrm_to_plain: seconds of the processor over those of plain forward + backward.
    """

    model: str
    samples: int
    batch: int
    threads: int
    rounds: int
    first_seconds: float
    difference: float
    samples_per_second: dict[str, float]
    processor_seconds: dict[str, float]
    nrm_is_faster: float
    nrm_is_faster_by_processor: float
    nrm_to_plain: float


def measured(name: str, samples: int | None, batch: int, rounds: int) -> Row:
    """Samples per second of all ways, medians of several turns."""
    ways = Ways(name, samples, batch)
    begin = time.perf_counter()
    difference = ways.difference()
    first = time.perf_counter() - begin
    runs: dict[str, Callable[[], object]] = {
        "plain": ways.plain,
        "nrm": ways.ours,
        "zennit-crp": ways.theirs,
    }
    spent: dict[str, list[tuple[float, float]]] = {way: [] for way in runs}
    for turn in range(rounds + 1):
        for way, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if turn:  # the first warms up
                spent[way].append((time.perf_counter() - wall, time.process_time() - processor))
    middle = {
        way: [statistics.median(each) for each in zip(*turns, strict=True)]
        for way, turns in spent.items()
    }
    return Row(
        model=name,
        samples=ways.count,
        batch=batch,
        threads=torch.get_num_threads(),
        rounds=rounds,
        first_seconds=first,
        difference=difference,
        samples_per_second={way: ways.count / wall for way, (wall, _) in middle.items()},
        processor_seconds={way: cpu for way, (_, cpu) in middle.items()},
        nrm_is_faster=middle["zennit-crp"][0] / middle["nrm"][0],
        nrm_is_faster_by_processor=middle["zennit-crp"][1] / middle["nrm"][1],
        nrm_to_plain=middle["nrm"][1] / middle["plain"][1],
    )


def main() -> None:
    """Times all ways in turn and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--samples", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-crp")
    arguments = parser.parse_args()
    if not inside_crp():
        name = "benchmarks.feature_visualization"
        raise SystemExit(run_inside_crp(arguments.environment, name))
    warnings.simplefilter("ignore")
    rows = []
    for name in arguments.models.split(","):
        row = measured(name, arguments.samples, arguments.batch, arguments.rounds)
        rows.append(row)
        speed = ", ".join(f"{way} {found:.3g}" for way, found in row.samples_per_second.items())
        sys.stdout.write(
            f"{name}: samples per second: {speed}; nrm is {row.nrm_is_faster:.2f} x faster "
            f"(by processor time {row.nrm_is_faster_by_processor:.2f} x); relevance differs by "
            f"{row.difference:.1e}\n"
        )
    if arguments.json is not None:
        told = {
            "processor": platform.processor(),
            "torch": str(torch.__version__),
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
