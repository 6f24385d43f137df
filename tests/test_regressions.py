"""Wrong numbers and unclear errors that were found once, and must not come back."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import nrm
from nrm import rules
from nrm.errors import InputError, NeuronSetError, QueryError, TargetError, UnknownLayerError


def mlp(*sizes, seed=0):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().eval()


def test_marginals_below_sets_that_interleave():
    R = nrm.Explainer(mlp(4, 5, 5, 5, 5, 3), rules.Gamma())(torch.rand(2, 4).double(), target=0)
    a = nrm.neurons("6", 0, 1) | nrm.neurons("2", 0, 1, 2)
    b = nrm.neurons("4", 0, 2, 3)
    found = R.marginal("0", a, b)
    expected = torch.stack([R(a, b, nrm.neurons("0", i)) for i in range(5)], 1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), R(a, b))
    torch.testing.assert_close(R.joint("1", "0", a, b).sum((1, 2)), R(a, b))
    torch.testing.assert_close(R.marginal("0", a, given=b), found / R(b)[:, None])


class Mixing(nn.Module):
    """Puts the batch and positions into one axis on the way."""

    def __init__(self):
        super().__init__()
        self.a, self.f, self.g = nn.Linear(4, 5), nn.Linear(15, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.relu(self.a(x.reshape(-1, 4)))
        return self.g(torch.relu(self.f(h.reshape(-1, 15))))


def test_variables_that_hold_samples_in_one_axis_with_others():
    torch.manual_seed(0)
    model = Mixing().double().eval()
    x = torch.rand(3, 3, 4).double()
    R = nrm.Explainer(model)(x, target=0)
    given = nrm.channels("f", 0, 1)
    health = R.diagnostics()
    assert health.worst_cut_deviation < 1e-12
    assert not health.mixed
    one = nrm.neurons("a", (0, 0))  # of the first of three rows
    for sample in range(3):
        alone = nrm.Explainer(model)(x[sample : sample + 1], target=0)
        torch.testing.assert_close(alone.heatmap()[0], R.heatmap()[sample])
        torch.testing.assert_close(alone(one)[0], R(one)[sample])
        found = R.marginal("a", given=given)[3 * sample : 3 * sample + 3]
        torch.testing.assert_close(alone.marginal("a", given=given), found)
        one_of_all = torch.rand(3, 5) > 0.5  # also with a batch axis of one in front
        found = alone.marginal("a", nrm.mask("a", one_of_all[None]))
        torch.testing.assert_close(found, alone.marginal("a") * one_of_all)


class Transposed(nn.Module):
    """The batch is the second axis on the way, as in recurrent code."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = torch.relu(self.b(torch.relu(self.a(x).transpose(0, 1))))
        return self.head(h.transpose(0, 1).sum(1))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_masks_for_each_sample_where_the_batch_is_not_first(batch):
    torch.manual_seed(1)
    model = Transposed().double().eval()
    x = torch.randn(batch, 3, 4).double()
    masks = torch.rand(batch, 3, 6) > 0.5
    R = nrm.Explainer(model)(x, target=1)
    found = R(nrm.mask("b", masks, in_front=True))  # there are as many samples as steps
    for sample in range(batch):
        alone = nrm.Explainer(model)(x[sample : sample + 1], target=1)
        expected = alone(nrm.mask("b", masks[sample]))[0]
        torch.testing.assert_close(found[sample], expected)
        torch.testing.assert_close(R(nrm.mask("b", masks[sample]))[sample], expected)


@pytest.mark.parametrize("through_data", [False, True])
def test_changed_weights_are_noticed(through_data):
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(),
                          nn.Linear(8, 2)).double().eval()  # fmt: skip
    x = torch.rand(1, 1, 3, 3).double()
    explainer = nrm.Explainer(model)
    old = explainer(x, target=0)
    old.heatmap()
    with torch.no_grad():
        weight = model[0].weight.data if through_data else model[0].weight
        weight.mul_(-1.5).add_(0.1)
    new = explainer(x, target=0)
    torch.testing.assert_close(new.output, model(x).detach())
    torch.testing.assert_close(new.heatmap(), nrm.Explainer(model)(x, target=0).heatmap())
    with pytest.raises(QueryError, match="changed after"):
        old.heatmap()


def test_replaced_modules_are_noticed():
    model = mlp(3, 4, 2)
    x = torch.randn(2, 3).double()
    explainer = nrm.Explainer(model)
    explainer(x, target=0)
    model[1] = nn.Tanh().eval()
    torch.testing.assert_close(explainer(x, target=0).output, model(x).detach())


def test_the_input_may_be_used_again():
    x = torch.rand(2, 3).double()
    R = nrm.Explainer(mlp(3, 4, 2), rules.Zero())(x, target=0)
    S = nrm.Explainer(mlp(3, 4, 2), rules.Zero())(x.clone(), target=0)
    x.zero_()
    torch.testing.assert_close(R.heatmap(), S.heatmap())


