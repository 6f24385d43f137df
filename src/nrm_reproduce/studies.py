"""The networks of the experiment `networks`, and what is compared in each.

A study is a network with samples to choose walks on and others to report on, pairs of its layers,
what these layers are divided into, and the walks that are candidates for its kind. Layers are
`adjacent` where one operation, one block or one step lies between them, and `distant` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nrm
from nrm import Explainer, Measure, NeuronSet, io
from nrm.cli import demo
from nrm.composites import CPLRP, AttnLRP, Circuits, Everywhere, GammaFlat
from nrm.errors import InputError
from nrm.evaluation.scores import By
from nrm.graph_networks import nodes
from nrm.rules import Gamma, Occlusion, Zero
from nrm.tensors import one_thread
from nrm_reproduce import mutag
from nrm_reproduce.cnn import KMeans
from nrm_reproduce.comparison import Walks
from nrm_reproduce.data import (
    DIGITS,
    PHOTOS,
    SENTENCES,
    Data,
    choose_photos,
    load_flat,
    load_molecules,
    read_photo,
)
from nrm_reproduce.mlp import perceptron
from nrm_reproduce.networks import INPUT, LAYERS, load_gin, squeezenet
from nrm_reproduce.pretrained import (
    CIFAR_CLASSES,
    HEAD_SIZE,
    HEADS,
    as_efficientnet_takes,
    cifar_picture,
    cifar_resnet,
    efficientnet,
    sentence_encoder,
)
from nrm_reproduce.report import Request

Kind = Literal["rectified", "smooth"]
"""Of networks that have one default: with rectifiers, or signed and smooth, as transformers are."""
Sample = tuple[str, tuple[Tensor, ...]]
"""A name, and the model's inputs with their batch axis."""

SAMPLES = 20
"""Reported on by default; walks are chosen on half as many others."""
GAMMAS = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5)
CLUSTERS, STRONGEST = 10, 32
"""Of each layer: clusters of positions; channels, where there are more."""

_BIASES: tuple[Literal["drop", "input"], ...] = ("drop", "input")
_MNIST_SIDE, _MNIST_EPOCHS, _MNIST_BATCH = 20, 2, 128


# -- what layers are divided into ------------------------------------------------------------------


@dataclass(frozen=True)
class Strongest:
    """The k channels with the largest relevance, in absolute size, by the default walks."""

    k: int = STRONGEST

    def __call__(self, R: Measure, layer: str) -> list[NeuronSet]:
        size = R.channels(layer)[0].abs()
        chosen = size.topk(min(self.k, len(size))).indices.sort().values
        return [nrm.channels(layer, number) for number in chosen.tolist()]


@dataclass(frozen=True)
class Rows:
    """All features of each token or node."""

    def __call__(self, R: Measure, layer: str) -> list[NeuronSet]:
        return [nodes(layer, row) for row in range(R.activations(layer).shape[-2])]


@dataclass(frozen=True)
class Heads:
    """The slice of each attention head of what all heads of a layer give."""

    count: int = HEADS
    size: int = HEAD_SIZE

    def __call__(self, R: Measure, layer: str) -> list[NeuronSet]:
        begins = range(0, self.count * self.size, self.size)
        return [nrm.channels(layer, *range(n, n + self.size), axis=-1) for n in begins]


# -- which walks ----------------------------------------------------------------------------------


def _both(key: str, rules: Callable[[], object]) -> tuple[Walks, ...]:
    said = {"drop": "biases dropped", "input": "biases as inputs"}
    return tuple(
        Walks(f"{key}, {bias}", f"{key}, {said[bias]}", rules(), bias)  # type: ignore[arg-type]
        for bias in _BIASES
    )


RECTIFIED_GAMMAS = tuple(
    walks
    for gamma in GAMMAS
    for walks in _both(f"GammaFlat({gamma:g})", lambda gamma=gamma: GammaFlat(gamma))  # type: ignore[misc]
)
SMOOTH_GAMMAS = tuple(
    walks
    for gamma in GAMMAS
    for walks in _both(f"Gamma({gamma:g})", lambda gamma=gamma: Everywhere(Gamma(gamma)))  # type: ignore[misc]
)
LRP_ZERO = Walks("LRP-0", "LRP-0, biases as inputs", Zero(), "input")
OCCLUSION = Walks(
    "occlusion walks",
    "occlusion walks, biases take the rest",
    Occlusion(rest_to_bias=True),
    "input",
)
GNN_LRP = Walks("GNN-LRP", "GNN-LRP", mutag.composite(3), "input")
CANDIDATES: dict[Kind, tuple[Walks, ...]] = {
    "rectified": (*RECTIFIED_GAMMAS, LRP_ZERO, OCCLUSION),
    "smooth": (
        *SMOOTH_GAMMAS,
        Walks("CPLRP", "CP-LRP", CPLRP(), "input"),
        Walks("AttnLRP", "AttnLRP", AttnLRP(), "input"),
        Walks("Circuits", "Circuits", Circuits(), "input"),
    ),
}
"""Among which the best are chosen, for each kind of network. LRP-0 has no flat first layer."""
DEFAULTS: dict[Kind, str] = {"rectified": "GammaFlat(0.25), drop", "smooth": "CPLRP"}
"""What the library suggests (`nrm.composites.suggested`)."""


