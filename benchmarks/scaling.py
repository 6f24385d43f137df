"""What a query costs against the size of the problem, and with which exponent.

Small networks of convolutions and ReLUs, z+ everywhere, random weights. Image size, batch,
messages travelling at once, layers, neurons of a layer and sets of a formula grow one at a time;
beside each query stands a plain forward + backward pass of the same network on the same sizes. All
sizes are timed in turn within every round. To the medians `c + a n^p` is fitted, `c` what does not
grow; where nothing is expected to grow, the slope on logarithmic axes stands for it. Intervals are
bootstrapped over rounds. With one thread, which is the default, seconds are those of the processor,
which others on the machine disturb least.

    python -m benchmarks.scaling --json scaling.json --picture scaling.png
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import nrm
from nrm import composites, rules

Array = npt.NDArray[np.float64]
Way = Callable[[], object]

TARGET = 0
PLAIN = "forward+backward"
BOOTSTRAPS = 300
POWERS = np.arange(0.02, 3.5, 0.01)
COLOURS = {PLAIN: "#8a8a8a", "heatmap": "#1f5fa8", "heatmaps": "#1f5fa8", "relevance": "#1f5fa8"}
SECOND = "#c8551b"


@dataclass(frozen=True)
class Size:
    """One problem: an image's side, samples, messages, hidden layers, channels, and sets."""

    side: int = 32
    batch: int = 2  # for one small sample torch chooses other kernels than for more
    messages: int = 1
    layers: int = 4
    width: int = 32
    sets: int = 1


@dataclass(frozen=True)
class Panel:
    """What grows, how the rest stays, and which queries are asked.

    Attributes:
        field: of a `Size`.
        squared: whether the number that grows is the square of the field.
        flat: whether no growth is expected.
    """

    against: str
    field: str
    sizes: tuple[int, ...]
    rest: Size
    queries: tuple[str, ...] = ("heatmap",)
    squared: bool = False
    flat: bool = False

    def size(self, value: int) -> Size:
        return replace(self.rest, **{self.field: value})

    def number(self, value: int) -> int:
        return value**2 if self.squared else value


PANELS = (
    Panel("pixels", "side", (16, 24, 32, 48, 64, 96, 128), Size(), squared=True),
    Panel("samples of a batch", "batch", (2, 4, 8, 16, 32, 64), Size(side=24)),
    Panel(
        "messages at once",
        "messages",
        (1, 2, 4, 8, 16, 32, 64, 128),
        Size(side=8, width=128),
        ("heatmaps", "joint"),
    ),
    Panel("layers", "layers", (2, 4, 8, 16, 32, 64), Size(side=16)),
    Panel("channels of a layer", "width", (32, 64, 128, 256, 512, 1024), Size(side=8)),
    Panel(
        "sets of a formula",
        "sets",
        (1, 2, 4, 8, 16, 32),
        Size(side=16, layers=32),
        ("relevance",),
        flat=True,
    ),
)

NAMES = {
    "heatmap": "R.heatmap(a)",
    "heatmaps": "R.heatmaps([a, b, …])",
    "joint": "R.joint([a, b, …], layer)",
    "relevance": "R(a, b, …)",
    PLAIN: "forward + backward",
}


def network(size: Size) -> nn.Module:
    """Convolutions without biases, ReLUs, the mean over positions and a linear layer."""
    torch.manual_seed(0)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for layer in range(size.layers):
        modules[f"conv{layer}"] = nn.Conv2d(channels, size.width, 3, padding=1, bias=False)
        modules[f"relu{layer}"] = nn.ReLU()
        channels = size.width
    modules["pool"] = nn.AdaptiveAvgPool2d(1)
    modules["flat"] = nn.Flatten()
    modules["head"] = nn.Linear(channels, 10, bias=False)
    model = nn.Sequential(modules).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


