"""The walks that experiments compare, and their joint relevance as a score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from nrm.composites import Composite
from nrm.evaluation.baselines import By, Families
from nrm.evaluation.intervention import Interventions
from nrm.explainer import Explainer
from nrm.formulas import NeuronSet
from nrm.measure import Measure
from nrm.rules import Occlusion, Rule, Zero


@dataclass(frozen=True)
class Walks:
    """Which rules apply, and what becomes of biases.

    Attributes:
        key: what `evaluate` calls them.
        method: what tables call them.
    """

    key: str
    method: str
    rules: Rule | Composite
    bias: Literal["drop", "input"]

    def explainer(self, model: nn.Module) -> Explainer:
        """An explainer of a model by these walks."""
        return Explainer(model, self.rules, bias=self.bias)


OTHERS = (
    Walks("zero", "NRM (LRP-0, biases as inputs)", Zero(), "input"),
    Walks(
        "occlusion walks",
        "NRM (occlusion, biases take the rest)",
        Occlusion(rest_to_bias=True),
        "input",
    ),
)
"""Beyond the paper."""


@dataclass(frozen=True, eq=False)
class JointRelevance:
    """A score for `evaluate`: joint relevance by other walks than those of its explainer.

    So that all walks are compared with contributions that are computed only once.
    """

    walks: Walks
    model: nn.Module
    layers: tuple[str, ...]
    by: By = "neuron"

    def __post_init__(self) -> None:
        # No field: what is captured later is no part of the setting that a store compares.
        object.__setattr__(self, "_explainer", self.walks.explainer(self.model))

    def __call__(self, families: Families, interventions: Interventions) -> Tensor:
        """`[n1, n2, ...]`: `f(x) R(S_1, S_2, ...)`."""
        explainer: Explainer = self._explainer  # type: ignore[attr-defined]
        (entry,) = families.R.graph.inputs
        R = explainer(families.R.activations(entry.name), target=families.R.target)
        known = dict(zip(self.layers, families.sets, strict=True))

        def given(R: Measure, layer: str) -> Iterable[NeuronSet]:
            return known[layer]  # clusters are not found again

        by = given if callable(self.by) else self.by
        return (Families(R, self.layers, by).joint() * R.scale).contiguous()
