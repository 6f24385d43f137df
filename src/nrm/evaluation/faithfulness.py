"""Does relevance say what the network loses? Scores beside interventions (sections 4.1, 4.2).

`evaluate` compares scores of combinations of neuron sets (`nrm.evaluation.scores`) with their joint
contributions (eq. 57), over samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import index, length_hint
from pathlib import Path
from typing import Any

from torch import Tensor

from nrm import __version__
from nrm.display import Progress, counted
from nrm.errors import InputError, QueryError
from nrm.evaluation.intervention import Interventions, joint_contributions
from nrm.evaluation.metrics import (
    Mean,
    Ranking,
    bootstrap,
    bootstrap_difference,
    contribution_of_top,
    pearson,
    ranks,
    require_ranking,
    require_seed,
)
from nrm.evaluation.scores import METHODS, SCORES, By, Families, Score
from nrm.evaluation.store import Store, described, digest
from nrm.explainer import Explainer
from nrm.removal import Removal

Inputs = Tensor | Sequence[Tensor]
"""One sample: the model's input, batch axis included, or its inputs by position."""
Neuron = int | tuple[int, ...]
"""An output."""
Chosen = str | int | tuple[int, ...] | Callable[[str, Inputs], Neuron]
"""Which output is explained: `"predicted"` for the largest one; one for all samples; or a function
of a sample's name and inputs."""

RANKED = 2**22
"""Up to how many combinations ranks are correlated, by default."""


# -- what is found --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method on one sample.

    Attributes:
        target, output: the explained output, and its value.
        figures: `"pearson"`, `"spearman"` and `"SC_k"` for every k; `None` where a correlation is
            not defined.
    """

    sample: str
    method: str
    target: Neuron
    output: float
    figures: dict[str, float | None]


@dataclass(frozen=True, repr=False)
class Evaluation:
    """How well scores of combinations agree with their joint contributions.

    Attributes:
        layers: whose sets were combined.
        rows: sample by sample, in the order given; of each, the methods.
        seed: of the bootstrap intervals.
    """

    layers: tuple[str, ...]
    rows: tuple[Row, ...]
    seed: int = 0

    @property
    def methods(self) -> tuple[str, ...]:
        """Their names, in the order in which they were compared."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @property
    def figures(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.figures))

    def values(self, method: str, figure: str = "pearson") -> list[float | None]:
        """One figure of a method, of every sample.

        Arguments:
            figure: one of `figures`: `"pearson"`, `"spearman"`, `"SC_10"`.

        Raises:
            QueryError: there is no such method or figure.
        """
        if method not in self.methods or figure not in self.figures:
            raise QueryError(
                f"there is no {figure!r} of {method!r}; there are {', '.join(self.figures)} of "
                f"{', '.join(self.methods)}."
            )
        return [row.figures.get(figure) for row in self.rows if row.method == method]

    def mean(self, method: str, figure: str = "pearson") -> Mean:
        """Over samples, with its bootstrap interval of 95 %.

        Arguments and errors: as for `values`.
        """
        return bootstrap(self.values(method, figure), self.seed)

    def difference(self, a: str, b: str, figure: str = "pearson") -> Mean:
        """By how much method `a` is above method `b` on the same samples: a paired comparison.

        Arguments and errors: as for `values`.
        """
        return bootstrap_difference(self.values(a, figure), self.values(b, figure), self.seed)

    def table(self) -> list[dict[str, Any]]:
        """One line for each method: every figure's mean, `..._low`, `..._high`, `..._samples`."""
        return [{"method": method, **self._line(method)} for method in self.methods]

    def to_json(self) -> str:
        """The table and all rows."""
        content = {
            "layers": self.layers,
            "seed": self.seed,
            "means": self.table(),
            "rows": [asdict(row) for row in self.rows],
        }
        return json.dumps(content, indent=1, allow_nan=False)

    def __repr__(self) -> str:
        """The means with their intervals, a line for each method."""
        samples = len({row.sample for row in self.rows})
        lines = [f"Evaluation({' x '.join(self.layers)}, {samples} samples)"]
        width = max(map(len, self.methods))
        for method in self.methods:
            means = (f"{figure} {self.mean(method, figure)}" for figure in self.figures)
            lines.append(f"  {method:{width}}  " + "  ".join(means))
        return "\n".join(lines)

    def _line(self, method: str) -> dict[str, Any]:
        line: dict[str, Any] = {}
        for figure in self.figures:
            found = self.mean(method, figure)
            line |= {figure: found.mean, f"{figure}_low": found.low, f"{figure}_high": found.high}
            line[f"{figure}_samples"] = found.samples
        return line


