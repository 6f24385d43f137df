"""The way from a baseline to the input, along which a rule integrates (`rules.PathIntegrated`).

The network runs once more for every step of it, and operations whose rule asks for the way read the
values of their operands there, beside those at the input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import Node

from nrm.capture.run import Interpreter, Plan, Values
from nrm.errors import InputError, NrmError, QueryError
from nrm.graph import Graph, Operation, Variable
from nrm.rules import PathIntegrated
from nrm.rules.contributions import Baseline


class Path:
    """The one way that inputs take from their baselines.

    Arguments:
        rule: that of all operations that ask for the way.
        known: the nodes whose values a run starts from: inputs and constants.

    Raises:
        InputError: baselines by name are not one for each input.
    """

    def __init__(self, graph: Graph, rule: PathIntegrated, known: Collection[Node]) -> None:
        self.steps = rule.steps
        self._points: dict[Node, Callable[[Tensor, int], Tensor]] = {
            variable.node: partial(
                rule.point, name=variable.name, start=start, batch_axis=variable.batch_axis
            )
            for variable, start in _starts(graph, rule.baseline).items()
            if variable.node is not None
        }
        integrated = [op for op in graph.operations if isinstance(op.rule, PathIntegrated)]
        curved = [op for op in integrated if op.operator.by_derivatives]
        linear = [op for op in integrated if op.operator.adds_up]
        self._everywhere = curved, _plan(graph, curved, known)
        self._at_the_start = [*curved, *linear], _plan(graph, [*curved, *linear], known)

    @classmethod
    def of(cls, graph: Graph, known: Collection[Node]) -> Path | None:
        """The way of a graph, if any rule integrates along one.

        Raises:
            QueryError: there are several.
        """
        rules = {op.rule for op in graph.operations if isinstance(op.rule, PathIntegrated)}
        if len(rules) > 1:
            raise QueryError(
                f"the composite has {len(rules)} different paths. A network runs along one: give "
                "every choice the same PathIntegrated rule."
            )
        return cls(graph, rules.pop(), known) if rules else None

    def operands(self, given: Values) -> dict[Operation, list[list[Tensor]]]:
        """The operands' values at every step, of operations that read them.

        Linear ones need only those at the baseline.

        Arguments:
            given: inputs and constants.
        """
        found: dict[Operation, list[list[Tensor]]] = {}
        for step in range(self.steps):
            readers, plan = self._everywhere if step else self._at_the_start
            moved = partial(self._moved, step=step)
            start = {node: moved(node, value) for node, value in given.items()}
            values = Interpreter(plan, start, moved).compute()
            for operation in readers:
                found.setdefault(operation, []).append([values[slot] for slot in operation.slots])
        return found

    def _moved(self, node: Node, value: Any, step: int) -> Any:
        """Where an input, or an embedding, is after some steps; any other value as it is."""
        return self._points[node](value, step) if node in self._points else value


def _plan(graph: Graph, readers: Collection[Operation], known: Collection[Node]) -> Plan:
    """What to compute for the operands of some operations."""
    operands = {slot for operation in readers for slot in operation.slots}
    return Plan.of(graph.captured.graph, operands, known)


def _starts(graph: Graph, baseline: Baseline | Mapping[str, Baseline]) -> dict[Variable, Baseline]:
    """Where every input starts.

    Raises:
        InputError: baselines by name are not one for each input.
    """
    if not isinstance(baseline, Mapping):
        return dict.fromkeys(graph.inputs, baseline)
    named = [(_input(graph, name), start) for name, start in baseline.items()]
    starts = {variable: start for variable, start in named if variable is not None}
    if not len(named) == len(starts) == len(graph.inputs):
        given, names = (
            ", ".join(map(repr, found)) or "none"
            for found in (baseline, [variable.name for variable in graph.inputs])
        )
        raise InputError(
            f"baselines are given for {given}, and the inputs are {names}. Give one for each."
        )
    return starts


def _input(graph: Graph, name: str) -> Variable | None:
    """The input of this name or alias, if there is one."""
    try:
        variable = graph.variable(name)
    except NrmError:
        return None
    return variable if variable in graph.inputs else None
