"""One operator call with its arguments bound to their names."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from nrm.errors import PositiveSumError, QueryError, UnsupportedOperatorError
from nrm.operators.functions import UNKNOWN, Function, Order
from nrm.rules import Rule, Weight
from nrm.tensors import dense


@dataclass(frozen=True)
class Call:
    """An operator and its arguments by schema name.

    The arguments are graph nodes while the graph is built and tensors while it runs; a row of the
    operator table reads the same names in both.
    """

    target: Any
    arguments: dict[str, Any]
    item: int | None = None
    """Which of several results is meant, for operators that return a tuple."""

    @classmethod
    def of(cls, node: Node) -> Call:
        """Bind the arguments of a graph node, defaults included.

        A `getitem` node is a call of the operator whose results it picks from.
        """
        if picks(node):
            producer, item = node.args
            assert isinstance(producer, Node)
            assert isinstance(item, int)
            return replace(cls.of(producer), item=item)
        target: Any = node.target
        assert hasattr(target, "_schema")
        bound: dict[str, Any] = {}
        for position, argument in enumerate(target._schema.arguments):
            if position < len(node.args) and not argument.kwarg_only:
                bound[argument.name] = node.args[position]
            elif argument.name in node.kwargs:
                bound[argument.name] = node.kwargs[argument.name]
            else:
                bound[argument.name] = argument.default_value
        return cls(target, bound)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    def __call__(self, /, **changed: Any) -> Any:
        """Run the operator, with some arguments replaced."""
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for argument in self.target._schema.arguments:
            value = changed.get(argument.name, self.arguments[argument.name])
            if argument.kwarg_only:
                named[argument.name] = value
            else:
                positional.append(value)
        result = self.target(*positional, **named)
        return result if self.item is None else result[self.item]

    def nodes(self) -> Iterator[tuple[str, Node]]:
        """Every graph node among the arguments, lists included, with its argument's name."""
        for name, _, node in self.places():
            yield name, node

    def places(self) -> Iterator[tuple[str, int, Node]]:
        """Every graph node among the arguments, with its argument's name and place in it."""
        for name, value in self.arguments.items():
            for place, leaf in enumerate(_leaves(value)):
                if isinstance(leaf, Node):
                    yield name, place, leaf

    def with_values(self, places: Sequence[tuple[str, int]], value: Callable[[Node], Any]) -> Call:
        """A call on graph nodes with slots at some places, and values for all other nodes.

        Arguments:
            places: argument and place in it, of the slots in order.
        """
        slots = {place: Slot(index) for index, place in enumerate(places)}

        def substitute(name: str, place: int, leaf: Any) -> Any:
            if not isinstance(leaf, Node):
                return leaf
            slot = slots.get((name, place))
            return value(leaf) if slot is None else slot

        return self.map_places(substitute)

    def map_places(self, substitute: Callable[[str, int, Any], Any]) -> Call:
        """The same call with every leaf replaced, by argument and place in it."""
        mapped = {}
        for name, value in self.arguments.items():
            places = count()
            mapped[name] = _map(lambda leaf, n=name, p=places: substitute(n, next(p), leaf), value)  # type: ignore[misc]
        return Call(self.target, mapped, self.item)

    def map(self, substitute: Callable[[Any], Any]) -> Call:
        """The same call with every leaf of its arguments replaced."""
        mapped = {name: _map(substitute, value) for name, value in self.arguments.items()}
        return Call(self.target, mapped, self.item)


def picks(node: Node) -> bool:
    """Whether a node picks one of several results of another."""
    return node.target is operator.getitem


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _map(substitute: Callable[[Any], Any], value: Any) -> Any:
    """`pytree.tree_map`, quick for the lists that operators take."""
    if isinstance(value, list | tuple):
        return [_map(substitute, item) for item in value]
    return substitute(value)


# -- What every kind of operator can do: run forward, and let messages pass.

T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """Stands in a call's arguments for the k-th operand, which carries relevance."""

    index: int


