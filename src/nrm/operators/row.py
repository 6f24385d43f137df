"""A row of the operator table: all that is known of one kind of operator.

A row reads a call with its arguments by name (`Call`), says which of them carry relevance and what
kind of operator it is, and prepares a call on values for messages (`Operator.prepare`). To write
one, start from `PassThrough`, `Routing`, `WeightedSum` or `LocalLinear`, and check it with
`nrm.testing.check_operator`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.operators.call import UNKNOWN, Call, Function, Order, Rescaling, fill
from nrm.operators.propagation import Ends, Propagation, Setting
from nrm.operators.samples import Samples, broadcast, in_place, moved
from nrm.rules import Rule


class Operator(ABC):
    """A row of the operator table: how relevance passes one kind of operator."""

    passes: tuple[str, ...] | None = None
    """The arguments that relevance may pass to; `None`: every tensor argument."""
    looks_like: str | None = None
    """The argument of which nothing is read but its shape and type."""
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

    def samples(
        self, call: Call, name: str, at: Samples, read: Sequence[int], shape: Sequence[int]
    ) -> Samples | None:
        """Where the samples of a batch lie in the result, where they lie so in an operand.

        Where neurons are neither moved nor brought together by indices, the samples stay in their
        axis: they do not depend on each other, so that all else happens along other axes.

        Arguments:
            call: on graph nodes.
            name: the argument that the operand is.
            at: where the samples lie in it.
            read, shape: of the operand and the result.

        Returns:
            `None` where they cannot be told.
        """
        if self.moves:
            return moved(call, at, read, shape)
        if self.by_derivatives or self.scatters or self.gathers:
            return None
        if self.mixed_axes(call, len(read)) == []:
            return broadcast(at, read, shape)
        # What brings an axis together may move those behind it up.
        shorter = len(shape) < len(read) and at.axis > 0
        return None if shorter and not self.is_product else in_place(at, read, shape)

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

    def rescaling(self, call: Call, name: str) -> Rescaling | None:
        """How an argument is scaled and shifted by others, if that is all that is done to it.

        Arguments:
            call: on graph nodes.
            name: of the argument.
        """
        return None

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
            if name == self.looks_like:
                continue
            passes = self.passes is None or name in self.passes
            if carries(node) and not passes:
                raise UnsupportedOperatorError(
                    f"{call.target} at {address!r}: its argument {name!r} depends on the input, "
                    "and no rule says how relevance passes to it. Compute it from constants, or "
                    "ask for a first-order approximation of such calls with "
                    "Explainer(fallback=nrm.operators.LocalLinear())."
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

    @property
    def has_secant(self) -> bool:
        """Whether the row says how a change of its operands changes the result (`secant`)."""
        return type(self).secant is not Operator.secant

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        """Something linear in how far operands move, `S moves`, whose derivatives by them are `S`.

        `S` is a slope between two points: `S (after - before) = f(after) - f(before)` exactly. Only
        its derivatives are read, never its value.

        Arguments:
            call: with slots for the operands; all else is the same at both points.

        Raises:
            UnsupportedOperatorError: no exact slope is known for this call.
        """
        raise UnsupportedOperatorError(
            f"{call.target} at {setting.address!r} has no exact slope between two inputs. Explain "
            "it without a reference, or along a path, composites.IntegratedGradients(baseline)."
        )

    def indifferent(self, call: Call, values: Sequence[Tensor]) -> list[Tensor] | None:
        """Operands of which none is preferred, as scores of zero; `None`: that means nothing here.

        Arguments:
            call, values: as for `prepare`.
        """
        return None

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


def _has_neurons(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return not any(isinstance(size, int) and size == 0 for size in value.shape)
