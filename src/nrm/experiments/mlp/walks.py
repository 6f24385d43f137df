"""The paper's walks for the multilayer perceptron."""

from __future__ import annotations

from nrm.experiments.walks import Walks
from nrm.rules import PlainGamma

PAPERS = Walks("joint", "NRM (gamma 0.1)", PlainGamma(0.1), "drop")
"""The paper's. The baselines are those of its explainer."""
