"""The computation graph that the measure lives on: variables, operations, cuts (appendix A)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Protocol

from torch.fx import Node

from nrm.errors import QueryError, UnknownLayerError
from nrm.graph.capture import Captured
from nrm.graph.heads import Head
from nrm.graph.variables import Kind, Operation, Variable, is_float_tensor
from nrm.operators import Identity, Routing, lookup
from nrm.rules import Alpha, Rule

_ELEMENTWISE = ("activation", "scaling")
"""The kinds of rows for functions of one neuron each."""


class WalkSpecification(Protocol):
    """What decides how walks go (section 3.3): a composite."""

    def rule(self, operation: Operation, graph: Graph) -> Rule:
        """How a weighted sum is shared out."""

    def alpha(self, operation: Operation, graph: Graph) -> Alpha:
        """How the factors of a product share."""


class Graph:
    """The variables and operations between the leaves and the explained output.

    A walk is a path from an output neuron to a neuron of a leaf.

    Made by `nrm.build.build_graph`.

    Arguments:
        captured: the model.
        specification: which rules and alphas apply where.
        bias_is_input: biases are leaves.
        head: the last softmax or sigmoid, where it is looked through.
        variables: parents before their children.
        by_node: the variable of each node of the captured graph that has one.

    Attributes:
        explained: the node that walks begin at: the model's output, or the logits behind it.
        silent: names of what no walk visits, since it enters products whose other factor takes all.
    """

    def __init__(
        self,
        captured: Captured,
        specification: WalkSpecification,
        bias_is_input: bool,
        head: Head | None,
        variables: Sequence[Variable],
        by_node: Mapping[Node, Variable],
    ) -> None:
        self.captured = captured
        self.specification = specification
        self.bias_is_input = bias_is_input
        self.head = head
        self.explained = captured.output if head is None else head.explained
        self.by_node: dict[Node, Variable] = dict(by_node)
        self.output = self.by_node[self.explained]
        self.silent: set[str] = set()
        self.set_variables(variables)

    def set_variables(self, variables: Sequence[Variable]) -> None:
        """Number the variables, parents first, and forget what followed from others.

        To be called again when operations have got other operands.
        """
        self.variables = list(variables)
        for index, variable in enumerate(self.variables):
            variable.index = index
        # Who is upstream of whom, remembered as long as operations keep their operands.
        self._upstream: dict[Variable, frozenset[Variable]] = {}
        self._leading: dict[frozenset[Variable], frozenset[Variable]] = {}
        vars(self).pop("_readers", None)
        self._names = {
            name: variable
            for variable in reversed(self.variables)
            for name in (variable.name, *variable.aliases)
        }

    # -- looking at it ---------------------------------------------------------------------------

    @property
    def inputs(self) -> list[Variable]:
        """The model's real-valued inputs, and the embeddings of its integer inputs."""
        return [v for v in self.variables if v.kind in ("input", "embedding")]

    @property
    def leaves(self) -> list[Variable]:
        return [v for v in self.variables if v.is_leaf]

    @property
    def operations(self) -> list[Operation]:
        return [v.producer for v in self.variables if v.producer is not None]

    def variable(self, name: str) -> Variable:
        """The variable of this name or alias.

        Raises:
            UnknownLayerError: with the nearest names.
        """
        try:
            return self._names[name]
        except (KeyError, TypeError):
            if name in self.silent:
                raise QueryError(
                    f"no walk visits {name!r}: wherever it enters a product, the composite gives "
                    "the other factor all (a gate takes none), so its relevance is zero. "
                    "composites.AttnLRP shares products evenly."
                ) from None
            raise UnknownLayerError(str(name), self._names) from None

    @cached_property
    def cuts(self) -> list[Variable]:
        """The variables that every walk crosses exactly once, from the output down."""
        return self.crossings()

    def crossings(self, leaving_out: Collection[Kind] = ()) -> list[Variable]:
        """The variables that every walk crosses exactly once, from the output down.

        Arguments:
            leaving_out: kinds of leaves; walks that end there do not count.
        """
        found: list[Variable] = []
        pending = {self.output}
        ended = False
        for variable in reversed(self.variables):
            if variable not in pending:
                continue
            if len(pending) == 1 and not ended:
                found.append(variable)
            pending.discard(variable)
            if variable.producer is None:
                ended = True
            else:
                operands = variable.producer.operands
                pending.update(v for v in operands if v.kind not in leaving_out)
        return found

    def upstream(self, variable: Variable) -> frozenset[Variable]:
        """The variables that a walk can reach from `variable`, itself not included."""
        if variable not in self._upstream:
            found: set[Variable] = set()
            waiting = [variable]
            while waiting:
                producer = waiting.pop().producer
                for operand in producer.operands if producer else ():
                    if operand not in found:
                        found.add(operand)
                        waiting.append(operand)
            self._upstream[variable] = frozenset(found)
        return self._upstream[variable]

    def leading_to(self, targets: Collection[Variable]) -> frozenset[Variable]:
        """The variables from which a walk can reach one of `targets`, themselves included."""
        chosen = frozenset(targets)
        if chosen not in self._leading:
            leading = set(chosen)
            for variable in self.variables:  # parents first
                if variable.producer and not leading.isdisjoint(variable.producer.operands):
                    leading.add(variable)
            self._leading[chosen] = frozenset(leading)
        return self._leading[chosen]

    def activation_after(self, operation: Operation) -> tuple[Operation, ...]:
        """The activation that alone reads what an operation computes, and copies on the way."""
        found: list[Operation] = []
        while True:
            output = found[-1].output if found else operation.output
            readers = self._readers.get(output, [])
            if len(readers) != 1 or output is self.output:
                return ()
            (reader,) = readers
            row = reader.operator
            if not isinstance(row, Identity) or not row.elementwise:
                return ()
            if reader.output.shape != output.shape or reader.kind not in _ELEMENTWISE:
                return ()
            found.append(reader)
            if reader.kind == "activation":
                return tuple(found)

    def carries(self, node: Node) -> bool:
        """Whether a node of the captured graph depends on an input that takes relevance."""
        variable = self.by_node.get(node)
        return variable is not None and variable.kind != "constant"

    @cached_property
    def _readers(self) -> dict[Variable, list[Operation]]:
        readers: dict[Variable, list[Operation]] = {}
        for operation in self.operations:
            for operand in dict.fromkeys(operation.operands):
                readers.setdefault(operand, []).append(operation)
        return readers

def first_tokens(graph: Graph) -> str:
    """The embeddings that the first integer input is looked up in.

    Raises:
        QueryError: there are none.
    """
    embeddings = {v.node: v.name for v in graph.variables if v.kind == "embedding"}
    for given in graph.captured.inputs:
        reached = {given}
        for node in graph.captured.graph.nodes:
            if node in embeddings and reached.intersection(node.all_input_nodes):
                return embeddings[node]
            integer = node.op == "call_function" and not is_float_tensor(node)
            if integer and reached.intersection(node.all_input_nodes) and _same_tokens(node):
                reached.add(node)
    raise QueryError("the model embeds no integer input; name a layer with at=.")


def _same_tokens(node: Node) -> bool:
    """Whether an integer tensor still holds the tokens it was computed from."""
    return isinstance(lookup(node.target), Routing | Identity)  # type: ignore[arg-type]
