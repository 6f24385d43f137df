"""`bounds`: what bounds relevance between distant layers, and over three (beyond the paper).

Walks through blocks (`nrm.Blocks`) are complete: what sets of the upper layer have jointly with A
sums to what is lost without A. Beside them, other complete readings of the same differences, the
best that any of them could be, and exact effects of patching (`nrm_reproduce.readings`), which say
what a joint contribution is made of. And triples: how far relevance finds the largest of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nrm import Blocks
from nrm.display import counted
from nrm.errors import InputError
from nrm.evaluation import Evaluation, Families, Interventions, pearson
from nrm.evaluation.faithfulness import Row as Correlation
from nrm.evaluation.scores import SCORES, By
from nrm.evaluation.store import Store, digest
from nrm.removal import Removal
from nrm.search import Flows, Order
from nrm.tensors import full_precision
from nrm_reproduce import comparison
from nrm_reproduce.cnn import KMeans
from nrm_reproduce.comparison import BASELINES, OTHERS, READING
from nrm_reproduce.networks import Kind, Pictured, of_class, pictured
from nrm_reproduce.readings import HERE, Between, best_additive, gauss
from nrm_reproduce.report import Experiment, Report, Request, Row, Table, versions

NAME = "bounds"
SAMPLES = 10
WALKS = OTHERS[0]
"""LRP-0 with biases as inputs: beside which blocks are compared, and whose baselines these are."""
POINTS = (1, 2, 3, 5, 10)
"""Of the path."""
REMOVALS: tuple[Removal, ...] = ("zero", "mean")
TOPS = (1, 5, 10, 50)
"""How many triples are looked for."""

SECANTS = "blocks (secants)"
IN_PLACE, RESTORED = "through B alone", "through B alone, without the rest of A"
BEST = "best additive reading"
METHODS = {"joint": "walks (LRP-0)", "blocks": SECANTS, **BASELINES}
"""Scores of `evaluate`, and what tables call them."""
OF_PAIRS = METHODS | {"blocks, gating": "blocks (secants, half of gating)"}
"""The same with one that is of two layers alone."""


@dataclass(frozen=True)
class Case:
    """Combinations of sets of some layers.

    Attributes:
        part: "cluster" or "channel".
    """

    layers: tuple[str, ...]
    part: str = "cluster"

    @property
    def title(self) -> str:
        return f"{self.part}s of {' x '.join(self.layers)}"


CASES: Mapping[Kind, tuple[Case, ...]] = {
    "SqueezeNet": (
        Case(("features.3", "features.7")),
        Case(("features.5", "features.10")),
        Case(("features.5.squeeze_activation", "features.12.squeeze_activation"), "channel"),
        Case(("features.3", "features.7", "features.10")),
        Case(("features.5", "features.10", "features.12")),
    ),
    "DigitNet": (
        Case(("relu1", "relu2")),
        Case(("relu1", "relu3"), "channel"),
        Case(("relu1", "relu2", "relu3")),
        Case(("relu1", "relu2", "relu3"), "channel"),
    ),
}
CLUSTERS: Mapping[Kind, int] = {"SqueezeNet": 10, "DigitNet": 5}


Figures = dict[str, dict[str, float | None]]
"""Of a picture: by what is measured, the figure of each method."""

TITLES = {
    "left": "What complete readings leave: sums over B beside f(x) - f(x without A), relative",
    "patched": "Correlation with what reaches the output from A through B alone (patching)",
    "size": "Parts of joint contributions beside all of it (root of the sum of squares)",
    **{f"overlap {k}": f"The {k} most relevant among the {k} that contribute most" for k in TOPS},
    **{
        f"reached {k}": f"What the {k} most relevant contribute, of the most that can" for k in TOPS
    },
}
"""Of tables, by what is measured."""


# -- one picture -----------------------------------------------------------------------------------


def pairs(families: Families, interventions: Interventions) -> Figures:
    """Of all pairs of sets of two layers of one sample.

    Returns:
        `pearson`: of each score with the joint contribution. `left`: of complete readings, how far
        their sums are from what is lost, on average and as a share of it. `patched`: correlations
        with the exact effect of A through B alone, the mean of both its ends. `size`: of parts of
        the joint contribution beside it all (root of the sum of squares).
    """
    between = Between(families, interventions)
    contribution = interventions.joint(*families.sets)
    found = {said: SCORES[name](families, interventions) for name, said in OF_PAIRS.items()}
    found["linear at x"] = between.along_path(HERE)
    found |= {_path(n): between.along_path(gauss(n)) for n in POINTS}
    found["along A's own removal, 3 points"] = between.along_removal(gauss(3))
    ends = {IN_PLACE: between.in_place(), RESTORED: between.restored()}
    patched = (ends[IN_PLACE] + ends[RESTORED]) / 2
    found |= ends | {"mean of both": patched}
    complete = [SECANTS, "linear at x", *map(_path, POINTS)]
    lost = between.lost
    known = {name: pearson(score, contribution) for name, score in found.items()}
    known[BEST] = best_additive(contribution, lost)
    return {
        "pearson": known,
        "left": {
            name: float((found[name].sum(1) - lost).abs().mean() / lost.abs().mean())
            for name in complete
        },
        "patched": {
            name: pearson(found[name], patched)
            for name in (METHODS["joint"], "linear at x", *complete[2:], SECANTS)
        },
        "size": {
            "through B alone": _size(patched, contribution),
            "the rest: B's removal changes what A does beside B": _size(
                contribution - patched, contribution
            ),
        },
    }


def triples(families: Families, interventions: Interventions) -> Figures:
    """Of all combinations of sets of three layers of one sample.

    Returns:
        `pearson`: of each score with the joint contribution; `overlap k`: the share of the k
        largest joint contributions that are among the k most relevant; `reached k`: what the k
        most relevant contribute, as a share of the most that any k do. For walks and blocks the
        most relevant are those that their searches find.
    """
    contribution = interventions.joint(*families.sets)
    scores = {METHODS[name]: SCORES[name](families, interventions) for name in METHODS}
    known = {name: pearson(score, contribution) for name, score in scores.items()}
    known[BEST] = best_additive(contribution, interventions.united(families.sets[0]))
    found: Figures = {"pearson": known}
    ks = [k for k in TOPS if k < contribution.numel()]
    first, *more = families.sets
    blocks = Blocks(families.R, first, removal=interventions.removal)
    order: Order = "largest" if float(families.R.scale) > 0 else "smallest"
    searched = {
        SECANTS: blocks.top(*more, k=max(ks), order=order),
        METHODS["joint"]: families.R.top(first, *more, k=max(ks), order=order),
    }
    places = {
        name: _places(searched[name], contribution)
        if name in searched
        else score.flatten().topk(max(ks)).indices
        for name, score in scores.items()
    }
    best = contribution.flatten().topk(max(ks))
    for k in ks:
        most = float(best.values[:k].sum())
        wanted = set(best.indices[:k].tolist())
        for name, chosen in places.items():
            taken = chosen[:k]
            found.setdefault(f"overlap {k}", {})[name] = len(wanted & set(taken.tolist())) / k
            reached = float(contribution.flatten()[taken].sum()) / most
            found.setdefault(f"reached {k}", {})[name] = reached
    return found


def _path(count: int) -> str:
    return f"path, {count} point{'s' if count > 1 else ''}"


def _size(part: Tensor, whole: Tensor) -> float | None:
    size = float(whole.double().norm())
    return float(part.double().norm()) / size if size > 0 else None


def _places(flows: Flows, contribution: Tensor) -> Tensor:
    """`[k]`, where combinations lie among all, flat."""
    found = [np.ravel_multi_index(tuple(f.parts.values()), contribution.shape) for f in flows]
    return torch.tensor(found, dtype=torch.long, device=contribution.device)


# -- the experiment --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """What was found of a case.

    Attributes:
        evaluation: its figures are those of `pairs` or `triples`.
    """

    case: Case
    removal: Removal
    evaluation: Evaluation

    @property
    def title(self) -> str:
        return f"{self.case.title}, removed: {self.removal}"


def run(request: Request) -> Report:
    """All cases, with removal to zero and to the mean, on some pictures."""
    network = pictured(request, request.samples or SAMPLES)
    cases = tuple(map(_case, request.layers)) or CASES[network.kind]
    weights = digest(network.model)
    network.model.to(request.device)
    with torch.no_grad(), full_precision():
        found = [
            _found(case, removal, network, weights, request)
            for case in cases
            for removal in REMOVALS
        ]
    return Report(
        NAME,
        f"What bounds relevance between distant layers of {network.kind}",
        [row for one in found for row in _rows(one)],
        facts={
            "network": network.said,
            "data": f"{len(network.photos)} {network.pictures}",
            "explained": "the predicted class",
            "clusters of each layer": CLUSTERS[network.kind],
            "seed": request.seed,
            "versions": versions(),
        },
        notes=_READING,
        details={one.title: one.evaluation.table() for one in found},
        tables=[
            table for figure, title in TITLES.items() if (table := _table(figure, title, found))
        ],
    )


_READING = (
    "The Pearson correlation of a score with the joint contribution (eq. 57) of neuron sets, one "
    "of each layer, to the logit of the predicted class: over all combinations of a picture, then "
    "the mean over pictures, with 95 % bootstrap intervals. Removed activations become zero, or "
    "the mean of their channel.",
    "Walks, and the baselines of single sets, are those of LRP-0 with biases as inputs. "
    + READING.format(parts="sets"),
    "Path: what removing A changes at B, times the output's gradient, averaged from without A to "
    "with A at so many points of Gauss and Legendre. Blocks take slopes "
    "between the two runs instead. The best additive reading has the same sums over B, what is "
    "lost without A, and is fitted to the contributions: a bound, and no way to explain anything.",
    "Through B alone: f(x) less f with B as it is without A and all else as it is; at the other "
    "end, f without A but with B as it is, less f without A. Both are exact effects of patching.",
)


def _case(layers: tuple[str, ...]) -> Case:
    """Of layers that were named: their clusters.

    Raises:
        InputError: they are neither two nor three.
    """
    if len(layers) not in (2, 3) or len(set(layers)) < len(layers):
        raise InputError(f"--layers {','.join(layers)}: name two or three different layers.")
    return Case(layers)


def _found(
    case: Case, removal: Removal, network: Pictured, weights: str, request: Request
) -> Found:
    by: By = "channel"
    if case.part == "cluster":
        by = KMeans(CLUSTERS[network.kind], request.seed)
    settings = {"weights": weights, "seed": request.seed, "by": digest(by)}
    settings |= {"layers": case.layers, "removal": removal, "methods": list(OF_PAIRS)}
    store = Store(request.kept / digest(settings)[:12], settings)
    rows: list[Correlation] = []
    request.say(f"{case.title}, removed: {removal}: {len(network.photos)} pictures ...")
    with counted(request.progress, "pictures", len(network.photos)) as advance:
        for photo in network.photos:
            x = photo.x.to(request.device)
            find = partial(one_picture, network.model, x, case, removal, by)
            found = store.once(digest([photo.name, photo.x]), find)
            methods = dict.fromkeys(m for each in found["figures"].values() for m in each)
            rows += [
                Correlation(
                    photo.name,
                    method,
                    found["target"],
                    found["logit"],
                    {figure: each.get(method) for figure, each in found["figures"].items()},
                )
                for method in methods
            ]
            advance(1)
    return Found(case, removal, Evaluation(case.layers, tuple(rows), request.seed))


def one_picture(
    model: nn.Module, x: Tensor, case: Case, removal: Removal, by: By
) -> dict[str, Any]:
    """What JSON keeps of a picture: `target`, `logit`, `figures`."""
    number = int(model(x)[0].argmax())
    explainer = WALKS.explainer(of_class(model, number))
    families = Families(explainer(x, target=0), case.layers, by)
    interventions = Interventions(explainer, x, target=0, removal=removal)
    find = pairs if len(case.layers) == 2 else triples
    figures = find(families, interventions)
    return {"target": number, "logit": float(interventions.output), "figures": figures}


def _rows(found: Found) -> list[Row]:
    own = found.evaluation
    methods = {m: m for m in own.methods if own.mean(m).mean is not None}
    return comparison.rows(f"{NAME}: {found.title}", own, methods, {})


def _table(figure: str, title: str, found: Sequence[Found]) -> Table | None:
    """The means of a figure, where there is any."""
    lines = []
    for one in found:
        own = one.evaluation
        if figure not in own.figures:
            continue
        for method in own.methods:
            mean = own.mean(method, figure)
            if mean.samples:
                lines.append((one.title, method, mean.mean, mean.low, mean.high, mean.samples))
    heads = ("sets", "method", "mean", "low", "high", "samples")
    return Table(title, heads, lines) if lines else None


EXPERIMENT = Experiment(NAME, run, frozenset({"layers", "device"}))
