"""The multilayer perceptron: trained once, always alike, and kept in a file."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nrm.errors import NrmError
from nrm.experiments.mlp.data import Data, Part
from nrm.tensors import one_thread

INPUT = "x"
LAYERS = ("relu1", "relu2")
"""The hidden layers, as they are after their activation."""

_FORMAT = "nrm-mlp-1"


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
class Trained:
    """A trained network in evaluation mode.

    Attributes:
        accuracy: on the test set.
        digest: of its weights; what was found with others is of no use.
    """

    model: MLP
    accuracy: float
    digest: str
    loaded: bool

    def combinations(self, layers: tuple[str, ...]) -> int:
        """How many there are of one neuron of each layer."""
        model = self.model
        sizes = {
            INPUT: model.fc1.in_features,
            LAYERS[0]: model.fc1.out_features,
            LAYERS[1]: model.fc2.out_features,
        }
        return math.prod(sizes[layer] for layer in layers)


def trained(
    data: Data,
    file: Path,
    seed: int = 0,
    *,
    recipe: Recipe | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> Trained:
    """The network from its file, or trained now and written there.

    Arguments:
        file: of weights; one of another data set, recipe or seed is replaced.
        tell: called after every epoch.

    Raises:
        NotAccurateError: after training it recognises too few digits of the test set.
    """
    recipe = RECIPES[data.name] if recipe is None else recipe
    origin = _origin(data, recipe, seed)
    with torch.random.fork_rng(devices=[]):  # which initial weights draw from
        model = _read(file, origin, MLP(data.test.x.shape[1], recipe.hidden))
    loaded = model is not None
    if model is None:
        model = train(data.train, recipe, seed, tell)
    model.eval().requires_grad_(False)
    share = accuracy(model, data.test)
    if share < recipe.accuracy:
        raise NotAccurateError(
            f"the network recognises {share:.2%} of the test digits, fewer than "
            f"{recipe.accuracy:.2%}: try another seed."
        )
    if not loaded:
        _write(file, origin, model)
    return Trained(model, share, _digest(model.state_dict()), loaded)


def train(
    part: Part, recipe: Recipe, seed: int, tell: Callable[[int], None] = lambda done: None
) -> MLP:
    """Train by Adam, the learning rate falling to zero; the same way every time."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), one_thread():
        torch.manual_seed(seed)
        model = MLP(part.x.shape[1], recipe.hidden)
        steps = recipe.epochs * -(-len(part) // recipe.batch)
        optimiser = torch.optim.Adam(model.parameters(), lr=recipe.rate)
        falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
        with torch.enable_grad():
            for _ in range(recipe.epochs):
                for batch in torch.split(torch.randperm(len(part)), recipe.batch):
                    optimiser.zero_grad()
                    loss = F.cross_entropy(model(part.x[batch]), part.y[batch])
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    falling.step()
                tell(1)
    return model


def accuracy(model: nn.Module, part: Part) -> float:
    """The share of the pictures that the network recognises."""
    with torch.no_grad():
        return float((model(part.x).argmax(1) == part.y).double().mean())


def _origin(data: Data, recipe: Recipe, seed: int) -> dict[str, str]:
    """What the weights are made from, as a file of them says it."""
    return {
        "format": _FORMAT,
        "data": data.name,
        "pictures": _digest({"x": data.train.x, "y": data.train.y}),
        "recipe": str(recipe),
        "seed": str(seed),
    }


def _read(file: Path, origin: dict[str, str], model: MLP) -> MLP | None:
    """The model with the weights of a file; `None` if there are none of this origin in it."""
    import safetensors

    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            if opened.metadata() != origin:
                return None
            model.load_state_dict({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    except (safetensors.SafetensorError, RuntimeError):
        return None  # damaged: trained anew, and replaced
    return model


def _write(file: Path, origin: dict[str, str], model: MLP) -> None:
    """Beside it first, so that an interruption leaves no half of a file."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(model.state_dict(), beside, metadata=origin)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
