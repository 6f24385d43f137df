"""What is compared: pairs of channels of two layers, or of clusters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nrm.evaluation.faithfulness import By
from nrm.experiments.cnn.layers import Pair
from nrm.experiments.cnn.subject import Kind
from nrm.formulas import NeuronSet
from nrm.measure import Measure
from nrm.methods import clusters


@dataclass(frozen=True)
class KMeans:
    """Divides a layer into clusters of its positions, the largest first."""

    k: int
    seed: int

    def __call__(self, R: Measure, layer: str) -> list[NeuronSet]:
        return clusters(R, layer, self.k, self.seed).sets


@dataclass(frozen=True)
class Plan:
    """What layers are divided into, and which layers.

    Attributes:
        part: what a set is called.
        layers: of each network, unless others are named: after their activation functions, where
            nothing is what removal leaves.
        samples: on how many pictures by default.
        k: clusters in each layer, for each network; nothing for channels.
        paper: the correlations of Table 2 by method, for the first layers of `beside`.
        notes: how the rows are to be read, beside what holds for all plans.
    """

    name: str
    summary: str
    part: str
    layers: Mapping[Kind, tuple[Pair, ...]]
    samples: int
    k: Mapping[Kind, int] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    beside: tuple[Kind, ...] = ()
    notes: tuple[str, ...] = ()

    def by(self, kind: Kind, seed: int) -> By:
        """What layers of a network are divided into."""
        return KMeans(self.k[kind], seed) if self.k else "channel"

    def papers(self, kind: Kind, layers: Pair) -> Mapping[str, float]:
        """The paper's figures, to stand beside those of two layers."""
        known = kind in self.beside and layers == self.layers[kind][0]
        return self.paper if known else {}


CHANNELS = Plan(
    "cnn-channels",
    "joint relevance of channels in a convolutional network (Table 2, Figs. 5 and 6)",
    "channel",
    {
        "SqueezeNet": (("features.12.squeeze_activation", "features.12.expand3x3_activation"),),
        "VGG16": (("features.27", "features.29"),),
        "DigitNet": (("relu1", "relu2"), ("relu2", "relu3")),
    },
    samples=20,
    paper={"joint": 0.528, "lrp": 0.0005, "occlusion": 0.043, "activation": 0.0005},
    beside=("SqueezeNet", "VGG16"),
    notes=(
        "Channels are taken after their activation function, unless other layers are named. Before "
        "it their relevance and contribution are the same, since zero stays zero; only the "
        "activations that one baseline adds up are others. All pairs are compared, also those of "
        "channels without any activation, whose relevance is zero, and whose contribution nearly "
        "so: without the other channel they may wake.",
    ),
)

CLUSTERS = Plan(
    "cnn-clusters",
    "joint relevance of clusters in a convolutional network (Fig. 7)",
    "cluster",
    {
        "SqueezeNet": (("features.10", "features.12"),),
        "VGG16": (("features.22", "features.29"),),
        "DigitNet": (("relu1", "relu2"), ("relu2", "relu3")),
    },
    samples=30,
    k={"SqueezeNet": 10, "VGG16": 10, "DigitNet": 5},
    notes=(
        "Clusters are those of k-means over the activations at the positions of a layer, found "
        "for each picture by itself: all channels at the positions of a cluster are removed.",
    ),
)
