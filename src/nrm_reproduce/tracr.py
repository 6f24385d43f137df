"""`tracr`: direct edges of transformers whose circuits are known, beside attribution patching.

Four programs that tracr compiled (Lindner et al. 2023): transformers of which it is known what each
component reads and writes. For every example, each candidate edge gets the absolute relevance of
its walks; EAP, edge attribution patching (Syed et al. 2023), is written out beside in plain torch.
The AUROC says how well a score tells true edges from others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import nrm
from nrm.circuits.components import Kind
from nrm.composites import Circuits, Composite, LocalLinear
from nrm.evaluation import bootstrap
from nrm_reproduce.programs import (
    EMBEDDINGS,
    LEAST,
    OUTPUT,
    PROGRAMS,
    READ,
    Block,
    Edge,
    Example,
    Program,
    Transformer,
    read_program,
)
from nrm_reproduce.report import Experiment, Report, Request, Table, versions

NAME = "tracr"
RESAMPLES = 2000
"""Of the bootstrap."""
COLUMNS = (
    "program",
    "method",
    "between components",
    "95 % interval",
    "with embeddings and output",
    "95 % interval",
    "examples",
)
"""Of the table of scores."""
READS = ("program", "edge", "true", "queries", "keys", "values", "told right", "AUROC")
"""Columns of the table of what attention reads."""
Scores = dict[Edge, float]


# -- scores of edges -------------------------------------------------------------------------------

Method = Callable[[Program, Example, Example], Scores]
"""Scores the edges of a program for an example; the second one is what it may be compared with."""

Read = tuple[Tensor, Tensor]
"""What a transformer reads: embedded tokens, and positions, `[1, tokens, features]` both."""
Reference = Callable[[Program, Example, Example], Read]
"""What is read in the place of an example."""


def embedded(program: Program, example: Example) -> Read:
    """What is read for an example."""
    positions = program.model.positions[: example.ids.shape[1]]
    return program.model.embed(example.ids).detach(), positions.detach().unsqueeze(0)


def another(program: Program, example: Example, other: Example) -> Read:
    """A reference: another example, as long."""
    return embedded(program, other)


def mean_embedding(program: Program, example: Example, other: Example) -> Read:
    """A reference: everywhere the mean over all tokens that there are, and over all positions."""
    tokens, positions = embedded(program, example)
    model = program.model
    token, position = (x.detach().mean(0) for x in (model.embed.weight, model.positions))
    return token.expand_as(tokens), position.expand_as(positions)


class Body(nn.Module):
    """A transformer behind its embeddings, which can so be anything."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.layers = model.layers

    def forward(self, embed: Tensor, positions: Tensor) -> Tensor:
        found: Tensor = nn.Sequential(*self.layers)(embed + positions)
        return found


def by_relevance(
    composite: Composite | None, reference: Reference | None = None, by_read: bool = False
) -> Method:
    """The absolute relevance of direct edges, times what is explained, added up over outputs.

    Arguments:
        composite: of the walks; `None`: what is suggested for the model.
        reference: whether walks are of differences, and to what. Outputs that are the same there
            are left out.
        by_read: edges into attention are into its queries, keys and values, `a1.q` and so on.
    """
    explainers: dict[str, nrm.Explainer] = {}

    def score(program: Program, example: Example, other: Example) -> Scores:
        outputs: list[tuple[int, int]] = list(example.outputs)
        here = embedded(program, example)
        there = None if reference is None else reference(program, example, other)
        if there is not None:
            body = Body(program.model)
            with torch.no_grad():
                change = (body(*here) - body(*there))[0]
            outputs = [place for place in outputs if abs(float(change[place])) > LEAST]
        if not outputs:
            return {}  # nothing differs that could be shared out
        if program.name not in explainers:
            model = program.model if there is None else Body(program.model)
            explainers[program.name] = nrm.Explainer(model.eval(), composite)
        explainer, count = explainers[program.name], len(outputs)
        if there is None:
            R = explainer(example.ids.repeat(count, 1), target=outputs)
        else:
            names = ("embed", "positions")
            tensors = [x.repeat(count, 1, 1) for x in here]
            copies = {n: x.repeat(count, 1, 1) for n, x in zip(names, there, strict=True)}
            R = explainer(*tensors, target=outputs, reference=copies)
        found = R.edges(_components(R, by_read))
        sizes = (found.relevance * R.scale.view(-1, 1, 1)).abs().sum(0)
        return {
            (_own(sender), receiver): float(sizes[row, column])
            for row, receiver in enumerate(found.receivers)
            for column, sender in enumerate(found.senders)
        }

    return score


def _own(name: str) -> str:
    return name.replace("embed.positions", "embed.pos")


