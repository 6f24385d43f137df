"""One operator call with its arguments bound to their names, and what its operator computes.

Rows say how relevance passes an operator. Beside that, the model's last softmax is looked through,
a sigmoid in a product is a gate, and a mean of squares under a root tells a norm. All of these ask
what an operator *is*, however it is spelled: a `Function`, on its row (`Operator.function`) or, for
operators that no row covers, in the table of `nrm.operators.table`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

import torch
from torch.fx import Node

from nrm.rules.base import SCALE


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


@dataclass(frozen=True)
class Slot:
    """Stands in a call's arguments for the k-th operand, which carries relevance."""

    index: int


def fill(call: Call, values: Sequence[Any]) -> Call:
    """The call with its slots replaced by values."""
    return call.map(lambda leaf: values[leaf.index] if isinstance(leaf, Slot) else leaf)


def only_operand(call: Call, carries: Callable[[Node], bool]) -> Node | None:
    """The one node among a call's arguments that carries relevance; `None` if there are more."""
    carried = dict.fromkeys(node for _, node in call.nodes() if carries(node))
    return next(iter(carried)) if len(carried) == 1 else None


# -- what an operator computes ---------------------------------------------------------------------

SQUASHED = 1
"""The rank as a gate of squashing and smooth functions: a gate against a linear value (SwiGLU). A
rectified value is a value, whatever it is multiplied with."""

GATE = 2
"""The rank of a sigmoid: it says how much of a value passes."""

WEIGHTS = 3
"""The rank of what is normalised to sum to one, attention weights above all, also by hand."""


@dataclass(frozen=True)
class Function:
    """What a function is, as far as it is known; by default nothing is.

    Attributes:
        role: what mathematics calls it: `"softmax"`, `"sigmoid"`, `"exp"`, `"log"`, `"times"`,
            `"over"`, `"plus"`, `"minus"`, `"sum"`, `"mean"`, `"root"`, `"lookup"`, ...
        gate: how much of a gate its result is as a factor of a product; 0: it is a value
            (`nrm.rules.Alpha` decides what gates take).
        hides_sign: as a model's last function, it has another sign than its argument, the logit.
        positive: its results are positive numbers, probabilities and the like.
        keeps_positive: of positive numbers it makes positive ones.
        order: 1: of numbers of one sign, the larger what it is given, the larger its result; -1:
            the smaller; 0: neither, or it is not known.
        among_positive: `order` holds for positive arguments alone.
        same: its result is what it is given.
        chooses: it returns what it chose along an axis, and beside it where that was.
        carries_none: its result says nothing of its operand's values (`zeros_like`).
        fills: it makes a constant tensor, of this value or of that in the argument of this name.
        steps: it is constant but for steps, as rounding is: a gate that takes no relevance.
    """

    role: str = ""
    gate: int = 0
    hides_sign: bool = False
    positive: bool = False
    keeps_positive: bool = False
    order: int = 0
    among_positive: bool = False
    same: bool = False
    chooses: bool = False
    carries_none: bool = False
    fills: float | str | None = None
    steps: bool = False


UNKNOWN = Function()

ROOT = Function("root", gate=SCALE, order=1, keeps_positive=True)
INVERSE_ROOT = Function("inverse root", gate=SCALE)
INVERSE = Function("inverse", gate=SCALE, order=-1)
SAME = Function("same", order=1, keeps_positive=True, same=True)
VIEW = Function("view", keeps_positive=True)


@dataclass(frozen=True)
class Order:
    """How results lie to each other if one operand changes and all else is constant.

    Attributes:
        falls: the other way round than the operand's values.
        by: a constant by whose sign that is turned in its turn (a number or a node).
        among_positive: so it is for positive values of the operand alone.
    """

    falls: bool = False
    by: Any = 1.0
    among_positive: bool = False


@dataclass(frozen=True)
class Rescaling:
    """`scale * x + shift`, by constants: numbers, or nodes of a captured graph.

    Attributes:
        kind: `"times"` or `"over"` the first of what is given; `"plus"`: of `(other, scale,
            factor)`, `scale * x + factor * other`; `"norm"`: what `scale_and_shift` takes.
        given: the constants.
        matters: it may change shares. A positive number that scales all alike does not, nor does a
            number that is added, which stays a bias of its own.
        shifts: it adds something.
    """

    kind: Literal["times", "over", "plus", "norm"]
    given: tuple[Any, ...]
    matters: bool
    shifts: bool

    @property
    def step(self) -> tuple[Any, ...]:
        """Kind and constants, as an argument of a node."""
        return (self.kind, *self.given)


# -- Operators for those who write into a captured graph.

ALIAS = torch.ops.aten.alias.default
CAST = torch.ops.aten.to.dtype
BITS = torch.ops.aten.view.dtype
NEGATIVE = torch.ops.aten.neg.default
SIGN = torch.ops.aten.sign.default
TIMES = torch.ops.aten.mul.Tensor
GATHER = torch.ops.aten.gather.default
WITH_AXIS = torch.ops.aten.unsqueeze.default
WITHOUT_AXIS = torch.ops.aten.squeeze.dim
