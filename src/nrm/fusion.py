"""Attention as the one operator that the model called, where only its derivative is needed.

The graph has attention written out, so that its weights are variables. By derivatives
(`nrm.telescope`) the fused operator gives the same in a fraction of the time: its inputs'
derivatives are multiplied by the alphas on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from nrm.graph import Graph, Variable
from nrm.graph.expansion import attention, attention_scores
from nrm.operators.gradient_share import column_floor, gradient_share
from nrm.operators.memory import smaller_than


@dataclass
class Fusion:
    """A part of the graph that one operator computes.

    Attributes:
        target, args, kwargs: the operator's call, on graph nodes.
        shares: what of the result's relevance each input takes; inputs that are missing take none.
    """

    target: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shares: dict[Node, float]

    @property
    def reads(self) -> list[Node]:
        """The nodes among the arguments."""
        return _nodes((self.args, self.kwargs))

    def __call__(self, values: dict[Node, Any]) -> Tensor:
        """The result, differentiable."""

        def take(node: Node) -> Any:
            value = values[node]
            if not isinstance(value, Tensor):
                return value
            return gradient_share(value, self.shares.get(node, 0.0))

        args, kwargs = map_arg((self.args, self.kwargs), take)
        return self.target(*args, **kwargs)

    def hides_vanished(self, values: dict[Node, Any], result: Tensor) -> bool:
        """Whether something that is added up vanishes within, or only if it is written out.

        Relevance does not pass there, and the operator's derivative would not know.
        """
        args, kwargs = map_arg((self.args, self.kwargs), lambda node: _detached(values[node]))
        with torch.no_grad():
            if self.shares_scores:
                for sums in attention_scores(*args, **kwargs):
                    if smaller_than(sums, column_floor(sums.dtype)) is not None:
                        return True
            value = args[2]
            low, high = torch.aminmax(value)
            rounding = torch.finfo(value.dtype).eps * max(-float(low), float(high))
            near = smaller_than(result, rounding)
            if near is None:
                return False
            floor = column_floor(value.dtype)
            written_out = attention(*args, **kwargs)[near].abs() <= floor
            return not torch.equal(written_out, result[near].abs() <= floor)

    @property
    def shares_scores(self) -> bool:
        """Whether queries and keys take relevance, so that it passes their products."""
        return any(self.shares.get(node, 0.0) for node in _nodes(self.args[:2]))


def fusions(graph: Graph) -> dict[Node, Fusion]:
    """The operators that were written out, by the node of their result."""
    found = {}
    for node, variable in graph.by_node.items():
        written_out = node.meta.get("fused")
        if written_out is not None and variable.producer is not None:
            target, args, kwargs = written_out
            inputs = _nodes((args, kwargs))
            if len(set(inputs)) < len(inputs):
                continue  # one tensor in two roles takes differently in each
            found[node] = Fusion(target, args, kwargs, _shares(graph, variable, inputs))
    return found


def needed(
    graph: Graph,
    order: Sequence[Node],
    fused: dict[Node, Fusion],
    reads: Callable[[Node], Sequence[Node]],
) -> list[Node]:
    """The nodes to run if fused operators compute their results, in order."""
    wanted = {graph.explained, graph.captured.output}
    for node in reversed(order):
        if node in wanted:
            fusion = fused.get(node)
            wanted.update(reads(node) if fusion is None else fusion.reads)
    return [node for node in order if node in wanted]


def _shares(graph: Graph, output: Variable, inputs: Sequence[Node]) -> dict[Node, float]:
    """The product of the alphas from the result to each input, over all ways between."""
    shares: dict[Variable, float] = {output: 1.0}
    ends = {graph.by_node[node] for node in inputs if node in graph.by_node}
    for variable in reversed(graph.variables[: output.index + 1]):
        if variable not in shares or variable in ends or variable.producer is None:
            continue
        operation = variable.producer
        alphas = operation.alphas or (1.0,) * len(operation.slots)
        for slot, alpha in zip(operation.slots, alphas, strict=True):
            operand = graph.by_node[slot]
            shares[operand] = shares.get(operand, 0.0) + shares[variable] * alpha
    return {v.node: shares.get(v, 0.0) for v in ends if v.node is not None}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _nodes(arguments: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(arguments, found.append)
    return found
