"""Attention in a captured graph: where its heads lie, and what they read.

Attention is a matrix product whose one factor comes out of a softmax. A head is what it adds up;
the softmax is its pattern; the other factor are its values. The pattern comes of another matrix
product, of queries and keys. All are told from operators and axes, whatever the model's code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from nrm.capture.nodes import is_float_tensor
from nrm.errors import QueryError
from nrm.formulas import NeuronSet
from nrm.graph import Graph, Operation, Variable
from nrm.operators import lookup, standard
from nrm.prepare import Pass
from nrm.sets import mask

Role = Literal["queries", "keys", "values"]
"""What a head reads."""


@dataclass(frozen=True)
class Attention:
    """A matrix product of weights out of a softmax with values.

    Attributes:
        result: what it adds up.
        pattern: the node of the softmax.
        axes: of the result's neurons, those of the heads; none: one head.
        values: the factor beside the weights.
    """

    result: Variable
    pattern: Node
    axes: tuple[int, ...]
    values: Factor


@dataclass(frozen=True)
class Factor:
    """One factor of a matrix product.

    Attributes:
        product: the node of the product.
        node: the factor.
        letters: of an einsum, those of the factor and of the result.
    """

    product: Node
    node: Node
    letters: tuple[str, str] | None

    def axis(self, of_result: int) -> int | None:
        """Which of the factor's axes is one of the result's; `None`: it is the same for all."""
        sizes = self.node.meta["val"].shape
        if self.letters is not None:
            own, result = self.letters
            return own.index(result[of_result])
        axis = of_result - (self.product.meta["val"].dim() - len(sizes))
        return axis if axis >= 0 and sizes[axis] != 1 else None


def attention_of(variable: Variable, graph: Graph) -> Attention | None:
    """What a variable is of an attention, if it is what one adds up."""
    node, factors = variable.node, _factors(variable)
    if node is None or factors is None:
        return None
    patterns = [_softmax_behind(factor.node) for factor in factors]
    chosen = [place for place, pattern in enumerate(patterns) if pattern is not None]
    if len(chosen) != 1:
        return None
    (place,) = chosen
    pattern = patterns[place]
    assert pattern is not None
    axes = _neuron_axes(variable, _head_axes(node, factors))
    return Attention(variable, pattern, axes, factors[1 - place])


def _factors(variable: Variable) -> list[Factor] | None:
    """The two factors of a matrix product, if a variable is the result of one."""
    producer, node = variable.producer, variable.node
    row = None if producer is None else standard(producer.call)  # whatever the rule is
    if producer is None or node is None or row is None or not (row.is_product and row.adds_up):
        return None
    factors = [one for one in row.factors(producer.call) if isinstance(one, Node)]
    if len(factors) != 2:
        return None
    letters: list[tuple[str, str] | None] = [None, None]
    if isinstance(node.args[0], str):
        given, _, result = node.args[0].replace(" ", "").partition("->")
        own = given.split(",")
        if len(own) == 2 and result and "." not in result:
            letters = [(one, result) for one in own]
    return [Factor(node, one, two) for one, two in zip(factors, letters, strict=True)]


def _head_axes(node: Node, factors: Sequence[Factor]) -> list[int]:
    """Of a product with weights the axes of the heads: neither of queries nor of features."""
    letters = [factor.letters for factor in factors]
    if letters[0] is not None and letters[1] is not None:
        (a, result), (b, _) = letters[0], letters[1]
        return [axis for axis, letter in enumerate(result) if letter in a and letter in b]
    return list(range(node.meta["val"].dim() - 2))


def _neuron_axes(variable: Variable, of_node: Sequence[int]) -> tuple[int, ...]:
    """Axes of a node as axes of its variable's neurons; that of the samples left out."""
    assert variable.node is not None
    dim = variable.node.meta["val"].dim()
    batch = dim if variable.batch_axis is None else variable.batch_axis
    beside = sum(size != 1 for size in variable.shared)  # heads that share the samples' axis
    axes: list[int] = []
    for axis in of_node:
        if axis == batch:
            axes += range(batch, batch + beside)
        else:
            axes.append(axis if axis < batch else axis - 1 + beside)
    return tuple(axes)


