"""The named methods, each a query on the measure (section 3.5).

With output k explained, every method below is the relevance of some set of walks. Results are
normalised: shares of the explained output. `scale="logit"` multiplies them by `R.scale`, the
explained output itself; `scale="original"` reads each rule with its own denominator, as most
other implementations do (docs/peers.md), where a method does not need more than what arrives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nrm.condition import Given, Reading, Sets, as_reading, only_formulas
from nrm.display import Shown, Table, sizes
from nrm.errors import NeuronSetError, QueryError, TargetError
from nrm.explainer import Explainer
from nrm.explanation import Target
from nrm.formulas import NeuronSet, every_neuron, united
from nrm.measure import Measure
from nrm.sets import channels, divide, mask, neurons

Scale = Literal["normalized", "logit", "original"]

OUTPUT = "y"
"""What zennit-crp calls the model's output in a condition."""


class Samples(NamedTuple):
    """The samples in which a concept is most relevant, the most relevant first.

    Attributes:
        values: `[k]`, or `[k, channels]` for all channels of a layer.
        indices: shaped alike, the number of each sample, counted over all batches.
    """

    values: Tensor
    indices: Tensor


def lrp(R: Measure, at: str | None = None, scale: Scale = "normalized") -> Tensor:
    """LRP: `R(i_0 | k)`, the relevance of every input element.

    Arguments:
        at: the input, for a model with several.

    Returns:
        shaped like the input.
    """
    return in_units(R, R.heatmap(at=at, normalized=reading(scale)), scale, _input(R, at))


def conrel(R: Measure, concept: Sets, scale: Scale = "normalized") -> Tensor:
    """ConRel: `R(S_l | k)`, the relevance of a concept (eq. 9 with one set).

    Arguments:
        concept: a neuron set; or a layer, for each of its channels.

    Returns:
        `[batch]`; `[batch, channels]` for a layer.
    """
    normalized = reading(scale)
    if isinstance(concept, str):
        return in_units(R, R.channels(concept, normalized=normalized), scale)
    relevance = R(concept, normalized=normalized)
    return in_units(R, relevance, scale)


def relmax(
    explainer: Explainer,
    batches: Tensor | Iterable[Any],
    concept: Sets,
    target: Target = None,
    k: int = 8,
    scale: Scale = "normalized",
) -> Samples:
    """RelMax: the samples with the largest `R(S_l | k)`, the concept's reference samples.

    Arguments:
        batches: one tensor, or batches one after the other: each a tensor, or a tuple, list or
            dict of the model's arguments. The last may be smaller.
        concept: a neuron set; or a layer, for each of its channels.
        target: one for all samples, or a tensor or list with one for each, over all batches. By
            default each sample's largest output.
        k: how many samples; fewer where there are no more.
        scale: `"normalized"` compares a concept's share of each output, `"logit"` what it adds to
            it.
    """
    if not isinstance(k, int) or k < 1:
        raise QueryError(f"k is a positive integer, not {k!r}")
    best: Samples | None = None
    seen = 0
    each = _each(target)
    for batch in (batches,) if isinstance(batches, Tensor) else batches:
        if each is None:
            R = _explain(explainer, batch, target=target)
            several = isinstance(target, tuple) and len(target) > 1
            if several and R.target is not None and R.target.dim() == 1:
                raise QueryError(
                    f"target={target!r} may be one output, or one for each sample: give the "
                    "outputs of all samples, over all batches, in a list or a tensor."
                )
        else:
            samples = explainer.samples(*_arguments(batch)[0], **_arguments(batch)[1])
            R = _explain(explainer, batch, target=each[seen : seen + samples])
        relevance = conrel(R, concept, scale)
        indices = torch.arange(seen, seen + R.batch, device=relevance.device)
        indices = indices.view(-1, *[1] * (relevance.dim() - 1)).expand_as(relevance)
        if best is not None:
            relevance = torch.cat([best.values, relevance])
            indices = torch.cat([best.indices, indices])
        # Stable, so that among equals the earlier sample comes first however they are batched.
        values, order = relevance.sort(dim=0, descending=True, stable=True)
        best = Samples(values[:k], indices.gather(0, order[:k]))
        seen += R.batch
    if best is None:
        raise QueryError("there are no samples: `batches` is empty.")
    if each is not None and len(each) != seen:
        raise QueryError(f"there are {len(each)} targets for {seen} samples.")
    return best


