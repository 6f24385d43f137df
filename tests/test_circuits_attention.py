"""What heads read, told apart: queries, keys and values, whatever the spelling of attention."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm.errors import QueryError

pytestmark = pytest.mark.usefixtures("captured_once")

READ = ("queries", "keys", "values")
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 1, 2]])
TOKENS, HEADS, GROUPS, SIZE = 4, 4, 2, 3


class Spelled(nn.Module):
    """Two layers of four heads, of which pairs read the same keys and values, spelled anyhow."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling, width = spelling, HEADS * SIZE
        self.embed = nn.Embedding(7, width)
        self.q, self.o = (
            nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(2)
        )
        self.k, self.v = (
            nn.ModuleList(nn.Linear(width, GROUPS * SIZE) for _ in range(2)) for _ in range(2)
        )
        self.up, self.down, self.head = (
            nn.Linear(width, 8),
            nn.Linear(8, width),
            nn.Linear(width, 3),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in range(2):
            q, k, v = (
                each[layer](x).unflatten(-1, (-1, SIZE)) for each in (self.q, self.k, self.v)
            )
            x = x + self.o[layer](self.attend(q, k, v).flatten(2))
            if layer == 0:
                x = x + self.down(torch.relu(self.up(x)))
        logits: Tensor = self.head(x)[:, -1]
        return logits

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[batch, tokens, heads, features]`."""
        each, scale = HEADS // GROUPS, 1 / math.sqrt(SIZE)
        if self.spelling == "einsum":
            k, v = (t.repeat_interleave(each, 2) for t in (k, v))
            pattern = torch.einsum("bqhd,bkhd->bhqk", q * scale, k).softmax(-1)
            return torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.spelling == "fused":
            found = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=False, enable_gqa=True
            )
        elif self.spelling == "broadcast":
            q = q.unflatten(1, (GROUPS, each))
            pattern = (q @ k.unsqueeze(2).transpose(-1, -2) * scale).softmax(-1)
            found = (pattern @ v.unsqueeze(2)).flatten(1, 2)
        elif self.spelling == "turned":  # keys times queries, the softmax along the first of them
            k, v = (t.repeat_interleave(each, 1) for t in (k, v))
            pattern = (k @ q.transpose(-1, -2) * scale).softmax(-2)
            found = pattern.transpose(-1, -2) @ v
        else:  # heads merged with the batch
            k, v = (t.repeat_interleave(each, 1) for t in (k, v))
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            found = torch.bmm(torch.bmm(q * scale, k.transpose(1, 2)).softmax(-1), v)
            found = found.unflatten(0, (-1, HEADS))
        return found.transpose(1, 2)


def measured(spelling: str) -> nrm.Measure:
    torch.manual_seed(0)
    model = Spelled(spelling).double().eval()
    return nrm.Explainer(model, nrm.composites.Circuits())(IDS, target=1)


def by_hand() -> dict[str, nrm.NeuronSet]:
    """The same sets, of what projections give."""
    found = {}
    for layer in range(2):
        for role, count, name in (("q", HEADS, "h"), ("k", GROUPS, "kv"), ("v", GROUPS, "kv")):
            for part in range(count):
                features = slice(part * SIZE, (part + 1) * SIZE)
                found[f"a{layer}.{name}{part}.{role}"] = nrm.neurons(
                    f"{role}.{layer}", (slice(None), features)
                )
    return found


@pytest.fixture(scope="module")
def plain() -> nrm.Measure:
    return measured("fused")


@pytest.mark.parametrize("spelling", ["fused", "einsum", "broadcast", "turned", "merged"])
def test_they_are_what_projections_give(spelling: str, plain: nrm.Measure) -> None:
    R = measured(spelling)
    found, expected = nrm.components(R, READ), by_hand()
    assert set(found) == set(expected)
    for name, chosen in found.items():
        (layer,) = chosen.layers
        (known,) = expected[name].layers
        assert R.graph.variable(layer) is R.graph.variable(known)
        torch.testing.assert_close(R(chosen), R(expected[name]), rtol=0, atol=1e-12)
        torch.testing.assert_close(R(chosen), plain(expected[name]), rtol=0, atol=1e-9)
        assert R(chosen).abs().min() > 1e-6
    apart = nrm.components(R, READ, tokens=True)
    assert len(apart) == TOKENS * len(found)
    parts = sum(R(apart[f"a1.kv1.k@{place}"]) for place in range(TOKENS))
    torch.testing.assert_close(parts, R(found["a1.kv1.k"]), rtol=0, atol=1e-12)


def test_edges_by_what_is_read(plain: nrm.Measure) -> None:
    """Against formulas: visits both, and nothing that is named and lies between."""
    R = plain
    kinds = ("heads", "mlps", "embeddings", "patterns", *READ)
    parts = nrm.components(R, kinds)
    edges = R.edges(parts)
    torch.testing.assert_close(edges.relevance.sum(2), edges.entered)
    for sender in ("a0.h1", "a0.h2", "m0"):
        for receiver in ("a1.h0.q", "a1.h3.q", "a1.kv0.k", "a1.kv1.v"):
            formula = parts[sender] & parts[receiver]
            if sender != "m0":  # which lies between
                formula = formula & ~parts["m0"]
            expected = R(formula)
            torch.testing.assert_close(edges(sender, receiver), expected, rtol=1e-9, atol=1e-12)
            assert expected.abs().min() > 1e-7
    for head in range(HEADS):  # what a head has comes by its values and by its pattern
        group = f"a1.kv{head // 2}"
        of_pattern = edges(f"a1.h{head}.q", f"a1.h{head}.pattern")
        of_pattern = of_pattern + edges(f"{group}.k", f"a1.h{head}.pattern")
        torch.testing.assert_close(of_pattern, R(parts[f"a1.h{head}.pattern"]))
        of_head = edges(f"{group}.v", f"a1.h{head}") + edges(f"a1.h{head}.pattern", f"a1.h{head}")
        torch.testing.assert_close(of_head, R(parts[f"a1.h{head}"]))
        assert not edges(f"a1.kv{1 - head // 2}.k", f"a1.h{head}.pattern").any()
    # edges between others are split by what is read, and no more
    whole = R.edges(nrm.components(R))
    for sender in ("embed", "a0.h1", "m0"):
        into = {name for name in edges.receivers if name.startswith("a1.") and name[-1] in "qkv"}
        split = sum(edges(sender, name) for name in into)
        heads = sum(whole(sender, f"a1.h{head}") for head in range(HEADS))
        torch.testing.assert_close(split, heads)


def test_the_layout_of_evaluation_tools_tells_them_apart(tmp_path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    explainer = nrm.Explainer(model, nrm.composites.Circuits())
    R = explainer(torch.randn(1, 4, 8).double(), target=(0, 0))
    edges = R.edges(nrm.components(R, ("heads", "mlps", "embeddings", *READ)))
    assert {f"a1.h{head}.{letter}" for head in range(2) for letter in "qkv"} < set(edges.receivers)
    edges.circuit(0.8, work=4).save(tmp_path / "eap.json", layout="eap")
    found = json.loads((tmp_path / "eap.json").read_text())["edges"]
    for letter in "qkv":
        score = found[f"m0->a1.h1<{letter}>"]["score"]
        assert score == pytest.approx(float(edges("m0", f"a1.h1.{letter}")))
    assert not any(name.split("->")[0] == name.split("->")[1][:5] for name in found)


def test_what_is_shared_has_no_place_in_that_layout(plain: nrm.Measure, tmp_path) -> None:
    edges = plain.edges(nrm.components(plain, ("embeddings", "keys")))
    with pytest.raises(QueryError, match=r"and not 'a0\.kv0\.k'"):
        edges.circuit(0.5, work=4).save(tmp_path / "eap.json", layout="eap")


def test_what_no_walk_visits_is_refused() -> None:
    torch.manual_seed(0)
    R = nrm.Explainer(Spelled("fused").double().eval())(IDS, target=1)
    with pytest.raises(QueryError, match="no walk visits the keys"):
        nrm.components(R, "keys")
    assert len(nrm.components(R, "values")) == 4


class Scored(nn.Module):
    """Scores that are more than one product."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 3)
        self.q, self.k, self.p, self.v = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q = self.q(x)
        scores = q @ self.k(x).transpose(1, 2) + q @ self.p(x).transpose(1, 2)
        return self.head(x + scores.softmax(-1) @ self.v(x))[:, -1]


def test_scores_of_several_products_are_refused() -> None:
    torch.manual_seed(0)
    R = nrm.Explainer(Scored().double().eval(), nrm.composites.Circuits())(IDS, target=1)
    with pytest.raises(QueryError, match="more than one product"):
        nrm.components(R, "queries")
    assert list(nrm.components(R, ("heads", "values"))) == ["a0.h0.v", "a0.h0"]


class Masked(nn.Module):
    """What positions add to, and a mask that is added to scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(7, 6), nn.Parameter(torch.randn(4, 6))
        self.qkv, self.head = nn.Linear(6, 18), nn.Linear(6, 3)
        self.register_buffer("mask", torch.full((4, 4), -3.0).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) + self.mask
        return self.head(x + scores.softmax(-1) @ v)[:, -1]


def test_masks_are_no_embeddings() -> None:
    torch.manual_seed(0)
    explainer = nrm.Explainer(Masked().double().eval(), nrm.composites.Circuits())
    R = explainer(IDS, target=1)
    assert any("mask" in leaf.name or "add" in leaf.name for leaf in R.graph.leaves)
    names = ["embed", "embed.pos", "a0.h0.q", "a0.h0.k", "a0.h0.v"]
    assert list(nrm.components(R, ("embeddings", *READ))) == names
