"""Additive and joint relevance of clusters in two layers, beside interventions (Fig. A.3).

For every picture, the clusters of two layers and all pairs of them: their joint relevance (eq. 9),
their additive relevance (Def. 3, Thm. 3), and what the network loses without them.
"""

from nrm.experiments.additive.comparison import Compared, Effect, Score
from nrm.experiments.additive.contribution import Contributions, contributions
from nrm.experiments.additive.correlation import Mean, additive_ceiling, mean_with_interval

__all__ = [
    "Compared",
    "Contributions",
    "Effect",
    "Mean",
    "Score",
    "additive_ceiling",
    "contributions",
    "mean_with_interval",
]
