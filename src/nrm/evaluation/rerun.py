"""Where the output is an affine function of some layers, so that no run is needed for a set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from nrm.capture.call import wide
from nrm.graph import Graph, Operation
from nrm.operators import Identity, MatrixProduct, Product, Quotient, Routing, Sum, picks
from nrm.operators.averages import Averaging
from nrm.operators.layers import Layer, TransposedConvolution
from nrm.operators.sums import BatchNorm

_TOLERANCE = {torch.float64: 1e-9}
"""How far a run may be from what gradients say; 1e-4 in single precision."""


def gradients(
    replay: Replay,
    nodes: Sequence[Node],
    others: Collection[Node],
    target: int,
    removed: Mapping[Node, Tensor],
) -> dict[Node, Tensor] | None:
    """The target's derivatives `[neurons]` by some nodes, where they say what any change does.

    Arguments:
        others: nodes of layers below that change too.
        removed: `[neurons]`, values of the nodes to try it with.

    Returns:
        `None` where the output is not affine in the nodes, whatever the others are.
    """
    after = replay.changed_by(nodes)
    for node in nodes:
        if not replay.changed_by([node]).isdisjoint(set(nodes) - {node}):
            return None  # what is removed above depends on what is removed below
    if not after.isdisjoint(set(others) - set(nodes)):
        return None
    changed = replay.changed_by([*nodes, *others])
    if not all(_is_affine(replay.graph, node, changed) for node in after - set(nodes)):
        return None
    found, output = _derivatives(replay, nodes, after, target)
    return found if _holds_zero(replay, nodes, after, target, removed, found, output) else None


def _is_affine(graph: Graph, node: Node, changed: Collection[Node]) -> bool:
    """Whether a node is an affine function of the changed ones that it reads, jointly."""
    variable = graph.by_node.get(node)
    operation = None if variable is None else variable.producer
    if operation is None:
        # One that gives several results is judged where they are picked.
        return bool(node.users) and all(picks(user) for user in node.users)
    if not str(operation.call.target).startswith("aten."):
        return False  # what a row of the user's own says of relevance says nothing here
    read = [name for name, operand in operation.call.nodes() if operand in changed]
    row = operation.operator
    if isinstance(row, Quotient):
        return read == ["self"] and operation.call.get("rounding_mode") is None
    if isinstance(row, Product | MatrixProduct):
        return len(read) == 1
    return _is_affine_row(operation) and set(read) <= {name for name, _ in operation.named_slots}


def _is_affine_row(operation: Operation) -> bool:
    row = operation.operator
    if isinstance(row, Identity):
        return row.at_zero == "linear"
    if isinstance(row, Routing):
        return row.kind in ("view", "where", "pad", "interpolation")
    return isinstance(row, Layer | TransposedConvolution | Averaging | BatchNorm | Sum)


def _derivatives(
    replay: Replay, nodes: Sequence[Node], after: set[Node], target: int
) -> tuple[dict[Node, Tensor], Tensor]:
    """The derivatives of the target's output by some nodes, and the output."""
    leaves = {node: replay.values[node].detach().clone().requires_grad_() for node in nodes}
    with torch.enable_grad():
        output = _output(replay, leaves, after)[target]
        if not output.requires_grad:  # none of them leads to the output
            return {node: torch.zeros_like(leaves[node]).flatten() for node in nodes}, output
        found = torch.autograd.grad(output, list(leaves.values()), materialize_grads=True)
    return {n: g.reshape(-1) for n, g in zip(leaves, found, strict=True)}, output.detach()


def _holds_zero(
    replay: Replay,
    nodes: Sequence[Node],
    after: set[Node],
    target: int,
    removed: Mapping[Node, Tensor],
    found: dict[Node, Tensor],
    output: Tensor,
) -> bool:
    """Whether runs with other values at the nodes give what the derivatives say.

    Without all of their neurons, and far away on both sides: a row of one's own may call a
    function linear that is not.
    """
    drawn = torch.Generator().manual_seed(0)
    changes = [{node: removed[node] - replay.values[node].reshape(-1) for node in nodes}]
    away = {}
    for node in nodes:
        value = replay.values[node].reshape(-1)
        noise = torch.randn(value.shape, generator=drawn).to(value)
        away[node] = 3 * (1 + value.abs().max()) * noise
    changes += [away, {node: -change for node, change in away.items()}]
    tolerance = _TOLERANCE.get(output.dtype, 1e-4)
    for change in changes:
        products = [found[node] * change[node] for node in nodes]
        lost = sum(product.sum() for product in products)
        size = sum(product.abs().sum() for product in products)
        there = {node: replay.values[node] for node in nodes}
        values = {n: (v.reshape(-1) + change[n]).view_as(v) for n, v in there.items()}
        with torch.no_grad():
            expected = _output(replay, values, after)[target]
        if not bool((expected - output - lost).abs() <= tolerance * (output.abs() + size)):
            return False
    return True


