"""Operators whose arguments decide which kind they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket

from nrm.errors import UnsupportedOperatorError
from nrm.operators.averages import Averaging, Interpolation
from nrm.operators.derivatives import LocalLinear
from nrm.operators.layers import Layer, TransposedConvolution
from nrm.operators.norms import (
    LogSoftmax,
    Normalization,
    Softmax,
    channel_groups,
    last_axes,
    single_channels,
)
from nrm.operators.products import MatrixProduct, Product, Quotient
from nrm.operators.routing import (
    Concatenation,
    Copy,
    Filling,
    Identity,
    Overwriting,
    Routing,
    ScatterMaximum,
)
from nrm.operators.row import Call, Operator, Propagation, Setting
from nrm.operators.sums import BatchNorm, ScatterSum, Sum


class OneOf(Operator):
    """An operator that is one kind or another, as its arguments say: `scatter_reduce`, `pad`.

    Arguments:
        choices: `(condition on the call, row)`, the first that applies counts.
    """

    def __init__(self, *choices: tuple[Callable[[Call], bool], Operator]) -> None:
        super().__init__("")
        self.choices = choices

    def specialize(self, call: Call) -> Operator:
        for applies, operator in self.choices:
            if applies(call):
                return operator
        chosen = {
            name: value for name, value in call.arguments.items() if isinstance(value, str | bool)
        }
        raise UnsupportedOperatorError(f"no rule covers {call.target} with {chosen}.")

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        return self.specialize(call).prepare(call, values, setting)


# -- The operator table: one row for every operator that relevance can pass.
# A new operator is one more row; in-place variants (`relu_`) use the row of the plain one.

_TABLE: dict[str, Operator] = {}


def register(operator: Operator, *names: str | OpOverload | OpOverloadPacket | type) -> None:
    """Give operators their row.

    Arguments:
        operator: the row.
        names: operators, by name (`"aten.conv2d"`: every overload; `"aten.mean.dim"`: one;
            `"mylib.myop"`) or as they are (`torch.ops.mylib.myop`); or module classes, each of
            whose calls becomes one operation. Functions: see `operation`.

    Raises:
        TypeError: something else was named.
    """
    for name in names:
        if isinstance(name, type) and issubclass(name, nn.Module):
            name = f"{name.__module__}.{name.__qualname__}"
        elif isinstance(name, OpOverload | OpOverloadPacket):
            name = str(name)
        elif not isinstance(name, str):
            raise TypeError(
                f"a row is for an operator or a module class, not {name!r}. For a function of "
                "your own, decorate it with nrm.operators.operation."
            )
        _TABLE[name.replace("::", ".")] = operator


def has_row(name: str) -> bool:
    """Whether something of this very name has a row."""
    return name in _TABLE


def lookup(target: OpOverload) -> Operator | None:
    """The row of an operator, `None` where it has none."""
    name = str(target)
    return _TABLE.get(name) or _TABLE.get(name.rpartition(".")[0])


def standard(call: Call) -> Operator | None:
    """The row that this library gives a call's operator, whatever row has been registered since.

    `None` for operators of a user's own: what a row says of relevance says nothing of values.
    """
    name = str(call.target)
    row = _STANDARD.get(name) or _STANDARD.get(name.rpartition(".")[0])
    try:
        return None if row is None else row.specialize(call)
    except UnsupportedOperatorError:
        return None


def carries_none(target: OpOverload) -> bool:
    """Whether an operator's result says nothing of its operand's values (`zeros_like`)."""
    return str(target).rpartition(".")[0] in _CARRIES_NONE


def reads_layout(target: Any) -> bool:
    """Whether an operator's result depends on how its operand lies in memory (`as_strided`)."""
    return str(target).rpartition(".")[0] in _READS_LAYOUT


def keeps_values(target: Any) -> bool:
    """Whether an operator's result is its operand under another name."""
    return target is torch.ops.aten.alias.default


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
    wanted = _types(target)
    # Overloads of one name may differ: `pow_.Scalar` raises a tensor, `pow.Scalar` a number.
    for candidate in (overload, *(plain.overloads() if plain is not None else ())):
        found = getattr(plain, candidate, None)
        if found is not None and _types(found) == wanted:
            return found  # type: ignore[no-any-return]
    return target


def _types(target: OpOverload) -> list[str]:
    return [str(argument.type) for argument in target._schema.arguments if not argument.is_out]


def in_place(target: OpOverload) -> OpOverload:
    """The in-place variant of an elementwise operator that has a safe one; others as they are."""
    return _IN_PLACE.get(target, target)


_IN_PLACE = {torch.ops.aten.relu.default: torch.ops.aten.relu_.default}


def _names(text: str) -> list[str]:
    return ["aten." + name for name in text.split()]


