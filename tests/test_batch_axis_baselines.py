"""A baseline of one sample, wherever the batch lies (`rules.PathIntegrated`)."""

import torch
from torch import Tensor, nn

import nrm
from nrm import composites


class Steps(nn.Module):
    """`[steps, batch, features]`, each step with a weight of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return (torch.arange(1.0, 4.0).view(3, 1, 1).to(x) * torch.tanh(x)).sum(0)


def test_one_sample_is_the_baseline_of_all_where_the_batch_is_the_second_axis() -> None:
    """As many steps as samples: shapes alone do not tell one from the other."""
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
