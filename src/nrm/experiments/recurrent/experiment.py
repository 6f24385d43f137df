"""`rnn`: relevance over time in a linear recurrent network (section 4.5, Fig. 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import nrm
from nrm.evaluation.store import Store
from nrm.experiments.recurrent.drawing import draw
from nrm.experiments.recurrent.relevance import Method
from nrm.experiments.recurrent.series import Task
from nrm.experiments.recurrent.study import EXPLAINED, Network, summary
from nrm.experiments.report import Picture, Report
from nrm.experiments.request import Request
from nrm.experiments.tables import Table
from nrm.progress import counted

STEPS = 12
NETWORKS = 8
"""For each task, unless more or fewer are asked for."""
_APART = 1_000_000
"""From one seed to the next: no network belongs to two of them."""

METHODS = {
    Method.PLAIN: "NRM, gamma = 0.25 as in the paper, biases dropped",
    Method.UNNORMALIZED: "unnormalised, the same rule",
    Method.SIGN_AWARE: "NRM, sign-aware gamma = 0.25, biases dropped",
    Method.LRP_ALL: "NRM, LRP-0, biases as inputs",
}
"""What tables call them."""


class Recurrent:
    """Networks that have to remember one step of a series; data are made, not read.

    Arguments:
        steps: the length of a series.
    """

    name = "rnn"
    summary = "relevance over time in a recurrent network (section 4.5, Fig. 8)"
    options: frozenset[str] = frozenset()

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps

    def run(self, request: Request) -> Report:
        """Train and explain the networks of both tasks, and draw."""
        count = request.samples or NETWORKS
        store = Store(request.kept / f"rnn-{self.steps}", {"explained": EXPLAINED})
        request.say(f"{len(Task) * count} networks …")
        tasks: dict[str, Any] = {}
        with counted(request.progress, "networks", len(Task) * count) as advance:
            for task in Task:
                networks = []
                for number in range(count):
                    networks.append(self._network(store, task, request.seed * _APART + number))
                    advance(1)
                tasks[str(task)] = summary(networks, self.steps)
        found = {"steps": self.steps, "seeds": count, "gamma": 0.25, "tasks": tasks}
        return Report(
            self.name,
            "Relevance over time in a linear recurrent network",
            (),
            [_picture(found)],
            self._facts(tasks, request.seed),
            _READING,
            found,
            tables=[_table(tasks)],
        )

    def _network(self, store: Store, task: Task, seed: int) -> Network:
        """As it was kept, or trained and kept."""
        key = f"{task}-{seed}"
        found = Network.restored(store.read(key))
        if found is None:
            found = Network.studied(task, self.steps, seed)
            store.write(key, found.kept())
        return found

    def _facts(self, tasks: Mapping[str, Any], seed: int) -> dict[str, str | int | float]:
        return {
            "data": "series made for the purpose",
            "steps": self.steps,
            **{task: _training(found["networks"]) for task, found in tasks.items()},
            "seed": seed,
            "versions": f"nrm {nrm.__version__}, torch {torch.__version__}",
        }


_READING = (
    "A series of three states sets its label at one step, which a network has to remember until "
    "the end: a good explanation points at that step. Event: the series rests but for one step, "
    "any of them. Position: all states are random, and the middle step sets the label.",
    "The relevance of a step is that of its three input neurons, for the label of the series. The "
    "unnormalised relevance is divided by the logit.",
    "The paper gives a figure and no numbers. Sizes, training and how the series are made are not "
    "its own, which it leaves open.",
)


def _training(networks: list[dict[str, Any]]) -> str:
    right = sum(network["accuracy"] == 1 for network in networks)
    updates = [network["updates"] for network in networks]
    worst = min(network["accuracy"] for network in networks)
    return (
        f"{right} of {len(networks)} networks always right"
        + (f" (the worst in {worst:.2%})" if worst < 1 else "")
        + f", trained on {min(updates)} to {max(updates)} batches"
    )


def _table(tasks: Mapping[str, Any]) -> Table:
    lines = [
        (
            task,
            METHODS[Method(method)],
            numbers["at_label_step"]["median"],
            100 * numbers["largest_at_label_step"],
            numbers["over_time"]["smallest"],
            numbers["over_time"]["largest"],
            numbers["total_variation"]["median"],
            numbers["total_variation"]["largest"],
        )
        for task, found in tasks.items()
        for method, numbers in found["methods"].items()
    ]
    heads = (
        "task",
        "method",
        "label step, median",
        "largest of all steps, %",
        "smallest",
        "largest",
        "Σ|R|, median",
        "Σ|R|, largest",
    )
    return Table(
        "Relevance of the label step, and of all steps",
        heads,
        lines,
        note="Over all series of all networks: the relevance of the step that sets the label, in "
        "how many series no step has more, the relevance of single steps, and the sum of their "
        "sizes, which is 1 where nothing cancels.",
    )


def _picture(found: dict[str, Any]) -> Picture:
    return Picture(
        "recurrent.png",
        "Relevance over time",
        "Series whose label is set at the middle step (dashed). Lines are medians over networks "
        "and series, bands the middle 80 %. First column: symmetric log scale. Second column: "
        "sizes, on a log scale.",
        draw(found),
    )