_CARRIES_NONE = frozenset(
    _names(
        "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones "
        "new_full new_empty fill zero"
    )
)

_READS_LAYOUT = frozenset(_names("as_strided as_strided_copy as_strided_scatter"))

# One parent for each neuron.
register(Identity("activation", at_zero="ramp"), *_names("relu leaky_relu abs"))
register(
    Identity("activation", at_zero="zero"),
    *_names(
        "relu6 prelu rrelu elu selu celu gelu silu mish tanh hardswish "
        "hardshrink softshrink tanhshrink expm1 erf square sqrt log1p sin atan"
    ),
)
register(
    Identity("activation"),
    *_names(
        "sigmoid softplus hardsigmoid hardtanh nan_to_num threshold log_sigmoid clamp "
        "clamp_min clamp_max exp rsqrt reciprocal log log2 log10 cos logit "
        "pow.Tensor_Scalar pow.Scalar"
    ),
)
register(
    Identity("scaling", at_zero="linear"),
    *_names(
        "dropout feature_dropout alpha_dropout feature_alpha_dropout clone alias contiguous to "
        "_to_copy type_as lift_fresh_copy positive neg"
    ),
)
register(Identity("scaling", at_zero="zero"), *_names("detach"))
register(Identity("rmsnorm", at_zero="zero", elementwise=False), *_names("rms_norm"))

# The message follows the indices.
register(
    Routing("view", ("self",)),
    *_names(
        "view reshape flatten unflatten squeeze unsqueeze permute transpose t numpy_T swapaxes "
        "swapdims movedim moveaxis expand expand_as view_as reshape_as select unbind broadcast_to "
        "diagonal unfold as_strided _unsafe_view mT mH H adjoint"
    ),
)
register(
    Routing("view", ("self",), keeps_channels=True),
    *_names(
        "slice narrow split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk flip "
        "roll rot90 repeat tile repeat_interleave.self_int repeat_interleave.self_Tensor "
        "channel_shuffle pixel_shuffle pixel_unshuffle take_along_dim"
    ),
)
register(
    Routing("view", ("self",), keeps_channels=True, gathers=True),
    *_names("index index_select gather"),
)
register(Concatenation("view"), *_names("cat concat concatenate"))
register(Routing("view", ("tensors",)), *_names("stack hstack vstack"))
register(
    Routing("view", ("self", "src"), keeps_channels=True),
    *_names("select_scatter slice_scatter diagonal_scatter"),
)
register(Copy("view"), *_names("copy"))
register(Overwriting("view", ("self", "src")), *_names("scatter.src"))
register(
    OneOf(
        (lambda call: bool(call["accumulate"]), ScatterSum("scatter", "values")),
        (lambda call: True, Overwriting("view", ("self", "values"))),
    ),
    *_names("index_put"),
)
register(Routing("where", ("self", "other"), keeps_channels=True), *_names("where.self"))
register(Filling("where", ("self",), "other"), *_names("where.ScalarOther"))
register(Filling("where", ("other",), "self"), *_names("where.ScalarSelf"))
register(Filling("where", ("self",), "value"), *_names("masked_fill.Scalar scatter.value"))
register(Routing("where", ("self", "value"), keeps_channels=True), *_names("masked_fill.Tensor"))
register(Filling("where", ("self",)), *_names("tril triu"))
register(Filling("view", ("self",)), *_names("im2col"))
register(Filling("pad", ("self",), "value"), *_names("constant_pad_nd"))
register(
    OneOf(
        (lambda call: call["mode"] == "constant", Filling("pad", ("self",), "value")),
        (lambda call: True, Routing("pad", ("self",), keeps_channels=True)),
    ),
    *_names("pad"),
)
register(
    Routing("pad", ("self",), keeps_channels=True),
    *_names(
        "reflection_pad1d reflection_pad2d reflection_pad3d "
        "replication_pad1d replication_pad2d replication_pad3d"
    ),
)
register(
    Routing("maxpool", ("self",), keeps_channels=True),
    *_names(
        "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
    ),
)
register(
    Routing("maxpool", ("self",)), *_names("max.dim min.dim max min amax amin topk sort cummax")
)
register(
    Routing("maxpool", ("self", "other"), keeps_channels=True),
    *_names("maximum minimum fmax fmin max.other min.other"),
)
register(
    Routing("interpolation", ("input", "self"), keeps_channels=True),
    *_names(
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
        "_upsample_nearest_exact2d _upsample_nearest_exact3d"
    ),
)

