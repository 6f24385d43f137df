"""A random network that grows step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from support.fuzz import describing as d
from support.fuzz.networks import BATCH, Call, Describe, Step, shape_of

T = TypeVar("T")

LARGEST = 16
"""Neurons of a variable, for each sample."""


class Unfit(Exception):  # noqa: N818
    """A step that this network has no room for."""


class Builder:
    """A network that grows step by step.

    Attributes:
        dyadic: numbers are small fractions, often equal, often zero; otherwise they are random.
        scope: the variables that further steps may read.
        blank: those with zeros that are written.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.dyadic = self.rng.random() < 0.7
        self.steps: list[Step] = []
        self.inputs: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.scope: list[str] = []
        self.blank: set[str] = set()
        self.calls: dict[str, int] = {}
        self.highest = 256.0

    # -- numbers and choices ---------------------------------------------------------------------

    def numbers(self, *shape: int, zero: bool = True) -> Tensor:
        if not self.dyadic:
            return torch.from_numpy(np.asarray(self.rng.normal(size=shape)))
        choices = [-2.0, -1.0, -1.0, -0.5, 0.5, 1.0, 1.0, 2.0] + [0.0, 0.0] * zero
        return torch.from_numpy(np.asarray(self.rng.choice(choices, size=shape)))

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[int(self.rng.integers(len(choices)))]

    def shape(self, name: str) -> tuple[int, ...]:
        step = self.step(name)
        return shape_of(self.values[name], step.batch_axis if step else 0)

    def find(self, fits: Callable[[tuple[int, ...]], bool], blank: bool = False) -> str | None:
        """A variable of such a shape, rather a late one.

        Arguments:
            blank: it may have zeros that are written.
        """
        known = [name for name in self.scope if blank or name not in self.blank]
        fitting = [name for name in known if fits(self.shape(name))]
        if not fitting:
            return None
        return fitting[-1] if self.chance(0.5) else self.one_of(fitting)

    def layer(self, name: str) -> bool:
        """Whether it is a layer's result, perhaps with a batch norm that is taken into it."""
        step = self.step(name)
        while step is not None and step.folds:
            step = self.step(step.reads[0])
        return step is not None and step.kind in ("linear", "conv")

    def unread(self, name: str) -> bool:
        return not any(name in step.reads for step in self.steps)

    def step(self, name: str) -> Step | None:
        return next((step for step in self.steps if step.name == name), None)

    def rank(self, name: str) -> int | None:
        step = self.step(name)
        return 0 if step is None else step.rank

    # -- growing ---------------------------------------------------------------------------------

    def input(self, name: str, *shape: int) -> None:
        x = self.numbers(BATCH, *shape)
        self.inputs[name] = self.values[name] = x
        self.scope.append(name)

    def add(
        self,
        text: str,
        module: nn.Module | Callable[..., Tensor],
        reads: str | Sequence[str],
        describe: Describe,
        *constants: Tensor,
        kind: str = "",
        exact: bool = True,
        rank: int | None = 0,
        shared: str | None = None,
        same: bool = False,
        batch_axis: int = 0,
        folds: bool = False,
    ) -> str:
        """Append a step.

        Raises:
            Unfit: its result has too many neurons, or too large values.
        """
        if not isinstance(module, nn.Module):
            module = Call(module, *constants)
        reads = (reads,) if isinstance(reads, str) else tuple(reads)
        module = module.double().eval().requires_grad_(False)
        with torch.no_grad():
            value = module(*(self.values[read].clone() for read in reads))
        if value.numel() > LARGEST * BATCH or value.abs().max() > self.highest:
            raise Unfit
        fresh = f"s{len([s for s in self.steps if s.name == s.module_name])}"
        called = shared or fresh
        again = self.calls[called] = self.calls.get(called, -1) + 1
        name = called + (f"@{again}" if again else "")
        step = Step(name, called, text, module, reads, describe, kind, exact, rank)
        self.steps.append(replace(step, same=same, batch_axis=batch_axis, folds=folds))
        self.values[name] = value
        self.scope.append(name)
        self.blank.discard(name)
        if describe in _KEEPING and not self.blank.isdisjoint(reads):
            self.blank.add(name)
        return name

    def grow(self, block: Callable[[Builder], str | None]) -> bool:
        """Append a block, all of it or nothing."""
        known = (list(self.steps), list(self.scope), dict(self.calls), set(self.blank))
        try:
            if block(self) is not None:
                return True
        except Unfit:
            pass
        self.steps, self.scope, self.calls, self.blank = known
        return False

    def transparent(self, text: str, function: Callable[[Tensor], Tensor], x: str) -> str:
        """A step that moves the neurons of one variable."""
        return self.add(text, function, x, d.routed, rank=self.rank(x))

    def close(self, *names: str | None) -> None:
        for name in names:
            if name in self.scope:
                self.scope.remove(name)


_KEEPING = (d.routed, d.elementwise, d.plus, d.minus)
"""What keeps zeros that are written, at least some of them."""


def filled_in(b: Builder, layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        parameter.data = b.numbers(*parameter.shape)
    return layer