def _components(R: nrm.Measure, by_read: bool) -> dict[str, nrm.NeuronSet]:
    """Attention as a whole, MLPs, embeddings; and what attention reads, as a whole too."""
    kinds: tuple[Kind, ...] = ("heads", "mlps", "embeddings")
    if by_read:
        kinds += ("queries", "keys", "values")
    found: dict[str, nrm.NeuronSet] = {}
    for name, chosen in nrm.components(R, kinds).items():
        short = re.sub(r"^(a\d+)\.h\d+", r"\1", name)
        found[short] = found[short] | chosen if short in found else chosen
    return found


def by_attribution(reference: Reference | None = None) -> Method:
    """EAP: what a sender writes, less what it wrote for the reference, times the gradient there.

    The gradient is that of the output by the receiver's input. Without a reference it is zero
    that is written instead.
    """

    def score(program: Program, example: Example, other: Example) -> Scores:
        written, gradients = _patched(program.model, embedded(program, example), example.outputs)
        instead = None
        if reference is not None:
            instead = _patched(program.model, reference(program, example, other), ())[0]
        found: Scores = {}
        for sender, receiver in program.candidates_everywhere:
            change = written[sender]
            if instead is not None:
                change = change - instead[sender]
            # one row of gradients for each output
            each = (gradients[receiver] * change).flatten(1).sum(1)
            found[sender, receiver] = float(each.abs().sum())
        return found

    return score


