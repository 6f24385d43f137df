"""The networks: trained on the spot, always alike, by one loop (`nrm.cli.demo.fit`), or pretrained.

Multilayer perceptron   trained on MNIST or scikit-learn's digits, and kept in a file
Linear recurrent        trained on series until it is always right
DigitNet                the demo's, trained once in a process
SqueezeNet, VGG16       pretrained on ImageNet
GIN                     pretrained on MUTAG
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nrm import io
from nrm.cli import demo
from nrm.cli.models import load_model
from nrm.errors import InputError, NrmError
from nrm.evaluation.store import digest
from nrm.tensors import one_thread
from nrm_reproduce.data import (
    DIGITS,
    PHOTOS,
    STATES,
    Data,
    Part,
    Photo,
    Series,
    Task,
    all_events,
    choose_photos,
    class_names,
    make_series,
    read_photo,
)
from nrm_reproduce.report import Request

INPUT = "x"
LAYERS = ("relu1", "relu2")
"""The hidden layers of the perceptron, as they are after their activation."""
SQUEEZENET = "torchvision.models:squeezenet1_0"
SQUEEZENET_WEIGHTS = Path("squeezenet") / "squeezenet1_0.safetensors"
"""In the folder of data."""
VGG16 = "torchvision.models:vgg16"

_FORMAT = "nrm-mlp-2"
_BATCH, _MOST_UPDATES, _CHECK_EVERY, _POOL = 128, 4000, 25, 2**15
_GIN_FILE = "mutag_gin3.safetensors"
_READOUT = 20**0.5
_WIDE = 10  # a layer of the GIN that is narrower is the output, without a ReLU


# -- the multilayer perceptron ---------------------------------------------------------------------


class NotAccurateError(NrmError):
    """The trained network recognises fewer digits than the experiment asks for."""


@dataclass(frozen=True)
class Recipe:
    """How the network of a data set is built and trained.

    Attributes:
        hidden: how many neurons the two hidden layers have.
        accuracy: which share of the test set it must recognise.
    """

    hidden: tuple[int, int]
    epochs: int
    batch: int
    rate: float
    accuracy: float


RECIPES = {
    "mnist": Recipe((256, 128), epochs=10, batch=128, rate=1e-3, accuracy=0.977),
    "digits": Recipe((64, 32), epochs=40, batch=32, rate=2e-3, accuracy=0.95),
}


class MLP(nn.Module):
    """Three linear layers with rectifiers between them, on flat pictures."""

    def __init__(self, pixels: int, hidden: tuple[int, int], classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(pixels, hidden[0])
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.relu2 = nn.ReLU()
        self.head = nn.Linear(hidden[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]`."""
        logits: Tensor = self.head(self.relu2(self.fc2(self.relu1(self.fc1(x)))))
        return logits


@dataclass(frozen=True)
class Perceptron:
    """A trained perceptron in evaluation mode.

    Attributes:
        accuracy: on the test set.
        digest: of its weights; what was found with others is of no use.
        loaded: from its file, instead of trained now.
    """

    model: MLP
    accuracy: float
    digest: str
    loaded: bool

    @property
    def widths(self) -> dict[str, int]:
        """How many neurons the input and the hidden layers have."""
        model = self.model
        sizes = (model.fc1.in_features, model.fc1.out_features, model.fc2.out_features)
        return dict(zip((INPUT, *LAYERS), sizes, strict=True))


