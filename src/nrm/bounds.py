"""Between which bounds the rest of a flow lies, seen from every neuron of a layer (appendix H).

A flow that has come to neuron j goes on through some of the walks from there. If all of them have
together relevance t, and absolutely v, any part of them lies between (t - v) / 2 and (t + v) / 2.
Both are forward messages: t of R(i|j), v of |R(i|j)|. Where parts are single neurons, the largest
and the smallest continuation are known exactly (Viterbi's recursion, with both signs).

From above come the `arrivals` at each layer: what all flows bring there. From below come the
`intervals`: what a flow still does from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nrm.between import Between, Course
from nrm.engine import Absolute, in_chunks, message_size
from nrm.joint import ByNeuron, Partition
from nrm.prepare import Pass

_MOST_ROWS = 4096
"""Up to so many neurons the best continuations are found one neuron at a time."""


@dataclass(frozen=True)
class Interval:
    """Bounds at the neurons of a layer, `[states, *shape]` each; zero lies between them."""

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
        message: `[states, *shape]`.
        size: `None` where an operation on the way cannot tell its absolute sizes.
    """

    message: Tensor
    size: Tensor | None

    def reached(self, layer: ByNeuron) -> list[int]:
        """The neurons to which anything may come."""
        if self.size is None:
            return list(range(layer.size))
        found: list[int] = layer.add_up(self.size).sum((0, 1)).nonzero()[:, 0].tolist()
        return found


def arrivals(
    forward: Pass, sizes: Absolute, layers: Sequence[Partition], course: Course
) -> list[Arrivals]:
    """One for each layer, from the output down, where a course starts at the first."""
    found = [Arrivals(course.start, course.start.abs())]
    for upper, way in zip(layers, course.ways, strict=False):
        message, size = found[-1].message, found[-1].size
        arrived = way.send(forward, upper.covered(message))
        if size is None or not sizes.covers(way.upper, way.lower):
            found.append(Arrivals(arrived, None))
        else:
            found.append(Arrivals(arrived, way.send(sizes, upper.covered(size))))
    return found


def intervals(
    forward: Pass,
    sizes: Absolute,
    layers: Sequence[Partition],
    course: Course,
    arriving: Sequence[Arrivals],
    memory: int,
) -> list[Interval | None]:
    """One for each layer, from the output down: of what a flow still does from there on.

    At the lowest, a neuron belongs to the flow's part or not; if it does, with all of the walks
    from there that count. `None`: nothing is known, because
    an operation in between cannot tell its absolute sizes.
    """
    last = layers[-1]
    ones = forward.output.new_ones((len(arriving[-1].message), *forward.shape(last.variable)))
    here = last.covered(course.weighed(ones, -1))
    found: list[Interval | None] = [Interval(here.clamp(max=0), here.clamp(min=0))]
    for depth in reversed(range(len(layers) - 1)):
        upper, lower, way, below = layers[depth], layers[depth + 1], course.ways[depth], found[-1]
        if below is None:
            found.append(None)
            continue
        bounds = []
        if isinstance(upper, ByNeuron) and isinstance(lower, ByNeuron) and way.single:
            reached = arriving[depth].reached(upper), arriving[depth + 1].reached(lower)
            if min(map(len, reached)) <= _MOST_ROWS:
                bounds.append(
                    _best_continuation(forward, way, upper, lower, reached, below, memory)
                )
        if sizes.covers(way.upper, way.lower):
            total, size = way.push(forward, below.sum), way.push(sizes, below.width)
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
    way: Between,
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
        return _seen_from_below(forward, way, lower, reached[1], ends, memory)
    return _seen_from_above(forward, way, upper, lower, reached[0], ends, memory)


def _seen_from_below(
    forward: Pass,
    way: Between,
    lower: ByNeuron,
    reached: Sequence[int],
    ends: Sequence[Tensor],
    memory: int,
) -> tuple[Tensor, Tensor]:
    """By a forward message from each neuron of the lower layer that is reached."""
    low, high = (forward.output.new_zeros((1, *forward.shape(way.upper))) for _ in range(2))

    def pushed(chosen: Sequence[int]) -> None:
        for end in ends:
            onward = way.push(forward, lower.split(end, chosen))
            torch.minimum(low, onward.amin(0, keepdim=True), out=low)
            torch.maximum(high, onward.amax(0, keepdim=True), out=high)

    in_chunks(reached, memory, message_size(forward, way.upper, way.lower), pushed)
    return low, high


def _seen_from_above(
    forward: Pass,
    way: Between,
    upper: ByNeuron,
    lower: ByNeuron,
    reached: Sequence[int],
    ends: Sequence[Tensor],
    memory: int,
) -> tuple[Tensor, Tensor]:
    """By a message from each neuron of the upper layer that is reached."""
    ones = forward.output.new_ones((1, *forward.shape(way.upper)))
    low, high = (torch.zeros_like(upper.add_up(ones)[0]) for _ in range(2))  # [batch, neurons]
    flat = [lower.add_up(end)[0] for end in ends]

    def pulled(chosen: Sequence[int]) -> None:
        rows = lower.add_up(way.send(forward, upper.split(ones, chosen)))
        for end in flat:
            products = rows * end
            low[:, chosen] = torch.minimum(low[:, chosen], products.amin(-1).T)
            high[:, chosen] = torch.maximum(high[:, chosen], products.amax(-1).T)

    in_chunks(reached, memory, message_size(forward, way.upper, way.lower), pulled)
    return upper.lay_out(low.unsqueeze(0)), upper.lay_out(high.unsqueeze(0))
