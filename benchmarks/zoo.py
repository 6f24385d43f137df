"""Which architectures nrm explains: every cut of each, and what capture and a pass cost.

Each model has random weights and biases (one seed) and its default composite. Where a network is
piecewise linear, LRP-0 with biases as inputs is also compared with gradient x input. Sizes are
small, so that all of them together take minutes; no file is read and nothing is downloaded.

    python -m benchmarks.zoo --json zoo.json --only ResNet18 BERT
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nrm
from benchmarks.architectures import CASES, Case, build
from nrm.capture.call import ModelCall

Row = dict[str, Any]

AIMS = {"fp32": 1e-5, "fp64": 1e-10}
"""How far a total may be from one, relative to max(1, total variation)."""


LRP_0 = (
    nrm.composites.Everywhere(nrm.rules.Zero()),
    nrm.composites.Everywhere(nrm.rules.Epsilon(1e-30)),
)
"""By derivatives, and by messages."""


# -- measuring -------------------------------------------------------------------------------------


def measure(name: str, rounds: int) -> Row:
    """The row of one architecture; with the reason under `error` where it fails."""
    row: Row = dict.fromkeys(
        (
            "composite",
            "source",
            "ops",
            "capture_s",
            "cuts",
            "worst_fp32",
            "worst_fp64",
            "agreement_fp32",
            "agreement_fp64",
            "gradient",
            "total_variation",
            "ratio",
            "pass_s",
        )
    )
    row = {"model": name, **row, "note": "", "refused": "", "error": ""}
    expected = ""
    try:
        built = build(name)
        row["note"], expected = built.note, built.refused
        explainer = built.explainer()
        begin = time.perf_counter()
        graph = explainer.graph(*built.args, **built.kwargs)
        row["capture_s"] = time.perf_counter() - begin
        row["composite"] = str(explainer.composite or nrm.composites.suggested(graph.captured))
        row["source"], row["ops"] = graph.captured.method, len(graph.operations)
        health, agreement = examine(built, explainer)
        row["cuts"], row["worst_fp32"] = len(health.cuts), health.worst_cut_deviation
        row["total_variation"] = float(health.total_variation.max())
        row["agreement_fp32"] = agreement
        if rounds:
            row["ratio"], row["pass_s"] = _ratio(built, explainer, rounds)
        double = built.double()
        explainer = double.explainer()
        health, row["agreement_fp64"] = examine(double, explainer)
        row["worst_fp64"] = health.worst_cut_deviation
        row["gradient"] = gradient_times_input(double, explainer)
        aims = {
            f"{what}_{precision}": aim
            for what in ("worst", "agreement")
            for precision, aim in AIMS.items()
        }
        row["error"] = ", ".join(
            f"{what} is {row[what]:.1e}, over {aim:g}"
            for what, aim in aims.items()
            if not row[what] <= aim  # also where it is not a number
        )
        if row["gradient"] is not None and not row["gradient"] <= AIMS["fp64"]:
            row["error"] += f" gradient x input is off by {row['gradient']:.1e}"
        if expected:
            row["error"] += f" explained, but expected to be refused: {expected}"
    except Exception as failure:  # every architecture has its row
        reason = f"{type(failure).__name__}: {failure}"
        row["refused" if expected and expected in reason else "error"] = reason
    return row


def examine(built: Case, explainer: nrm.Explainer) -> tuple[nrm.diagnostics.Diagnostics, float]:
    """What crosses every cut, and how far the timed pass's total is from what then arrives.

    The timed pass goes by derivatives where the rules allow it, the diagnostics by messages. The
    difference is relative to max(1, total variation), as that of the cuts.
    """
    R = built.explain(explainer)
    health = R.diagnostics()
    if health.mixed:
        raise AssertionError(f"a batch of one mixes no samples, but {health.mixed} are said to")
    size = max(1.0, float(health.total_variation))
    totals = {name: float(found.sum()) for name, found in built.passes(R).items()}
    return health, max(
        abs(total - float(health.leaf_share[name])) / size for name, total in totals.items()
    )


_LINES_THROUGH_ZERO = ("relu", "leaky_relu", "prelu", "abs")
"""Activations whose slope is their output over their input: LRP-0 takes the ratio."""


def gradient_times_input(built: Case, explainer: nrm.Explainer) -> float | None:
    """How far LRP-0 with biases as inputs is from gradient x input, relative to the largest.

    By messages and by derivatives, the worse. `None` where the network is not piecewise linear in
    inputs that are all real numbers. Whether it is, is asked of the model alone but for the names
    of its activations: a gradient that a small step leaves as it was.

    Arguments:
        built: in double precision.
        explainer: whose graph says what the activations are.
    """
    call = ModelCall(built.model, built.args, built.kwargs, built.options.get("output"))
    graph = built.explain(explainer).graph
    activations = {
        str(one.call.target).split(".")[1] for one in graph.operations if one.kind == "activation"
    }
    if not activations <= set(_LINES_THROUGH_ZERO):
        return None
    if any(variable.kind != "input" for variable in graph.inputs):
        return None
    axis, index = graph.output.batch_axis, list(built.index)
    if axis is not None:
        index.insert(axis, 0)

    def gradients(step: float) -> list[Tensor]:
        torch.manual_seed(1)
        at = [
            (x + step * torch.randn_like(x)).requires_grad_() if x.is_floating_point() else x
            for x in call.tensors
        ]
        real = [x for x in at if x.is_floating_point()]
        found = torch.autograd.grad(call(*at)[tuple(index)], real, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(real, found, strict=True)]

    here, beside = gradients(0.0), gradients(1e-8)
    slope = max(float(g.abs().max()) for g in here)
    if any(float((a - b).abs().max()) > 1e-11 * slope for a, b in zip(here, beside, strict=True)):
        return None
    real = [x for x in call.tensors if x.is_floating_point()]
    expected = [x * g for x, g in zip(real, here, strict=True)]
    size = max(float(part.abs().max()) for part in expected)
    worst = 0.0
    for composite in LRP_0:
        R = built.explain(nrm.Explainer(built.model, composite, bias="input", **built.options))
        for variable, part in zip(graph.inputs, expected, strict=True):
            found = R.heatmap(at=variable.name) * R.scale
            worst = max(worst, float((found.reshape(part.shape) - part).abs().max()) / size)
    return worst


def _ratio(built: Case, explainer: nrm.Explainer, rounds: int) -> tuple[float, float]:
    """Time of a pass to the leaves over that of forward and backward, and its seconds."""
    plain = _forward_backward(built, explainer)

    def explained() -> None:
        built.passes(built.explain(explainer))

    for _ in range(2):
        plain()
        explained()
    pairs = [(_seconds(plain), _seconds(explained)) for _ in range(rounds)]
    ratio = statistics.median(own / base for base, own in pairs)
    return ratio, statistics.median(own for _, own in pairs)


def _forward_backward(built: Case, explainer: nrm.Explainer) -> Callable[[], None]:
    """The gradient of the explained output with respect to inputs and embeddings."""
    model = copy.deepcopy(built.model)
    call = ModelCall(model, built.args, built.kwargs, built.options.get("output"))
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in call.tensors]
    embedded: list[Tensor] = []

    def begin_here(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.register_forward_hook(begin_here)
    index = list(built.index)
    axis = built.explain(explainer).graph.output.batch_axis
    if axis is not None:
        index.insert(axis, 0)

    def run() -> None:
        embedded.clear()
        output = call(*inputs)
        leaves = [x for x in inputs if x.requires_grad] + embedded
        torch.autograd.grad(output[tuple(index)], leaves, allow_unused=True)

    return run


def _seconds(work: Callable[[], None]) -> float:
    gc.collect()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


# -- the command -----------------------------------------------------------------------------------


def hardware() -> Row:
    """What this ran on and with."""
    return {
        "cpu": f"{os.cpu_count()}-core {platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


EXACT = {
    "source": ("source", ""),
    "ops": ("operations", "d"),
    "cuts": ("cuts", "d"),
    "worst_fp32": ("worst fp32", ".0e"),
    "worst_fp64": ("worst fp64", ".0e"),
    "gradient": ("gradient x input", ".0e"),
}
"""The columns that say whether the numbers are right, with the form of a figure."""
COSTS = {
    "composite": ("composite", ""),
    "capture_s": ("capture s", ".1f"),
    "total_variation": ("variation", ".3g"),
    "ratio": ("ratio", ".1f"),
}


def table(rows: Sequence[Row]) -> Any:
    """The rows, to print."""
    from rich.table import Table

    columns = {**EXACT, **COSTS}
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("model", overflow="fold")
    for head, form in columns.values():
        shown.add_column(head, justify="right" if form else "left")
    for row in rows:
        style = "red" if row["error"] else "dim" if row["refused"] else ""
        shown.add_row(row["model"], *cells(row, columns), style=style)
    return shown


def cells(row: Row, columns: dict[str, tuple[str, str]]) -> list[str]:
    """A row's figures as text, without the model's name."""
    shown = {**row, "composite": row["composite"] and row["composite"].partition("(")[0]}
    return [
        "-" if shown[key] is None else format(shown[key], form)
        for key, (_, form) in columns.items()
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as the tables of docs/architectures.md: what is exact, then what was timed."""
    lines = _heads(EXACT)
    for row in rows:
        if row["refused"]:
            reason = row["refused"].replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {row['model']} | refused: {reason} |" + " |" * (len(EXACT) - 1))
        else:
            lines.append(f"| {' | '.join([row['model'], *cells(row, EXACT)])} |")
    timed = [row for row in rows if row["ratio"] is not None]
    if timed:
        lines += ["", *_heads(COSTS)]
        lines += [f"| {' | '.join([row['model'], *cells(row, COSTS)])} |" for row in timed]
    return "\n".join(lines)