@dataclass
class Setting:
    """How one operation propagates: its rule, and the model-wide choices it needs.

    Attributes:
        alphas: for a product, the share of each operand (eqs. 19-23).
        late_leaf: what the operand after the last stands for: `"bias"`, or a name of the
            operator's own; `None` without one.
        following: the activation after the operation, as calls of one slot each, where its rule
            reads ahead.
        path: the operands' values on the way to this input, from a baseline on, for rules that
            integrate along it.
        real: for each operand 0 at its explicit zeros and 1 elsewhere, `[*operand]`; `None` (or
            nothing at all) where it has none (see `nrm.zeros`).
        addend: the same of the arguments that hold the constant added to them, by name, of
            those that have any.
        share: where a weight is found that other graphs of the same model use too.
    """

    address: str
    rule: Rule
    strict: bool
    output_dim: int
    alphas: tuple[float, ...] = ()
    late_leaf: str | None = None
    following: tuple[Call, ...] = ()
    path: Sequence[Sequence[Tensor]] = ()
    real: Sequence[Tensor | None] = ()
    addend: Mapping[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)
    share: Callable[[Tensor, Rule], Weight] = lambda value, rule: Weight(value)

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """Something that depends on what `name` says alone, made once."""
        if name not in self.known:
            self.known[name] = make()
        found: T = self.known[name]
        return found

    def weight(self, name: str, value: Tensor) -> Weight:
        """The weight, with what rules made of it before as long as it is the same tensor."""
        known = self.weights.get(name)
        if known is None or known.value is not value:
            known = self.weights[name] = self.share(value, self.rule)
        return known


@dataclass(frozen=True)
class Columns:
    """What a message met at the columns of one operation.

    Attributes:
        address: the operation.
        nearly_zero: |message| at columns with `|sum T~| < tolerance * sum |T~|`.
        negative: |message| at columns with a negative sum.
        vanished: |message| at columns whose contributions all vanish (split uniformly).
        smallest: the smallest `|sum T~| / sum |T~|` that any relevance met.
    """

    address: str
    nearly_zero: float
    negative: float
    vanished: float
    smallest: float


