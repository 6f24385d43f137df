"""What a network loses without some neurons: the reference that relevance is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nrm.evaluation import Interventions
from nrm.formulas import NeuronSet


@dataclass(frozen=True)
class Contributions:
    """What an output loses without the sets of two families.

    Attributes:
        output: `f(x)`.
        first, second: `[sets]`, `f(x) - f(x \\ S)` of each set alone.
        total: `[first sets, second sets]`, `f(x) - f(x \\ (S_a | S_b))`.
    """

    output: Tensor
    first: Tensor
    second: Tensor
    total: Tensor

    @property
    def joint(self) -> Tensor:
        """`f(x) - f(x \\ S_a) - f(x \\ S_b) + f(x \\ (S_a | S_b))` (eq. 57)."""
        return self.first[:, None] + self.second - self.total


def contributions(
    interventions: Interventions, first: Sequence[NeuronSet], second: Sequence[NeuronSet]
) -> Contributions:
    """The contributions of two families of neuron sets, and of all their pairs, to an output."""
    output = interventions.output
    joint = interventions.joint(first, second)
    alone, also = (
        output - interventions.without([[chosen] for chosen in sets]) for sets in (first, second)
    )
    return Contributions(output, alone, also, alone[:, None] + also - joint)
