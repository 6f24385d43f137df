"""What scales and shifts the channels of a layer by constants, taken into the layer's weights.

Batch norm in evaluation mode, and the same written out: a rewrite of the captured graph, never of
the model. The layer then computes what the last of them gave, and they become identities, so that
rules act on the weights that all have together, however they are spelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import Node

from nrm.operators import Call, lookup
from nrm.operators.batch_norm import BatchNorm, scale_and_shift, statistics
from nrm.operators.layers import Layer

Step = tuple[Any, ...]
"""A scale and shift: its name, and what `_affine` takes beside it: nodes, numbers and tensors."""


@dataclass(frozen=True)
class _Link:
    """One operator after a layer.

    Attributes:
        matters: it may change shares. A positive number that scales all alike does not, nor does a
            number that is added, which stays a bias of its own.
        shifts: it adds something.
    """

    node: Node
    step: Step
    matters: bool
    shifts: bool


def fold_constants(graph: FxGraph, inputs: Sequence[Node]) -> None:
    """Fold what scales or shifts the channels of a layer that nothing else reads.

    Arguments:
        inputs: the placeholders of the model's inputs.
    """
    depending = set(inputs)  # also on their sizes
    for node in graph.nodes:
        if not depending.isdisjoint(node.all_input_nodes):
            depending.add(node)
    for layer in list(graph.nodes):
        if not _has_row(layer, Layer):
            continue
        call = Call.of(layer)
        if call["weight"] in depending or call["bias"] in depending:
            continue
        chain = _chain(layer, call, depending)
        while chain and not chain[-1].matters:
            del chain[-1]
        if chain:
            _fold(graph, layer, call, chain)
    graph.lint()


def folded_weight(weight: Tensor, bias: Tensor | None, steps: Sequence[Step]) -> Tensor:
    """The layer's weight with the scales of all steps."""
    for step in steps:
        scale, _ = _affine(*step)
        weight = weight * scale.view((-1,) + (1,) * (weight.dim() - 1))
    return weight


def folded_bias(weight: Tensor, bias: Tensor | None, steps: Sequence[Step]) -> Tensor:
    """The layer's bias after all steps."""
    for step in steps:
        scale, shift = _affine(*step)
        bias = shift if bias is None else bias * scale + shift
    assert bias is not None
    # One number for all channels is a bias of each.
    return bias.expand(weight.shape[0]) if bias.numel() == 1 else bias


def _affine(name: str, *given: Any) -> tuple[Tensor, Tensor]:
    """`[channels]` or `[1]` each: what is multiplied by, and what is added then."""
    if name == "batch_norm":
        return scale_and_shift(*given)
    constant, sign = given
    value = torch.as_tensor(constant).reshape(-1)
    nothing, one = torch.zeros_like(value), torch.ones_like(value)
    if name == "mul":
        return value, nothing
    if name == "div":
        return 1 / value, nothing
    scale, factor = sign
    return scale * one, factor * value


def _chain(layer: Node, call: Call, depending: set[Node]) -> list[_Link]:
    """The operators after a layer, each the only reader of the one before, that can be folded."""
    found: list[_Link] = []
    source = layer
    while len(source.users) == 1:
        (node,) = source.users
        link = _batch_norm(node, source, call) or _arithmetic(node, source, call)
        if link is None or any(parent in depending for parent in _nodes(link.step)):
            break
        found.append(link)
        source = node
    return found


def _batch_norm(node: Node, source: Node, layer: Call) -> _Link | None:
    if not _has_row(node, BatchNorm) or node.args[0] is not source:
        return None
    norm = Call.of(node)
    if norm.get("training") or norm["running_mean"] is None:
        return None  # refused by name when the graph is built
    if source.meta["val"].dim() - _channels_from_end(layer) != 1:
        return None  # the norm's channels are another axis than the layer's
    return _Link(node, ("batch_norm", *statistics(norm).values()), matters=True, shifts=True)


