"""Walks through blocks: who is credited with what is gated."""

from __future__ import annotations

import pytest
import torch
from support.blocks import CASES, Pictures, case, drawn, pictures, seeded
from torch import Tensor, nn

import nrm
from nrm.errors import QueryError

pytestmark = pytest.mark.usefixtures("captured_once")


class Upper(nn.Module):
    """`Pictures` above its layer `two`, beside what bypasses it."""

    def __init__(self, whole: Pictures) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, two: Tensor, h: Tensor) -> Tensor:
        h = torch.cat([h[:, :2] * torch.sigmoid(h[:, 2:]), two[:, :2]], 1)
        return self.whole.head(nn.functional.adaptive_avg_pool2d(h, 1).flatten(1))


def test_what_a_set_gates_is_credited_to_it() -> None:
    """The worth of each part above, with a set and without, by a reference at that layer."""
    model = seeded(Pictures)
    x = drawn(2, 2, 6, 6)
    R = nrm.Explainer(model)(x, target=1)
    blocks = nrm.Blocks(R, "bn")
    upper = nrm.Explainer(Upper(model).eval())

    def worth(inner: Tensor) -> Tensor:
        h = nn.functional.max_pool2d(torch.relu(model.stem(x)) + torch.relu(inner), 2).detach()
        two = model.two(h).detach()
        reference = {"two": torch.zeros_like(two)}
        measure = upper(two, h, target=1, reference=reference)
        return measure.channels("two") * measure.scale[:, None]

    inner = model.bn(model.one(torch.relu(model.stem(x)))).detach()
    whole = worth(inner)
    found = blocks.joint("two", gating=1.0)
    for channel in range(4):
        removed = inner.clone()
        removed[:, channel] = 0
        expected = (whole - worth(removed)) / R.scale[:, None]
        torch.testing.assert_close(found[:, channel], expected, rtol=1e-9, atol=1e-12)
    assert float(found.abs().max()) > 1e-3
    slopes = blocks.joint("two")
    torch.testing.assert_close(blocks.joint("two", gating=0.25), 0.75 * slopes + 0.25 * found)
    few = nrm.Blocks(R, "bn", memory=1)
    torch.testing.assert_close(few.joint("two", gating=1.0), found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("removal", ["zero", "mean"])
def test_both_readings_divide_the_same(name: str, removal: str) -> None:
    """Over a cut they sum to what the network loses."""
    _, _, R, _ = case(name)
    _, _, layer, by = CASES[name]
    blocks = nrm.Blocks(R, layer, by=by, removal=removal)
    above = blocks.graph.cuts[1]
    assert above is not blocks.graph.variable(layer)
    gated = blocks.joint(above.name, gating=1.0)
    torch.testing.assert_close(gated.sum(-1), blocks.each(), rtol=1e-9, atol=1e-10)


def test_gating_agrees_with_slopes_where_nothing_bends_above() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    blocks = nrm.Blocks(nrm.Explainer(model)(drawn(2, 4), target=0), "input", by="neuron")
    slopes = blocks.joint("1", by="neuron")
    torch.testing.assert_close(blocks.joint("1", by="neuron", gating=1.0), slopes)
    sets = [nrm.neurons("1", 0, 3), nrm.neurons("1", 5)]
    both = torch.stack([slopes[..., [0, 3]].sum(-1), slopes[..., 5]], -1)
    torch.testing.assert_close(blocks.joint(sets, gating=0.5), both)


def test_gating_is_of_two_layers() -> None:
    _, blocks = pictures()
    with pytest.raises(QueryError, match="two layers alone"):
        blocks.joint("bn", "two", gating=0.5)
    with pytest.raises(QueryError, match="two layers alone"):
        blocks.joint("bn", nrm.channels("two", 0), gating=0.5)
    with pytest.raises(QueryError, match="from 0 to 1"):
        blocks.joint("bn", gating=2)
    with pytest.raises(QueryError, match="all that there is"):
        blocks.joint("head", gating=1.0)
    with pytest.raises(QueryError, match="lies below 'stem'"):
        blocks.joint("input", gating=1.0)
    with pytest.raises(QueryError, match="name a layer above it"):
        blocks.joint("stem", gating=1.0)
