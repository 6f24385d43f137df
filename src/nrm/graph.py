"""The computation graph that the measure lives on (section 3.2, appendix A).

Its variables are tensors, whose elements are the neurons. Its operations say which neurons are the
parents of which. A walk is a path from an output neuron to a neuron of a leaf; cuts are the
variables that every walk crosses exactly once.

Models put the batch where they like. Whatever asks for samples, channels or single neurons does so
in one *canonical view* of a variable's tensors, `[K, batch, *neurons]` (`Variable.canonical`): K
messages at once, then the samples, then the axes of the neurons in their order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from nrm.capture.nodes import Captured, is_float_tensor
from nrm.errors import NeuronSetError, QueryError, UnknownLayerError
from nrm.heads import Head
from nrm.operators import Call, Operator, lookup
from nrm.rules import Alpha, Rule

Kind = Literal["input", "embedding", "operation", "bias", "constant"]

S = TypeVar("S")
T = TypeVar("T")


@dataclass(eq=False)
class Variable:
    """A tensor that carries relevance; its elements are the neurons.

    Attributes:
        index: position in the graph; parents come before their children.
        name: the address to show; `aliases` are further names of the same tensor.
        kind: `"operation"` for a computed one. The others are leaves, where walks end: inputs,
            embeddings of integer inputs, biases (with `bias="input"`), and constants that are
            some neuron's only parent.
        shape: `None` at the batch axis.
        batch_axis: the axis that holds the batch; `None` where the samples cannot be told apart.
        shared: how many of a sample's neurons lie in that axis too, that count slower and faster
            than the samples: `[batch * time]` has `(1, time)`. In the canonical view these have
            axes of their own.
        channel_axis: counted from the end.
    """

    index: int
    name: str
    kind: Kind
    shape: tuple[int | None, ...]
    batch_axis: int | None
    channel_axis: int | None = None
    aliases: tuple[str, ...] = ()
    producer: Operation | None = None
    node: Node | None = None
    shared: tuple[int, int] = (1, 1)

    @property
    def is_leaf(self) -> bool:
        return self.producer is None

    def __repr__(self) -> str:
        return f"Variable({self.name!r}, {self.kind}, {list(self.shape)})"

    # -- where the samples and the neurons are ---------------------------------------------------

    def canonical(self, message: Tensor) -> Tensor:
        """`[K, *shape]` as `[K, batch, *neurons]`: a view, so that writing to it writes to both.

        Where no axis is that of the batch, all is one sample: `[K, 1, *neurons]`.
        """
        if self.batch_axis is None:
            return message.unsqueeze(1)
        at = self.batch_axis + 1
        before, after = self.shared
        if self.shared != (1, 1):
            whole = [size for size in (before, -1, after) if size != 1]
            message = message.view(*message.shape[:at], *whole, *message.shape[at + 1 :])
        return message.movedim(at + (before != 1), 1)

    def restored(self, view: Tensor, batch: int) -> Tensor:
        """`[K, batch, *neurons]` as `[K, *shape]`: the way back.

        Of a batch of size one, or neurons' axes of size one, what is the same along these: it
        broadcasts to messages.

        Arguments:
            batch: how many samples there are.
        """
        if self.batch_axis is None:
            return view.squeeze(1)
        at = self.batch_axis + 1
        if self.shared == (1, 1):
            return view.movedim(1, at)
        before, after = ([size] if size != 1 else [] for size in self.shared)
        view = view.movedim(1, at + len(before))
        whole = [*before, batch, *after]
        sizes = [*view.shape[:at], *whole, *view.shape[at + len(whole) :]]
        return view.expand(sizes).flatten(at, at + len(whole) - 1)

    def _without_batch(self, shape: Sequence[T]) -> Iterator[T | int]:
        """The sizes of a shape, of the neurons alone."""
        for axis, size in enumerate(shape):
            if axis != self.batch_axis:
                yield size
            else:
                yield from (shared for shared in self.shared if shared != 1)

    def neuron_shape(self, shape: torch.Size) -> torch.Size:
        """A shape of the variable without its batch axis: that of the neurons of one sample."""
        return torch.Size(self._without_batch(shape))

    @property
    def neuron_sizes(self) -> tuple[int | None, ...]:
        """The sizes of the neurons' axes; `None` where they differ from input to input."""
        return tuple(self._without_batch(self.shape))

    def batch_size(self, shape: torch.Size) -> int:
        """How many samples a tensor of this shape holds: one, where they cannot be told apart."""
        if self.batch_axis is None:
            return 1
        return shape[self.batch_axis] // math.prod(self.shared)

    def channel_axis_of(self, neuron_shape: Sequence[int | None]) -> int:
        """Which of the neurons' axes is that of the channels; the first, where none is known.

        Raises:
            NeuronSetError: the neurons have no axes.
        """
        if not neuron_shape:
            raise NeuronSetError(f"{self.name!r} has one neuron per sample and no channels.")
        return 0 if self.channel_axis is None else len(neuron_shape) + self.channel_axis

    def axis_of(self, neuron_shape: Sequence[int | None], axis: int | None) -> int:
        """One of the neurons' axes, counted from the front; `None`: that of the channels.

        Raises:
            QueryError: there is none of this number.
        """
        if axis is None:
            return self.channel_axis_of(neuron_shape)
        if not -len(neuron_shape) <= axis < len(neuron_shape):
            raise QueryError(
                f"{self.name!r} has no axis {axis}: its neurons are {tuple(neuron_shape)}."
            )
        return axis % len(neuron_shape)

    def tells_samples(self, batch: int) -> bool:
        """Whether each of its neurons is one of the batch's samples' alone."""
        return batch == 1 or self.batch_axis is not None

    def require_samples_apart(self, batch: int) -> None:
        """Refuse a variable that mixes the samples of a batch in one axis.

        Raises:
            QueryError: it does.
        """
        if not self.tells_samples(batch):
            raise QueryError(
                f"{self.name!r} mixes the samples of the batch in an order that is not known (as "
                "experts sort their words), so its neurons cannot be told apart by sample. Choose "
                "another layer, or explain one sample at a time."
            )

    def per_sample(self, message: Tensor, batch: int, only: int | None = None) -> Tensor:
        """`[K, *shape]` summed over the neurons of each sample: `[K, batch]`.

        Arguments:
            only: the sample that all of the message belongs to, if that is known.

        Raises:
            QueryError: the variable mixes samples, and there are several.
        """
        if only is not None and self.batch_axis is None:
            total = message.flatten(1).sum(1, keepdim=True)
            return torch.nn.functional.pad(total, (only, batch - 1 - only))
        self.require_samples_apart(batch)
        view = self.canonical(message)
        return view.reshape(*view.shape[:2], -1).sum(-1)

    def only_sample(self, message: Tensor, sample: int) -> Tensor:
        """The message of one sample; that of the others becomes zero."""
        kept = torch.zeros_like(message)
        self.canonical(kept)[:, sample] = self.canonical(message)[:, sample]
        return kept

    def by_sample(self, values: Tensor) -> Tensor:
        """`[batch]` shaped so that it broadcasts against the variable's tensor.

        Raises:
            QueryError: the variable mixes samples, and there are several.
        """
        self.require_samples_apart(len(values))
        view = values.view(1, -1, *[1] * len(self.neuron_sizes))
        return self.restored(view, len(values))[0]


