"""Dropout in evaluation returns what it is given: who reads its result, and who its operand.

A capture knows a tensor by what it is. From then on it may take the result and the operand for one
(an export with torch 2.14 does): what reads the operand afterwards seems to read the result, and
the relevance of the dropout would be that of all that flows beside it. So while a model is captured
the result is a view of its own, and after that the views tell who reads which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.overrides import TorchFunctionMode

_VIEW = torch.ops.aten.alias.default
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")


class ResultsApart(TorchFunctionMode):
    """Makes a view of what a dropout returns, where that is its operand."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if "dropout" in name and not name.endswith("_"):
            given = args[0] if args else (kwargs or {}).get("input")
            if isinstance(result, Tensor) and result is given:
                return _VIEW(result)
        return result


def tell_apart(graph: FxGraph) -> None:
    """Give what reads an operand its operand back, and take the views away."""
    for view in list(graph.nodes):
        if view.target is not _VIEW:
            continue
        dropout, others = view.args[0], set(graph.nodes) - {view}
        if not isinstance(dropout, Node) or not _is_dropout(dropout):
            continue
        assert isinstance(dropout.args[0], Node)
        dropout.replace_all_uses_with(dropout.args[0], delete_user_cb=others.__contains__)
        view.replace_all_uses_with(dropout)
        graph.erase_node(view)


def _is_dropout(node: Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return packet in {getattr(torch.ops.aten, name) for name in _DROPOUTS}
