"""All pairs of channels of two layers of VGG16, beside what zennit-crp's users would do.

nrm: one forward pass, one relevance pass to the upper layer, one contraction; for distant layers
messages from the side with fewer channels. zennit-crp: one conditional attribution for every
channel of the upper layer, the lower layer recorded. zennit restricted: one backward pass through
what lies between the layers for every channel, which is the least that masks by hooks can do. Of
the peers some channels are timed, and the time multiplied. Everything is timed in turn within one
run. Weights are random, without biases, so that all compute the same; the figures of some channels
are compared.

    python -m benchmarks.joint_pairs --json joint_pairs.json
    python -m benchmarks.joint_pairs --layers features.10,features.28 --rounds 2 --channels 8
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nrm
from benchmarks.environment import ROOT, inside_crp, run_inside_crp
from nrm import composites

TARGET = 3
CHANNELS = 512


@dataclass(frozen=True)
class Row:
    """What one way costs: seconds for all pairs, and how many times nrm's query is faster."""

    model: str
    layers: str
    method: str
    seconds: float
    extrapolated: bool
    speedup: float
    share_of_fwd_bwd: float


class Ways:
    """The ways to all pairs of two layers, on one model and one input.

    Arguments:
        chosen: channels of the upper layer that are timed of the peers.
    """

    def __init__(self, lower: str, upper: str, chosen: list[int]) -> None:
        from nrm.torchvision_mismatch import import_torchvision

        import_torchvision()
        from torchvision.models import vgg16

        torch.manual_seed(0)
        self.model: nn.Module = vgg16().eval().requires_grad_(False)
        self.lower, self.upper = lower, upper
        self.x, self.chosen = torch.rand(1, 3, 224, 224), chosen
        self.explainer = nrm.Explainer(self.model, composites.EpsilonPlus())
        self.ready = self.explainer(self.x, target=TARGET)
        self.contracts = self.ready.joint_method(upper, lower) == "contraction"

    def forward_and_backward(self) -> Tensor:
        x = self.x.clone().requires_grad_()
        self.model(x)[0, TARGET].backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return x.grad

    def whole_query(self) -> Tensor:
        """From the picture to all pairs."""
        return self.explainer(self.x, target=TARGET).joint(self.upper, self.lower)[0]

    def contraction(self) -> Tensor:
        """All pairs, of a message that is already there."""
        from nrm.contraction import contracted_pairs, find_contraction

        graph = self.ready.graph
        message = self.ready.marginal(self.upper).unsqueeze(0)
        layers = graph.variable(self.upper), graph.variable(self.lower)
        found = find_contraction(self.ready.forward_pass, *layers)
        assert found is not None
        return contracted_pairs(self.ready.forward_pass, message, *layers, found)[0]

    def message(self) -> Tensor:
        """What `contraction` needs first, to be taken off its time."""
        return self.ready.marginal(self.upper)

    def zennit_crp(self) -> Tensor:
        """A conditional attribution for each of some channels, as its tutorials do it."""
        from crp.attribution import CondAttribution

        from benchmarks.methods.hooks import composite

        attribution = CondAttribution(self.model)
        conditions = [{self.upper: [channel], "y": [TARGET]} for channel in self.chosen]
        found = []
        for result in attribution.generate(
            self.x.clone().requires_grad_(),
            conditions,
            composite(),
            record_layer=[self.lower],
            batch_size=8,
            verbose=False,
        ):
            found.append(result.relevances[self.lower].flatten(2).sum(2))
        return torch.cat(found)

    def restricted(self) -> Tensor:
        """Backward through what lies between alone, for each of some channels."""
        from benchmarks.methods.hooks import composite

        layers: Any = self.model.features  # type: ignore[union-attr]
        lower, upper = int(self.lower.rpartition(".")[2]), int(self.upper.rpartition(".")[2])
        with torch.no_grad():
            below = layers[: lower + 1](self.x)
        whole = self.ready.marginal(self.upper) * self.ready.scale
        part = nn.Sequential(*layers[lower + 1 : upper + 1])
        found = []
        with composite().context(part) as modified:
            x = below.clone().requires_grad_()
            output = modified(x)
            for channel in self.chosen:
                masked = torch.zeros_like(whole)
                masked[:, channel] = whole[:, channel]
                (relevance,) = torch.autograd.grad(output, x, masked, retain_graph=True)
                found.append(relevance.flatten(2).sum(2))
        return torch.cat(found)


def main() -> None:
    """Times all ways in turn and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--channels", type=int, default=16, help="timed of zennit's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", default="features.26,features.28")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-crp")
    arguments = parser.parse_args()
    if not inside_crp():
        raise SystemExit(run_inside_crp(arguments.environment, "benchmarks.joint_pairs"))
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    step = CHANNELS // arguments.channels
    lower, upper = arguments.layers.split(",")
    ways = Ways(lower, upper, list(range(0, CHANNELS, step)))
    sys.stdout.write(f"{_differences(ways)}\n")
    rows = measured(ways, arguments.rounds)
    for row in rows:
        sys.stdout.write(
            f"{row.method:20} {row.seconds:9.4f} s {'extrapolated' if row.extrapolated else '':12}"
            f" {row.share_of_fwd_bwd:9.3f} x fwd+bwd  nrm is {row.speedup:8.1f} x faster\n"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def measured(ways: Ways, rounds: int) -> list[Row]:
    """The medians of several rounds."""
    factor = CHANNELS / len(ways.chosen)
    methods: dict[str, tuple[Callable[[], Tensor], float]] = {
        "forward+backward": (ways.forward_and_backward, 1),
        "nrm, whole query": (ways.whole_query, 1),
        "zennit-crp": (ways.zennit_crp, factor),
        "zennit, between": (ways.restricted, factor),
    }
    if ways.contracts:
        methods |= {"nrm, contraction": (ways.contraction, 1), "message": (ways.message, 1)}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        for name, (run, scale) in methods.items():
            begin = time.perf_counter()
            run()
            if turn:  # the first warms up
                times[name].append(scale * (time.perf_counter() - begin))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    against = {}
    if ways.contracts:
        seconds["nrm, contraction"] -= seconds.pop("message")
        against = {"zennit, between": seconds["nrm, contraction"]}
    return [
        Row(
            "vgg16",
            f"{ways.lower} x {ways.upper}",
            name,
            value,
            methods[name][1] != 1,
            value / against.get(name, seconds["nrm, whole query"]),
            value / seconds["forward+backward"],
        )
        for name, value in seconds.items()
    ]


def _differences(ways: Ways) -> str:
    pairs = ways.whole_query()[ways.chosen] * ways.ready.scale
    said = []
    for name, found in (("zennit-crp", ways.zennit_crp()), ("between", ways.restricted())):
        error = float((found - pairs).abs().max() / pairs.abs().max())
        said.append(f"{name} differs by {error:.1e} of the largest pair")
    return "; ".join(said)


if __name__ == "__main__":
    main()
