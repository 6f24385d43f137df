"""The walks that are compared."""

from __future__ import annotations

from typing import Literal

from nrm import rules
from nrm.composites import Composite
from nrm.experiments.walks import Explained, Walks

GAMMAS = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)

Bias = Literal["drop", "input"]
_BIASES: dict[Bias, str] = {"drop": "biases dropped", "input": "biases as inputs"}
_OUTPUTS: dict[Explained, str] = {"logits": "all logits", "probabilities": "softmax"}


def _walks(name: str, rule: rules.Rule | Composite, bias: Bias) -> Walks:
    method = f"{name}, {_BIASES[bias]}"
    return Walks(method, method, rule, bias)


def gamma(value: float, bias: Bias) -> Walks:
    """The paper's rule (eq. 14)."""
    return _walks(f"gamma {value:g}", rules.PlainGamma(value), bias)


def zero(bias: Bias) -> Walks:
    """LRP-0."""
    return _walks("LRP-0", rules.Zero(), bias)


REST = Walks(
    "occlusion, biases take the rest",
    "occlusion, biases take the rest",
    rules.Occlusion(rest_to_bias=True),
    "input",
)

BIASES: tuple[Bias, ...] = ("drop", "input")

RULES: tuple[Walks, ...] = (
    *(zero(bias) for bias in BIASES),
    *(gamma(value, bias) for value in GAMMAS for bias in BIASES),
    *(_walks("sign-aware gamma 0.1", rules.Gamma(0.1), bias) for bias in BIASES),
    *(_walks("z+", rules.ZPlus(), bias) for bias in BIASES),
    *(_walks("alpha 2 beta 1", rules.AlphaBeta(2.0, 1.0), bias) for bias in BIASES),
    *(_walks("occlusion", rules.Occlusion(), bias) for bias in BIASES),
    REST,
)
"""All rules, with and without biases."""

FEW: tuple[Walks, ...] = (
    *(zero(bias) for bias in BIASES),
    *(gamma(value, "drop") for value in (0.02, 0.05, 0.1, 0.25)),
    gamma(0.1, "input"),
    _walks("z+", rules.ZPlus(), "drop"),
    _walks("alpha 2 beta 1", rules.AlphaBeta(2.0, 1.0), "drop"),
    REST,
)
"""Those for where a comparison takes long."""


def outputs(walks: Walks) -> tuple[Walks, ...]:
    """The same walks from other outputs than the explained logit alone."""
    return tuple(
        Walks(f"{walks.key}, {text}", f"{walks.method}, {text}", walks.rules, walks.bias, explained)
        for explained, text in _OUTPUTS.items()
    )