def crp(
    R: Measure,
    *concepts: Sets,
    conditional: bool = False,
    bypass: bool = False,
    at: str | None = None,
    scale: Scale = "normalized",
) -> Tensor:
    """CRP: `R(i_0, S_l, ... | k)`, where in the input one or several concepts are (eq. 37).

    Arguments:
        concepts: neuron sets, all of them visited.
        conditional: divide by the concepts' own relevance: `R(i_0 | S_l, ..., k)` (eq. 11).
        bypass: keep what flows past a concept's layer over skip connections, as masks set by
            hooks do (zennit-crp's `exclude_parallel=False`): the concept is united with the
            copies of the skip beside it. By default the concepts alone.
        at: the input, for a model with several.

    Returns:
        shaped like the input.
    """
    if not concepts:
        raise QueryError("name at least one concept; without any, CRP is LRP.")
    if not bypass:
        given = concepts if conditional else None
        sets = () if conditional else concepts
        found = R.heatmap(*sets, given=given, at=at, normalized=reading(scale))
        return in_units(R, found, scale, _input(R, at))
    together = united(only_formulas(concepts))
    joint = R.heatmap(within=together, at=at, normalized=reading(scale))
    if conditional:
        variable = R.graph.variable(_input(R, at))
        known = R(within=together, normalized=reading(scale))
        joint = divide(joint, variable.by_sample(known))
    return in_units(R, joint, scale, _input(R, at))


def crp_conditions(
    explainer: Explainer,
    inputs: Any,
    conditions: Sequence[Mapping[str, Any]],
    *,
    exclude_parallel: bool = True,
    conditional: bool = False,
    at: str | None = None,
    scale: Scale = "normalized",
) -> Tensor:
    """CRP with concepts written as in zennit-crp: one heatmap for each condition, in their order.

    Arguments:
        inputs: a tensor, or a tuple, list or dict of the model's arguments. Every condition is
            applied to all samples.
        conditions: channels by layer: an int, or a list, array or tensor of ints. Those of one
            layer are united, layers are joint. An empty list masks all of its layer: nothing that
            visits it is left. `"y"` is the output: several are explained together, by their
            logits; by default each sample's largest output.
        exclude_parallel: `True`: the concepts alone. `False`: what flows past their layers over
            skip connections is kept (`crp`'s `bypass`, the measure's `within`).
        others: as for `crp`.

    Returns:
        `[conditions, *input]`.

    Example:
        >>> crp_conditions(explainer, image, [{"features.27": [50], "y": [1]}, {"y": [1]}])
    """
    if isinstance(conditions, Mapping):
        raise QueryError("conditions are a list; one alone is a list of one: [{...}].")
    measures: dict[tuple[int, ...] | None, Measure] = {}
    heatmaps = []
    for condition in conditions:
        if not isinstance(condition, Mapping):
            raise QueryError(f"a condition maps layers to channels, not {condition!r}.")
        chosen = {name: _numbers(name, entry) for name, entry in condition.items()}
        outputs = chosen.pop(OUTPUT, None)
        if outputs == ():
            raise QueryError(f"a condition names no output: {{{OUTPUT!r}: []}} explains nothing.")
        if outputs not in measures:
            measures[outputs] = _explain_outputs(explainer, inputs, outputs or ())
        R = measures[outputs]
        concepts = [channels(name, *numbers) for name, numbers in chosen.items() if numbers]
        masked = [every_neuron(name) for name, numbers in chosen.items() if not numbers]
        options: dict[str, Any] = {"at": at, "scale": scale}
        if masked:
            found = _past(R, masked, concepts, exclude_parallel, conditional, at, reading(scale))
            heatmaps.append(in_units(R, found, scale, _input(R, at)))
        elif concepts:
            options |= {"conditional": conditional, "bypass": not exclude_parallel}
            heatmaps.append(crp(R, *concepts, **options))
        else:
            heatmaps.append(lrp(R, **options))
    if not heatmaps:
        raise QueryError("there are no conditions.")
    return torch.stack(heatmaps)


def _past(
    R: Measure,
    masked: Sequence[NeuronSet],
    concepts: Sequence[NeuronSet],
    exclude_parallel: bool,
    conditional: bool,
    at: str | None,
    normalized: Reading,
) -> Tensor:
    """The heatmap of what is left where all of some layers is masked."""
    for layer in (*masked, *concepts):
        R(layer)  # refuses what does not exist, as wherever else
    if exclude_parallel:  # nothing visits the masked layers and is let through
        return torch.zeros_like(R.heatmap(at=at))
    beside = ~united(masked)
    within = united(concepts) if concepts else None
    joint = R.heatmap(beside, within=within, at=at, normalized=normalized)
    if not conditional:
        return joint
    variable = R.graph.variable(_input(R, at))
    known = R(beside, within=within, normalized=normalized)
    return divide(joint, variable.by_sample(known))