def trained_mlp(
    data: Data,
    file: Path,
    seed: int = 0,
    *,
    recipe: Recipe | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Perceptron:
    """The network from its file, or trained now and written there.

    Arguments:
        file: of weights; one of another data set, recipe or seed is replaced.
        advance: called with 1 after every epoch.

    Raises:
        NotAccurateError: after training it recognises too few digits of the test set.
    """
    recipe = RECIPES[data.name] if recipe is None else recipe
    origin = {
        "format": _FORMAT,
        "data": data.name,
        "pictures": digest([data.train.x, data.train.y]),
        "recipe": str(recipe),
        "seed": str(seed),
    }
    with torch.random.fork_rng(devices=[]):  # which initial weights draw from
        model = _read(file, origin, MLP(data.test.x.shape[1], recipe.hidden))
    loaded = model is not None
    if model is None:
        model = train_mlp(data.train, recipe, seed, advance)
    model.eval().requires_grad_(False)
    share = accuracy(model, data.test.x, data.test.y)
    if share < recipe.accuracy:
        raise NotAccurateError(
            f"the network recognises {share:.2%} of the test digits, fewer than "
            f"{recipe.accuracy:.2%}: try another seed."
        )
    if not loaded:
        with io.written_at_once(file) as beside:
            save_file(model.state_dict(), beside, metadata=origin)
    return Perceptron(model, share, digest(model)[:12], loaded)


def train_mlp(
    part: Part, recipe: Recipe, seed: int, advance: Callable[[int], None] = lambda done: None
) -> MLP:
    """Train by Adam, the learning rate falling to zero; the same way every time."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), one_thread():
        torch.manual_seed(seed)
        model = MLP(part.x.shape[1], recipe.hidden)
        batches = demo.shuffled(part.x, part.y, recipe.batch, recipe.epochs, advance)
        steps = recipe.epochs * -(-len(part) // recipe.batch)
        demo.fit(model, batches, recipe.rate, falling=steps)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of the samples whose class the network gives the largest logit."""
    return float((model(x).argmax(1) == y).double().mean())


def _read(file: Path, origin: dict[str, str], model: MLP) -> MLP | None:
    """The model with the weights of a file; `None` if there are none of this origin in it."""
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            if opened.metadata() != origin:
                return None
        model.load_state_dict(load_file(file))
    except (safetensors.SafetensorError, RuntimeError):
        return None  # damaged: trained anew, and replaced
    return model


# -- the linear recurrent network ------------------------------------------------------------------


class LinearRNN(nn.Module):
    """A recurrent network without a nonlinearity: one linear cell and a linear read-out."""

    def __init__(self, classes: int, hidden: int = 32) -> None:
        super().__init__()
        self.hidden = hidden
        self.cell = nn.Linear(STATES + hidden, hidden)
        self.head = nn.Linear(hidden, classes)
        with torch.no_grad():  # or a new network forgets before it has learnt to remember
            self.cell.weight[:, STATES:] = nn.init.orthogonal_(torch.empty(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]` of series `[N, steps, 3]`."""
        h = x.new_zeros(x.shape[0], self.hidden)
        for t in range(x.shape[1]):
            h = self.cell(torch.cat([x[:, t], h], -1))
        logits: Tensor = self.head(h)
        return logits


@dataclass(frozen=True)
class TrainedRNN:
    """A recurrent network after training.

    Attributes:
        model: in double precision and evaluation mode.
        accuracy: on `held_out`.
        held_out: under `Task.POSITION` series that training never showed; under `Task.EVENT`,
            where there are so few, every series.
        updates: how many batches of 128 series it took.
    """

    model: LinearRNN
    accuracy: float
    held_out: Series
    updates: int


def train_rnn(task: Task, steps: int, seed: int) -> TrainedRNN:
    """Train with Adam until all held-out series were right at three checks in a row.

    Gives up after 4000 updates: `accuracy` says what was reached. The same seed gives the same
    data and, on the same machine, the same network.
    """
    updates = 0

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal updates
        in_a_row = 0
        while updates < _MOST_UPDATES and in_a_row < 3:
            some = shown[torch.randint(len(shown), (_BATCH,))]
            yield some.x.float(), some.label
            updates += 1
            if updates % _CHECK_EVERY == 0:
                right = accuracy(model, held_out.x.float(), held_out.label) == 1
                in_a_row = in_a_row + 1 if right else 0

    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = LinearRNN(STATES - 1 if task is Task.EVENT else STATES)
        shown, held_out = _split(task, steps, seed)
        demo.fit(model, batches(), 2e-3, clip=1.0)
        model.double().eval().requires_grad_(False)
        return TrainedRNN(model, accuracy(model, held_out.x, held_out.label), held_out, updates)


def _split(task: Task, steps: int, seed: int) -> tuple[Series, Series]:
    """Series to train on, and series to test on that are not among them where that can be."""
    if task is Task.EVENT:
        every = all_events(steps)
        return every, every
    pool = make_series(task, steps, _POOL, seed)
    states = pool.x.argmax(-1)
    code = (states * STATES ** torch.arange(steps)).sum(1)
    different, which = torch.unique(code, return_inverse=True)  # type: ignore[no-untyped-call]
    apart = (torch.rand(len(different)) < 0.1)[which]
    return pool[~apart], pool[apart]


# -- networks with pictures ------------------------------------------------------------------------

Kind = Literal["SqueezeNet", "VGG16", "DigitNet"]


@dataclass(frozen=True, eq=False)
class Pictured:
    """A network, and the pictures on which it is explained.

    Attributes:
        kind: which network, as titles call it.
        said, pictures: what the network and the pictures are.
        classes: their names, if they are known.
    """

    kind: Kind
    said: str
    pictures: str
    model: nn.Module
    photos: Sequence[Photo]
    classes: Sequence[str] | None


def pictured(request: Request, count: int) -> Pictured:
    """The network of a request, with some pictures.

    SqueezeNet and photographs from the folder of data; VGG16 where its weights are given; a small
    network and digits that it has not seen where the data are `digits`.

    Raises:
        InputError: there are no pictures, or the weights do not fit.
    """
    if request.data == DIGITS:
        if request.weights is not None:
            raise InputError(
                f"--weights are those of VGG16, which explains photographs: --data {DIGITS} trains "
                "a small network itself."
            )
        return _digits(count, request.seed)
    folder, weights = Path(request.data), request.weights
    files = choose_photos(folder / PHOTOS, count, request.seed)
    kind: Kind = "SqueezeNet" if weights is None else "VGG16"
    said = "SqueezeNet 1.0, pretrained on ImageNet"
    if weights is not None:
        said = f"VGG16, with the weights of {weights.name}"
    model = squeezenet(folder) if weights is None else _loaded(VGG16, weights)
    photos = [read_photo(file) for file in files]
    return Pictured(kind, said, "photographs", model, photos, class_names(folder))


def squeezenet(data: Path) -> nn.Module:
    """SqueezeNet 1.0 with the weights in the folder of data."""
    return _loaded(SQUEEZENET, data / SQUEEZENET_WEIGHTS)


def _loaded(spec: str, weights: Path) -> nn.Module:
    return load_model(spec, weights, torch.device("cpu"))


@cache
def _digit_net(seed: int) -> demo.Trained:
    return demo.trained(seed=seed)


def _digits(count: int, seed: int) -> Pictured:
    """The demo's network with digits that it has not seen."""
    trained = _digit_net(seed)
    places = list(range(len(trained.x)))
    random.Random(seed).shuffle(places)
    photos = [
        Photo(f"digit {place}", trained.x[place : place + 1], trained.x[place, 0].numpy())
        for place in sorted(places[:count])
    ]
    return Pictured(
        "DigitNet",
        f"three convolutions, trained on {trained.seen} of scikit-learn's digits; "
        f"{trained.accuracy:.2%} of the others right",
        "digits of scikit-learn that the network has not seen",
        trained.model,
        photos,
        [str(digit) for digit in range(10)],
    )


def of_class(model: nn.Module, number: int) -> nn.Module:
    """The model with one class for output; the other weights are those of the model itself.

    SqueezeNet finds its classes by a convolution of 1000 filters at every position. One class
    needs one of them: its relevance and its interventions are the same, and take a quarter of
    the time.

    Arguments:
        model: its last convolution or linear layer is that of the classes, followed by nothing
            that mixes them.
    """
    shared: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    narrow = deepcopy(model, shared)
    *_, head = (m for m in narrow.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    head.weight = _row(head.weight, number)
    if head.bias is not None:
        head.bias = _row(head.bias, number)
    if isinstance(head, nn.Conv2d):
        head.out_channels = 1
    else:
        head.out_features = 1
    return narrow


def _row(values: Tensor, number: int) -> nn.Parameter:
    return nn.Parameter(values.detach()[number : number + 1].clone(), requires_grad=False)


# -- the graph network of MUTAG --------------------------------------------------------------------


class Block(nn.Module):
    """Half the sum over neighbours and the node itself, then linear layers with ReLUs."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, mean: Tensor, h: Tensor) -> Tensor:
        h = mean @ h
        for layer in self.layers:
            h = layer(h)
            if h.shape[-1] > _WIDE:
                h = torch.relu(h)
        return h


class GIN(nn.Module):
    """A graph isomorphism network that gives one vector of logits for a graph.

    Arguments:
        widths: of every block, the widths of its features from input to output.
    """

    def __init__(self, widths: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, widths))

    def forward(self, adjacency: Tensor, features: Tensor) -> Tensor:
        """The logits.

        Arguments:
            adjacency: `[nodes, nodes]`, boolean, with every node its own neighbour.
            features: `[nodes, features]`.
        """
        mean = adjacency.to(features.dtype).T / 2
        h = features
        for block in self.blocks:
            h = block(mean, h)
        return h.sum(0) / _READOUT


def load_gin(folder: Path) -> tuple[GIN, Tensor]:
    """The pretrained network in a folder, in double precision, and the logits stored beside it.

    Raises:
        InputError: there is none.
    """
    file = folder / _GIN_FILE
    if not file.is_file():
        raise InputError(f"{folder} holds no {_GIN_FILE}")
    stored = load_file(file)
    logits = stored.pop("logits")
    weights = {name: w for name, w in stored.items() if ".weight" in name}
    count = 1 + max(int(name.partition(".")[0].removeprefix("block")) for name in weights)
    widths = []
    for block in range(1, count):
        own = [weights[name] for name in sorted(weights) if name.startswith(f"block{block}.")]
        widths.append([own[0].shape[0], *(w.shape[1] for w in own)])
    model = GIN(widths)
    state = {}
    for name, value in stored.items():
        block_name, _, entry = name.partition(".")
        place = f"blocks.{int(block_name.removeprefix('block')) - 1}.layers.{entry[-1]}"
        kind = entry[:-1]
        state[f"{place}.{kind}"] = value.T if kind == "weight" else value
    model.load_state_dict(state)
    return model.double().eval().requires_grad_(False), logits
