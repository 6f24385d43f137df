"""What is asked of a data set, and the answer for one shard of it.

`Work` is a question with the data set that it is asked of: a value that can be sent anywhere.
`Work.shard(number)` reads the samples of a shard, explains them batch by batch, all layers in one
forward and one backward pass, and returns their statistics. It knows nothing of processes,
machines or files. The same shard gives the same numbers bit for bit wherever the processor, the
versions and the number of threads are the same: which samples make a batch is decided by the shard.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nrm.dataset.samples import Load, Sample
from nrm.dataset.sketch import Floats, Ints
from nrm.dataset.sources import Source
from nrm.dataset.statistics import NOBODY, Joint, Statistics, merged
from nrm.errors import InputError, NrmError, QueryError, RelevanceWarning, TargetError, one_line
from nrm.explainer import Explainer
from nrm.formulas import NeuronSet
from nrm.graph import Variable
from nrm.joint import Division, Partition, partition
from nrm.measure import Measure
from nrm.methods import Scale, in_units
from nrm.sets import variables_of

Explains = Literal["predicted", "true"] | int
"""Which output of each sample is explained: its largest, that of its label, or always the same."""
Quantity = Literal["relevance", "activation"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
Activation = Literal["max", "sum"]
"""What the activation of a part is: its neurons' largest, or their sum."""
Pair = tuple[str, str]
Sizes = Mapping[str, tuple[int, ...]]
"""What every layer is divided into: how many parts, or how many neurons along each axis."""

_HELD = 2**21
"""Numbers of one layer that are held before they become statistics."""


@dataclass(frozen=True)
class Layer:
    """What is kept statistics of: the parts of a layer, or neuron sets by name.

    Attributes:
        name: the layer's, or what the sets are called together.
        by: what a layer is divided into.
        sets: by name, in place of a layer; each may span several layers.
    """

    name: str
    by: Division = "channel"
    sets: tuple[tuple[str, NeuronSet], ...] = ()


@dataclass(frozen=True)
class Question:
    """What is asked of every sample.

    Attributes:
        explainer: what explains them.
        layers: of which to keep statistics.
        joint: pairs of layers, of whose pairs of channels to keep the joint relevance.
        joint_classes: of which classes; `None`: of all.
        target: which output is explained.
        k: how many samples with the largest values to keep of each part.
        activation: what the activation of a part is.
        scale: in which units relevance is: shares of the output, or logits.
        batch: samples explained at once.
        threads: with which torch computes.
        readers: threads that read samples ahead.
    """

    explainer: Explainer
    layers: tuple[Layer, ...]
    joint: tuple[Pair, ...] = ()
    joint_classes: frozenset[int] | None = None
    target: Explains = "predicted"
    k: int = 16
    activation: Activation = "max"
    scale: Scale = "normalized"
    batch: int = 32
    threads: int = 1
    readers: int = 2


@dataclass(frozen=True)
class Shape:
    """What the statistics are of, found out on a first sample.

    Attributes:
        parts: the names of every layer's parts.
        pairs: how many parts each side of every pair of layers has.
        classes: how many outputs there are.
        rules: the composite, and what becomes of biases.
        graph: the captured model, in text.
    """

    parts: dict[str, list[str]]
    pairs: dict[Pair, tuple[int, int]]
    classes: int
    rules: str
    graph: str


@dataclass(frozen=True)
class Known:
    """What is known of a sample beside its values.

    Attributes:
        label: its true class, where that is known.
        explained: the output that was explained.
        output: the explained output itself (`Measure.scale`).
    """

    name: str
    label: int | None
    explained: int
    output: float


@dataclass(frozen=True)
class ShardResult:
    """The statistics of one shard.

    Attributes:
        shard: its number.
        samples: how many were explained.
        read: how many were read, the skipped ones included.
        ended: whether the data end here, where their length is not known before.
        statistics: by layer and quantity; none where no sample was explained.
        joint: by pair of layers.
        known: of the samples that any part has among its largest.
        skipped: number, name and reason of those that could not be read or explained.
        cautions: how many batches each kind of warning was given for (`nrm.errors.Cautions`).
    """

    shard: int
    samples: int
    read: int
    ended: bool
    statistics: dict[tuple[str, Quantity], Statistics]
    joint: dict[Pair, Joint]
    known: dict[int, Known]
    skipped: list[tuple[int, str, str]]
    cautions: dict[str, int]