def _heads(columns: dict[str, tuple[str, str]]) -> list[str]:
    names = " | ".join(["model", *(head for head, _ in columns.values())])
    rules = "".join("---:|" if form else "---|" for _, form in columns.values())
    return [f"| {names} |", f"|---|{rules}"]


def write(path: Path, rows: Sequence[Row]) -> None:
    """All rows at once or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=1) + "\n")
    beside.replace(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the architectures")
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0 for none")
    parser.add_argument("--threads", type=int, default=1, help="more than one is noisy when shared")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    options = parser.parse_args()
    unknown = [name for name in options.only or () if name not in CASES]
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}, only {', '.join(CASES)}")
    return options


def main() -> int:
    from rich.console import Console
    from rich.progress import track

    warnings.filterwarnings("ignore")
    # Export says at length why it gives way to an eager trace.
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    options = arguments()
    torch.set_num_threads(options.threads)
    console, progress = Console(), Console(stderr=True)
    rows = []
    names = [name for name in CASES if name in (options.only or CASES)]
    for name in track(names, "explaining", console=progress):
        rows.append(measure(name, options.rounds))
        if options.json:
            write(options.json, rows)
        gc.collect()
    if options.markdown:
        sys.stdout.write(markdown(rows) + "\n")
    else:
        console.print(table(rows))
    failed = [row for row in rows if row["error"]]
    for row in failed:
        progress.print(f"[red]{row['model']}[/red]: {row['error']}", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
