"""The components of transformers by name, whatever their code."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm.errors import NeuronSetError, QueryError

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def transformers():
    """transformers, of which importing torchvision may need help."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from nrm.torchvision_mismatch import import_torchvision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_torchvision()
        import transformers

        return transformers


def model_of(transformers, name):
    torch.manual_seed(0)
    common = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=8, **common)
        return transformers.GPT2LMHeadModel(config)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 8}
    sizes |= {"intermediate_size": 12, **common}
    if name == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(num_key_value_heads=2, **sizes)
        )
    if name == "neox":  # attention and MLP side by side
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))
    return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)


@pytest.mark.parametrize(
    ("name", "heads", "attention"),
    [  # keys and values of several heads are repeated in another way by either
        ("llama", 4, "sdpa"),
        ("llama", 4, "eager"),
        ("gpt2", 2, "eager"),
        ("neox", 4, "sdpa"),
        ("bert", 4, "eager"),
    ],
)
def test_heads_mlps_and_embeddings_of_language_models(transformers, name, heads, attention):
    model = model_of(transformers, name).double().eval()
    model.set_attn_implementation(attention)
    output = "last_hidden_state" if name == "bert" else "logits"
    R = nrm.Explainer(model, output=output)(torch.tensor([[1, 2, 3]]), target=(-1, 0))
    found = nrm.components(R)
    names = [n for n in found if not n.startswith("embed")]
    layers = [[*(f"a{k}.h{h}" for h in range(heads)), f"m{k}"] for k in range(2)]
    assert sorted(names) == sorted(itertools.chain(*layers))
    assert "embed" in found
    for kind in names:  # heads write the attention's, each its own part
        assert R(found[kind]).isfinite().all()
    parts = sum(R(found[f"a1.h{h}"]) for h in range(heads))
    together = nrm.neurons(*found["a1.h0"].layers)
    torch.testing.assert_close(parts, R(together))
    edges = R.edges(found)
    torch.testing.assert_close(edges.relevance.sum(2), edges.entered)
    for row, receiver in enumerate(edges.receivers[1:], 1):
        torch.testing.assert_close(edges.entered[:, row], R(found[receiver]))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()


