"""`circuits`: direct edges where circuits are known, and in a language model beside patching.

Compiled transformers (`tracr`), if the folder of data has them; and indirect objects (`ioi`), if a
model of transformers is named. Everything on one page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import nrm
from nrm import plot
from nrm.cli import tokens
from nrm.cli.models import find_device
from nrm.errors import InputError
from nrm.evaluation.store import Store
from nrm_reproduce import attribution, ioi, tracr
from nrm_reproduce.edge_ablation import SHARES
from nrm_reproduce.programs import PROGRAMS
from nrm_reproduce.report import GREY, Experiment, Picture, Report, Request, Table, Value, versions

NAME = "circuits"
DRAWN = 40
"""Edges in the picture of one prompt."""
PATCHING = (
    "patched",
    "method",
    "Pearson",
    "95 % interval",
    "below nrm, reference",
    "mean by prompt",
    "95 % interval",
)
"""Columns of the tables of patching."""
CIRCUITS = (
    "circuits",
    "ranked by",
    "method",
    "CPR",
    "95 % interval",
    "below nrm, reference",
    "CMD",
    "95 % interval",
)
"""Columns of the tables of circuits."""
_COLOURS = ("#b2182b", "#ef8a62", "#2166ac", "#67a9cf", "#1b7837", "#7fbf7b", "#762a83", "0.6")


def run(request: Request) -> Report:
    """What there are data for; the rest is skipped, and said to be.

    Raises:
        InputError: there are none for either part.
    """
    skipped: dict[str, str] = {}
    tables: list[Table] = []
    pictures: list[Picture] = []
    details: dict[str, Any] = {}
    facts: dict[str, str | int | float] = {"data": request.data, "seed": request.seed}
    if _has_programs(Path(request.data)):
        found = tracr.program_edges(Path(request.data), samples=request.samples, say=request.say)
        reads = tracr.program_reads(Path(request.data), samples=request.samples, say=request.say)
        tables += [tracr.table(found, request.seed), tracr.reads_table(reads)]
        details["tracr"] = [asdict(one) for one in found]
        details["tracr, reads"] = [asdict(one) for one in reads]
    else:
        skipped["compiled transformers"] = f"--data {request.data} has no folder tracr"
    if request.model is not None:
        of_model = _of_model(request)
        facts |= of_model.facts
        tables += of_model.tables
        pictures += of_model.pictures
        details["ioi"] = of_model.details
    else:
        skipped["indirect objects"] = "no --model is named"
    if not tables:
        raise InputError(
            "circuits: there is nothing to run on: " + "; ".join(skipped.values()) + ". Give "
            "--data, a folder with tracr in it, or --model, a folder with a Llama-like model of "
            "transformers."
        )
    facts |= {f"skipped: {name}": why for name, why in skipped.items()}
    return Report(
        NAME,
        "Circuits",
        (),
        pictures,
        facts | {"versions": versions()},
        notes=(
            "Peers, patching and the ablation of edges are plain torch, and know nothing of nrm.",
            "An edge into a head is one into its queries, keys and values alike, for all methods.",
        ),
        details=details,
        tables=tables,
    )


def _has_programs(folder: Path) -> bool:
    first = f"{PROGRAMS[0]}.json"
    return (folder / "tracr" / first).is_file() or (folder / first).is_file()


# -- a language model ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    facts: dict[str, str | int | float]
    tables: list[Table]
    pictures: list[Picture]
    details: dict[str, Any]


def _of_model(request: Request) -> _Part:
    assert request.model is not None
    device = find_device(request.device)
    loaded = tokens.load(request.model, device, request.say)
    if loaded.kind != "causal":
        raise InputError(f"--model {request.model}: it is no causal language model")

    def store(weights: str) -> Store:
        settings = {"prompts": request.samples or ioi.PROMPTS, "seed": request.seed}
        return Store(request.kept / f"{NAME}-{weights}", settings)

    known = ioi.setting(
        loaded.model.requires_grad_(False),
        loaded.tokenizer,
        store,
        request.samples,
        request.seed,
        request.progress,
        request.say,
    )
    patching = ioi.correlations(known)
    kinds = [kind for kind in ioi.KINDS if known.of(kind)]
    ablated = {kind: ioi.circuits(known, kind) for kind in kinds}
    tables, details = [], {}
    for title, chosen in _chosen(known):
        table, figures = _correlations(patching, title, chosen, request.seed)
        tables.append(table)
        details[f"correlations, {title}"] = figures
    for kind, found in ablated.items():
        table, figures = _areas(found, kind, request.seed)
        tables.append(table)
        details[f"circuits, {kind}"] = figures
    pictures = [
        Picture(
            "curves.png",
            "What circuits keep",
            "Faithfulness of the edges with the highest scores, one circuit for all prompts of a "
            "kind; bands: 95 % bootstrap intervals over prompts.",
            draw_curves(ablated, request.seed),
        ),
        _one_prompt(known),
    ]
    facts: dict[str, str | int | float] = {
        "model": loaded.name,
        "device": known.store.once("device", lambda: _called(device)),
        "prompts": len(known.prompts),
        "components": len(known.network.senders),
        "edges": int(known.network.edges.sum()),
        "right answers": sum(value > 0 for found in ablated.values() for value in found["whole"]),
    }
    return _Part(facts, tables, pictures, details)


def _one_prompt(known: ioi.Setting) -> Picture:
    example = known.prompts[0]
    drawn = known.store.once("drawn", lambda: _top(known))
    edges = TopEdges(
        drawn["kept"],
        known.network.senders,
        {(a, b): value for a, b, value in drawn["edges"]},
    )
    figure = Figure(figsize=(8, 9), dpi=130, layout="constrained")
    title = f"of the {drawn['of']} largest direct edges, those on ways to the output"
    plot.circuit(edges, figure.add_subplot(), most=DRAWN, title=title)
    return Picture(
        "circuit.png",
        "One prompt",
        f"“{example.text}”, beside “{example.other}”: of the largest direct edges those on "
        "ways from the embedding to the output. Red raises the difference, blue lowers it.",
        figure,
    )


def _called(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _chosen(known: ioi.Setting) -> list[tuple[str, list[int]]]:
    every = [("all prompts", list(range(len(known.prompts))))]
    return every + [(kind, known.of(kind)) for kind in ioi.KINDS if known.of(kind)]


# -- tables ----------------------------------------------------------------------------------------


def _interval(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"


def _correlations(
    found: dict[str, Any], title: str, chosen: Sequence[int], seed: int
) -> tuple[Table, list[dict[str, Any]]]:
    lines: list[tuple[Value, ...]] = []
    figures: list[dict[str, Any]] = []
    for part, what in enumerate(attribution.PARTS):
        whole = ioi.pooled(found, part, chosen, seed)
        each = ioi.by_prompt(found, part, chosen, seed)
        for method, one, mean in zip(found["methods"], whole, each, strict=True):
            lines.append(
                (
                    what,
                    method,
                    one.value,
                    _interval(one.low, one.high),
                    _interval(one.less_low, one.less_high),
                    mean.value,
                    _interval(mean.low, mean.high),
                )
            )
            figures.append(
                {"part": what, "method": method, "pooled": asdict(one), "by_prompt": asdict(mean)}
            )
    note = (
        f"{len(chosen)} prompts: layer x position, against exact patching with the counterfactual; "
        "over all prompts together, and the mean of the correlations in each. Intervals by "
        "bootstrap over prompts, that of the difference with the prompts drawn alike."
    )
    return Table(f"Patching: {title}", PATCHING, lines, note=note), figures


def _areas(found: dict[str, Any], kind: str, seed: int) -> tuple[Table, list[dict[str, Any]]]:
    lines: list[tuple[Value, ...]] = []
    figures: list[dict[str, Any]] = []
    for whose in ioi.chosen_by(found):
        for ranked in (ioi.SIGNED, ioi.SIZED):
            cpr = ioi.areas(found, whose, ranked, seed)
            cmd = ioi.areas(found, whose, ranked, seed, until_one=True)
            means, _, _ = _faithful(found, whose, ranked, seed)
            for number, method in enumerate(found["outputs"]):
                one, gap = cpr[number], cmd[number]
                lines.append(
                    (
                        whose,
                        ranked,
                        method,
                        one.value,
                        _interval(one.low, one.high),
                        _interval(one.less_low, one.less_high),
                        gap.value,
                        _interval(gap.low, gap.high),
                    )
                )
                figures.append(
                    {
                        "circuits": whose,
                        "ranked by": ranked,
                        "method": method,
                        "CPR": asdict(one),
                        "CMD": asdict(gap),
                        "shares": SHARES,
                        "faithfulness": means[number].tolist(),
                    }
                )
    note = (
        f"{len(found['prompts'])} prompts. CPR: the area under faithfulness over "
        f"{', '.join(f'{100 * share:g}' for share in SHARES)} % of the edges (more is better; "
        "above one, circuits leave out what works against the answer). CMD: the area between it "
        "and one (less is better). Edges left out carry what they carry at the counterfactual. "
        "Circuits for the other half are chosen on prompts that they are not tested on (halves "
        "drawn at random, either way round); the others on the same. Intervals by bootstrap over "
        "prompts, with the circuits held fixed."
    )
    return Table(f"Circuits: {kind}", CIRCUITS, lines, group=2, note=note), figures


def _faithful(
    found: dict[str, Any], whose: str, ranked: str, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[methods, shares]`: faithfulness, and between what it lies."""
    outputs = ioi.curves(found, whose, ranked)
    whole, none = np.array(found["whole"]), np.array(found["none"])

    def left(rows: np.ndarray) -> np.ndarray:
        kept: np.ndarray = (outputs[:, :, rows] - none[rows]).sum(-1) / (whole - none)[rows].sum()
        return kept

    rng, count = np.random.default_rng(seed), len(whole)
    drawn = np.stack([left(rng.integers(0, count, count)) for _ in range(ioi.RESAMPLES)])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return left(np.arange(count)), low, high


