"""Attention weights between no preference and their own (`rules.FromUniform`), by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm import composites, rules
from nrm.errors import QueryError

TRACR = Path(__file__).parents[2] / "shared" / "data" / "tracr"

pytestmark = pytest.mark.usefixtures("captured_once")


class Head(nn.Module):
    """One head of attention, causal, whose scores may be made as large as one likes."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.sharpness * (q @ k.mT)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).sum(1)


def given(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return tuple(torch.randn(1, 4, 3).double() for _ in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 40.0])
def test_shares_are_those_by_hand(share: float, sharpness: float) -> None:
    q, k, v = given()
    R = nrm.Explainer(Head(sharpness).eval(), composites.Circuits(share))(q, k, v, target=1)
    q, k, v = q[0], k[0], v[0]
    seen = torch.ones(4, 4).double().tril()
    s = sharpness * (q @ k.mT) * seen
    P = s.masked_fill(seen == 0, -torch.inf).softmax(-1)
    P0 = seen / seen.sum(-1, keepdim=True)
    g = torch.zeros(4, 3).double()
    g[:, 1] = 1
    by_value = (P0 + (1 - share) * (P - P0)).mT @ g * v
    on_weights = share * (g @ v.mT)
    # The logarithmic mean of both weights; that of two equal ones is either.
    logs = torch.where(seen == 1, s - s.masked_fill(seen == 0, -torch.inf).logsumexp(-1, True), 0.0)
    logs = logs - torch.where(seen == 1, -seen.sum(-1, keepdim=True).log(), 0.0)
    means = torch.where(logs.abs() > 1e-12, (P - P0) / logs, P)
    on_scores = means * (on_weights - (means * on_weights).sum(-1, True) / means.sum(-1, True))
    passed = on_scores[:, :, None] * sharpness * q[:, None] * k[None] / 2  # each factor takes half
    total = (P @ v)[:, 1].sum()
    assert torch.isclose(by_value.sum() + 2 * passed.sum(), total)
    assert torch.allclose(R.heatmap(at="v")[0], by_value / total, atol=1e-12)
    assert torch.allclose(R.heatmap(at="q")[0], passed.sum(1) / total, atol=1e-12)
    assert torch.allclose(R.heatmap(at="k")[0], passed.sum(0) / total, atol=1e-12)


def encoder() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(body, nn.Flatten(), nn.Linear(32, 3)).double().eval(), torch.randn(
        2, 4, 8
    ).double()


def test_every_cut_adds_up_to_one_and_no_share_is_that_of_cp_lrp() -> None:
    model, x = encoder()
    explained = {
        share: nrm.Explainer(model, composites.Circuits(share))(x, target=1)
        for share in (0.0, 0.1, 0.5)
    }
    for R in explained.values():
        assert R.diagnostics().worst_cut_deviation <= 1e-10
    default = nrm.Explainer(model, composites.CPLRP())(x, target=1)
    assert torch.allclose(explained[0.0].heatmap(), default.heatmap(), atol=1e-10)
    # What weights take is linear in the share.
    some, more = (explained[share].marginal("0.layers.1.self_attn:softmax") for share in (0.1, 0.5))
    assert bool(some.any())
    assert torch.allclose(5 * some, more, atol=1e-10)


def test_saturated_weights_have_a_share_where_derivatives_give_none() -> None:
    q, k, v = given(2)
    sharp = Head(200.0).eval()
    taken = {
        str(composite): sum(
            float(nrm.Explainer(sharp, composite)(q, k, v, target=0).heatmap(at=name).abs().sum())
            for name in ("q", "k")
        )
        for composite in (composites.Circuits(), composites.AttnLRP())
    }
    assert taken["AttnLRP()"] < 1e-6
    assert taken["Circuits()"] > 1e-2


def test_other_uses_of_the_rule_are_refused_by_name() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.softmax(-1) + x.flip(-1).softmax(-1)).square()

    x = torch.randn(1, 3)
    with pytest.raises(QueryError, match=r"FromUniform.*':add'.*no product with values"):
        nrm.Explainer(Mixing().eval(), composites.Circuits())(x, target=0)
    last = nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)).eval()
    with pytest.raises(QueryError, match="the explained output itself"):
        nrm.Explainer(last, composites.Circuits(), head="keep")(x, target=0)
    with pytest.raises(QueryError, match=r"'0' \(linear\) the FromUniform"):
        nrm.Explainer(last, rules.FromUniform())(x, target=0)
    with pytest.raises(ValueError, match="share"):
        rules.FromUniform(1.5)


class Sort(nn.Module):
    """The program `sort`, compiled into a transformer of three layers, by tracr."""

    def __init__(self) -> None:
        super().__init__()
        from safetensors.torch import load_file

        self.told = json.loads((TRACR / "sort.json").read_text())
        w = load_file(TRACR / "sort.safetensors")
        self.words = nn.Embedding.from_pretrained(w["token_embed.embeddings"])
        self.places = nn.Embedding.from_pretrained(w["pos_embed.embeddings"])
        self.layers = nn.ModuleDict()
        for name in [name.removesuffix(".w") for name in w if name.endswith(".w")]:
            linear = nn.Linear(*w[name + ".w"].shape)
            linear.weight = nn.Parameter(w[name + ".w"].mT.contiguous())
            linear.bias = nn.Parameter(w[name + ".b"])
            self.layers[name.removeprefix("layers.").replace(".", "_")] = linear

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for i in range(3):
            q, k, v = (self.layers[f"{i}_attn_{part}"](x) for part in ("query", "key", "value"))
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            x = x + self.layers[f"{i}_attn_linear"](weights @ v)
            hidden = torch.relu(self.layers[f"{i}_mlp_linear_1"](x))
            x = x + self.layers[f"{i}_mlp_linear_2"](hidden)
        return x


@pytest.mark.skipif(not TRACR.exists(), reason="needs the tracr programs in ../shared/data")
def test_a_compiled_program_shows_its_edge_through_queries_and_keys() -> None:
    pytest.importorskip("safetensors")
    model = Sort().double().eval()
    example, known = model.told["examples"][0], model.told["token_ids"]
    ids = torch.tensor([[known[token] for token in example["tokens"]]])
    place = model.told["residual_labels"].index(f"sort_12:{int(example['output'][3])}")
    shares = {}
    for composite in (composites.CPLRP(), composites.AttnLRP(), composites.Circuits(0.5)):
        R = nrm.Explainer(model, composite)(ids, target=(3, place))
        width = range(len(model.told["residual_labels"]))
        sender = nrm.channels("layers.1_mlp_linear_2", *width)
        receiver = nrm.channels("layers.2_attn_linear", *width)
        through = R(sender, receiver) - R(sender, nrm.channels("layers.2_attn_value", *width[:17]))
        shares[str(composite)] = abs(float(through))
    assert shares["CPLRP()"] < 1e-12
    assert shares["AttnLRP()"] < 1e-3
    assert shares["Circuits(0.5)"] > 0.1