def indices(shape: Sequence[int], axes: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """All of some axes, one by one: the neurons of each head."""
    sizes = [shape[axis] for axis in axes]
    for place in itertools.product(*map(range, sizes)):
        index: list[Any] = [slice(None)] * len(shape)
        for axis, entry in zip(axes, place, strict=True):
            index[axis] = entry
        yield tuple(index)


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


# -- heads beside each other along one axis --------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """The heads of an attention along one axis of a layer.

    Attributes:
        variable: what the attention adds up, or the same moved about: often all heads beside each
            other as features, `[tokens, heads * features]`.
        axis: of the variable's neurons.
        indices: of each head, along that axis.
    """

    variable: Variable
    axis: int
    indices: tuple[tuple[int, ...], ...]


def heads_along_an_axis(forward: Pass, found: Attention) -> Heads | None:
    """Where the heads of an attention lie along one axis, the last layer within its module.

    Which neuron is which head's is read off numbers that are moved as the model moves them.
    `None`: there is one head, or no layer has them along one axis.
    """
    result = found.result
    if not found.axes or result.node is None:
        return None
    moved = [result]
    for variable in forward.graph.variables:  # parents first
        alone = _one_parent(variable) is moved[-1] and variable is not forward.graph.output
        alone = alone and _module(variable) == _module(result)
        if alone and variable.node is not None and _moves(variable):
            moved.append(variable)
    numbers = torch.zeros(forward.shape(result), dtype=torch.float64, device=forward.output.device)
    neurons = result.canonical(numbers.unsqueeze(0))[0]  # [batch, *neurons], in the same memory
    count = 0
    for index in indices(neurons.shape[1:], found.axes):
        neurons[(slice(None), *index)] = count
        count += 1
    nodes = [variable.node for variable in moved if variable.node is not None]
    values = forward.program.values(forward.inputs, nodes, {result.node: numbers})
    for variable, node in zip(reversed(moved), reversed(nodes), strict=True):
        view = variable.canonical(values[node].unsqueeze(0))[0]
        if not bool((view == view[:1]).all()):
            continue
        for axis in range(view.dim() - 1):
            along = view[0].movedim(axis, 0).reshape(view.shape[axis + 1], -1)
            heads = along[:, 0].long().tolist()
            if bool((along == along[:, :1]).all()) and set(heads) == set(range(count)):
                where = [tuple(k for k, one in enumerate(heads) if one == h) for h in range(count)]
                return Heads(variable, axis, tuple(where))
    return None


def _module(variable: Variable) -> str:
    return "" if variable.producer is None else variable.producer.address.partition(":")[0]


# -- queries, keys and values ----------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """What heads read: their queries, keys or values.

    Attributes:
        index: of the variable that it lies in.
        heads: the numbers of the heads that read it, of those that there are.
        number: among what heads of one attention read so.
    """

    index: int
    heads: tuple[int, ...]
    number: int
    neurons: NeuronSet


def what_heads_read(forward: Pass, attentions: Sequence[Attention], role: Role) -> list[list[Read]]:
    """The queries, keys or values of the heads of each attention.

    They are the neurons that the product reads of a head, followed up as long as they are but moved
    about or scaled: what projections give, or what is made of that (rotated by their positions,
    normed). Heads that read the same neurons, as groups of queries read one head of keys, have them
    in common.

    Raises:
        QueryError: no walk visits them, or they cannot be told.
    """
    found = [_factor(forward.graph, one, role) for one in attentions]
    sources = [None if one is None else _source(forward.graph, one.node) for one in found]
    if not any(source is not None for source in sources):
        raise QueryError(
            f"no walk visits the {role}: under this composite the values of attention take all. "
            "Choose a composite by which queries and keys take a share, composites.Circuits(), or "
            "explain the difference from a reference."
        )
    numbers: dict[Node, Tensor] = {}
    wanted = []
    for source in sources:
        if source is not None:
            shape = forward.shape(source.variable)
            count = shape.numel()
            # Of the type that real values have, and of which all are exact.
            numbered = torch.arange(count, device=forward.output.device, dtype=torch.float64)
            numbers[source.node] = numbered.view(shape)
            wanted.append(source.moved)
    values = forward.program.values(forward.inputs, wanted, numbers)
    result: list[list[Read]] = []
    for one, factor, source in zip(attentions, found, sources, strict=True):
        if factor is None or source is None:
            result.append([])
            continue
        moved = values[source.moved]
        if moved.dtype is not torch.float64 and forward.shape(source.variable).numel() > 2**24:
            raise QueryError(f"{source.variable.name!r} has too many neurons to be told by head.")
        result.append(_by_heads(forward, one, factor, source, moved.long()))
    return result


def scores_of(graph: Graph, found: Attention) -> Variable | None:
    """The product of queries and keys behind a pattern; `None`: no walk visits it.

    Raises:
        QueryError: there is more than one, or axes may be turned on the way.
    """
    variable = graph.by_node.get(found.pattern)
    producer = None if variable is None else variable.producer
    while producer is not None:
        if _factors(producer.output) is not None:
            return producer.output
        above = [operand for operand in producer.operands if not operand.is_leaf]
        if len(above) != 1 or _may_turn(producer, above[0]):
            raise QueryError(
                f"what the attention {found.result.name!r} adds up for its pattern is more than "
                "one product of queries and keys: they cannot be told. Name them as neuron sets."
            )
        producer = above[0].producer
    return None


def _factor(graph: Graph, found: Attention, role: Role) -> Factor | None:
    """The factor of a product that holds what heads read; `None`: no walk visits it."""
    if role == "values":
        return found.values
    product = scores_of(graph, found)
    factors = None if product is None else _factors(product)
    if product is None or factors is None:
        return None
    return _of_scores(factors, product, _softmaxed(found.pattern))[role]


def _of_scores(factors: list[Factor], product: Variable, axis: int) -> dict[str, Factor]:
    """Which factor of a product are the keys: the one along which the softmax goes."""
    assert product.node is not None
    dim = product.node.meta["val"].dim()
    first, second = factors
    letters = first.letters
    if letters is not None:
        keys_last = letters[1][axis % dim] not in letters[0]
    else:
        keys_last = axis % dim == dim - 1
    queries, keys = (first, second) if keys_last else (second, first)
    return {"queries": queries, "keys": keys}


def _softmaxed(node: Node) -> int:
    """The axis of a softmax."""
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
    return int(dim)


def _may_turn(producer: Operation, above: Variable) -> bool:
    """Whether an operation may bring axes into another order."""
    row = standard(producer.call)
    if row is None or above.node is None:
        return True
    return row.moves and row.kind != "where" and not row.keeps_order(producer.call)


@dataclass(frozen=True)
class _Source:
    """Where neurons come from that are moved about.

    Attributes:
        variable, node: where they are.
        moved: the node that they are moved to, of the same axes as the factor.
    """

    variable: Variable
    node: Node
    moved: Node


def _source(graph: Graph, node: Node) -> _Source | None:
    """Where the neurons of a factor come from, through scalings first and then what moves them."""
    variable = graph.by_node.get(node)
    if variable is None:
        return None
    while (above := _one_parent(variable)) is not None and _scales(variable):
        variable = above
    moved = variable.node
    while (above := _one_parent(variable)) is not None and _moves(variable):
        variable = above
    assert moved is not None
    assert variable.node is not None
    return _Source(variable, variable.node, moved)


def _one_parent(variable: Variable) -> Variable | None:
    """The variable that one is computed from alone, where samples lie apart as in it."""
    if variable.producer is None or len(variable.producer.operands) != 1:
        return None
    (above,) = variable.producer.operands
    lost = above.batch_axis is None and variable.batch_axis is not None
    return None if above.node is None or lost else above


def _scales(variable: Variable) -> bool:
    """Whether it is another one times constants; of another shape, it is moved too."""
    producer = variable.producer
    if producer is None or producer.kind != "scaling":
        return False
    (above,) = producer.operands
    return above.shape == variable.shape and above.batch_axis == variable.batch_axis


def _moves(variable: Variable) -> bool:
    assert variable.producer is not None
    row = standard(variable.producer.call)
    return row is not None and row.moves


def _by_heads(
    forward: Pass, found: Attention, factor: Factor, source: _Source, numbers: Tensor
) -> list[Read]:
    """What each head reads, that of several alike once.

    Arguments:
        numbers: of the source's neurons, where the factor has them.
    """
    result, variable = found.result, source.variable
    moved = forward.graph.by_node[source.moved]
    view = moved.canonical(numbers.unsqueeze(0))[0]  # [batch, *neurons]
    axes = _axes_of_heads(forward.graph, factor, moved)
    heads = list(indices(result.neuron_shape(forward.shape(result)), found.axes))
    shape = forward.shape(variable)
    chosen: dict[bytes, tuple[list[int], Tensor]] = {}
    for head, index in enumerate(heads):
        place = [index[axis] for axis in found.axes]
        part: list[Any] = [slice(None)] * view.dim()
        for axis, entry in zip(axes, place, strict=True):
            if axis is not None:
                part[axis + 1] = entry
        there = torch.zeros(shape.numel(), dtype=torch.bool, device=numbers.device)
        there[view[tuple(part)].reshape(-1)] = True
        lies = variable.canonical(there.view(shape).unsqueeze(0))[0]
        if bool((lies == lies[:1]).all()):
            lies = lies[0]
        key = lies.cpu().numpy().tobytes()
        chosen.setdefault(key, ([], lies))[0].append(head)
    return [
        Read(variable.index, tuple(readers), number, mask(variable.name, lies, in_front=True))
        for number, (readers, lies) in enumerate(chosen.values())
    ]


def _axes_of_heads(graph: Graph, factor: Factor, moved: Variable) -> list[int | None]:
    """Of a factor's neurons the axes of the heads; `None` for one that it does not have."""
    product = graph.by_node[factor.product]
    factors = _factors(product)
    assert factors is not None
    found: list[int | None] = []
    for axis in _head_axes(factor.product, factors):
        own = factor.axis(axis)
        several = len(_neuron_axes(product, [axis]))
        found += [None] * several if own is None else _neuron_axes(moved, [own])
    return found
