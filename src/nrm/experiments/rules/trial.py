"""One comparison: a network, neuron sets of some of its layers, walks, and samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from nrm.evaluation import Evaluation, evaluate
from nrm.evaluation.faithfulness import By, Chosen, Row, Score
from nrm.evaluation.fingerprint import digest
from nrm.experiments.cnn.one_class import of_class
from nrm.experiments.walks import JointRelevance, Walks
from nrm.progress import counted
from nrm.rules import Zero

Sample = tuple[str, Tensor]
"""A name, and the model's input with its batch axis."""


class Networks(Protocol):
    """One network, as it is asked about each sample."""

    def groups(self, samples: Sequence[Sample]) -> Iterator[tuple[nn.Module, Chosen, list[Sample]]]:
        """Samples with the model that they are given to, and the output that is explained."""
        ...


@dataclass(frozen=True, eq=False)
class Whole:
    """A network with all its outputs."""

    model: nn.Module

    def groups(self, samples: Sequence[Sample]) -> Iterator[tuple[nn.Module, Chosen, list[Sample]]]:
        yield self.model, "predicted", list(samples)


@dataclass(frozen=True, eq=False)
class OneClass:
    """A network of which only the predicted class is kept: the same, and faster to intervene on."""

    model: nn.Module

    def groups(self, samples: Sequence[Sample]) -> Iterator[tuple[nn.Module, Chosen, list[Sample]]]:
        for name, x in samples:
            yield of_class(self.model, int(self.model(x)[0].argmax())), 0, [(name, x)]


@dataclass(frozen=True, eq=False)
class Trial:
    """Combinations of neuron sets of some layers of a network.

    Attributes:
        name: of files.
        title: of tables and figures.
        walks: those that are compared.
        choosing: samples on which the best walks are found.
        reporting: others, which are reported on.
        ceilings: what no measure exceeds, by name.
    """

    name: str
    title: str
    networks: Networks
    layers: tuple[str, ...]
    by: By
    walks: Sequence[Walks]
    choosing: Sequence[Sample]
    reporting: Sequence[Sample]
    ceilings: Mapping[str, Score] = field(default_factory=dict)

    def choose(self, kept: Path, seed: int, progress: bool) -> tuple[Walks, Evaluation]:
        """The walks that agree best with interventions on the samples for choosing."""
        found = self._evaluate(self.choosing, {}, kept / "choosing", seed, progress)
        known = [(found.mean(walks.key).mean, walks) for walks in self.walks]
        defined = [(mean, walks) for mean, walks in known if mean is not None]
        return max(defined, key=lambda pair: pair[0], default=(0.0, self.walks[0]))[1], found

    def report(self, kept: Path, seed: int, progress: bool) -> Evaluation:
        """All walks, and the ceilings, on the other samples."""
        return self._evaluate(self.reporting, self.ceilings, kept / "reporting", seed, progress)

    def _evaluate(
        self,
        samples: Sequence[Sample],
        others: Mapping[str, Score],
        kept: Path,
        seed: int,
        progress: bool,
    ) -> Evaluation:
        rows: list[Row] = []
        with counted(progress, self.title, len(samples)) as advance:
            for model, target, group in self.networks.groups(samples):
                found = evaluate(
                    # Contributions are those of the model, whatever the rule.
                    Walks("", "", Zero(), "drop").explainer(model),
                    group,
                    self.layers,
                    by=self.by,
                    methods=self._scores(self.walks, model) | dict(others),
                    ks=(),
                    target=target,
                    ranked=0,
                    progress=advance,
                    # By the weights: what was found with others is of no use.
                    store=kept / f"{digest(model)[:12]}-{seed}",
                    seed=seed,
                )
                rows += found.rows
        return Evaluation(self.layers, tuple(rows), seed)

    def _scores(self, several: Iterable[Walks], model: nn.Module) -> dict[str, Score]:
        return {w.key: JointRelevance(w, model, self.layers, self.by) for w in several}