# -- over samples ---------------------------------------------------------------------------------


def evaluate(
    explainer: Explainer,
    samples: Iterable[Inputs | tuple[str, Inputs]],
    layers: Sequence[str],
    by: By = "channel",
    methods: Sequence[str] | Mapping[str, Score] = METHODS,
    ks: Sequence[int] = (1, 10, 100),
    target: Chosen = "predicted",
    removal: Removal = "zero",
    order: Ranking = "largest",
    ranked: int = RANKED,
    memory: int = 2**28,
    progress: Progress = False,
    store: Path | str | None = None,
    seed: int = 0,
) -> Evaluation:
    """Compare scores of all combinations of neuron sets with their joint contributions (eq. 57).

    Arguments:
        samples: one at a time, batch axis included; `(name, x)` to call them something else than
            by their number.
        layers: one set of each makes a combination.
        by: what layers are divided into; or a function of the measure of a sample and a layer that
            gives neuron sets, e.g. `lambda R, layer: nrm.clusters(R, layer, 5)`.
        methods: some of `SCORES`; or by name, scores of your own.
        ks: of the `SC_k` (eq. 58); none for none.
        removal: what becomes of removed neurons, as for `Interventions`.
        order: which combinations `SC_k` takes for the most relevant ones.
        ranked: with more combinations than this there is no Spearman correlation, for which all of
            them are sorted once for every method; 0 for never.
        memory: bytes that what travels at once may take, roughly. Beside it there are, for all
            combinations, outputs without them, contributions and the scores of one method at a
            time.
        progress: whether to show a progress bar; or a function to call instead, with the number of
            samples just done.
        store: a folder where every sample is kept as soon as it is there. Called again, `evaluate`
            goes on, and gives the same as without interruption. Samples are known by their name,
            values and target: there may be others the second time. Settings and weights are those
            of the folder, or it is refused; code is not compared: after changing what the model
            or a score of your own computes, take another folder.
        seed: of the bootstrap intervals.

    Raises:
        InputError: the folder is of other settings, or there is no sample.
        QueryError: no such method or order, or neuron sets that cannot be removed.

    Example:
        >>> found = evaluate(explainer, images, ["1", "3"], by="neuron", ks=(10, 100))
        >>> found.mean("joint"), found.difference("joint", "lrp")
    """
    require_ranking(ks, order)
    require_seed(seed)
    seed = int(seed)
    if isinstance(layers, str):
        raise QueryError(f"layers are a list of names, not {layers!r}.")
    task = _Task(
        explainer,
        tuple(layers),
        by,
        _scores(methods),
        tuple(map(int, ks)),
        target,
        removal,
        order,
        ranked,
        memory,
    )
    kept = None if store is None else Store(Path(store), task.settings(seed))
    rows: list[Row] = []
    with counted(progress, "evaluating", length_hint(samples)) as advance:
        for name, inputs in _named(samples):
            rows += _kept_rows(task, kept, name, inputs)
            advance(1)
    if not rows:
        raise InputError("there is no sample to evaluate.")
    return Evaluation(task.layers, tuple(rows), seed)


@dataclass(frozen=True, eq=False)
class _Task:
    """What is done with every sample."""

    explainer: Explainer
    layers: tuple[str, ...]
    by: By
    scores: Mapping[str, Score]
    ks: tuple[int, ...]
    target: Chosen
    removal: Removal
    order: Ranking
    ranked: int
    memory: int

    def settings(self, seed: int) -> dict[str, Any]:
        """What the figures of a sample depend on, beside the sample."""
        of = self.explainer
        return {
            "layers": self.layers,
            "by": self.by if isinstance(self.by, str) else described(self.by),
            "methods": {name: digest(score) for name, score in self.scores.items()},
            "ks": self.ks,
            "order": self.order,
            "ranked": self.ranked,
            "removal": (self.removal if isinstance(self.removal, str) else described(self.removal)),
            "composite": "suggested" if of.composite is None else repr(of.composite),
            "rules": digest([of.composite, of.bias, of.strict, of.fallback]),
            "captured": described([of.output, of.batch_axis, of.head]),
            "model": digest(of.model),
            "seed": seed,
            "nrm": __version__,
        }

    def rows(self, name: str, inputs: Sequence[Tensor], target: Neuron | None) -> list[Row]:
        """Every method on one sample; no target is the largest output."""
        R = self.explainer(*inputs, target=target)
        assert R.target is not None
        found = R.target[0].tolist()
        neuron: Neuron = tuple(found) if isinstance(found, list) else found
        families = Families(R, self.layers, self.by, self.memory)
        interventions = Interventions(
            self.explainer, *inputs, target=neuron, removal=self.removal, memory=self.memory
        )
        contribution = _Contribution(
            joint_contributions(interventions, *families.sets), self.ks, self.order, self.ranked
        )
        return [
            Row(
                name,
                method,
                neuron,
                float(interventions.output),
                contribution.figures(_tensor(method, score(families, interventions))),
            )
            for method, score in self.scores.items()
        ]


