"""A small network of pictures that the explorer's tests look at."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import nrm
from nrm.explore.opened import Input, Opened
from nrm.io import imagenet, read_sent

SIDE = 32
NAMES = ["cat", "<b>dog</b>", "owl", "fish"]
"""One of them would be markup, if anything took it for such."""


class Net(nn.Module):
    """Two convolutions and a linear layer, on pictures in colour."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.a = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.pool = nn.MaxPool2d(4)
        self.conv2, self.b = nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(8 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.conv2(self.pool(self.a(self.conv1(x))))).flatten(1))


def photograph(seed: int) -> Image.Image:
    """Blobs of colour."""
    values = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    large = nn.functional.interpolate(values, (48, 48), mode="bilinear")[0]
    return Image.fromarray((large.permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def as_input(image: Image.Image, name: str) -> Input:
    picture = imagenet(image, SIDE)
    return Input(name, (picture.x,), "", pixels=picture.shown)


def make_opened() -> Opened:
    """The network, three pictures, and others that may be sent."""
    torch.manual_seed(0)
    model = Net().eval()
    inputs = [as_input(photograph(k), f"picture {k}") for k in range(3)]
    explainer = nrm.Explainer(model)
    explainer(*inputs[0].args)  # captured before anybody waits for it
    read = lambda data, name: as_input(read_sent(data), name)  # noqa: E731
    return Opened("Net", "picture", explainer, inputs, "", NAMES, read)