def test_models_that_branch_on_the_batch_size():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.a(x) if x.shape[0] <= 5 else self.b(x)

    torch.manual_seed(0)
    model = Branching().double().eval()
    explainer = nrm.Explainer(model)
    for batch in (2, 8, 3, 8):
        x = torch.rand(batch, 3).double()
        R = explainer(x, target=0)
        torch.testing.assert_close(R.output, model(x).detach())


def test_eager_traces_refuse_batches_in_which_a_sample_alone_branches_otherwise():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = self.a(x).transpose(0, 1)
            return self.b((h if h.sum() > 0 else -h).relu().transpose(0, 1).sum(1))

    for seed, alike in ((0, True), (3, False), (4, False), (6, False), (7, True)):
        torch.manual_seed(seed)
        model = Branching().double().eval()
        x, explainer = torch.randn(3, 3, 4).double(), nrm.Explainer(model)
        assert len({bool(model.a(one).sum() > 0) for one in x}) == (1 if alike else 2)
        alone = [nrm.Explainer(model)(one[None], target=0).heatmap() for one in x]
        if alike:
            torch.testing.assert_close(explainer(x, target=0).heatmap(), torch.cat(alone))
        else:
            with pytest.raises(InputError, match="depend on each other"):
                explainer(x, target=0)


@pytest.mark.parametrize("length", [5, 6])
def test_batch_norm_over_another_axis_than_the_layers(length):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(4, length), nn.BatchNorm1d(5)
            self.head = nn.Linear(5 * length, 2)
            nn.init.uniform_(self.norm.running_var, 0.5, 2)

        def forward(self, x):
            return self.head(torch.relu(self.norm(self.first(x))).flatten(1))

    torch.manual_seed(0)
    model = Net().double().eval()
    x = torch.randn(2, 5, 4).double()
    for bias in ("drop", "input"):
        R = nrm.Explainer(model, bias=bias)(x, target=0)
        torch.testing.assert_close(R.output, model(x).detach())
        assert R.diagnostics().worst_cut_deviation < 1e-12


def test_indices_as_tensors():
    R = nrm.Explainer(mlp(4, 5, 2))(torch.rand(2, 4).double(), target=0)
    one = R(nrm.neurons("0", 3))
    torch.testing.assert_close(R(nrm.neurons("0", torch.tensor(3))), one)
    torch.testing.assert_close(R(nrm.channels("0", torch.tensor([1, 3]).max())), one)
    both = R(nrm.neurons("0", torch.tensor([1, 3])))
    torch.testing.assert_close(both, R(nrm.neurons("0", 1, 3)))
    torch.testing.assert_close(R(nrm.neurons("0", slice(None, None, -1))), R("0"))
    with pytest.raises(NeuronSetError, match=r"nrm\.mask"):
        R(nrm.neurons("0", torch.tensor([False, False, True, True, True])))


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda R: R(nrm.channels("0", 1, axis=7)), NeuronSetError),
        (lambda R: R(nrm.neurons(5)), NeuronSetError),
        (lambda R: R(nrm.mask("0", [True] * 5)), NeuronSetError),
        (lambda R: R("0", given=5), NeuronSetError),
        (lambda R: R.marginal(None), UnknownLayerError),
        (lambda R: R.top("0", k=-1), QueryError),
        (lambda R: R.top("0", k=0), QueryError),
        (lambda R: R.top("0", sample=1.5), QueryError),
        (lambda R: R.top("0", work=0), QueryError),
        (lambda R: R.top("0", seconds=0), QueryError),
        (lambda R: R.top("0", order="best"), QueryError),
        (lambda R: R.top("0", method="beam"), QueryError),
        (lambda R: R.top("0", "0"), QueryError),
        (lambda R: R.top(), QueryError),
    ],
)
def test_odd_questions_have_clear_answers(ask, error):
    R = nrm.Explainer(mlp(4, 5, 2))(torch.rand(2, 4).double(), target=0)
    with pytest.raises(error):
        ask(R)


@pytest.mark.parametrize("target", ["top1", {}, [None], [0, [1]], 10**30])
def test_odd_targets_have_clear_answers(target):
    with pytest.raises(TargetError):
        nrm.Explainer(mlp(4, 5, 2))(torch.rand(2, 4).double(), target=target)


