"""Capturing models: addresses, exactness, reuse, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import nrm
from nrm.capture.call import ModelCall
from nrm.capture.export import capture
from nrm.capture.run import evaluate
from nrm.errors import (
    CaptureError,
    InputError,
    QueryError,
    UnknownLayerError,
    UnsupportedOperatorError,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2)
        self.act = nn.ReLU(inplace=True)
        nn.init.uniform_(self.bn1.running_var, 0.5, 2)
        nn.init.normal_(self.bn1.running_mean)

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out += x
        return self.act(out)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.drop = nn.Dropout()
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        h = self.blocks(x)
        return self.head(self.drop(h.mean((2, 3))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 2, 4, 4)


def test_addresses_are_module_paths(net, x):
    listing = nrm.Explainer(net).layers(x)
    names = [layer.name for layer in listing]
    assert names == [
        "input",
        "blocks.0.conv1", "blocks.0.bn1", "blocks.0.act", "blocks.0:add", "blocks.0.act@1",
        "blocks.1.conv1", "blocks.1.bn1", "blocks.1.act", "blocks.1:add", "blocks.1.act@1",
        ":mean", "drop", "head",
    ]  # fmt: skip
    assert listing["blocks.0"].name == "blocks.0.act@1"
    assert listing["blocks"].name == "blocks.1.act@1"
    assert listing["output"].name == "head"
    assert listing["x"].name == "input"
    assert listing["blocks.0.conv1"].shape == (2, 4, 4)
    assert listing["blocks.0.conv1"].module == "Conv2d"
    assert listing["blocks.0.conv1"].kind == "conv"
    assert listing["head"].channel_axis == 0
    cuts = {layer.name for layer in listing if layer.cut}
    inside = {"blocks.0.conv1", "blocks.0.bn1", "blocks.0.act"}
    assert cuts == set(names) - inside - {n.replace("0", "1") for n in inside}
    assert "blocks.0:add" in str(listing)


def test_biases_are_listed_as_inputs(net, x):
    listing = nrm.Explainer(net, bias="input").layers(x)
    assert [layer.name for layer in listing if layer.kind == "bias"] == [
        "blocks.0.conv1.bias",  # of the batch norm that the convolution took in
        "blocks.1.conv1.bias",
        "head.bias",
    ]
    assert [layer.name for layer in listing if layer.cut] == ["head"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_are_reproduced_and_the_model_is_unchanged(net, x, dtype):
    net, x = net.to(dtype), x.to(dtype)
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        expected = net(x)
    captured = capture(ModelCall(net, [x], {}, None), 0)
    assert captured.method == "export"
    assert captured.batched
    torch.testing.assert_close(evaluate(captured, [x]), expected)
    R = nrm.Explainer(net)(x, target=0)
    torch.testing.assert_close(R.output, expected)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_one_capture_serves_all_batch_sizes(net, x, monkeypatch):
    calls = []
    monkeypatch.setattr("nrm.explainer.capture", lambda *a: calls.append(1) or capture(*a))
    explainer = nrm.Explainer(net)
    batch = explainer(torch.cat([x, x[:1]]), target=[0, 1, 2])
    single = explainer(x[1:], target=1)
    torch.testing.assert_close(batch.heatmap()[1:2], single.heatmap())
    assert len(calls) == 1
    explainer(torch.randn(1, 2, 5, 5), target=0)  # another picture size: another capture
    assert len(calls) == 2
    with torch.no_grad():
        net.head.weight.mul_(-1.5)  # changed weights: captured again, never a stale number
    torch.testing.assert_close(explainer(x, target=0).output, net(x).detach())
    assert len(calls) == 3


def test_batch_of_one_and_changed_batch_agree_with_single_samples(net, x):
    explainer = nrm.Explainer(net, bias="input")
    both = explainer(x, target=[2, 0])
    for sample, target in enumerate([2, 0]):
        alone = explainer(x[sample : sample + 1], target=target)
        torch.testing.assert_close(both.heatmap()[sample], alone.heatmap()[0])
        torch.testing.assert_close(both("head.bias")[sample], alone("head.bias")[0])


def test_data_dependent_control_flow_is_traced_for_each_input():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            h = torch.relu(self.a(x))
            if x.sum() > 0:
                h = self.b(h)
            return h.clone()

    torch.manual_seed(1)
    net = Branching().eval()
    explainer = nrm.Explainer(net)
    x = torch.tensor([[1.0, 2.0]])
    R = explainer(x, target=0)
    assert R.graph.captured.method == "eager"
    assert [v.name for v in R.graph.variables] == ["input", "a", ":relu", "b", ":clone"]
    torch.testing.assert_close(R.output, net(x).detach())
    assert [v.name for v in explainer(-x, target=0).graph.variables][-2:] == [":relu", ":clone"]
    assert not net.a._forward_hooks


class Branching(Net):
    """Only an eager trace captures it."""

    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


def test_export_and_eager_trace_give_the_same(net, x):
    branching = Branching().eval()
    branching.load_state_dict(net.state_dict())
    eager, exported = (nrm.Explainer(m)(x[:1], target=0) for m in (branching, net))
    assert eager.graph.captured.method == "eager"
    assert exported.graph.captured.method == "export"
    assert [v.name for v in eager.graph.variables] == [v.name for v in exported.graph.variables]
    torch.testing.assert_close(eager.output, exported.output)
    torch.testing.assert_close(eager.heatmap(), exported.heatmap())


def test_views_picks_and_constants():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 2, 3))
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            a, b = x.chunk(2, 1)
            best = torch.max(a.transpose(1, 2), 2).values.unsqueeze(1)
            h = torch.cat([b, best, self.token.expand(x.size(0), -1, -1)], 1)
            return self.head(h.sum(1) - 0.5)

    torch.manual_seed(0)
    net = Odd().double().eval()
    R = nrm.Explainer(net)(torch.randn(2, 4, 3).double(), target=0)
    leaves = {v.name: v.kind for v in R.graph.leaves}
    assert list(leaves.values()) == ["input", "constant"]
    torch.testing.assert_close(sum(R(name) for name in leaves), torch.ones(2).double())
    constant = R.biases()
    assert len(constant) == 1
    assert R.diagnostics().worst_cut_deviation < 1e-12


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda h: h.logcumsumexp(-1), "logcumsumexp"),
        (lambda h: torch.special.i0(h), "i0"),
        (lambda h: torch.linalg.cross(h, h.flip(-1)), "linalg_cross"),
        (lambda h: h.frac(), "frac"),
    ],
)
def test_unsupported_operators_are_refused_by_name(function, operator):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, x):
            return function(self.first(x))

    with pytest.raises(UnsupportedOperatorError, match=operator):
        nrm.Explainer(Wrapped().eval(), batch_axis=None)(torch.randn(2, 3))


def test_what_no_walk_visits_may_be_computed_in_any_way():
    """A scale takes no relevance, so nothing needs to be known of how it is computed."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, x):
            h = self.first(x)
            return h / h.std(-1, keepdim=True)

    R = nrm.Explainer(Scaled().eval())(torch.randn(2, 3), target=0)
    assert R.diagnostics().worst_cut_deviation < 1e-5
    with pytest.raises(QueryError, match="no walk visits"):
        R(":std")


