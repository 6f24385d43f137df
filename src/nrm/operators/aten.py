"""The rows of torch's operators.

A new operator is one more `register` here, or in a user's own code.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nrm.operators.averages import Averaging, Interpolation, Sampling
from nrm.operators.call import (
    GATE,
    INVERSE,
    INVERSE_ROOT,
    ROOT,
    SAME,
    SQUASHED,
    VIEW,
    WEIGHTS,
    Function,
)
from nrm.operators.derivatives import LinearMap, LocalLinear, RootOfSquares
from nrm.operators.layers import Layer, TransposedConvolution
from nrm.operators.norms import (
    LogSoftmax,
    LogSumExp,
    Normalization,
    RootMeanSquare,
    Softmax,
    channel_groups,
    last_axes,
    single_channels,
)
from nrm.operators.products import GroupedProduct, MatrixProduct, Product, Quotient
from nrm.operators.routing import (
    Concatenation,
    Copy,
    Filling,
    Overwriting,
    PassThrough,
    Power,
    Routing,
    ScatterMaximum,
)
from nrm.operators.sums import BatchNorm, ScatterSum, Sum
from nrm.operators.table import OneOf, describe, keep_as_standard, register
from nrm.rules.base import SCALE


def _names(text: str) -> list[str]:
    return ["aten." + name for name in text.split()]


# -- The rows. One parent for each neuron:

register(
    PassThrough("activation", at_zero="ramp", in_place=torch.ops.aten.relu_.default),
    *_names("relu"),
)
register(PassThrough("activation", at_zero="ramp"), *_names("leaky_relu abs absolute"))
register(
    PassThrough("activation", at_zero="zero"),
    *_names(
        "relu6 prelu rrelu selu celu hardshrink softshrink erf special_erf sin atan arctan tan "
        "asin arcsin erfinv special_erfinv"
    ),
)
register(
    PassThrough("activation", at_zero="zero", gate=SQUASHED),
    *_names("elu gelu silu mish hardswish"),
)
register(
    PassThrough("activation", at_zero="zero", function=Function("tanh", SQUASHED, order=1)),
    *_names("tanh"),
)
register(
    PassThrough("activation", at_zero="zero", function=Function(order=1)),
    *_names("expm1 log1p sinh asinh arcsinh atanh arctanh"),
)
register(
    PassThrough("activation", at_zero="zero", function=Function(order=1, among_positive=True)),
    *_names("square"),
)
register(PassThrough("activation", at_zero="zero", function=ROOT), *_names("sqrt"))
register(
    PassThrough(
        "activation",
        gate=GATE,
        function=Function("sigmoid", hides_sign=True, positive=True, order=1),
    ),
    *_names("sigmoid special_expit"),
)
register(
    PassThrough(
        "activation",
        gate=GATE,
        function=Function("hardsigmoid", hides_sign=True, positive=True),
    ),
    *_names("hardsigmoid"),
)
register(
    PassThrough("activation", function=Function("log_sigmoid", hides_sign=True)),
    *_names("log_sigmoid"),
)
register(
    PassThrough(
        "activation",
        gate=SQUASHED,
        function=Function("softplus", hides_sign=True, positive=True, order=1),
    ),
    *_names("softplus"),
)
register(
    PassThrough(
        "activation",
        gate=WEIGHTS,
        function=Function("exp", hides_sign=True, positive=True, order=1),
    ),
    *_names("exp"),
)
register(PassThrough("activation", function=Function("log", order=1)), *_names("log"))
register(
    PassThrough("activation", function=Function(order=1)),
    *_names("log2 log10 logit special_logit nan_to_num exp2 special_exp2"),
)
register(
    PassThrough("activation", function=Function("clamp", order=1, keeps_positive=True)),
    *_names("clamp_min"),
)
register(PassThrough("activation", function=Function("clamp", order=1)), *_names("clamp clip"))
register(PassThrough("activation", function=Function(order=1)), *_names("clamp_max"))
register(PassThrough("activation", gate=SQUASHED), *_names("hardtanh"))
register(
    PassThrough("activation"),
    *_names("threshold cos pow.Scalar acos arccos cosh acosh arccosh erfc sinc special_sinc"),
)
register(PassThrough("activation", function=INVERSE_ROOT), *_names("rsqrt"))
register(PassThrough("activation", function=INVERSE), *_names("reciprocal"))
register(
    Power("activation", function=Function("power", keeps_positive=True)),
    *_names("pow.Tensor_Scalar pow.Tensor_Tensor"),
)
register(
    PassThrough("scaling", at_zero="linear", function=replace(SAME, role="dropout")),
    *_names("dropout feature_dropout alpha_dropout feature_alpha_dropout"),
)
register(
    PassThrough("scaling", at_zero="linear", function=SAME, looks_like="other"),
    *_names("clone alias contiguous to _to_copy type_as lift_fresh_copy positive"),
)
register(
    PassThrough("scaling", at_zero="linear", function=Function("negative", order=-1)),
    *_names("neg negative"),
)
register(PassThrough("scaling", at_zero="linear"), *_names("rad2deg deg2rad"))
register(
    PassThrough("scaling", at_zero="zero", function=replace(SAME, role="detach")), *_names("detach")
)
register(RootMeanSquare("rmsnorm"), *_names("rms_norm"))

# The message follows the indices.
register(
    Routing(
        "view", ("self",), function=Function("expand", keeps_positive=True), looks_like="other"
    ),
    *_names("expand expand_as"),
)
register(
    Routing("view", ("self",), function=VIEW, looks_like="other"),
    *_names(
        "view reshape flatten unflatten squeeze unsqueeze permute transpose t numpy_T swapaxes "
        "swapdims movedim moveaxis view_as reshape_as select unbind broadcast_to "
        "diagonal unfold as_strided _unsafe_view mT mH adjoint ravel fliplr flipud take "
        "masked_select"
    ),
)
register(
    Routing("view", ("self",), keeps_channels=True, function=VIEW),
    *_names(
        "slice narrow split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk flip "
        "roll rot90 repeat tile repeat_interleave.self_int repeat_interleave.self_Tensor "
        "channel_shuffle pixel_shuffle pixel_unshuffle take_along_dim"
    ),
)
register(
    Routing("view", ("self",), keeps_channels=True, gathers=True, function=VIEW),
    *_names("index index_select gather"),
)
register(Concatenation("view"), *_names("cat concat concatenate"))
register(
    Routing("view", ("tensors",)),
    *_names("broadcast_tensors stack hstack vstack dstack column_stack"),
)
register(
    Routing("view", ("self", "src"), keeps_channels=True),
    *_names("select_scatter slice_scatter diagonal_scatter"),
)
register(Copy("view"), *_names("copy"))
register(Overwriting("view", ("self", "src")), *_names("scatter.src"))
register(Overwriting("view", ("self", "source")), *_names("masked_scatter index_copy"))
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
register(Filling("where", ("self",), "value", VIEW), *_names("masked_fill.Scalar"))
register(Filling("where", ("self",), "value"), *_names("scatter.value"))
register(
    Routing("where", ("self", "value"), keeps_channels=True, function=VIEW),
    *_names("masked_fill.Tensor"),
)
register(Filling("where", ("self",)), *_names("tril triu max_unpool2d max_unpool3d"))
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
_LARGEST = Function("largest", chooses=True)
register(Routing("maxpool", ("self",), function=_LARGEST), *_names("max.dim max"))
register(Routing("maxpool", ("self",), function=Function("largest")), *_names("amax"))
register(
    Routing("maxpool", ("self",), least=True, function=Function(chooses=True)),
    *_names("min.dim min"),
)
register(Routing("maxpool", ("self",), least=True), *_names("amin"))
register(
    Routing("maxpool", ("self",), by_rank=True, function=Function(chooses=True)),
    *_names("topk sort cummax cummin msort median.dim nanmedian.dim kthvalue mode"),
)
register(Routing("maxpool", ("self",), by_rank=True), *_names("median nanmedian aminmax"))
register(
    Routing("maxpool", ("self", "other"), keeps_channels=True),
    *_names("maximum fmax max.other"),
)
register(
    Routing("maxpool", ("self", "other"), keeps_channels=True, least=True),
    *_names("minimum fmin min.other"),
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
for _axes in (1, 2, 3):
    register(
        Averaging("avgpool", "self", positions=_axes),
        *_names(f"avg_pool{_axes}d adaptive_avg_pool{_axes}d"),
    )
register(
    Averaging("avgpool", "self", along=True, function=Function("mean")),
    *_names("mean.default mean.dim"),
)
register(
    Averaging("avgpool", "self", along=True, function=Function("sum")),
    *_names("sum.default sum.dim_IntList"),
)
register(Averaging("sum", "self", along=True, keeps_channels=True), *_names("cumsum"))
register(Averaging("sum", "self", keeps_channels=True), *_names("col2im"))
for _overload, _argument in (("vec", "input"), ("default", "self")):
    for _axes, _kinds in enumerate(
        (
            "upsample_linear1d",
            "upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa",
            "upsample_trilinear3d",
        ),
        start=1,
    ):
        register(
            Interpolation("interpolation", _argument, positions=_axes),
            *(f"aten.{name}.{_overload}" for name in _kinds.split()),
        )
register(Sampling(), *_names("grid_sampler grid_sampler_2d grid_sampler_3d"))
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
register(Softmax("softmax"), *_names("softmax _softmax special_softmax"))
register(LogSoftmax("activation"), *_names("log_softmax _log_softmax special_log_softmax"))
register(LogSumExp("logsumexp"), *_names("logsumexp special_logsumexp"))

# Homogeneous functions: f(x) is made of what each parent adds to first order, x_i df/dx_i.
register(
    RootOfSquares("norm", Function("norm", gate=SCALE), ("self",)),
    *_names("linalg_vector_norm norm frobenius_norm"),
)
register(RootOfSquares("spread", Function("spread", gate=SCALE), ("self",)), *_names("std"))
register(RootOfSquares("spread", Function("spread"), ("self",)), *_names("std_mean"))
register(RootOfSquares("spread", Function("mean", gate=SCALE), ("self",)), *_names("var"))
register(RootOfSquares("spread", Function("mean"), ("self",)), *_names("var_mean"))
register(LocalLinear("product"), *_names("prod cumprod"))
register(RootOfSquares("norm"), *_names("hypot"))
register(LocalLinear("quantile", passes=("self",)), *_names("quantile nanquantile"))

# Linear maps that go through complex numbers: their derivatives say all of them.
COMPLEX_LINEAR = "nrm.complex_linear"
register(LinearMap("complex"), COMPLEX_LINEAR)

# Sums of several operands.
register(Sum("sum", lambda call: (1.0, float(call["alpha"])), Function("plus")), *_names("add"))
register(Sum("sum", lambda call: (1.0, -float(call["alpha"])), Function("minus")), *_names("sub"))
register(
    Sum("sum", lambda call: (-float(call["alpha"]), 1.0), Function("minus from")), *_names("rsub")
)
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
register(MatrixProduct("product", ("mat", "vec"), addend="self"), *_names("addmv"))
register(MatrixProduct("product", "tensors"), *_names("einsum"))
GROUPED_PRODUCT = "nrm.grouped_product"
register(GroupedProduct("linear"), GROUPED_PRODUCT)

keep_as_standard()

# -- Operators without a row, of which something is known all the same.

describe(
    Function(steps=True),
    *_names("sign sgn round floor ceil trunc fix floor_divide heaviside bernoulli histc"),
)
describe(Function("lookup"), *_names("embedding"))
describe(Function("normalization"), *_names("native_layer_norm native_group_norm _fused_rms_norm"))
describe(Function(fills=0.0), *_names("zeros"))
describe(Function(fills="fill_value"), *_names("full"))
describe(Function(carries_none=True, fills=0.0), *_names("zeros_like new_zeros zero"))
describe(Function(carries_none=True, fills="fill_value"), *_names("full_like new_full"))
describe(Function(carries_none=True, fills="value"), *_names("fill"))
describe(
    Function(carries_none=True),
    *_names("ones_like empty_like rand_like randn_like new_ones new_empty"),
)