class Ways:
    """The queries on one network, from the picture on, and plain forward + backward beside them."""

    def __init__(self, size: Size) -> None:
        self.size, self.model = size, network(size)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.rand(size.batch, 3, size.side, size.side, generator=generator)
        self.repeated = self.x.repeat(size.messages, 1, 1, 1)
        self.explainer = nrm.Explainer(self.model, composites.Everywhere(rules.ZPlus()))
        self.top = f"relu{size.layers - 1}"
        half = range(0, size.width, 2)
        self.some = nrm.channels(self.top, *half)
        self.each = [nrm.channels(self.top, channel) for channel in range(size.messages)]
        # The lowest layer is always among them, so that messages go equally far.
        below = [0, *range(size.layers - 1, size.layers - size.sets, -1)]
        self.chain = [nrm.channels(f"relu{layer}", *half) for layer in below]

    def forward_and_backward(self) -> object:
        """A plain gradient, of as many samples as there are messages."""
        x = self.repeated.clone().requires_grad_()
        self.model(x)[:, TARGET].sum().backward()
        return x.grad

    def heatmap(self) -> Tensor:
        return self.explainer(self.x, target=TARGET).heatmap(self.some)

    def heatmaps(self) -> Tensor:
        return self.explainer(self.x, target=TARGET).heatmaps(self.each)

    def joint(self) -> Tensor:
        measure = self.explainer(self.x, target=TARGET)
        return measure.joint(self.each, "relu0", method="backward")

    def relevance(self) -> Tensor:
        return self.explainer(self.x, target=TARGET)(*self.chain)

    def way(self, name: str) -> Way:
        way: Way = self.forward_and_backward if name == PLAIN else getattr(self, name)
        return way


@dataclass(frozen=True)
class Exponent:
    """How the time of one way grows: `seconds = constant + factor * number ** exponent`.

    Attributes:
        slope: on logarithmic axes, of the larger half of the sizes, nothing taken off.
        fitted: whether the exponent is that of the fit; else it is the slope of all sizes.
    """

    against: str
    what: str
    exponent: float
    ci_low: float
    ci_high: float
    slope: float
    fitted: bool
    constant: float
    factor: float


Times = dict[tuple[str, int, str], list[float]]
"""Seconds of every round, by what grows, its value, and the way."""


