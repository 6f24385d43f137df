"""Normalized relevance measure: relevance of any set of neurons, handled like a probability."""

import nrm.cli.starting as _starting  # before torch: Ctrl-C and the import path of the command
from nrm import composites, methods, rules
from nrm.condition import Condition
from nrm.errors import NrmError, RelevanceWarning
from nrm.evaluation import evaluate
from nrm.explainer import Explainer
from nrm.formulas import Formula, NeuronSet
from nrm.measure import Measure
from nrm.methods import Clusters, clusters
from nrm.sets import channels, mask, neurons, patch

__all__ = [
    "Clusters",
    "Condition",
    "Explainer",
    "Formula",
    "Measure",
    "NeuronSet",
    "NrmError",
    "RelevanceWarning",
    "channels",
    "clusters",
    "composites",
    "evaluate",
    "mask",
    "methods",
    "neurons",
    "patch",
    "rules",
]
__version__ = "0.1.0"

_starting.library_is_imported()
