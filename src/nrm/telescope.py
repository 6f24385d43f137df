"""LRP-0 that counts all it adds up, as one backward pass: gradient x input where it is exact.

If every operation divides by what it really added up, the divisions cancel along the depth: with
`m_j = y_j g_j`, a weighted sum passes `m_i = x_i sum_j w_ij g_j`, so that `g` travels by plain
derivatives of the operations, with attention, gates, scales and slopes held constant. One call of
autograd replaces message passing, wherever neither masks nor leaves on the way need more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nrm.graph import Graph, Operation, Variable

Messages = dict[Variable, Tensor]


def telescopes(graph: Graph) -> bool:
    """Whether the divisions of all operations cancel, and nothing on the way rounds derivatives.

    Some models compute norms in single precision whatever they are given.
    """
    precision = _precision(graph.output)
    return all(
        _counts_all(operation) and _precision(operation.output) <= precision
        for operation in graph.operations
    )


def _precision(variable: Variable) -> float:
    assert variable.node is not None
    return torch.finfo(variable.node.meta["val"].dtype).eps


def _counts_all(operation: Operation) -> bool:
    """Whether the columns of an operation sum to its output."""
    operator, call, rule = operation.operator, operation.call, operation.rule
    dropped = operator.has_bias(call, operation.named_slots, rule)
    dropped = dropped and operation.late_leaf != "bias"
    return not dropped and operator.telescopes(call, rule)


class Telescope:
    """A forward pass whose derivatives are the relevances divided by the values.

    Arguments:
        values: every variable but late leaves, connected by autograd.
    """

    def __init__(self, graph: Graph, values: Mapping[Variable, Tensor]) -> None:
        self.graph, self.values = graph, values

    def send(self, messages: Messages, stops: Mapping[Variable, Tensor | None]) -> Messages | None:
        """What arrives at the stops (see `nrm.passing.send`); `None`: it cannot say."""
        if any(variable not in self.values for variable in (*messages, *stops)):
            return None
        if len(stops) > 1 and any(self.graph.upstream(v) & stops.keys() for v in stops):
            return None  # who meets a stop first needs message passing
        starts, gradients = [], []
        for variable, message in messages.items():
            value = self.values[variable]
            if not value.requires_grad:
                return None
            silent = value == 0
            if bool(((message != 0) & silent).any()):
                return None  # relevance given to a neuron of value zero
            starts.append(value)
            gradients.append(torch.where(silent, 0.0, message / value.detach()))
            if not bool(torch.isfinite(gradients[-1]).all()):
                return None  # too large a quotient for the type
        ends = [self.values[variable] for variable in stops]
        single = all(len(gradient) == 1 for gradient in gradients)
        found = torch.autograd.grad(
            starts,
            ends,
            [gradient[0] for gradient in gradients] if single else gradients,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=not single,
        )
        arrived: Messages = {}
        for (variable, mask), gradient in zip(stops.items(), found, strict=True):
            if gradient is None:
                continue
            value = self.values[variable].detach()
            message = torch.where(gradient == 0, 0.0, value * gradient)  # values may be -inf
            message = message.unsqueeze(0) if single else message
            arrived[variable] = message if mask is None else message * mask
        return arrived