class Work:
    """A question and the data set that it is asked of.

    Pickled without the captured model, which is captured anew where it arrives.

    Arguments:
        sizes: what every layer is divided into; `probe` finds it out.
    """

    def __init__(self, question: Question, source: Source, sizes: Sizes | None = None) -> None:
        # Of its own, so that what the owner does to it changes no shard; the model is shared.
        explainer = copy.copy(question.explainer)
        explainer.check = "none"  # looked at once, by whoever starts the run, and not every batch
        self.question, self.source = replace(question, explainer=explainer), source
        self._sizes = sizes
        self._seen: set[object] = set()

    def __reduce__(self) -> tuple[type[Work], tuple[Question, Source, Sizes | None]]:
        return Work, (self.question, self.source, self._sizes)

    def probe(self) -> Shape:
        """What a first sample shows; whatever is wrong with the question shows here too.

        Raises:
            InputError: no sample of the first shards can be read.
            NrmError: it cannot be explained as asked.
        """
        last = ""
        for shard in range(min(4, 4 if self.source.shards is None else self.source.shards)):
            for load in self.source.read(shard):
                sample = load()
                last = sample.error or last
                if sample.error is None and not self._refusal(sample):
                    with self._alone():
                        return self._shape(sample)
                last = sample.error or self._refusal(sample)
        raise InputError(
            "no sample can be read" + (f": the last one tried says: {last}" if last else "")
        )

    def shard(self, number: int) -> ShardResult:
        """Read and explain a shard."""
        collected = _Collected(self.question)
        with self._alone():
            for batch in self._batches(number, collected):
                self._add(batch, collected)
        unknown = self.source.shards is None
        return collected.result(number, ended=unknown and collected.read < self.source.size)

    # -- reading ---------------------------------------------------------------------------------

    def _batches(self, number: int, collected: _Collected) -> Iterator[list[Sample]]:
        """Readable samples that follow each other and look alike, up to a batch of them."""
        batch: list[Sample] = []
        for sample in _ahead(self.source.read(number), self.question.readers, self.question.batch):
            collected.read += 1
            error = sample.error or self._refusal(sample)
            if error:
                collected.skip(sample, error)
                continue
            if batch and (len(batch) == self.question.batch or not _alike(batch[0], sample)):
                yield batch
                batch = []
            batch.append(sample)
        if batch:
            yield batch

    def _refusal(self, sample: Sample) -> str:
        """Why a readable sample cannot be explained as asked; nothing, if it can."""
        if self.question.target == "true" and sample.label is None:
            return "it has no label, and true classes are explained"
        return ""

    # -- explaining ------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """As many threads as were asked for; warnings are counted instead of shown."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.question.threads)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RelevanceWarning)
                yield
        finally:
            torch.set_num_threads(before)

    def _measure(self, samples: Sequence[Sample]) -> Measure:
        device = _device(self.question.explainer)
        inputs = [
            torch.stack(each).to(device)
            for each in zip(*(sample.inputs for sample in samples), strict=True)
        ]
        looks = tuple((x.shape[1:], x.dtype) for x in inputs)
        if looks not in self._seen:  # captured on one sample everywhere, whatever shard comes first
            self.question.explainer.graph(*(x[:1] for x in inputs))
            self._seen.add(looks)
        target: Any = self.question.target
        if target == "predicted":
            target = None
        elif target == "true":
            target = [sample.label for sample in samples]
        R = self.question.explainer(*inputs, target=target)
        if R.target is None or R.target.dim() != 1 or len(R.target) != len(samples):
            if self.question.explainer.batch_axis not in ("auto", 0, None):
                raise TargetError(
                    "samples of a data set lie along the first axis of a batch: give a model that "
                    "takes them so (batch_first=True), and an Explainer without batch_axis."
                )
            raise TargetError(
                "a data set is explained by classes, one of each sample: the output is to be "
                f"[batch, classes], not {tuple(R.output.shape)}. Choose one with "
                "Explainer(output=...)."
            )
        return R

    def _add(self, batch: list[Sample], collected: _Collected) -> None:
        """Explain a batch; where that fails, its samples one by one, and skip those that fail."""
        try:
            found = self._explained(batch)
        except NrmError as error:
            if len(batch) == 1:
                collected.skip(batch[0], one_line(error))
                return
            for sample in batch:
                self._add([sample], collected)
            return
        collected.add(batch, *found)

    def _explained(
        self, batch: list[Sample]
    ) -> tuple[Measure, dict[tuple[str, Quantity], Floats], dict[Pair, tuple[list[int], Floats]]]:
        """What is asked of a batch: `[batch, parts]`, and `[chosen samples, parts, parts]`."""
        R = self._measure(batch)
        values: dict[tuple[str, Quantity], Floats] = {}
        layers = _Layers(R, self.question)
        self._require_same_parts(layers)
        for layer, relevance in layers.relevance().items():
            values[layer, "relevance"] = _array(in_units(R, relevance, self.question.scale))
        for layer, activation in layers.activation().items():
            values[layer, "activation"] = _array(activation)
        for (layer, quantity), found in values.items():
            if not np.isfinite(found).all():
                raise QueryError(f"the {quantity} of {layer!r} holds NaN or infinite values")
        joint: dict[Pair, tuple[list[int], Floats]] = {}
        chosen = self._joint_samples(R)
        for pair in self.question.joint if chosen else ():
            pairs = in_units(R, R.joint(*pair), self.question.scale)
            joint[pair] = chosen, _array(pairs[chosen])
        return R, values, joint

    def _require_same_parts(self, layers: _Layers) -> None:
        """Refuse samples of which a layer has other parts than of the first one.

        Raises:
            QueryError: part 5 of one would be put together with part 5 of another.
        """
        if self._sizes is None:
            self._sizes = layers.sizes()
        for layer, found in layers.sizes().items():
            if found != self._sizes[layer]:
                raise QueryError(
                    f"{layer!r} is divided into {_by(found)}, and in the first sample into "
                    f"{_by(self._sizes[layer])}. Give inputs of one size, or divide it by channels."
                )

    def _joint_samples(self, R: Measure) -> list[int]:
        classes = self.question.joint_classes
        assert R.target is not None
        return [n for n, one in enumerate(R.target.tolist()) if classes is None or one in classes]

    def _shape(self, sample: Sample) -> Shape:
        R = self._measure([sample])
        layers = _Layers(R, self.question)
        self._explained([sample])
        pairs = {}
        for pair in self.question.joint:
            sides = [partition(layer, "channel", R.forward_pass).size for layer in pair]
            pairs[pair] = (sides[0], sides[1])
        graph = R.graph
        rules = f"{graph.specification!r}, biases {'input' if graph.bias_is_input else 'drop'}"
        return Shape(
            layers.names(), pairs, int(R.output.shape[-1]), rules, str(graph.captured.graph)
        )


