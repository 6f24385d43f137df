"""Evaluation of relevance by intervention (sections 4.1, 4.2; appendix I).

rerun          the captured graph again from some node on, for many copies of a sample
combinations   all combinations of sets of several families, removed in turn
intervention   outputs without sets, and joint contributions (eqs. 34, 57)
patching       outputs with other values of components, and of what one hands another
metrics        correlations, contribution of the k best (eq. 58), bootstrap intervals
scores         numbers for combinations: joint relevance, and what it is compared with
faithfulness   `evaluate`: scores beside joint contributions, over samples
store          a folder of finished samples, from which an interrupted run goes on, for one setting
"""

from nrm.evaluation.faithfulness import Evaluation, evaluate
from nrm.evaluation.intervention import Interventions, joint_contributions
from nrm.evaluation.metrics import (
    Mean,
    bootstrap,
    bootstrap_difference,
    contribution_of_top,
    pearson,
    spearman,
)
from nrm.evaluation.patching import Patching
from nrm.evaluation.scores import Families

__all__ = [
    "Evaluation",
    "Families",
    "Interventions",
    "Mean",
    "Patching",
    "bootstrap",
    "bootstrap_difference",
    "contribution_of_top",
    "evaluate",
    "joint_contributions",
    "pearson",
    "spearman",
]
