"""The walks that experiments compare, and their joint relevance as a score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from nrm.composites import Composite
from nrm.evaluation.faithfulness import By, Families
from nrm.evaluation.intervention import Interventions
from nrm.explainer import Explainer
from nrm.formulas import NeuronSet
from nrm.measure import Measure
from nrm.rules import Occlusion, Rule, Zero

Explained = Literal["logit", "logits", "probabilities"]
"""The output relevance R~ (eq. 13): that of the target alone, all logits, or their softmax."""


@dataclass(frozen=True)
class Walks:
    """Which rules apply, what becomes of biases, and where walks begin.

    Attributes:
        key: what `evaluate` calls them.
        method: what tables call them.
    """

    key: str
    method: str
    rules: Rule | Composite
    bias: Literal["drop", "input"]
    explained: Explained = "logit"

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
        R = self._measure(explainer, families.R)
        by = self.by if isinstance(self.by, str) else _found(self.layers, families)
        return (Families(R, self.layers, by).joint() * R.scale).contiguous()

    def _measure(self, explainer: Explainer, R: Measure) -> Measure:
        """The measure by these walks for the input of another."""
        (entry,) = R.graph.inputs
        x = R.activations(entry.name)
        if self.walks.explained == "logit":
            return explainer(x, target=R.target)
        logits = R.activations(R.graph.output.name)
        chosen = logits if self.walks.explained == "logits" else logits.softmax(-1)
        return explainer(x, output_relevance=chosen)


def _found(layers: tuple[str, ...], families: Families) -> By:
    """The sets of other walks' families: clusters are not found again."""
    known = dict(zip(layers, families.sets, strict=True))

    def by(R: Measure, layer: str) -> Iterable[NeuronSet]:
        return known[layer]

    return by