# -- studies ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two layers, the lower one first, and what they are divided into.

    Attributes:
        part: what a set is called.
        near: `"adjacent"` or `"distant"`.
    """

    part: str
    near: Literal["adjacent", "distant"]
    layers: tuple[str, str]
    by: By


@dataclass(frozen=True, eq=False)
class Study:
    """A network, its samples, and what is compared.

    Attributes:
        name: as `--only` takes it.
        said, data: what the network and its samples are.
        choosing, reporting: samples, none of which is in both.
        further: walks that are compared and not chosen from.
        batch_axis: as `Explainer` takes it.
    """

    name: str
    said: str
    data: str
    kind: Kind
    model: nn.Module
    choosing: Sequence[Sample]
    reporting: Sequence[Sample]
    pairs: Sequence[Pair]
    further: tuple[Walks, ...] = ()
    batch_axis: Literal["auto"] | None = "auto"

    @property
    def walks(self) -> tuple[Walks, ...]:
        """All that are compared."""
        return (*CANDIDATES[self.kind], *self.further)

    @property
    def default(self) -> Walks:
        """What the library suggests."""
        return next(walks for walks in self.walks if walks.key == DEFAULTS[self.kind])

    def explainer(self, walks: Walks) -> Explainer:
        """An explainer of the network by some walks."""
        return Explainer(
            self.model, walks.rules, bias=walks.bias, batch_axis=self.batch_axis, check="none"
        )


def _pairs(
    part: str, by: By, adjacent: Sequence[tuple[str, str]], distant: Sequence[tuple[str, str]]
) -> list[Pair]:
    return [
        *(Pair(part, "adjacent", layers, by) for layers in adjacent),
        *(Pair(part, "distant", layers, by) for layers in distant),
    ]


def _clusters(seed: int, k: int = CLUSTERS) -> KMeans:
    return KMeans(k, seed)


def _half(count: int) -> int:
    """On how many samples walks are chosen, where so many are reported on."""
    return -(-count // 2)


def _last(samples: Sequence[Sample], count: int) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The last samples to report on, and half as many before them to choose on."""
    reported = samples[-count:]
    return samples[: -len(reported)][-_half(count) :], reported


# -- networks with photographs ---------------------------------------------------------------------


def _photographs(request: Request) -> list[Path]:
    """All files, by name."""
    return choose_photos(Path(request.data) / PHOTOS, 10**9, 0)


def squeezenet_study(request: Request) -> Study:
    """SqueezeNet: channels and clusters from the third module to the last Fire module."""
    count = request.samples or SAMPLES
    files = _photographs(request)[-count - _half(count) :]
    model = squeezenet(Path(request.data))
    choosing, reporting = _last([(file.stem, (read_photo(file).x,)) for file in files], count)
    far = [
        ("features.5", "features.10"),
        ("features.5", "features.12"),
        ("features.3", "features.7"),
    ]
    squeeze = ("features.12.squeeze_activation", "features.12.expand3x3_activation")
    return Study(
        "squeezenet",
        "SqueezeNet 1.0, pretrained on ImageNet",
        "photographs, the last by name",
        "rectified",
        model.requires_grad_(False),
        choosing,
        reporting,
        [
            *_pairs("cluster", _clusters(request.seed), [("features.10", "features.12")], far),
            *_pairs("channel", "channel", [squeeze], []),
            *_pairs("channel", Strongest(), [], far),
        ],
    )