def test_an_encoder_of_torch_and_its_tokens(encoder):
    R = nrm.Explainer(encoder)(torch.randn(2, 4, 8).double(), target=(0, 0))
    found = nrm.components(R)
    names = ["embed", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert list(found) == names
    assert "7 components" in str(found)
    assert list(found.only("m1", "a0.h1")) == ["a0.h1", "m1"]
    assert list(found.without("embed")) == names[1:]
    with pytest.raises(QueryError, match=r"no component 'a9\.h0'"):
        found["a9.h0"]
    apart = nrm.components(R, tokens=True)
    assert list(apart)[:5] == ["embed@0", "embed@1", "embed@2", "embed@3", "a0.h0@0"]
    whole, split = R.edges(found), R.edges(found, tokens=True)
    assert split.receivers == R.edges(apart).receivers
    for sender, receiver in (("a0.h1", "m1"), ("embed", "a1.h0"), ("m1", "output")):
        ends = ["output"] if receiver == "output" else [f"{receiver}@{t}" for t in range(4)]
        total = sum(split(f"{sender}@{t}", end) for t in range(4) for end in ends)
        torch.testing.assert_close(total, whole(sender, receiver))
    assert not split("m0@1", "m1@2").any()  # MLPs keep positions apart
    one = R.edges({"m0@2": apart["m0@2"], "a1.h0": found["a1.h0"]})
    torch.testing.assert_close(one.entered[:, 1], R(apart["m0@2"]))


def test_neurons_and_patterns(encoder):
    x = torch.randn(1, 4, 8).double()
    R = nrm.Explainer(encoder)(x, target=(0, 0))
    neurons = nrm.components(R, kinds="neurons")
    assert list(neurons)[:2] == ["m0.n0", "m0.n1"]
    assert len(neurons) == 2 * 16
    whole = nrm.neurons(*neurons["m1.n0"].layers)
    parts = sum(R(neurons[f"m1.n{k}"]) for k in range(16))
    torch.testing.assert_close(parts, R(whole))
    with pytest.raises(QueryError, match="no walk visits the attention patterns"):
        nrm.components(R, kinds="patterns")
    R = nrm.Explainer(encoder, nrm.composites.AttnLRP())(x, target=(0, 0))
    found = nrm.components(R, kinds=("heads", "patterns", "mlps"))
    assert list(found)[:4] == ["a0.h0.pattern", "a0.h1.pattern", "a0.h0", "a0.h1"]
    edges = R.edges(found)
    half = edges("a0.h0.pattern", "a0.h0")  # the pattern takes half of what a head has
    torch.testing.assert_close(half, R(found["a0.h0"]) / 2)
    assert edges("a0.h0.pattern", "a0.h1") == 0
    with pytest.raises(QueryError, match="a kind of component is one of"):
        nrm.components(R, kinds="head")


class ByHand(nn.Module):
    """Attention by einsum, positions in front of heads, parts of it beside each other."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.qkv = nn.Embedding(7, 6), nn.Linear(6, 18)
        self.out, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        z = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v)
        x = x + self.out(z.flatten(2))
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x)


def test_attention_by_einsum():
    torch.manual_seed(0)
    model = ByHand(3).double().eval()
    R = nrm.Explainer(model)(torch.tensor([[1, 2, 3, 4]]), target=(0, 1))
    found = nrm.components(R)
    assert list(found) == ["embed", "a0.h0", "a0.h1", "a0.h2", "m0"]
    assert R.graph.variable(*found["a0.h0"].layers).shape[1:] == (4, 3, 2)
    parts = sum(R(found[f"a0.h{h}"]) for h in range(3))
    torch.testing.assert_close(parts, R(*found["a0.h0"].layers))


def test_what_has_no_attention_has_no_components_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    R = nrm.Explainer(model)(torch.randn(1, 3).double(), target=0)
    with pytest.raises(QueryError, match="there is no attention in this model"):
        nrm.components(R)
    with pytest.raises(NeuronSetError, match="without an axis of positions"):
        R.edges(["0", "1"], tokens=True)


class Attending(nn.Module):
    """Two heads, laid out before or after the positions."""

    def __init__(self, heads_first: bool) -> None:
        super().__init__()
        self.e, self.o, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.qkv = nn.Linear(8, 24)
        self.heads_first = heads_first

    def forward(self, ids: Tensor) -> Tensor:
        h = self.e(ids)
        q, k, v = (t.unflatten(-1, (2, 4)) for t in self.qkv(h).chunk(3, -1))
        pattern = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        if self.heads_first:
            mixed = torch.einsum("bhqk,bkhd->bhqd", pattern, v).transpose(1, 2)
        else:
            mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        return self.head(h + self.o(mixed.flatten(2)))


def test_heads_are_split_by_position_in_whatever_layout():
    found = []
    for heads_first in (True, False):
        torch.manual_seed(0)
        model = Attending(heads_first).double().eval()
        R = nrm.Explainer(model)(torch.tensor([[1, 2, 3, 4, 5]]), target=(-1, 0))
        parts = nrm.components(R, "heads", tokens=True)
        assert list(parts) == [f"a0.h{head}@{k}" for head in range(2) for k in range(5)]
        found.append(torch.stack([R(part) for part in parts.values()]))
    torch.testing.assert_close(found[0], found[1])


def test_heads_merged_with_the_batch_have_names_of_their_own():
    class Weights(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.e, self.att = nn.Embedding(7, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.head, self.weights = nn.Linear(8, 3), weights

        def forward(self, ids):
            h = self.e(ids)
            return self.head(h + self.att(h, h, h, need_weights=self.weights)[0]).mean(1)

    found = []
    for weights in (True, False):
        torch.manual_seed(0)
        explainer = nrm.Explainer(Weights(weights).double().eval())
        R = explainer(torch.tensor([[1, 2, 3], [4, 5, 6]]), target=0)
        parts = nrm.components(R, "heads")
        assert list(parts) == ["a0.h0", "a0.h1"]
        found.append(torch.stack([R(part) for part in parts.values()]))
    torch.testing.assert_close(found[0], found[1])
