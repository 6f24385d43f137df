"""The components of a captured transformer by name: heads, MLPs, embeddings; patterns and neurons.

Found in the graph, whatever the model's code. Attention is a matrix product whose one factor comes
out of a softmax: a head is what it adds up, before the output projection. An MLP is a branch that
is added to what it was computed from (the residual stream), through a weighted sum and without
attention. Embeddings are the leaves that the stream begins with.

Layers are numbered as they are computed, from zero on: `a3.h5` is head 5 of the fourth attention,
`m3` the fourth MLP.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.fx import Node

from nrm.capture.nodes import is_float_tensor
from nrm.circuits.steps import Named, named
from nrm.display import Shown, Table
from nrm.errors import NeuronSetError, QueryError
from nrm.explanation import Explanation
from nrm.formulas import Member, NeuronSet
from nrm.graph import Graph, Variable
from nrm.operators import lookup, standard
from nrm.prepare import Pass
from nrm.sets import neurons

Kind = Literal["heads", "mlps", "embeddings", "patterns", "neurons"]
"""Heads are what attention adds up; patterns its weights; neurons those of the MLPs' last hidden
layers."""

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
        """All but some."""
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
            ones as `embed.pos`), `"patterns"` (`a3.h5.pattern`), `"neurons"` (`m4.n17`).
        tokens: each split by position: `a3.h5@7`.

    Raises:
        QueryError: there is no attention in the model, or no walk visits its patterns. For other
            networks any mapping from names to neuron sets does as well.
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


@dataclass(frozen=True)
class _Attention:
    """A matrix product of weights out of a softmax with values.

    Attributes:
        result: what it adds up.
        pattern: the node of the softmax.
        axes: of the result's neurons, those of the heads; none: one head.
        pattern_axes: of the pattern's neurons.
    """

    result: Variable
    pattern: Node
    axes: tuple[int, ...]


class _Transformer:
    """The components of a graph.

    Attributes:
        sets: in the order of computation.
    """

    def __init__(self, forward: Pass, kinds: Collection[str]) -> None:
        self.forward, self.graph = forward, forward.graph
        self.attentions = [
            found for v in self.graph.variables if (found := _attention(v, self.graph)) is not None
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
        for number, (branch, stream) in enumerate(self._branches()):
            if "mlps" in kinds:
                placed.append((branch.index, f"m{number}", neurons(branch.name)))
            if "neurons" in kinds:
                placed += self._neurons(number, branch, stream)
        placed.sort(key=lambda one: one[0])
        self.sets = {name: chosen for _, name, chosen in placed}

    # -- heads and patterns ----------------------------------------------------------------------

    def _heads(self, number: int, found: _Attention) -> Iterator[tuple[int, str, NeuronSet]]:
        variable = found.result
        shape = variable.neuron_shape(self.forward.shape(variable))
        for head, index in enumerate(_indices(shape, found.axes)):
            yield variable.index, f"a{number}.h{head}", neurons(variable.name, index)

    def _patterns(self, number: int, found: _Attention) -> Iterator[tuple[int, str, NeuronSet]]:
        variable = self.graph.by_node.get(found.pattern)
        if variable is None:
            raise QueryError(
                f"no walk visits the attention patterns behind {found.result.name!r}: under this "
                "composite the values take all. Choose a composite by which queries and keys take "
                "a share."
            )
        shape = variable.neuron_shape(self.forward.shape(variable))
        axes = tuple(range(len(shape) - 2)) if found.axes else ()
        for head, index in enumerate(_indices(shape, axes)):
            yield variable.index, f"a{number}.h{head}.pattern", neurons(variable.name, index)

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
            if operand.is_leaf and operand not in inputs and not self._reads(v)
        ]
        for place, leaf in enumerate(inputs):
            name = "embed" if place == 0 else f"embed.{_short(leaf.name)}"
            yield leaf.index, name, neurons(leaf.name)
        for place, leaf in enumerate(dict.fromkeys(others)):
            name = "embed.pos" if place == 0 else f"embed.pos{place + 1}"
            yield leaf.index, name, neurons(leaf.name)

    def _reads(self, variable: Variable) -> bool:
        """Whether a variable is computed from any attention."""
        above = self.graph.upstream(variable)
        return any(attention.result in above for attention in self.attentions)


def _short(name: str) -> str:
    """The last part of a name."""
    return name.rpartition(".")[2].strip(":") or name


def _indices(shape: Sequence[int], axes: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """All of some axes, one by one: the neurons of each head."""
    sizes = [shape[axis] for axis in axes]
    for place in itertools.product(*map(range, sizes)):
        index: list[Any] = [slice(None)] * len(shape)
        for axis, entry in zip(axes, place, strict=True):
            index[axis] = entry
        yield tuple(index)


def _attention(variable: Variable, graph: Graph) -> _Attention | None:
    """What a variable is of an attention, if it is what one adds up."""
    producer, node = variable.producer, variable.node
    row = None if producer is None else standard(producer.call)  # whatever the rule is
    if producer is None or node is None or row is None or not (row.is_product and row.adds_up):
        return None
    nodes = [operand for _, operand in producer.call.nodes()]
    if len(nodes) != 2:
        return None
    patterns = [_softmax_behind(one) for one in nodes]
    chosen = [place for place, pattern in enumerate(patterns) if pattern is not None]
    if len(chosen) != 1:
        return None
    (place,) = chosen
    pattern = patterns[place]
    result = node.meta["val"]
    assert pattern is not None
    batch = result.dim() if variable.batch_axis is None else variable.batch_axis
    beside = sum(size != 1 for size in variable.shared)  # heads that share the samples' axis
    axes: list[int] = []
    for axis in _head_axes(node, place):
        if axis == batch:
            axes += range(batch, batch + beside)
        else:
            axes.append(axis if axis < batch else axis - 1 + beside)
    return _Attention(variable, pattern, tuple(axes))


def _head_axes(node: Node, place: int) -> list[int]:
    """Of a product with weights the axes of the heads: neither of queries nor of features.

    Arguments:
        place: which factor the weights are.
    """
    if isinstance(node.args[0], str):  # einsum: what both factors and the result have in common
        given, _, result = node.args[0].replace(" ", "").partition("->")
        factors = given.split(",")
        if len(factors) == 2 and result and "." not in result:
            return [axis for axis, letter in enumerate(result) if all(letter in f for f in factors)]
    return list(range(node.meta["val"].dim() - 2))


def _softmax_behind(node: Node) -> Node | None:
    """The softmax that a tensor comes out of, through functions of one parent."""
    while node.op == "call_function":
        row = lookup(node.target)  # type: ignore[arg-type]
        if row is None:
            return None
        if "softmax" in str(node.target):
            return node
        read = [n for n in node.all_input_nodes if is_float_tensor(n)]
        if len(read) != 1 or not (row.moves or row.one_parent):
            return None
        (node,) = read
    return None