class Propagation(ABC):
    """One operation prepared for one input: messages pass it, linearly, any number of times.

    Who may write where: a message that travels lies in memory that nothing else sees, and is
    handed over with it, to be overwritten or kept; `send_on` sees to that, whatever `pull` returns.
    Forward messages are only read, and may be seen by many. What operators were given and have
    computed is never written to.
    """

    exclusive: bool = False
    """What `pull` returns lies in new memory or in the message's, no two of its results in the
    same, and `push` only reads. Others are given copies, and their results are copied. A class
    with a `pull` of its own has to say it anew."""
    output_is_free: bool = False
    """The operation's output is a tensor of its own that nothing here keeps."""
    nonnegative: bool = False
    """No `R(i|j)` is ever negative."""
    vanished: float = 0.0
    """The most relevance, in absolute size, of a message so far at columns that vanish."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "pull" in vars(cls) and "exclusive" not in vars(cls):
            cls.exclusive = False

    @abstractmethod
    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: bool = True
    ) -> list[Tensor | None]:
        """`m(i) = sum_j R(i|j) m(j)` for the operands wanted (eq. 24).

        Arguments:
            message: `[K, *output shape]`, K messages at once, no two elements in the same memory;
                it may be overwritten.
            wanted: for each operand, whether its message is needed.
            normalized: `False` multiplies by `T~_ij` itself (eq. 26).

        Returns:
            for each operand, the late leaf last, `[K, *operand shape]`, or `None` where not
            wanted. Where `exclusive`, no two share memory, with each other or with anything else.
        """

    def send_on(
        self, message: Tensor, wanted: Sequence[bool], normalized: bool = True
    ) -> list[Tensor | None]:
        """`pull`, with results that may be overwritten: nothing else sees their memory."""
        pulled = self.pull(message, wanted, normalized)
        return [
            part if part is None or (self.exclusive and dense(part)) else part.clone()
            for part in pulled
        ]

    def push(
        self, masses: Sequence[Tensor | None], shape: torch.Size, normalized: bool = True
    ) -> Tensor:
        """`F(j) = sum_i R(i|j) F(i)`: the transpose of `pull`, which is linear in the message.

        Arguments:
            masses: for each operand F(i), `[K, *operand shape]`, only to be read; `None` where it
                is zero.
            shape: of the output.

        Returns:
            `[K, *output shape]`, perhaps in the memory of a mass.
        """
        wanted = [mass is not None for mass in masses]
        known = [mass for mass in masses if mass is not None]
        pushed = known[0].new_zeros((len(known[0]), *shape))
        with torch.enable_grad():
            # Ones: every column takes part. A copy, which `pull` may overwrite.
            probe = known[0].new_ones((1, *shape)).requires_grad_()
            pulled = self.pull(probe.clone(), wanted, normalized)
        reached = [p for p in pulled if p is not None]
        linked = [(p, mass) for p, mass in zip(reached, known, strict=True) if p.grad_fn]
        for k, row in enumerate(pushed):
            if linked:
                (found,) = torch.autograd.grad(
                    [p for p, _ in linked],
                    probe,
                    [mass[k : k + 1] for _, mass in linked],
                    retain_graph=True,
                    materialize_grads=True,
                )
                row.copy_(found[0])
            self._check_transposed(
                row, [p.detach() * m[k] for p, m in zip(reached, known, strict=True)]
            )
        return pushed

    def send_up(
        self, masses: Sequence[Tensor | None], shape: torch.Size, normalized: bool = True
    ) -> Tensor:
        """`push`, of masses that are seen by others. The result is only to be read."""
        if not self.exclusive:
            masses = [None if mass is None else mass.clone() for mass in masses]
        return self.push(masses, shape, normalized)

    def _check_transposed(self, pushed: Tensor, pulled: Sequence[Tensor]) -> None:
        """What ones pull, weighed by the masses, and what the masses push add up to the same."""
        expected = sum(float(part.sum(dtype=torch.float64)) for part in pulled)
        size = sum(float(part.abs().sum(dtype=torch.float64)) for part in pulled)
        found = float(pushed.sum(dtype=torch.float64))
        # Both may be nothing but rounding, of what was pushed.
        rounding = 1e3 * torch.finfo(pushed.dtype).eps * float(pushed.abs().sum())
        if abs(found - expected) > 0.01 * size + rounding:
            raise QueryError(
                f"{type(self).__name__}.pull does not let derivatives by the message through (a "
                "detach or no_grad in it), so forward messages cannot be found from it. Leave "
                "them in, or give it a push of its own."
            )

    def by_channels(
        self, message: Tensor, operand: int, samples: int, onward: Tensor | None = None
    ) -> Iterator[Tensor] | None:
        """The relevance that passes between channels of output and operand, sample by sample.

        Found by what passes over each weight, which many connections share.

        Arguments:
            message: `[1, *output shape]`; it may be overwritten.
            samples: how many the first axis of operand and output has; one: all is one sample.
            onward: `[*operand shape]`, factors at the operand's neurons.

        Returns:
            `[channels of the output, of the operand]` for each sample; `None` where the operation
            has no weights that join channels.
        """
        return None

    def absolute(self) -> Propagation | None:
        """The same with `|R(i|j)|` or something larger, for bounds; `None` where none is known."""
        return self if self.nonnegative else None

    def late_shape(self) -> torch.Size:
        """The shape of the operand after the last (see `Operator.late_leaf`), if there is one."""
        raise NotImplementedError

    def columns(self, message: Tensor, tolerance: float) -> Columns | None:
        """What `message` meets at this operation's columns; `None` where they cannot fail."""
        return None


