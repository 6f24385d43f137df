"""A graph with its rules, run forward: what messages need to travel back through it (`Pass`).

Every operation is made ready with its rule as it is computed (`Program`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.fx import Node

from nrm.capture.nodes import ancestors, dependents
from nrm.capture.run import Folding, Interpreter, Plan, Values
from nrm.capture.store import Shared
from nrm.differences import Differencing, Reference, Uniform
from nrm.differences import telescopes as differences_telescope
from nrm.errors import Cautions, QueryError, UnsupportedOperatorError
from nrm.graph import Graph, Operation, Variable
from nrm.integration import Path
from nrm.operators import Call, Propagation, Setting, in_place, picks, reads_layout
from nrm.operators.call import ALIAS
from nrm.operators.secants import change
from nrm.telescope import Differentiating, Fusion, HiddenSumError, Telescope, fusions, telescopes
from nrm.tensors import full_precision
from nrm.zeros import ExplicitZeros


class Pass:
    """One forward pass: what messages need to travel back through it.

    Attributes:
        graph: the graph it ran on.
        program: that of the graph.
        inputs: those of the model.
        output: the explained tensor's values.
        amount: what is shared out: these values, or their difference from those at the reference.
        returned: the model's output, another where a head is looked through (`nrm.heads`).
        batch: the number of samples.
        telescope: the way by derivatives, where the rules allow it.
        cautions: what a person was warned of.
        copies: how many copies of each sample it holds; all samples are copied one after the other.
    """

    copies = 1

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        check: Callable[[], None] = lambda: None,
        reference: Sequence[Tensor] | None = None,
    ) -> None:
        self.graph = program.graph
        self.program, self.inputs, self._check = program, inputs, check
        self._reference = reference
        self.telescope: Telescope | None = None
        self.cautions = Cautions()
        shapes: Mapping[Variable, torch.Size]
        if program.telescopes and reference is not None:
            found, self.output, self.returned = program.difference(inputs, reference)
            self.amount = found.values[self.graph.output].detach()
        elif program.telescopes:
            found, self.returned = program.differentiate(inputs)
            self.output = self.amount = found.values[self.graph.output].detach()
        if program.telescopes:
            shapes = {variable: value.shape for variable, value in found.values.items()}
            self.telescope = found
        else:
            shapes = self._prepared.shapes
            self.output, self.returned = self._prepared.explained, self._prepared.returned
            self.amount = self._prepared.amount
        self._shapes = shapes  # of a part of the variables, where others were not needed
        self.batch = _batch_size(self.graph, shapes)

    @cached_property
    def _prepared(self) -> Prepared:
        return self.program.prepare(self.inputs, self._reference)

    def as_it_was(self) -> Self:
        """This pass, to be asked now.

        Raises:
            QueryError: the model has changed since; or `torch.autocast` is on, under which messages
                would be rounded.
        """
        self._check()
        device = self.output.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            raise QueryError(
                "a measure is not asked within torch.autocast, which would round its messages. Ask "
                "it outside, or within torch.autocast(..., enabled=False)."
            )
        return self

    @property
    def propagations(self) -> Mapping[Operation, Propagation]:
        """Every operation, prepared for this input when it is first asked for."""
        return self._prepared.propagations

    def value(self, variable: Variable) -> Tensor:
        """The value of a variable, computed anew.

        Raises:
            QueryError: it stands for neurons without a value of their own.
        """
        return self.values([variable])[variable]

    def values(self, variables: Collection[Variable]) -> dict[Variable, Tensor]:
        """The values of several variables, computed anew in one run.

        Raises:
            QueryError: as for `value`.
        """
        nodes: dict[Variable, Node] = {}
        for variable in variables:
            if variable.node is None:
                raise QueryError(
                    f"{variable.name!r} is a leaf that enters late; it has no activation."
                )
            nodes[variable] = variable.node
        found = self.program.values(self.inputs, set(nodes.values()))
        return {variable: found[node].contiguous() for variable, node in nodes.items()}

    def value_at(self, node: Node) -> Tensor:
        """The value of a node of the captured graph, also of one that carries no relevance."""
        value: Tensor = self.program.values(self.inputs, [node])[node]
        return value.contiguous()

    def calls(self, operations: Sequence[Operation]) -> list[tuple[Call, list[Tensor]]]:
        """Some operations' calls, with slots for their operands, and the operands' values."""
        wanted = {node for operation in operations for _, node in operation.call.nodes()}
        values = self.program.values(self.inputs, wanted)
        return [
            (op.call.with_values(op.arguments, values.__getitem__), [values[s] for s in op.slots])
            for op in operations
        ]

    def shape(self, variable: Variable) -> torch.Size:
        """The shape of a variable, batch included."""
        known = self._shapes.get(variable)
        return self._prepared.shapes[variable] if known is None else known


class Program:
    """Runs a graph forward and prepares every operation with its rule.

    Constants (folded weights) and what rules make of weights are computed once and kept, and
    shared with other graphs of the model.

    Attributes:
        shared: what the model's captures have in common.
        settings: how each operation propagates, but for what depends on an input.
        telescopes: whether relevance may go by derivatives (`nrm.telescope`).
        zeros: where the explicit zeros are.
        plan: what a forward pass for messages computes.
    """

    def __init__(self, graph: Graph, strict: bool, shared: Shared | None = None) -> None:
        self.graph = graph
        self.shared = shared = Shared() if shared is None else shared
        self.settings = {
            operation: _setting(operation, strict, shared) for operation in graph.operations
        }
        whether = differences_telescope if graph.differences else telescopes
        self.telescopes = not strict and whether(graph)
        self._reads_layout = any(reads_layout(n.target) for n in graph.captured.graph.nodes)
        fuses = self.telescopes and not graph.differences
        self._fused = fusions(graph) if fuses else {}
        self._constants = self._fold(shared)
        self.plan = self._plan({})
        self._fused_plan = self._plan(self._fused)
        self._path = Path.of(graph, {*self._constants, *graph.captured.inputs})
        for operation in graph.operations:
            if operation.rule.reads_ahead:
                self.settings[operation].following = self._following(operation)

    def run(
        self,
        inputs: Sequence[Tensor],
        check: Callable[[], None] = lambda: None,
        reference: Sequence[Tensor] | None = None,
    ) -> Pass:
        """The forward pass.

        Arguments:
            check: raises where the model is no longer what it was; called before the pass is asked.
            reference: other inputs, where walks are those of the differences from them.
        """
        return Pass(self, inputs, check, reference)

    @full_precision()
    def prepare(
        self, inputs: Sequence[Tensor], reference: Sequence[Tensor] | None = None
    ) -> Prepared:
        """Every operation ready for messages, keeping only what propagation needs."""
        along = {} if self._path is None else self._path.operands(self._given(inputs))
        before = None if reference is None else self._at(reference)
        return _Preparing(self, self._given(inputs), along, before).result()

    def _at(self, reference: Sequence[Tensor]) -> Reference:
        return Reference(self.graph, self.graph.captured.constants | self._given(reference))

    @full_precision()
    def difference(
        self, inputs: Sequence[Tensor], reference: Sequence[Tensor]
    ) -> tuple[Telescope, Tensor, Tensor]:
        """The slopes by which relevance goes between two inputs, the explained values and the
        model's output at the first."""
        run = Differencing(
            self.graph, self.settings, self.plan, self._given(inputs), self._at(reference)
        )
        values = run.compute()
        captured = self.graph.captured
        return run.telescope(), values[self.graph.explained], values[captured.output]

    @full_precision()
    def differentiate(self, inputs: Sequence[Tensor]) -> tuple[Telescope, Tensor]:
        """The derivatives by which relevance goes, and the model's output.

        Fused operators are taken apart for an input that needs what is within them.
        """
        given = self._given(inputs)
        if self._fused:
            with suppress(HiddenSumError):
                return self._differentiated(given, self._fused_plan, self._fused)
        return self._differentiated(given, self.plan, {})

    def _differentiated(
        self, given: Values, plan: Plan, fused: Mapping[Node, Fusion]
    ) -> tuple[Telescope, Tensor]:
        run = Differentiating(self.graph, self.settings, plan, given, fused)
        returned: Tensor = run.compute()[self.graph.captured.output]
        return run.telescope(), returned.detach()

    @full_precision()
    def values(
        self, inputs: Sequence[Tensor], wanted: Collection[Node], known: Values | None = None
    ) -> Values:
        """The values of some nodes of the captured graph, computed anew.

        Arguments:
            known: what others hold, instead of what would be computed.
        """
        given = self.graph.captured.constants | self._given(inputs) | (known or {})
        plan = Plan.of(self.graph.captured.graph, wanted, given)
        return Interpreter(plan, given).compute()

    def _given(self, inputs: Sequence[Tensor]) -> Values:
        """The values that a forward pass starts from."""
        laid_out = map(self._laid_out, inputs)
        return self._constants | dict(zip(self.graph.captured.inputs, laid_out, strict=True))

    def _laid_out(self, value: Any) -> Any:
        """Pictures and their weights channels last, which convolutions on a CPU need not reorder.

        Values and shapes are the same, where no operator reads memory as it lies; a pass over
        VGG16 takes a quarter less time.
        """
        if self._reads_layout or not isinstance(value, Tensor):
            return value
        if value.dim() == 4 and value.device.type == "cpu":
            return value.contiguous(memory_format=torch.channels_last)
        return value

    def _fold(self, shared: Shared) -> Values:
        """The values that no input changes, of those that a forward pass reads."""
        graph, captured = self.graph, self.graph.captured
        results = {graph.explained, captured.output}
        varying = dependents(captured.graph.nodes, captured.inputs)
        constant = ancestors(results) - varying
        values = Folding(captured, constant, shared).compute()
        self.zeros = ExplicitZeros(graph, captured.constants | values)
        read = {parent for n in ancestors(results) & varying for parent in _reads(graph, n)}
        read |= results | {parent for fusion in self._fused.values() for parent in fusion.reads}
        # Everything here is shared: whoever writes over values writes over its own alone.
        return {
            node: shared.computed("laid out", value, partial(self._laid_out, value))
            for node, value in values.items()
            if node in read
        }

    def _plan(self, fused: Mapping[Node, Fusion]) -> Plan:
        """What to compute for the explained values and the output, if some operators are fused."""
        graph, captured = self.graph, self.graph.captured

        def reads(node: Node) -> Sequence[Node]:
            return fused[node].reads if node in fused else _reads(graph, node)

        known = {*self._constants, *captured.inputs}
        return Plan.of(captured.graph, {graph.explained, captured.output}, known, reads)

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
            if reader.call.target is not ALIAS:  # a folded batch norm
                found.append(reader.call.with_values(reader.arguments, self._constants.__getitem__))
        return tuple(found)


