"""The components of a captured transformer by name: heads, MLPs, embeddings; patterns and neurons.

Found in the graph, whatever the model's code. Attention is a matrix product whose one factor comes
out of a softmax: a head is what it adds up, before the output projection. An MLP is a branch that
is added to what it was computed from (the residual stream), through a weighted sum and without
attention. Embeddings are the leaves that the stream begins with.

Layers are numbered as they are computed, from zero on: `a3.h5` is head 5 of the fourth attention,
`m3` the fourth MLP.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from nrm.circuits.attention import (
    Attention,
    Role,
    attention_of,
    indices,
    scores_of,
    what_heads_read,
)
from nrm.circuits.steps import Named, named
from nrm.display import Shown, Table
from nrm.errors import NeuronSetError, QueryError
from nrm.explanation import Explanation
from nrm.formulas import Member, NeuronSet
from nrm.graph import Variable
from nrm.prepare import Pass
from nrm.sets import neurons

Kind = Literal["heads", "mlps", "embeddings", "patterns", "neurons", "queries", "keys", "values"]
"""Heads are what attention adds up; patterns its weights; queries, keys and values what a head
reads; neurons those of the MLPs' last hidden layers."""

_READ: tuple[Role, ...] = ("queries", "keys", "values")

_WEIGHTED = ("linear", "conv")


class Components(Mapping[str, NeuronSet], Shown):
    """Neuron sets by name, from the input to the output.

    Arguments:
        sets: by name.
    """

    def __init__(self, sets: Mapping[str, NeuronSet]) -> None:
        self._sets = dict(sets)

    def __getitem__(self, name: str) -> NeuronSet:
        try:
            return self._sets[name]
        except KeyError:
            near = ", ".join(list(self._sets)[:40])
            raise QueryError(f"there is no component {name!r}; there is: {near}.") from None

    def __contains__(self, name: object) -> bool:
        return name in self._sets

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def only(self, *names: str) -> Components:
        """Some of them, in their order here.

        Raises:
            QueryError: there is none of a name.
        """
        chosen = {name: self[name] for name in names}
        return Components({name: found for name, found in self.items() if name in chosen})

    def without(self, *names: str) -> Components:
        """All but some, in their order here.

        Raises:
            QueryError: there is none of a name.
        """
        left_out = {name: self[name] for name in names}
        return Components({n: found for n, found in self.items() if n not in left_out})

    def table(self) -> Table:
        rows = [(name, repr(chosen)) for name, chosen in self.items()]
        return Table(f"{len(rows)} components", ("name", "neurons"), rows)


def components(
    R: Explanation,
    kinds: Kind | Collection[Kind] = ("heads", "mlps", "embeddings"),
    tokens: bool = False,
) -> Components:
    """The components of a transformer by name, as neuron sets.

    Arguments:
        R: a measure of the model.
        kinds: which: `"heads"` (`a3.h5`), `"mlps"` (`m4`), `"embeddings"` (`embed`, and further
            ones as `embed.pos`), `"patterns"` (`a3.h5.pattern`), `"neurons"` (`m4.n17`);
            `"queries"`, `"keys"`, `"values"`: what a head reads (`a3.h5.q`, `a3.h5.k`, `a3.h5.v`;
            where several heads read the same, `a3.kv1.k`, or for queries `a3.group1.q`).
        tokens: each split by position: `a3.h5@7`.

    Raises:
        QueryError: there is no attention in the model, or no walk visits its patterns, queries or
            keys. For other networks any mapping from names to neuron sets does as well.
    """
    wanted = {kinds} if isinstance(kinds, str) else set(kinds)
    for kind in wanted - set(get_args(Kind)):
        raise QueryError(f"a kind of component is one of {get_args(Kind)}, not {kind!r}")
    forward = R.forward_pass
    found = _Transformer(forward, wanted).sets
    return by_token(found, forward) if tokens else Components(found)


