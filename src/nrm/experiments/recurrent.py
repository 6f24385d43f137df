"""Relevance over time in a linear recurrent network (section 4.5, Fig. 8).

A series of three states, one-hot, sets its label at one step. A linear cell
`h_t = W [x_t, h_{t-1}] + b` reads it, and the last hidden state says the label. Input and hidden
state are parents of the same neurons, so they are normalised jointly (eqs. 19-23). The step that
deserves the relevance is known, so one sees what a rule makes of it over many steps.

    python -m nrm.experiments.recurrent --out DIR
"""

# Annotations are evaluated here, because typer reads those of the command in `main`.

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nrm import rules
from nrm.composites import Composite, Everywhere, LRPAll
from nrm.explainer import Explainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATES = 3
STEPS = 12
SEEDS = 8
PICTURE, RESULT = "recurrent.png", "recurrent.json"
_BATCH = 128
_POOL = 2**15
_MOST_UPDATES = 4000
_CHECK_EVERY = 25
_EXPLAINED = 200
_BAND = (0.1, 0.9)


class Task(StrEnum):
    """What sets the label.

    Attributes:
        EVENT: the series rests in state 0 and is in state 1 or 2 at one step, any of them;
            which of the two is the label. There are only two such series for each step.
        POSITION: all states are random, and the label is the state at one fixed step.
    """

    EVENT = "event"
    POSITION = "position"


class Method(StrEnum):
    """How relevance is propagated.

    Attributes:
        PLAIN: the normalised measure under the paper's rule, gamma = 0.25, biases dropped.
        UNNORMALIZED: the original walk relevance (eq. 26) under the same rule.
        SIGN_AWARE: the normalised measure under the sign-aware rule, gamma = 0.25.
        LRP_ALL: the normalised measure under LRP-0, with biases as inputs.
    """

    PLAIN = "plain"
    UNNORMALIZED = "unnormalized"
    SIGN_AWARE = "sign_aware"
    LRP_ALL = "lrp_all"


COMPOSITES: dict[Method, Composite] = {
    Method.PLAIN: Everywhere(rules.PlainGamma(0.25)),
    Method.SIGN_AWARE: Everywhere(rules.Gamma(0.25)),
    Method.LRP_ALL: LRPAll(),
}
"""Those of the normalised measures; the unnormalised one is of the plain rule."""


@dataclass(frozen=True)
class Series:
    """Series and their labels.

    Attributes:
        x: `[N, steps, 3]`, one-hot, in double precision.
        label: `[N]`.
        label_step: `[N]`, the step, from 0, that sets the label.
    """

    x: Tensor
    label: Tensor
    label_step: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> "Series":
        return Series(self.x[rows], self.label[rows], self.label_step[rows])


