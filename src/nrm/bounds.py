"""Between which bounds the rest of a flow lies, seen from every neuron of a layer (appendix H).

A flow that has come to neuron j goes on through some of the walks from there. If all of them have
together relevance t, and absolutely v, any part of them lies between (t - v) / 2 and (t + v) / 2.
Both are forward messages: t of R(i|j), v of |R(i|j)|. Where parts are single neurons, the largest
and the smallest continuation are known exactly (Viterbi's recursion, with both signs).

From above come the `arrivals` at each layer: what all flows bring there. From below come the
`intervals`: what a flow still does from there on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nrm.engine import Absolute, in_chunks, message_size, push_between, send_between
from nrm.joint import ByNeuron, Partition
from nrm.prepare import Pass

_MOST_ROWS = 4096
"""Up to so many neurons the best continuations are found one neuron at a time."""


@dataclass(frozen=True)
class Interval:
    """Bounds at the neurons of a layer, `[1, *shape]` each; zero lies between them."""

    low: Tensor
    high: Tensor

    @property
    def sum(self) -> Tensor:
        """For all walks on: their relevance t, where nothing better is known."""
        return self.high + self.low

    @property
    def width(self) -> Tensor:
        """For all walks on: their absolute relevance v, where nothing better is known."""
        return self.high - self.low


@dataclass(frozen=True)
class Arrivals:
    """What comes to a layer, through parts of all layers above: relevance, and its absolute size.

    Attributes:
        message: `[1, *shape]`.
        size: `None` where an operation on the way cannot tell its absolute sizes.
    """

    message: Tensor
    size: Tensor | None

    def reached(self, layer: ByNeuron) -> list[int]:
        """The neurons to which anything may come."""
        if self.size is None:
            return list(range(layer.size))
        found: list[int] = layer.add_up(self.size)[0].sum(0).nonzero()[:, 0].tolist()
        return found


def arrivals(
    forward: Pass, sizes: Absolute, layers: Sequence[Partition], start: Tensor
) -> list[Arrivals]:
    """One for each layer, from the output down, where `start` comes to the first."""
    found = [Arrivals(start, start.abs())]
    for upper, lower in itertools.pairwise(layers):
        above, below = upper.variable, lower.variable
        message, size = found[-1].message, found[-1].size
        arrived = send_between(forward, upper.covered(message), above, below)
        if size is None or not sizes.covers(above, below):
            found.append(Arrivals(arrived, None))
        else:
            size = send_between(sizes, upper.covered(size), above, below)
            found.append(Arrivals(arrived, size))
    return found


def intervals(
    forward: Pass,
    sizes: Absolute,
    layers: Sequence[Partition],
    arriving: Sequence[Arrivals],
    memory: int,
) -> list[Interval | None]:
    """One for each layer, from the output down: of what a flow still does from there on.

    At the lowest, a neuron belongs to the flow's part or not. `None`: nothing is known, because
    an operation in between cannot tell its absolute sizes.
    """
    last = layers[-1]
    here = last.covered(forward.output.new_ones((1, *forward.shape(last.variable))))
    found: list[Interval | None] = [Interval(torch.zeros_like(here), here)]
    for depth in reversed(range(len(layers) - 1)):
        upper, lower, below = layers[depth], layers[depth + 1], found[-1]
        if below is None:
            found.append(None)
            continue
        bounds = []
        if isinstance(upper, ByNeuron) and isinstance(lower, ByNeuron):
            reached = arriving[depth].reached(upper), arriving[depth + 1].reached(lower)
            if min(map(len, reached)) <= _MOST_ROWS:
                bounds.append(_best_continuation(forward, upper, lower, reached, below, memory))
        if sizes.covers(upper.variable, lower.variable):
            total = push_between(forward, below.sum, lower.variable, upper.variable)
            size = push_between(sizes, below.width, lower.variable, upper.variable)
            bounds.append(((total - size) / 2, (total + size) / 2))
        found.append(_within(bounds, upper))
    return found[::-1]


def _within(bounds: Sequence[tuple[Tensor, Tensor]], layer: Partition) -> Interval | None:
    """What several bounds say together."""
    if not bounds:
        return None
    low = high = torch.full_like(bounds[0][0], torch.inf)
    low = -low
    for lowest, highest in bounds:  # sizes that overflowed say nothing
        low = torch.maximum(low, lowest.nan_to_num(-torch.inf, torch.inf, -torch.inf))
        high = torch.minimum(high, highest.nan_to_num(torch.inf, torch.inf, -torch.inf))
    return Interval(layer.covered(low.clamp(max=0)), layer.covered(high.clamp(min=0)))


def _best_continuation(
    forward: Pass,
    upper: ByNeuron,
    lower: ByNeuron,
    reached: tuple[list[int], list[int]],
    below: Interval,
    memory: int,
) -> tuple[Tensor, Tensor]:
    """The smallest and largest over neurons i below of `R(i|j)` times what i still does.

    One message for each neuron that is reached, of the layer that has fewer of them. Zero at
    others.
    """
    ends = [end for end in (below.low, below.high) if bool(end.any())]
    if len(reached[0]) > len(reached[1]):
        return _seen_from_below(forward, upper, lower, reached[1], ends, memory)
    return _seen_from_above(forward, upper, lower, reached[0], ends, memory)


def _seen_from_below(
    forward: Pass,
    upper: ByNeuron,
    lower: ByNeuron,
    reached: Sequence[int],
    ends: Sequence[Tensor],
    memory: int,
) -> tuple[Tensor, Tensor]:
    """By a forward message from each neuron of the lower layer that is reached."""
    above, under = upper.variable, lower.variable
    low, high = (forward.output.new_zeros((1, *forward.shape(above))) for _ in range(2))

    def pushed(chosen: Sequence[int]) -> None:
        for end in ends:
            onward = push_between(forward, lower.split(end, chosen), under, above)
            torch.minimum(low, onward.amin(0, keepdim=True), out=low)
            torch.maximum(high, onward.amax(0, keepdim=True), out=high)

    in_chunks(reached, memory, message_size(forward, above, under), pushed)
    return low, high


def _seen_from_above(
    forward: Pass,
    upper: ByNeuron,
    lower: ByNeuron,
    reached: Sequence[int],
    ends: Sequence[Tensor],
    memory: int,
) -> tuple[Tensor, Tensor]:
    """By a message from each neuron of the upper layer that is reached."""
    above, under = upper.variable, lower.variable
    ones = forward.output.new_ones((1, *forward.shape(above)))
    low, high = (torch.zeros_like(upper.add_up(ones)[0]) for _ in range(2))  # [batch, neurons]
    flat = [lower.add_up(end)[0] for end in ends]

    def pulled(chosen: Sequence[int]) -> None:
        rows = lower.add_up(send_between(forward, upper.split(ones, chosen), above, under))
        for end in flat:
            products = rows * end
            low[:, chosen] = torch.minimum(low[:, chosen], products.amin(-1).T)
            high[:, chosen] = torch.maximum(high[:, chosen], products.amax(-1).T)

    in_chunks(reached, memory, message_size(forward, above, under), pulled)
    return upper.lay_out(low.unsqueeze(0)), upper.lay_out(high.unsqueeze(0))