def efficientnet_study(request: Request) -> Study:
    """EfficientNet-Lite0: depthwise convolutions, ReLU6, blocks that end without a rectifier."""
    count = request.samples or SAMPLES
    files = _photographs(request)[-count - _half(count) :]
    model = efficientnet()
    samples = [(file.stem, (as_efficientnet_takes(read_photo(file).shown),)) for file in files]
    choosing, reporting = _last(samples, count)
    far = [("_blocks.4", "_blocks.10"), ("_blocks.6", "_blocks.12")]
    return Study(
        "efficientnet",
        "EfficientNet-Lite0, pretrained on ImageNet",
        "photographs, the last by name",
        "rectified",
        model,
        choosing,
        reporting,
        [
            *_pairs("cluster", _clusters(request.seed), [("_blocks.9", "_blocks.10")], far),
            *_pairs("channel", Strongest(), [("_blocks.10._swish@1", "_blocks.10")], far),
        ],
    )


def cifar_study(name: str, blocks: int, request: Request) -> Study:
    """A residual network on CIFAR-10."""
    folder = Path(request.data) / "cifar10"
    model = cifar_resnet(folder / f"{name}.safetensors", blocks)
    count = request.samples or SAMPLES
    each = -(-count // len(CIFAR_CLASSES))

    def read(begin: int, end: int, count: int) -> list[Sample]:
        every = [sorted(folder.glob(f"{of}_*.jpg"))[begin : end or None] for of in CIFAR_CLASSES]
        files = [some[n] for n in range(each) for some in every if n < len(some)]
        return [(file.stem, (cifar_picture(file),)) for file in files[:count]]

    end = blocks - 1
    far = [(f"layer1.{end}", f"layer3.{end - 1}"), ("layer2.0", f"layer3.{end - 1}")]
    inside = (f"layer3.{end - 1}:relu", f"layer3.{end - 1}")
    return Study(
        name,
        f"ResNet{6 * blocks + 2}, pretrained on CIFAR-10",
        "pictures of CIFAR-10, the last of each class",
        "rectified",
        model,
        read(-2 * each, -each, _half(count)),
        read(-each, 0, count),
        [
            *_pairs("cluster", _clusters(request.seed), [("layer3.0", "layer3.1")], far),
            *_pairs("channel", Strongest(), [inside, ("layer2.0", "layer2.1")], far),
        ],
    )


# -- networks with handwritten digits --------------------------------------------------------------


def mlp_study(request: Request) -> Study:
    """The multilayer perceptron: all neurons. There is one pair of distant layers in it."""
    data = load_flat(request.data)
    network = perceptron(data, request)
    count = request.samples or SAMPLES
    choosing, reporting = (
        [(f"{name} {n}", (part.x[n : n + 1],)) for n in range(min(most, len(part)))]
        for name, part, most in (
            ("held out", data.held_out, _half(count)),
            ("test", data.test, count),
        )
    )
    widths = "-".join(map(str, (*network.widths.values(), 10)))
    return Study(
        "mlp",
        f"perceptron of {widths} neurons, {network.accuracy:.2%} right",
        f"digits of {data.name}, the first test pictures",
        "rectified",
        network.model,
        choosing,
        reporting,
        _pairs("neuron", "neuron", [LAYERS, (INPUT, LAYERS[0])], [(INPUT, LAYERS[1])]),
    )


def digitnet_study(request: Request) -> Study:
    """The demo's network on scikit-learn's digits, max-pools between its convolutions."""
    trained = demo.trained(seed=request.seed)
    count = request.samples or SAMPLES
    return _digit_study(
        "digitnet",
        f"three convolutions with max-pools between, {trained.accuracy:.2%} right",
        "scikit-learn's digits that it has not seen",
        trained.model,
        trained.x[: 2 * count],
        request,
    )


def mnist_study(request: Request) -> Study:
    """The same network trained on MNIST."""
    if request.data == DIGITS:
        raise InputError(f"--data {DIGITS} holds no MNIST")
    data = load_flat(request.data)
    model = _mnist_net(data, request.kept / "mnist-cnn.safetensors", request.seed)
    test = _squares(data.test.x)
    right = float((model(test).argmax(1) == data.test.y).float().mean())
    count = request.samples or SAMPLES
    return _digit_study(
        "mnist-cnn",
        f"three convolutions with max-pools between, {right:.2%} right",
        "MNIST's test digits, the first",
        model,
        test[: 2 * count],
        request,
    )


def _digit_study(
    name: str, said: str, data: str, model: nn.Module, x: Tensor, request: Request
) -> Study:
    """Every second digit is reported on."""
    samples: list[Sample] = [(f"digit {n}", (x[n : n + 1],)) for n in range(len(x))]
    near = [("relu1", "relu2"), ("relu2", "relu3")]
    return Study(
        name,
        said,
        data,
        "rectified",
        model,
        samples[1::2][: _half(len(samples[::2]))],
        samples[::2],
        [
            *_pairs("channel", "channel", near, [("relu1", "relu3")]),
            *_pairs("cluster", _clusters(request.seed, 5), near, [("relu1", "relu3")]),
        ],
    )


def _squares(x: Tensor) -> Tensor:
    """Flat digits as the network's pictures: `[N, 1, side, side]`."""
    pictures = x.view(-1, 1, 28, 28)
    side = (_MNIST_SIDE, _MNIST_SIDE)
    return F.interpolate(pictures, side, mode="bilinear", align_corners=False, antialias=True)


def _mnist_net(data: Data, file: Path, seed: int) -> nn.Module:
    """From its file, or trained now and written there."""
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = demo.DigitNet()
        try:
            model.load_state_dict(load_file(file))
        except (OSError, safetensors.SafetensorError, RuntimeError):
            x = _squares(data.train.x)
            batches = demo.shuffled(x, data.train.y, _MNIST_BATCH, _MNIST_EPOCHS)
            steps = _MNIST_EPOCHS * -(-len(x) // _MNIST_BATCH)
            demo.fit(model, batches, 2e-3, falling=steps)
            file.parent.mkdir(parents=True, exist_ok=True)
            with io.written_at_once(file) as beside:
                save_file(model.state_dict(), beside)
    return model.eval().requires_grad_(False)


# -- sentences and molecules -----------------------------------------------------------------------


def encoder_study(request: Request) -> Study:
    """The sentence encoder: heads of its layers, and tokens between them."""
    model, tokenizer = sentence_encoder()
    samples: list[Sample] = []
    for number, pair in enumerate(SENTENCES):
        ids = [tokenizer(sentence, return_tensors="pt")["input_ids"] for sentence in pair]
        units = [model.embedded(one, torch.ones_like(one)) for one in ids]
        for of in (0, 1):
            inputs = (ids[of], torch.ones_like(ids[of]), units[1 - of])
            samples.append((f"pair {number}, {'first' if of == 0 else 'second'} one", inputs))
    choosing, reporting = _last(samples, min(request.samples or SAMPLES, len(samples) // 2))
    heads, layer = "encoder.encoder.layer.{}.attention.self", "encoder.encoder.layer.{}"

    def pairs(name: str, *numbers: tuple[int, int]) -> list[tuple[str, str]]:
        return [(name.format(lower), name.format(upper)) for lower, upper in numbers]

    words = "encoder.embeddings.word_embeddings"
    return Study(
        "encoder",
        "all-MiniLM-L6-v2, the similarity of two sentences",
        "sentences, each beside another",
        "smooth",
        model,
        choosing,
        reporting,
        [
            *_pairs("head", Heads(), pairs(heads, (3, 4)), pairs(heads, (0, 3), (2, 5))),
            *_pairs(
                "token",
                Rows(),
                pairs(layer, (2, 3)),
                [(words, layer.format(2)), *pairs(layer, (1, 4))],
            ),
        ],
    )


def mutag_study(request: Request) -> Study:
    """The graph network of MUTAG: atoms of its layers, and channels."""
    folder = Path(request.data)
    folder = folder if (folder / "mutag.json").is_file() else folder / "graphs"
    model, _ = load_gin(folder)
    molecules = load_molecules(folder)
    samples: list[Sample] = [
        (f"molecule {n}", (one.adjacency, one.features)) for n, one in enumerate(molecules)
    ]
    count = request.samples or SAMPLES
    return Study(
        "mutag",
        "GIN of three blocks, pretrained on MUTAG",
        "molecules of MUTAG, every eighth",
        "rectified",
        model,
        samples[4::8][: _half(count)],
        samples[::8][:count],
        [
            *_pairs(
                "atom",
                Rows(),
                [("blocks.0", "blocks.1"), ("features", "blocks.0")],
                [("features", "blocks.1"), ("blocks.0", "blocks.2")],
            ),
            *_pairs(
                "channel",
                Strongest(),
                [("blocks.0:relu", "blocks.0")],
                [("blocks.0:relu", "blocks.1"), ("blocks.0", "blocks.1")],
            ),
        ],
        further=(GNN_LRP,),
        batch_axis=None,
    )


STUDIES: dict[str, Callable[[Request], Study]] = {
    "squeezenet": squeezenet_study,
    "efficientnet": efficientnet_study,
    "resnet20": lambda request: cifar_study("resnet20", 3, request),
    "resnet56": lambda request: cifar_study("resnet56", 9, request),
    "mlp": mlp_study,
    "digitnet": digitnet_study,
    "mnist-cnn": mnist_study,
    "encoder": encoder_study,
    "mutag": mutag_study,
}
"""By name; each is built when its turn comes."""
