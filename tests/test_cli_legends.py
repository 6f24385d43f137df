"""What red and blue mean in pictures of the command line, where biases turn signs round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm.cli import report
from nrm.targets import Average, Contrast


class Map(nn.Module):
    """Classes by a convolution: all that it reads lowers the second, which a bias makes large."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classes, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), last
        with torch.no_grad():
            self.classes.weight[0].abs_()
            self.classes.weight[1].abs_().neg_()
            self.classes.bias.copy_(torch.tensor([0.0, 5.0]))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.classes(torch.relu(self.body(x))))
        return found


POOLED = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
LARGER = nn.Upsample(scale_factor=2, mode="bilinear")
X = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("last", "targets"),
    [
        (nn.Identity(), ((0, 1, 1), (1, 1, 1), Average(1), Contrast((1, 0, 0), (0, 0, 0)))),
        (LARGER, ((1, 5, 5), Average(0), Average(1))),
        (POOLED, (0, 1, Contrast(1, 0), Contrast(0, 1))),
    ],
)
def test_red_says_which_way_maps_and_their_means_are_moved(
    last: nn.Module, targets: tuple[Any, ...]
) -> None:
    model = Map(last).eval()
    for bias in ("drop", "input"):
        explainer = nrm.Explainer(model, nrm.composites.LRPZero(), bias=bias)  # type: ignore[arg-type]
        for target in targets:
            R = explainer(X, target=target)
            entry = {"explained": "output", "probability_from": None, "logit": float(R.scale[0])}
            blue, red = report._ends(R, entry)
            shares = R.channels("body")[0]
            channel = int(shares.abs().argmax())
            lost = R.scale[0] - _without(model, channel, target)
            said = {"raises the value": 1, "for": 1, "lowers the value": -1, "against": -1}
            moves = float(lost.sign() * shares[channel].sign())
            assert said[red] == -said[blue] == moves, (bias, target)


def _without(model: Map, channel: int, target: Any) -> Tensor:
    """What is explained without a channel of the body."""
    with torch.no_grad():
        body = model.body(X).relu()
        body[:, channel] = 0
        output = model.last(model.classes(body))
    if isinstance(target, Average | Contrast):
        return (target.weights(output) * output).sum()
    found: Tensor = output[(0, *target)] if isinstance(target, tuple) else output[0, target]
    return found