def _output(replay: Replay, values: dict[Node, Any], after: set[Node]) -> Tensor:
    """`[outputs]`, with other values at some nodes."""
    begin = min(replay.place[node] for node in values)
    stage = replay.stage([replay.graph.explained], after, begin, batched=False)
    entering = {node: value for node, value in values.items() if node in stage.enters}
    found = replay.compute(stage, entering, None, lambda node, value: values.get(node, value))
    output: Tensor = found[replay.graph.explained]
    return output.reshape(-1)


# -- The captured graph run again from where something changed on, for many copies at once.

Values = dict[Node, Any]
"""What nodes hold: tensors, sizes, tuples of them."""
Change = Callable[[Node, Any], Any]
"""What takes the place of a node's value."""


@dataclass(frozen=True)
class Layout:
    """How a value holds copies of a sample.

    Attributes:
        axis: the copies follow each other along it; `None`: all share the value.
        step: how much each further copy adds to a size.
    """

    axis: int | None = None
    step: int = 0


Spread = tuple[Layout, ...] | None
"""The layouts of the leaves of a value; `None`: a copy cannot be told from the value."""

_SPREADS: WeakKeyDictionary[Graph, dict[Node, Spread]] = WeakKeyDictionary()
"""Layouts hold for every sample, and cost several runs to find."""


@dataclass(frozen=True)
class Stage:
    """A part of the graph to run again.

    Attributes:
        nodes: what to compute, in order.
        enters: changed nodes that were computed before.
        clean: nodes that nothing changed, whose values are those of the sample.
        wanted: what to keep.
        each: bytes that one copy takes at most.
    """

    nodes: tuple[Node, ...]
    enters: frozenset[Node]
    clean: tuple[Node, ...]
    wanted: frozenset[Node]
    last_use: Mapping[Node, tuple[Node, ...]]
    each: int


