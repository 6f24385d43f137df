"""What a graph is made of: variables, whose elements are the neurons, and operations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.fx import Node

from nrm.operators import Call, Operator, carries_none
from nrm.rules import Rule

Follows = Literal["steps", "lost"]
"""What holds no real values and depends on an input: piecewise constant, or anything else."""

Kind = Literal["input", "embedding", "operation", "bias", "constant"]


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
        batch_axis: `None` where the batch lies in no axis of its own.
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

    @property
    def is_leaf(self) -> bool:
        return self.producer is None

    def __repr__(self) -> str:
        return f"Variable({self.name!r}, {self.kind}, {list(self.shape)})"


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


def is_symbolic(size: int | torch.SymInt) -> TypeGuard[torch.SymInt]:
    """Whether a size is free: export leaves those that Python fixed as symbols for a number."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def is_float_tensor(node: Node) -> bool:
    """Whether a node may carry relevance."""
    value: Any = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def reads_no_values(node: Node) -> bool:
    """Whether a node reads nothing of a tensor but how it looks: its sizes, or zeros like it."""
    name = str(node.target)
    if name.startswith(("aten.sym_", "aten.size")):
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or not carries_none(node.target):
        return False
    # A value to fill with may depend on the input.
    return all(parent is node.args[0] for parent in node.all_input_nodes)


def unfollowed(node: Node) -> Follows | None:
    """What becomes of relevance at a node that depends on an input; `None`: real values.

    Comparisons, indices and whole numbers are constant but for steps, and pass none on. Complex
    or quantised numbers, and numbers taken out of tensors, are not constant.
    """
    value: Any = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else [value]
    found: set[Follows | None] = set()
    for part in parts:
        if isinstance(part, Tensor):
            whole = part.dtype is torch.bool or not (
                part.is_floating_point() or part.is_complex() or part.dtype in _QUANTISED
            )
            found.add(None if part.is_floating_point() else "steps" if whole else "lost")
        elif isinstance(part, float | torch.SymFloat | complex):
            found.add("lost")
        else:
            found.add("steps")
    for kind in (None, "lost", "steps"):
        if kind in found:
            return kind  # type: ignore[return-value]
    return "steps"


_QUANTISED = (torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4)