def _patched(
    model: Transformer, given: Read, outputs: Sequence[tuple[int, int]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What components write, and `[outputs, tokens, features]` gradients by what they read."""
    written: dict[str, Tensor] = dict(zip(EMBEDDINGS, given, strict=True))
    read: dict[str, Tensor] = {}
    x = given[0] + given[1]

    def at(name: str, x: Tensor) -> Tensor:
        read[name] = torch.zeros_like(x, requires_grad=bool(outputs))
        return x + read[name]

    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        for name, part in ((f"a{number}", layer.attention), (f"m{number}", layer.mlp)):
            out = part(at(name, x))
            written[name], x = out.detach(), x + out
    x = at(OUTPUT, x)
    if not outputs:
        return written, {}
    rows = []
    for position, dimension in outputs:
        output = x[0, position, dimension]
        rows.append(torch.autograd.grad(output, list(read.values()), retain_graph=True))
    gradients = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    return written, dict(zip(read, gradients, strict=True))


METHODS: Mapping[str, Method] = {
    "nrm, as suggested": by_relevance(None),
    "nrm, Circuits": by_relevance(Circuits()),
    "nrm, LocalLinear": by_relevance(LocalLinear()),
    "nrm, another example as reference": by_relevance(None, another),
    "nrm, mean embedding as reference": by_relevance(None, mean_embedding),
    "EAP, zero": by_attribution(),
    "EAP, another example as reference": by_attribution(another),
    "EAP, mean embedding as reference": by_attribution(mean_embedding),
}


# -- how well they tell true edges -----------------------------------------------------------------


def auroc(scores: Sequence[float], true: Sequence[bool]) -> float | None:
    """How often a true edge has a larger score than another, ties counted half; `None` where all
    are alike."""
    positive = torch.tensor([s for s, t in zip(scores, true, strict=True) if t])
    negative = torch.tensor([s for s, t in zip(scores, true, strict=True) if not t])
    if not len(positive) or not len(negative):
        return None
    above = positive[:, None] - negative[None, :]
    return float(((above > 0).double() + 0.5 * (above == 0)).mean())


@dataclass(frozen=True)
class Found:
    """How well a method tells the true edges of a program, for each example.

    Attributes:
        between: among attention and MLPs; `None` where all pairs of them are true.
        everywhere: embeddings and the output included.
    """

    program: str
    method: str
    between: list[float | None]
    everywhere: list[float | None]


def program_edges(
    folder: Path,
    methods: Mapping[str, Method] | None = None,
    programs: Sequence[str] = PROGRAMS,
    samples: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Found]:
    """How well each method tells the true edges of each program.

    Arguments:
        folder: of the data set.
        methods: by name; by default `METHODS`.
        samples: how many examples of each; by default all.
    """
    found = []
    for name in programs:
        program = read_program(folder, name)
        examples = [example for example in program.examples[:samples] if example.outputs]
        for title, method in (methods or METHODS).items():
            say(f"{name}: {title}")
            between, everywhere = [], []
            for place, example in enumerate(examples):
                other = program.examples[(place + 1) % len(program.examples)]
                scores = method(program, example, other)
                between.append(_told(scores, program.candidates, program.true))
                pairs = program.candidates_everywhere
                everywhere.append(_told(scores, pairs, program.true_everywhere))
            found.append(Found(name, title, between, everywhere))
    return found


def _told(scores: Scores, pairs: Sequence[Edge], true: frozenset[Edge]) -> float | None:
    values = [scores.get(pair, 0.0) for pair in pairs]
    # What is nothing but rounding is no score.
    least = 1e-9 * max(values, default=0.0)
    return auroc([v if v > least else 0.0 for v in values], [pair in true for pair in pairs])


@dataclass(frozen=True)
class FoundReads:
    """By what attention reads, beside what the compiler made it read by.

    Attributes:
        sender, receiver: an edge between components of the program.
        through: what is true.
        relevance: by queries, keys and values, mean sizes over examples.
        right: in how many examples the true way has the most.
        auroc: of all edges into attention by both ways, embeddings included: the mean over
            examples, the same for all edges of a program.
    """

    program: str
    sender: str
    receiver: str
    through: str
    relevance: tuple[float, float, float]
    right: int
    examples: int
    auroc: float | None


def program_reads(
    folder: Path,
    programs: Sequence[str] = PROGRAMS,
    samples: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[FoundReads]:
    """By what attention reads, under the mean embedding as reference."""
    found: list[FoundReads] = []
    for name in programs:
        say(f"{name}: queries, keys and values")
        program, method = read_program(folder, name), by_relevance(None, mean_embedding, True)
        scored = [method(program, one, one) for one in program.examples[:samples] if one.outputs]
        scored = [scores for scores in scored if scores]
        if not scored:  # of few examples none may have an output
            say(f"{name}: no example has an output, so that nothing is read")
            continue
        told = [t for t in (_told_reads(s, program) for s in scored) if t is not None]
        mean = sum(told) / len(told) if told else None
        for sender, receiver in sorted(program.true):
            if not receiver.startswith("a"):
                continue
            (way,) = (by for by in READ if (sender, receiver, by) in program.true_reads)
            each = [[s.get((sender, f"{receiver}.{x}"), 0.0) for x in "qkv"] for s in scored]
            right = sum(q + k > v if way == "query_key" else v > q + k for q, k, v in each)
            q, k, v = (sum(column) / len(each) for column in zip(*each, strict=True))
            found.append(FoundReads(name, sender, receiver, way, (q, k, v), right, len(each), mean))
    return found


def _told_reads(scores: Scores, program: Program) -> float | None:
    by = {"query_key": "qk", "value": "v"}
    pairs = program.candidate_reads
    values = [sum(scores.get((a, f"{b}.{x}"), 0.0) for x in by[way]) for a, b, way in pairs]
    least = 1e-9 * max(scores.values())
    return auroc(
        [v if v > least else 0.0 for v in values], [p in program.true_reads for p in pairs]
    )


def reads_table(found: Sequence[FoundReads]) -> Table:
    lines: list[tuple[str | int | float | None, ...]] = [
        (one.program, f"{one.sender} -> {one.receiver}", one.through, *one.relevance,
         f"{one.right} of {one.examples}", one.auroc)
        for one in found
    ]  # fmt: skip
    return Table(
        "By what attention reads",
        READS,
        lines,
        note="Mean embedding as reference; sizes of relevance in units of the outputs, mean over "
        "examples. AUROC: of all edges into attention, embeddings included, by both ways to read.",
    )


def run(request: Request) -> Report:
    """Score the edges of all programs, by all methods."""
    folder = Path(request.data)
    found = program_edges(folder, samples=request.samples, say=request.say)
    reads = program_reads(folder, samples=request.samples, say=request.say)
    return Report(
        NAME,
        "Direct edges of compiled transformers",
        (),
        facts={"data": request.data, "seed": request.seed, "versions": versions()},
        notes=(
            "A single input may not show an edge: what a program reads there may not matter.",
            "Scores below 1e-9 of the largest count as zero.",
        ),
        tables=[table(found, request.seed), reads_table(reads)],
        details={
            "examples": [asdict(one) for one in found],
            "reads": [asdict(one) for one in reads],
        },
    )


def table(found: Sequence[Found], seed: int) -> Table:
    """How well true edges are told, with intervals."""
    lines = []
    for one in found:
        cells: list[str | int | float | None] = [one.program, one.method]
        for values in (one.between, one.everywhere):
            mean = bootstrap(values, seed, RESAMPLES)
            interval = None if mean.mean is None else f"{mean.low:.3f} to {mean.high:.3f}"
            cells += [mean.mean, interval]
        lines.append((*cells, len(one.between)))
    return Table(
        "AUROC of true edges",
        COLUMNS,
        lines,
        note="Mean over examples, each scored alone; intervals by bootstrap over examples. A dash: "
        "all pairs are true.",
    )


EXPERIMENT = Experiment(NAME, run)