@dataclass(eq=False)
class Operation:
    """One operator call that relevance passes.

    Attributes:
        kind: what it is, to show and to choose rules by.
        operands: where relevance goes; the late leaf last, if there is one.
        slots: the operands among the call's arguments, in order (without the late leaf).
        arguments: the name of each slot's argument, and the place in it, for those that are lists.
        gates: how much each factor of a product is a gate.
        alphas: what each factor of a product takes.
        rule: how a weighted sum is shared out.
        weights: what it does with weights that are compared with uniform ones (`FromUniform`).
    """

    address: str
    operator: Operator
    call: Call
    module_type: str
    kind: str
    slots: tuple[Node, ...]
    arguments: tuple[tuple[str, int], ...]
    operands: tuple[Variable, ...] = ()
    gates: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    rule: Rule = field(init=False)
    late_leaf: str | None = None
    weights: Literal["made", "moved", "used"] | None = None
    output: Variable = field(init=False)

    @property
    def named_slots(self) -> list[tuple[str, Node]]:
        """The slots with the names of their arguments."""
        return [(name, s) for (name, _), s in zip(self.arguments, self.slots, strict=True)]

    @property
    def late(self) -> Variable | None:
        """The leaf that enters here: a bias, or what neurons without parents are."""
        return self.operands[-1] if self.late_leaf is not None else None

    def __repr__(self) -> str:
        return f"Operation({self.address!r}, {self.kind})"


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
        differences: walks are those of the differences from a reference.
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
        self.differences = False
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

    def __getstate__(self) -> NoReturn:
        """Refuse to be pickled or copied: what was captured holds functions of this process.

        Raises:
            QueryError: with what to save instead.
        """
        raise QueryError(
            "a graph cannot be pickled or copied. Pickle its measure, whose graph is made anew "
            "where it is loaded."
        )

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

    def input_at(self, at: str | None) -> str:
        """The name given, or that of the only input.

        Raises:
            QueryError: none is given, and there are several.
        """
        if at is None and len(self.inputs) > 1:
            names = ", ".join(repr(v.name) for v in self.inputs)
            raise QueryError(f"the model has several inputs; name one with at=: {names}.")
        return self.inputs[0].name if at is None else at

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

    def in_order(self, sets: Mapping[S, Collection[Variable]]) -> list[S] | None:
        """The sets in an order in which every walk that meets all of them does so, if there is one.

        Arguments:
            sets: where each lies.
        """
        remaining, order = list(sets), []
        while remaining:
            for one in remaining:
                others = [other for other in remaining if other is not one]
                places = [place for other in others for place in sets[other]]
                if not any(v in self.upstream(place) for v in sets[one] for place in places):
                    order.append(one)
                    remaining = others
                    break
            else:
                return None
        return order

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
            if not row.one_parent or not row.elementwise:
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
    return _looked_up(graph, graph.captured.inputs, "the model embeds no integer input")


def tokens_of(graph: Graph, name: str) -> str:
    """The embeddings that one integer input is looked up in.

    Raises:
        QueryError: there are none.
    """
    captured = graph.captured
    given = [node for node, one in zip(captured.inputs, captured.names, strict=True) if one == name]
    return _looked_up(graph, given, f"the model embeds no input {name!r}")


def _looked_up(graph: Graph, inputs: Sequence[Node], otherwise: str) -> str:
    """The embeddings that the first of some inputs is looked up in, which is looked up."""
    embeddings = {v.node: v.name for v in graph.variables if v.kind == "embedding"}
    for given in inputs:
        reached = {given}
        for node in graph.captured.graph.nodes:
            if node in embeddings and reached.intersection(node.all_input_nodes):
                return embeddings[node]
            if reached.intersection(node.all_input_nodes) and _same_tokens(node):
                reached.add(node)
    raise QueryError(f"{otherwise}; name a layer with at=.")


def _same_tokens(node: Node) -> bool:
    """Whether an integer tensor still holds the tokens it was computed from."""
    if node.op != "call_function" or is_float_tensor(node):
        return False
    row = lookup(node.target)  # type: ignore[arg-type]
    return row is not None and (row.moves or row.one_parent)
