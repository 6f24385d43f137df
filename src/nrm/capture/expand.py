"""Operators that hide a network, written out: attention, gated units, and what torch composes.

Each is replaced by the operators it stands for, so that attention weights and gates are variables
of the graph like any other, and so are the states of recurrent layers (`nrm.capture.recurrent`). A
rewrite of the captured graph only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Hashable, Sequence
from contextlib import suppress
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from nrm.capture.nodes import is_complex
from nrm.capture.recurrent import STEPS, cell, name_steps, pack, packed, pad, recurrent, unpack
from nrm.errors import UnsupportedOperatorError
from nrm.operators import Call, function_of, lookup
from nrm.operators.call import UNKNOWN
from nrm.operators.connections import for_each_axis
from nrm.operators.custom import GROUPED

aten = torch.ops.aten


def expand(graph: FxGraph, carrying: Container[Node], value: Callable[[Node], Tensor]) -> None:
    """Write out every operator of the table, in place, and what torch itself composes of others.

    Arguments:
        carrying: the nodes that may carry relevance.
        value: what a node holds for the inputs at hand. Where sequences of several lengths are
            packed it decides what is computed; `torch.export` refuses those, so that the graph is
            for these inputs alone.
    """
    traces: _Traces = {}
    for node in list(graph.nodes):
        if str(node.target) in _GROUPED:
            _in_groups(node)
        written = _TABLE.get(node.target)
        if written is not None:
            _replace(graph, node, written, value, traces)
            continue
        written = _composed(node, carrying)
        if written is not None:
            with suppress(RuntimeError, NotImplementedError):  # it is refused by name
                _replace(graph, node, written, value, traces, whole=written is convolution)
    graph.eliminate_dead_code()
    graph.lint()


_GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


def _in_groups(node: Node) -> None:
    """Make a product of rows with a matrix for each group one that any precision has.

    Others of the same operator stay, and are refused by name.
    """
    rows, matrices, *more = Call.of(node).arguments.values()
    ends, *options = more
    plain = isinstance(ends, Node) and all(option is None for option in options)
    if plain and [given.meta["val"].dim() for given in (rows, matrices)] == [2, 3]:
        node.meta.setdefault("spelled", node.target)
        node.target, node.args, node.kwargs = GROUPED, (rows, matrices, ends), {}


def _composed(node: Node, carrying: Container[Node]) -> Callable[..., Any] | None:
    """How torch composes an operator of others, where it has no row and carries relevance."""
    target = node.target
    if node not in carrying or not isinstance(target, torch._ops.OpOverload):
        return None
    if any(map(is_complex, (node, *node.all_input_nodes))):  # see `rewrite.collapse_complex`
        return None
    if target is aten.einsum.default:
        several = node.args[1]
        assert isinstance(several, list | tuple)
        return None if len(several) == 2 else target
    weight = node.args[1] if len(node.args) > 1 else None
    if target in _CONVOLUTIONS and weight in carrying:
        return convolution
    if lookup(target) is not None or function_of(node) is not UNKNOWN:
        return None
    return target if target.namespace == "aten" and target._can_decompose() else None


def _stand_ins(values: Sequence[Any]) -> list[Any]:
    """What nodes hold as tensors without values, which can be computed with together.

    An eager trace has real parameters, and activations each in a fake mode of its own.
    """
    tensors = [v for v in pytree.tree_leaves(list(values)) if isinstance(v, FakeTensor)]
    modes = list(dict.fromkeys(tensor.fake_mode for tensor in tensors))
    if not modes:
        return list(values)
    mode = modes[0] if len(modes) == 1 else FakeTensorMode(allow_fallback_kernels=True)

    def stand_in(value: Any) -> Any:
        if not isinstance(value, Tensor) or (isinstance(value, FakeTensor) and len(modes) == 1):
            return value
        if not isinstance(value, FakeTensor):
            return mode.from_tensor(value)
        with mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            )

    return [pytree.tree_map(stand_in, value) for value in values]


def _apart(values: Sequence[Any]) -> list[Any]:
    """With a tensor of its own for each: nodes written from one trace have one in common."""
    seen: set[int] = set()
    found = []
    for value in values:
        met = isinstance(value, Tensor) and id(value) in seen
        found.append(value.detach() if met else value)
        seen.add(id(value))
    return found


def _replace(
    graph: FxGraph,
    node: Node,
    written: Callable[..., Any],
    value: Callable[[Node], Tensor],
    traces: _Traces,
    whole: bool = True,
) -> None:
    """Put the operators of `written` in a node's place, traced on its (fake) arguments.

    Arguments:
        traces: those of the graph so far.
        whole: operators that torch composes of others are recorded as they are.
    """
    given: Any = node.args
    if node.target in _BY_SIZES:  # the second argument says how many there are at each step
        assert isinstance(given[1], Node)
        given = (given[0], value(given[1]).tolist(), *given[2:])
    writing = _Writing(graph, node, traces, whole)
    if node.target in _BY_STEPS:
        result = written(writing, *given, **node.kwargs)
    else:
        result = writing(written, *given, **node.kwargs)
    name_steps(node, writing.new)
    if node.target is aten.scaled_dot_product_attention.default:
        # What it was, for those who need only its result and its derivative.
        result.meta["fused"] = (node.target, node.args, node.kwargs)
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    for user in list(node.users):  # a getitem takes one of several results
        assert user.target is operator.getitem
        assert isinstance(result, list | tuple)
        picked = result[user.args[1]]  # type: ignore[index]
        if picked is None:  # it stays as it is
            continue
        user.replace_all_uses_with(picked)
        graph.erase_node(user)
    if not node.users:
        graph.erase_node(node)


_Traces = dict[Hashable, FxGraph]
"""What functions compute, by the function and how its arguments look."""


class _Writing:
    """Writes what functions of tensors compute into a graph, in the place of one of its nodes.

    A function is traced once for all arguments that look the same: tracing with free sizes takes
    long, and the layers of a network, and the steps of a recurrence, mostly differ in nothing else.

    Attributes:
        new: the nodes written.
    """

    def __init__(self, graph: FxGraph, node: Node, traces: _Traces, whole: bool) -> None:
        self.graph, self.node, self.traces, self.whole = graph, node, traces, whole
        self.new: list[Node] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The nodes of what a function gives for nodes and constants."""
        leaves, layout = pytree.tree_flatten((args, kwargs))
        given = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Node)))
        key = self._key(function, leaves, given, str(layout))
        traced = self.traces.get(key)
        if traced is None:
            traced = self._trace(function, leaves, given, layout)
            if key is not None:
                self.traces[key] = traced
        outer = dict(zip(traced.find_nodes(op="placeholder"), given, strict=True))
        with self.graph.inserting_before(self.node):
            for inner in traced.nodes:
                if inner.op not in ("placeholder", "output"):
                    written = self.graph.node_copy(inner, outer.__getitem__)
                    written.meta["nn_module_stack"] = self.node.meta.get("nn_module_stack", {})
                    outer[inner] = written
                    self.new.append(written)
        return torch.fx.node.map_arg(traced.output_node().args[0], outer.__getitem__)

    def _trace(
        self, function: Callable[..., Any], leaves: list[Any], given: list[Node], layout: Any
    ) -> FxGraph:
        places = [given.index(leaf) if isinstance(leaf, Node) else None for leaf in leaves]

        def on_tensors(*tensors: Any) -> Any:
            filled = [
                leaf if place is None else tensors[place]
                for leaf, place in zip(leaves, places, strict=True)
            ]
            args, kwargs = pytree.tree_unflatten(filled, layout)
            return function(*args, **kwargs)

        stand_ins = _apart(_stand_ins([node.meta["val"] for node in given]))
        with torch.no_grad():
            return make_fx(on_tensors, pre_dispatch=self.whole)(*stand_ins).graph

    def _key(
        self, function: Callable[..., Any], leaves: list[Any], given: list[Node], layout: str
    ) -> Hashable:
        """What decides the operators; `None` where that cannot be told."""
        values = [node.meta["val"] for node in given]
        if not any(isinstance(value, FakeTensor) for value in values):
            return None  # real ones are traced as they are
        try:
            looks = tuple(map(_looks, values))
            places = tuple(
                ("at", given.index(leaf)) if isinstance(leaf, Node) else _constant(leaf)
                for leaf in leaves
            )
        except TypeError:
            return None
        return (function, self.whole, layout, looks, places)