class LinearRNN(nn.Module):
    """A recurrent network without a nonlinearity: one linear cell and a linear read-out."""

    def __init__(self, classes: int, hidden: int = 32) -> None:
        super().__init__()
        self.hidden = hidden
        self.cell = nn.Linear(STATES + hidden, hidden)
        self.head = nn.Linear(hidden, classes)
        with torch.no_grad():  # or a new network forgets before it has learnt to remember
            self.cell.weight[:, STATES:] = nn.init.orthogonal_(torch.empty(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]` of series `[N, steps, 3]`."""
        h = x.new_zeros(x.shape[0], self.hidden)
        for t in range(x.shape[1]):
            h = self.cell(torch.cat([x[:, t], h], -1))
        logits: Tensor = self.head(h)
        return logits


@dataclass(frozen=True)
class Trained:
    """A network after training.

    Attributes:
        model: in double precision and evaluation mode.
        accuracy: on `held_out`.
        held_out: under `Task.POSITION` series that training never showed; under `Task.EVENT`,
            where there are so few, every series.
        updates: how many batches of 128 series it took.
    """

    model: LinearRNN
    accuracy: float
    held_out: Series
    updates: int


@dataclass(frozen=True)
class Relevance:
    """What one method says about some series.

    Attributes:
        over_time: `[N, steps]`, the relevance of the input neurons of every step; what is
            unnormalised is given in units of the logit.
        biases: `[N]`, the share that ends at biases; nothing for what is unnormalised.
        cut_deviation: the largest deviation from one of a total over a cut, relative to
            max(1, total variation). There is a cut between any two steps.
    """

    over_time: Tensor
    biases: Tensor
    cut_deviation: float | None

    @property
    def total_variation(self) -> Tensor:
        """`[N]`: the sum over steps of absolute relevances."""
        return self.over_time.abs().sum(1)


def middle(steps: int) -> int:
    """The step that sets the label under `Task.POSITION`, and in the figure under both."""
    return (steps - 1) // 2


def make_series(task: Task, steps: int, count: int, seed: int) -> Series:
    """Random series, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if task is Task.EVENT:
        every = all_events(steps)
        return every[torch.randint(len(every), (count,), generator=generator)]
    states = torch.randint(STATES, (count, steps), generator=generator)
    label_step = torch.full((count,), middle(steps))
    return Series(F.one_hot(states, STATES).double(), states[:, middle(steps)], label_step)


def all_events(steps: int) -> Series:
    """Every series of `Task.EVENT`: two for each step."""
    label_step = torch.arange(steps).repeat_interleave(STATES - 1)
    label = torch.arange(STATES - 1).repeat(steps)
    states = torch.zeros(len(label), steps, dtype=torch.long)
    states.scatter_(1, label_step[:, None], label[:, None] + 1)
    return Series(F.one_hot(states, STATES).double(), label, label_step)


def train(task: Task, steps: int, seed: int) -> Trained:
    """Train with Adam until all held-out series were right at three checks in a row.

    Gives up after 4000 updates: `accuracy` says what was reached. The same seed gives the same
    data and, on the same machine, the same network.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = LinearRNN(STATES - 1 if task is Task.EVENT else STATES)
        shown, held_out = _split(task, steps, seed)
        optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
        in_a_row, updates = 0, 0
        while updates < _MOST_UPDATES and in_a_row < 3:
            some = shown[torch.randint(len(shown), (_BATCH,))]
            optimiser.zero_grad()
            loss = F.cross_entropy(model(some.x.float()), some.label)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            updates += 1
            if updates % _CHECK_EVERY == 0:
                in_a_row = in_a_row + 1 if _accuracy(model, held_out) == 1 else 0
        model.double().eval().requires_grad_(False)
        return Trained(model, _accuracy(model, held_out), held_out, updates)


def relevance_over_time(model: nn.Module, series: Series) -> dict[Method, Relevance]:
    """What every method says of each step, for the label of each series."""
    found: dict[Method, Relevance] = {}
    with _one_thread():
        for method, composite in COMPOSITES.items():
            R = Explainer(model, composite)(series.x, target=series.label)
            checks = R.diagnostics()
            found[method] = Relevance(
                R.heatmap().sum(-1), checks.bias_share, checks.worst_cut_deviation
            )
            if method is Method.PLAIN:
                unnormalized = R.heatmap(normalized=False).sum(-1) / R.scale[:, None]
                nothing = torch.zeros_like(R.scale)
                found[Method.UNNORMALIZED] = Relevance(unnormalized, nothing, None)
    return found


def experiment(
    seeds: int = SEEDS,
    steps: int = STEPS,
    done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train and explain `seeds` networks on each task.

    Arguments:
        done: called after every network.

    Returns:
        what `recurrent.json` holds. Curves are of the series whose label is set at the middle
        step; all other numbers are of all series explained.
    """
    result: dict[str, Any] = {"steps": steps, "seeds": seeds, "gamma": 0.25, "tasks": {}}
    for task in Task:
        networks: list[dict[str, Any]] = []
        explained: list[Series] = []
        found: dict[Method, list[Relevance]] = {method: [] for method in Method}
        for seed in range(seeds):
            trained = train(task, steps, seed)
            series = trained.held_out[:_EXPLAINED]
            for method, relevance in relevance_over_time(trained.model, series).items():
                found[method].append(relevance)
            explained.append(series)
            networks.append(
                {
                    "seed": seed,
                    "accuracy": trained.accuracy,
                    "held_out": len(trained.held_out),
                    "updates": trained.updates,
                }
            )
            done()
        label_step = torch.cat([series.label_step for series in explained])
        result["tasks"][str(task)] = {
            "networks": networks,
            "explained": len(label_step),
            "label_step": middle(steps),
            "methods": {str(m): _summary(found[m], label_step, middle(steps)) for m in Method},
        }
    return result


def _summary(found: Sequence[Relevance], label_step: Tensor, drawn: int) -> dict[str, Any]:
    """One method over all networks."""
    over_time = torch.cat([relevance.over_time for relevance in found])
    variation = torch.cat([relevance.total_variation for relevance in found])
    biases = torch.cat([relevance.biases for relevance in found])
    totals = over_time.sum(1).abs()
    at_label = over_time.gather(1, label_step[:, None])[:, 0]
    deviations = [r.cut_deviation for r in found if r.cut_deviation is not None]
    curves = over_time[label_step == drawn]
    return {
        "largest_at_label_step": float((over_time.argmax(1) == label_step).double().mean()),
        "at_label_step": _spread(at_label),
        "over_time": {"smallest": float(over_time.min()), "largest": float(over_time.max())},
        "total_variation": _spread(variation),
        "total_of_inputs": _spread(totals),
        "biases": _spread(biases),
        "worst_cut_deviation": max(deviations, default=None),
        "curve": {"mean": curves.mean(0).tolist(), **_quantiles(curves)},
        "curve_of_sizes": {"mean": curves.abs().mean(0).tolist(), **_quantiles(curves.abs())},
    }


def _spread(values: Tensor) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "median": float(values.quantile(0.5)),
        "smallest": float(values.min()),
        "largest": float(values.max()),
    }


def _quantiles(curves: Tensor) -> dict[str, list[float]]:
    low, high = _BAND
    return {
        "median": curves.quantile(0.5, 0).tolist(),
        "low": curves.quantile(low, 0).tolist(),
        "high": curves.quantile(high, 0).tolist(),
    }


def _split(task: Task, steps: int, seed: int) -> tuple[Series, Series]:
    """Series to train on, and series to test on that are not among them where that can be."""
    if task is Task.EVENT:
        every = all_events(steps)
        return every, every
    pool = make_series(task, steps, _POOL, seed)
    states = pool.x.argmax(-1)
    code = (states * STATES ** torch.arange(steps)).sum(1)
    different, which = torch.unique(code, return_inverse=True)  # type: ignore[no-untyped-call]
    apart = (torch.rand(len(different)) < 0.1)[which]
    return pool[~apart], pool[apart]


@torch.no_grad()
def _accuracy(model: LinearRNN, series: Series) -> float:
    right = model(series.x.to(model.head.weight.dtype)).argmax(1) == series.label
    return float(right.double().mean())


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads gain a network this small nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- the figure ----------------------------------------------------------------------------------

_COLOURS = {
    Method.PLAIN: "#c0392b",
    Method.UNNORMALIZED: "#7d3c98",
    Method.SIGN_AWARE: "#1f6fb2",
    Method.LRP_ALL: "#1e8449",
}
_HEADS = {
    Method.PLAIN: r"normalised, $\gamma$ as in the paper",
    Method.UNNORMALIZED: "unnormalised, the same rule",
    Method.SIGN_AWARE: r"normalised, sign-aware $\gamma$",
    Method.LRP_ALL: "normalised, LRP-0 with biases",
}
_ROWS = {
    Task.EVENT: "one event, otherwise at rest",
    Task.POSITION: "random states at all steps",
}
_GREY = "0.35"


def draw(result: dict[str, Any]) -> "Figure":
    """Relevance over time, one row for a task and one column for a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.4, 5.4), dpi=110, layout="constrained")
    panels: Any = figure.subplots(len(Task), len(Method), sharex=True)
    for row, task in enumerate(Task):
        found = result["tasks"][str(task)]
        for column, method in enumerate(Method):
            ax = panels[row][column]
            _panel(ax, method, found["methods"][str(method)], found["label_step"])
            if row == 0:
                ax.set_title(_HEADS[method], fontsize=10, color=_COLOURS[method])
            else:
                ax.set_xlabel("time step", fontsize=9)
        panels[row][0].set_ylabel(f"{_ROWS[task]}\n\nrelevance", fontsize=10)
        panels[row][1].set_ylabel("|relevance / logit|", fontsize=9)
    label_step = result["tasks"][str(Task.EVENT)]["label_step"]
    _note(panels[0][2], "the step that\nsets the label", label_step + 1)
    last = result["steps"] + 0.5
    _note(panels[1][2], "line: median\nband: middle 80 %", last, align="right")
    return figure


def _panel(ax: "Axes", method: Method, found: dict[str, Any], label_step: int) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, SymmetricalLogLocator

    curve = found["curve_of_sizes" if method is Method.UNNORMALIZED else "curve"]
    steps = list(range(1, len(curve["median"]) + 1))
    colour = _COLOURS[method]
    ax.axvline(label_step + 1, color=_GREY, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
    ax.fill_between(steps, curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
    ax.plot(steps, curve["median"], color=colour, marker="o", markersize=3.5, linewidth=1.6)
    if method is Method.UNNORMALIZED:
        ax.set_yscale("log")
        ax.axhline(1, color=_GREY, linewidth=0.6)
        ax.yaxis.set_major_locator(LogLocator(numticks=7))
        ax.yaxis.set_minor_locator(FixedLocator([]))
    else:
        ax.axhline(0, color=_GREY, linewidth=0.6)
    if method is Method.PLAIN:
        ax.set_yscale("symlog", linthresh=1)
        locator = SymmetricalLogLocator(base=10, linthresh=1)
        locator.set_params(numticks=7)
        ax.yaxis.set_major_locator(locator)
    elif method is not Method.UNNORMALIZED:
        ax.set_ylim(min(-0.25, 1.05 * min(curve["low"])), max(1.2, 1.05 * max(curve["high"])))
    ax.set_xlim(0.5, len(steps) + 0.5)
    ax.xaxis.set_major_locator(FixedLocator(steps if len(steps) <= 12 else steps[1::2]))
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _note(ax: "Axes", text: str, step: float, align: str = "left") -> None:
    """Say once what holds for all panels, at the top of one, beside a step."""
    ax.annotate(
        text,
        (step, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(7 if align == "left" else 0, 0),
        textcoords="offset points",
        ha=align,
        va="top",
        fontsize=8,
        color=_GREY,
    )


# -- the command ---------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> None:
    """The command; `args` are those of the command line unless given."""
    try:
        import matplotlib  # noqa: F401
        import typer
        from rich.console import Console
        from rich.progress import Progress

        from nrm import plot
        from nrm.cli.errors import one_line_errors
        from nrm.cli.folder import check_folder, filled_at_once
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("nrm"):
            raise
        sys.stderr.write(f"error: {error.name} is not installed: pip install 'nrm[cli]'\n")
        raise SystemExit(2) from None

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def recurrent(
        out: Annotated[Path, typer.Option(help=f"Folder for {PICTURE} and {RESULT}.")] = Path(
            "recurrent"
        ),
        seeds: Annotated[int, typer.Option(min=1, help="How many networks for each task.")] = SEEDS,
        steps: Annotated[int, typer.Option(min=3, max=32, help="Length of a series.")] = STEPS,
        json_file: Annotated[
            Path | None, typer.Option("--json", help=f"Write {RESULT} also here.")
        ] = None,
        debug: Annotated[
            bool, typer.Option("--debug", help="Show the traceback of an error.")
        ] = False,
    ) -> None:
        """Train linear recurrent networks and draw their relevance over time."""
        with one_line_errors(debug):
            check_folder(out)
            with Progress(console=Console(stderr=True), transient=True) as progress:
                bar = progress.add_task("networks", total=len(Task) * seeds)
                result = experiment(seeds, steps, lambda: progress.advance(bar))
            text = json.dumps(result, indent=2) + "\n"
            with filled_at_once(out, last=RESULT) as folder:
                plot.save(draw(result), folder / PICTURE)
                (folder / RESULT).write_text(text, encoding="utf-8")
            if json_file is not None:
                _replace(json_file, text)
            for line in _report(result):
                typer.echo(line)
            typer.echo(f"{PICTURE} and {RESULT} are in {out}.")

    app(args=args, prog_name="python -m nrm.experiments.recurrent")


def _report(result: dict[str, Any]) -> Iterator[str]:
    """The result in a few lines."""
    for task, found in result["tasks"].items():
        accuracies = [network["accuracy"] for network in found["networks"]]
        reached = sum(accuracy == 1 for accuracy in accuracies)
        yield (
            f"{task}: {reached} of {len(accuracies)} networks are always right "
            f"(worst accuracy {min(accuracies):.2%})"
        )
        for method, numbers in found["methods"].items():
            at, variation = numbers["at_label_step"], numbers["total_variation"]
            yield (
                f"  {method:<13} label step: median {at['median']:.3g}, largest of all in "
                f"{numbers['largest_at_label_step']:.0%}; sum of sizes: median "
                f"{variation['median']:.3g}, at most {variation['largest']:.3g}"
            )


def _replace(file: Path, text: str) -> None:
    """Write beside, then rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(beside, file)
    finally:
        Path(beside).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
