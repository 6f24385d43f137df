"""`networks`: does relevance say what the network loses, in one network after the other?

For every network pairs of adjacent and of distant layers, their channels, clusters, heads, tokens
or nodes: joint relevance by walks from layer to layer and through blocks beside joint contributions
(eq. 57), and what it costs. And which walks should be the default: gamma and biases are chosen on
samples that are not reported on.

Networks are independent of each other, and so are the pairs of their layers: `--only` runs some
networks, `--part 1/4` a quarter of the work, and what several processes have kept, copied into one
folder `kept`, makes one page. Times are measured where the page is made.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nrm.cli.models import find_device
from nrm.errors import InputError, one_line
from nrm.evaluation import Evaluation
from nrm.evaluation.metrics import Mean, bootstrap, bootstrap_difference
from nrm_reproduce import across_figures, comparison
from nrm_reproduce.candidates import BLOCKS, CONTRIBUTION, PURPOSES, TIMED, Trial
from nrm_reproduce.comparison import BASELINES, Walks
from nrm_reproduce.report import Experiment, Picture, Report, Request, Table, Value, versions
from nrm_reproduce.studies import DEFAULTS, STRONGEST, STUDIES, Kind, Pair, Study

NAME = "networks"
TOP = 10
"""The k of the SC_k that the table shows."""

Values = list[float | None]


@dataclass(frozen=True, eq=False)
class Compared:
    """A pair of layers of a network.

    Attributes:
        chosen_on, reported: on samples to choose walks on, and on those that are reported on.
    """

    pair: Pair
    chosen_on: Evaluation
    reported: Evaluation

    def row(self, method: str, figure: str = "pearson") -> Mean:
        """The mean over the samples that are reported on."""
        return self.reported.mean(method, figure)


@dataclass(frozen=True, eq=False)
class Found:
    """All that was found of a network.

    Attributes:
        variations: sums of absolute relevances, by walks and place, of every sample.
        costs: see `Trial.costs`.
        weights: a digest of the network's.
    """

    study: Study
    pairs: Sequence[Compared]
    variations: Mapping[str, Mapping[str, list[float]]]
    costs: Sequence[Mapping[str, Any]]
    weights: str

    @property
    def best(self) -> Walks:
        """The walks with the largest correlation on the samples to choose on."""
        candidates = [walks for walks in self.study.walks if walks not in self.study.further]
        return max(candidates, key=lambda walks: self.chosen_on(walks.key))

    def chosen_on(self, key: str) -> float:
        """The mean correlation over samples to choose on, then over the pairs of layers; where it
        is not defined it counts as none."""
        means = (one.chosen_on.mean(key).mean for one in self.pairs)
        return statistics.fmean(mean or 0.0 for mean in means)

    def by_sample(self, key: str) -> Values:
        """Of every sample that is reported on, the mean correlation over the pairs of layers."""
        each = zip(*(one.reported.values(key) for one in self.pairs), strict=True)
        return [statistics.fmean(value or 0.0 for value in values) for values in each]

    def calm(self, key: str) -> float | None:
        """The median total variation at the inputs."""
        known = self.variations.get(key)
        return None if known is None else statistics.median(known["inputs"])

    def time(self, key: str) -> float | None:
        """That of a heatmap, in forward and backward passes."""
        return self.costs[0]["ratios"].get(key)  # type: ignore[no-any-return]


# -- the experiment --------------------------------------------------------------------------------


def run(request: Request) -> Report:
    """All networks that there are data for, or those of `--only`; the rest is said to be skipped.

    With `--part` some of their work is done and kept, and there is no table.

    Raises:
        InputError: a network is not known, or there are data for none.
    """
    device = find_device(request.device)
    found: list[Found] = []
    done: dict[str, str | int | float] = {}
    skipped: dict[str, str] = {}
    for name in _named(request.only):
        try:
            study = STUDIES[name](request)
        except (InputError, OSError) as error:
            skipped[name] = one_line(error)
            request.say(f"{name}: skipped: {skipped[name]}")
            continue
        if not study.choosing or not study.reporting:
            raise InputError(f"{name}: too few samples to choose on some and report on others")
        trial = Trial(study, device)
        if request.part is None:
            found.append(_found(trial, request))
        else:
            done[name] = _part(trial, request, *request.part)
    if request.part is not None:
        return Report(NAME, "A part of the work, kept for the rest", (), facts=done)
    if not found:
        raise InputError(f"{NAME}: there is nothing to run on: " + "; ".join(skipped.values()))
    return report(found, skipped, request)


def _named(only: Sequence[str]) -> list[str]:
    unknown = [name for name in only if name not in STUDIES]
    if unknown:
        raise InputError(f"--only {','.join(unknown)}: networks are {', '.join(STUDIES)}")
    return [name for name in STUDIES if name in only or not only]


def _found(trial: Trial, request: Request) -> Found:
    """Of a network, everything: from what is kept, or now."""
    study, pairs = trial.study, []
    for pair in study.pairs:
        request.say(f"{study.name}: {pair.part}s of {' x '.join(pair.layers)} …")
        each = (trial.evaluation(pair, purpose, request) for purpose in PURPOSES)
        pairs.append(Compared(pair, *each))
    request.say(f"{study.name}: total variation and time …")
    return Found(study, pairs, trial.variations(request), trial.costs(request), trial.weights)


def _part(trial: Trial, request: Request, number: int, of: int) -> str:
    """Every `of`-th step of the work on a network, and what was done."""
    study = trial.study
    steps: dict[str, Callable[[], object]] = {
        f"{purpose} on {pair.part}s of {' x '.join(pair.layers)}": partial(
            trial.evaluation, pair, purpose, request
        )
        for purpose in reversed(PURPOSES)  # reporting takes longer
        for pair in study.pairs
    }
    steps["total variations"] = partial(trial.variations, request)
    chosen = list(steps)[number - 1 :: of]
    for name in chosen:
        request.say(f"{study.name}: {name} …")
        steps[name]()
    return "; ".join(chosen)


def report(found: Sequence[Found], skipped: Mapping[str, str], request: Request) -> Report:
    """Tables and figures of all networks."""
    facts: dict[str, str | int | float] = {
        one.study.name: f"{one.study.said}; {len(one.study.reporting)} {one.study.data}; "
        f"weights {one.weights}"
        for one in found
    }
    return Report(
        NAME,
        "Walks from layer to layer and through blocks, network by network",
        (),
        _pictures(found),
        facts
        | {f"skipped: {name}": why for name, why in skipped.items()}
        | {"seed": request.seed, "versions": versions()},
        _READING,
        {one.study.name: _details(one) for one in found},
        tables=[
            _correlations(found),
            _above_baselines(found),
            _sums(found),
            _defaults(found),
            _kinds(found),
            _grid(found),
            _costs(found),
        ],
    )


_READING = (
    "Pearson correlations of a score with the joint contribution of two sets of neurons, one of "
    "each layer, to the explained output: over all pairs of a sample, then means over samples with "
    "95 % bootstrap intervals. What is removed is set to zero. The output is that of the predicted "
    "class, or the similarity.",
    f"Of channels, where there are more, the {STRONGEST} with the largest relevance of each layer "
    "by the default walks are taken. Clusters are those of k-means over positions.",
    "The default is what the library suggests for the network. The best walks are those of the "
    "largest mean over all pairs of layers on samples that are not reported on. Walks through "
    "blocks have nothing to choose.",
    "Where relevances overflow a correlation is not defined, and counts as zero in means over "
    "pairs of layers.",
)


# -- tables ----------------------------------------------------------------------------------------


def _shown(mean: Mean) -> Value:
    return None if mean.mean is None else f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def _where(one: Found, each: Compared) -> tuple[str, str, str, str]:
    return (one.study.name, f"{each.pair.part}s", each.pair.near, " x ".join(each.pair.layers))


def _columns(one: Found) -> dict[str, str]:
    """The methods of a row, by the heads of the tables."""
    found = {"default": one.study.default.key, "best": one.best.key, BLOCKS: BLOCKS}
    return found | {said: key for key, said in BASELINES.items()}


_METHODS = ("default", "best", BLOCKS, *BASELINES.values())
COLUMNS = ("network", "sets", "layers are", "layers", *_METHODS)
"""Of the tables of correlations and of what pairs contribute together."""


def _correlations(found: Sequence[Found]) -> Table:
    lines = []
    for one in found:
        for each in one.pairs:
            columns = _columns(one)
            shown = [_shown(each.row(columns[head])) for head in _METHODS]
            lines.append((*_where(one, each), *shown))
    return Table(
        "Correlation with joint contribution",
        COLUMNS,
        lines,
        group=1,
        note="default: the library's walks; best: those chosen on the other samples, network by "
        "network.",
    )


def _above_baselines(found: Sequence[Found]) -> Table:
    """By how much the walks are above the best of the baselines, sample by sample."""
    lines = []
    for one in found:
        for each in one.pairs:
            means = {key: each.row(key).mean for key in BASELINES}
            top = max(BASELINES, key=lambda key, means=means: means[key] or 0.0)  # type: ignore[misc]
            above = [
                _shown(each.reported.difference(key, top))
                for key in (one.study.default.key, one.best.key, BLOCKS)
            ]
            lines.append((*_where(one, each), BASELINES[top], *above))
    return Table(
        "Above the best baseline of each pair of layers",
        ("network", "sets", "layers are", "layers", "baseline", "default", "best", BLOCKS),
        lines,
    )


def _sums(found: Sequence[Found]) -> Table:
    lines = []
    for one in found:
        for each in one.pairs:
            columns = _columns(one)
            means = [each.row(columns[head], f"SC_{TOP}").mean for head in _METHODS]
            lines.append((*_where(one, each), *means))
    return Table(
        f"SC_{TOP}: what the {TOP} most relevant pairs contribute together",
        COLUMNS,
        lines,
        note="In units of the output. Curves for other k are in the pictures.",
    )


def _defaults(found: Sequence[Found]) -> Table:
    """The best walks of each network beside the default."""
    lines = []
    for one in found:
        best, default = one.best.key, one.study.default.key
        there, elsewhere = one.by_sample(best), one.by_sample(default)
        lines.append(
            (
                one.study.name,
                best,
                one.chosen_on(best),
                _shown(bootstrap(there)),
                _shown(bootstrap(elsewhere)),
                _shown(bootstrap_difference(there, elsewhere)),
                one.calm(best),
                one.calm(default),
                one.time(best),
                one.time(default),
            )
        )
    heads = (
        "network",
        "best walks",
        "where chosen",
        "reported",
        "default, reported",
        "difference",
        "total variation, best",
        "default",
        "time, best",
        "default",
    )
    return Table(
        "Which walks, network by network",
        heads,
        lines,
        note="Means over all pairs of layers. Total variation is that of a heatmap, the median "
        "over samples; time is that of a heatmap, in forward and backward passes.",
    )


def _kinds(found: Sequence[Found]) -> Table:
    """The best walks of each kind of network, all networks counting alike."""
    lines: list[tuple[Value, ...]] = []
    for kind, default in DEFAULTS.items():
        some = [one for one in found if one.study.kind == kind]
        if not some:
            continue
        ranked = sorted(_shared(some), key=lambda key, some=some: -_mean_chosen(some, key))  # type: ignore[misc]
        for key in dict.fromkeys([*ranked[:3], default]):
            lines.append(
                (_SAID[kind], len(some), key, _mean_chosen(some, key), *_reported(some, key))
            )
    return Table(
        "Which walks, by kind of network",
        ("networks", "how many", "walks", "where chosen", "reported", "total variation", "time"),
        lines,
        note="The three best where they were chosen, and the default. Means over networks of the "
        "means over pairs of layers; the geometric mean of total variations and times.",
    )


_SAID: dict[Kind, str] = {"rectified": "with rectifiers", "smooth": "signed and smooth"}


def _shared(found: Sequence[Found]) -> list[str]:
    """The walks that all of some networks were tried with."""
    return [
        walks.key
        for walks in found[0].study.walks
        if all(walks in one.study.walks for one in found)
    ]


def _mean_chosen(found: Sequence[Found], key: str) -> float:
    return statistics.fmean(one.chosen_on(key) for one in found)


def _reported(found: Sequence[Found], key: str) -> tuple[float, float | None, float | None]:
    means = [bootstrap(one.by_sample(key)).mean or 0.0 for one in found]
    calm, time = ([value(one) for one in found] for value in _figures(key))
    return statistics.fmean(means), _geometric(calm), _geometric(time)


def _figures(key: str) -> tuple[Any, Any]:
    return (lambda one: one.calm(key)), (lambda one: one.time(key))


def _geometric(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value]
    return statistics.geometric_mean(known) if len(known) == len(values) else None


def _grid(found: Sequence[Found]) -> Table:
    """All walks on all networks."""
    keys = list(dict.fromkeys(walks.key for one in found for walks in one.study.walks))
    lines: list[tuple[Value, ...]] = []
    for key in keys:
        cells: list[Value] = []
        for one in found:
            tried = any(walks.key == key for walks in one.study.walks)
            cells.append(bootstrap(one.by_sample(key)).mean if tried else None)
        lines.append((key, *cells))
    return Table(
        "All walks, reported",
        ("walks", *(one.study.name for one in found)),
        lines,
        group=0,
        note="Means over samples and pairs of layers.",
    )


def _costs(found: Sequence[Found]) -> Table:
    methods = ("default", "LRP-0", "occlusion walks", BLOCKS, *BASELINES.values(), CONTRIBUTION)
    lines: list[tuple[Value, ...]] = []
    for one in found:
        columns = _columns(one)
        for cost in one.costs:
            ratios = cost["ratios"]
            shown = [ratios.get(columns.get(head, head)) for head in methods]
            where = (one.study.name, cost["part"], " x ".join(cost["layers"]) or "heatmap")
            lines.append((*where, cost["device"], cost["seconds"], *shown))
    return Table(
        "Time, in forward and backward passes of the network",
        ("network", "sets", "layers", "on", "one pass, s", *methods),
        lines,
        note=f"Medians over {TIMED} samples; captures are made before. Each score is that of all "
        "pairs of sets, which are known.",
    )


def _pictures(found: Sequence[Found]) -> list[Picture]:
    rows = {
        one.study.name: [
            (f"{each.pair.part}s, {each.pair.near}\n{' x '.join(each.pair.layers)}",
             {head: each.row(key) for head, key in _columns(one).items()})
            for each in one.pairs
        ]
        for one in found
    }  # fmt: skip
    points = {
        one.study.name: [
            across_figures.Point(
                walks.key,
                bootstrap(one.by_sample(walks.key)).mean,
                one.calm(walks.key),
                one.time(walks.key),
                walks.key == one.study.default.key,
                walks.key == one.best.key,
            )
            for walks in one.study.walks
        ]
        for one in found
    }
    curves = {
        one.study.name: {
            f"{each.pair.part}s\n" + "\n".join(each.pair.layers): comparison.curves(
                each.reported,
                {key: head for head, key in _columns(one).items() if head != "best"},
                [int(figure[3:]) for figure in each.reported.figures if figure.startswith("SC_")],
            )
            for each in one.pairs
        }
        for one in found
    }
    colour = comparison.colours(_METHODS)
    return [
        Picture(
            "correlations.png",
            "Correlation with joint contribution",
            "Means over samples with 95 % bootstrap intervals.",
            across_figures.draw_dots(rows, colour),
        ),
        Picture(
            "defaults.png",
            "Faithful or calm",
            "Each mark stands for walks: their correlation with joint contribution, the mean over "
            "samples and pairs of layers, against the total variation of their heatmaps (1: none "
            "cancels). Larger marks take longer. A ring: the default; a square: the best where "
            "walks were chosen.",
            across_figures.draw_trade(points),
        ),
        *(
            Picture(
                f"curves-{name}.png",
                f"SC_k: what the most relevant pairs contribute ({name})",
                "Added up, in units of the output: means over samples with 95 % bootstrap "
                "intervals.",
                comparison.draw_curves(each, colour),
            )
            for name, each in curves.items()
        ),
    ]


def _details(one: Found) -> dict[str, Any]:
    return {
        "best": one.best.key,
        "default": one.study.default.key,
        "variations": one.variations,
        "costs": list(one.costs),
        "pairs": [
            {
                "part": each.pair.part,
                "near": each.pair.near,
                "layers": each.pair.layers,
                "choosing": each.chosen_on.table(),
                "reporting": [
                    {name: value for name, value in line.items() if not name.startswith("SC_")}
                    for line in each.reported.table()
                ],
                "samples": [
                    {"sample": row.sample, "method": row.method, "pearson": row.figures["pearson"]}
                    for row in each.reported.rows
                ],
            }
            for each in one.pairs
        ],
    }


EXPERIMENT = Experiment(NAME, run, frozenset({"device", "only", "part"}))
