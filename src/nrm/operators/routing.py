"""Operators with one parent per neuron: functions of one neuron each, and what moves neurons about.

The message passes unchanged where neurons stay at their places (`PassThrough`), and follows the
indices where they do not (`Routing`): with constants in the place of some neurons (`Filling`), with
some written over others (`Overwriting`), with the largest taking all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.operators.call import (
    INVERSE_ROOT,
    ROOT,
    UNKNOWN,
    Call,
    Function,
    Order,
    Rescaling,
    Slot,
    fill,
    only_operand,
)
from nrm.operators.propagation import Ends, Propagation, Setting, pull_back
from nrm.operators.row import Operator, ReadsZeros, TellsZeros
from nrm.operators.secants import chord, moved, winners
from nrm.rules import Normalized, Rule
from nrm.tensors import with_slope


class PassThrough(Operator):
    """Elementwise operators: activations, dropout in evaluation mode, casts.

    Where the operator broadcasts its operand, the message is summed over the copies.

    Arguments:
        at_zero: what is known of the function at zero: `"linear"` functions, those that are linear
            on either side of it (a `"ramp"`) and those that are `"zero"` there have a slope
            `f(x) / x`, of the first two it is the derivative; others may not.
        elementwise: whether it is; some that are not pass relevance as if they were.
        gate: how much of a gate the result is as a factor of a product
            (see `nrm.operators.call`); 0: it is a value.
        keeps_zeros: whether explicit zeros pass, where it makes zero of zero, which is seen when
            it runs; by default where it is elementwise, or zero at zero.
        function: what else is known of it.
        in_place: its in-place variant, if that is safe.
        looks_like: the argument of which nothing is read but its shape and type.

    Example:
        >>> gate = PassThrough("activation", at_zero="zero", gate=operators.SQUASHED)
        >>> operators.register(gate, "mylib.my_activation")
    """

    one_parent = True
    overwritable = True
    accepts_identity: ClassVar[bool] = True

    def __init__(
        self,
        kind: str,
        at_zero: Literal["linear", "ramp", "zero", "unknown"] = "unknown",
        elementwise: bool = True,
        *,
        gate: int = 0,
        keeps_zeros: bool | None = None,
        function: Function = UNKNOWN,
        in_place: OpOverload | None = None,
        looks_like: str | None = None,
    ) -> None:
        super().__init__(kind)
        self.at_zero, self.elementwise = at_zero, elementwise
        self.function = replace(function, gate=gate) if gate else function
        self.keeps_zeros = elementwise or at_zero == "zero" if keeps_zeros is None else keeps_zeros
        self.in_place, self.looks_like = in_place, looks_like

    def shown(self, call: Call, carries: Callable[[Node], bool]) -> Node | None:
        return only_operand(call, carries)

    def may_hold_zeros(self, call: Call, reads: Sequence[str], graph: ReadsZeros) -> bool:
        return len(reads) == 1 and self.keeps_zeros

    def real(self, call: Call, told: TellsZeros) -> Tensor:
        return where_zero_stays(call, told)

    def curves(self, operands: Sequence[tuple[str, Node]], along_path: bool) -> bool:
        return not self.elementwise

    def mixed_axes(self, call: Call, dim: int) -> list[int] | None:
        return []

    def affine_in(self, call: Call, read: Sequence[str]) -> bool:
        return self.at_zero == "linear"

    def rescaling(self, call: Call, name: str) -> Rescaling | None:
        if self.function.role != "negative":
            return None
        return Rescaling("times", (-1.0,), matters=True, shifts=False)

    def acts_by_channel(self, call: Call, dim: int) -> bool:
        random = call.get("train") is True or call.get("training") is True
        return self.elementwise and not random

    def check(self, call: Call, operands: Sequence[tuple[str, Node]], address: str) -> None:
        if len(operands) > 1:
            raise UnsupportedOperatorError(
                f"{call.target} at {address!r} combines several tensors that depend on the input, "
                "and no rule says how they share the relevance."
            )
        if call.get("train") is True or call.get("training") is True:
            raise UnsupportedOperatorError(
                f"{call.target} at {address!r} is random (its training flag is set). "
                "Pass training=self.training in the model's code."
            )

    def telescopes(self, call: Call, rule: Rule) -> bool:
        return self.at_zero != "unknown"

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        if self.at_zero in ("linear", "ramp"):
            return super().frozen(call, values, setting)
        x = values[0].detach()
        with torch.no_grad():
            output: Tensor = fill(call, [x])()
            slope = torch.where(x == 0, 0.0, output / x)
        return with_slope(values[0], output, slope)

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        if not self.elementwise:
            return super().secant(call, ends, setting)
        if self.at_zero == "linear":
            output: Tensor = fill(call, [moved(ends.after[0], ends.moves[0])])()
            return output
        return chord(call, ends.before[0], ends.after[0], ends.moves[0])

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        with torch.no_grad():
            output = fill(call, values)()
        return output, Unchanged(values[0].shape, output.shape)


def where_zero_stays(call: Call, told: TellsZeros) -> Tensor:
    """What tells the explicit zeros of a function of one neuron each: zero, made of zero."""
    operands = list(dict.fromkeys(node for _, node in call.nodes() if told.some(node)))
    if len(operands) != 1:  # there may have been some, and are none for this input
        return torch.ones_like(told.value)
    (operand,) = operands
    made = call.map(
        lambda leaf: torch.zeros_like(told.plain(leaf)) if leaf is operand else told.plain(leaf)
    )()
    return torch.where(made == 0, told.real(operand).expand(told.value.shape), 1.0)


class Power(PassThrough):
    """`x ** exponent`, for an exponent that is a number: among them roots and their inverses."""

    def function_of(self, call: Call) -> Function:
        return {0.5: ROOT, -0.5: INVERSE_ROOT}.get(call["exponent"], self.function)

    def order(self, call: Call, name: str) -> Order | None:
        exponent = call["exponent"]
        if not isinstance(exponent, int | float) or exponent == 0:
            return None
        return Order(exponent < 0, among_positive=True)


class Copy(PassThrough):
    """`copy(self, src)`: the values of `src`, broadcast and cast to look like `self`."""

    passes = ("src",)
    looks_like = "self"

    def __init__(self, kind: str) -> None:
        super().__init__(
            kind, at_zero="linear", function=Function("copy"), looks_like=self.looks_like
        )

    def may_hold_zeros(self, call: Call, reads: Sequence[str], graph: ReadsZeros) -> bool:
        return "src" in reads

    def real(self, call: Call, told: TellsZeros) -> Tensor:
        return told.real(call["src"]).expand(told.value.shape)

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        output = self.frozen(call, [values[0].detach()], setting)
        return output, Unchanged(values[0].shape, output.shape)

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        like: Tensor = call["self"]
        return values[0].to(like.dtype).expand(like.shape)

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        return self.frozen(call, ends.moves, setting)


class Unchanged(Propagation):
    """The message as it is, summed over the copies where the operand was broadcast."""

    exclusive = True
    nonnegative = True

    def __init__(self, operand: torch.Size, output: torch.Size) -> None:
        self.operand, self.broadcast = operand, operand != output

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: Normalized = True
    ) -> list[Tensor | None]:
        if self.broadcast:
            added = message.dim() - 1 - len(self.operand)
            if added:
                message = message.sum(tuple(range(1, 1 + added)))
            stretched = [
                axis
                for axis, size in enumerate(self.operand, start=1)
                if size == 1 and message.shape[axis] != 1
            ]
            if stretched:
                message = message.sum(stretched, keepdim=True)
        return [message]

    def push(
        self, masses: Sequence[Tensor | None], shape: torch.Size, normalized: Normalized = True
    ) -> Tensor:
        (mass,) = masses
        assert mass is not None
        if not self.broadcast:
            return mass
        added = (1,) * (len(shape) - len(self.operand))
        return mass.reshape(len(mass), *added, *self.operand).expand(len(mass), *shape)


# -- Operators that move neurons about: the message follows the indices.


class Routing(Operator):
    """Views, permutations, slices, concatenation, max-pooling: the operator's own transpose.

    The winner of a maximum takes all, which is what the operator's derivative says.

    Arguments:
        passes: the arguments whose neurons are moved.
        keeps_channels: whether the channel axis stays where it is, counted from the end.
        least: the smallest wins, where several compete.
        by_rank: which neuron comes where depends on the order of them all, as in sorting.
        function: what else is known of it.
        looks_like: the argument of which nothing is read but its shape.
    """

    adopts_constants: ClassVar[bool] = True
    moves = True

    def __init__(
        self,
        kind: str,
        passes: tuple[str, ...],
        keeps_channels: bool = False,
        *,
        least: bool = False,
        by_rank: bool = False,
        gathers: bool = False,
        function: Function = UNKNOWN,
        looks_like: str | None = None,
    ) -> None:
        super().__init__(kind)
        self.passes = passes
        self.keeps_channels, self.gathers = keeps_channels, gathers
        self.least, self.by_rank, self.function = least, by_rank, function
        self.looks_like = looks_like

    def shown(self, call: Call, carries: Callable[[Node], bool]) -> Node | None:
        return only_operand(call, carries)

    def may_hold_zeros(self, call: Call, reads: Sequence[str], graph: ReadsZeros) -> bool:
        if not reads or self.by_rank:
            return False
        return graph.placed(call, self) and set(reads) <= set(self.passes or ())

    def real(self, call: Call, told: TellsZeros) -> Tensor:
        changed: dict[str, Any] = {}
        for name in self.passes or ():
            if name not in call.arguments:
                continue
            given = call[name]
            several = isinstance(given, list | tuple)
            changed[name] = [told.real(g) for g in given] if several else told.real(given)
        changed |= self._filled(call, told)
        if self._takes_least(call):  # zero only where all are
            flipped = {
                name: [1 - each for each in real] if isinstance(real, list) else 1 - real
                for name, real in changed.items()
            }
            return 1 - told.run(**flipped)
        return told.run(**changed)

    def _takes_least(self, call: Call) -> bool:
        return self.least

    def _filled(self, call: Call, told: TellsZeros) -> dict[str, Any]:
        """What tells of the constants that take the place of neurons."""
        return {}

    def channel_axis(self, call: Call, inherited: int | None) -> int | None:
        return inherited if self.keeps_channels else None

    def affine_in(self, call: Call, read: Sequence[str]) -> bool:
        return self.kind in ("view", "where", "pad", "interpolation") and set(read) <= set(
            self.passes or ()
        )

    def acts_by_channel(self, call: Call, dim: int) -> bool:
        positions = _POOLED.get(getattr(call.target, "overloadpacket", None))
        return positions is not None and dim == 2 + positions

    def keeps_order(self, call: Call) -> bool:
        return getattr(call.target, "overloadpacket", None) in _IN_ORDER

    def curves(self, operands: Sequence[tuple[str, Node]], along_path: bool) -> bool:
        return along_path and self.kind == "maxpool"  # the winner changes on the way

    def telescopes(self, call: Call, rule: Rule) -> bool:
        return True

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        if self.kind == "maxpool":
            return winners((call, call), ends, setting, self.by_rank)
        points = [moved(x, m) for x, m in zip(ends.after, ends.moves, strict=True)]
        output: Tensor = fill(call, points)()
        return output

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        leaves = [value.detach().requires_grad_() for value in values]
        with torch.enable_grad():
            output = fill(call, leaves)()
        routed = Routed(leaves, output)
        # A function of a user's own may have derivatives that share memory with anything.
        routed.exclusive = getattr(call.target, "namespace", None) == "aten"
        return output.detach(), routed


_ATEN = torch.ops.aten
_IN_ORDER = frozenset([_ATEN.flatten, _ATEN.reshape, _ATEN.view, _ATEN.unflatten])
_POOLED: dict[Any, int] = {_ATEN.max_pool1d: 1, _ATEN.max_pool2d: 2, _ATEN.max_pool3d: 3}
"""How many of an operand's last axes the windows of a maximum span."""