class _Layers:
    """The layers of a question on one batch."""

    def __init__(self, R: Measure, question: Question) -> None:
        self._R, self._activation = R, question.activation
        self._parts: dict[str, list[tuple[list[int], Partition]]] = {}
        self._beyond: dict[str, list[tuple[int, NeuronSet]]] = {}
        self._names: dict[str, list[str]] = {}
        self._by = {layer.name: layer.by for layer in question.layers if not layer.sets}
        forward = R.forward_pass
        for layer in question.layers:
            if not layer.sets:
                found = partition(layer.name, layer.by, forward)
                self._parts[layer.name] = [(list(range(found.size)), found)]
                self._beyond[layer.name] = []
                self._names[layer.name] = [str(part) for part in range(found.size)]
                continue
            lie: dict[Variable, list[int]] = {}
            beyond = []
            for place, (_, one) in enumerate(layer.sets):
                variables = variables_of(one, R.graph)
                if len(variables) == 1:
                    lie.setdefault(next(iter(variables)), []).append(place)
                else:
                    beyond.append((place, one))
            self._parts[layer.name] = [
                (places, partition([layer.sets[p][1] for p in places], "channel", forward))
                for places in lie.values()
            ]
            self._beyond[layer.name] = beyond
            self._names[layer.name] = [name for name, _ in layer.sets]

    def names(self) -> dict[str, list[str]]:
        """The names of every layer's parts."""
        return self._names

    def sizes(self) -> Sizes:
        """How many parts every layer has; of a layer by neurons, along each of its axes."""
        forward = self._R.forward_pass
        found: dict[str, tuple[int, ...]] = {}
        for layer, parts in self._parts.items():
            found[layer] = (len(self._names[layer]),)
            if self._by.get(layer) == "neuron":
                variable = parts[0][1].variable
                found[layer] = tuple(variable.neuron_shape(forward.shape(variable)))
        return found

    def relevance(self) -> dict[str, Tensor]:
        """`[batch, parts]` of every layer, in one pass; one more for each set in several layers."""
        named = {part.variable.name for parts in self._parts.values() for _, part in parts}
        messages = self._R.marginals(layers=named) if named else {}
        found = {}
        for layer, parts in self._parts.items():
            values = self._blank(layer)
            for places, part in parts:
                values[:, places] = part.add_up(messages[part.variable.name].unsqueeze(0))[0]
            for place, one in self._beyond[layer]:
                values[:, place] = self._R(one)
            found[layer] = values
        return found

    def activation(self) -> dict[str, Tensor]:
        """`[batch, parts]` of every layer, in one forward pass."""
        forward = self._R.forward_pass
        variables = {part.variable for parts in self._parts.values() for _, part in parts}
        extra = {
            layer: [(place, self._of_set(one)) for place, one in beyond]
            for layer, beyond in self._beyond.items()
        }
        variables |= {p.variable for beyond in extra.values() for _, each in beyond for p in each}
        known = forward.values(variables)

        def reduced(part: Partition) -> Tensor:
            values = known[part.variable].unsqueeze(0)
            return (part.largest if self._activation == "max" else part.add_up)(values)[0]

        found = {}
        for layer, parts in self._parts.items():
            values = self._blank(layer)
            for places, part in parts:
                values[:, places] = reduced(part).to(values)
            for place, each in extra[layer]:
                sides = torch.stack([reduced(part)[:, 0] for part in each])
                values[:, place] = sides.amax(0) if self._activation == "max" else sides.sum(0)
            found[layer] = values
        return found

    def _of_set(self, chosen: NeuronSet) -> list[Partition]:
        """What a set that spans several layers has in each of them."""
        return [
            partition([NeuronSet((member,))], "channel", self._R.forward_pass)
            for member in chosen.members
        ]

    def _blank(self, layer: str) -> Tensor:
        return self._R.forward_pass.output.new_zeros((self._R.batch, len(self._names[layer])))