def _numbers(name: str, chosen: Any) -> tuple[int, ...]:
    """The channels that a condition lists, each once."""
    entries = chosen.tolist() if hasattr(chosen, "tolist") else chosen  # tensors and arrays
    if not isinstance(entries, Sequence | AnySet) or isinstance(entries, str | bytes):
        entries = [entries]
    numbers = []
    for entry in entries:
        entry = entry.tolist() if hasattr(entry, "tolist") else entry
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise QueryError(
                f"a condition lists channels by number, as in {{{name!r}: [3]}}, not {chosen!r}."
            )
        numbers.append(entry)
    return tuple(dict.fromkeys(numbers))


def subgraph(
    R: Measure, *sets: Sets, normalized: Reading = True, scale: Scale = "normalized"
) -> Tensor:
    """Subgraph relevance: `R(S_0, ..., S_{L-1} | k)`, of the walks inside a set of each layer.

    Arguments:
        sets: one of each layer, in any order (eq. 10); layers left out are summed over (eq. 9).
        normalized: `False`: the original, a sum of unnormalised walk relevances (eq. 26), which
            starts from the logit whatever the `scale`.

    Returns:
        `[batch]`.
    """
    if as_reading(normalized) is not True:
        return R(*sets, normalized=normalized)
    return in_units(R, R(*sets, normalized=reading(scale)), scale)


def walk(
    R: Measure,
    path: Mapping[str, int | tuple[int, ...]],
    *,
    normalized: Reading = True,
    scale: Scale = "normalized",
) -> Tensor:
    """GNN-LRP: `R(i_0, ..., i_{L-1} | k)`, the relevance of one walk (eq. 12).

    Walks of whole nodes of a graph are joint relevances of their neurons: `subgraph` with one
    set for each layer, or `graph_networks.node_walks` for all of them.

    Arguments:
        path: one neuron of each layer, by its index without the batch axis.
        normalized: `False`: the original walk relevance (eq. 26).

    Returns:
        `[batch]`.

    Example:
        >>> walk(R, {"input": 3, "layers.0": 1, "layers.2": 0})
    """
    steps = (neurons(layer, index) for layer, index in path.items())
    return subgraph(R, *steps, normalized=normalized, scale=scale)


def symbxai(R: Measure, formula: Sets, given: Given = None, scale: Scale = "normalized") -> Tensor:
    """SymbXAI: the relevance of the walks on which a formula over neuron sets holds (eqs. 53-55).

    Arguments:
        formula: e.g. `a & ~b`: walks that visit a and avoid b.
        given: a set or formula, or several that hold jointly (eq. 11).

    Returns:
        `[batch]`.
    """
    return in_units(R, R(formula, given=given, normalized=reading(scale)), scale)


def harsanyi(
    R: Measure, *sets: NeuronSet, scale: Scale = "normalized"
) -> dict[frozenset[NeuronSet], Tensor]:
    """Harsanyi dividends: the relevance of the walks that visit exactly some sets of a family.

    SymbXAI's building blocks: they add up to one, and the relevance of any formula over the sets
    is the sum of those on which it holds.

    Arguments:
        sets: the family; what visits none of them is the dividend of the empty set.

    Returns:
        `[batch]` by the sets that are visited. Combinations of which no walk can be are left out.
    """
    return {
        frozenset(s for s, held in zip(sets, visited, strict=True) if held): in_units(R, r, scale)
        for visited, r in R.outcomes(*sets, normalized=reading(scale)).items()
    }


def additive(
    R: Measure, *sets: NeuronSet | str, layers: int | None = None, scale: Scale = "normalized"
) -> Tensor:
    """Additive relevance: how much of the walks lies in neuron sets (Definition 3, eq. 33).

    Arguments:
        sets: together one set, also of neurons of different layers.
        layers: `L + 1`, the neurons of a walk; by default the layers of the proper form.

    Returns:
        `[batch]`.
    """
    return in_units(R, R.additive(*sets, layers=layers, normalized=reading(scale)), scale)


def reading(scale: Scale) -> Reading:
    """How a query is to read rules, for relevance in some units.

    Raises:
        QueryError: there are no such units.
    """
    if scale not in ("normalized", "logit", "original"):
        raise QueryError(f"scale is 'normalized', 'logit' or 'original', not {scale!r}")
    return "original" if scale == "original" else True


def in_units(R: Measure, relevance: Tensor, scale: Scale, layer: str | None = None) -> Tensor:
    """Relevance as a share of the explained output, or in its units.

    Arguments:
        layer: that it is shaped like; by default samples are along the first axis.
    """
    reading(scale)
    if scale != "logit":
        return relevance
    if layer is None:
        return relevance * R.scale.view(-1, *[1] * (relevance.dim() - 1))
    return relevance * R.graph.variable(layer).by_sample(R.scale)