class Replay:
    """The captured graph of one sample, to run again from any node on.

    Attributes:
        values: of every node, for the sample.
        place: of every node in the order of computation.
        spreads: how each node holds several copies; empty where the graph takes one sample only.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Tensor]) -> None:
        self.graph, self.captured = graph, graph.captured
        needed = {graph.explained, *self.captured.inputs}
        for node in reversed(self.captured.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        self.order: list[Node] = [node for node in self.captured.graph.nodes if node in needed]
        self.place = {node: place for place, node in enumerate(self.order)}
        inputs = [wide(x) for x in inputs]
        self.values: Values = {}
        self._run_all(inputs, self.values.__setitem__)
        if graph not in _SPREADS:
            _SPREADS[graph] = self._spread(inputs) if self.captured.batched else {}
        self.spreads = _SPREADS[graph]

    # -- what changes ----------------------------------------------------------------------------

    def changed_by(self, nodes: Collection[Node]) -> set[Node]:
        """The nodes whose values depend on those of some, themselves included."""
        found = set(nodes)
        for node in self.order:
            if not _is_size(node) and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    def stage(
        self, wanted: Collection[Node], changed: Collection[Node], begin: int, batched: bool
    ) -> Stage:
        """What to compute for some nodes' values.

        Arguments:
            changed: the nodes that do not have the sample's values.
            begin: changed nodes up to this place have been computed.
            batched: for several copies; what cannot be copied is computed again.
        """
        computed: set[Node] = set()
        enters: set[Node] = set()
        clean: set[Node] = set()
        waiting, seen = list(wanted), set(wanted)
        while waiting:
            node = waiting.pop()
            again = batched and self.spreads[node] is None
            if again or (node in changed and self.place[node] > begin):
                computed.add(node)
                new = set(node.all_input_nodes) - seen
                seen |= new
                waiting += new
            else:
                (enters if node in changed else clean).add(node)
        nodes = tuple(sorted(computed, key=self.place.__getitem__))
        last_use = self._last_use(nodes, wanted)
        return Stage(
            nodes,
            frozenset(enters),
            tuple(clean),
            frozenset(wanted),
            last_use,
            self._bytes(nodes, enters | clean, last_use),
        )

    def compute(
        self, stage: Stage, entering: Values, rows: Tensor | None, change: Change
    ) -> Values:
        """The values of the wanted nodes.

        Arguments:
            entering: the changed nodes computed before.
            rows: zero for each copy; `None`: the graph takes one only.
            change: what takes the place of each computed value.
        """
        values = dict(entering)
        for node in stage.clean:
            values[node] = self.take(node, self.values[node], rows)
        for node in stage.nodes:
            if node.op == "call_function":
                value = _evaluate(node, values)
            else:  # an input that is changed itself
                value = self.take(node, self.values[node], rows)
            values[node] = change(node, value)
            for dead in stage.last_use.get(node, ()):
                del values[dead]
        return {node: values[node] for node in stage.wanted}

    # -- copies ----------------------------------------------------------------------------------

    def separates(self, node: Node) -> bool:
        """Whether each copy has values of its own at a node."""
        spread = self.spreads.get(node)
        return spread is not None and len(spread) == 1 and spread[0].axis is not None

    def take(self, node: Node, value: Any, rows: Tensor | None) -> Any:
        """The chosen copies of a value, which share no memory with it."""
        if rows is None:
            return value
        spread = self.spreads[node]
        assert spread is not None
        leaves, tree = pytree.tree_flatten(value)
        return pytree.tree_unflatten(
            [
                _take(leaf, one, layout, rows)
                for leaf, one, layout in zip(
                    leaves, pytree.tree_leaves(self.values[node]), spread, strict=True
                )
            ],
            tree,
        )

    def rows(self, node: Node, value: Tensor, copies: int) -> Tensor:
        """`[copies, neurons]`."""
        if copies == 1:
            return value.reshape(1, -1)
        axis = self._axis(node)
        return _apart(value, axis, copies).movedim(axis, 0).reshape(copies, -1)

    def unrows(self, node: Node, rows: Tensor) -> Tensor:
        """The value with these rows: the inverse of `rows`."""
        shape = self.values[node].shape
        if len(rows) == 1:
            return rows.view(shape)
        axis = self._axis(node)
        return rows.view(len(rows), *shape).movedim(0, axis).flatten(axis, axis + 1)

    def _axis(self, node: Node) -> int:
        spread = self.spreads[node]
        assert spread is not None
        axis = spread[0].axis
        assert axis is not None
        return axis

    # -- the whole graph -------------------------------------------------------------------------

    def _run_all(self, inputs: Sequence[Tensor], done: Callable[[Node, Any], None]) -> None:
        given = dict(zip(self.captured.inputs, inputs, strict=True))
        readers: dict[Node, Node] = {}
        for node in self.order:
            readers.update(dict.fromkeys(node.all_input_nodes, node))
        values: Values = {}
        with torch.no_grad():
            for node in self.order:
                if node.op == "call_function":
                    values[node] = _evaluate(node, values)
                else:
                    values[node] = given[node] if node in given else self.captured.constants[node]
                done(node, values[node])
                for dead in node.all_input_nodes:
                    if readers[dead] is node:
                        del values[dead]

    def _spread(self, inputs: Sequence[Tensor]) -> dict[Node, Spread]:
        """How each node holds copies; nothing, where samples mix: then they run one at a time.

        Two equal samples show values that depend on a sample's number. Samples mix where something
        that all share is computed from the inputs, or where the values of one depend on another,
        before it or after it.
        """
        axis = self.captured.batch_axis
        assert axis is not None
        spreads: dict[Node, Spread] = {}
        mixes = False

        def equal(node: Node, value: Any) -> None:
            spreads[node] = _compare(self.values[node], value)

        self._run_all([torch.cat([x, x], axis) for x in inputs], equal)
        for node in self._computed_from_inputs():
            leaves, spread = pytree.tree_leaves(self.values[node]), spreads[node]
            if spread is not None:
                layouts = zip(leaves, spread, strict=True)
                mixes |= any(isinstance(a, Tensor) and b.axis is None for a, b in layouts)

        def different(node: Node, value: Any, last: bool) -> None:
            nonlocal mixes
            spread = spreads[node]
            if spread is not None and not _holds(value, self.values[node], spread, last):
                mixes = True

        for scale, shift in ((0.75, -0.1), (1.5, 0.1)):
            others = [_another(x, scale, shift) for x in inputs]
            for last in (False, True):
                pairs = ((y, x) if last else (x, y) for x, y in zip(inputs, others, strict=True))
                if not mixes:
                    joined = [torch.cat(pair, axis) for pair in pairs]
                    self._run_all(joined, partial(different, last=last))
        return {} if mixes else spreads

    def _computed_from_inputs(self) -> list[Node]:
        """The nodes whose values, and not only their sizes, depend on an input's."""
        found = set(self.captured.inputs)
        for node in self.order:
            if not _is_size(node) and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return [node for node in self.order if node in found and node.op == "call_function"]

    # -- memory ----------------------------------------------------------------------------------

    def _last_use(
        self, nodes: Sequence[Node], wanted: Collection[Node]
    ) -> dict[Node, tuple[Node, ...]]:
        """By node, what nothing reads after it."""
        used: set[Node] = set(wanted)
        found: dict[Node, tuple[Node, ...]] = {}
        for node in reversed(nodes):
            found[node] = tuple(operand for operand in node.all_input_nodes if operand not in used)
            if node not in used:  # nothing reads it
                found[node] += (node,)
            used.update(node.all_input_nodes)
        return found

    def _bytes(
        self,
        nodes: Sequence[Node],
        given: Collection[Node],
        last_use: Mapping[Node, tuple[Node, ...]],
    ) -> int:
        """What one copy takes at most, with as much again while the largest value is changed."""
        now = sum(self._size(node) for node in given)
        most = now
        for node in nodes:
            size = self._size(node)
            now += size
            most = max(most, now + size)
            now -= sum(self._size(dead) for dead in last_use[node])
        return most

    def _size(self, node: Node) -> int:
        spread = self.spreads.get(node)
        leaves = pytree.tree_leaves(self.values[node])
        layouts = (Layout(0),) * len(leaves) if spread is None else spread
        return sum(
            leaf.numel() * leaf.element_size()
            for leaf, layout in zip(leaves, layouts, strict=True)
            if isinstance(leaf, Tensor) and layout.axis is not None
        )