class Operator(ABC):
    """A row of the operator table: how relevance passes one kind of operator."""

    passes: tuple[str, ...] | None = None
    """The arguments that relevance may pass to; `None`: every tensor argument."""
    adopts_constants: ClassVar[bool] = False
    """A constant among `passes` is a leaf: it is the only parent of some neurons."""
    is_product: ClassVar[bool] = False
    """Several operands are factors, among which a composite's alpha splits the relevance."""
    accepts_identity: ClassVar[bool] = False
    """`rules.Identity` may stand for a contribution rule."""
    default_rule: ClassVar[Rule | None] = None
    """The rule where a composite chooses none for this very operation; `None`: its default."""
    one_parent: bool = False
    """Every neuron has one parent, which takes all of its relevance."""
    elementwise: bool = False
    """With `one_parent`: it is a function of that parent alone, as an activation is."""
    moves: bool = False
    """Neurons are moved about: a neuron's one parent may stand anywhere."""
    adds_up: bool = False
    """A weighted sum, linear in its operands, shared out by a contribution rule."""
    by_derivatives: bool = False
    """Relevance passes by the function's own derivatives."""
    is_layer: bool = False
    """Its call has a `weight`, output channels first, and a `bias`, of one entry for each."""
    applies_weights: bool = False
    """It applies weights of the model, or statistics kept in it."""
    scatters: bool = False
    """It brings together at a neuron what is sent there by indices, as messages on a graph."""
    gathers: bool = False
    """It picks rows by a tensor of indices, as a message reads the node that sends it."""
    overwritable: bool = False
    """Its in-place variant may run where nobody else reads the operand: nothing is read again
    after. A class with a `prepare` of its own has to say it anew."""

    function: Function = UNKNOWN
    """What it computes, to those who read a captured graph."""
    in_place: OpOverload | None = None
    """Its in-place variant, where that is safe (see `overwritable`)."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "prepare" in vars(cls) and "overwritable" not in vars(cls):
            cls.overwritable = False

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def function_of(self, call: Call) -> Function:
        """What this very call computes."""
        return self.function

    def order(self, call: Call, name: str) -> Order | None:
        """How results go with the argument `name` of a call on graph nodes; `None` if unknown."""
        function = self.function_of(call)
        if function.order == 0:
            return None
        return Order(function.order < 0, among_positive=function.among_positive)

    def factors(self, call: Call) -> Sequence[Any]:
        """The factors that a call multiplies and adds up, as linear layers do; else none."""
        return ()

    def shown(self, call: Call, carries: Callable[[Node], bool]) -> Node | None:
        """The operand that a result shows, but for a factor, a summand or its places.

        What is done to a gate in that way leaves it a gate. `call` is on graph nodes.

        Arguments:
            carries: whether a node depends on an input that takes relevance.
        """
        return None

    def may_hold_zeros(self, call: Call, reads: Sequence[str], graph: ReadsZeros) -> bool:
        """Whether the result may have explicit zeros (see `nrm.zeros`).

        Arguments:
            call: on graph nodes.
            reads: the arguments that may have some.
        """
        return False

    def real(self, call: Call, told: TellsZeros) -> Tensor:
        """`[*result]`: 0 at its explicit zeros, 1 elsewhere; where `may_hold_zeros`.

        Arguments:
            call: on graph nodes.
            told: the values, and which of them are explicit zeros.
        """
        return torch.ones_like(told.value)

    def mixed_axes(self, call: Call, dim: int) -> list[int] | None:
        """The axes of an operand of `dim` along which parents may lie; `None` where unknown.

        Along all others a neuron and its parents have the same place. `call` is on graph nodes.
        """
        return None

    # What the operator computes, for whoever runs it again (`nrm.evaluation.rerun`).

    def affine_in(self, call: Call, read: Sequence[str]) -> bool:
        """Whether the result is an affine function of some arguments, jointly.

        Arguments:
            call: on graph nodes.
            read: their names, one of those that relevance passes; twice where two are nodes.
        """
        return False

    def acts_by_channel(self, call: Call, dim: int) -> bool:
        """Whether every channel of the result is the same function of that channel alone.

        Arguments:
            call: on graph nodes, of which one changes.
            dim: of the operand, whose channels are its second axis.
        """
        return False

    def joined_axis(self, call: Call, dim: int) -> int | None:
        """The axis of results of `dim` along which operands follow each other, if they do."""
        return None

    def keeps_order(self, call: Call) -> bool:
        """Whether the neurons stay in their order, and only the shape is another."""
        return False

    def of_channels(self, call: Call, begin: int, end: int) -> Call | None:
        """What some channels of the operand add to a weighted sum; `None` where it has groups.

        Arguments:
            call: with tensors for nodes.

        Returns:
            the call for an operand with these channels alone.
        """
        return None

    def specialize(self, call: Call) -> Operator:
        """The row that covers this very call; by default this one."""
        return self

    def kind_of(self, operands: Sequence[tuple[str, Node]]) -> str:
        """The kind to show and to choose rules by."""
        return self.kind

    def operands(
        self, call: Call, carries: Callable[[Node], bool], address: str
    ) -> list[tuple[str, Node]]:
        """The arguments (of a call on graph nodes) that carry relevance, or an error by name."""
        found = []
        for name, node in call.nodes():
            if _SHAPE_ONLY.get(call.target) == name:
                continue
            passes = self.passes is None or name in self.passes
            if carries(node) and not passes:
                raise UnsupportedOperatorError(
                    f"{call.target} at {address!r}: its argument {name!r} depends on the input, "
                    f"and no rule says how relevance passes to it."
                )
            if passes and (carries(node) or (self.adopts_constants and _has_neurons(node))):
                found.append((name, node))
        return found

    def check(self, call: Call, operands: Sequence[tuple[str, Node]], address: str) -> None:
        """Refuse, by raising, a call that this row does not cover; the default refuses none."""
        return

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        """Whether a call (on graph nodes) adds a constant to what its operands contribute."""
        return False

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        """The constant that is added, with `dim` axes as the output has, or `None`."""
        return None

    def adds(self, call: Call, name: str) -> bool:
        """Whether what `has_bias` says is added is this argument of a call (on graph nodes)."""
        return name == "bias"

    def reads_ahead(self, operands: Sequence[tuple[str, Node]]) -> bool:
        """Whether rules that read ahead apply with the activation that follows."""
        return False

    def curves(self, operands: Sequence[tuple[str, Node]], along_path: bool) -> bool:
        """Whether first-order rules take the operator's own derivatives.

        Else it has one parent per neuron (along a path too), or is linear in its operands.
        """
        return False

    def orphans(self, call: Call, operands: Sequence[tuple[str, Node]]) -> str | None:
        """What stands in for the parents of neurons that no operand reaches, if there may be any.

        Such neurons are constant. The relevance they receive ends in a leaf of this name.
        """
        return None

    def late_leaf(
        self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule, bias_is_input: bool
    ) -> str | None:
        """The leaf that enters here, beside the operands: `"bias"`, what `orphans` says, none."""
        if bias_is_input and self.has_bias(call, operands, rule):
            return "bias"
        return self.orphans(call, operands)

    def channel_axis(self, call: Call, inherited: int | None) -> int | None:
        """The output's channel axis, given that of its first operand."""
        return inherited

    def acts_on_last_axis(self, call: Call) -> bool:
        """Whether the channels of its operand are known to lie in the last axis."""
        return False

    def mixes_rows(self, names: Collection[str]) -> bool:
        """Whether it passes messages on a graph: a row's neurons have those of others for parents.

        Arguments:
            names: the arguments that its operands are.
        """
        return self.scatters

    def telescopes(self, call: Call, rule: Rule) -> bool:
        """Whether relevance over value passes by the derivative of `frozen` (`nrm.telescope`)."""
        return False

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        """The output, differentiable, with all held constant that takes no relevance."""
        output: Tensor = fill(call, values)()
        return output

    @abstractmethod
    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        """Run the operator on values and get ready for messages.

        Arguments:
            call: the call, with tensors for nodes and `Slot(k)` for the k-th operand.
            values: the operands' values.

        Returns:
            the output (detached), and its propagation. Where `setting.late_leaf` names a leaf, it
            is the operand after the last.
        """