@dataclass
class _Collected:
    """What was found of a shard's samples so far."""

    question: Question
    read: int = 0
    samples: int = 0
    skipped: list[tuple[int, str, str]] = field(default_factory=list)
    cautions: Counter[str] = field(default_factory=Counter)
    _known: dict[int, Known] = field(default_factory=dict)
    _held: dict[tuple[str, Quantity], list[tuple[Floats, Ints, Ints]]] = field(default_factory=dict)
    _statistics: dict[tuple[str, Quantity], Statistics] = field(default_factory=dict)
    _joint: dict[Pair, Joint] = field(default_factory=dict)

    def skip(self, sample: Sample, reason: str) -> None:
        self.skipped.append((sample.number, sample.name, reason))

    def add(
        self,
        batch: Sequence[Sample],
        R: Measure,
        values: Mapping[tuple[str, Quantity], Floats],
        joint: Mapping[Pair, tuple[list[int], Floats]],
    ) -> None:
        """A batch that was explained."""
        assert R.target is not None
        classes, numbers = R.target.tolist(), [sample.number for sample in batch]
        self.samples += len(batch)
        self.cautions.update(R.forward_pass.cautions.said)
        for sample, one, output in zip(batch, classes, R.scale.tolist(), strict=True):
            self._known[sample.number] = Known(sample.name, sample.label, one, output)
        for key, found in values.items():
            held = self._held.setdefault(key, [])
            held.append((found, np.array(numbers), np.array(classes)))
            if sum(each.size for each, _, _ in held) >= _HELD:
                self._reduce(key)
        for pair, (chosen, found) in joint.items():
            of = np.array(numbers)[chosen], np.array(classes)[chosen]
            one = Joint.of(found, *of)
            self._joint[pair] = one if pair not in self._joint else self._joint[pair].merge(one)

    def _reduce(self, key: tuple[str, Quantity]) -> None:
        held = self._held.pop(key, [])
        if held:
            values, numbers, classes = (np.concatenate(each) for each in zip(*held, strict=True))
            one = Statistics.of(values, numbers, classes, self.question.k)
            before = self._statistics.get(key)
            self._statistics[key] = one if before is None else merged([before, one])

    def result(self, shard: int, ended: bool) -> ShardResult:
        for key in list(self._held):
            self._reduce(key)
        wanted: set[int] = set()
        for one in self._statistics.values():
            wanted.update(np.unique(one.top.samples).tolist())
        for joint in self._joint.values():
            wanted.update(np.unique(joint.samples).tolist())
        wanted.discard(NOBODY)
        return ShardResult(
            shard,
            self.samples,
            self.read,
            ended,
            self._statistics,
            self._joint,
            {number: self._known[number] for number in sorted(wanted)},
            self.skipped,
            dict(sorted(self.cautions.items())),
        )


def _ahead(loads: Iterable[Load], readers: int, batch: int) -> Iterator[Sample]:
    """Samples in their order, while threads read a batch or two ahead."""
    if readers < 1:
        yield from (load() for load in loads)
        return
    with ThreadPoolExecutor(readers) as pool:
        waiting: deque[Future[Sample]] = deque()
        try:
            for load in loads:
                waiting.append(pool.submit(load))
                if len(waiting) > 2 * batch:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()


def _alike(one: Sample, other: Sample) -> bool:
    looks = [[(x.shape, x.dtype) for x in sample.inputs] for sample in (one, other)]
    return looks[0] == looks[1]


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes)) + (" parts" if len(sizes) == 1 else " neurons")


def _device(explainer: Explainer) -> torch.device:
    tensors = (*explainer.model.parameters(), *explainer.model.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def _array(tensor: Tensor) -> Floats:
    found: Floats = tensor.detach().to("cpu", torch.float64).numpy()
    return found