def by_token(components: Named, forward: Pass) -> Components:
    """Each component split by position: the neurons of `name` at position 7 are `name@7`.

    Positions lie along the last axis but that of the features that a component takes whole:
    `[tokens, features]`, `[heads, tokens, features]`, of one head `[tokens, heads, features]`.

    Raises:
        NeuronSetError: the neurons of one have one axis only, or its layers differ in length.
    """
    found: dict[str, NeuronSet] = {}
    for name, chosen in named(components).items():
        lengths, along = set(), []
        for member in chosen.members:
            variable = forward.graph.variable(member.layer)
            shape = variable.neuron_shape(forward.shape(variable))
            if len(shape) < 2:
                raise NeuronSetError(
                    f"{member.layer!r} has neurons of shape {tuple(shape)}, without an axis of "
                    f"positions: {name!r} cannot be split by token."
                )
            along.append(_positions(member.select(variable, shape), len(shape)))
            lengths.add(shape[along[-1]])
        if len(lengths) > 1:
            raise NeuronSetError(
                f"the layers of {name!r} have {sorted(lengths)} positions: it cannot be split by "
                "token."
            )
        for position in range(*lengths):
            members = tuple(
                _at(member, position, axis)
                for member, axis in zip(chosen.members, along, strict=True)
            )
            split = NeuronSet(members)
            if _is_empty(split, forward):
                continue
            found[f"{name}@{position}"] = split
    return Components(found)


@dataclass(frozen=True)
class _AtPosition:
    """The neurons of a member at one position."""

    member: Member
    position: int
    axis: int

    def __call__(self, variable: Variable, shape: torch.Size) -> Tensor:
        mask = self.member.select(variable, shape)
        there = torch.zeros(shape[self.axis], dtype=torch.bool, device=mask.device)
        there[self.position] = True
        return mask & there.view(-1, *[1] * (-1 - self.axis))


def _positions(mask: Tensor, dim: int) -> int:
    """The axis of positions, counted from the end."""
    for axis in range(-2, -dim - 1, -1):
        others = [other for other in range(-mask.dim(), 0) if other != axis]
        if mask.shape[axis] > 1 and bool(mask.any(others).all()):
            return axis
    return -2


def _at(member: Member, position: int, axis: int) -> Member:
    text = f"{member.text}@{position}"
    return Member(member.layer, _AtPosition(member, position, axis), text, member.key)


def _is_empty(chosen: NeuronSet, forward: Pass) -> bool:
    for member in chosen.members:
        variable = forward.graph.variable(member.layer)
        shape = variable.neuron_shape(forward.shape(variable))
        if bool(member.select(variable, shape).any()):
            return False
    return True


# -- finding them in the graph.


