"""The way by derivatives equals message passing, and is taken only where it is exact."""

import pytest
import torch
from torch import nn

import nrm
from nrm import composites, rules, telescope
from nrm.telescope import telescopes


class Block(nn.Module):
    """Attention, gates, norms, a skip, a convolution: a bit of everything."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.gate = nn.Linear(8, 12)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, ids, mask):
        h = self.words(ids)
        q, k, v = (
            t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, -1)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        h = h + self.out(a.transpose(1, 2).flatten(2))
        h = h + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        h = h + torch.relu(self.conv(h.transpose(1, 2)).transpose(1, 2))
        return self.head(torch.tanh(h.mean(1)))


@pytest.fixture
def case():
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    return Block().double().eval(), ids, mask


@pytest.mark.parametrize("composite", [composites.CPLRP(), composites.AttnLRP()], ids=str)
def test_equals_message_passing(case, composite):
    model, *inputs = case
    explainer = nrm.Explainer(model, composite)
    fast, slow = explainer(*inputs, target=[0, 2]), explainer(*inputs, target=[0, 2])
    assert fast.forward_pass.telescope is not None
    slow.forward_pass.telescope = None
    head = nrm.channels("out", 0, 1, 2)
    gated = nrm.channels("down", 3)
    for query in (
        lambda R: R.tokens(),
        lambda R: R.tokens(gated, head),
        lambda R: R.marginal("out"),
        lambda R: R.marginal("norm"),
        lambda R: R(head, gated),
        lambda R: R(head, given=gated),
        lambda R: R(nrm.neurons("words", (1, 2), (0, 3)), head),
        lambda R: R(head | gated),
        lambda R: R.joint("out", "down"),
        lambda R: R(head, normalized=False),
        lambda R: R(head, within=nrm.channels("down", 1, 2)),
        lambda R: sum(R.biases().values()),
    ):
        torch.testing.assert_close(query(fast), query(slow), rtol=1e-10, atol=1e-12)


def test_attention_weights_remain_variables(case):
    """They are within the fused operator, so message passing answers for them."""
    model, *inputs = case
    R = nrm.Explainer(model, composites.AttnLRP())(*inputs, target=0)
    weights = R.marginal(":softmax")
    assert weights.shape == (2, 2, 4, 4)
    assert weights.abs().sum() > 0
    R.diagnostics()


def test_equals_gradient_times_input(case):
    """CP-LRP of a network without gates and attention is gradient x input with frozen slopes."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    model = model.double().eval()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    R = nrm.Explainer(model, rules.Zero(), bias="input")(x, target=1)
    assert R.forward_pass.telescope is not None
    torch.testing.assert_close(R.heatmap() * R.scale[:, None], gradient * x.detach())


@pytest.mark.parametrize(
    ("rule", "bias"),
    [(rules.Zero(), "drop"), (rules.Epsilon(), "input"), (rules.Gamma(0.0), "input")],
)
def test_is_not_taken_where_divisions_do_not_cancel(case, rule, bias):
    model, *inputs = case
    graph = nrm.Explainer(model, rule, bias=bias).graph(*inputs)
    assert not telescopes(graph)
    assert not telescopes(
        nrm.Explainer(nn.Linear(2, 2).eval(), rules.Zero()).graph(torch.randn(1, 2))
    )


def test_relevance_at_a_neuron_of_value_zero_takes_the_slow_way():
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    R = nrm.Explainer(model, rules.Zero(), bias="input")(torch.ones(1, 2).double(), target=0)
    assert R.output[0, 0] == 0
    torch.testing.assert_close(R.heatmap(), torch.full((1, 2), 0.5).double())


def test_many_messages_at_once(case):
    model, *inputs = case
    for composite in (composites.CPLRP(), composites.AttnLRP()):
        R = nrm.Explainer(model, composite)(*inputs, target=0)
        pairs = R.joint("down", "words")
        one = torch.stack([R.channels("words", nrm.channels("down", c)) for c in range(8)], 1)
        torch.testing.assert_close(pairs, one)


class Vocabulary(nn.Module):
    """A last layer over all positions, whose rows are alike."""

    def __init__(self):
        super().__init__()
        self.words, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9)

    def forward(self, ids):
        h = self.words(ids)
        return self.head(h + torch.tanh(self.mix(h)).cumsum(1))


def test_few_rows_of_the_last_layer(monkeypatch):
    """From the others no derivative comes; where relevance is in many, all rows are taken."""
    with torch.no_grad():
        torch.manual_seed(0)
        model = Vocabulary().double().eval()
    ids = torch.tensor([[1, 2, 3, 4, 5], [5, 6, 7, 0, 9]])
    taken = []
    itself = telescope.LastLayer.derivatives

    def told(*given):
        taken.append(itself(*given))
        return taken[-1]

    monkeypatch.setattr(telescope.LastLayer, "derivatives", told)
    explainer = nrm.Explainer(model)
    targets = [(-1, 3), nrm.Contrast((2, 3), (0, 1)), nrm.Average(0)]
    every = torch.ones_like(model(ids))
    asked = [{"target": target} for target in targets] + [{"output_relevance": every}]
    for given, few in zip(asked, (True, True, True, False), strict=True):
        fast, slow = explainer(ids, **given), explainer(ids, **given)
        slow.forward_pass.telescope = None
        taken.clear()
        for query in (
            lambda R: R.tokens(),
            lambda R: R.tokens(nrm.channels("mix", 1, 2)),
            lambda R: R.marginal("head"),
        ):
            torch.testing.assert_close(query(fast), query(slow), rtol=1e-10, atol=1e-12)
        assert [found is not None for found in taken] == [few, few]
    fast = explainer(ids, target=(1, 2))
    many = fast.by_target([(k, 5) for k in range(5)], at="words")
    assert taken[-1] is not None
    for k in range(5):
        torch.testing.assert_close(many[k], fast.of((k, 5)).marginal("words"))


def test_heatmaps_of_sets_of_which_one_layer_is_whole_and_another_is_not():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    explainer = nrm.Explainer(Branches().double().eval(), composites.LRPZero(), bias="input")
    R = explainer(torch.rand(2, 3).double(), target=0)
    assert R.forward_pass.telescope is not None
    sets = [nrm.neurons("a") | nrm.neurons("b", k) for k in range(2)]
    torch.testing.assert_close(R.heatmaps(sets), torch.stack([R.heatmap(one) for one in sets]))
