"""What is compared: pairs of channels of two layers, or of clusters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nrm.clusters import clusters
from nrm.evaluation.baselines import By
from nrm.formulas import NeuronSet
from nrm.measure import Measure


@dataclass(frozen=True)
class KMeans:
    """Divides a layer into clusters of its positions, the largest first."""

    k: int
    seed: int

    def __call__(self, R: Measure, layer: str) -> list[NeuronSet]:
        return clusters(R, layer, self.k, self.seed).sets


@dataclass(frozen=True)
class Plan:
    """Two layers, and what they are divided into.

    Attributes:
        part: what a set is called.
        layers: after their activation functions, where nothing is what removal leaves.
        samples: on how many pictures by default.
        k: clusters in each layer; `None` for channels.
        combinations: how many pairs there are, up to which SC_k goes.
        paper: the correlations of Table 2, by method.
        notes: how the rows are to be read, beside what holds for all plans.
    """

    name: str
    summary: str
    title: str
    part: str
    layers: tuple[str, str]
    samples: int
    combinations: int
    k: int | None = None
    paper: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def by(self, seed: int) -> By:
        """What layers are divided into."""
        return "channel" if self.k is None else KMeans(self.k, seed)


CHANNELS = Plan(
    "cnn-channels",
    "joint relevance of channels in a convolutional network (Table 2, Figs. 5 and 6)",
    "Joint relevance of channels in SqueezeNet, beside interventions",
    "channel",
    ("features.12.squeeze_activation", "features.12.expand3x3_activation"),
    samples=20,
    combinations=64 * 256,
    paper={"joint": 0.528, "lrp": 0.0005, "occlusion": 0.043, "activation": 0.0005},
    notes=(
        "The paper's figures are those of Table 2 for channels of VGG16: another network, beside "
        "which those of SqueezeNet stand for comparison only.",
        "Channels are taken after their activation function. Before it their relevance and "
        "contribution are the same, since zero stays zero; only the activations that one baseline "
        "adds up are others. All pairs are compared, also those of channels without any "
        "activation, whose relevance and contribution are zero.",
    ),
)

CLUSTERS = Plan(
    "cnn-clusters",
    "joint relevance of clusters in a convolutional network (Fig. 7)",
    "Joint relevance of clusters in SqueezeNet, beside interventions",
    "cluster",
    ("features.10", "features.12"),
    samples=30,
    combinations=10 * 10,
    k=10,
    notes=(
        "Clusters are those of k-means over the activations at the positions of a layer, found "
        "for each picture by itself: all channels at the positions of a cluster are removed.",
    ),
)