class _Transformer:
    """The components of a graph.

    Attributes:
        sets: in the order of computation.
    """

    def __init__(self, forward: Pass, kinds: Collection[str]) -> None:
        self.forward, self.graph = forward, forward.graph
        self.attentions = [
            found
            for v in self.graph.variables
            if (found := attention_of(v, self.graph)) is not None
        ]
        if not self.attentions:
            raise QueryError(
                "there is no attention in this model (a matrix product with what comes out of a "
                "softmax) that relevance passes. Name components as neuron sets: {'block': "
                "nrm.channels('layer1', 3, 4), ...}."
            )
        placed: list[tuple[int, str, NeuronSet]] = []
        if "embeddings" in kinds:
            placed += self._embeddings()
        for number, attention in enumerate(self.attentions):
            if "patterns" in kinds:
                placed += self._patterns(number, attention)
            if "heads" in kinds:
                placed += self._heads(number, attention)
        for role in _READ:
            if role in kinds:
                placed += self._read(role)
        for number, (branch, stream) in enumerate(self._branches()):
            if "mlps" in kinds:
                placed.append((branch.index, f"m{number}", neurons(branch.name)))
            if "neurons" in kinds:
                placed += self._neurons(number, branch, stream)
        placed.sort(key=lambda one: one[0])
        self.sets = {name: chosen for _, name, chosen in placed}

    # -- heads and patterns ----------------------------------------------------------------------

    def _heads(self, number: int, found: Attention) -> Iterator[tuple[int, str, NeuronSet]]:
        variable = found.result
        shape = variable.neuron_shape(self.forward.shape(variable))
        for head, index in enumerate(indices(shape, found.axes)):
            yield variable.index, f"a{number}.h{head}", neurons(variable.name, index)

    def _patterns(self, number: int, found: Attention) -> Iterator[tuple[int, str, NeuronSet]]:
        variable = self.graph.by_node.get(found.pattern)
        if variable is None:
            raise QueryError(
                f"no walk visits the attention patterns behind {found.result.name!r}: under this "
                "composite the values take all. Choose a composite by which queries and keys take "
                "a share."
            )
        shape = variable.neuron_shape(self.forward.shape(variable))
        axes = tuple(range(len(shape) - 2)) if found.axes else ()
        for head, index in enumerate(indices(shape, axes)):
            yield variable.index, f"a{number}.h{head}.pattern", neurons(variable.name, index)

    def _read(self, role: Role) -> Iterator[tuple[int, str, NeuronSet]]:
        """The queries, keys or values of all heads."""
        for number, found in enumerate(what_heads_read(self.forward, self.attentions, role)):
            for one in found:
                alone = len(one.heads) == 1
                shared = "group" if role == "queries" else "kv"
                name = f"h{one.heads[0]}" if alone else f"{shared}{one.number}"
                yield one.index, f"a{number}.{name}.{role[0]}", one.neurons

    # -- MLPs ------------------------------------------------------------------------------------

    def _branches(self) -> list[tuple[Variable, Variable]]:
        """The branches without attention that are added to the stream, each with that."""
        found: dict[Variable, Variable] = {}
        for variable in self.graph.variables:
            producer = variable.producer
            if producer is None or producer.kind != "sum" or len(producer.operands) < 2:
                continue
            terms = list(dict.fromkeys(producer.operands))
            for branch in terms:
                for other in terms:
                    stream = None if other is branch else self._stream(other, branch)
                    if stream is not None:
                        found |= dict.fromkeys(self._split(branch, stream), stream)
        order = sorted(found, key=lambda branch: branch.index)
        return [(branch, found[branch]) for branch in order]

    def _stream(self, term: Variable, branch: Variable) -> Variable | None:
        """What of one term another was computed from: the term, or what was added up to it."""
        above = self.graph.upstream(branch)
        waiting = [term]
        while waiting:
            one = waiting.pop()
            if one in above:
                return one
            if one.producer is not None and one.producer.kind == "sum":
                waiting += one.producer.operands
        return None

    def _split(self, branch: Variable, stream: Variable) -> list[Variable]:
        """The parts of a branch without attention, where attention and MLP are added up before."""
        inside = (self.graph.upstream(branch) | {branch}) - self.graph.upstream(stream) - {stream}
        attends = any(attention.result in inside for attention in self.attentions)
        if not attends:
            weighted = any(v.producer and v.producer.kind in _WEIGHTED for v in inside)
            return [branch] if weighted else []
        producer = branch.producer
        if producer is None or producer.kind != "sum":
            return []
        return [
            part
            for operand in dict.fromkeys(producer.operands)
            if stream in self.graph.upstream(operand)
            for part in self._split(operand, stream)
        ]

    def _neurons(
        self, number: int, branch: Variable, stream: Variable
    ) -> Iterator[tuple[int, str, NeuronSet]]:
        """The neurons that a branch's last layer reads."""
        variable: Variable | None = branch
        while variable is not None and variable.producer is not None:
            operands = [v for v in variable.producer.operands if not v.is_leaf]
            last = variable.producer.kind in _WEIGHTED
            variable = operands[0] if len(operands) == 1 else None
            if last:
                break
        while variable is not None and variable.batch_axis is None and variable.producer:
            variable = variable.producer.operands[0]  # a view in which the samples are apart
        if variable is None or stream not in self.graph.upstream(variable):
            raise QueryError(f"the hidden layer of the MLP {branch.name!r} cannot be told.")
        shape = variable.neuron_shape(self.forward.shape(variable))
        rest = (slice(None),) * (len(shape) - 1)
        for neuron in range(shape[-1]):
            yield variable.index, f"m{number}.n{neuron}", neurons(variable.name, (*rest, neuron))

    # -- embeddings ------------------------------------------------------------------------------

    def _embeddings(self) -> Iterator[tuple[int, str, NeuronSet]]:
        """The inputs, and what is added to them before any attention."""
        inputs = self.graph.inputs
        others = [
            operand
            for v in self.graph.variables
            if v.producer is not None and v.producer.kind == "sum"
            for operand in v.producer.operands
            if operand.is_leaf and operand not in inputs and not self._attends(v)
        ]
        for place, leaf in enumerate(inputs):
            name = "embed" if place == 0 else f"embed.{_short(leaf.name)}"
            yield leaf.index, name, neurons(leaf.name)
        for place, leaf in enumerate(dict.fromkeys(others)):
            name = "embed.pos" if place == 0 else f"embed.pos{place + 1}"
            yield leaf.index, name, neurons(leaf.name)

    def _attends(self, variable: Variable) -> bool:
        """Whether a variable is computed from products of attention, as masked scores are."""
        return not self._products.isdisjoint(self.graph.upstream(variable))

    @cached_property
    def _products(self) -> set[Variable]:
        """What attention adds up, and the products of its queries and keys."""
        found = {attention.result for attention in self.attentions}
        with suppress(QueryError):  # scores of several products have no name to be taken for one
            found |= {v for one in self.attentions if (v := scores_of(self.graph, one))}
        return found


def _short(name: str) -> str:
    """The last part of a name."""
    return name.rpartition(".")[2].strip(":") or name
