"""A small convolutional network trained on scikit-learn's digits, to be explained anywhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nrm.errors import InputError
from nrm.tensors import one_thread

EPOCHS = 20
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


def train(epochs: int = EPOCHS, seed: int = 0) -> Trained:
    """Train on the spot, the same way every time."""
    x, y = _digits()
    begin = time.perf_counter()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), one_thread():
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        seen, held_out = order[:_TRAINING], order[_TRAINING:]
        model = DigitNet()
        optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for batch in torch.split(seen[torch.randperm(len(seen))], 64):
                optimiser.zero_grad()
                loss = F.cross_entropy(model(x[batch]), y[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    seconds = time.perf_counter() - begin
    model.eval().requires_grad_(False)
    right = model(x[held_out]).argmax(1) == y[held_out]
    accuracy = float(right.float().mean())
    return Trained(model, x[held_out], y[held_out], accuracy, len(seen), seconds)


def _digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 8 x 8 digits, enlarged and with a margin."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise InputError(
            f"scikit-learn's digits need {error.name}, which is not installed: "
            "pip install 'nrm[demo]'"
        ) from error
    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 16
    x = F.interpolate(x, (_SIDE, _SIDE), mode="bilinear", align_corners=False)
    x = F.pad(x, [_MARGIN] * 4)
    return x, torch.from_numpy(digits.target).long()
