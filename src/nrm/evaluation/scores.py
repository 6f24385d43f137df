"""Scores: a number for every combination of one neuron set of each of some layers.

The neuron sets of layers (`Families`) are combined, one of each. A score is their joint relevance,
or what it is compared with (section 4.1, appendix I): sums over the layers, which say nothing of
how sets act together, what is lost without all of them, and others beside these. Relevances are in
units of the output (times `Measure.scale`), as contributions are: so they have their sign also
where the explained output is negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor

from nrm.blocks import Blocks
from nrm.engine import checked
from nrm.errors import QueryError
from nrm.evaluation.intervention import Interventions
from nrm.formulas import NeuronSet
from nrm.joint import Division, Partition, partition
from nrm.measure import Measure

By = Division | Callable[[Measure, str], Iterable[NeuronSet]]
"""What a layer is divided into; or a function that gives neuron sets of it, such as clusters."""


class Families:
    """The neuron sets that some layers of one sample are divided into.

    Attributes:
        R: the measure of the sample.
        parts: of each layer, in the order given; an axis of every score is that of a layer.
        memory: bytes that messages may take at once, roughly.
    """

    def __init__(
        self, R: Measure, layers: Sequence[str], by: By = "channel", memory: int = 2**28
    ) -> None:
        if R.batch != 1:
            raise QueryError(f"one sample is evaluated at a time, not {R.batch}.")
        if isinstance(layers, str) or not layers:
            raise QueryError("layers are a list of one name or more.")
        self.R = R
        self.memory = memory
        self._by: Division = "channel"
        if callable(by):
            self._given: list[str | list[NeuronSet]] = [list(by(R, layer)) for layer in layers]
        else:
            self._by, self._given = by, list(layers)
        each = checked(memory) // (4 * len(layers))  # most is for messages and copies
        self.parts = [partition(given, self._by, R.forward_pass, each) for given in self._given]

    @property
    def shape(self) -> tuple[int, ...]:
        """How many sets each family has."""
        return tuple(part.size for part in self.parts)

    @cached_property
    def sets(self) -> list[list[NeuronSet]]:
        """The sets one by one, to remove them."""
        return [[part.set_of(number) for number in range(part.size)] for part in self.parts]

    def joint(self) -> Tensor:
        """`[n1, n2, ...]`: the joint relevance of every combination."""
        if len(self._given) == 1:
            (marginal,) = self.marginals()
            return marginal
        return self.R.joint(*self._given, by=self._by, memory=self.memory)[0]

    def blocks(self, interventions: Interventions, gating: float = 0.0) -> Tensor:
        """`[n1, n2, ...]`: by walks through blocks, the sets of the lowest layer removed as the
        interventions remove them.

        Arguments:
            gating: as for `Blocks.joint`.
        """
        lowest = min(range(len(self.parts)), key=lambda place: self.parts[place].variable.index)
        layer, removal = self._given[lowest], interventions.removal
        blocks = Blocks(self.R, layer, by=self._by, removal=removal, memory=self.memory)
        others = [given for place, given in enumerate(self._given) if place != lowest]
        if not others:
            return blocks.each()[0]
        return blocks.joint(*others, by=self._by, gating=gating)[0].movedim(0, lowest)

    def marginals(self) -> list[Tensor]:
        """`[n]` for each family: the relevance of every set."""
        found = self.R.marginals(layers=[part.variable.name for part in self.parts])
        return [_added_up(part, found[part.variable.name]) for part in self.parts]

    def activations(self) -> list[Tensor]:
        """`[n]` for each family: the activations of every set's neurons, added up."""
        return [_added_up(part, self.R.activations(part.variable.name)) for part in self.parts]


Score = Callable[[Families, Interventions], Tensor]
"""A number `[n1, n2, ...]` for every combination of sets."""


def joint(families: Families, interventions: Interventions | None = None) -> Tensor:
    """`f(x) R(S_1, S_2, ...)` (eq. 9)."""
    # Laid out as scores are compared: a permuted tensor would be copied each time.
    return (families.joint() * families.R.scale).contiguous()


def blocks(families: Families, interventions: Interventions) -> Tensor:
    """`f(x) R(S_1, S_2, ...)` by walks through blocks (`nrm.Blocks`)."""
    return (families.blocks(interventions) * families.R.scale).contiguous()


def gated(families: Families, interventions: Interventions) -> Tensor:
    """The same, half of what sets of the upper layer gate credited to them; of two layers."""
    return (families.blocks(interventions, 0.5) * families.R.scale).contiguous()


def lrp(families: Families, interventions: Interventions | None = None) -> Tensor:
    """`f(x) (R(S_1) + R(S_2) + ...)`: conventional LRP, which has relevance of single sets."""
    return sums(families.marginals()) * families.R.scale


def lrp_product(families: Families, interventions: Interventions | None = None) -> Tensor:
    """`f(x) R(S_1) R(S_2) ...`: the same, as if the layers did not interact."""
    return products(families.marginals()) * families.R.scale


def activation(families: Families, interventions: Interventions | None = None) -> Tensor:
    """The activations of all neurons of the sets, added up."""
    return sums(families.activations())


def occlusion(families: Families, interventions: Interventions) -> Tensor:
    """`f(x) - f(x \\ (S_1 | S_2 | ...))`: what the output loses without all of the sets."""
    return interventions.united(*families.sets)


def occlusion_sum(families: Families, interventions: Interventions) -> Tensor:
    """`sum over l of f(x) - f(x \\ S_l)`: what the output loses without each set alone."""
    alone = [[chosen] for family in families.sets for chosen in family]
    lost = interventions.output - interventions.without(alone)
    return sums(torch.split(lost, list(families.shape)))


SCORES: dict[str, Score] = {
    "joint": joint,
    "blocks": blocks,
    "blocks, gating": gated,
    "lrp": lrp,
    "lrp product": lrp_product,
    "activation": activation,
    "occlusion": occlusion,
    "occlusion sum": occlusion_sum,
}
"""By the name under which `evaluate` knows them."""
METHODS = ("joint", "lrp", "activation", "occlusion")
"""What `evaluate` compares if nothing else is said: joint relevance and the paper's baselines."""


def sums(values: Sequence[Tensor]) -> Tensor:
    """`[n1, n2, ...]`: the sum of a number `[n]` of each family, for all combinations."""
    return reduce(torch.add, _apart(values))


def products(values: Sequence[Tensor]) -> Tensor:
    """`[n1, n2, ...]`: the product of a number `[n]` of each family, for all combinations."""
    return reduce(torch.mul, _apart(values))


def _apart(values: Sequence[Tensor]) -> Iterator[Tensor]:
    """Each along an axis of its own."""
    return (value.view(-1, *(1,) * (len(values) - place - 1)) for place, value in enumerate(values))


def _added_up(part: Partition, values: Tensor) -> Tensor:
    """`[n]`: a value for each neuron of a layer summed over the neurons of each set."""
    return part.add_up(values.unsqueeze(0))[0, 0]
