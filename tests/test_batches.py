"""Batches that models merge with other axes: every answer as for each sample alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm.errors import QueryError
from nrm.operators import Samples
from nrm.operators.samples import reshaped

BATCH, TIME, WIDTH = 3, 4, 6


class Encoder(nn.Module):
    """torch's own, which keeps the sequence first and the heads beside the batch inside."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(self.encoder(x).mean(1 if self.batch_first else 0))


class Rows(nn.Module):
    """All words of all samples in one axis, as GPT-2 and experts have them, with a bias there."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        batch, time = x.shape[:2]
        if self.order == "time first":
            x = x.transpose(0, 1)
        rows = x.reshape(-1, WIDTH)
        if self.order == "sorted":  # in an order that the input decides, as experts do
            places = rows.sum(-1).argsort()
            sorted_rows = self.second(torch.relu(self.first(rows[places])))
            rows = sorted_rows[places.argsort()]
        else:
            rows = self.second(torch.relu(self.first(rows)))
        if self.order == "time first":
            x = x + rows.view(time, batch, WIDTH)
            return self.head(torch.relu(x).sum(0))
        return self.head(torch.relu(x + rows.view(batch, time, WIDTH)).sum(1))


NETWORKS = {
    "encoder": (lambda: Encoder(True), "encoder.layers.0.self_attn:linear@1"),
    "encoder, sequence first": (lambda: Encoder(False), "encoder.layers.0.self_attn:linear@1"),
    "rows": (lambda: Rows("batch first"), "first"),
    "rows, time first": (lambda: Rows("time first"), "first"),
    "rows in an unknown order": (lambda: Rows("sorted"), "first"),
}
TARGET = [0, 2, 1]


@pytest.fixture(scope="module", params=NETWORKS)
def both(request):
    """The measure of a batch, those of its samples alone, and a layer in which they are merged."""
    build, merged = NETWORKS[request.param]
    torch.manual_seed(0)
    model = build().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(BATCH, TIME, WIDTH).double()
    explainer = nrm.Explainer(model, nrm.rules.Gamma(0.25), bias="input")
    alone = [explainer(x[k : k + 1], target=TARGET[k]) for k in range(BATCH)]
    return explainer(x, target=TARGET), alone, merged


def same(found: Tensor, alone: list[Tensor]) -> None:
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-10, rtol=1e-10)


def test_every_query_of_a_batch_is_that_of_its_samples(both):
    R, alone, merged = both
    a, b = nrm.neurons("input", (0, slice(None))), nrm.channels(merged, 1, 2)
    c = nrm.channels("input", 0, 3)
    asked = (a, b, c, ~b, a ^ b, b >> a, ~(b >> a), (a & ~b) | c, nrm.neurons("head", 0) >> b)
    for formula in asked:
        same(R(formula), [r(formula) for r in alone])
    same(R(b, a, given=c), [r(b, a, given=c) for r in alone])
    for within in (c, a | nrm.neurons(merged)):
        same(R(within=within), [r(within=within) for r in alone])
        same(R(b, within=within), [r(b, within=within) for r in alone])
    same(R(a, b, normalized=False), [r(a, b, normalized=False) for r in alone])
    for state, relevance in R.outcomes(a, b, c).items():
        nothing = torch.zeros(1).double()
        same(relevance, [r.outcomes(a, b, c).get(state, nothing) for r in alone])
    torch.testing.assert_close(sum(R.outcomes(a, b).values()), torch.ones(BATCH).double())


def test_what_is_said_of_a_batch_is_said_of_its_samples(both):
    R, alone, _ = both
    for name, share in R.biases().items():
        same(share, [r.biases()[name] for r in alone])
    health, each = R.diagnostics(), [r.diagnostics() for r in alone]
    assert health.worst_cut_deviation < 1e-12
    same(health.bias_share, [h.bias_share for h in each])
    for layers in zip(R.proper_form(), *(r.proper_form() for r in alone), strict=True):
        for part, *others in zip(*(layer.neurons for layer in layers), strict=True):
            same(part.relevance, [other.relevance for other in others])
    given = nrm.channels("input", 1)
    found, singly = R.marginals(given=given), [r.marginals(given=given) for r in alone]
    assert set(found) == set(singly[0])
    for name in ("input", "head"):
        same(found[name], [s[name] for s in singly])
    for name, message in found.items():
        torch.testing.assert_close(message.sum(), sum(s[name].sum() for s in singly))


def test_neurons_of_merged_axes_have_axes_of_their_own(both):
    R, alone, merged = both
    variable = R.graph.variable(merged)
    if variable.batch_axis is None:
        with pytest.raises(QueryError, match="in an order that is not known"):
            R(nrm.neurons(merged, (0, 1)))
        with pytest.raises(QueryError, match="one sample at a time"):
            R.joint(merged, "input")
        return
    assert variable.neuron_sizes[0] == TIME
    word = nrm.neurons(merged, (2, slice(None)))
    same(R(word), [r(word) for r in alone])
    same(R.joint(merged, "input"), [r.joint(merged, "input") for r in alone])
    same(R.channels(merged), [r.channels(merged) for r in alone])
    for sample, r in enumerate(alone):
        found = [flow.relevance for flow in R.top(merged, "input", k=3, sample=sample)]
        assert found == pytest.approx([f.relevance for f in r.top(merged, "input", k=3)])


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_where_samples_lie_after_a_reshape(batch):
    """Every way to merge a batch with its neighbours, against the samples' own numbers."""
    for before, after in itertools.product((1, 2, 3), (1, 2, 4)):
        shape = (before, batch, after)
        labels = torch.arange(batch).view(1, -1, 1).expand(shape)
        for new in (
            (before * batch, after),
            (before, batch * after),
            (before * batch * after,),
            (before * batch * after, 1),
            (1, before, batch, after),
        ):
            at = reshaped(Samples(1), shape, new)
            assert at is not None
            split = labels.reshape(new).unflatten(at.axis, (at.before, batch, at.after))
            for sample, part in enumerate(split.movedim(at.axis + 1, 0)):
                assert bool((part == sample).all())
            assert reshaped(at, new, shape) == Samples(1)
    assert reshaped(Samples(1, 1, 3), (2, batch * 3), (2 * batch, 3)) == Samples(0, 2, 1)
    assert reshaped(Samples(0), (4, 6), (2, 12)) is None  # two samples in each of two rows


