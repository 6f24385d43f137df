"""`all`: every experiment, each in a folder of its own, and one page over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

import nrm
from nrm.errors import NrmError
from nrm.experiments.report import Report
from nrm.experiments.request import Experiment, Request
from nrm.experiments.tables import Table

_REASONS = (NrmError, OSError, MemoryError, ImportError, torch.OutOfMemoryError)
"""For which an experiment may fail without the others failing with it."""


class Everything:
    """One experiment after the other."""

    name = "all"
    summary = "all experiments, each in a folder of its own, and one page over them"
    options: frozenset[str] = frozenset()

    def __init__(self, experiments: Sequence[Experiment]) -> None:
        self.experiments = tuple(experiments)

    def run(self, request: Request) -> Report:
        """Run those that can be run, and say why the others cannot."""
        parts: list[Report] = []
        failures: dict[str, str] = {}
        for experiment in self.experiments:
            own = _own(request, experiment.name)
            try:
                parts.append(experiment.run(own))
            except _REASONS as error:
                failures[experiment.name] = _said(error)
                own.say(f"failed: {failures[experiment.name]}")
        names = [experiment.name for experiment in self.experiments]
        return Report(
            self.name,
            "The paper's experiments",
            [row for part in parts for row in part.rows],
            facts={
                "data": request.data,
                "experiments": f"{len(parts)} of {len(names)}",
                "seed": request.seed,
                "versions": f"nrm {nrm.__version__}, torch {torch.__version__}",
            },
            notes=("How a row is to be read, and beside what, is on the page of its experiment.",),
            heading="Correlation of relevance with contribution",
            tables=[
                *(
                    replace(table, title=f"{part.experiment}: {table.title}")
                    for part in parts
                    for table in part.tables
                ),
                _outcomes(names, parts, failures),
            ],
            parts=parts,
            failures=failures,
        )


def _own(request: Request, name: str) -> Request:
    """The same for one experiment, which keeps things in a folder of its own."""
    return replace(
        request, kept=request.kept / name, say=lambda line: request.say(f"{name}: {line}")
    )


def _said(error: BaseException) -> str:
    from nrm.cli.errors import one_line

    return one_line(error)


def _outcomes(names: Sequence[str], parts: Sequence[Report], failures: Mapping[str, str]) -> Table:
    reports = {part.experiment: part for part in parts}
    lines = [
        (name, "failed", failures[name])
        if name in failures
        else (name, "done", reports[name].title)
        for name in names
    ]
    return Table("Experiments", ("experiment", "outcome", "what it is, or why it failed"), lines)
