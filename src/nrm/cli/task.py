"""What `nrm explain` does: a model that is loaded and captured once explains its pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from nrm.capture.call import Output
from nrm.capture.digest import lasting
from nrm.cli import models, report
from nrm.cli.commands import IMAGENET, SECOND, TOP, CommandError, as_text
from nrm.cli.pictures import Index, Job, fingerprint, finished
from nrm.cli.report import Subject, Target
from nrm.composites import Composite
from nrm.errors import InputError, TargetError, one_line
from nrm.explainer import Explainer
from nrm.graph import Graph
from nrm.heads import Heads
from nrm.io import Picture, Say, imagenet, imagenet_bounds, read_image, read_labels, transformed

Tell = Callable[[Job, "dict[str, Any] | str"], None]
"""Shows what became of a picture: its result, or what was wrong."""


@dataclass(frozen=True)
class Task:
    """The options of `nrm explain`, but for the pictures and where results go."""

    model: str
    weights: Path | None
    weights_part: str | None
    targets: Sequence[str]
    against: str | None
    layers: Sequence[str]
    top: int
    seconds: float
    composite: str
    bias: str | None
    output: str | None
    head: str
    labels: Path | None
    size: int
    transform: str
    device: torch.device
    command: Sequence[str]


class Run:
    """A task with its model, which is loaded when the first picture has been read."""

    def __init__(self, task: Task, say: Say) -> None:
        self.task = task
        self._say = say
        self._model: nn.Module | None = None
        self._explainer: Explainer | None = None
        self._labels: list[str] | None = None
        self._made_from: dict[str, Any] = {}
        self._graph: tuple[Graph, list[Any]] | None = None

    def explain(self, picture: Path, out: Path) -> dict[str, Any]:
        """Explain one picture; what `result.json` in `out` holds."""
        read = self._read(picture)
        self._load()
        return self._explain(picture, read, out, self._say, again=True)[0]

    def explain_all(self, index: Index, again: bool, tell: Tell) -> None:
        """Explain the pictures of an index one by one, and write it, also where the run ends early.

        A picture that cannot be read or explained is passed over; what is wrong with the task, and
        so with all of them, ends the run.

        Arguments:
            again: whether to explain a picture whose result is there already.
        """
        try:
            for k, job in enumerate(index.jobs):
                self._say(f"{k + 1} of {len(index.jobs)}: {as_text(job.picture)}")
                try:
                    read = self._read(job.picture)
                except InputError as error:
                    index.failed[k] = one_line(error)
                    tell(job, index.failed[k])
                    continue
                self._load()
                folder = index.out / job.folder
                try:
                    found, made = self._explain(job.picture, read, folder, _silent, again)
                except (InputError, TargetError) as error:
                    index.failed[k] = f"picture {as_text(job.picture)}: {one_line(error)}"
                    tell(job, index.failed[k])
                    continue
                index.done[k] = found
                index.taken += not made
                tell(job, found)
        finally:
            index.write()

    def _read(self, path: Path) -> Picture:
        """The model's input, made of a picture."""
        task = self.task
        opened = read_image(path, self._say)
        if task.transform == IMAGENET:
            found = imagenet(opened, task.size)
        else:
            transform = models.find_attribute(task.transform)
            found = transformed(opened, transform, task.transform)
        return Picture(found.x.to(task.device), found.shown, found.bounds)

    def _load(self) -> None:
        """The model, with its weights, and what of a result depends on them."""
        task = self.task
        if self._model is not None:
            return
        models.find_attribute(task.model)  # whose module may give composites names
        self._composite()  # refused before the long steps
        if task.labels is not None:
            self._labels = read_labels(task.labels)
        self._say(f"loading {task.model}")
        args = (task.model, task.weights, task.device, task.weights_part, self._say)
        self._model, read = models.loaded(*args)
        if task.weights is None:
            self._say("no --weights: the model is used with the weights that its factory gives it")
        self._made_from = {
            "weights": report.weights_used(self._model, task.weights, read),
            "output": task.output,
            "head": task.head,
            "device": str(task.device),
        }

    def _composite(self) -> Composite | None:
        bounds = None
        if self.task.transform == IMAGENET:
            low, high = imagenet_bounds()
            bounds = low.to(self.task.device), high.to(self.task.device)
        return models.find_composite(self.task.composite, bounds)

    def _explain(
        self, path: Path, picture: Picture, out: Path, say: Say, again: bool
    ) -> tuple[dict[str, Any], bool]:
        """The result of one picture, and whether it was made just now."""
        task, model = self.task, self._model
        assert model is not None
        output, values = models.output_of(model, picture.x, task.output)
        places = tuple(values.shape[2:]) if values.numel() > 1 else ()
        values = models.classes_of(values)
        models.refuse_nan(model, values)
        explainer = self._explains(model, output)
        labels = self._names(len(values))
        say("capturing the model and passing the picture through it")
        graph = explainer.graph(picture.x)
        targets = self._targets(explainer, picture, values, labels, places)
        image, versions = report.file_digest(path), report.versions(task.model)
        mark = fingerprint(
            image=image,
            input=lasting(picture.x),
            model=self._digests(graph),
            rules=self._rules(graph),
            bias=graph.bias_is_input,
            targets=targets,
            search=(list(task.layers), task.top, task.seconds),
            names=(as_text(path), task.model, task.composite, task.output, task.head, labels),
            versions=versions,
            device=str(task.device),
        )
        there = None if again else finished(out, mark)
        if there is not None:
            return there, False
        made_from = {
            "image_sha256": image,
            "transform": {"name": task.transform, "input": list(picture.x.shape)},
            **self._made_from,
            "versions": versions,
            "command": list(task.command),
            "fingerprint": mark,
        }
        subject = Subject(as_text(path), task.model, targets, labels, made_from)
        made = report.report(
            explainer, picture, subject, task.layers, out,
            top=task.top, seconds=task.seconds, say=say,
        )  # fmt: skip
        return made, True

    def _explains(self, model: nn.Module, output: Output) -> Explainer:
        if self._explainer is None:
            self._explainer = Explainer(
                model,
                self._composite(),
                bias=cast(Literal["drop", "input"] | None, self.task.bias),
                output=output,
                head=cast(Heads, self.task.head),
            )
        return self._explainer

    def _names(self, outputs: int) -> list[str] | None:
        """The names of the classes, from the file or where they are known."""
        if self._labels is None:
            return models.known_labels(outputs)
        if len(self._labels) != outputs:
            raise CommandError(
                f"labels {as_text(self.task.labels)}: {len(self._labels)} names, but the model has "
                f"{outputs} outputs"
            )
        return self._labels

    def _targets(
        self,
        explainer: Explainer,
        picture: Picture,
        values: Tensor,
        names: list[str] | None,
        places: tuple[int, ...],
    ) -> list[Target]:
        """What is explained, each output once.

        Arguments:
            places: how large the map is that the output is, if it is one.
        """
        found: dict[tuple[int, Any], Target] = {}
        for wanted in self.task.targets:
            named, place = models.split_place(wanted, places)
            index = models.find_target(named, names, values)
            tie = named.casefold() == TOP and int((values == values.max()).sum()) > 1
            if tie and not places:
                # Of those that a sigmoid has rounded to one, the largest logit.
                target = explainer(picture.x).target
                assert target is not None
                index = int(target[0])
            label = names[index] if names else None
            other = self._against(index, values, names)
            if other is not None and places and place is None:
                raise CommandError(
                    "--against takes one place of a map, not the means of two classes: give the "
                    "target as class,y,x"
                )
            of = names[other] if names and other is not None else None
            one = Target(index, label, len(values) == 1, other, of, bool(places), place)
            found.setdefault((index, place), one)
        return list(found.values())

    def _against(self, target: int, values: Tensor, names: list[str] | None) -> int | None:
        """The output that a target is explained against, if it is."""
        wanted = self.task.against
        if wanted is None:
            return None
        if len(values) == 1:
            raise CommandError("--against has no effect: the model has one output; leave it out")
        if wanted.casefold() == SECOND:
            others = values.clone()
            others[target] = -torch.inf
            return int(others.argmax())
        index = models.find_target(wanted, names, values)
        if index == target:
            raise CommandError(f"--against {wanted!r} is the target itself")
        return index

    def _rules(self, graph: Graph) -> str:
        """Which rule every operation has."""
        specification = graph.specification
        assert isinstance(specification, Composite)
        return str(specification.applied(graph))

    def _digests(self, graph: Graph) -> list[Any]:
        """The model as it computes: its operators, and all numbers in it."""
        if self._graph is None or self._graph[0] is not graph:
            constants = graph.captured.constants.values()
            self._graph = graph, [str(graph.captured.graph), *map(lasting, constants)]
        return self._graph[1]


def _silent(text: str) -> None:
    """Of many pictures, not every step is told."""
