"""The paper's walks for convolutional networks."""

from __future__ import annotations

from nrm.composites import GammaFlat
from nrm.experiments.walks import Walks

PAPERS = Walks("joint", "NRM (gamma 0.25)", GammaFlat(0.25), "drop")
"""The paper's. The baselines are those of its explainer."""
