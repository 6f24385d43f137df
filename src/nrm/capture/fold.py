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

from nrm.capture.nodes import dependents
from nrm.operators import Call, Operator, lookup
from nrm.operators.functions import ALIAS, Rescaling
from nrm.operators.sums import scale_and_shift

Step = tuple[Any, ...]
"""A scale and shift (`Rescaling.step`), as an argument of a node."""


def fold_constants(graph: FxGraph, inputs: Sequence[Node]) -> None:
    """Fold what scales or shifts the channels of a layer that nothing else reads.

    Arguments:
        inputs: the placeholders of the model's inputs.
    """
    depending = dependents(graph.nodes, inputs)  # also on their sizes
    for layer in list(graph.nodes):
        row = _row(layer)
        if row is None or not row.is_layer:
            continue
        call = Call.of(layer)
        if call["weight"] in depending or call["bias"] in depending:
            continue
        links = _links(layer, call, depending)
        while links and not links[-1].rescaling.matters:
            del links[-1]
        if links:
            _fold(graph, layer, call, links)
    graph.lint()


# -- what the folded graph computes --------------------------------------------------------------


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


def _affine(kind: str, *given: Any) -> tuple[Tensor, Tensor]:
    """`[channels]` or `[1]` each: what is multiplied by, and what is added then."""
    if kind == "norm":
        return scale_and_shift(*given)
    constant, *signs = given
    value = torch.as_tensor(constant).reshape(-1)
    nothing, one = torch.zeros_like(value), torch.ones_like(value)
    if kind == "times":
        return value, nothing
    if kind == "over":
        return 1 / value, nothing
    scale, factor = signs
    return scale * one, factor * value


# -- what can be folded --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Link:
    """One operator after a layer."""

    node: Node
    rescaling: Rescaling


def _links(layer: Node, call: Call, depending: set[Node]) -> list[_Link]:
    """The operators after a layer, each the only reader of the one before, that can be folded."""
    found: list[_Link] = []
    source = layer
    while len(source.users) == 1:
        (node,) = source.users
        rescaling = _rescaling(node, source, call)
        if rescaling is None or any(n in depending for n in _nodes(rescaling.given)):
            break
        found.append(_Link(node, rescaling))
        source = node
    return found


def _rescaling(node: Node, source: Node, layer: Call) -> Rescaling | None:
    """What a node does to the channels of a layer, if it scales and shifts them by constants."""
    row = _row(node)
    if row is None:
        return None
    call = Call.of(node)
    names = [name for name, operand in call.nodes() if operand is source]
    found = row.rescaling(call, names[0]) if len(names) == 1 else None
    if found is None:
        return None
    if found.kind == "norm":  # its channels may be another axis than the layer's
        fits = source.meta["val"].dim() - _channels_from_end(layer) == 1
    else:
        fits = all(_by_channel(other, node, source, layer) for other in _nodes(found.given))
    return found if fits else None


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


def _row(node: Node) -> Operator | None:
    return lookup(node.target) if isinstance(node.target, torch._ops.OpOverload) else None


def _channels_from_end(layer: Call) -> int:
    return max(int(layer["weight"].meta["val"].dim()) - 1, 1)


# -- the rewrite ---------------------------------------------------------------------------------


def _fold(graph: FxGraph, layer: Node, call: Call, links: Sequence[_Link]) -> None:
    steps = tuple(link.rescaling.step for link in links)
    _bring_forward(graph, layer, _nodes(steps))
    has_bias = call["bias"] is not None or any(link.rescaling.shifts for link in links)
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
    for link in links:
        link.node.meta.setdefault("spelled", link.node.target)  # its name stays
        link.node.target = ALIAS
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


def _nodes(given: Sequence[Any]) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(given, found.append)
    return found
