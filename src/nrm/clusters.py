"""Neuron sets found by clustering a layer's activations (section 4.4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nrm.errors import NeuronSetError, QueryError
from nrm.formulas import NeuronSet
from nrm.measure import Measure
from nrm.neurons import channel_axis, mask


@dataclass(frozen=True, eq=False)
class Clusters:
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
    values = R.activations(layer)
    if variable.batch_axis is None:
        values = values.unsqueeze(0)
    else:
        values = values.movedim(variable.batch_axis, 0)
    if values.dim() < 3:
        raise NeuronSetError(
            f"{layer!r} has neurons of shape {tuple(values.shape[1:])}, so there are no positions "
            "to cluster. Choose a layer of channels at several positions."
        )
    axis = channel_axis(variable, values.shape[1:]) + 1
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
        mask(layer, (labels == number).unsqueeze(axis).expand(values.shape)) for number in range(k)
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