def _arithmetic(node: Node, source: Node, layer: Call) -> _Link | None:
    """A product or sum with a number, or with one for each channel."""
    name = _NAMES.get(str(node.target).partition(".")[2].partition(".")[0])
    if name == "neg":
        return _Link(node, ("mul", -1.0, None), matters=True, shifts=False)
    if name is None or len(node.args) != 2 or set(node.kwargs) - {"alpha"}:
        return None
    place = 0 if node.args[0] is source else 1
    other = node.args[1 - place]
    alpha = node.kwargs.get("alpha", 1)
    if name == "div" and place == 1:
        return None
    if isinstance(other, Node):
        fits = other is not source and _by_channel(other, node, source, layer)
    else:
        fits = isinstance(other, int | float) and (name not in ("mul", "div") or other != 0)
    if not fits or not isinstance(alpha, int | float):
        return None
    if name in ("mul", "div"):
        matters = isinstance(other, Node) or bool(other < 0)  # type: ignore[operator]
        return _Link(node, (name, other, None), matters, shifts=False)
    # Of `self` and `alpha * other`, one is the layer.
    signs = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[name]
    scale, factor = signs[place], signs[1 - place]
    matters = isinstance(other, Node) or scale < 0
    return _Link(node, ("add", other, (scale, factor)), matters, shifts=True)


_NAMES = {
    **{name: name for name in ("neg", "mul", "div", "add", "sub", "rsub")},
    "multiply": "mul",
    **dict.fromkeys(["divide", "true_divide"], "div"),
}


def _by_channel(constant: Node, node: Node, source: Node, layer: Call) -> bool:
    """Whether a tensor has one entry, or one for each of the layer's channels."""
    value, weight = constant.meta.get("val"), layer["weight"].meta["val"]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if value.dim() > source.meta["val"].dim() or node.meta["val"].dtype != weight.dtype:
        return False
    axis = _channels_from_end(layer)
    return all(
        isinstance(size, int) and (size == 1 or (place == axis and size == weight.shape[0]))
        for place, size in enumerate(reversed(value.shape), start=1)
    )


def _fold(graph: FxGraph, layer: Node, call: Call, chain: Sequence[_Link]) -> None:
    steps = tuple(link.step for link in chain)
    _bring_forward(graph, layer, _nodes(steps))
    has_bias = call["bias"] is not None or any(link.shifts for link in chain)
    given = (call["weight"], call["bias"], steps)
    with graph.inserting_before(layer):
        weight = graph.call_function(folded_weight, given)
        bias = graph.call_function(folded_bias, given) if has_bias else None
    weight.meta["val"] = call["weight"].meta["val"]
    if bias is not None:
        bias.meta["val"] = weight.meta["val"].new_empty(weight.meta["val"].shape[0])
    arguments = call.arguments | {"weight": weight, "bias": bias}
    layer.args, layer.kwargs = tuple(arguments.values()), {}
    source = layer
    for link in chain:
        link.node.meta.setdefault("spelled", link.node.target)  # its name stays
        link.node.target = torch.ops.aten.alias.default
        link.node.args, link.node.kwargs = (source,), {}
        source = link.node


def _bring_forward(graph: FxGraph, layer: Node, constants: Iterable[Node]) -> None:
    """Compute constants before a layer, where the model does after it."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    late: set[Node] = set()
    waiting = list(constants)
    while waiting:
        node = waiting.pop()
        if place[node] > place[layer] and node not in late:
            late.add(node)
            waiting.extend(node.all_input_nodes)
    for node in sorted(late, key=place.__getitem__):
        layer.prepend(node)


def _nodes(step: Sequence[Any]) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(step, found.append)
    return found


def _channels_from_end(layer: Call) -> int:
    return max(int(layer["weight"].meta["val"].dim()) - 1, 1)


def _has_row(node: Node, kind: type) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and isinstance(lookup(node.target), kind)
