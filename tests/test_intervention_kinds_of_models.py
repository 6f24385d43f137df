"""Interventions on models of any kind: other batch axes, types, inputs, and samples that mix."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from support.interventions import expected_joint, explainer_of, made
from torch import Tensor, nn

import nrm
from nrm.errors import QueryError
from nrm.evaluation.intervention import Interventions, joint_contributions


def test_one_sample_that_has_no_batch_axis() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    nodes = torch.randn(5, 3).double()
    interventions = Interventions(nrm.Explainer(model, batch_axis=None), nodes, target=(2, 1))
    sets = [nrm.neurons("1", (i, slice(None))) for i in range(5)]
    lost = interventions.joint(sets)
    assert lost[[0, 1, 3, 4]].abs().max() == 0
    torch.testing.assert_close(lost[2], model(nodes)[2, 1] - model[2].bias[1])


def test_samples_of_a_batch_axis_that_is_not_the_first() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][-1])

    torch.manual_seed(0)
    model = Recurrent().double().eval()
    x = torch.randn(2, 1, 3).double()
    interventions = Interventions(nrm.Explainer(model, batch_axis=1), x, target=1)
    assert interventions.rerun.copies.possible
    families = [
        [{"input": (torch.arange(2) == t).view(2, 1, 1).expand(2, 1, 3)} for t in range(2)],
        [{"input": (torch.arange(3) == c).expand(2, 1, 3)} for c in range(3)],
    ]
    steps = [nrm.neurons("input", (t, slice(None))) for t in range(2)]
    found = joint_contributions(interventions, steps, [nrm.channels("input", c) for c in range(3)])
    wanted = torch.zeros(2, 3).double()
    with torch.no_grad():
        for (t, a), (c, b) in itertools.product(*(enumerate(family) for family in families)):
            without = [model(x.masked_fill(mask, 0))[0, 1] for mask in (a["input"], b["input"])]
            neither = model(x.masked_fill(a["input"] | b["input"], 0))[0, 1]
            wanted[t, c] = model(x)[0, 1] - sum(without) + neither
    torch.testing.assert_close(found, wanted)


def test_samples_that_would_mix_are_run_one_at_a_time() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            return self.head(torch.tanh(h + h.softmax(0)))

    torch.manual_seed(0)
    model = Mixing().double().eval()
    x = torch.randn(1, 3).double()
    interventions = Interventions(nrm.Explainer(model, nrm.composites.AttnLRP()), x, target=0)
    assert interventions.rerun.copies.axis(interventions.graph.captured.output) is None
    found = interventions.without([(nrm.neurons("input", i),) for i in range(3)])
    wanted = [model(x.masked_fill(torch.arange(3) == i, 0))[0, 0] for i in range(3)]
    torch.testing.assert_close(found, torch.stack(wanted).detach())


def test_outputs_that_are_not_finite_are_refused() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log().cumsum(1)

    x, explainer = torch.rand(1, 4) + 1, nrm.Explainer(Log().eval())
    interventions = Interventions(explainer, x, target=2)
    with pytest.raises(QueryError, match="NaN or infinite"):
        interventions.without([[nrm.neurons("input", 1)]])
    interventions = Interventions(explainer, x, target=2, removal="mean")
    assert interventions.without([[nrm.neurons("input", 1)]]).isfinite().all()


def test_single_precision_and_what_is_kept_for_further_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    ).eval()
    explainer = nrm.Explainer(model)
    families = [[nrm.channels("1", c) for c in range(8)], [nrm.channels("3", c) for c in range(6)]]
    for _ in range(2):
        x = torch.randn(1, 1, 8, 8)
        interventions = Interventions(explainer, x, target=1)
        found = joint_contributions(interventions, *families)
        masks = [
            [{"1": channel_mask(8, c, 6)} for c in range(8)],
            [{"3": channel_mask(6, c, 4)} for c in range(6)],
        ]
        wanted = expected_joint(model.double(), [x.double()], 1, masks, {})
        model.float()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def channel_mask(count: int, channel: int, side: int) -> Tensor:
    return (torch.arange(count) == channel).view(-1, 1, 1).expand(count, side, side)


def test_within_inference_mode_and_in_half_precision() -> None:
    model, inputs = made("mlp")
    sets = [nrm.neurons("1", i) for i in range(5)], [nrm.neurons("3", i) for i in range(4)]
    wanted = Interventions(explainer_of(model), *inputs, target=1).joint(*sets)
    with torch.inference_mode():
        explainer = nrm.Explainer(model)
        removal = {"1": torch.zeros(5)}
        interventions = Interventions(explainer, inputs[0].clone(), target=1, removal=removal)
        torch.testing.assert_close(interventions.joint(*sets), wanted)
        assert interventions.without([(sets[0][0],), (sets[1][0],)]).shape == (2,)
    half = nrm.Explainer(copy.deepcopy(model).bfloat16())
    half = Interventions(half, inputs[0].bfloat16(), target=1)
    found = half.joint(*sets)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0.2, atol=0.02)


def test_inputs_by_name_and_an_output_among_several() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
            self.second = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
            self.last = nn.Sequential(nn.Linear(3, 2), nn.Tanh())

        def forward(self, x: Tensor, y: Tensor, scale: float) -> dict[str, Tensor]:
            return {"a": self.last(self.first(x) + self.second(y)) * scale, "b": x}

    torch.manual_seed(0)
    model = Several().double().eval()
    x, y = torch.randn(1, 4).double(), torch.randn(1, 3).double()
    explainer = nrm.Explainer(model, output="a")
    sets = [nrm.neurons("second")], [nrm.neurons("x")]
    named = Interventions(explainer, x, y=y, scale=2.0, target=1)
    placed = Interventions(explainer, x, y, 2.0, target=1)
    found = named.joint(*sets)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, placed.joint(*sets))
    torch.testing.assert_close(named.output, model(x, y, 2.0)["a"][0, 1])


class Scaled(nn.Module):
    """Something that all samples of a batch share, or that runs over them."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(self.between(torch.relu(self.a(x))))))


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h / (h.max() + 1),
        lambda h: h + h.amax(),
        lambda h: h.cummax(0)[0],
        lambda h: h - h.mean(),
        lambda h: h + 1e-3 * h.mean(),
    ],
)
def test_what_samples_share_is_of_each_copy_alone(between: Any) -> None:
    torch.manual_seed(0)
    model, x = Scaled(between).double().eval(), torch.randn(1, 3).double()
    interventions = Interventions(nrm.Explainer(model, nrm.composites.AttnLRP()), x, target=0)
    sets = [[nrm.channels("a", c)] for c in range(4)]
    alone = torch.cat([interventions.without([one]) for one in sets])
    torch.testing.assert_close(interventions.without(sets), alone)