class Concatenation(Routing):
    """Operands that follow each other along an axis."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, ("tensors",), keeps_channels=True)

    def joined_axis(self, call: Call, dim: int) -> int | None:
        return int(call["dim"]) % dim


class Routed(Propagation):
    nonnegative = True

    def __init__(self, leaves: list[Tensor], output: Tensor) -> None:
        self.leaves, self.output = leaves, output

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: Normalized = True
    ) -> list[Tensor | None]:
        chosen = [leaf for leaf, want in zip(self.leaves, wanted, strict=True) if want]
        if not chosen:
            return [None] * len(wanted)
        pulled = iter(pull_back(self.output, chosen, message))
        return [next(pulled) if want else None for want in wanted]


# -- Operators that put a constant in the place of some neurons: padding, masking, triangles.


class Filling(Routing):
    """A routing in which some neurons have no parent: what reaches those ends in a leaf.

    Arguments:
        passes: the one argument that carries relevance.
        filler: the argument that holds the constant, if it is not always zero.
    """

    def __init__(
        self,
        kind: str,
        passes: tuple[str, ...],
        filler: str | None = None,
        function: Function = UNKNOWN,
    ) -> None:
        super().__init__(kind, passes, keeps_channels=True, function=function)
        self.filler = filler

    def orphans(self, call: Call, operands: Sequence[tuple[str, Node]]) -> str | None:
        return "fill"

    def may_hold_zeros(self, call: Call, reads: Sequence[str], graph: ReadsZeros) -> bool:
        return bool(reads) or self._writes_zero(call, graph)

    def _filled(self, call: Call, told: TellsZeros) -> dict[str, Any]:
        if self.filler is None:
            return {}
        return {self.filler: 0.0 if self._writes_zero(call, told.graph) else 1.0}

    def _writes_zero(self, call: Call, graph: ReadsZeros) -> bool:
        """Whether zero takes the place of neurons, wherever no neuron's value decides where."""
        written = 0.0 if self.filler is None else call[self.filler]
        zero = written is None or (isinstance(written, int | float) and written == 0)
        return zero and graph.placed(call, self)

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        output, routed = super().prepare(call, values, setting)
        assert isinstance(routed, Routed)
        with torch.no_grad():
            blank = {} if self.filler is None else {self.filler: 0}
            kept = fill(call, [torch.ones_like(value) for value in values])(**blank)
        return output, Filled(routed, kept == 0)


