"""The network and its pictures: a pretrained one and photographs, or a small one and digits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from nrm.errors import InputError
from nrm.experiments import digit_net
from nrm.experiments.cnn.data import PICTURES, Photo, choose, labels, network, read
from nrm.experiments.mlp.data import DIGITS
from nrm.experiments.request import Request

Kind = Literal["SqueezeNet", "VGG16", "DigitNet"]
VGG16 = "torchvision.models:vgg16"


@dataclass(frozen=True, eq=False)
class Subject:
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


def load(request: Request, count: int) -> Subject:
    """The network of a request, with some pictures.

    Raises:
        InputError: there are none, or the weights do not fit.
    """
    if request.data == DIGITS:
        if request.weights is not None:
            raise InputError(
                f"--weights are those of VGG16, which explains photographs: --data {DIGITS} trains "
                "a small network itself."
            )
        return _digits(count, request.seed)
    folder = Path(request.data)
    files = choose(folder / PICTURES, count, request.seed)
    kind: Kind = "SqueezeNet" if request.weights is None else "VGG16"
    return Subject(
        kind,
        "SqueezeNet 1.0, pretrained on ImageNet"
        if request.weights is None
        else f"VGG16, with the weights of {request.weights.name}",
        "photographs",
        network(folder) if request.weights is None else _vgg16(request.weights),
        [read(file) for file in files],
        labels(folder),
    )


def _vgg16(weights: Path) -> nn.Module:
    """Torchvision's, with a file of weights."""
    from nrm.cli.models import load_model

    return load_model(VGG16, weights, torch.device("cpu"))


def _digits(count: int, seed: int) -> Subject:
    """Digits that the network has not seen."""
    trained = digit_net.train(seed=seed)
    places = list(range(len(trained.x)))
    random.Random(seed).shuffle(places)
    photos = [
        Photo(f"digit {place}", trained.x[place : place + 1], trained.x[place, 0].numpy())
        for place in sorted(places[:count])
    ]
    return Subject(
        "DigitNet",
        f"three convolutions, trained on {trained.seen} of scikit-learn's digits; "
        f"{trained.accuracy:.2%} of the others right",
        "digits of scikit-learn that the network has not seen",
        trained.model,
        photos,
        [str(digit) for digit in range(10)],
    )