# Weighted sums of one operand.
register(Layer("conv"), *_names("conv1d conv2d conv3d"))
register(
    TransposedConvolution("conv"), *_names("conv_transpose1d conv_transpose2d conv_transpose3d")
)
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
register(Averaging("sum", "self", keeps_channels=True), *_names("cumsum col2im"))
for _overload, _argument in (("vec", "input"), ("default", "self")):
    register(
        Interpolation("interpolation", _argument, keeps_channels=True),
        *(
            f"aten.{name}.{_overload}"
            for name in (
                "upsample_linear1d",
                "upsample_bilinear2d",
                "upsample_trilinear3d",
                "_upsample_bilinear2d_aa",
                "upsample_bicubic2d",
                "_upsample_bicubic2d_aa",
            )
        ),
    )
register(BatchNorm("batchnorm"), *_names("batch_norm _native_batch_norm_legit_no_training"))
register(Normalization("layernorm", last_axes, by_channel=False), *_names("layer_norm"))
register(Normalization("groupnorm", channel_groups, by_channel=True), *_names("group_norm"))
register(
    OneOf(
        (
            lambda call: bool(call["use_input_stats"]),
            Normalization("instancenorm", single_channels, by_channel=True),
        ),
        (lambda call: True, BatchNorm("batchnorm")),
    ),
    *_names("instance_norm"),
)
register(Softmax("softmax"), *_names("softmax _softmax"))
register(LogSoftmax("activation"), *_names("log_softmax _log_softmax"))

# Linear maps that go through complex numbers: their derivatives say all of them.
COMPLEX_LINEAR = "nrm.complex_linear"
register(LocalLinear("complex"), COMPLEX_LINEAR)

# Sums of several operands.
register(Sum("sum", lambda call: (1.0, float(call["alpha"]))), *_names("add"))
register(Sum("sum", lambda call: (1.0, -float(call["alpha"]))), *_names("sub"))
register(Sum("sum", lambda call: (-float(call["alpha"]), 1.0)), *_names("rsub"))
register(ScatterSum("scatter", "src"), *_names("scatter_add"))
register(ScatterSum("scatter", "source", lambda call: float(call["alpha"])), *_names("index_add"))
register(
    OneOf(
        (
            lambda call: call["reduce"] in ("amax", "amin"),
            ScatterMaximum("maxpool", ("self", "src"), keeps_channels=True),
        ),
        (
            lambda call: call["reduce"] in ("sum", "mean"),
            ScatterSum("scatter", "src"),
        ),
    ),
    *_names("scatter_reduce"),
)

# Products.
register(Product("product"), *_names("mul multiply"))
register(Quotient("scaling"), *_names("div divide true_divide"))
register(MatrixProduct("product", ("self", "other")), *_names("matmul"))
register(MatrixProduct("product", ("self", "mat2")), *_names("mm bmm"))
register(MatrixProduct("product", ("self", "vec")), *_names("mv"))
register(MatrixProduct("product", ("self", "tensor")), *_names("dot"))
register(MatrixProduct("product", ("mat1", "mat2"), addend="self"), *_names("addmm"))
register(MatrixProduct("product", ("batch1", "batch2"), addend="self"), *_names("baddbmm"))
register(MatrixProduct("product", "tensors"), *_names("einsum"))

_STANDARD = dict(_TABLE)


# -- Functions and modules of a user's own as operators with a row in the table.

_LIBRARY = torch.library.Library("nrm", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class Block:
    """A module call that stands in the graph as one operator.

    Attributes:
        kind: the module's class, by which its row is found.
        body: what it computes, from its inputs and parameters.
    """

    kind: str
    body: Callable[..., Any]
    _schema: Any  # torch.fx and `Call` look for it, as operators have it

    @classmethod
    def of(cls, kind: str, body: Callable[..., Any], names: Sequence[str]) -> Block:
        """A block whose inputs and parameters have names."""
        arguments = [SimpleNamespace(name=n, kwarg_only=False, default_value=None) for n in names]
        return cls(kind, body, SimpleNamespace(arguments=arguments, is_mutable=False))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)

    def __str__(self) -> str:
        return self.kind

    @property
    def __name__(self) -> str:
        return self.kind.rpartition(".")[2]


def operation(row: Operator) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function one operation of every graph, with a row of its own.

    The function takes tensors and numbers, annotated, and returns a tensor; it is differentiated
    as before.

    Arguments:
        row: how relevance passes it.

    Example:
        >>> @nrm.operators.operation(Identity("activation"))
        ... def cube(x: Tensor) -> Tensor:
        ...     return x**3
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{function.__module__}_{function.__qualname__}"
        name = "".join(c if c.isalnum() else "_" for c in name)
        while hasattr(torch.ops.nrm, name):  # defined again, as in a notebook
            name += "_"
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
        register(row, f"nrm.{name}")
        operator: Callable[..., Any] = getattr(torch.ops.nrm, name)
        return operator

    return decorate