class Filled(Propagation):
    nonnegative = True

    def __init__(self, routed: Routed, filled: Tensor) -> None:
        self.routed, self.filled = routed, filled
        self.exclusive = routed.exclusive

    def late_shape(self) -> torch.Size:
        return self.filled.shape

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: Normalized = True
    ) -> list[Tensor | None]:
        constant = torch.where(self.filled, message, 0.0) if wanted[-1] else None
        return [*self.routed.pull(message, wanted[:-1], normalized), constant]


# -- Operators that write values over others at indices, where the last one written wins.


class Overwriting(Routing):
    """`self` with what `written` holds at indices. Each neuron has one parent: what stands there.

    Its derivative would also give to values that were overwritten in turn.

    Arguments:
        passes: `self`, and the argument that is written.
    """

    def __init__(self, kind: str, passes: tuple[str, str]) -> None:
        super().__init__(kind, passes, keeps_channels=True)

    secant = Operator.secant

    def telescopes(self, call: Call, rule: Rule) -> bool:
        return False

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        assert self.passes is not None
        base, written = (fill(call, values)[name] for name in self.passes)
        with torch.no_grad():
            output = fill(call, values)()
            numbers = torch.arange(1, written.numel() + 1, dtype=torch.float64)
            winners = call(
                **{
                    self.passes[0]: torch.zeros_like(base, dtype=torch.float64),
                    self.passes[1]: numbers.to(base.device).view(written.shape),
                }
            ).long()
        sides = [call[name].index if isinstance(call[name], Slot) else None for name in self.passes]
        return output, Overwritten(winners, written.shape, sides, len(values))


