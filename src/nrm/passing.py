"""Message passing (Theorem 1): the one engine behind every query.

A message holds `m(i)`, the relevance of the walks seen so far that end in neuron i, as a tensor
`[K, *shape of the variable]`: K messages travel at once. Messages start at the output and stop at
variables; whatever cannot reach a stop is dropped, which is what a masked layer of the proper
network does (appendix A).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nrm.graph import Variable
from nrm.program import Pass

Messages = dict[Variable, Tensor]
Mask = Tensor | None
"""1 at the neurons where a message stops, broadcastable to `[K, *shape]`; `None`: at all."""

Observer = Callable[[Variable, Messages, Messages], None]
"""Called at each variable with the messages still travelling (its own included) and arrived."""


def send(
    forward: Pass,
    messages: Messages,
    stops: Mapping[Variable, Mask],
    normalized: bool = True,
    open_to: Mapping[Variable, Mask] | None = None,
    observe: Observer | None = None,
    order: Sequence[Variable] | None = None,
) -> Messages:
    """Send messages towards the inputs until they first meet a stop (eqs. 24, 25).

    Arguments:
        forward: the forward pass to travel back through.
        messages: where they start, e.g. the output relevance at the output.
        stops: the neurons at which messages arrive and stop. A walk arrives at the first it
            meets, also where one stop lies upstream of another.
        normalized: `False` multiplies unnormalised contributions (eq. 26).
        open_to: masks of the neurons that walks may visit, at variables where others are closed.
        observe: called at every variable that a message reaches.
        order: in which to visit the variables, children before parents.

    Returns:
        what arrived, by variable. Nothing arrives where no message came.
    """
    with torch.inference_mode(False), torch.no_grad():
        if forward.telescope is not None and normalized and not open_to and observe is None:
            arrived = forward.telescope.send(messages, stops)
            if arrived is not None:
                return arrived
        visits = order or forward.graph.variables[::-1]
        return _send(forward, messages, stops, normalized, open_to or {}, observe, visits)


def _send(
    forward: Pass,
    messages: Messages,
    stops: Mapping[Variable, Mask],
    normalized: bool,
    open_to: Mapping[Variable, Mask],
    observe: Observer | None,
    visits: Sequence[Variable],
) -> Messages:
    graph = forward.graph
    leading = graph.leading_to(stops)
    travelling = {v: m for v, m in messages.items() if v in leading}
    callers = set(map(id, travelling.values()))  # not to be overwritten
    arrived: Messages = {}
    for variable in visits:
        if variable not in travelling:
            continue
        if observe is not None:
            observe(variable, travelling, arrived)
        message = travelling.pop(variable)
        way = open_to.get(variable)
        if way is not None:
            message = message * way
        if id(message) in callers:
            message = message.clone()
        if variable in stops:
            mask = stops[variable]
            arrived[variable] = message if mask is None else message * mask
            if mask is None:
                continue
            message = message * (1 - mask)
        operation = variable.producer
        if operation is None:
            continue
        wanted = [operand in leading for operand in operation.operands]
        if not any(wanted):
            continue
        pulled = forward.propagations[operation].pull(message, wanted, normalized)
        del message
        for operand, part in zip(operation.operands, pulled, strict=True):
            if part is not None:
                before = travelling.get(operand)
                travelling[operand] = part if before is None else before + part
    return arrived
