"""Batch norm taken into the layer before it: a rewrite of the captured graph, never of the model.

The layer then computes what the batch norm gave, and the batch norm becomes an identity, so that
rules act on the weights that the two have together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import Node

from nrm.operators import Call, lookup
from nrm.operators.batch_norm import BatchNorm, scale_and_shift, statistics
from nrm.operators.layers import Layer


def fold_batch_norms(graph: FxGraph) -> None:
    """Fold every evaluation-mode batch norm whose input is a layer that nothing else reads."""
    for node in list(graph.nodes):
        if not _has_row(node, BatchNorm):
            continue
        layer = node.args[0]
        norm = Call.of(node)
        if not (isinstance(layer, Node) and _has_row(layer, Layer) and len(layer.users) == 1):
            continue
        if norm.get("training") or norm["running_mean"] is None:
            continue  # refused by name when the graph is built
        call = Call.of(layer)
        if layer.meta["val"].dim() - max(call["weight"].meta["val"].dim() - 1, 1) != 1:
            continue  # the norm's channels are another axis than the layer's
        with graph.inserting_before(layer):
            weight = _constant(graph, folded_weight, call, norm)
            bias = _constant(graph, folded_bias, call, norm)
        arguments = call.arguments | {"weight": weight, "bias": bias}
        layer.args, layer.kwargs = tuple(arguments.values()), {}
        weight.meta["val"] = call["weight"].meta["val"]
        bias.meta["val"] = norm["running_mean"].meta["val"]
        node.target = torch.ops.aten.alias.default
        node.args, node.kwargs = (layer,), {}
    graph.lint()


def folded_weight(weight: Tensor, bias: Tensor | None, *norm: Any) -> Tensor:
    """The layer's weight times the norm's scale."""
    scale, _ = scale_and_shift(*norm)
    return weight * scale.view((-1,) + (1,) * (weight.dim() - 1))


def folded_bias(weight: Tensor, bias: Tensor | None, *norm: Any) -> Tensor:
    """The layer's bias after the norm."""
    scale, shift = scale_and_shift(*norm)
    return shift if bias is None else bias * scale + shift


def _constant(graph: FxGraph, compute: Callable[..., Tensor], call: Call, norm: Call) -> Node:
    return graph.call_function(compute, (call["weight"], call["bias"], *statistics(norm).values()))


def _has_row(node: Node, kind: type) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and isinstance(lookup(node.target), kind)
