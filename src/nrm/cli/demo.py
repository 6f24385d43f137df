"""The demo: a small convolutional network, trained on scikit-learn's digits and explained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nrm.cli.commands import EPOCHS
from nrm.cli.report import Subject, Target, versions, weights_used
from nrm.errors import InputError
from nrm.io import Picture, shown
from nrm.tensors import one_thread

DIGITS = (3, 6)
"""Those that are explained."""
LAYERS = ["conv2", "conv3"]
_SIDE, _MARGIN = 16, 2
_TRAINING = 1400


@dataclass(frozen=True)
class Trained:
    """A trained network and the digits that it has not seen.

    Attributes:
        x, y: pictures `[N, 1, 20, 20]` and their classes.
        accuracy: on these.
        seen: how many digits it was trained on.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    accuracy: float
    seen: int
    seconds: float


class DigitNet(nn.Module):
    """Three convolutions with pooling between, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1)
        self.conv3 = nn.Conv2d(24, 32, 3, padding=1)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(32 * 5 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 10]`."""
        x = F.max_pool2d(self.relu1(self.conv1(x)), 2)
        x = F.max_pool2d(self.relu2(self.conv2(x)), 2)
        x = self.relu3(self.conv3(x))
        logits: Tensor = self.head(x.flatten(1))
        return logits


def trained(epochs: int = EPOCHS, seed: int = 0) -> Trained:
    """Train on the spot, the same way every time."""
    images, y = digits()
    x = F.interpolate(images[:, None], (_SIDE, _SIDE), mode="bilinear", align_corners=False)
    x = F.pad(x, [_MARGIN] * 4)
    begin = time.perf_counter()
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        seen, held_out = order[:_TRAINING], order[_TRAINING:]
        model = DigitNet()
        fit(model, shuffled(x[seen], y[seen], 64, epochs), 2e-3)
    seconds = time.perf_counter() - begin
    model.eval().requires_grad_(False)
    x, y = x[held_out], y[held_out]
    right = float((model(x).argmax(1) == y).float().mean())
    return Trained(model, x, y, right, len(seen), seconds)


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits `[1797, 8, 8]` from 0 to 1, and their classes.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise InputError(
            f"scikit-learn's digits need {error.name}, which is not installed: "
            "pip install 'nrm[demo]'"
        ) from error
    found = load_digits()
    return torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target).long()


def shuffled(
    x: Tensor,
    y: Tensor,
    size: int,
    epochs: int,
    advance: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of some samples and their classes, in another order in every epoch.

    Arguments:
        advance: called with 1 after every epoch.
    """
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(x)), size):
            yield x[batch], y[batch]
        advance(1)


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    rate: float,
    *,
    falling: int | None = None,
    clip: float | None = None,
) -> None:
    """Train a classifier by Adam on the cross-entropy of its logits, batch by batch.

    Arguments:
        batches: inputs and classes.
        rate: of learning.
        falling: over so many batches the rate falls to zero.
        clip: the longest gradient, over all parameters.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = None
    if falling is not None:
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, falling)
    with torch.inference_mode(False), torch.enable_grad():
        for x, y in batches:
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimiser.step()
            if schedule is not None:
                schedule.step()


def example(network: Trained, digit: int) -> tuple[Picture, Subject]:
    """The held-out picture of a digit that the network is surest of."""
    own = (network.y == digit).nonzero().flatten()
    best = int(own[network.model(network.x[own]).softmax(1)[:, digit].argmax()])
    x = network.x[best]
    weights = weights_used(network.model, None) | {"source": "trained by the demo"}
    made_from = {"weights": weights, "versions": versions()}
    named = f"digit {best} of the held-out ones"
    labels = [str(k) for k in range(10)]
    subject = Subject(named, "DigitNet", [Target(digit, labels[digit])], labels, made_from)
    return Picture(x[None], shown(x)), subject
