"""A captured graph of one sample run again from where something changed on.

For many copies of the sample at once, each with changes of its own; or, where the output is an
affine function of what changes, not at all: its derivatives say what any change does. What changes
are the neurons that are removed: to zero, a mean, or values of one's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.capture.nodes import dependents
from nrm.capture.run import Change, Copies, Interpreter, Plan, Values, given
from nrm.graph import Graph
from nrm.operators import picks, standard

_TOLERANCE = {torch.float64: 1e-9}
"""How far a run may be from what gradients say; 1e-4 in single precision."""


@dataclass(frozen=True)
class Part:
    """A part of the graph to run again.

    Attributes:
        plan: what to compute.
        changed: what it starts from, of values that differ from the sample's.
        unchanged: what it starts from, of values that are the sample's.
        bytes: what one copy takes at most.
    """

    plan: Plan
    changed: frozenset[Node]
    unchanged: tuple[Node, ...]
    bytes: int


class Rerun:
    """The captured graph of one sample, to run again from any node on.

    Arguments:
        inputs: the model's, of one sample.

    Attributes:
        values: of every node, for the sample.
        place: of every node in the order of computation.
        copies: how nodes hold several copies of the sample.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Tensor]) -> None:
        self.graph, self.captured = graph, graph.captured
        wanted = {graph.explained, *self.captured.inputs}
        plan = Plan.of(self.captured.graph, wanted)
        self.order = plan.nodes
        self.place = {node: place for place, node in enumerate(self.order)}
        self.values: Values = {}

        def keep(node: Node, value: Any) -> Any:
            self.values[node] = value
            return value

        Interpreter(plan, given(self.captured, inputs), keep).compute()
        self.copies = Copies.of(self.captured, wanted, inputs, self.values)

    def changed_by(self, nodes: Collection[Node]) -> set[Node]:
        """The nodes whose values depend on those of some, themselves included."""
        return dependents(self.order, nodes, sizes=False)

    def part(
        self, wanted: Collection[Node], changed: Collection[Node], begin: int, copied: bool
    ) -> Part:
        """What to compute for some nodes' values.

        Arguments:
            changed: the nodes that do not have the sample's values.
            begin: changed nodes up to this place have been computed.
            copied: for several copies; what cannot be copied is computed again.
        """
        known = {
            node
            for node in self.order
            if not (copied and not self.copies.tells(node))
            and not (node in changed and self.place[node] > begin)
        }
        plan = Plan.of(self.captured.graph, wanted, known)
        before = frozenset(node for node in plan.given if node in changed)
        return Part(plan, before, tuple(plan.given - before), self._bytes(plan))

    def compute(
        self,
        part: Part,
        changed: Values,
        copies: Tensor | None,
        change: Change | None,
        derivatives: bool = False,
    ) -> Values:
        """The values of the wanted nodes.

        Arguments:
            changed: the changed values that the part starts from.
            copies: zero for each copy; `None`: the graph takes one only.
            change: what takes the place of each computed value.
            derivatives: whether autograd follows.
        """
        start = self._start(part, changed, copies)
        run = Interpreter(part.plan, start, change, derivatives)
        del start  # what is read no more can go
        return run.compute()

    def _start(self, part: Part, changed: Values, copies: Tensor | None) -> Values:
        inputs = [node for node in part.plan.nodes if node.op != "call_function"]
        samples = {n: self.copied(n, self.values[n], copies) for n in (*part.unchanged, *inputs)}
        return samples | changed

    def copied(self, node: Node, value: Any, copies: Tensor | None) -> Any:
        """The chosen copies of a value; `None`: the value itself."""
        return value if copies is None else self.copies.take(node, value, copies)

    def _bytes(self, plan: Plan) -> int:
        """What one copy takes at most, with as much again while the largest value is changed."""
        now = most = sum(self.copies.bytes(node) for node in plan.given)
        for node in plan.nodes:
            size = self.copies.bytes(node)
            now += size
            most = max(most, now + size)
            now -= sum(self.copies.bytes(dead) for dead in plan.release[node])
        return most


# -- where the output is affine in what changes --------------------------------------------------


