"""What operands add to a weighted sum, and how a message travels back through what they add."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from nrm.operators.connections import Connections
from nrm.operators.propagation import pull_back
from nrm.rules import Activation, Weight
from nrm.tensors import sum_to


@dataclass
class Contribution:
    """What one operand adds to the sum; by default one parent for each neuron.

    Attributes:
        x: the parents and their values.
        w: the weight that a rule may modify.
        apply: `(factor, weight) -> output`, linear in each; broadcasts to the output.
        uniform: `factor -> output` with weight one on every connection, which counts them; `None`:
            the factor itself, of one parent each.
        transpose: `([K, *output], weight) -> [K, *operand]`, the transpose of `apply` in the
            factor; without it autograd finds it, at the cost of running `apply` once.
        transposes_anew: whether `transpose` always returns new memory, which may be overwritten.
        operand: which operand this is; one may contribute in several ways.
        by_channels: `([*operand], weight, [*output]) -> [outputs, inputs]`: `w_ij factor_i share_j`
            added up over the connections of each two channels, where channels have one weight.
        keeps_sign: whether `apply` adds up factors times weights with constants of its own, if any,
            that are not negative: then it is largest where both are taken at their sizes.
        connections: the connections one by one, given the output's shape, for rules that are no
            sums of terms.
        share: what every rule's contributions are multiplied by, the alpha of a product's factor.
            `apply` and `transpose` have it in them; it stands in place of weight one.
        every: the weight one on every connection, where `apply` and `transpose` take it as any
            other weight; then `uniform` is not needed.
    """

    x: Activation
    w: Weight
    apply: Callable[[Tensor, Tensor], Tensor] = torch.mul
    uniform: Callable[[Tensor], Tensor] | None = None
    transpose: Callable[[Tensor, Tensor], Tensor] | None = None
    operand: int = 0
    by_channels: Callable[[Tensor, Tensor | None, Tensor], Tensor] | None = None
    keeps_sign: bool = False
    connections: Callable[[torch.Size], Connections] | None = None
    transposes_anew: bool = False
    share: float = 1.0
    every: Tensor | None = None

    def add(self, factor: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            return self.apply(factor, weight)
        added = factor if self.uniform is None else self.uniform(factor)
        return added if self.share == 1 else self.share * added

    def counting(self) -> Contribution:
        """The same without its share: its connections count as those of any other operand."""
        return self if self.share == 1 else replace(self, share=1.0, every=None)

    def add_each(self, factors: Tensor, weight: Tensor | None) -> Tensor:
        """The same for each of `[K, *operand]`."""
        if factors.device.type != "cpu" and len(factors) > 1:
            return torch.vmap(partial(self.add, weight=weight))(factors)
        first = self.add(factors[0], weight)
        if len(factors) == 1:
            return first.unsqueeze(0)
        found = first.new_empty((len(factors), *first.shape))
        found[0] = first
        for row, factor in zip(found[1:], factors[1:], strict=True):
            row.copy_(self.add(factor, weight))
        return found


Summand = tuple[Contribution, Tensor, Tensor | None]
"""A term of a rule: what it adds, factor and weight."""


class TermSum:
    """The terms of one group added up, over all operands."""

    def __init__(self, summands: Sequence[Summand], output: Tensor | None = None) -> None:
        self.summands = [
            (part, factor, part.every if weight is None else weight)
            for part, factor, weight in summands
        ]
        self._known = output
        self.direct = all(
            part.transpose is not None and weight is not None for part, _, weight in self.summands
        )

    @cached_property
    def output(self) -> Tensor:
        """The sum; it may broadcast to the operator's output."""
        if self._known is not None:
            return self._known
        if not self.direct:
            return self._graph[1].detach()
        with torch.no_grad():
            return add_up(part.add(factor, weight) for part, factor, weight in self.summands)

    @cached_property
    def _graph(self) -> tuple[list[Tensor], Tensor]:
        """The factors and the sum, with a local autograd graph between them."""
        leaves = [factor.detach().requires_grad_() for _, factor, _ in self.summands]
        with torch.enable_grad():
            return leaves, add_up(
                part.add(leaf, weight)
                for leaf, (part, _, weight) in zip(leaves, self.summands, strict=True)
            )

    def pull(self, share: Tensor, wanted: Sequence[bool], pulled: list[Tensor | None]) -> None:
        """Add `factor * (transposed weight) share`, term by term, to what operands get.

        All of that is new memory: derivatives may be the share itself, parts of it, one tensor
        for several operands, or what a function keeps.
        """
        chosen = [t for t, (part, *_) in enumerate(self.summands) if wanted[part.operand]]
        if not chosen:
            return
        gradients = self._transposed(chosen, share)
        for t, gradient in zip(chosen, gradients, strict=True):
            part, factor, _ = self.summands[t]
            owned = self.direct and part.transposes_anew
            if factor is part.x.every:
                product = gradient if owned else gradient.clone()
            else:
                product = gradient.mul_(factor) if owned else gradient * factor
            before = pulled[part.operand]
            pulled[part.operand] = product if before is None else product.add_(before)

    def push(self, masses: Sequence[Tensor | None]) -> Tensor | None:
        """`sum_i T_ij F(i)`: `[K, *output]`, perhaps broadcast; `None` where all F are zero."""
        added = []
        for part, factor, weight in self.summands:
            mass = masses[part.operand]
            if mass is not None:
                added.append(part.add_each(mass * factor, weight))
        return add_up(added) if added else None

    def _transposed(self, chosen: Sequence[int], share: Tensor) -> Iterator[Tensor]:
        """`(transposed weight) share` of each term in turn, to be used before the next."""
        if not self.direct:
            leaves, output = self._graph
            yield from pull_back(output, [leaves[t] for t in chosen], sum_to(share, output.shape))
            return
        for t in chosen:
            part, _, weight = self.summands[t]
            assert part.transpose is not None
            assert weight is not None
            yield part.transpose(share, weight)


def add_up(summands: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    first, *others = summands
    for summand in others:
        first = first + summand
    return first


def through_matrix(x: Tensor, weight: Tensor | None, share: Tensor) -> Tensor:
    """`w_ij x_i share_j` of each two channels, for a weight `[outputs, inputs]`; added up over all
    other axes."""
    passed = share.reshape(-1, share.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
    return passed if weight is None else passed.mul_(weight)
