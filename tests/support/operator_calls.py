"""A small call of every operator that the library has a row for, by the name of the row."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nrm.operators import COMPLEX_LINEAR

aten = torch.ops.aten


@dataclass(frozen=True)
class Example:
    """One call: the operator, its arguments, and which of them depend on the model's input."""

    target: Any
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    carries: tuple[str, ...] | None = None

    def __str__(self) -> str:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in self.args]
        return f"{self.target}{tuple(shapes)}"


def x(*shape: int, seed: int = 0) -> Tensor:
    """Values of both signs, none like another."""
    draw = torch.Generator().manual_seed(seed + 100 * len(shape) + math.prod(shape))
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    """Values between 0.1 and 0.9."""
    return 0.1 + 0.8 * torch.rand(
        shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def whole(*numbers: Any) -> Tensor:
    return torch.tensor(numbers)


MASK = whole([True, False, True], [False, False, True])
INDEX = whole([0, 2, 0], [1, 1, 2])

EXAMPLES: dict[str, list[Example]] = {}
"""By the name that the row was registered by; several where one row has several faces."""


def add(name: str, *args: Any, overload: str = "default", **more: Any) -> None:
    carries, options = more.pop("carries", None), more
    packet, _, said = name.partition(".")
    target = getattr(getattr(aten, packet), said or overload)
    EXAMPLES.setdefault(f"aten.{name}", []).append(Example(target, args, options, carries))


def add_all(names: str, *args: Any, **more: Any) -> None:
    for name in names.split():
        add(name, *args, **more)


# One parent for each neuron.
add_all(
    "relu leaky_relu abs relu6 selu celu hardshrink softshrink erf sin atan elu gelu silu mish "
    "hardswish tanh expm1 square sigmoid special_expit hardsigmoid log_sigmoid softplus exp "
    "nan_to_num hardtanh cos reciprocal clone alias contiguous _to_copy "
    "lift_fresh_copy positive neg detach "
    "special_erf arctan tan sinh asinh arcsinh absolute exp2 special_exp2 cosh erfc sinc "
    "special_sinc negative rad2deg deg2rad",
    x(2, 3),
)
add_all("asin arcsin acos arccos atanh arctanh erfinv special_erfinv", positive(2, 3))
add_all("acosh arccosh", 1 + positive(2, 3))
add_all("log1p sqrt log log2 log10 logit special_logit rsqrt", positive(2, 3))
add("prelu", x(2, 3), whole(0.1, 0.2, 0.3).double(), carries=("self",))
add("rrelu", x(2, 3))
add_all("dropout feature_dropout alpha_dropout feature_alpha_dropout", x(2, 3), 0.5, False)
add("clamp_min", x(2, 3), -0.2)
add("clamp_max", x(2, 3), 0.2)
add_all("clamp clip", x(2, 3), -0.2, 0.3)
add("clamp", x(2, 3), x(2, 3, seed=7) - 3, None, overload="Tensor", carries=("self",))
add("threshold", x(2, 3), 0.1, 0.4)
add("pow.Scalar", 2.0, x(2, 3))
for _exponent in (0.5, -0.5, 2, 3.0):
    add("pow.Tensor_Scalar", positive(2, 3), _exponent)
add("pow.Tensor_Tensor", positive(2, 3), x(3), carries=("self",))
add("pow.Tensor_Tensor", positive(3), x(2, 3), carries=("exponent",))
add("to", x(2, 3), torch.float64, overload="dtype")
add("type_as", x(2, 3), x(2, 3, seed=1), carries=("self",))
add("rms_norm", x(2, 3), [3], None, 0.5)
add("copy", torch.zeros(2, 3, dtype=torch.float64), x(1, 3), carries=("src",))

# The message follows the indices.
add("expand", x(2, 1), [2, 3])
add_all("expand_as", x(2, 1), x(2, 3), carries=("self",))
add_all("view reshape _unsafe_view", x(2, 3), [3, 2])
add("flatten", x(2, 3, 2), 1, overload="using_ints")
add("unflatten", x(2, 6), 1, [2, 3], overload="int")
add("squeeze", x(2, 1, 3), 1, overload="dim")
add("unsqueeze", x(2, 3), 1)
add("permute", x(2, 3, 2), [2, 0, 1])
add("transpose", x(2, 3), 0, 1, overload="int")
add_all("swapaxes swapdims", x(2, 3), 0, 1)
add_all("movedim moveaxis", x(2, 3, 2), 0, 1, overload="int")
add_all("t numpy_T mT mH adjoint", x(2, 3))
add_all("view_as reshape_as", x(2, 3), x(3, 2), carries=("self",))
add("select", x(2, 3), 1, 2, overload="int")
add("unbind", x(2, 3), 1, overload="int")
add("broadcast_to", x(1, 3), [2, 3])
add("diagonal", x(3, 3))
add("unfold", x(2, 5), 1, 3, 1)
add("as_strided", x(2, 3), [2, 2], [3, 1])
add("slice", x(2, 5), 1, 1, 5, 2, overload="Tensor")
add("narrow", x(2, 5), 1, 1, 3)
add("split", x(2, 4), 2, 1, overload="Tensor")
add_all("split_with_sizes", x(2, 5), [2, 3], 1)
add_all("chunk unsafe_chunk", x(2, 4), 2, 1)
add("tensor_split", x(2, 4), 2, 1, overload="sections")
add("unsafe_split", x(2, 4), 2, 1, overload="Tensor")
add("flip", x(2, 3), [1])
add("roll", x(2, 3), [1], [1])
add("rot90", x(2, 3))
add_all("repeat tile", x(2, 3), [1, 2])
add("repeat_interleave.self_int", x(2, 3), 2, 1)
add("repeat_interleave.self_Tensor", x(2, 3), whole(1, 2, 1), 1)
add("channel_shuffle", x(1, 4, 2, 1), 2)
add("pixel_shuffle", x(1, 4, 2, 1), 2)
add("pixel_unshuffle", x(1, 1, 2, 4), 2)
add("index", x(2, 3), [None, whole(2, 0, 0)], overload="Tensor", carries=("self",))
add("index_select", x(2, 3), 1, whole(2, 0, 0))
add_all("gather", x(2, 3), 1, INDEX)
add("take_along_dim", x(2, 3), INDEX, 1)
add_all("ravel fliplr flipud", x(2, 3))
add("take", x(2, 3), whole(2, 0, 5, 2))
add("masked_select", x(2, 3), MASK)
add_all("cat concat concatenate", [x(2, 3), x(2, 2)], 1)
add("stack", [x(2, 3), x(2, 3, seed=1)], 1)
add("broadcast_tensors", [x(2, 3), x(2, 3, seed=1)])
add_all("dstack column_stack", [x(2, 3), x(2, 3, seed=1)])
add_all("hstack vstack", [x(2, 3), x(2, 3, seed=1)])
add("select_scatter", x(2, 3), x(2, seed=1), 1, 1)
add("slice_scatter", x(2, 3), x(2, 2, seed=1), 1, 0, 2)
add("diagonal_scatter", x(3, 3), x(3, seed=1))
add("scatter.src", x(2, 3), 1, INDEX, x(2, 3, seed=1))
add("index_put", x(2, 3), [whole(0, 1), whole(1, 1)], x(2, seed=1))
add("index_put", x(2, 3), [whole(0, 0), whole(1, 1)], x(2, seed=1), True)
add("masked_scatter", x(2, 3), MASK, x(4, seed=1))
add("index_copy", x(2, 3), 1, whole(2, 0), x(2, 2, seed=1))
add("max_unpool2d", x(1, 1, 1, 2), whole(2, 5).view(1, 1, 1, 2), [2, 4])
add(
    "max_unpool3d",
    x(1, 1, 1, 1, 2),
    whole(2, 5).view(1, 1, 1, 1, 2),
    [1, 2, 4],
    [1, 2, 2],
    [0, 0, 0],
)
add("where.self", MASK, x(2, 3), x(2, 3, seed=1))
add("where.ScalarOther", MASK, x(2, 3), 0.0)
add("where.ScalarOther", MASK, x(2, 3), 2.0)
add("where.ScalarSelf", MASK, 2.0, x(2, 3))
add("masked_fill.Scalar", x(2, 3), MASK, 0.0)
add("masked_fill.Tensor", x(2, 3), MASK, x(1).reshape(()))
add("scatter.value", x(2, 3), 1, INDEX, 2.0)
add_all("tril triu", x(3, 3))
add("im2col", x(1, 1, 3, 3), [2, 2], [1, 1], [1, 1], [2, 2])
add("constant_pad_nd", x(2, 3), [1, 1], 0.5)
add("pad", x(2, 3), [1, 1], "constant", 0.0)
add("pad", x(1, 1, 3), [1, 1], "reflect")
for _axes in (1, 2, 3):
    _shape = (1, 2, *[3] * _axes) if _axes < 3 else (1, 1, 2, 2, 3)
    _pads = [1] * (2 * _axes)
    add_all(f"reflection_pad{_axes}d replication_pad{_axes}d", x(*_shape), _pads)
    _all = [2] * _axes
    _large = (1, 2, *[4] * _axes) if _axes < 3 else (1, 1, 2, 4, 2)
    for _name in (f"max_pool{_axes}d", f"max_pool{_axes}d_with_indices"):
        add(_name, x(*_large), _all, [1] * _axes if _axes == 1 else _all)
    add(f"adaptive_max_pool{_axes}d", x(*_large), [1, 2, 2][:_axes] if _axes > 1 else [3])
    _small = (1, 1, *[2] * _axes)
    _sizes = [3] * _axes
    add_all(f"upsample_nearest{_axes}d _upsample_nearest_exact{_axes}d", x(*_small), _sizes)
add_all("max.dim min.dim", x(2, 3), 1)
add_all("max min", x(2, 3))
add_all("amax amin", x(2, 3), [1])
add("topk", x(2, 4), 2, 1)
add("sort", x(2, 3), 1)
add_all("cummax cummin median.dim nanmedian.dim mode", x(2, 3), 1)
add("kthvalue", x(2, 3), 2, 1)
add_all("msort median nanmedian aminmax", x(3, 2))
add_all("maximum fmax max.other minimum fmin min.other", x(2, 3), x(2, 3, seed=1))

# Weighted sums.
add("conv1d", x(2, 2, 4), x(3, 2, 2), x(3), [2], [1])
add("conv1d", x(2, 2, 4), x(3, 2, 2), None, [1], "same", overload="padding")
add("conv1d", x(1, 2, 4), x(2, 1, 2), None, [1], [0], [1], 2)
add("conv2d", x(1, 2, 3, 3), x(2, 2, 2, 2), x(2), [1, 1], [1, 1])
add("conv2d", x(1, 2, 3, 4), x(4, 1, 2, 2), None, [1, 1], [0, 0], [2, 1], 2)
add("conv3d", x(1, 1, 2, 2, 3), x(2, 1, 2, 1, 2), x(2))
add("conv_transpose1d", x(1, 2, 3), x(2, 2, 2), x(2), [2])
add("conv_transpose1d", x(1, 2, 2), x(2, 1, 1), None, [2])
add("conv_transpose2d", x(1, 2, 2, 2), x(2, 1, 2, 2), None, [1, 1], overload="input")
add("conv_transpose3d", x(1, 1, 2, 1, 2), x(1, 2, 1, 2, 2), None, overload="input")
add("linear", x(2, 3), x(4, 3), x(4))
add("linear", x(2, 2, 3), x(1, 3))
add("avg_pool1d", x(1, 2, 4), [2], [1], [1])
add("avg_pool2d", x(1, 1, 3, 3), [2, 2], [1, 1], [1, 1], False, False)
add("avg_pool3d", x(1, 1, 2, 2, 2), [2, 1, 2])
add("adaptive_avg_pool1d", x(1, 2, 5), [2])
add("adaptive_avg_pool2d", x(1, 1, 3, 4), [2, 2])
add("adaptive_avg_pool3d", x(1, 1, 2, 3, 2), [1, 2, 1])
add_all("mean.default sum.default", x(2, 3))
add_all("mean.dim sum.dim_IntList", x(2, 3, 2), [1])
add_all("mean.dim sum.dim_IntList", x(2, 3, 2), [-1, 0], True)
add("cumsum", x(2, 3), 1)
add("col2im", x(1, 4, 4), [3, 3], [2, 2], [1, 1], [0, 0], [1, 1])
add("upsample_linear1d.default", x(1, 1, 3), [5], False)
add("upsample_linear1d.vec", x(1, 1, 3), [5], True, None)
for _name in ("upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d",
              "_upsample_bicubic2d_aa"):  # fmt: skip
    add(f"{_name}.default", x(1, 1, 2, 3), [3, 4], False)
    add(f"{_name}.vec", x(1, 1, 2, 3), [3, 4], False, None)
add("upsample_trilinear3d.default", x(1, 1, 2, 1, 2), [3, 1, 3], False)
add("upsample_trilinear3d.vec", x(1, 1, 2, 1, 2), [3, 1, 3], False, None)
for _mode, _padding in ((0, 0), (0, 1), (1, 0), (2, 2)):
    add_all("grid_sampler grid_sampler_2d", x(2, 2, 3, 3), 1.2 * x(2, 2, 2, 2, seed=3) / 2, _mode,
            _padding, False, carries=("input",))  # fmt: skip
add("grid_sampler_3d", x(1, 1, 2, 2, 3), x(1, 1, 2, 1, 3) / 2, 0, 0, False, carries=("input",))
add_all("batch_norm", x(2, 3, 2), positive(3), x(3), x(3, seed=1), positive(3), False, 0.1, 1e-5,
        False)  # fmt: skip
add("_native_batch_norm_legit_no_training", x(2, 3, 2), positive(3), x(3), x(3, seed=1),
    positive(3), 0.1, 1e-5)  # fmt: skip
add("layer_norm", x(2, 4), [4], x(4), x(4, seed=1), 0.5)
add("group_norm", x(1, 4, 2), 2, x(4), x(4, seed=1), 0.5)
add("instance_norm", x(1, 2, 4), x(2), x(2, seed=1), None, None, True, 0.1, 0.5, False)
add("instance_norm", x(1, 2, 3), x(2), None, x(2, seed=1), positive(2), False, 0.1, 1e-5, False)
add("softmax", x(2, 3), 1, overload="int")
add("special_softmax", x(2, 3), 1)
add("_softmax", x(2, 3), 1, False)
add("log_softmax", x(2, 3), 1, overload="int")
add("special_log_softmax", x(2, 3), 1)
add("_log_softmax", x(2, 3), 1, False)
add_all("logsumexp special_logsumexp", x(2, 3), [1])
add("linalg_vector_norm", x(2, 3), 2, [1])
add("linalg_vector_norm", x(2, 3), 3, [0], True)
add("norm", x(2, 3), 1, [1], overload="ScalarOpt_dim")
add("frobenius_norm", x(2, 3), [1], overload="dim")
add_all("std std_mean var var_mean", x(2, 3), [1], overload="correction", correction=1)
add("prod", x(2, 3), 1, overload="dim_int")
add("cumprod", x(2, 3), 1)
add("hypot", x(2, 3), x(2, 3, seed=1))
add_all("quantile nanquantile", x(2, 3), 0.3, 1, overload="scalar")


class Fourier(nn.Module):
    """A linear map that goes through complex numbers."""

    def forward(self, given: Tensor) -> Tensor:
        return torch.fft.fft(given).real


EXAMPLES[COMPLEX_LINEAR] = [Example(Fourier(), (x(1, 3),))]

# Sums of several operands, and products.
add_all("add sub rsub", x(2, 3), x(1, 3), overload="Tensor", alpha=2.0)
add_all("add sub rsub", x(2, 3), x(1, 3), overload="Tensor", carries=("self",))
add_all("add sub rsub", x(2, 3), x(1, 3), overload="Tensor", carries=("other",))
add("scatter_add", x(2, 3), 1, INDEX, x(2, 3, seed=1))
add("scatter_add", x(2, 3), 1, INDEX, x(2, 3, seed=1), carries=("src",))
add("index_add", x(2, 3), 1, whole(0, 0), x(2, 2), alpha=2.0)
for _how in ("sum", "mean", "amax", "amin"):
    add("scatter_reduce", x(2, 3), 1, INDEX, x(2, 3, seed=1), _how, overload="two")
add("scatter_reduce", x(2, 3), 1, INDEX, x(2, 3, seed=1), "sum", overload="two",
    include_self=False, carries=("src",))  # fmt: skip
add_all("mul multiply", x(2, 3), x(1, 3), overload="Tensor")
add_all("mul multiply div divide true_divide", x(2, 3), x(1, 3), overload="Tensor",
        carries=("self",))  # fmt: skip
add_all("div divide true_divide", x(2, 3), x(2, 3, seed=1), overload="Tensor")
add_all("div divide true_divide", x(2, 3), x(2, 3, seed=1), overload="Tensor", carries=("other",))
add_all("matmul mm", x(2, 3), x(3, 2))
add_all("matmul mm", x(2, 3), x(3, 2), carries=("self",))
add_all("matmul mm", x(2, 3), x(3, 2), carries=("other", "mat2"))
add_all("matmul bmm", x(2, 2, 3), x(2, 3, 1))
add("mv", x(2, 3), x(3))
add("dot", x(3), x(3, seed=1))
add("addmm", x(2), x(2, 3), x(3, 2), beta=0.5, alpha=2.0, carries=("mat1",))
add("addmm", x(2), x(2, 3), x(3, 2), carries=("mat1", "mat2"))
add("addmv", x(2), x(2, 3), x(3), carries=("mat",))
add("baddbmm", x(2, 2, 1), x(2, 2, 3), x(2, 3, 1), carries=("batch1", "batch2"))
add("einsum", "bik,bkj->bij", [x(2, 2, 3), x(2, 3, 1)])
