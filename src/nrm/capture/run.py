"""Running a captured graph, or a part of it: one interpreter for every run.

A `Plan` says which nodes are computed for some nodes' values, in which order, and what is let go
after each. An `Interpreter` computes them: from inputs, or from other nodes that are given values
(from a node on), with some values changed on the way, of one sample or of many copies at once
(`nrm.capture.copies`), with derivatives or without. Whoever computes some nodes in another way than
by calling their operators overrides `run_node`: `nrm.prepare` gets operations ready for messages,
`nrm.telescope` makes their derivatives those of relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import Node

from nrm.capture.call import wide
from nrm.capture.nodes import Captured, ancestors, read_by
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
