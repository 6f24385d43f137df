"""`rules`: which walks agree best with interventions, network by network."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

import nrm
from nrm.evaluation import Evaluation
from nrm.experiments import comparison
from nrm.experiments.report import Picture, Report
from nrm.experiments.request import Request
from nrm.experiments.rules.drawing import draw_gammas, draw_walks
from nrm.experiments.rules.grid import FEW, RULES
from nrm.experiments.rules.networks import trials
from nrm.experiments.rules.trial import Trial
from nrm.experiments.tables import Row, Table
from nrm.experiments.walks import Walks


class Rules:
    """All walks beside interventions, and what no walks exceed."""

    name = "rules"
    summary = "which rules, biases and outputs agree best with interventions (beyond the paper)"
    options: frozenset[str] = frozenset()

    def run(self, request: Request) -> Report:
        """Choose walks on some samples, report on others, network by network."""
        found: dict[Trial, tuple[Walks, Evaluation, Evaluation]] = {}
        with torch.no_grad():
            for trial in trials(request):
                kept = request.kept / trial.name
                request.say(f"{trial.title}: {len(trial.choosing)} samples to choose on …")
                best, chosen_on = trial.choose(kept, request.seed, request.progress)
                request.say(f"{trial.title}: {len(trial.reporting)} samples to report on …")
                reported = trial.report(kept, request.seed, request.progress)
                found[trial] = best, chosen_on, reported
        return Report(
            self.name,
            "Which walks agree with interventions",
            [row for s, (_, _, reported) in found.items() for row in _rows(self.name, s, reported)],
            _pictures({s: reported for s, (_, _, reported) in found.items()}),
            {
                **{trial.name: trial.title for trial in found},
                "walks": len(RULES),
                "seed": request.seed,
                "versions": f"nrm {nrm.__version__}, torch {torch.__version__}",
            },
            _READING,
            {s.name: _details(*parts) for s, parts in found.items()},
            tables=[_chosen(found)],
        )


_READING = (
    "The Pearson correlation of joint relevance with the joint contribution of neurons or neuron "
    "sets, one of each layer, to the logit of the predicted class: over all combinations of a "
    "sample, then the mean over samples, with 95 % bootstrap intervals. What is removed is set to "
    "zero.",
    "The best walks are chosen on samples that are not reported on. A ceiling is a measure that "
    "is fitted to the contributions: what no walks exceed, to three digits, and no way to explain "
    "anything.",
    f"Where a comparison takes long, {len(FEW)} of the {len(RULES)} walks are compared.",
)


def _rows(experiment: str, trial: Trial, found: Evaluation) -> list[Row]:
    methods = {method: method for method in found.methods}
    return comparison.rows(f"{experiment}: {trial.name}", found, methods, {})


def _chosen(found: dict[Trial, tuple[Walks, Evaluation, Evaluation]]) -> Table:
    lines: list[list[str | float | int | None]] = []
    for trial, (best, chosen_on, reported) in found.items():
        mean = reported.mean(best.key)
        lines.append(
            [
                trial.title,
                best.method,
                chosen_on.mean(best.key).mean,
                chosen_on.mean(best.key).samples,
                mean.mean,
                mean.low,
                mean.high,
                mean.samples,
            ]
        )
    heads = ["network", "best walks", "there", "samples", "elsewhere", "low", "high", "samples"]
    return Table("The best walks, and how they do on other samples", heads, lines)


def _details(best: Walks, chosen_on: Evaluation, reported: Evaluation) -> dict[str, Any]:
    return {
        "chosen": best.method,
        "choosing": chosen_on.table(),
        "means": reported.table(),
        "samples": [asdict(row) for row in reported.rows],
    }


def _pictures(found: dict[Trial, Evaluation]) -> list[Picture]:
    return [
        Picture(
            "walks.png",
            "All walks",
            "Means over samples with 95 % bootstrap intervals. Open marks are ceilings.",
            draw_walks({s.title: (e, tuple(s.ceilings)) for s, e in found.items()}),
        ),
        Picture(
            "gammas.png",
            "How much gamma",
            "The paper's rule, from LRP-0 (gamma = 0) on, with and without biases as inputs.",
            draw_gammas({s.title: e for s, e in found.items()}),
        ),
    ]