def gradients(
    rerun: Rerun,
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
    after = rerun.changed_by(nodes)
    for node in nodes:
        if not rerun.changed_by([node]).isdisjoint(set(nodes) - {node}):
            return None  # what is removed above depends on what is removed below
    if not after.isdisjoint(set(others) - set(nodes)):
        return None
    changed = rerun.changed_by([*nodes, *others])
    if not all(_is_affine(rerun.graph, node, changed) for node in after - set(nodes)):
        return None
    affine = _Affine(rerun, nodes, after, target)
    return affine.derivatives if affine.holds(removed) else None


def _is_affine(graph: Graph, node: Node, changed: Collection[Node]) -> bool:
    """Whether a node is an affine function of the changed ones that it reads, jointly."""
    variable = graph.by_node.get(node)
    operation = None if variable is None else variable.producer
    if operation is None:
        # One that gives several results is judged where they are picked.
        return bool(node.users) and all(picks(user) for user in node.users)
    row = standard(operation.call)
    read = [name for name, operand in operation.call.nodes() if operand in changed]
    return row is not None and row.affine_in(operation.call, read)


class _Affine:
    """The output as an affine function of some nodes.

    Arguments:
        after: the nodes that change with them, themselves included.
        target: the number of the explained output among all of the sample.

    Attributes:
        derivatives: of the target's output `[neurons]`, by node.
    """

    def __init__(self, rerun: Rerun, nodes: Sequence[Node], after: set[Node], target: int) -> None:
        self.rerun, self.nodes, self.target = rerun, nodes, target
        begin = min(rerun.place[node] for node in nodes)
        self._part = rerun.part([rerun.graph.explained], after, begin, copied=False)
        leaves = {n: rerun.values[n].detach().clone().requires_grad_() for n in nodes}
        output = self._output(leaves, derivatives=True)
        if output.requires_grad:
            found = torch.autograd.grad(output, list(leaves.values()), materialize_grads=True)
        else:  # none of them leads to the output
            found = tuple(map(torch.zeros_like, leaves.values()))
        self.derivatives = {n: g.reshape(-1) for n, g in zip(nodes, found, strict=True)}
        self._at_sample = output.detach()

    def holds(self, removed: Mapping[Node, Tensor]) -> bool:
        """Whether runs with other values at the nodes give what the derivatives say.

        Without all of their neurons, and far away on both sides.
        """
        drawn = torch.Generator().manual_seed(0)
        there = {node: self.rerun.values[node].reshape(-1) for node in self.nodes}
        away = {
            node: 3 * (1 + value.abs().max()) * torch.randn(value.shape, generator=drawn).to(value)
            for node, value in there.items()
        }
        without = {node: removed[node] - value for node, value in there.items()}
        tolerance = _TOLERANCE.get(self._at_sample.dtype, 1e-4)
        for change in (without, away, {node: -far for node, far in away.items()}):
            products = [self.derivatives[node] * change[node] for node in self.nodes]
            lost = sum(product.sum() for product in products)
            size = sum(product.abs().sum() for product in products) + self._at_sample.abs()
            expected = self._output(
                {n: (v + change[n]).view_as(self.rerun.values[n]) for n, v in there.items()}
            )
            if not bool((expected - self._at_sample - lost).abs() <= tolerance * size):
                return False
        return True

    def _output(self, values: Values, derivatives: bool = False) -> Tensor:
        """The explained output, a scalar, with other values at the nodes."""
        start = {node: value for node, value in values.items() if node in self._part.changed}

        def change(node: Node, value: Any) -> Any:
            return values.get(node, value)

        found = self.rerun.compute(self._part, start, None, change, derivatives)
        with torch.set_grad_enabled(derivatives):
            output: Tensor = found[self.rerun.graph.explained].reshape(-1)[self.target]
        return output


# -- families of sets, removed from many copies at once --------------------------------------------


@dataclass(frozen=True, eq=False)
class Picked:
    """The neurons of one variable that each set of a family has.

    Attributes:
        index: `[elements]`, the neurons, set after set.
        owner: `[elements]`, the set that each belongs to.
        begin, count: `[sets]`, where the neurons of a set are among the elements.
        single: each set is one neuron.
    """

    index: Tensor
    owner: Tensor
    begin: Tensor
    count: Tensor
    single: bool

    @classmethod
    def of(cls, indices: Sequence[Tensor], device: torch.device) -> Picked:
        count = torch.tensor([len(index) for index in indices])
        owner = torch.repeat_interleave(torch.arange(len(indices)), count)
        begin = count.cumsum(0) - count
        tensors = (torch.cat(list(indices)), owner, begin, count)
        index, owner, begin, count = (t.to(device) for t in tensors)
        return cls(index, owner, begin, count, bool((count == 1).all()))

    def sums(self, values: Tensor) -> Tensor:
        """`[rows, sets]`, values `[rows, neurons]` added up over each set."""
        if self.single:
            return values.index_select(1, self.index)
        found = values.new_zeros(len(values), len(self.count))
        at_once = max(values.shape[1], 1)  # sets may have neurons in common
        for begin in range(0, len(self.index), at_once):
            part = slice(begin, begin + at_once)
            found.index_add_(1, self.owner[part], values.index_select(1, self.index[part]))
        return found

    def put(self, values: Tensor, chosen: Tensor, removed: Tensor) -> None:
        """Put the removed values in the place of the neurons of the chosen sets.

        Arguments:
            values: `[rows, neurons]`, changed in place.
            chosen: `[rows]`, the number of a set, from one on; zero: none.
            removed: `[neurons]`.
        """
        rows = chosen.nonzero()[:, 0]
        sets = chosen[rows] - 1
        if self.single:
            index = self.index[sets]
        else:
            count = self.count[sets]
            ends = count.cumsum(0)
            rows = torch.repeat_interleave(rows, count)
            within = torch.arange(len(rows), device=rows.device)
            shift = torch.repeat_interleave(self.begin[sets] - ends + count, count)
            index = self.index[within + shift]
        values[rows, index] = removed[index]


@dataclass(frozen=True, eq=False)
class Family:
    """Neuron sets, by the nodes of their variables."""

    size: int
    picked: dict[Node, Picked]

    def __len__(self) -> int:
        return self.size
