"""A run: a question, a data set, an engine and a folder (`relmax`)."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from nrm import __version__
from nrm.capture.digest import of_weights
from nrm.dataset.drivers import Engine, loop, workers
from nrm.dataset.results import Results, settings_digest
from nrm.dataset.samples import Read
from nrm.dataset.shard import (
    Activation,
    Explains,
    Layer,
    Pair,
    Question,
    Shape,
    Work,
)
from nrm.dataset.sources import SHARD, as_source
from nrm.dataset.storage import MADE_FROM, Counts, Folder, stopped_by_full_disk
from nrm.display import Progress, counted
from nrm.errors import InputError, QueryError
from nrm.evaluation.store import described
from nrm.explainer import Explainer
from nrm.formulas import NeuronSet
from nrm.io import check_folder
from nrm.joint import Division
from nrm.methods import Scale, reading

Layers = str | Sequence[str] | Mapping[str, str | Mapping[str, NeuronSet] | Sequence[NeuronSet]]
"""Layers by name; or by a name of one's own a layer, or neuron sets (by name, or in order), such as
the components of a transformer (`nrm.components`)."""

MOST_JOINT = 2**30
"""Bytes that the joint statistics of a run may take in memory, and a shard on disk."""
_JOINT_BYTES = 24


def relmax(
    explainer: Explainer,
    data: Any,
    layers: Layers,
    out: Path | str,
    *,
    target: Explains = "predicted",
    by: Division = "channel",
    k: int = 16,
    joint: Iterable[Pair] = (),
    joint_classes: Iterable[int] | None = None,
    activation: Activation = "max",
    scale: Scale = "normalized",
    batch: int = 32,
    shard: int = SHARD,
    read: Read | None = None,
    workers: int | None = None,
    ray: str | bool = False,
    num_gpus: float = 0,
    threads: int = 1,
    readers: int = 2,
    progress: Progress = False,
    made_from: Mapping[str, Any] | None = None,
) -> Results:
    """RelMax over a data set: of every channel of some layers, where it is most relevant (eq. 50).

    Of each part of each layer: the k samples in which it has the largest relevance for the
    explained output, and those in which it has the largest activation; count, mean, variance,
    extremes and quantiles of both, and all but quantiles by class (the explained output). All
    layers are found in one forward and one backward pass of a batch.

    Shards that are finished are in `out` whatever happens next. The same call goes on from there,
    and ends with the same tables bit for bit, by however many workers.

    Arguments:
        explainer: what explains each sample; its model's output is `[batch, classes]`.
        data: anything that `nrm.dataset.as_source` takes.
        layers: whose parts to look at.
        out: the folder of results. One of another question, model or data set is refused.
        target: `"predicted"` explains each sample's largest output, `"true"` that of its label,
            a number always that output.
        by: what layers given by name are divided into.
        k: how many samples to keep of each part.
        joint: pairs of layers, of whose pairs of channels the mean joint relevance is kept, overall
            and by class, and the sample with the largest (`Measure.joint`).
        joint_classes: of samples of which classes; by default of all. The mean overall is theirs.
        activation: a part's is its neurons' largest (`"max"`), or their sum.
        scale: `"normalized"` relevance is a share of the explained output, `"logit"` in its units.
        batch: how many samples are explained at once. It changes last digits, and so belongs to
            the question.
        shard: how many samples are computed and kept as one piece.
        read: makes an item of the data set the model's input, or (input, label).
        workers: processes on this machine; by default this one.
        ray: a Ray cluster: its address, or `True` for one on this machine.
        num_gpus: of a Ray task; may be a fraction.
        threads: with which torch computes in each process. More processes use a processor better
            than more threads.
        readers: threads that read samples ahead, in each process.
        progress: whether to show how far it is; or a function to call instead, with the number of
            samples just done.
        made_from: what else to write down of how the run was asked for.

    Returns:
        the results.

    Raises:
        InputError, QueryError, UnknownLayerError: something given does not fit, before the work
            starts.
        StorageError: nothing can be written, or the disk is full; what is finished is kept.
    """
    out = Path(out)
    check_folder(out, "results folder")  # before anything takes long
    source = as_source(data, read, shard)
    joint = tuple((a, b) for a, b in joint)
    classes = None if joint_classes is None else frozenset(joint_classes)
    _check(target, k, activation, scale, batch, threads)
    question = Question(
        explainer, _layers(layers, by), joint, classes, target, k, activation, scale, batch,
        threads, readers,
    )  # fmt: skip
    engine = _engine(workers, ray, num_gpus)
    work = Work(question, source)
    shape = work.probe()
    _check_joint(shape, classes)
    weights = of_weights(explainer.model)
    manifest = _manifest(work, shape, weights) | {MADE_FROM: dict(made_from or {})}
    with Folder.writing(out, manifest) as folder:
        done = folder.committed()
        _run(folder, work, engine, done, progress)
        if of_weights(explainer.model) != weights:
            raise QueryError(
                "the model's weights changed while the run was going on: its shards are of several "
                f"models. Delete {out}, and start again."
            )
        with stopped_by_full_disk(out):
            folder.finish(done)
    return Results(folder)


def _run(
    folder: Folder,
    work: Work,
    engine: Engine,
    done: dict[int, Counts],
    progress: Progress,
) -> None:
    """Compute and commit the shards that are left, adding them to those that are done."""

    def left() -> Iterator[int]:
        total = work.source.shards
        for number in itertools.count() if total is None else range(total):
            if total is None and any(c.ended and at < number for at, c in done.items()):
                return
            if number not in done:
                yield number

    samples = work.source.samples
    remaining = None if samples is None else samples - sum(c.read for c in done.values())
    with counted(progress, "samples", remaining, rate="samples/s") as advance:
        for result in engine(work, left()):
            with stopped_by_full_disk(folder.path):
                done[result.shard] = folder.commit(result)
            advance(result.read)


def _engine(count: int | None, ray: str | bool, num_gpus: float) -> Engine:
    if ray:
        if count is not None:
            raise InputError("give either workers or ray: a cluster has as many as it has places")
        from nrm.dataset.on_ray import tasks

        return tasks(None if ray is True else ray, num_gpus)
    return loop if count is None else workers(count)


def _check(
    target: object, k: object, activation: object, scale: Scale, batch: object, threads: object
) -> None:
    """Refuse what nothing could be made of.

    Raises:
        InputError, QueryError: saying what it may be.
    """
    number = isinstance(target, int) and not isinstance(target, bool) and target >= 0
    if not number and target not in ("predicted", "true"):
        raise InputError(f"target is 'predicted', 'true' or a class, not {target!r}")
    for name, value in (("k", k), ("batch", batch), ("threads", threads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is a positive number, not {value!r}")
    if activation not in get_args(Activation):
        raise InputError(f"activation is one of {get_args(Activation)}, not {activation!r}")
    if scale == "original":
        raise InputError(
            "scale is 'normalized' or 'logit': the original LRP has no marginals of several layers"
        )
    reading(scale)


def _layers(layers: Layers, by: Division) -> tuple[Layer, ...]:
    """What is asked for, layer by layer.

    Raises:
        InputError: nothing, something twice, or no layer.
    """
    if isinstance(layers, str):
        layers = [layers]
    found = []
    named = layers.items() if isinstance(layers, Mapping) else ((name, name) for name in layers)
    for name, what in named:
        if isinstance(what, str):
            if what != name:
                raise InputError(f"layer {what!r} keeps its name; {name!r} is for neuron sets")
            found.append(Layer(name, by))
        else:
            pairs = what.items() if isinstance(what, Mapping) else enumerate(what)
            found.append(Layer(name, by, tuple((str(key), one) for key, one in pairs)))
    names = [layer.name for layer in found]
    twice = {name for name in names if names.count(name) > 1}
    if not names or twice:
        raise InputError(f"layers are named twice: {', '.join(twice)}" if twice else "no layers")
    return tuple(found)


def _check_joint(shape: Shape, classes: frozenset[int] | None) -> None:
    """Refuse joint statistics that are too large.

    Raises:
        InputError: saying how large they would be.
    """
    count = shape.classes if classes is None else len(classes)
    size = sum(a * b for a, b in shape.pairs.values()) * count * _JOINT_BYTES
    if size > MOST_JOINT:
        raise InputError(
            f"the joint statistics of {count} classes would take {size / 2**30:.1f} GiB, "
            f"more than {MOST_JOINT / 2**30:.0f}: name some classes by joint_classes, or fewer "
            "pairs of layers"
        )


def _manifest(work: Work, shape: Shape, weights: str) -> dict[str, Any]:
    """What tells a run from others."""
    question = work.question
    model = question.explainer.model
    return {
        "nrm": __version__,
        "torch": str(torch.__version__),
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "weights": weights,
        "graph": hashlib.sha256(shape.graph.encode()).hexdigest()[:32],
        "composite": shape.rules,
        "explainer": settings_digest(question.explainer),
        "layers": [
            {"name": layer.name, "by": layer.by, "sets": [described(one) for _, one in layer.sets]}
            for layer in question.layers
        ],
        "parts": shape.parts,
        "pairs": [[list(pair), list(sizes)] for pair, sizes in shape.pairs.items()],
        "joint_classes": None if question.joint_classes is None else sorted(question.joint_classes),
        "classes": shape.classes,
        "target": question.target,
        "k": question.k,
        "activation": question.activation,
        "scale": question.scale,
        "batch": question.batch,
        "threads": question.threads,
        "data": json.loads(json.dumps(work.source.fingerprint())),
    }