def test_gpt2_in_a_batch_of_two(torchvision_models):
    """transformers' own, which puts all words of all samples in one axis before each layer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 8}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, **special))
    explainer = nrm.Explainer(model.double().eval(), output=lambda found: found.logits[:, -1])
    ids, target = torch.tensor([[3, 5, 4, 7], [9, 8, 3, 6]]), [4, 5]
    R = explainer(ids, target=target)
    alone = [explainer(ids[k : k + 1], target=target[k]) for k in range(2)]
    a = nrm.neurons("transformer.wte", (0, slice(None)))
    b = nrm.channels("transformer.h.0.mlp.c_fc:addmm", 1, 2, 5)
    for formula in (a, b, ~b, a ^ b, b >> a):
        same(R(formula), [r(formula) for r in alone])
    same(R(within=a), [r(within=a) for r in alone])
    same(R(a) + R(b) - 2 * R(a, b), [r(a ^ b) for r in alone])
    for state, relevance in R.outcomes(a, b).items():
        same(relevance, [r.outcomes(a, b)[state] for r in alone])
    for name, share in R.biases().items():
        same(share, [r.biases()[name] for r in alone])
    for layers in zip(R.proper_form(), *(r.proper_form() for r in alone), strict=True):
        same(layers[0].total, [layer.total for layer in layers[1:]])


def test_a_mean_in_front_of_the_samples_takes_no_channels_for_samples():
    """In a graph for one batch alone, of as many samples as there are channels."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            if float(x.sum()) > 1e9:
                x = x * 2
            return self.o(torch.relu(torch.relu(self.a(x)).transpose(0, 1).mean(0)))

    torch.manual_seed(0)
    explainer = nrm.Explainer(Branching().double().eval())
    x = torch.randn(4, 5, 4).double()
    R = explainer(x, target=1)
    alone = [explainer(one[None], target=1) for one in x]
    torch.testing.assert_close(R.heatmap(), torch.cat([one.heatmap() for one in alone]))
    assert R.graph.variable(":mean").batch_axis in (None, 0)
    whole = nrm.neurons(":mean")
    torch.testing.assert_close(R(whole), torch.cat([one(whole) for one in alone]))


def test_edges_beside_rows_in_an_unknown_order():
    """Biases there tell no samples apart: they take what is left of each."""
    torch.manual_seed(0)
    explainer = nrm.Explainer(Rows("sorted").double().eval(), bias="input")
    x, sets = torch.randn(BATCH, TIME, WIDTH).double(), [":add", ":relu@1"]
    R = explainer(x, target=0)
    assert any(not leaf.tells_samples(BATCH) for leaf in R.graph.leaves)
    edges = R.edges(sets)
    chosen = torch.rand(edges.relevance.shape[1:], generator=torch.Generator().manual_seed(1)) < 0.8
    kept = edges.walks.kept(chosen)
    for sample in range(BATCH):
        alone = explainer(x[sample : sample + 1], target=0).edges(sets)
        torch.testing.assert_close(edges.relevance[sample], alone.relevance[0])
        torch.testing.assert_close(kept[sample], alone.walks.kept(chosen)[0])