@dataclass(frozen=True)
class Prepared:
    """What messages need of a forward pass.

    Attributes:
        propagations: of every operation.
        shapes: of every variable.
        explained: the values of the explained tensor.
        amount: these, or their difference from those at the reference.
        returned: the model's output.
    """

    propagations: Mapping[Operation, Propagation]
    shapes: Mapping[Variable, torch.Size]
    explained: Tensor
    amount: Tensor
    returned: Tensor


class _Preparing(Interpreter):
    """A forward pass that gets every operation ready for messages.

    Arguments:
        given: inputs and constants.
        along: the operands' values on a way to the inputs, of operations that read them.
        reference: the values that differences are taken from.
    """

    def __init__(
        self,
        program: Program,
        given: Values,
        along: Mapping[Operation, list[list[Tensor]]],
        reference: Reference | None,
    ) -> None:
        super().__init__(program.plan, given)
        self.program, self.along, self.reference = program, along, reference
        self.uniform = Uniform()
        self.propagations: dict[Operation, Propagation] = {}
        self.shapes = {v: given[v.node].shape for v in program.graph.leaves if v.node in given}
        self.free: set[Node] = set()  # values that nothing keeps: their memory may be used again
        self.real: dict[Node, Tensor] = {}  # of the values with explicit zeros

    def result(self) -> Prepared:
        graph, values = self.program.graph, self.compute()
        explained, returned = (
            values[node].detach() for node in (graph.explained, graph.captured.output)
        )
        amount = explained
        if self.reference is not None:
            amount = change(self.reference.values[graph.explained], explained)
        return Prepared(self.propagations, self.shapes, explained, amount, returned)

    def run_node(self, n: Node) -> Any:
        variable = self.program.graph.by_node.get(n)
        operation = None if variable is None else variable.producer
        value = super().run_node(n) if operation is None else self._prepare(n, operation)
        if variable is not None:
            self.shapes[variable] = value.shape
        self.env[n] = value
        self.program.zeros.of(n, self.env, self.real)
        return value

    def release(self, node: Node) -> None:
        super().release(node)
        self.real.pop(node, None)
        self.uniform.release(node)

    def _prepare(self, node: Node, operation: Operation) -> Tensor:
        call = operation.call.with_values(operation.arguments, self.env.__getitem__)
        source = operation.slots[0]
        alone = source in self.free and len(source.users) == 1
        overwrites = alone and operation.operator.overwritable
        if overwrites:
            call = replace(call, target=in_place(call.target))
        operands = [self.env[slot] for slot in operation.slots]
        setting = self._setting(operation)
        if operation.weights is not None:
            setting = self.uniform.setting(operation, setting, call, operands)
        output, propagation = operation.operator.prepare(call, operands, setting)
        seen = [self.env.get(parent) for parent in node.all_input_nodes]
        if overwrites or (propagation.output_is_free and _is_new(output, seen)):
            self.free.add(node)
        self.propagations[operation] = propagation
        if operation.late is not None:
            self.shapes[operation.late] = propagation.late_shape()
        return output

    def _setting(self, operation: Operation) -> Setting:
        """How an operation propagates, with what depends on this input."""
        setting = self.program.settings[operation]
        if operation in self.along:
            setting = replace(setting, path=self.along[operation])
        if self.reference is not None:
            setting = self.reference.setting(operation, setting, self.env)
        if not self.real.keys().isdisjoint(operation.slots):
            setting = replace(setting, real=[self.real.get(slot) for slot in operation.slots])
        addend = self.program.zeros.addend(operation, self.env, self.real)
        return replace(setting, addend=addend) if addend else setting


def _setting(operation: Operation, strict: bool, shared: Shared) -> Setting:
    return Setting(
        address=operation.address,
        rule=operation.rule,
        strict=strict,
        output_dim=len(operation.output.shape),
        alphas=operation.alphas,
        late_leaf=operation.late_leaf,
        share=shared.weight,
    )


def _reads(graph: Graph, node: Node) -> Sequence[Node]:
    """The values that a node is computed from: an operation that picks runs its producer again."""
    variable = graph.by_node.get(node)
    if variable is None or variable.producer is None:
        return node.all_input_nodes
    while picks(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.all_input_nodes


def _is_new(output: Tensor, seen: Sequence[Any]) -> bool:
    """Whether what an operator computed shares no memory with what it read."""
    memory = output.untyped_storage().data_ptr()
    return not any(
        isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory for value in seen
    )


def _batch_size(graph: Graph, shapes: Mapping[Variable, torch.Size]) -> int:
    for variable in (graph.output, *graph.inputs):
        if variable.batch_axis is not None:
            return variable.batch_size(shapes[variable])
    return 1
