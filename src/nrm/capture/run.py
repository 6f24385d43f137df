"""Running a captured graph, or a part of it: one interpreter for every run.

A `Plan` says which nodes are computed for some nodes' values, in which order, and what is let go
after each. An `Interpreter` computes them: from inputs, or from other nodes that are given values
(from a node on), with some values changed on the way, of one sample or of many copies at once
(`find_layouts`), with derivatives or without. Whoever computes some nodes in another way than
by calling their operators overrides `run_node`: `nrm.prepare` gets operations ready for messages,
`nrm.telescope` makes their derivatives those of relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.utils import _pytree as pytree

from nrm.capture.call import wide
from nrm.capture.nodes import Captured, ancestors, dependents, read_by
from nrm.capture.store import Shared

Values = dict[Node, Any]
"""What nodes hold: tensors, sizes, tuples of them."""
Change = Callable[[Node, Any], Any]
"""What takes the place of a node's value, from there on."""
Reads = Callable[[Node], Iterable[Node]]
"""The nodes whose values a node is computed from."""

_NO_MODULE = nn.Module()
"""Captured graphs hold no modules: parameters are given as values."""


@dataclass(frozen=True)
class Plan:
    """What to compute for the values of some nodes.

    Attributes:
        graph: that of the nodes.
        nodes: what to compute, in order.
        given: the nodes whose values have to be known before.
        wanted: the nodes whose values are kept to the end.
        release: of each node to compute, what nothing reads after it.
    """

    graph: FxGraph
    nodes: tuple[Node, ...]
    given: frozenset[Node]
    wanted: frozenset[Node]
    release: Mapping[Node, tuple[Node, ...]]

    @classmethod
    def of(
        cls,
        graph: FxGraph,
        wanted: Collection[Node],
        known: Container[Node] = (),
        reads: Reads = read_by,
    ) -> Plan:
        """What to compute for some nodes' values.

        Arguments:
            known: nodes that are not computed, but given.
            reads: what a node is computed from.
        """
        needed = ancestors(wanted, lambda node: () if node in known else reads(node))
        nodes = tuple(node for node in graph.nodes if node in needed and node not in known)
        release: dict[Node, tuple[Node, ...]] = {}
        used = set(wanted)
        for node in reversed(nodes):
            read = dict.fromkeys(reads(node))
            release[node] = tuple(operand for operand in read if operand not in used)
            used.update(read)
        given = frozenset(node for node in needed if node in known)
        return cls(graph, nodes, given, frozenset(wanted), release)


