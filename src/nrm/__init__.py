"""Normalized relevance measure: relevance of any set of neurons, handled like a probability.

Names are imported when they are first used (PEP 562). `import nrm` alone takes milliseconds, and
whoever wants one thing waits for what that needs. Type checkers see ordinary imports.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrm import (
        circuits,
        composites,
        dataset,
        errors,
        evaluation,
        graph_networks,
        methods,
        operators,
        rules,
        testing,
    )
    from nrm.blocks import Blocks
    from nrm.circuits import Circuit, Components, Edges, components
    from nrm.condition import Condition
    from nrm.dataset import open_results
    from nrm.diagnostics import Diagnostics
    from nrm.errors import NrmError, RelevanceWarning
    from nrm.evaluation import Evaluation, Interventions, evaluate
    from nrm.explainer import Explainer
    from nrm.formulas import Formula, NeuronSet
    from nrm.generated import Generation
    from nrm.measure import Measure
    from nrm.methods import Clusters, clusters
    from nrm.query import Plan
    from nrm.search import Flow, Flows
    from nrm.sets import channels, mask, neurons, patch
    from nrm.targets import AgainstRest, Average, Contrast
    from nrm.teacher_forcing import generation, generations
    from nrm.views import Listing, ProperForm

__version__ = "0.2.0"
__all__ = [
    "AgainstRest",
    "Average",
    "Blocks",
    "Circuit",
    "Clusters",
    "Components",
    "Condition",
    "Contrast",
    "Diagnostics",
    "Edges",
    "Evaluation",
    "Explainer",
    "Flow",
    "Flows",
    "Formula",
    "Generation",
    "Interventions",
    "Listing",
    "Measure",
    "NeuronSet",
    "NrmError",
    "Plan",
    "ProperForm",
    "RelevanceWarning",
    "channels",
    "circuits",
    "clusters",
    "components",
    "composites",
    "dataset",
    "errors",
    "evaluate",
    "evaluation",
    "generation",
    "generations",
    "graph_networks",
    "mask",
    "methods",
    "neurons",
    "open_results",
    "operators",
    "patch",
    "rules",
    "testing",
]
_HOMES = {
    "blocks": ("Blocks",),
    "circuits": ("Circuit", "Components", "Edges", "components"),
    "condition": ("Condition",),
    "dataset": ("open_results",),
    "diagnostics": ("Diagnostics",),
    "errors": ("NrmError", "RelevanceWarning"),
    "evaluation": ("Evaluation", "Interventions", "evaluate"),
    "explainer": ("Explainer",),
    "formulas": ("Formula", "NeuronSet"),
    "generated": ("Generation",),
    "measure": ("Measure",),
    "methods": ("Clusters", "clusters"),
    "query": ("Plan",),
    "search": ("Flow", "Flows"),
    "sets": ("channels", "mask", "neurons", "patch"),
    "targets": ("AgainstRest", "Average", "Contrast"),
    "teacher_forcing": ("generation", "generations"),
    "views": ("Listing", "ProperForm"),
}
"""The modules of all public names that are no modules themselves."""

if not TYPE_CHECKING:  # else every name would be known to type checkers, misspelt ones too

    def __getattr__(name: str) -> Any:
        """A public name or a module of the library, when it is first used."""
        home = next((home for home, names in _HOMES.items() if name in names), None)
        if home is not None:
            found = getattr(importlib.import_module(f"nrm.{home}"), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"nrm.{name}") is not None:
            found = importlib.import_module(f"nrm.{name}")
        else:
            here = sys.modules[__name__]
            raise AttributeError(f"module 'nrm' has no attribute {name!r}", name=name, obj=here)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
