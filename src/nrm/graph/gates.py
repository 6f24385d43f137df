"""How much a factor of a product is a gate, as told by what computed it.

A gate says how much of a value passes: a sigmoid in a recurrent cell, a softmax in attention, the
reciprocal norm in a normalisation written out by hand. `nrm.rules.Alpha` decides what it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from torch.fx import Node

from nrm.operators import (
    Identity,
    Product,
    Quotient,
    Routing,
    Sum,
    carries_none,
    lookup,
    picks,
)
from nrm.rules.alphas import SCALE, STRUCTURE

_RANKS = {
    # squashing and smooth functions: a gate against a linear value (SwiGLU, GEGLU). A rectified
    # value is a value, whatever it is multiplied with.
    **dict.fromkeys(
        ["tanh", "hardtanh", "silu", "gelu", "mish", "hardswish", "softplus", "elu"], 1
    ),
    **dict.fromkeys(["sigmoid", "hardsigmoid"], 2),
    # weights that are normalised to sum to one, also by hand
    **dict.fromkeys(["softmax", "_softmax", "exp"], 3),
    # scales: what is left of a vector is its direction
    **dict.fromkeys(
        ["rsqrt", "reciprocal", "sqrt", "linalg_vector_norm", "norm", "std", "var"], SCALE
    ),
}


def gate_ranks(
    factors: Sequence[Node], carries: Callable[[Node], bool], structure: Container[Node]
) -> tuple[int, ...]:
    """How much each factor of a product is a gate; structure more than whatever it multiplies."""
    ranks = [None if f in structure else gate_rank(f, carries) for f in factors]
    others = [rank for rank in ranks if rank is not None]
    above = STRUCTURE if max(others, default=0) < STRUCTURE else max(others) + 1
    return tuple(above if rank is None else rank for rank in ranks)


def gate_rank(node: Node, carries: Callable[[Node], bool]) -> int:
    """0 for a value; the larger, the more `node` is a gate."""
    while True:
        packet, _, overload = str(node.target).rpartition(".")
        name = packet.removeprefix("aten.")
        if name == "pow" and overload == "Tensor_Scalar" and float(_exponent(node)) in (-0.5, 0.5):
            name = "rsqrt"
        if name in _RANKS:
            return _RANKS[name]
        source = _transparent(node, carries)
        if source is None:
            return 0
        node = source


def _exponent(node: Node) -> float:
    value = node.args[1]
    return value if isinstance(value, int | float) else 0.0


def _transparent(node: Node, carries: Callable[[Node], bool]) -> Node | None:
    """The operand behind a view, a constant factor or a constant summand."""
    if picks(node):
        producer = node.args[0]
        assert isinstance(producer, Node)
        return _transparent(producer, carries)
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return None
    if carries_none(node.target):  # type: ignore[arg-type]
        return None
    operator = lookup(node.target)  # type: ignore[arg-type]
    carried = [parent for parent in node.all_input_nodes if carries(parent)]
    if isinstance(operator, Quotient):
        numerator = node.args[0]
        return numerator if isinstance(numerator, Node) and carries(numerator) else None
    if len(carried) == 1 and isinstance(operator, Identity | Routing | Product | Sum):
        return carried[0]
    return None