def _looks(value: Any) -> Hashable:
    """What an operator knows of a value without its contents.

    Raises:
        TypeError: it may know more.
    """
    if isinstance(value, torch.SymInt):
        return ("size", value.node.expr)
    if not isinstance(value, Tensor):
        return _constant(value)
    if value.layout is not torch.strided:
        raise TypeError
    sizes = (
        s.node.expr if isinstance(s, torch.SymInt) else s for s in (*value.shape, *value.stride())
    )
    return (value.dtype, value.device, value.is_conj(), value.is_neg(), value.dim(), *sizes)


def _constant(value: Any) -> Hashable:
    if isinstance(value, bool | int | float | str | NoneType) or callable(value):
        return (type(value), value if callable(value) else repr(value))
    if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
        return value
    raise TypeError


# -- what other operators stand for -------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`."""
    if enable_gqa and query.shape[-3] > key.shape[-3]:
        value = value.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = _products(query, key, scale, enable_gqa)
    if is_causal:
        allowed = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()  # fake as they are
        scores = scores.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask
        # Where all is masked, the result is zero and not NaN.
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    else:
        weights = scores.softmax(-1)
    return torch.matmul(torch.dropout(weights, dropout_p, dropout_p > 0), value)


def attention_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> list[Tensor]:
    """What `attention` adds up before its softmax: products, and products with a mask."""
    scores = _products(query, key, scale, enable_gqa)
    if attn_mask is None or attn_mask.dtype is torch.bool:
        return [scores]
    return [scores, scores + attn_mask]