class Interpreter(torch.fx.Interpreter):
    """Computes the nodes of a plan, once.

    Arguments:
        plan: what to compute.
        given: the values known before, those of placeholders among the plan's nodes included.
        change: what takes the place of each computed value.
        derivatives: whether autograd follows what is computed.

    Attributes:
        env: the values of nodes, as far as they are computed and still read.
    """

    def __init__(
        self,
        plan: Plan,
        given: Mapping[Node, Any],
        change: Change | None = None,
        derivatives: bool = False,
    ) -> None:
        super().__init__(_NO_MODULE, garbage_collect_values=False, graph=plan.graph)
        self.plan, self.change, self.derivatives = plan, change, derivatives
        self.env = {node: given[node] for node in plan.given}
        self._sources = {n: given[n] for n in plan.nodes if n.op != "call_function"}

    def compute(self) -> Values:
        """The values of the wanted nodes."""
        for node in self.plan.nodes:
            value = self.run_node(node)
            self.env[node] = value if self.change is None else self.change(node, value)
            del value  # the next node may be the last to read it
            for dead in self.plan.release[node]:
                self.release(dead)
        return {node: self.env[node] for node in self.plan.wanted}

    def run_node(self, n: Node) -> Any:
        """The value of one node. Names of modules and the like are left as they are: other
        threads may be capturing, which `torch.fx` would tell of this node."""
        if n.op != "call_function":
            return self._sources.pop(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with torch.set_grad_enabled(self.derivatives):
            return self.call_function(n.target, args, kwargs)

    def release(self, node: Node) -> None:
        """Let a value go that nothing reads any more."""
        del self.env[node]


def evaluate(
    captured: Captured,
    inputs: Sequence[Tensor],
    at: Node | None = None,
    change: Change | None = None,
) -> Any:
    """The captured model's output, computed plainly.

    Arguments:
        at: another node, whose value is wanted instead.
        change: what takes the place of each node's value from there on, inputs included.
    """
    at = captured.output if at is None else at
    plan = Plan.of(captured.graph, [at])
    return Interpreter(plan, given(captured, inputs), change).compute()[at]


def given(captured: Captured, inputs: Sequence[Tensor]) -> Values:
    """The values that a run of the whole graph starts from."""
    return captured.constants | dict(zip(captured.inputs, map(wide, inputs), strict=True))


# -- what no input changes -----------------------------------------------------------------------


class Folding(Interpreter):
    """Computes what depends on constants alone, once for all captures of a model.

    Arguments:
        wanted: the nodes whose values are asked for; none depends on an input.
        shared: what the model's captures have in common.
    """

    def __init__(self, captured: Captured, wanted: Collection[Node], shared: Shared) -> None:
        constants = {node: shared.constant(value) for node, value in captured.constants.items()}
        super().__init__(Plan.of(captured.graph, wanted, constants), constants)
        self.shared = shared

    def run_node(self, n: Node) -> Any:
        arguments = self.fetch_args_kwargs_from_env(n)
        return self.shared.computed(n.target, arguments, lambda: super(Folding, self).run_node(n))


# -- many copies at once ---------------------------------------------------------------------------
#
# A graph that takes any batch size computes many copies of one sample at once. Each value then
# holds the copies along an axis, or is shared by all, or is a size that grows with their number.
# Which of these, is found by running the graph on the sample twice; a graph in which samples mix
# takes one at a time.


@dataclass(frozen=True)
class Layout:
    """How a value holds copies of a sample.

    Attributes:
        axis: the copies follow each other along it; `None`: all share the value.
        step: how much each further copy adds to a size.
    """

    axis: int | None = None
    step: int = 0


Layouts = dict[Node, "tuple[Layout, ...] | None"]
"""The layouts of the leaves of each node's value; `None`: no copy can be told from the value."""


_LAYOUTS: WeakKeyDictionary[FxGraph, Layouts] = WeakKeyDictionary()
"""How graphs hold copies: that is so for every sample, and costs several runs to find."""


class Copies:
    """Values of several copies of a sample.

    Arguments:
        values: of every node, for the sample alone.
        layouts: of every node; empty where the graph takes one sample only.
    """

    def __init__(self, values: Values, layouts: Layouts) -> None:
        self.values, self.layouts = values, layouts

    @classmethod
    def of(
        cls, captured: Captured, wanted: Collection[Node], inputs: Sequence[Tensor], values: Values
    ) -> Copies:
        """Those of a sample; `find_layouts` says what the arguments are."""
        if captured.graph not in _LAYOUTS:
            _LAYOUTS[captured.graph] = find_layouts(captured, wanted, inputs, values)
        return cls(values, _LAYOUTS[captured.graph])

    @classmethod
    def of_first(
        cls, captured: Captured, wanted: Collection[Node], inputs: Sequence[Tensor], values: Values
    ) -> Copies:
        """Those of a batch of samples, laid out as those of its first one.

        Sizes grow by that of one sample with each, and equal samples say less of where they lie.
        """
        axis = captured.batch_axis
        if captured.graph not in _LAYOUTS and captured.batched and axis is not None:
            first = [x.narrow(axis, 0, 1) for x in inputs]
            alone: Values = {}

            def keep(node: Node, value: Any) -> Any:
                alone[node] = value
                return value

            Interpreter(Plan.of(captured.graph, wanted), given(captured, first), keep).compute()
            cls.of(captured, wanted, first, alone)
        return cls.of(captured, wanted, inputs, values)

    @property
    def possible(self) -> bool:
        """Whether the graph takes several copies at once."""
        return bool(self.layouts)

    def tells(self, node: Node) -> bool:
        """Whether copies can be taken out of a node's value."""
        return self.layouts[node] is not None

    def axis(self, node: Node) -> int | None:
        """The axis of a tensor along which the copies have values of their own, if they do."""
        layouts = self.layouts.get(node)
        return layouts[0].axis if layouts is not None and len(layouts) == 1 else None

    def take(self, node: Node, value: Any, copies: Tensor) -> Any:
        """The chosen copies `[copies]` of a value, which share no memory with it."""
        layouts = self.layouts[node]
        assert layouts is not None
        leaves, tree = pytree.tree_flatten(value)
        ones = pytree.tree_leaves(self.values[node])
        taken = (
            _take(leaf, one, layout, copies)
            for leaf, one, layout in zip(leaves, ones, layouts, strict=True)
        )
        return pytree.tree_unflatten(taken, tree)

    def rows(self, node: Node, value: Tensor, copies: int) -> Tensor:
        """A value as `[copies, neurons]`."""
        if copies == 1:
            return value.reshape(1, -1)
        axis = self._own_axis(node)
        return _apart(value, axis, copies).movedim(axis, 0).reshape(copies, -1)

    def unrows(self, node: Node, rows: Tensor) -> Tensor:
        """The value with these rows: the inverse of `rows`."""
        shape = self.values[node].shape
        if len(rows) == 1:
            return rows.view(shape)
        axis = self._own_axis(node)
        return rows.view(len(rows), *shape).movedim(0, axis).flatten(axis, axis + 1)

    def bytes(self, node: Node) -> int:
        """What one more copy takes."""
        leaves = pytree.tree_leaves(self.values[node])
        layouts = self.layouts.get(node) or (Layout(0),) * len(leaves)
        return sum(
            leaf.numel() * leaf.element_size()
            for leaf, layout in zip(leaves, layouts, strict=True)
            if isinstance(leaf, Tensor) and layout.axis is not None
        )

    def _own_axis(self, node: Node) -> int:
        axis = self.axis(node)
        assert axis is not None
        return axis


def find_layouts(
    captured: Captured, wanted: Collection[Node], inputs: Sequence[Tensor], values: Values
) -> Layouts:
    """How each node holds copies; nothing, where samples mix: then they run one at a time.

    Two equal samples show values that depend on a sample's number. Samples mix where something
    that all share is computed from the inputs, or where the values of one depend on another,
    before it or after it.

    Arguments:
        wanted: the nodes that a run is for.
        values: of every node, for the sample alone.
    """
    axis = captured.batch_axis
    if not captured.batched or axis is None:
        return {}
    plan = Plan.of(captured.graph, wanted)
    layouts: Layouts = {}

    def equal(node: Node, value: Any) -> Any:
        layouts[node] = _compare(values[node], value)
        return value

    Interpreter(plan, given(captured, [torch.cat([x, x], axis) for x in inputs]), equal).compute()
    for node in dependents(plan.nodes, captured.inputs, sizes=False):
        leaves, found = pytree.tree_leaves(values.get(node)), layouts.get(node)
        if node.op == "call_function" and found is not None:
            pairs = zip(leaves, found, strict=True)
            if any(isinstance(leaf, Tensor) and layout.axis is None for leaf, layout in pairs):
                return {}

    def different(node: Node, value: Any, last: bool) -> Any:
        found = layouts[node]
        if found is not None and not _holds(value, values[node], found, last):
            raise _SamplesMixError
        return value

    try:
        for scale, shift in ((0.75, -0.1), (1.5, 0.1)):
            others = [_another(x, scale, shift) for x in inputs]
            for last in (False, True):
                ordered = (others, inputs) if last else (inputs, others)
                joined = [torch.cat(pair, axis) for pair in zip(*ordered, strict=True)]
                start = given(captured, joined)
                Interpreter(plan, start, partial(different, last=last)).compute()
    except _SamplesMixError:
        return {}
    return layouts


class _SamplesMixError(Exception):
    """The values of one sample depend on another's."""


def _take(value: Any, one: Any, layout: Layout, copies: Tensor) -> Any:
    """The chosen copies of a leaf.

    Arguments:
        one: the sample's value.
    """
    if layout.axis is None:
        return one + (len(copies) - 1) * layout.step if layout.step else value
    if one.shape[layout.axis] == 1:
        return value.index_select(layout.axis, copies)
    apart = _apart(value, layout.axis, value.shape[layout.axis] // one.shape[layout.axis])
    return apart.index_select(layout.axis, copies).flatten(layout.axis, layout.axis + 1)


def _apart(value: Tensor, axis: int, copies: int) -> Tensor:
    """With an axis for the copies in front of the one that holds them."""
    return value.reshape(*value.shape[:axis], copies, -1, *value.shape[axis + 1 :])


def _another(x: Tensor, scale: float, shift: float) -> Tensor:
    """Another sample; numbers of tokens, nodes or classes change places."""
    if x.is_floating_point():
        return scale * x + shift
    return x.flip(-1) if x.dim() > 1 and x.dtype is not torch.bool else x


def _compare(one: Any, two: Any) -> tuple[Layout, ...] | None:
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


def _holds(value: Any, one: Any, layouts: tuple[Layout, ...], last: bool) -> bool:
    """Whether the first of two copies is the sample, or the last."""
    for leaf, alone, layout in zip(
        pytree.tree_leaves(value), pytree.tree_leaves(one), layouts, strict=True
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
