"""What an experiment is asked, and what it has to answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nrm.experiments.report import Report


@dataclass(frozen=True)
class Request:
    """How an experiment is to be run.

    Attributes:
        data: what the command line names: a folder, or a word that the experiment knows.
        kept: a folder for what an interrupted run leaves and the next goes on from.
        samples: how many to report on; by default as many as the experiment thinks fit.
        layers: pairs of layers, for experiments that compare layers; by default their own.
        weights: a file of weights, for experiments that explain a pretrained network.
        seed: of all that is drawn at random.
        progress: whether to show bars.
        say: told what happens, a line at a time.
    """

    data: str
    kept: Path
    samples: int | None = None
    layers: tuple[tuple[str, ...], ...] = ()
    weights: Path | None = None
    seed: int = 0
    progress: bool = False
    say: Callable[[str], None] = lambda line: None


class Experiment(Protocol):
    """One of the paper's experiments.

    Attributes:
        name: by which it is run.
        summary: what it shows, in a line.
        options: which of a request's `layers` and `weights` it heeds.
    """

    name: str
    summary: str
    options: frozenset[str]

    def run(self, request: Request) -> Report:
        """Run it, from where an interrupted run stopped."""
        ...