class Overwritten(Propagation):
    """`winners` numbers, from one, what was written at each neuron; zero: it is as it was."""

    exclusive = True
    nonnegative = True

    def __init__(
        self, winners: Tensor, written: torch.Size, sides: list[int | None], operands: int
    ) -> None:
        self.winners, self.written, self.sides, self.operands = winners, written, sides, operands

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: Normalized = True
    ) -> list[Tensor | None]:
        pulled: list[Tensor | None] = [None] * self.operands
        base, source = self.sides
        if base is not None and wanted[base]:
            pulled[base] = torch.where(self.winners == 0, message, 0.0)
        if source is not None and wanted[source]:
            count = self.written.numel()
            by_number = message.new_zeros((len(message), count + 1))
            by_number.index_add_(1, self.winners.flatten(), message.flatten(1))
            pulled[source] = by_number[:, 1:].reshape(len(message), *self.written)
        return pulled


class ScatterMaximum(Routing):
    """The largest (or smallest) of what is scattered to a neuron takes all; ties share evenly."""

    scatters = True

    def _takes_least(self, call: Call) -> bool:
        return bool(call["reduce"] == "amin")

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        then, now = _without_ties(call, ends.before), _without_ties(call, ends.after)
        return winners((then[0], now[0]), Ends(then[1], now[1], ends.moves), setting)

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        return super().prepare(*_without_ties(call, values), setting)


def _without_ties(call: Call, values: Sequence[Tensor]) -> tuple[Call, Sequence[Tensor]]:
    """The call with `self` only where nothing arrives, if so it counts: it must not tie with a
    winner."""
    if call["include_self"]:
        return call, values
    base, src = fill(call, values)["self"], fill(call, values)["src"]
    least = -torch.inf if call["reduce"] == "amax" else torch.inf
    arrived = torch.zeros_like(base).scatter_add(call["dim"], call["index"], torch.ones_like(src))
    replaced = torch.where(arrived > 0, least, base)
    index = call["self"].index if isinstance(call["self"], Slot) else None
    if index is not None:
        values = [replaced if i == index else v for i, v in enumerate(values)]
    changed = {"include_self": True} | ({} if index is not None else {"self": replaced})
    return Call(call.target, call.arguments | changed, call.item), values
