"""What is given for samples that do not lie along the first axis: baselines, masks, weights.

With as many steps as samples, shapes alone do not tell one from the other.
"""

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm import composites
from nrm.errors import NeuronSetError


class Steps(nn.Module):
    """`[steps, batch, features]`, each step with a weight of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return (torch.arange(1.0, 4.0).view(3, 1, 1).to(x) * torch.tanh(x)).sum(0)


def test_one_sample_is_the_baseline_of_all_where_the_batch_is_the_second_axis() -> None:
    torch.manual_seed(0)
    x, one = torch.randn(3, 3, 2).double(), torch.randn(3, 2).double()
    model = Steps().eval()

    def heatmap(baseline: Tensor | dict[str, Tensor]) -> Tensor:
        composite = composites.IntegratedGradients(baseline)
        return nrm.Explainer(model, composite, batch_axis=1)(x, target=1).heatmap()

    rises = torch.arange(1.0, 4.0).double().view(3, 1) * (x.tanh() - one.tanh()[:, None])[..., 1]
    torch.testing.assert_close(heatmap(one)[..., 1], rises / rises.sum(0))
    assert heatmap(one)[..., 0].abs().max() == 0
    torch.testing.assert_close(heatmap({"x": one}), heatmap(one[:, None].expand(3, 3, 2)))


class Layers(nn.Module):
    """`[steps, batch, features]` with a layer to choose neurons of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(torch.relu(self.a(x)).cumsum(0)).sum(0)
        return found


@pytest.mark.parametrize("steps", [3, 4])
def test_masks_and_weights_of_samples_in_front_or_as_the_layer_has_them(steps: int) -> None:
    explainer = nrm.Explainer(Layers().double().eval(), batch_axis=1)
    x = torch.randn(steps, 3, 2).double()
    R = explainer(x, target=[0, 1, 0])
    weights = torch.rand(steps, 3, 3).double()
    chosen = weights < 0.5

    def asked(where: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        return R(nrm.mask("a", where)), R.weighted({"a": of})

    each = [explainer(x[:, k : k + 1], target=[k % 2]) for k in range(3)]
    expected = (
        torch.cat([one(nrm.mask("a", chosen[:, k])) for k, one in enumerate(each)]),
        torch.cat([one.weighted({"a": weights[:, k]}) for k, one in enumerate(each)]),
    )
    if steps != 3:
        torch.testing.assert_close(asked(chosen, weights), expected)
        in_front = asked(chosen.movedim(1, 0), weights.movedim(1, 0))
        torch.testing.assert_close(in_front, expected)
        return
    for refused in (
        lambda: R(nrm.mask("a", chosen)),
        lambda: R.heatmap(~nrm.mask("a", chosen.movedim(1, 0))),
        lambda: R.weighted({"a": weights}),
    ):
        with pytest.raises(NeuronSetError, match="may lie there or in front"):
            refused()
    torch.testing.assert_close(R(nrm.mask("a", chosen, in_front=False)), expected[0])
    front = chosen.movedim(1, 0)
    torch.testing.assert_close(R(nrm.mask("a", front, in_front=True)), expected[0])
    everything = torch.ones(3, 3, 3, dtype=torch.bool)  # alike either way
    torch.testing.assert_close(R(nrm.mask("a", everything)), torch.ones(3).double())
    found = nrm.clusters(R, "a", 2)  # whose masks say where their samples lie
    torch.testing.assert_close(sum(R(one) for one in found), torch.ones(3).double())
    for k, one in enumerate(each):
        lies = (found.labels[k] == 0).unsqueeze(-1).expand(3, 3)
        torch.testing.assert_close(R(found[0])[k : k + 1], one(nrm.mask("a", lies)))