def test_other_odd_arguments():
    model, x = mlp(4, 5, 2), torch.rand(2, 4).double()
    with pytest.raises(TypeError, match="composite"):
        nrm.Explainer(model, composite="GammaFlat")
    explainer = nrm.Explainer(model, rules.Flat())
    assert repr(explainer.composite) == "Everywhere(Flat())"
    with pytest.raises(TargetError, match="tensor"):
        explainer(x, output_relevance=[1.0, 2.0])
    with pytest.raises(InputError, match="meta"):
        explainer(x.to("meta"), target=0)
    with pytest.raises(UnknownLayerError):
        explainer.layers(x)["nothing"]
    R = explainer(x, target=0)
    torch.testing.assert_close(R(within="0"), torch.ones(2).double())


def test_one_output_neuron_without_an_axis():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 1)

        def forward(self, x):
            return self.head(x)[:, 0]

    torch.manual_seed(0)
    explainer = nrm.Explainer(Scalar().eval())
    assert explainer(torch.rand(3, 3)).target.tolist() == [0, 0, 0]
    assert explainer(torch.rand(3, 3), target=0).heatmap().shape == (3, 3)
    with pytest.raises(TargetError, match="only neuron"):
        explainer(torch.rand(3, 3), target=1)


def test_what_is_written_out_is_not_differentiated_as_a_whole():
    """The lengths in a cosine similarity are scales and take nothing, by either way."""

    class Similarity(nn.Module):
        def forward(self, a, b):
            return nn.functional.cosine_similarity(a, b)

    torch.manual_seed(0)
    a, b = torch.rand(2, 5).double(), torch.rand(2, 5).double()
    R = nrm.Explainer(Similarity().eval(), nrm.composites.CPLRP())(a, b)
    torch.testing.assert_close(R.heatmap(at="a").sum(1), torch.full((2,), 0.5).double())
    assert R.diagnostics().cuts[-1].name == "leaves, by derivatives"
    assert R.diagnostics().worst_cut_deviation < 1e-12


def test_biases_have_the_shape_of_the_layer_they_enter_and_exclude_embeddings():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).eval()
    explainer = nrm.Explainer(model)
    ids = torch.tensor([[1, 2, 3]])
    R = explainer(ids, target=(0, 1))
    assert R.marginal("1.bias").shape == (1, 3, 2)
    assert explainer.layers(ids)["1.bias"].shape == (3, 2)
    assert set(R.biases()) == {"1.bias"}
    torch.testing.assert_close(R.biases()["1.bias"] + R("0"), torch.ones(1))


def test_channels_lie_where_a_linear_layer_acts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(6, 2)

        def forward(self, x):
            return self.out(x.transpose(1, 2).reshape(x.shape[0], 4, 6))

    explainer = nrm.Explainer(Net().eval())
    listing = explainer.layers(torch.rand(1, 3, 4, 2))
    assert listing[":reshape"].channel_axis == 1


@pytest.mark.filterwarnings("ignore::nrm.RelevanceWarning")
def test_searches_where_contributions_vanish():
    """Bounds are computed on a pass of its own, which warns as the first does."""
    model = mlp(3, 4, 3, 2)
    model[0].weight.data[1] = 0  # a neuron without contributions
    R = nrm.Explainer(model, rules.WSquare())(torch.ones(1, 3).double(), target=0)
    assert R(nrm.neurons("0", 1)) > 0
    pairs = R.joint("2", "input", by="neuron")
    best = R.top("2", "input", by="neuron", k=3)
    ranked = pairs.flatten().sort(descending=True).values[:3]
    torch.testing.assert_close(torch.tensor([flow.relevance for flow in best]).double(), ranked)


@pytest.mark.parametrize("by", ["messages", "derivatives"])
def test_sizes_of_a_softmax_that_is_expanded(by):
    """`|T~_ij|` of its column by hand: `|s_i x_i|` of itself, `s_i s_k |x_k|` of all, the rest."""
    model = nn.Sequential(nn.Softmax(-1), nn.Linear(3, 1, bias=False)).double().eval()
    x = torch.tensor([[0.5, -1.0, 2.0]]).double()
    composite = nrm.composites.AttnLRP()
    if by == "messages":
        composite = nrm.composites.Composite(
            [(nrm.composites.kind("softmax"), rules.Zero())], rules.Gamma(0.0), bias="input"
        )
    R = nrm.Explainer(model, composite)(x, target=0)
    s = x.softmax(-1)[0]
    rest = s * (1 - x[0] + s @ x[0])
    sizes = s * x[0].abs() + s * (s @ x[0].abs()) + rest.abs()
    propagation = R.forward_pass.propagations[R.graph.variable("0").producer]
    torch.testing.assert_close(propagation.magnitude()[0], sizes)
    assert R.diagnostics().worst_cut_deviation < 1e-9
    pairs = R.joint("0", "input", by="neuron")[0]
    best = R.top("0", "input", by="neuron", k=9)
    torch.testing.assert_close(
        torch.tensor([flow.relevance for flow in best]).double(),
        pairs.flatten().sort(descending=True).values,
    )
