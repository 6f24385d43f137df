"""The paper's experiments by name: what `nrm reproduce NAME` runs."""

from __future__ import annotations

import difflib

from nrm.errors import InputError
from nrm.experiments.additive.experiment import Additive
from nrm.experiments.cnn.experiment import CnnPairs
from nrm.experiments.cnn.plan import CHANNELS, CLUSTERS
from nrm.experiments.everything import Everything
from nrm.experiments.mlp.experiment import MlpMnist
from nrm.experiments.recurrent.experiment import Recurrent
from nrm.experiments.request import Experiment
from nrm.experiments.rules.experiment import Rules

_ALL: tuple[Experiment, ...] = (
    MlpMnist(),
    CnnPairs(CHANNELS),
    CnnPairs(CLUSTERS),
    Recurrent(),
    Additive(),
    Rules(),
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (*_ALL, Everything(_ALL))
}


def find(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        InputError: there is none.
    """
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(
            f"no experiment is called {name!r}.{hint} There is: {', '.join(EXPERIMENTS)}."
        )
    return EXPERIMENTS[name]