def _products(query: Tensor, key: Tensor, scale: float | None, enable_gqa: bool) -> Tensor:
    groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    if groups > 1:
        key = key.repeat_interleave(groups, -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.matmul(query * scale, key.transpose(-2, -1))


def gated_linear_unit(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


def bags(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, ...]:
    """`torch.nn.functional.embedding_bag` as embeddings, each added to its bag."""
    if mode > 1:
        raise UnsupportedOperatorError("no rule covers embedding bags with mode='max'.")
    if include_last_offset:
        offsets = offsets[:-1]
    embedded = torch.nn.functional.embedding(indices, weight)
    counted = torch.ones_like(indices, dtype=weight.dtype)
    if padding_idx is not None and padding_idx >= 0:
        counted = counted * (indices != padding_idx)
    if per_sample_weights is not None:
        embedded = embedded * per_sample_weights.unsqueeze(-1)
    embedded = embedded * counted.unsqueeze(-1)
    places = torch.ones_like(indices).cumsum(0) - 1
    bag = torch.bucketize(places, offsets, right=True) - 1
    # Without sizes, which may be free.
    empty = torch.zeros_like(offsets, dtype=weight.dtype).unsqueeze(-1).repeat(1, weight.shape[1])
    total = empty.index_add(0, bag, embedded)
    if mode == 1:
        sizes = torch.zeros_like(offsets, dtype=weight.dtype).index_add(0, bag, counted)
        total = total / sizes.clamp(min=1).unsqueeze(-1)
    return total, bag, bag, bag


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    x1 = x1 / x1.norm(dim=dim, keepdim=True).clamp_min(eps)
    x2 = x2 / x2.norm(dim=dim, keepdim=True).clamp_min(eps)
    return (x1 * x2).sum(dim)


def bilinear(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.bilinear`: a linear map of one input, multiplied with the other."""
    mapped = torch.einsum("...i,oij->...oj", x1, weight)
    output = torch.matmul(mapped, x2.unsqueeze(-1)).squeeze(-1)
    return output if bias is None else output + bias


def distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """`torch.cdist`: the norms of all differences."""
    apart = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    found: Tensor = torch.linalg.vector_norm(apart, p, -1)
    return found


def log_of_sum(a: Tensor, b: Tensor) -> Tensor:
    """`torch.logaddexp`."""
    a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    return torch.stack([a, b]).logsumexp(0)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """A convolution whose weight is computed from the input: a product with patches."""
    axes = weight.dim() - 2
    kernel = weight.shape[2:]
    strides, steps = (for_each_axis(given, axes) for given in (stride, dilation))
    reach = [step * (size - 1) for step, size in zip(steps, kernel, strict=True)]
    if padding == "same":
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        given = (0,) if isinstance(padding, str) else padding
        sides = [(side, side) for side in for_each_axis(given, axes)]
    single = x.dim() == weight.dim() - 1
    x = x.unsqueeze(0) if single else x
    if any(map(any, sides)):
        x = torch.nn.functional.pad(x, [side for pair in reversed(sides) for side in pair])
    for axis in range(axes):
        x = x.unfold(2 + axis, reach[axis] + 1, strides[axis])[..., :: steps[axis]]
    batch, positions = x.shape[0], x.shape[2 : 2 + axes]
    # [batch, groups, inputs of one and kernel, positions]
    order = [0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes)]
    patches = x.permute(order).reshape(batch, groups, -1, math.prod(positions))
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    output = torch.matmul(rows, patches).reshape(batch, weight.shape[0], *positions)
    if bias is not None:
        output = output + bias.view(-1, *(1,) * axes)
    return output.squeeze(0) if single else output


_CONVOLUTIONS = frozenset(
    getattr(getattr(aten, f"conv{axes}d"), kind)
    for axes in (1, 2, 3)
    for kind in ("default", "padding")
)

_TABLE: dict[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.glu.default: gated_linear_unit,
    aten.embedding_bag.padding_idx: bags,
    aten.embedding_bag.default: bags,
    aten.cosine_similarity.default: cosine_similarity,
    aten.bilinear.default: bilinear,
    aten.cdist.default: distances,
    aten.dist.default: lambda a, b, p=2: torch.linalg.vector_norm(a - b, p),
    aten.trace.default: lambda x: x.diagonal().sum(),
    aten.logaddexp.default: log_of_sum,
    aten.addcdiv.default: lambda x, a, b, *, value=1: x + a / b * value,
    aten.addcmul.default: lambda x, a, b, *, value=1: x + a * b * value,
    aten.lerp.Scalar: lambda a, b, weight: a * (1 - weight) + b * weight,
    aten.lerp.Tensor: lambda a, b, weight: a * (1 - weight) + b * weight,
    aten.pad_sequence.default: pad,
    aten._pack_padded_sequence.default: pack,
    aten._pad_packed_sequence.default: unpack,
    **{getattr(aten, name).input: recurrent(step) for name, step in STEPS.items()},
    **{getattr(aten, name).data: packed(step) for name, step in STEPS.items()},
    **{getattr(aten, f"{name}_cell").default: cell(step) for name, step in STEPS.items()},
}

_BY_SIZES = frozenset(
    [
        aten._pack_padded_sequence.default,
        aten._pad_packed_sequence.default,
        *(getattr(aten, name).data for name in STEPS),
    ]
)
"""Operators that read sequences of several lengths."""

_BY_STEPS = frozenset(
    getattr(getattr(aten, name), kind) for name in STEPS for kind in ("input", "data")
)
"""Operators that are written function by function, because their steps look the same."""
