"""All pictures and pairs of layers: compared one by one, kept, and summed up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nrm.composites import GammaFlat
from nrm.evaluation import Interventions
from nrm.evaluation.fingerprint import digest
from nrm.evaluation.store import Store
from nrm.experiments.additive.comparison import Compared, Effect, Score, compare
from nrm.experiments.additive.correlation import Mean, additive_ceiling, mean_with_interval
from nrm.experiments.cnn.data import Photo
from nrm.experiments.cnn.layers import Pair, combinations
from nrm.experiments.cnn.subject import Subject
from nrm.explainer import Explainer
from nrm.methods import clusters

COMPOSITE = GammaFlat(0.25)


class Study:
    """Some pairs of layers of one network.

    Arguments:
        k: clusters in each layer.
        kept: a folder for what an interrupted run leaves.

    Raises:
        UnknownLayerError, QueryError: layers that cannot be compared.
    """

    def __init__(
        self, subject: Subject, pairs: Sequence[Pair], k: int, kept: Path, seed: int
    ) -> None:
        self.explainer = Explainer(subject.model, COMPOSITE)
        self.pairs, self.k, self.seed = tuple(pairs), k, seed
        self.weights = digest(subject.model)[:12]
        graph = self.explainer.graph(subject.photos[0].x)
        for pair in pairs:
            combinations(graph, pair, k)  # refuses before anything takes long
        # By the weights: what was found with others is of no use.
        place = kept / f"additive-{self.weights}-{k}-{seed}"
        self._stores = {
            pair: Store(place / digest(pair)[:12], self._settings(pair)) for pair in pairs
        }

    def compared(self, photo: Photo) -> list[Compared]:
        """Every pair of layers on one picture, as it was kept or found; for the largest logit."""
        keys = {pair: digest([photo.name, photo.x, pair]) for pair in self.pairs}
        found: dict[Pair, Compared] = {}
        for pair, key in keys.items():
            known = Compared.restored(photo, pair, self._stores[pair].read(key))
            if known is not None:
                found[pair] = known
        missing = [pair for pair in self.pairs if pair not in found]
        for pair, new in self._compare(photo, missing).items() if missing else ():
            self._stores[pair].write(keys[pair], {"picture": photo.name, **new.kept()})
            found[pair] = new
        return [found[pair] for pair in self.pairs]

    def _compare(self, photo: Photo, pairs: Sequence[Pair]) -> dict[Pair, Compared]:
        R = self.explainer(photo.x)
        interventions = Interventions(self.explainer, photo.x, target=R.target)
        layers = dict.fromkeys(layer for pair in pairs for layer in pair)
        parts = {layer: clusters(R, layer, self.k, self.seed) for layer in layers}
        return {(a, b): compare(R, interventions, photo, parts[a], parts[b]) for a, b in pairs}

    def _settings(self, pair: Pair) -> dict[str, Any]:
        return {
            "layers": pair,
            "clusters": self.k,
            "composite": repr(COMPOSITE),
            "weights": self.weights,
            "seed": self.seed,
        }


Means = dict[Effect, dict[Score, Mean | None]]


def means(compared: Sequence[Compared], seed: int) -> Means:
    """The mean correlation of every score with every effect, over all pictures."""
    return {
        effect: {
            score: mean_with_interval([one.correlation(score, effect) for one in compared], seed)
            for score in Score
        }
        for effect in Effect
    }


def limits(compared: Sequence[Compared], seed: int) -> dict[Effect, dict[str, Mean | None]]:
    """How large a correlation of additive scores can be, and what they lack, over all pictures."""
    found: dict[Effect, dict[str, Mean | None]] = {}
    for effect in Effect:
        joint, additive, either = (
            [one.correlation(score, effect) for one in compared]
            for score in (Score.JOINT, Score.ADDITIVE, Score.EITHER)
        )
        ceilings = [additive_ceiling(one.effects[effect]) for one in compared]
        found[effect] = {
            "additive_ceiling": mean_with_interval(ceilings, seed),
            "joint_minus_additive": mean_with_interval(_differences(joint, additive), seed),
            "either_minus_additive": mean_with_interval(_differences(either, additive), seed),
        }
    return found


def details(compared: Sequence[Compared], seed: int) -> dict[str, Any]:
    """One pair of layers: means, and all that was found on every picture."""
    return {
        "layers": list(compared[0].layers),
        "correlations": _plain(means(compared, seed)),
        "limits": _plain(limits(compared, seed)),
        "pictures": [
            {
                "picture": one.photo.name,
                "correlations": {
                    effect: {score: one.correlation(score, effect) for score in Score}
                    for effect in Effect
                },
                **one.kept(),
            }
            for one in compared
        ],
    }


def _plain(found: Any) -> Any:
    return {
        effect: {name: None if mean is None else asdict(mean) for name, mean in each.items()}
        for effect, each in found.items()
    }


def _differences(a: Sequence[float | None], b: Sequence[float | None]) -> list[float | None]:
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]