class ReadsZeros(Protocol):
    """What of a captured graph decides where explicit zeros may be (`nrm.zeros.ExplicitZeros`)."""

    def depends(self, node: Any) -> bool:
        """Whether something depends on an input."""

    def trained(self, factor: Any) -> bool:
        """Whether something is a parameter, or computed from one."""

    def may_be_zero(self, constant: Any) -> bool:
        """Whether a constant may hold a zero that is none of a parameter's."""

    def placed(self, call: Call, row: Operator) -> bool:
        """Whether no neuron's value decides where an operator gets values from."""


class TellsZeros(Protocol):
    """The values that a call reads, and which of them are explicit zeros (`nrm.zeros`)."""

    value: Tensor
    """The call's result."""

    @property
    def graph(self) -> ReadsZeros:
        """What decides where explicit zeros may be."""

    def real(self, argument: Any) -> Tensor:
        """0 at the explicit zeros of an argument, 1 elsewhere; of the result's type."""

    def some(self, argument: Any) -> bool:
        """Whether an argument has explicit zeros."""

    def plain(self, argument: Any) -> Any:
        """An argument's value."""

    def run(self, /, **changed: Any) -> Tensor:
        """The call on values, with some arguments replaced."""


_SHAPE_ONLY = {
    torch.ops.aten.expand_as.default: "other",
    torch.ops.aten.view_as.default: "other",
    torch.ops.aten.reshape_as.default: "other",
    torch.ops.aten.type_as.default: "other",
    torch.ops.aten.copy.default: "self",
}
"""Arguments of which an operator reads nothing but how they look."""


