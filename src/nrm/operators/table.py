"""The operator table: one row for every operator that relevance can pass.

A new operator is one more row; in-place variants (`relu_`) use the row of the plain one.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from nrm.operators.base import Operator
from nrm.operators.batch_norm import BatchNorm
from nrm.operators.identity import Identity
from nrm.operators.layers import Averaging, Layer, Sum
from nrm.operators.routing import Routing

_TABLE: dict[str, Operator] = {}


def register(operator: Operator, *names: str) -> None:
    """Give operators (`"aten.conv2d"`: every overload; `"aten.mean.dim"`: one) their row."""
    for name in names:
        _TABLE[name] = operator


def lookup(target: OpOverload) -> Operator | None:
    """The row of an operator, `None` where it has none."""
    name = str(target)
    return _TABLE.get(name) or _TABLE.get(name.rpartition(".")[0])


def carries_none(target: OpOverload) -> bool:
    """Whether an operator's result says nothing of its operand's values (`zeros_like`)."""
    return str(target).rpartition(".")[0] in _CARRIES_NONE


def functional(target: OpOverload) -> OpOverload:
    """The plain operator for one that minds memory: `relu` for `relu_`, `reshape` for `view`.

    Others as they are.
    """
    if target is torch.ops.aten.view.default:
        return torch.ops.aten.reshape.default
    packet, _, overload = str(target).rpartition(".")
    namespace, _, name = packet.partition(".")
    if not name.endswith("_") or name.endswith("__"):
        return target
    plain = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(plain, overload, target)


def in_place(target: OpOverload) -> OpOverload:
    """The in-place variant of an elementwise operator that has a safe one; others as they are."""
    return _IN_PLACE.get(target, target)


_IN_PLACE = {torch.ops.aten.relu.default: torch.ops.aten.relu_.default}


def _names(text: str) -> list[str]:
    return ["aten." + name for name in text.split()]


_CARRIES_NONE = frozenset(
    _names(
        "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones "
        "new_full new_empty"
    )
)

register(
    Identity("activation"),
    *_names(
        "relu relu6 hardtanh leaky_relu prelu rrelu elu selu celu gelu silu mish sigmoid tanh "
        "softplus hardswish hardsigmoid hardshrink softshrink tanhshrink threshold "
        "log_sigmoid clamp clamp_min clamp_max exp neg abs square sqrt pow.Tensor_Scalar"
    ),
)
register(
    Identity("scaling"),
    *_names(
        "mul div dropout feature_dropout alpha_dropout feature_alpha_dropout clone alias "
        "contiguous to _to_copy detach lift_fresh_copy positive"
    ),
)
register(
    Routing("view", ("self",)),
    *_names(
        "view reshape flatten unflatten squeeze unsqueeze permute transpose t numpy_T swapaxes "
        "movedim expand expand_as view_as reshape_as select unbind broadcast_to"
    ),
)
register(
    Routing("view", ("self",), keeps_channels=True),
    *_names("slice narrow split split_with_sizes chunk flip roll repeat channel_shuffle"),
)
register(Routing("view", ("tensors",), keeps_channels=True), *_names("cat concat"))
register(Routing("view", ("tensors",)), *_names("stack"))
register(
    Routing("maxpool", ("self",), keeps_channels=True),
    *_names(
        "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
    ),
)
register(Routing("maxpool", ("self",)), *_names("max.dim min.dim"))
register(Layer("conv"), *_names("conv1d conv2d conv3d"))
register(Layer("linear"), *_names("linear"))
register(
    Averaging("avgpool", "self", keeps_channels=True),
    *_names(
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d"
    ),
)
register(
    Averaging("avgpool", "self", keeps_channels=False),
    *_names("mean.default mean.dim sum.default sum.dim_IntList"),
)
register(BatchNorm("batchnorm"), *_names("batch_norm"))
register(Sum("sum", lambda call: (1.0, float(call["alpha"]))), *_names("add"))
register(Sum("sum", lambda call: (1.0, -float(call["alpha"]))), *_names("sub"))
register(Sum("sum", lambda call: (-float(call["alpha"]), 1.0)), *_names("rsub"))