class _Contribution:
    """The joint contributions of one sample, to compare scores with."""

    def __init__(self, values: Tensor, ks: Sequence[int], order: Ranking, ranked: int) -> None:
        self.values, self.ks, self.order = values, ks, order
        self.ranks = ranks(values) if values.numel() <= ranked else None

    def figures(self, score: Tensor) -> dict[str, float | None]:
        """How well a score agrees with them."""
        found = {"pearson": pearson(score, self.values)}
        if self.ranks is not None:
            found["spearman"] = pearson(ranks(score), self.ranks)
        top = contribution_of_top(score, self.values, self.ks, self.order).tolist()
        return found | {f"SC_{k}": total for k, total in zip(self.ks, top, strict=True)}


def _kept_rows(task: _Task, kept: Store | None, name: str, inputs: Sequence[Tensor]) -> list[Row]:
    """The rows of one sample, as they were kept, or found and kept."""
    target = _target(task.target, name, inputs)
    if kept is None:
        return task.rows(name, inputs, target)
    key = digest([kept.settings, name, inputs, target])
    known = kept.read(key)
    try:
        rows = [Row(**row | {"target": _neuron(row["target"])}) for row in known or ()]
    except (TypeError, KeyError, QueryError):
        rows = []  # not what was written
    if not rows:
        rows = task.rows(name, inputs, target)
        kept.write(key, [asdict(row) for row in rows])
    return rows


def _named(samples: Iterable[Inputs | tuple[str, Inputs]]) -> Iterator[tuple[str, list[Tensor]]]:
    for number, sample in enumerate(samples):
        if isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], str):
            yield sample[0], _listed(sample[0], sample[1])
        else:
            yield str(number), _listed(str(number), sample)


def _listed(name: str, inputs: Any) -> list[Tensor]:
    listed = list(inputs) if isinstance(inputs, Sequence) else [inputs]
    if not listed or not all(isinstance(x, Tensor) for x in listed):
        raise InputError(
            f"sample {name!r} is to be a tensor, or the model's inputs in a list of tensors."
        )
    return listed


def _tensor(method: str, score: Any) -> Tensor:
    """What a score of the user's own gives."""
    if not isinstance(score, Tensor):
        raise QueryError(
            f"the score {method!r} is to give a tensor with an axis for each layer, not "
            f"{type(score).__name__}."
        )
    return score


def _target(chosen: Chosen, name: str, inputs: Sequence[Tensor]) -> Neuron | None:
    if chosen == "predicted":
        return None
    if callable(chosen):
        chosen = chosen(name, inputs[0] if len(inputs) == 1 else inputs)
    if isinstance(chosen, str):
        raise QueryError(
            f"the target is 'predicted', an output or a function of a sample, not {chosen!r}."
        )
    return _neuron(chosen)


def _neuron(found: Any) -> Neuron:
    found = found.tolist() if isinstance(found, Tensor) else found
    try:
        return tuple(map(index, found)) if isinstance(found, Sequence) else index(found)
    except TypeError:
        raise QueryError(
            f"a target is the number of an output, or one for each of its axes, not {found!r}."
        ) from None


def _scores(methods: Sequence[str] | Mapping[str, Score]) -> dict[str, Score]:
    if isinstance(methods, Mapping) and methods:
        return dict(methods)
    unknown = [name for name in methods if name not in SCORES]
    if unknown or not methods or isinstance(methods, str):
        raise QueryError(f"methods are some of {', '.join(SCORES)}, not {methods!r}.")
    return {name: SCORES[name] for name in methods}
