"""Conditional heatmaps of many channels of one layer of VGG16, beside zennit-crp.

nrm: one forward pass, one relevance pass to the layer, and from there a message for each channel.
zennit-crp: one conditional attribution for each channel, several of them as one batch; the best of
several batch sizes counts. Of the peer some channels are timed, and the time per heatmap is taken.
Everything is timed in turn within one run. Weights are random, without biases, so that all compute
the same; some heatmaps are compared, also in double precision, where neither the order of sums nor
zennit's stabilizer decides.

    python -m benchmarks.heatmaps --json heatmaps.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import nrm
from benchmarks.environment import ROOT, inside_crp, run_inside_crp
from nrm import composites

LAYER, TARGET = "features.28", 3
CHANNELS = 512
PLAIN = "forward+backward"
OURS = "nrm"
PEER = "zennit-crp"


@dataclass(frozen=True)
class Row:
    """What one heatmap costs in one way, and how many times nrm is faster.

    Attributes:
        difference, difference_in_double: the largest from nrm's heatmaps, relative to the largest
            relevance.
    """

    model: str
    layers: str
    method: str
    seconds_per_heatmap: float
    extrapolated: bool
    speedup: float
    share_of_fwd_bwd: float
    difference: float | None = None
    difference_in_double: float | None = None


class Ways:
    """The ways to conditional heatmaps, on one model and one input.

    Arguments:
        channels: the conditions.
        timed: how many of them the peer is timed with.
    """

    def __init__(self, channels: Sequence[int], timed: int) -> None:
        from nrm.torchvision_mismatch import import_torchvision

        import_torchvision()
        from torchvision.models import vgg16

        torch.manual_seed(0)
        self.model: nn.Module = vgg16().eval().requires_grad_(False)
        self.x, self.channels, self.timed = torch.rand(1, 3, 224, 224), list(channels), timed
        self.explainer = nrm.Explainer(self.model, composites.EpsilonPlus())

    def forward_and_backward(self) -> Tensor:
        x = self.x.clone().requires_grad_()
        self.model(x)[0, TARGET].backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return x.grad

    def nrm(self, chosen: Sequence[int]) -> Tensor:
        """From the picture to the heatmaps, summed over colours: `[conditions, H, W]`."""
        measure = self.explainer(self.x, target=TARGET)
        found = measure.heatmaps([nrm.channels(LAYER, channel) for channel in chosen])
        return found[:, 0].sum(1) * measure.scale

    def zennit_crp(self, chosen: Sequence[int], batch_size: int) -> Tensor:
        """The same by conditional attributions, as its tutorials do it."""
        from crp.attribution import CondAttribution

        from benchmarks.methods.hooks import composite

        attribution = CondAttribution(self.model)
        conditions = [{LAYER: [channel], "y": [TARGET]} for channel in chosen]
        results = attribution.generate(
            self.x.clone().requires_grad_(),
            conditions,
            composite(),
            batch_size=batch_size,
            verbose=False,
        )
        return torch.cat([result.heatmap for result in results])

    def difference(self, count: int) -> float:
        """The largest difference from the peer's heatmaps, relative to the largest relevance."""
        chosen = self.channels[:count]
        ours, theirs = self.nrm(chosen), self.zennit_crp(chosen, count)
        return float((ours - theirs).abs().max() / theirs.abs().max())

    def in_double(self) -> Ways:
        """The same in double precision, with an input beside which zennit's 1e-6 is nothing."""
        from benchmarks.methods.hooks import STRONG

        ways = copy.copy(self)
        ways.model, ways.x = copy.deepcopy(self.model).double(), self.x.double() * STRONG
        ways.explainer = nrm.Explainer(ways.model, composites.EpsilonPlus())
        return ways


def main() -> None:
    """Times all ways in turn and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channels", type=int, default=64, help="heatmaps in one query")
    parser.add_argument("--timed", type=int, default=32, help="of them with zennit-crp")
    parser.add_argument("--batches", default="8,16,32", help="zennit-crp's batch sizes")
    parser.add_argument("--compared", type=int, default=4, help="heatmaps compared")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-crp")
    arguments = parser.parse_args()
    if not inside_crp():
        raise SystemExit(run_inside_crp(arguments.environment, "benchmarks.heatmaps"))
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    ways = Ways(range(0, CHANNELS, CHANNELS // arguments.channels), arguments.timed)
    single = ways.difference(arguments.compared)
    double = ways.in_double().difference(arguments.compared)
    sys.stdout.write(f"heatmaps differ by {single:.1e} of the largest relevance")
    sys.stdout.write(f", in double precision by {double:.1e}\n")
    batches = [int(size) for size in arguments.batches.split(",")]
    rows = [
        replace(row, difference=single, difference_in_double=double)
        if row.method.startswith(PEER)
        else row
        for row in measured(ways, arguments.rounds, batches)
    ]
    for row in rows:
        sys.stdout.write(
            f"{row.method:24} {row.seconds_per_heatmap:8.4f} s"
            f" {row.share_of_fwd_bwd:7.3f} x fwd+bwd  nrm is {row.speedup:6.2f} x faster"
            f"{'  (extrapolated)' if row.extrapolated else ''}\n"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def measured(ways: Ways, rounds: int, batches: Sequence[int]) -> list[Row]:
    """The medians of several rounds, by heatmap; of the peer for every batch size and the best."""
    everything, some = ways.channels, ways.channels[: ways.timed]
    methods: dict[str, tuple[Callable[[], Tensor], int]] = {
        PLAIN: (ways.forward_and_backward, 1),
        OURS: (partial(ways.nrm, everything), len(everything)),
    }
    for size in batches:
        methods[f"{PEER}, batches of {size}"] = partial(ways.zennit_crp, some, size), len(some)
    times: dict[str, list[float]] = {name: [] for name in methods}
    ways.zennit_crp(some[: batches[0]], batches[0])  # warms up
    ways.nrm(some)
    for _ in range(rounds):
        for name, (run, heatmaps) in methods.items():
            begin = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begin) / heatmaps)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    best = min((name for name in seconds if name.startswith(PEER)), key=seconds.__getitem__)
    seconds = {**seconds, f"{PEER}, best": seconds[best]}
    return [
        Row(
            "vgg16",
            LAYER,
            name,
            value,
            name.startswith(PEER) and len(some) < len(everything),
            value / seconds[OURS],
            value / seconds[PLAIN],
        )
        for name, value in seconds.items()
    ]


if __name__ == "__main__":
    main()
