"""The layer-by-layer search that CRP's users do by hand: the best part, then the best given it.

Each step is right, and the whole need not be: parts that are strong together may be weak alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from nrm.joint.partitions import Partition
from nrm.passing import finite, send
from nrm.program import Pass
from nrm.search.flows import Order, keys


def greedy(
    forward: Pass, start: Tensor, layers: Sequence[Partition], order: Order, k: int
) -> tuple[list[tuple[tuple[int, ...], float]], int]:
    """For each of the k best parts of the first layer, the best of the next one jointly with it.

    Returns:
        the combinations and their relevances, first to last, and how many were looked at.
    """
    first = layers[0]
    parts = keys(first.add_up(start)[0].sum(0), order).topk(min(k, first.size)).indices.tolist()
    found = []
    for part in parts:
        chosen = [part]
        held = first.split(start, [part])
        relevance = held.sum()
        for upper, lower in itertools.pairwise(layers):
            arrived = send(forward, {upper.variable: held}, {lower.variable: None})
            nothing = held.new_zeros((1, *forward.shape(lower.variable)))
            message = arrived.get(lower.variable, nothing)
            table = finite(lower.add_up(message)[0].sum(0))
            chosen.append(int(keys(table, order).argmax()))
            held, relevance = lower.split(message, chosen[-1:]), table[chosen[-1]]
        found.append((tuple(chosen), float(relevance)))
    by_key = keys(torch.tensor([relevance for _, relevance in found], dtype=torch.float64), order)
    ranked = [found[place] for place in by_key.argsort(descending=True, stable=True).tolist()]
    return ranked, len(parts) * layers[-1].size
