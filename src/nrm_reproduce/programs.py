"""Transformers that tracr compiled (Lindner et al. 2023), of which the circuits are known.

What each component reads and writes is told by the compiler; an edge is true where something is
written that is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nrm.errors import InputError

PROGRAMS = ("hist", "frac_prevs", "reverse", "sort")
LEAST = 1e-6
"""Outputs within this of zero are not explained: the program says nothing there."""

Edge = tuple[str, str]
"""Sender and receiver."""
Reading = tuple[str, str, str]
"""Sender, attention, and by what that reads: one of `READ`."""
READ = ("query_key", "value")
"""As the compiler calls them."""


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
        true_reads: those into attention, from embeddings too, by what of it reads what is written.
    """

    name: str
    model: Transformer
    true: frozenset[Edge]
    true_everywhere: frozenset[Edge]
    true_reads: frozenset[Reading]
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
    def candidate_reads(self) -> list[Reading]:
        """All pairs of which the receiver is attention, by both ways to read."""
        into = [(a, b) for a, b in self.candidates_everywhere if b.startswith("a")]
        return [(a, b, by) for a, b in into for by in READ]

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
    parts = known["components"]
    writes = {_short(c): set(of["writes"]) for c, of in parts.items()}
    for embedding, matrix in (("embed", "token_embed"), ("embed.pos", "pos_embed")):
        written = weights[f"{matrix}.embeddings"].abs().amax(0) > 0
        writes[embedding] = set(written.nonzero()[:, 0].tolist())
    reads = {_short(c): {*of["reads_value"], *of["reads_query_key"]} for c, of in parts.items()}
    reads[OUTPUT] = of_output
    program = Program(name, model, true, frozenset(), frozenset(), tuple(examples))
    everywhere = frozenset((a, b) for a, b in program.candidates_everywhere if writes[a] & reads[b])
    by = {_short(c): {way: set(of[f"reads_{way}"]) for way in READ} for c, of in parts.items()}
    told = frozenset((a, b, way) for a, b, way in program.candidate_reads if writes[a] & by[b][way])
    return replace(program, true_everywhere=everywhere, true_reads=told)


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