def _evaluate(node: Node, values: Values) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    target: Any = node.target
    return target(*args, **kwargs)


_SIZES = ("aten.sym_", "aten.size", "aten.new_", "aten.zeros_like", "aten.ones_like")


def _is_size(node: Node) -> bool:
    """Whether a node reads how large a tensor is, and nothing of its values."""
    return str(node.target).startswith((*_SIZES, "aten.full_like", "aten.empty_like"))


def _take(value: Any, one: Any, layout: Layout, rows: Tensor) -> Any:
    """The chosen copies of a leaf.

    Arguments:
        one: the sample's value.
    """
    if layout.axis is None:
        return one + (len(rows) - 1) * layout.step if layout.step else value
    if one.shape[layout.axis] == 1:
        return value.index_select(layout.axis, rows)
    apart = _apart(value, layout.axis, value.shape[layout.axis] // one.shape[layout.axis])
    return apart.index_select(layout.axis, rows).flatten(layout.axis, layout.axis + 1)


def _apart(value: Tensor, axis: int, copies: int) -> Tensor:
    """With an axis for the copies in front of the one that holds them."""
    return value.reshape(*value.shape[:axis], copies, -1, *value.shape[axis + 1 :])


def _another(x: Tensor, scale: float, shift: float) -> Tensor:
    """Another sample; numbers of tokens, nodes or classes change places."""
    if x.is_floating_point():
        return scale * x + shift
    return x.flip(-1) if x.dim() > 1 and x.dtype is not torch.bool else x


def _compare(one: Any, two: Any) -> Spread:
    """How a value holds copies, from that of one sample and of the same sample twice."""
    leaves, tree = pytree.tree_flatten(one)
    doubled, other = pytree.tree_flatten(two)
    if tree != other:
        return None
    layouts = [_layout(a, b) for a, b in zip(leaves, doubled, strict=True)]
    return None if None in layouts else tuple(layout for layout in layouts if layout is not None)


def _layout(one: Any, two: Any) -> Layout | None:
    if not isinstance(one, Tensor):
        if one == two:
            return Layout()
        return Layout(step=two - one) if isinstance(one, int) else None
    if one.shape == two.shape:
        return Layout() if _alike(one, two) else None
    if one.dim() != two.dim():
        return None
    differing = [a for a in range(one.dim()) if one.shape[a] != two.shape[a]]
    axis, size = differing[0], one.shape[differing[0]]
    if len(differing) > 1 or two.shape[axis] != 2 * size:
        return None
    if not _alike(torch.cat([one, one], axis), two):
        return None
    if size > 1 and _alike(one.repeat_interleave(2, axis), two):
        return None  # the copies may as well alternate
    return Layout(axis)


def _holds(value: Any, one: Any, spread: tuple[Layout, ...], last: bool) -> bool:
    """Whether the first of two copies is the sample, or the last."""
    for leaf, alone, layout in zip(
        pytree.tree_leaves(value), pytree.tree_leaves(one), spread, strict=True
    ):
        if not isinstance(leaf, Tensor) or layout.axis is None:
            continue
        size = alone.shape[layout.axis]
        if leaf.shape[layout.axis] != 2 * size:
            return False
        if not _alike(leaf.narrow(layout.axis, size if last else 0, size), alone):
            return False
    return True


def _alike(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return bool((a == b).all())
    finite = a[torch.isfinite(a)]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    rounding = 1e3 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=rounding, atol=rounding * size, equal_nan=True)
