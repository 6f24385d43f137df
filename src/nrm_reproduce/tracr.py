"""`tracr`: direct edges of transformers whose circuits are known, beside attribution patching.

Four programs that tracr compiled (Lindner et al. 2023): transformers of which it is known what each
component reads and writes. For every example, each candidate edge gets the absolute relevance of
its walks; EAP, edge attribution patching (Syed et al. 2023), is written out beside in plain torch.
The AUROC says how well a score tells true edges from others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import nrm
from nrm.composites import Circuits, Composite, LocalLinear
from nrm.errors import InputError
from nrm.evaluation import bootstrap
from nrm_reproduce.report import Experiment, Report, Request, Table, versions

NAME = "tracr"
PROGRAMS = ("hist", "frac_prevs", "reverse", "sort")
RESAMPLES = 2000
"""Of the bootstrap."""
LEAST = 1e-6
"""Outputs within this of zero are not explained: the program says nothing there."""

Edge = tuple[str, str]
"""Sender and receiver."""
Scores = dict[Edge, float]


# -- the transformers ------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention of one head, or of several side by side, and an MLP; no norms."""

    def __init__(self, weights: Mapping[str, Tensor], heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.linear = (
            _linear(weights, f"attn.{name}") for name in ("query", "key", "value", "linear")
        )
        self.linear_1, self.linear_2 = (_linear(weights, f"mlp.linear_{k}") for k in (1, 2))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        pattern = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        z = (pattern @ v).transpose(1, 2).flatten(2)
        out: Tensor = self.linear(z)
        return out

    def mlp(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(torch.relu(self.linear_1(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Transformer(nn.Module):
    """A compiled program: token ids `[batch, tokens]` to the outputs `[batch, tokens, labels]`."""

    def __init__(self, weights: Mapping[str, Tensor], layers: int, heads: int) -> None:
        super().__init__()
        tokens, positions = weights["token_embed.embeddings"], weights["pos_embed.embeddings"]
        self.embed = nn.Embedding(tokens.shape[0], tokens.shape[1], _weight=tokens.double())
        self.positions = nn.Parameter(positions.double(), requires_grad=False)
        self.layers = nn.ModuleList(
            Block(_within(weights, f"layers.{layer}."), heads) for layer in range(layers)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        found: Tensor = nn.Sequential(*self.layers)(x)
        return found


def _linear(weights: Mapping[str, Tensor], name: str) -> nn.Linear:
    """A layer of matrices that are applied as `x @ w + b`."""
    matrix = weights[f"{name}.w"].double()
    layer = nn.Linear(matrix.shape[0], matrix.shape[1], dtype=torch.float64)
    layer.weight = nn.Parameter(matrix.T.contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(weights[f"{name}.b"].double(), requires_grad=False)
    return layer


def _within(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


# -- programs --------------------------------------------------------------------------------------

OUTPUT = "output"
EMBEDDINGS = ("embed", "embed.pos")


@dataclass(frozen=True, eq=False)
class Example:
    """One input of a program.

    Attributes:
        ids: `[1, tokens]`.
        outputs: position and residual dimension of every right output that is not zero.
    """

    ids: Tensor
    outputs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled program with its examples and what is known of its circuit.

    Attributes:
        true: the edges between attention and MLPs that the compiler made.
        true_everywhere: those from embeddings and into the output too: where something is written
            that is read.
    """

    name: str
    model: Transformer
    true: frozenset[Edge]
    true_everywhere: frozenset[Edge]
    examples: tuple[Example, ...]

    @property
    def order(self) -> list[str]:
        """Attention and MLPs as they are computed."""
        return [f"{kind}{layer}" for layer in range(len(self.model.layers)) for kind in ("a", "m")]

    @property
    def candidates(self) -> list[Edge]:
        """All pairs of attention and MLPs of which the sender is computed first."""
        return [(a, b) for place, b in enumerate(self.order) for a in self.order[:place]]

    @property
    def candidates_everywhere(self) -> list[Edge]:
        """With the embeddings and the output."""
        order = [*EMBEDDINGS, *self.order, OUTPUT]
        pairs = [(a, b) for place, b in enumerate(order) for a in order[:place]]
        return [(a, b) for a, b in pairs if b not in EMBEDDINGS]


def read_program(folder: Path, name: str) -> Program:
    """A program from its two files.

    Raises:
        InputError: they are not there, or are not what they should be.
    """
    folder = folder / "tracr" if (folder / "tracr").is_dir() else folder
    try:
        known = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        weights = load_file(folder / f"{name}.safetensors")
        return _program(name, known, weights)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"--data {folder}: no program {name!r} of tracr there ({error})") from None


def _program(name: str, known: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Program:
    model = Transformer(weights, known["layers"], known["heads"]).eval()
    labels = known["residual_labels"]
    examples = []
    for example in known["examples"]:
        ids = torch.tensor([[known["token_ids"][token] for token in example["tokens"]]])
        outputs = [
            (position, _dimension(name, labels, output))
            for position, output in enumerate(example["output"])
            if output is not None and (isinstance(output, str) or abs(output) > LEAST)
        ]
        examples.append(Example(ids, tuple(outputs)))
    true = frozenset((_short(edge["from"]), _short(edge["to"])) for edge in known["edges"])
    of_output = {k for k, label in enumerate(labels) if label.startswith(f"{name}_")}
    of_output = {k for k in of_output if _is_output(name, labels[k])}
    writes = {_short(c): set(of["writes"]) for c, of in known["components"].items()}
    for embedding, matrix in (("embed", "token_embed"), ("embed.pos", "pos_embed")):
        written = weights[f"{matrix}.embeddings"].abs().amax(0) > 0
        writes[embedding] = set(written.nonzero()[:, 0].tolist())
    reads = {
        _short(c): {*of["reads_value"], *of["reads_query_key"]}
        for c, of in known["components"].items()
    }
    reads[OUTPUT] = of_output
    program = Program(name, model, true, frozenset(), tuple(examples))
    everywhere = frozenset((a, b) for a, b in program.candidates_everywhere if writes[a] & reads[b])
    return replace(program, true_everywhere=everywhere)


def _short(name: str) -> str:
    """`attn.0` as `a0`, `mlp.1` as `m1`."""
    kind, _, layer = name.partition(".")
    return f"{kind[0]}{layer}"


def _is_output(name: str, label: str) -> bool:
    """Whether a residual dimension is of the program's output: `hist_1:3`, `frac_prevs_3`."""
    return re.fullmatch(rf"{re.escape(name)}_\d+(:.*)?", label) is not None


def _dimension(name: str, labels: Sequence[str], output: str | float) -> int:
    """The residual dimension that is to be large where an output is right."""
    written = output if isinstance(output, str) else f"{output:g}"
    for place, label in enumerate(labels):
        if _is_output(name, label) and label.partition(":")[2] in ("", written):
            return place
    raise KeyError(f"no output {output!r}")


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


def by_relevance(composite: Composite | None, reference: Reference | None = None) -> Method:
    """The absolute relevance of direct edges, times what is explained, added up over outputs.

    Arguments:
        composite: of the walks; `None`: what is suggested for the model.
        reference: whether walks are of differences, and to what. Outputs that are the same there
            are left out.
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
        found = R.edges(_components(R))
        sizes = (found.relevance * R.scale.view(-1, 1, 1)).abs().sum(0)
        return {
            (_own(sender), receiver): float(sizes[row, column])
            for row, receiver in enumerate(found.receivers)
            for column, sender in enumerate(found.senders)
        }

    return score


def _own(name: str) -> str:
    return name.replace("embed.positions", "embed.pos")


def _components(R: nrm.Measure) -> dict[str, nrm.NeuronSet]:
    """Attention as a whole, MLPs, embeddings."""
    found: dict[str, nrm.NeuronSet] = {}
    for name, chosen in nrm.components(R).items():
        short = name.partition(".h")[0]
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


def run(request: Request) -> Report:
    """Score the edges of all programs, by all methods."""
    folder = Path(request.data)
    found = program_edges(folder, samples=request.samples, say=request.say)
    return Report(
        NAME,
        "Direct edges of compiled transformers",
        (),
        facts={"data": request.data, "seed": request.seed, "versions": versions()},
        notes=(
            "A single input may not show an edge: what a program reads there may not matter.",
            "Scores below 1e-9 of the largest count as zero.",
        ),
        tables=[table(found, request.seed)],
        details={"examples": [asdict(one) for one in found]},
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
        (
            "program",
            "method",
            "between components",
            "95 % interval",
            "with embeddings and output",
            "95 % interval",
            "examples",
        ),
        lines,
        note="Mean over examples, each scored alone; intervals by bootstrap over examples. A dash: "
        "all pairs are true.",
    )


EXPERIMENT = Experiment(NAME, run)
