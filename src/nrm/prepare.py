"""A graph with its rules, ready to run: the forward pass that messages will travel back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.capture.export import run
from nrm.capture.store import Shared
from nrm.errors import Cautions, InputError, NrmError, QueryError, UnsupportedOperatorError
from nrm.graph import Graph, Operation, Variable
from nrm.operators import (
    Call,
    Identity,
    LocalLinear,
    Propagation,
    Setting,
    Slot,
    WeightedSum,
    fill,
    in_place,
    picks,
)
from nrm.rules import PathIntegrated
from nrm.rules.contributions import Baseline
from nrm.telescope import Fusion, Telescope, fusions, needed, telescopes
from nrm.tensors import same_memory, without_vanished
from nrm.zeros import ExplicitZeros


class Pass:
    """One forward pass: what messages need to travel back through it.

    Attributes:
        graph: the graph it ran on.
        output: the explained tensor's values.
        returned: the model's output, another where a head is looked through (`nrm.heads`).
        batch: the number of samples.
        telescope: the way by derivatives, where the rules allow it.
        cautions: what a person was warned of.
    """

    def __init__(self, program: Program, inputs: Sequence[Tensor]) -> None:
        self.graph = program.graph
        self._program, self._inputs = program, inputs
        self.telescope: Telescope | None = None
        self.cautions = Cautions()
        shapes: dict[Variable, torch.Size] = {}
        if program.telescopes:
            found, self.returned = program.differentiate(inputs)
            shapes = {variable: value.shape for variable, value in found.values.items()}
            self.telescope = found
            self.output = found.values[self.graph.output].detach()
        else:
            shapes, self.output, self.returned = self._prepared[1:]
        self._shapes = shapes  # of a part of the variables, where others were not needed
        self.batch = _batch_size(self.graph, shapes)

    @cached_property
    def _prepared(
        self,
    ) -> tuple[dict[Operation, Propagation], dict[Variable, torch.Size], Tensor, Tensor]:
        return self._program.prepare(self._inputs)

    @property
    def propagations(self) -> dict[Operation, Propagation]:
        """Every operation, prepared for this input when it is first asked for."""
        return self._prepared[0]

    def value(self, variable: Variable) -> Tensor:
        """The value of a variable, computed anew.

        Raises:
            QueryError: it stands for neurons without a value of their own.
        """
        if variable.node is None:
            raise QueryError(f"{variable.name!r} is a leaf that enters late; it has no activation.")
        return self.value_at(variable.node)

    def value_at(self, node: Node) -> Tensor:
        """The value of a node of the captured graph, also of one that carries no relevance."""
        value: Tensor = run(self.graph.captured, self._inputs, node)
        return value

    def calls(self, operations: Sequence[Operation]) -> list[tuple[Call, list[Tensor]]]:
        """Some operations' calls, with slots for their operands, and the operands' values."""
        wanted = {node for operation in operations for _, node in operation.call.nodes()}
        values: dict[Node, Any] = {}

        def keep(node: Node, value: Any) -> Any:
            if node in wanted:
                values[node] = value
            return value

        run(self.graph.captured, self._inputs, change=keep)
        return [
            (_with_values(operation, values), [values[slot] for slot in operation.slots])
            for operation in operations
        ]

    def shape(self, variable: Variable) -> torch.Size:
        """The shape of a variable, batch included."""
        known = self._shapes.get(variable)
        return self._prepared[1][variable] if known is None else known


class Program:
    """Runs a graph forward and prepares every operation with its rule.

    Constants (folded weights) and what rules make of weights are computed once and kept, and
    shared with other graphs of the model.
    """

    def __init__(self, graph: Graph, strict: bool, shared: Shared | None = None) -> None:
        self.graph = graph
        self._shared = shared = Shared() if shared is None else shared
        self.settings = {operation: _setting(operation, strict) for operation in graph.operations}
        self.telescopes = not strict and telescopes(graph)
        self._reads_memory = any("as_strided" in str(n.target) for n in graph.captured.graph.nodes)
        self._fused = fusions(graph) if self.telescopes else {}
        self._constants, self._nodes = self._split_constants()
        self._nodes_fused = needed(graph, self._nodes, self._fused, _reads)
        self._last_use = self._plan_release()
        self._path = _path(graph)
        self._starts = {} if self._path is None else _starts(graph, self._path)
        for operation in graph.operations:
            self.settings[operation].share = shared.weight
            if operation.rule.reads_ahead:
                self.settings[operation].following = self._following(operation)

    def run(self, inputs: Sequence[Tensor]) -> Pass:
        """The forward pass."""
        return Pass(self, inputs)

    def prepare(
        self, inputs: Sequence[Tensor]
    ) -> tuple[dict[Operation, Propagation], dict[Variable, torch.Size], Tensor, Tensor]:
        """Every operation ready for messages, keeping only what propagation needs.

        Returns:
            the operations, the shapes of variables, the explained values, and the model's output.
        """
        graph = self.graph
        on_the_way = {} if self._path is None else self._along(self._path, inputs)
        values = self._given(inputs)
        propagations: dict[Operation, Propagation] = {}
        free: set[Node] = set()  # values that nothing keeps: their memory may be used again
        shapes = {v: values[v.node].shape for v in graph.leaves if v.node in values}
        real: dict[Node, Tensor] = {}  # of the values with explicit zeros
        for node in self._nodes:
            variable = graph.by_node.get(node)
            operation = variable.producer if variable else None
            if operation is None:
                values[node] = _evaluate(node, values)
            else:
                call = _with_values(operation, values)
                source = operation.slots[0]
                alone = source in free and len(source.users) == 1
                overwrites = alone and type(operation.operator) is Identity  # reads nothing after
                if overwrites:
                    call = replace(call, target=in_place(call.target))
                setting = self.settings[operation]
                if operation in on_the_way:
                    setting = replace(setting, path=on_the_way[operation])
                if not real.keys().isdisjoint(operation.slots):
                    setting = replace(setting, real=[real.get(slot) for slot in operation.slots])
                addend = self._zeros.addend(operation, values, real)
                if addend:
                    setting = replace(setting, addend=addend)
                values[node], propagation = operation.operator.prepare(
                    call, [values[slot] for slot in operation.slots], setting
                )
                propagations[operation] = propagation
                seen = [values.get(parent) for parent in node.all_input_nodes]
                if overwrites or (propagation.output_is_free and _is_new(values[node], seen)):
                    free.add(node)
                if operation.late is not None:
                    shapes[operation.late] = propagation.late_shape()
            if variable is not None:
                shapes[variable] = values[node].shape
            self._zeros.of(node, values, real)
            for dead in self._last_use[node]:
                values.pop(dead, None)
                real.pop(dead, None)
        explained, returned = values[graph.explained], values[graph.captured.output]
        return propagations, shapes, explained.detach(), returned.detach()

    def differentiate(self, inputs: Sequence[Tensor]) -> tuple[Telescope, Tensor]:
        """Variables' values, connected by autograd, with what takes no relevance constant.

        Those within fused operators and late leaves have none.

        Returns:
            the derivatives, and the model's output.
        """
        return self._differentiated(inputs, self._fused)

    def _differentiated(
        self, inputs: Sequence[Tensor], fused: dict[Node, Fusion]
    ) -> tuple[Telescope, Tensor]:
        graph = self.graph
        values = self._given(inputs)
        found: dict[Variable, Tensor] = {}
        small: dict[Variable, Tensor] = {}
        for leaf in graph.leaves:
            if leaf.node in values:
                found[leaf] = values[leaf.node] = values[leaf.node].detach().requires_grad_()

        def summed(variable: Variable, output: Tensor) -> Tensor:
            output, counts_as_zero = without_vanished(output)
            if counts_as_zero is not None:
                small[variable] = counts_as_zero
            return output

        for node in self._nodes_fused if fused else self._nodes:
            variable = graph.by_node.get(node)
            if variable is not None and node in fused:
                with torch.enable_grad():
                    output = fused[node](values)
                    if fused[node].hides_vanished(values, output.detach()):
                        return self._differentiated(inputs, {})
                    found[variable] = values[node] = summed(variable, output)
                continue
            if variable is None or variable.producer is None:
                values[node] = _evaluate(node, values)
                if variable is not None:
                    found[variable] = values[node].requires_grad_()
                continue
            operation = variable.producer
            call = _with_values(operation, values, constant=True)
            operands = [values[slot] for slot in operation.slots]
            with torch.enable_grad():
                output = operation.operator.frozen(call, operands, self.settings[operation])
                if any(output is operand for operand in operands):  # as dropout returns it
                    output = output.view_as(output)  # whose derivative is its own
                if isinstance(operation.operator, WeightedSum):
                    output = summed(variable, output)
            found[variable] = values[node] = output
        if small:  # asked of the device once
            known = torch.stack([somewhere.any() for somewhere in small.values()]).tolist()
            small = {v: small[v] for v, any_there in zip(small, known, strict=True) if any_there}
        returned: Tensor = values[graph.captured.output]
        return Telescope(graph, found, small), returned.detach()

    def _along(
        self, path: PathIntegrated, inputs: Sequence[Tensor]
    ) -> dict[Operation, list[list[Tensor]]]:
        """The values of operands on the way to the inputs, for the operations that read them.

        Linear ones need only those at the baseline.
        """
        graph = self.graph
        moved: dict[Node, Callable[[Tensor, int], Tensor]] = {
            variable.node: partial(path.point, name=variable.name, start=start)
            for variable, start in self._starts.items()
            if variable.node is not None
        }
        found: dict[Operation, list[list[Tensor]]] = {}
        for step in range(path.steps):
            values = self._given(inputs)
            for leaf, move in moved.items():
                if leaf in values:
                    values[leaf] = move(values[leaf], step)
            for node in self._nodes:
                computed = graph.by_node.get(node)
                operation = computed.producer if computed else None
                if operation is None:
                    values[node] = _evaluate(node, values)
                    if node in moved:  # an embedding
                        values[node] = moved[node](values[node], step)
                else:
                    operands = [values[slot] for slot in operation.slots]
                    if _reads_path(operation, step):
                        found.setdefault(operation, []).append(operands)
                    with torch.no_grad():
                        values[node] = fill(_with_values(operation, values), operands)()
                for dead in self._last_use[node]:
                    values.pop(dead, None)
        return found

    def _following(self, operation: Operation) -> tuple[Call, ...]:
        """The activation after an operation, if its rule and row ask for it."""
        if not operation.operator.reads_ahead(operation.named_slots):
            return ()
        found = []
        for reader in self.graph.activation_after(operation):
            others = [node for _, node in reader.call.nodes() if node not in reader.slots]
            if any(node not in self._constants for node in others):
                raise UnsupportedOperatorError(
                    f"{operation.rule} needs the activation {reader.address!r} after "
                    f"{operation.address!r} as a function, and its parameters are computed from "
                    "the input. Choose another rule for the operation before it."
                )
            if reader.call.target is not torch.ops.aten.alias.default:  # a folded batch norm
                found.append(_with_values(reader, self._constants))
        return tuple(found)

    def _given(self, inputs: Sequence[Tensor]) -> dict[Node, Any]:
        values: dict[Node, Any] = dict(self._constants)
        values.update(zip(self.graph.captured.inputs, map(self._laid_out, inputs), strict=True))
        return values

    def _laid_out(self, value: Any) -> Any:
        """Pictures and their weights channels last, which convolutions on a CPU need not reorder.

        Values and shapes are the same, where no operator reads memory as it lies; a pass over
        VGG16 takes a quarter less time.
        """
        if self._reads_memory or not isinstance(value, Tensor):
            return value
        if value.dim() == 4 and value.device.type == "cpu":
            return value.contiguous(memory_format=torch.channels_last)
        return value

    def _split_constants(self) -> tuple[dict[Node, Any], list[Node]]:
        """The values that no input changes, and the nodes to run for every input."""
        graph, captured = self.graph, self.graph.captured
        results = {graph.explained, captured.output}
        needed = set(results)
        for node in reversed(captured.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        values: dict[Node, Any] = {
            node: self._shared.constant(value) for node, value in captured.constants.items()
        }
        varying = set(captured.inputs)
        to_run = []
        for node in captured.graph.nodes:
            if node not in needed or node.op != "call_function":
                continue
            if not any(parent in varying for parent in node.all_input_nodes):
                arguments = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = self._shared.computed(
                    node.target, arguments, partial(_evaluate, node, values)
                )
                continue
            varying.add(node)
            carried = [user in graph.by_node for user in node.users]
            if node in graph.by_node or not carried or not all(carried) or not _is_tuple(node):
                to_run.append(node)  # a tuple that only operations pick from is never needed
        self._zeros = ExplicitZeros(graph, values)
        read = {parent for node in to_run for parent in _reads(node)} | results
        read.update(parent for fusion in self._fused.values() for parent in fusion.reads)
        # Everything here is shared: whoever writes over values writes over its own alone.
        kept = {
            node: self._shared.computed("laid out", value, partial(self._laid_out, value))
            for node, value in values.items()
            if node in read
        }
        return kept, to_run

    def _plan_release(self) -> dict[Node, list[Node]]:
        """After which node each value is needed no more."""
        last: dict[Node, Node] = {}
        for node in self._nodes:
            for parent in _reads(node):
                last[parent] = node
        release: dict[Node, list[Node]] = {node: [] for node in self._nodes}
        for value, node in last.items():
            if value not in (self.graph.explained, self.graph.captured.output):
                release[node].append(value)
        return release


def _setting(operation: Operation, strict: bool) -> Setting:
    return Setting(
        address=operation.address,
        rule=operation.rule,
        strict=strict,
        output_dim=len(operation.output.shape),
        alphas=operation.alphas,
        late_leaf=operation.late_leaf,
    )


def _path(graph: Graph) -> PathIntegrated | None:
    """The one path that inputs take, if any rule integrates along it."""
    paths = {op.rule for op in graph.operations if isinstance(op.rule, PathIntegrated)}
    if len(paths) > 1:
        raise QueryError(
            f"the composite has {len(paths)} different paths. A network runs along one: give every "
            "choice the same PathIntegrated rule."
        )
    return next(iter(paths), None)


def _starts(graph: Graph, path: PathIntegrated) -> dict[Variable, Baseline]:
    """Where every input starts.

    Raises:
        InputError: baselines by name are not one for each input.
    """
    if not isinstance(path.baseline, Mapping):
        return dict.fromkeys(graph.inputs, path.baseline)
    named = [(_input(graph, name), start) for name, start in path.baseline.items()]
    starts = {variable: start for variable, start in named if variable is not None}
    if not len(named) == len(starts) == len(graph.inputs):
        given, names = (
            ", ".join(map(repr, found)) or "none"
            for found in (path.baseline, [variable.name for variable in graph.inputs])
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


def _reads_path(operation: Operation, step: int) -> bool:
    if not isinstance(operation.rule, PathIntegrated):
        return False
    row = operation.operator
    return isinstance(row, LocalLinear) or (isinstance(row, WeightedSum) and step == 0)


def _with_values(operation: Operation, values: dict[Node, Any], constant: bool = False) -> Call:
    """The call with slots for its operands, and values for all else (`constant`: detached)."""
    slots = {place: Slot(index) for index, place in enumerate(operation.arguments)}

    def substitute(name: str, place: int, leaf: Any) -> Any:
        if not isinstance(leaf, Node):
            return leaf
        slot = slots.get((name, place))
        if slot is not None:
            return slot
        value = values[leaf]
        return value.detach() if constant and isinstance(value, Tensor) else value

    return operation.call.map_places(substitute)


def _evaluate(node: Node, values: dict[Node, Any]) -> Any:
    assert callable(node.target)
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda leaf: values[leaf])
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _reads(node: Node) -> Sequence[Node]:
    """The values a node needs; a picked result runs its producer again."""
    if picks(node) and isinstance(node.args[0], Node):
        return [*_reads(node.args[0]), node.args[0]]
    return node.all_input_nodes


def _is_new(output: Tensor, seen: Sequence[Any]) -> bool:
    """Whether what an operator computed shares no memory with what it read."""
    return not any(isinstance(value, Tensor) and same_memory(output, value) for value in seen)


def _is_tuple(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))


def _batch_size(graph: Graph, shapes: dict[Variable, torch.Size]) -> int:
    for variable in (graph.output, *graph.inputs):
        if variable.batch_axis is not None:
            return shapes[variable][variable.batch_axis]
    return 1