def main() -> None:
    """Times all sizes in turn, fits exponents, and writes the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few rounds of small sizes")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    panels: Sequence[Panel] = PANELS
    if arguments.quick:
        panels = [replace(panel, sizes=panel.sizes[:4]) for panel in PANELS]
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    times = measured(panels, 2 if arguments.quick else arguments.rounds, clock)
    exponents = [exponent for panel in panels for exponent in fitted(panel, times)]
    for found in exponents:
        sys.stdout.write(
            f"{found.against:20} {found.what:18} {found.exponent:5.2f}"
            f" [{found.ci_low:5.2f}, {found.ci_high:5.2f}]  slope {found.slope:5.2f}\n"
        )
    if arguments.json is not None:
        result = {
            "threads": arguments.threads,
            "clock": clock.__name__,
            "rows": rows(panels, times),
            "exponents": [asdict(exponent) for exponent in exponents],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.picture is not None:
        draw(panels, times, exponents, arguments.picture)


# -- time ------------------------------------------------------------------------------------------


def measured(panels: Sequence[Panel], rounds: int, clock: Callable[[], float]) -> Times:
    """Seconds of every way at every size in every round."""
    runs: dict[tuple[str, int, str], Way] = {}
    for panel in panels:
        for value in panel.sizes:
            ways = Ways(panel.size(value))
            for name in (PLAIN, *panel.queries):
                run = runs[panel.against, value, name] = ways.way(name)
                run()
    times: Times = {key: [] for key in runs}
    keys = list(runs)
    for turn in range(rounds):
        shift = turn * len(keys) // rounds
        for key in keys[shift:] + keys[:shift]:
            begin = clock()
            runs[key]()
            times[key].append(clock() - begin)
    return times


def rows(panels: Sequence[Panel], times: Times) -> list[dict[str, Any]]:
    """Medians of every query at every size, with what forward + backward takes beside it."""
    found = []
    for panel in panels:
        for value in panel.sizes:
            size = panel.size(value)
            for what in panel.queries:
                found.append(
                    {
                        "against": panel.against,
                        "size": panel.number(value),
                        "what": what,
                        "seconds": float(np.median(times[panel.against, value, what])),
                        "forward_backward": float(np.median(times[panel.against, value, PLAIN])),
                        "pixels": size.side**2,
                        **{k: v for k, v in asdict(size).items() if k != "side"},
                    }
                )
    return found


# -- exponents -------------------------------------------------------------------------------------


def fitted(panel: Panel, times: Times) -> list[Exponent]:
    """The exponent of every way of a panel."""
    numbers = np.array([panel.number(value) for value in panel.sizes], dtype=np.float64)
    found = []
    for what in (PLAIN, *panel.queries):
        seconds = np.array([times[panel.against, value, what] for value in panel.sizes])
        grows = not panel.flat
        medians = np.median(seconds, axis=1)
        power, constant, factor = power_law(numbers, medians)
        larger = numbers >= np.median(numbers)
        generator = np.random.default_rng(0)
        again = []
        for _ in range(BOOTSTRAPS):
            drawn = generator.integers(seconds.shape[1], size=seconds.shape[1])
            resampled = np.median(seconds[:, drawn], axis=1)
            again.append(power_law(numbers, resampled)[0] if grows else slope(numbers, resampled))
        low, high = np.quantile(again, [0.025, 0.975])
        if not grows:  # the line drawn is that of the slope
            power, constant = slope(numbers, medians), 0.0
            factor = float(np.exp(np.mean(np.log(medians / numbers**power))))
        found.append(
            Exponent(
                panel.against,
                what,
                power,
                float(low),
                float(high),
                slope(numbers[larger], medians[larger]),
                grows,
                constant,
                factor,
            )
        )
    return found


def power_law(numbers: Array, seconds: Array) -> tuple[float, float, float]:
    """`p`, `c` and `a` of `c + a n^p`, both not negative, with the least relative squares."""
    grown = numbers[None] ** POWERS[:, None] / seconds  # [powers, sizes]
    level = np.broadcast_to(1 / seconds, grown.shape)
    uu, vv, uv = (grown**2).sum(1), (level**2).sum(1), (grown * level).sum(1)
    u, v = grown.sum(1), level.sum(1)
    size = uu * vv - uv**2
    factor, constant = (vv * u - uv * v) / size, (uu * v - uv * u) / size
    alone = constant < 0
    factor, constant = np.where(alone, u / uu, factor), np.where(alone, 0.0, constant)
    falls = factor < 0
    factor, constant = np.where(falls, 0.0, factor), np.where(falls, v / vv, constant)
    misses = ((factor[:, None] * grown + constant[:, None] * level - 1) ** 2).sum(1)
    best = int(misses.argmin())
    return float(POWERS[best]), float(constant[best]), float(factor[best])


def slope(numbers: Array, seconds: Array) -> float:
    """The slope on logarithmic axes."""
    return float(np.polyfit(np.log(numbers), np.log(seconds), 1)[0])


# -- the picture -----------------------------------------------------------------------------------


def draw(panels: Sequence[Panel], times: Times, exponents: Sequence[Exponent], path: Path) -> None:
    """A panel for each thing that grows: medians, fits, and exponents in the titles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(2, 3)
    for ax, panel in zip(axes.flat, panels, strict=True):
        of_panel = [found for found in exponents if found.against == panel.against][::-1]
        numbers = np.array([panel.number(value) for value in panel.sizes], dtype=np.float64)
        line = np.geomspace(numbers[0], numbers[-1], 100)
        for found in of_panel:
            colour = COLOURS.get(found.what, SECOND)
            medians = [
                1e3 * float(np.median(times[panel.against, value, found.what]))
                for value in panel.sizes
            ]
            curve = 1e3 * (found.constant + found.factor * line**found.exponent)
            label = f"{NAMES[found.what]}: {round(found.exponent, 2) + 0.0:.2f}"
            label += f" [{found.ci_low:.2f}, {found.ci_high:.2f}]"
            ax.plot(line, curve, color=colour, linewidth=1.2)
            ax.plot(numbers, medians, "o", color=colour, markersize=4.5, label=label)
        ours = sorted(f"{found.exponent:.2f}" for found in of_panel if found.what != PLAIN)
        kind = "slope" if panel.flat else "exponent"
        ax.set_title(f"{kind} {' and '.join(ours)}", fontsize=12)
        _axes(ax, numbers, len(of_panel))
        ax.set_xlabel(panel.against, fontsize=11)
        ax.legend(loc="upper left", fontsize=9, frameon=False, handletextpad=0.2)
    for ax in axes[:, 0]:
        ax.set_ylabel("milliseconds", fontsize=11)
    figure.savefig(path, dpi=130)


def _axes(ax: Any, numbers: Array, entries: int) -> None:
    """Logarithmic axes with plain numbers, and room for the legend above the points."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    middle = (low * high) ** 0.5
    low, high = min(low, middle / 6), max(high, middle * 6)
    high *= (high / low) ** (0.1 + 0.09 * entries)
    ax.set_ylim(low, high)
    every = 1 if len(numbers) < 7 else 2
    shown = numbers[::-1][::every][::-1]
    ax.set_xticks(shown, [f"{int(number):,}" for number in shown], fontsize=9)
    powers = [
        10.0**power
        for power in range(int(np.ceil(np.log10(low))), int(np.floor(np.log10(high))) + 1)
    ]
    ax.set_yticks(powers, [f"{power:,g}" for power in powers], fontsize=9)
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
