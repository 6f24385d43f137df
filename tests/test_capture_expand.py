"""What is written out is traced once where it looks the same, and layers say their shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import nrm
from nrm.capture import expand
from nrm.capture.shapes import shapes_at_once


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functions that were traced."""
    found: list[Any] = []
    itself = expand.make_fx

    def counted(function: Any, **options: Any) -> Any:
        found.append(function)
        return itself(function, **options)

    monkeypatch.setattr(expand, "make_fx", counted)
    return found


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Attending(nn.Module):
    """Attention over tensors of one shape, in several ways."""

    def forward(self, x: Tensor) -> Tensor:
        y, z = x.tanh(), x.sigmoid()
        same = scaled_dot_product_attention(x, x, x)
        mixed = scaled_dot_product_attention(x, y, x)
        apart = scaled_dot_product_attention(same, mixed, z)
        again = scaled_dot_product_attention(mixed, same, y)
        causal = scaled_dot_product_attention(x, y, z, is_causal=True)
        scaled = scaled_dot_product_attention(x, y, z, scale=2.0)
        return (apart + again * causal + scaled).sum((1, 2))


def test_attention_of_one_kind_is_traced_once(traces):
    model, x = Attending().eval(), drawn(2, 3, 4, 5)
    R = nrm.Explainer(model)(x, target=1)
    assert R.graph.captured.method == "export"
    assert len(traces) == 5  # `apart` and `again` are one
    torch.testing.assert_close(R.output, model(x))
    alone = nrm.Explainer(model)(x[:1], target=1)
    torch.testing.assert_close(R.heatmap()[:1], alone.heatmap())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_steps_are_traced_once(traces, kind):
    torch.manual_seed(0)
    model = kind(3, 4, 2, batch_first=True, bidirectional=True).double().eval()
    counts = []
    for steps in (3, 9):
        traces.clear()
        x = drawn(2, steps, 3)
        R = nrm.Explainer(model, output=0)(x, target=(-1, 2))
        torch.testing.assert_close(R.output, model(x)[0].detach())
        counts.append(len(traces))
    assert counts[0] == counts[1]


LAYERS = {
    "lstm": (lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), (5, 2, 3)),
    "gru": (lambda: nn.GRU(3, 4, batch_first=True), (2, 5, 3)),
    "rnn": (lambda: nn.RNN(3, 4, 2, nonlinearity="relu"), (5, 2, 3)),
    "one sequence": (lambda: nn.LSTM(3, 4), (5, 3)),
    "linear": (lambda: nn.Linear(3, 4), (5, 2, 3)),
    "one sample": (lambda: nn.Linear(3, 4, bias=False), (3,)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", LAYERS)
def test_shapes_are_those_of_values(name):
    make, shape = LAYERS[name]
    layer = make()
    expected = torch.utils._pytree.tree_leaves(layer(torch.zeros(shape)))
    operator = torch.ops.aten.linear.default
    before = dict(operator.py_kernels)
    with shapes_at_once(), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        found = torch.utils._pytree.tree_leaves(layer(mode.from_tensor(torch.zeros(shape))))
    assert [(x.shape, x.dtype, x.stride()) for x in found] == [
        (x.shape, x.dtype, x.stride()) for x in expected
    ]
    assert operator.py_kernels == before