def _arguments(inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """A tensor, or a tuple, list or dict of the model's arguments."""
    if isinstance(inputs, Mapping):
        return (), inputs
    return (inputs if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _explain(explainer: Explainer, inputs: Any, **explained: Any) -> Measure:
    args, kwargs = _arguments(inputs)
    return explainer(*args, **kwargs, **explained)


def _explain_outputs(explainer: Explainer, inputs: Any, outputs: tuple[int, ...]) -> Measure:
    """Several outputs together, each with its own value as its relevance (eq. 13)."""
    if len(outputs) < 2:
        return _explain(explainer, inputs, target=outputs[0] if outputs else None)
    # Behind a head that is looked through, as for a single output.
    found = _explain(explainer, inputs).forward_pass.output
    if found.dim() > 2:
        raise TargetError(
            "a condition explains several outputs where each sample has one row of them; the "
            f"output is {tuple(found.shape)}. Give the explainer an output_relevance instead."
        )
    for number in outputs:
        if not 0 <= number < found.shape[-1]:
            raise TargetError(
                f"output {number!r} of a condition is out of range: there are {found.shape[-1]}."
            )
    chosen = torch.zeros_like(found)
    chosen[..., list(outputs)] = found[..., list(outputs)]
    return _explain(explainer, inputs, output_relevance=chosen)


def _each(target: Any) -> Sequence[Any] | None:
    """The targets of all samples one by one; `None`: they have one, or their own largest."""
    if isinstance(target, Sequence) and not isinstance(target, tuple | str):
        return target
    return target if getattr(target, "ndim", 0) else None  # tensors and arrays


def _input(R: Measure, at: str | None) -> str:
    return R.graph.inputs[0].name if at is None else at


# -- Neuron sets found by clustering a layer's activations (section 4.4.2).


@dataclass(frozen=True, eq=False, repr=False)
class Clusters(Shown):
    """Disjoint neuron sets that together are a layer.

    Attributes:
        layer: the layer's address.
        sets: all channels at the positions of each cluster, the largest cluster first.
        labels: `[batch, *positions]`, the number of the cluster at each position.
    """

    layer: str
    sets: list[NeuronSet]
    labels: Tensor

    def __iter__(self) -> Iterator[NeuronSet]:
        return iter(self.sets)

    def __len__(self) -> int:
        return len(self.sets)

    def __getitem__(self, index: int) -> NeuronSet:
        return self.sets[index]

    def table(self) -> Table:
        counts = torch.bincount(self.labels.flatten(), minlength=len(self)).tolist()
        rows = [
            (str(number), str(count), f"{count / sum(counts):.1%}")
            for number, count in enumerate(counts)
        ]
        samples, *positions = self.labels.shape
        title = (
            f"{len(self)} clusters of {self.layer!r}, {sizes(positions)} positions in each of "
            f"{samples} samples"
        )
        return Table(title, ("cluster", "positions", "share"), rows)


def clusters(R: Measure, layer: str, k: int, seed: int = 0) -> Clusters:
    """The spatial clusters of a layer: k-means over the activations at its positions.

    Every position of every sample of the batch is a point, whose coordinates are the activations
    of its channels. The same seed gives the same clusters. Needs scikit-learn.

    Arguments:
        layer: with a channel axis and at least one more.
        k: how many.

    Raises:
        NeuronSetError: the layer has no positions, or fewer different ones than clusters.

    Example:
        >>> lower, upper = clusters(R, "features.10", 4), clusters(R, "features.12", 4)
        >>> R(lower[0], upper[2])
    """
    kmeans = _kmeans()
    variable = R.graph.variable(layer)
    values = variable.canonical(R.activations(layer).unsqueeze(0))[0]
    if values.dim() < 3:
        raise NeuronSetError(
            f"{layer!r} has neurons of shape {tuple(values.shape[1:])}, so there are no positions "
            "to cluster. Choose a layer of channels at several positions."
        )
    axis = variable.channel_axis_of(values.shape[1:]) + 1
    spread = values.movedim(axis, -1)
    points = spread.reshape(-1, spread.shape[-1]).double().cpu()
    different = len(torch.unique(points, dim=0))
    if not isinstance(k, int) or not 1 <= k <= different:
        raise NeuronSetError(
            f"{layer!r} has {different} different positions, so it can have 1 to {different} "
            f"clusters, not {k!r}."
        )
    found = torch.from_numpy(kmeans(k, n_init=10, random_state=seed).fit(points.numpy()).labels_)
    order = torch.bincount(found.long(), minlength=k).argsort(descending=True, stable=True)
    labels = order.argsort()[found.long()].view(spread.shape[:-1])
    sets = [
        mask(layer, (labels == number).unsqueeze(axis).expand(values.shape), in_front=True)
        for number in range(k)
    ]
    return Clusters(layer, sets, labels)


def _kmeans() -> Any:
    try:
        from sklearn.cluster import KMeans
    except ImportError as missing:
        raise QueryError(
            "clusters need scikit-learn: install nrm[demo], or scikit-learn itself."
        ) from missing
    return KMeans