def test_random_operators_are_refused():
    class Noisy(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5)

    with pytest.raises((UnsupportedOperatorError, CaptureError), match="random"):
        nrm.Explainer(Noisy().eval())(torch.randn(4, 30), target=0)


def test_in_place_writes_to_views_are_followed():
    class Sneaky(nn.Module):
        def forward(self, x):
            h = x * 2
            h[:, 0].relu_()
            h[:, 1] = 0.5
            return h + 1

    x = torch.tensor([[-1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    explainer = nrm.Explainer(Sneaky().eval())
    torch.testing.assert_close(explainer(x).output, Sneaky()(x))
    R = explainer(x, target=0)
    torch.testing.assert_close(R.heatmap(), torch.tensor([[1.0, 0.0, 0.0]] * 2))
    R = explainer(x, target=1)  # overwritten: the walk ends at the constant
    assert not R.heatmap().any()
    torch.testing.assert_close(sum(R.biases().values()), torch.ones(2))


def test_an_output_without_any_walk_is_refused():
    class Deaf(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x) + 1

    with pytest.raises(CaptureError, match="no walk"):
        nrm.Explainer(Deaf().eval())(torch.randn(2, 3), target=0)


def test_an_ignored_input_has_no_relevance():
    class Ignores(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x, y):
            return self.head(x)

    R = nrm.Explainer(Ignores().eval())(torch.randn(2, 3), torch.randn(2, 3), target=0)
    assert (R.heatmap(at="y") == 0).all()
    torch.testing.assert_close(R("x"), torch.ones(2))


def test_bad_models_and_inputs_are_refused(net, x):
    explainer = nrm.Explainer(net)
    for bad, message in [
        (torch.randn(2, 3, 4, 4), "fails on inputs"),
        (x.double(), "float64"),
        (x.clone().fill_(torch.nan), "NaN"),
        (x.clone().fill_(torch.inf), "infinite"),
        (torch.zeros(0, 2, 4, 4), "no sample"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.long), "fails on inputs"),
    ]:
        with pytest.raises(InputError, match=message):
            explainer(bad, target=0)
    with pytest.raises(InputError, match="tensor"):
        explainer(target=0)
    with pytest.raises(InputError, match="tensor"):
        explainer([1.0], target=0)
    net.blocks[1].train()
    with pytest.raises(InputError, match=r"'blocks\.1'.*model\.eval"):
        explainer(x, target=0)
    with pytest.raises(InputError, match="no shape yet"):
        nrm.Explainer(nn.LazyLinear(2).eval())(x, target=0)
    with pytest.raises(TypeError, match="Module"):
        nrm.Explainer(lambda x: x)


def test_an_unknown_layer_suggests_the_nearest(net, x):
    R = nrm.Explainer(net)(x, target=0)
    with pytest.raises(UnknownLayerError, match=r"blocks\.0\.conv1") as refused:
        R("block.0.conv1")
    assert "'block.0.conv1'" in str(refused.value)


def test_one_of_several_outputs_is_chosen():
    @dataclass
    class Output:
        logits: torch.Tensor
        hidden: tuple

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 4)
            self.b = nn.Linear(4, 2)

        def forward(self, x):
            h = torch.relu(self.a(x))
            return Output(self.b(h), (x, h))

    torch.manual_seed(0)
    net, x = Several().eval(), torch.randn(2, 3)
    with pytest.raises(CaptureError, match=r"logits \[2, 2\], hidden\.0 \[2, 3\]"):
        nrm.Explainer(net)(x)
    with pytest.raises(CaptureError, match="no output 'logit'"):
        nrm.Explainer(net, output="logit")(x)
    logits = nrm.Explainer(net, output="logits")(x, target=1)
    torch.testing.assert_close(logits.output, net(x).logits)
    hidden = nrm.Explainer(net, output=("hidden", -1))(x, target=0)
    assert hidden.output.shape == (2, 4)
    both = nrm.Explainer(net, output=lambda result: result.logits[:, 0] - result.logits[:, 1])(x)
    assert both.output.shape == (2,)
    assert both.diagnostics().worst_cut_deviation < 1e-5
    with pytest.raises(CaptureError, match="returned a Output"):
        nrm.Explainer(net, output=lambda result: result)(x)


def test_keyword_arguments_integer_inputs_and_masks():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 4)
            self.places = nn.Parameter(torch.randn(5, 4))
            self.head = nn.Linear(4, 3)

        def forward(self, ids, mask=None, *, scale=1.0):
            h = torch.relu(self.words(ids) + self.places[: ids.shape[1]])
            h = h * mask.unsqueeze(-1) * scale
            return self.head(h.sum(1))

    torch.manual_seed(0)
    net = Reader().eval()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    explainer = nrm.Explainer(net)
    R = explainer(ids, mask=mask, scale=2.0, target=1)
    tokens = R.tokens()
    assert tokens.shape == ids.shape
    assert not tokens[1, 2:].any()
    assert {v.name for v in R.graph.leaves if v.kind == "embedding"} == {"words"}
    torch.testing.assert_close(R("words"), tokens.sum(1))
    other = explainer(ids, mask=mask, scale=3.0, target=1)  # another constant: another graph
    torch.testing.assert_close(other.output, net(ids, mask, scale=3.0).detach())


def test_works_without_gradients_and_in_inference_mode(net, x):
    expected = nrm.Explainer(net)(x, target=0).heatmap()
    net.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(nrm.Explainer(net)(x, target=0).heatmap(), expected)
    with torch.inference_mode():
        explainer = nrm.Explainer(net)
        R = explainer(x.clone(), target=0)
        torch.testing.assert_close(R.heatmap(nrm.channels("blocks.0", 0, 1)), expected)
    heatmap = nrm.Explainer(net)(x.requires_grad_(), target=0).heatmap()
    assert not heatmap.requires_grad