def fill(call: Call, values: Sequence[Any]) -> Call:
    """The call with its slots replaced by values."""
    return call.map(lambda leaf: values[leaf.index] if isinstance(leaf, Slot) else leaf)


def pull_back(output: Tensor, leaves: Sequence[Tensor], message: Tensor) -> list[Tensor]:
    """Vector-Jacobian products `[K, *leaf shape]` of K messages `[K, *output shape]`."""
    if message.shape[0] == 1:
        gradients = torch.autograd.grad(
            output,
            leaves,
            message[0],
            retain_graph=True,
            create_graph=message.requires_grad,  # for `Propagation.push`
            allow_unused=True,
            materialize_grads=True,
        )
        return [gradient.unsqueeze(0) for gradient in gradients]
    return list(
        torch.autograd.grad(
            output,
            leaves,
            message,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
            is_grads_batched=True,
        )
    )


def refuse_failing(message: Tensor, failing: Tensor, address: str, cause: str, hint: str) -> None:
    """Refuse a message that meets columns which violate the positive-sum condition (`strict`).

    Arguments:
        message: `[K, *output shape]`.
        failing: which columns those are.
        address: the operation.
        cause: whose contributions fail.
        hint: what to do.

    Raises:
        PositiveSumError
    """
    met = message.abs().sum(0)[failing]
    if bool(met.any()):
        raise PositiveSumError(
            f"strict: at {address!r} relevance of absolute size {float(met.sum()):.3g} met "
            f"{int((met > 0).sum())} neurons whose contributions {cause} sum to zero or less "
            f"(eq. 15). {hint}"
        )


def only_operand(call: Call, carries: Callable[[Node], bool]) -> Node | None:
    """The one node among a call's arguments that carries relevance; `None` if there are more."""
    carried = dict.fromkeys(node for _, node in call.nodes() if carries(node))
    return next(iter(carried)) if len(carried) == 1 else None


def _has_neurons(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return not any(isinstance(size, int) and size == 0 for size in value.shape)
