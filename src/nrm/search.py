"""The most relevant flows: which combination of channels, one for each layer, carries most."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nrm.channels import only_sample, split_by_channel, sum_by_channel
from nrm.errors import QueryError
from nrm.formulas import NeuronSet
from nrm.graph import Graph, Variable
from nrm.neurons import channels
from nrm.pairs import all_pairs
from nrm.partitions import Channels
from nrm.passing import send
from nrm.program import Pass


@dataclass(frozen=True)
class Flow:
    """One combination of channels, and the relevance that flows through all of them.

    Attributes:
        channels: the channel of each layer, in the order that the layers were given.
        relevance: the joint relevance; all walks together have one.
        share: the relevance as a fraction of what passes the layers at all. Equal to the
            relevance where every layer is a cut; elsewhere what passes may be small or negative,
            and shares beyond one or of the other sign.
    """

    channels: dict[str, int]
    relevance: float
    share: float

    @property
    def sets(self) -> list[NeuronSet]:
        """The neuron sets, to query on with."""
        return [channels(layer, channel) for layer, channel in self.channels.items()]


@dataclass(frozen=True)
class Flows:
    """The flows found, the largest relevance first.

    Attributes:
        exact: whether no other combination has a larger relevance than those listed. `False`
            for more than two layers, where only the `beam` best beginnings were followed.
    """

    flows: list[Flow]
    exact: bool

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.flows)

    def __len__(self) -> int:
        return len(self.flows)

    def __getitem__(self, index: int) -> Flow:
        return self.flows[index]


def find_flows(
    forward: Pass,
    message: Callable[[Variable], Tensor],
    layers: Sequence[str],
    k: int,
    sample: int,
    beam: int,
    memory: int,
) -> Flows:
    """The `k` most relevant channel combinations of one sample, one channel of each layer.

    Arguments:
        message: gives the message `[1, *shape]` at a layer.
        layers: in any order, each on a walk with the others.
    """
    if not layers:
        raise QueryError("name at least one layer")
    for what, number in (("k", k), ("beam", beam)):
        if not isinstance(number, int) or number < 1:
            raise QueryError(f"{what} is a positive integer, not {number!r}")
    if not isinstance(sample, int) or not 0 <= sample < forward.batch:
        raise QueryError(f"sample {sample!r} is out of range: the batch has {forward.batch}")
    variables = [forward.graph.variable(layer) for layer in layers]
    order = in_depth(variables, forward.graph)
    start = only_sample(message(order[0]), order[0], sample)
    found, total, exact = _top_flows(forward, start, order, k, beam, memory)
    flows = []
    for chosen, relevance in found:
        by_layer = dict(zip(order, chosen, strict=True))
        flows.append(
            Flow(
                {name: by_layer[v] for name, v in zip(layers, variables, strict=True)},
                relevance,
                relevance / float(total) if float(total) else 0.0,
            )
        )
    return Flows(flows, exact)


def _top_flows(
    forward: Pass, start: Tensor, layers: Sequence[Variable], k: int, beam: int, memory: int
) -> tuple[list[tuple[list[int], float]], Tensor, bool]:
    """The `k` most relevant channel combinations of one sample.

    Arguments:
        start: the message at the first of `layers`, of one sample alone.
        layers: from the output down, each upstream of the one before.

    Returns:
        channels and relevance of each, the relevance of all combinations together, and whether
        the search was exact.
    """
    if len(layers) == 1:
        single = sum_by_channel(start, layers[0])[0].sum(0)
        return _best(single[:, None], [[]], k), single.sum(), True
    first, second = (Channels(layer, forward) for layer in layers[:2])
    pairs = all_pairs(forward, start, first, second, memory).sum(0)
    if len(layers) == 2:
        found = _best(pairs.T, [[c] for c in range(pairs.shape[0])], k)
        return found, pairs.sum(), True
    whole = start
    for upper, lower in itertools.pairwise(layers):
        whole = send(forward, {upper: whole}, {lower: None}).get(
            lower, start.new_zeros((1, *forward.shape(lower)))
        )
    prefixes = [c for c, _ in _best(pairs.T, [[c] for c in range(pairs.shape[0])], beam)]
    for depth in range(2, len(layers)):
        rows = []
        for prefix in prefixes:
            message = start
            for position, channel in enumerate(prefix):
                message = split_by_channel(message, layers[position], [channel])
                lower = layers[position + 1]
                message = send(forward, {layers[position]: message}, {lower: None}).get(
                    lower, message.new_zeros((1, *forward.shape(lower)))
                )
            rows.append(sum_by_channel(message, layers[depth])[0].sum(0))
        table = torch.stack(rows)
        last = depth == len(layers) - 1
        found = _best(table.T, prefixes, k if last else beam)
        prefixes = [c for c, _ in found]
    return found, whole.sum(), False


def _best(table: Tensor, prefixes: list[list[int]], k: int) -> list[tuple[list[int], float]]:
    """The largest entries of `[channel, prefix]`, as channels of all layers so far."""
    values, places = table.flatten().topk(min(k, table.numel()))
    width = table.shape[1]
    return [
        ([*prefixes[place % width], place // width], value)
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]


def in_depth(layers: Sequence[Variable], graph: Graph) -> list[Variable]:
    """Layers from the output down.

    Raises:
        QueryError: two of them lie side by side, so that no walk passes both.
    """
    ordered = sorted(layers, key=lambda variable: -variable.index)
    for upper, lower in itertools.pairwise(ordered):
        if lower not in graph.upstream(upper):
            raise QueryError(
                f"no walk passes both {upper.name!r} and {lower.name!r}: they are the same layer "
                "or lie side by side."
            )
    return ordered