# -- pictures --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TopEdges:
    """The largest direct edges of a measure, as `nrm.plot.circuit` draws them.

    Attributes:
        kept: the sum of their sizes, as a share of that of all edges.
        scores: of each edge, the largest first.
    """

    kept: float
    senders: tuple[str, ...]
    scores: dict[tuple[str, str], float]

    @property
    def edges(self) -> list[tuple[str, str]]:
        return list(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def score(self, sender: str, receiver: str) -> float:
        return self.scores[sender, receiver]


def _top(known: ioi.Setting) -> dict[str, Any]:
    """The largest edges of the first prompt that lie on ways from the embedding to the output."""
    R = known.relevance.measure(ioi.REFERENCE, known.pairs([0]))
    edges = R.edges(nrm.components(R), memory=known.memory)
    ranked = [e for e in edges.top(100 * DRAWN) if e.sender in known.network.senders]
    count, top = DRAWN, on_ways([(e.sender, e.receiver) for e in ranked[:DRAWN]])
    while count < len(ranked):
        more = on_ways([(e.sender, e.receiver) for e in ranked[: count + 1]])
        if len(more) > DRAWN:
            break
        count, top = count + 1, more
    chosen = [e for e in ranked[:count] if (e.sender, e.receiver) in top]
    size = float(edges.relevance.abs().sum())
    return {
        "kept": sum(abs(edge.relevance) for edge in chosen) / size,
        "of": count,
        "edges": [[edge.sender, edge.receiver, edge.relevance] for edge in chosen],
    }


def on_ways(edges: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of some edges that lie on a way from the embedding to the output."""

    def reached(start: str, steps: Sequence[tuple[str, str]]) -> set[str]:
        found, waiting = {start}, [start]
        while waiting:
            here = waiting.pop()
            new = {end for begin, end in steps if begin == here} - found
            found |= new
            waiting += new
        return found

    above = reached("embed", edges)
    below = reached("output", [(receiver, sender) for sender, receiver in edges])
    return {(a, b) for a, b in edges if a in above and b in below}


def draw_curves(ablated: dict[str, dict[str, Any]], seed: int) -> Figure:
    """Faithfulness against the share of edges, a panel for each kind of prompts and ranking."""
    figure = Figure(figsize=(10.5, 4.1 * len(ablated) + 1.0), dpi=130, layout="constrained")
    panels: Any = figure.subplots(len(ablated), 2, squeeze=False)
    handles: dict[str, Any] = {}
    for row, (kind, found) in zip(panels, ablated.items(), strict=True):
        for ax, ranked in zip(row, (ioi.SIGNED, ioi.SIZED), strict=True):
            means, low, high = _faithful(found, ioi.TASK, ranked, seed)
            for number, method in enumerate(found["outputs"]):
                colour = _COLOURS[number % len(_COLOURS)]
                (handles[method],) = ax.plot(
                    SHARES, means[number], color=colour, marker="o", markersize=3, linewidth=1.4
                )
                if number == 0:
                    ax.fill_between(SHARES, low[number], high[number], color=colour, alpha=0.15)
            ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
            ax.axhline(0, color=GREY, linewidth=0.8)
            ax.set_xscale("log")
            ax.set_title(f"{kind}, ranked by {ranked}", loc="left")
            ax.set_xlabel("share of edges")
            ax.set_ylabel("faithfulness")
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=4)
    return figure


EXPERIMENT = Experiment(NAME, run, frozenset({"model", "device"}))
