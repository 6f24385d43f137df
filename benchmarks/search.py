"""The most relevant triples of channels, exactly: time, and how much of the search space it takes.

The search over three layers under several rules, beside the greedy one and, where it can be had,
listing all combinations. On SqueezeNet with its pretrained weights (`--data`), and on VGG16 with
random ones: these make channels alike, which is the worst case for bounds.

    python -m benchmarks.search --data ../shared/data --json search.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nrm
from nrm import composites
from nrm.composites import Composite

COMPOSITES: dict[str, Callable[[], Composite]] = {
    "z+": composites.EpsilonPlus,
    "gamma 0.25": lambda: composites.GammaFlat(0.25),
    "LRP-0": lambda: composites.GammaFlat(0.0),
}
LAYERS = {
    "vgg16": ("features.24", "features.26", "features.28"),
    "squeezenet1_0": (
        "features.9.expand3x3",
        "features.10.squeeze",
        "features.10.expand3x3",
    ),
}


@dataclass(frozen=True)
class Row:
    """One search.

    Attributes:
        visited: the share of all combinations whose relevance was computed.
        followed: beginnings followed by a message.
        greedy: the relevance of the best flow that the greedy search finds, as a share of the
            best there is.
        shared: how many of the k best the greedy search finds.
    """

    model: str
    layers: str
    composite: str
    k: int
    combinations: int
    seconds: float
    exact: bool
    visited: float
    followed: int
    best: float
    greedy: float
    shared: int


def main() -> None:
    """Searches on every model under every rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path, help="with squeezenet/ and imagenet/")
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    rows = []
    for name, model, x, target in _models(arguments.data):
        for described, make in COMPOSITES.items():
            R = nrm.Explainer(model, make())(x, target=target)
            row = _searched(name, described, R, arguments.top, arguments.rounds)
            rows.append(row)
            sys.stdout.write(
                f"{row.model:14} {row.composite:11} {row.seconds:7.2f} s, "
                f"{row.visited:6.1%} of {row.combinations} visited, exact: {row.exact}; greedy "
                f"{row.greedy:.2f} of the best, {row.shared} of {row.k}\n"
            )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _searched(name: str, described: str, R: nrm.Measure, k: int, rounds: int) -> Row:
    layers = LAYERS[name]
    R.top(*layers, k=k, work=1)  # prepares operations
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        flows = R.top(*layers, k=k)
        times.append(time.perf_counter() - begin)
    greedy = R.top(*layers, k=k, method="greedy")
    found = {tuple(flow.parts.values()) for flow in flows}
    return Row(
        name,
        " x ".join(layers),
        described,
        k,
        math.prod(R.channels(layer).shape[1] for layer in layers),
        statistics.median(times),
        flows.exact,
        flows.visited,
        flows.expanded,
        flows[0].relevance,
        greedy[0].relevance / flows[0].relevance,
        sum(tuple(flow.parts.values()) in found for flow in greedy),
    )


def _models(data: Path | None) -> Iterator[tuple[str, Any, Tensor, int]]:
    from nrm.torchvision_mismatch import import_torchvision

    import_torchvision()
    from torchvision.models import squeezenet1_0, vgg16

    torch.manual_seed(0)
    yield "vgg16", vgg16().eval(), torch.rand(1, 3, 224, 224), 3
    if data is not None:
        from safetensors.torch import load_file

        from nrm import io

        model = squeezenet1_0()
        model.load_state_dict(load_file(data / "squeezenet" / "squeezenet1_0.safetensors"))
        image = sorted((data / "imagenet").glob("*.JPEG"))[0]
        picture = io.imagenet(io.read_image(image), 224)
        target = int(model.eval()(picture.x).argmax())
        yield "squeezenet1_0", model, picture.x, target


if __name__ == "__main__":
    main()
