"""Causal attention in what only an eager trace captures: as if it were exported."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nrm


class Causal(nn.Module):
    """Attention that looks back, and Python code that may look at values."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches, self.qkv, self.head = branches, nn.Linear(6, 18), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.sum() > 1e9:
            return self.head(x[:, 0])
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 1])


@pytest.mark.parametrize("composite", [nrm.composites.CPLRP(), nrm.composites.AttnLRP()])
def test_causal_attention_is_captured_by_an_eager_trace(composite) -> None:
    torch.manual_seed(0)
    exported, traced = Causal(branches=False).double().eval(), Causal(branches=True)
    traced.double().eval().load_state_dict(exported.state_dict())
    x = torch.randn(1, 4, 6).double()
    expected = nrm.Explainer(exported, composite)(x, target=1)
    found = nrm.Explainer(traced, composite)(x, target=1)
    methods = [R.graph.captured.method for R in (expected, found)]
    assert methods == ["export", "eager"]
    torch.testing.assert_close(found.heatmap(), expected.heatmap(), atol=1e-12, rtol=0)
    assert found.heatmap()[:, 2:].count_nonzero() == 0  # nobody looks ahead
    assert found.heatmap()[:, :2].count_nonzero() == 12
