"""Walks on a network that are candidates for its default: what they say, cost, and cancel.

For the experiment `networks`: a score for `evaluate`; total variations, which tell a calm heatmap
from a noisy one; and seconds, as multiples of a forward and backward pass of the same network.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nrm import Explainer, Measure
from nrm.errors import QueryError, RelevanceWarning
from nrm.evaluation import Evaluation, Families, Interventions, evaluate, joint_contributions
from nrm.evaluation.faithfulness import Row
from nrm.evaluation.scores import SCORES, Score
from nrm.evaluation.store import Store, digest
from nrm_reproduce.comparison import BASELINES, JointRelevance, same_sets, steps
from nrm_reproduce.report import Request
from nrm_reproduce.studies import Pair, Sample, Study

BLOCKS = "blocks"
"""Walks through blocks, among the methods."""
CONTRIBUTION = "joint contribution"
"""Among what takes time: all interventions of a pair of layers."""
PURPOSES = ("choosing", "reporting")
"""Of the samples: to choose walks on, and to report on."""
TIMED = 2
"""On how many samples times are measured."""
_MOST_KS = 2_000
_REPEATS = 3


@dataclass(frozen=True, eq=False)
class IfFinite:
    """Joint relevance, or zero everywhere where it overflows: its correlation is not defined."""

    relevance: JointRelevance

    def __call__(self, families: Families, interventions: Interventions) -> Tensor:
        """`[n1, n2]`."""
        try:
            found = self.relevance(families, interventions)
        except QueryError:  # not finite
            return torch.zeros(families.shape, device=families.R.scale.device)
        return found if bool(found.isfinite().all()) else torch.zeros_like(found)


class Trial:
    """All walks and scores on one study.

    Arguments:
        device: where it runs.
    """

    def __init__(self, study: Study, device: torch.device) -> None:
        self.study, self.device = study, device
        study.model.to(device)
        self.weights = digest(study.model)[:12]
        self.memory = 2**32 if device.type == "cuda" else 2**28
        self.explainers = {walks.key: study.explainer(walks) for walks in study.walks}

    def place(self, request: Request, what: str) -> Path:
        """A folder for what is kept of this network."""
        return request.kept / f"{self.study.name}-{self.weights}-{request.seed}" / what

    def evaluation(self, pair: Pair, purpose: str, request: Request) -> Evaluation:
        """All walks beside the joint contributions of a pair of layers.

        Each sample is kept, and all of them together once they are there, by their names: what one
        machine found another one reads.

        Arguments:
            purpose: of the samples: on those to choose on, the walks alone; on those to report on
                everything.
        """
        samples = self.study.choosing if purpose == "choosing" else self.study.reporting
        key = digest([pair.part, pair.layers, pair.by, purpose, [name for name, _ in samples]])
        store = Store(self.place(request, "evaluations"), self._settings)
        rows = store.once(
            key, lambda: [asdict(row) for row in self._evaluate(pair, purpose, samples, request)]
        )
        return Evaluation(pair.layers, tuple(Row(**row) for row in rows), request.seed)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"walks": [repr(walks) for walks in self.study.walks]}

    def _evaluate(
        self, pair: Pair, purpose: str, samples: Sequence[Sample], request: Request
    ) -> Sequence[Row]:
        choosing = purpose == "choosing"
        methods = self.scores(pair)
        if choosing:
            methods = {walks.key: methods[walks.key] for walks in self.study.walks}
        place = f"{digest([pair.part, pair.layers, pair.by])[:12]}-{purpose}"
        # Its settings hold the code of rules' selectors, whose bytes differ between versions.
        place += f"-{sys.implementation.cache_tag}"
        with quietly():
            found = evaluate(
                self.explainers[self.study.default.key],
                [(name, self.inputs(sample)) for name, sample in samples],
                list(pair.layers),
                by=pair.by,
                methods=methods,
                ks=() if choosing else steps(_MOST_KS),
                ranked=0,
                memory=self.memory,
                progress=request.progress,
                store=self.place(request, place),
                seed=request.seed,
            )
        return found.rows

    def scores(self, pair: Pair) -> dict[str, Score]:
        """Of all walks, walks through blocks, and the baselines of the default walks."""
        model = self.study.model
        scores: dict[str, Score] = {
            walks.key: IfFinite(
                JointRelevance(walks, model, pair.layers, pair.by, self.explainers[walks.key])
            )
            for walks in self.study.walks
        }
        return scores | {name: SCORES[name] for name in (BLOCKS, *BASELINES)}

    def inputs(self, sample: tuple[Tensor, ...]) -> list[Tensor]:
        """A sample's, where the network is."""
        return [x.to(self.device) for x in sample]

    # -- what cancels ----------------------------------------------------------------------------

    def variations(self, request: Request) -> dict[str, dict[str, list[float]]]:
        """The sums of absolute relevances, of every sample that is reported on: by walks, at the
        inputs (`"inputs"`) and at every layer that is compared."""
        layers = sorted({layer for pair in self.study.pairs for layer in pair.layers})
        settings = {**self._settings, "layers": layers}
        store = Store(self.place(request, "variations"), settings)
        found: dict[str, dict[str, list[float]]] = {}
        for name, sample in self.study.reporting:
            one = store.once(digest(name), partial(self._cancel, sample, layers))
            for key, each in one.items():
                known = found.setdefault(key, {})
                for place, value in each.items():
                    known.setdefault(place, []).append(value)
        return found

    def _cancel(self, sample: tuple[Tensor, ...], layers: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with quietly():
            for key, explainer in self.explainers.items():
                R = explainer(*self.inputs(sample))
                inputs = [variable.name for variable in R.graph.inputs]
                sizes = _sizes(R, [*inputs, *layers])
                if sizes is not None:
                    total = sum(sizes[name] for name in inputs)
                    found[key] = {"inputs": total} | {name: sizes[name] for name in layers}
        return found

    # -- what it costs ---------------------------------------------------------------------------

    def costs(self, request: Request) -> list[dict[str, Any]]:
        """Times as multiples of a forward and backward pass: of every pair of layers, its part and
        layers, `seconds` of that pass, on which `device`, and `ratios` by method; and of heatmaps
        by all walks, where there are no layers. Medians over a few samples; measured once, on
        whatever device, and kept."""
        store = Store(self.place(request, "costs"), {**self._settings, "samples": TIMED})
        samples = self.study.reporting[:TIMED]
        whole = store.once("heatmaps", partial(self._timed, samples, self._heatmaps))
        found = [{"part": "input", "layers": []} | whole]
        for pair in self.study.pairs:
            key = digest([pair.part, pair.layers, pair.by])
            work = partial(self._timed, samples, partial(self._joint, pair))
            one = store.once(key, work)
            found.append({"part": pair.part, "layers": list(pair.layers)} | one)
        return found

    def _timed(
        self,
        samples: Any,
        runs: Callable[[tuple[Tensor, ...]], Mapping[str, Callable[[], object]]],
    ) -> dict[str, Any]:
        ratios: dict[str, list[float]] = {}
        passes = []
        with quietly():
            for _, sample in samples:
                once = self.seconds(partial(self._pass, sample))
                passes.append(once)
                for key, work in runs(sample).items():
                    ratios.setdefault(key, []).append(self.seconds(work) / once)
        medians = {key: statistics.median(values) for key, values in ratios.items()}
        device = f"{self.device.type}, {torch.get_num_threads()} threads"
        return {"device": device, "seconds": statistics.median(passes), "ratios": medians}

    def _pass(self, sample: tuple[Tensor, ...]) -> None:
        """Forward, and backward to the inputs; of integers, to the weights of their embedding."""
        inputs = [x.detach().clone() for x in self.inputs(sample)]
        embeddings = [m.weight for m in self.study.model.modules() if isinstance(m, nn.Embedding)]
        leaves = [x for x in inputs if x.is_floating_point()] + embeddings[:1]
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_()
            torch.autograd.grad(self.study.model(*inputs).max(), leaves)
        for weight in embeddings:
            weight.requires_grad_(False)

    def _heatmaps(self, sample: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
        inputs = self.inputs(sample)

        def heatmap(explainer: Explainer) -> object:
            R = explainer(*inputs)
            return R.marginals(layers=[variable.name for variable in R.graph.inputs])

        return {key: partial(heatmap, explainer) for key, explainer in self.explainers.items()}

    def _joint(self, pair: Pair, sample: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
        """All scores of a pair of layers, its sets being known, and the interventions."""
        inputs, explainer = self.inputs(sample), self.explainers[self.study.default.key]
        R = explainer(*inputs)
        families = Families(R, pair.layers, pair.by, self.memory)
        given = Interventions(explainer, *inputs, target=R.target, memory=self.memory)
        by = pair.by if isinstance(pair.by, str) else same_sets(pair.layers, families)

        def scored(score: Score) -> object:
            return score(Families(explainer(*inputs), pair.layers, by, self.memory), given)

        # Of walks by gamma one says what all take.
        few = {self.study.default.key, "LRP-0", "occlusion walks", "AttnLRP", BLOCKS, *BASELINES}
        found: dict[str, Callable[[], object]] = {
            key: partial(scored, score) for key, score in self.scores(pair).items() if key in few
        }
        found[CONTRIBUTION] = partial(joint_contributions, given, *families.sets)
        return found

    def seconds(self, run: Callable[[], object]) -> float:
        """The least of some times, after a run that prepares what is kept; of what takes long,
        the time of one further run."""
        run()
        times: list[float] = []
        while len(times) < _REPEATS and sum(times) < 1:
            self._wait()
            begin = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - begin)
        return min(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def quietly() -> Iterator[None]:
    """Without gradients, and without a word about walks that cancel: that is what is measured."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", RelevanceWarning)
        yield


def _sizes(R: Measure, names: list[str]) -> dict[str, float] | None:
    """`sum |R|` of layers; `None` where they overflow."""
    try:
        found = R.marginals(layers=names)
    except QueryError:
        return None
    sizes = {name: float(values.double().abs().sum()) for name, values in found.items()}
    return sizes if all(value < float("inf") for value in sizes.values()) else None
