"""Defaults depend on the function that a network computes, not on how it is spelled."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nrm
from nrm import composites, rules
from nrm.composites import Composite
from nrm.rules import Shares, Uniform, Zero

pytestmark = pytest.mark.usefixtures("captured_once")


class Of(nn.Module):
    """A network of some modules, by a function."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def of(function, **modules):
    return Of(function, **modules).double().eval()


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def branching(model):
    """The same function, but Python looks at values: only an eager trace follows it."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) if bool(x.sum() > -1e9) else x

    return Branching().eval()


def chosen(model, *inputs, **options):
    return repr(nrm.Explainer(model, **options).graph(*inputs).specification)


# -- constants decide nothing --------------------------------------------------------------------


class FrozenBatchNorm(nn.Module):
    """As torchvision's: everything is computed from buffers when it is called."""

    def __init__(self, norm):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x):
        weight, bias, mean, variance = (
            getattr(self, name).reshape(1, -1, 1, 1)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class WrittenBatchNorm(FrozenBatchNorm):
    def forward(self, x):
        centred = x - self.running_mean[:, None, None]
        scaled = centred / torch.sqrt(self.running_var[:, None, None] + 1e-5)
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]


def as_it_is(norm):
    return norm


@cache
def normed(wrap):
    """A network with a batch norm, some of whose gains are negative, or the same otherwise."""
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return of(
        lambda s, x: s.head(torch.relu(s.second(torch.relu(s.norm(s.first(x))))).mean((2, 3))),
        first=nn.Conv2d(3, 4, 3),
        norm=wrap(norm),
        second=nn.Conv2d(4, 4, 3),
        head=nn.Linear(4, 3),
    )


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize("wrap", [FrozenBatchNorm, WrittenBatchNorm])
@pytest.mark.parametrize(
    "composite",
    [None, rules.ZPlus(), rules.Gamma(0.25), rules.AlphaBeta(2, 1), composites.Occlusion()],
)
def test_batch_norm_has_one_heatmap_however_it_is_spelled(composite, wrap, bias):
    x = drawn(2, 3, 8, 8)
    theirs = nrm.Explainer(normed(as_it_is), composite, bias=bias)(x, target=1)
    R = nrm.Explainer(normed(wrap), composite, bias=bias)(x, target=1)
    assert repr(R.graph.specification) == repr(theirs.graph.specification)
    torch.testing.assert_close(R.output, theirs.output)
    torch.testing.assert_close(R.heatmap(), theirs.heatmap(), rtol=0, atol=1e-11)
    assert set(R.biases()) == set(theirs.biases())
    for layer in ("first", "norm", "second"):
        torch.testing.assert_close(R(layer), theirs(layer))


def test_frozen_batch_norm_gets_what_batch_norm_gets():
    model = normed(FrozenBatchNorm)
    R = nrm.Explainer(model)(drawn(1, 3, 8, 8), target=0)
    assert repr(R.graph.specification) == repr(composites.GammaFlat())
    assert float(R.heatmap().sum()) == pytest.approx(1)


NEGATED = {
    "neg": lambda h: -h,
    "times": lambda h: h * -1.0,
    "times a tensor": lambda h: torch.full((4,), -1.0, dtype=h.dtype) * h,
    "over": lambda h: h / -0.5 * 0.5,
    "sub": lambda h: 0.0 - h,
    "rsub": lambda h: torch.rsub(h, 0.0),
}


def test_a_negative_scale_is_that_of_the_weights():
    lin, head = nn.Linear(5, 4), nn.Linear(4, 2)
    turned = nn.Linear(5, 4)
    turned.load_state_dict({key: -value for key, value in lin.state_dict().items()})
    x = drawn(2, 5)
    plain = of(lambda s, x: s.head(torch.relu(s.lin(x))), lin=turned, head=head)
    for name, negated in NEGATED.items():
        model = of(lambda s, x, f=negated: s.head(torch.relu(f(s.lin(x)))), lin=lin, head=head)
        for rule in (rules.ZPlus(), rules.Gamma(0.25), rules.Zero()):
            found, expected = (
                nrm.Explainer(m, rule, bias="input")(x, target=0).heatmap() for m in (model, plain)
            )
            torch.testing.assert_close(found, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_a_layer_that_is_read_twice_keeps_its_weights():
    lin = nn.Linear(5, 4)
    model = of(lambda s, x: s.lin(x) * s.gain + s.lin(x), lin=lin)
    model.register_buffer("gain", torch.tensor([-1.0, 2.0, 0.5, 1.0]).double())
    reads = of(lambda s, x: (h := s.lin(x)) * s.gain + h, lin=lin)
    reads.register_buffer("gain", model.gain)
    x = drawn(2, 5)
    for m in (model, reads):
        R = nrm.Explainer(m, rules.Zero(), bias="input")(x, target=1)
        torch.testing.assert_close(R.heatmap() * R.scale[:, None], 3 * x * lin.weight[1].detach())


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.lin(x) * torch.rsqrt(torch.arange(1.0, 5).to(x)),
        lambda s, x: s.lin(x) * torch.arange(4.0).softmax(0).to(x),
        lambda s, x: s.lin(x) + F.layer_norm(s.lin.bias, (4,)),
        lambda s, x: s.lin(x) + s.table(torch.arange(3)).sum(),
        lambda s, x: s.lin(x) + s.table(torch.arange(3).expand(x.shape[0], 3)).sum((1, 2))[:, None],
        lambda s, x: s.lin(x) / torch.full_like(x, 4.0).mean(-1, keepdim=True).sqrt(),
        lambda s, x: F.normalize(s.lin(x), dim=-1),
        lambda s, x: s.lin(x) * torch.rsqrt((s.lin(x) ** 2).sum(-1, keepdim=True)),
        lambda s, x: (s.lin(x), F.layer_norm(s.lin(x), (4,)))[0],
    ],
)
def test_what_is_done_to_constants_and_sizes_decides_nothing(function):
    model = of(function, lin=nn.Linear(5, 4), table=nn.Embedding(3, 2))
    assert chosen(model, drawn(2, 5)) == repr(composites.GammaFlat())


def test_a_table_of_positions_is_no_embedding_of_inputs():
    """Whether or not the positions are repeated for every sample of the batch."""
    for positions in (
        lambda x: torch.arange(2),
        lambda x: torch.arange(2).expand(x.shape[0], 2),
        lambda x: torch.arange(2).repeat(x.shape[0], 1),
    ):
        model = of(
            lambda s, x, at=positions: s.lin(x + s.table(at(x))).sum(1),
            lin=nn.Linear(3, 2),
            table=nn.Embedding(2, 3),
        )
        for samples in (1, 2):
            R = nrm.Explainer(model, rules.Zero())(drawn(samples, 2, 3), target=0)
            assert [v.name for v in R.graph.leaves] == ["input"]
            R = nrm.Explainer(model, rules.Zero(), bias="input")(drawn(samples, 2, 3), target=0)
            assert set(R.biases()) == {":add.bias", "lin.bias"}


# -- nor does the spelling of a norm, or the way of capture ---------------------------------------


def variance(x):
    return x.var(-1, keepdim=True, unbiased=False)


def centred(x):
    return x - x.mean(-1, keepdim=True)


NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "over the root of the variance": lambda x: centred(x) / torch.sqrt(variance(x) + 1e-5),
    "times the inverse root": lambda x: centred(x) * torch.rsqrt(variance(x) + 1e-5),
    "by the mean square": lambda x: (
        centred(x) / (centred(x) ** 2).mean(-1, keepdim=True).add(1e-5) ** 0.5
    ),
    "a power": lambda x: centred(x) * (centred(x).pow(2).mean(-1, keepdim=True) + 1e-5) ** -0.5,
    "over the deviation": lambda x: centred(x) / (x.std(-1, keepdim=True) + 1e-5),
    "one over it": lambda x: centred(x) * (1 / (x.std(-1, keepdim=True) + 1e-5)),
}


@cache
def normalised(name):
    return of(
        lambda s, x: s.head(torch.relu(NORMS[name](s.lin(x)))),
        lin=nn.Linear(5, 4),
        head=nn.Linear(4, 2),
    )


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_a_norm_however_it_is_spelled(name):
    model = normalised(name)
    assert chosen(model, drawn(2, 5)) == repr(composites.CPLRP())
    assert chosen(branching(model), drawn(1, 5)) == repr(composites.CPLRP())


def test_norms_written_out_have_the_heatmap_of_the_layer():
    heatmaps = {}
    for name in NORMS:
        if name == "layer_norm" or ("root" in name or name in ("by the mean square", "a power")):
            torch.manual_seed(0)  # the weights of all are the same
            model = normalised(name)
            heatmaps[name] = nrm.Explainer(model)(drawn(2, 5), target=0).heatmap()
    assert len(heatmaps) == 5
    for found in heatmaps.values():
        torch.testing.assert_close(found, heatmaps["layer_norm"])


RECTIFIED = {
    "clamp": lambda h: h.clamp(min=0),
    "a mask": lambda h: h * (h > 0),
    "maximum": lambda h: torch.maximum(h, torch.zeros_like(h)),
    "threshold": lambda h: F.threshold(h, 0, 0),
    "where": lambda h: torch.where(h > 0, h, 0.0),
    "half of a sum": lambda h: (h + h.abs()) / 2,
    "masked_fill": lambda h: h.masked_fill(h < 0, 0.0),
}


@cache
def rectified(function):
    return of(lambda s, x: s.head(function(s.lin(x))), lin=nn.Linear(5, 8), head=nn.Linear(8, 2))


@pytest.mark.parametrize("name", RECTIFIED)
def test_a_rectifier_has_one_heatmap_however_it_is_spelled(name):
    models = []
    for function in (RECTIFIED[name], torch.relu):
        torch.manual_seed(0)  # the weights of both are the same
        models.append(rectified(function))
    for composite in (None, rules.ZPlus(), composites.CPLRP()):
        found, expected = (
            nrm.Explainer(model, composite)(drawn(2, 5) - 0.5, target=0) for model in models
        )
        assert float(expected.activations("lin").min()) < 0
        assert repr(found.graph.specification) == repr(expected.graph.specification)
        torch.testing.assert_close(found.heatmap(), expected.heatmap())


def times(number, apply):
    def function(s, x):
        for _ in range(number):
            x = torch.relu(apply(s, x))
        return x

    return function


@pytest.mark.parametrize(
    "apply",
    [
        lambda s, x: s.lin(x),
        lambda s, x: x @ s.lin.weight.mT,
        lambda s, x: torch.einsum("bi,oi->bo", x, s.lin.weight) + s.lin.bias,
        lambda s, x: F.linear(x, s.lin.weight / s.lin.weight.norm()),
    ],
)
@pytest.mark.parametrize(
    ("number", "expected"), [(4, composites.CPLRP()), (2, composites.GammaFlat())]
)
def test_a_layer_applied_again_and_again_counts_on_every_way_of_capture(apply, number, expected):
    model = of(times(number, apply), lin=nn.Linear(4, 4))
    x = drawn(1, 4)
    methods = []
    for m in (model, branching(model)):
        graph = nrm.Explainer(m).graph(x)
        methods.append(graph.captured.method)
        assert repr(graph.specification) == repr(expected)
    assert methods == ["export", "eager"]
    heatmaps = [nrm.Explainer(m)(x, target=0).heatmap() for m in (model, branching(model))]
    torch.testing.assert_close(heatmaps[0], heatmaps[1])


def test_slices_of_one_weight_are_different_layers():
    def function(s, x):
        a, b, c = s.lin.weight.chunk(3)
        return F.linear(x, a) + F.linear(x, b) + F.linear(x, c)

    model = of(function, lin=nn.Linear(4, 6))
    for m in (model, branching(model)):
        assert chosen(m, drawn(1, 4)) == repr(composites.GammaFlat())


# -- values, gates and structure ------------------------------------------------------------------

NODES = 5


def graph_input():
    drawing = drawn(NODES, NODES, seed=1)
    return (drawing + drawing.T > 1).double(), drawn(NODES, 3)


AGGREGATIONS = {
    "as given": lambda A, h: A @ h,
    "on the right": lambda A, h: (h.T @ A).T,
    "einsum": lambda A, h: torch.einsum("nm,mf->nf", A, h),
    "by degree": lambda A, h: (A + torch.eye(NODES).to(A)) / (1 + A.sum(1, keepdim=True)) @ h,
    "symmetric": lambda A, h: (
        (d := (1 + A.sum(1)).pow(-0.5))[:, None] * (A + torch.eye(NODES).to(A)) * d @ h
    ),
    "of a gate": lambda A, h: A @ h.softmax(-1),
    "batched": lambda A, h: torch.bmm(A[None], h[None])[0],
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_float_adjacency_takes_none_unless_asked(name):
    model = of(
        lambda s, A, x: AGGREGATIONS[name](A, torch.relu(s.lin(x))).sum(0, keepdim=True),
        lin=nn.Linear(3, 4),
    )
    model.lin.weight.data.abs_()  # so that every node is active
    A, x = graph_input()
    R = nrm.Explainer(model, batch_axis=None)(A, x, target=(0, 1))
    adjacency, features = (v.name for v in R.graph.inputs)
    assert float(R.heatmap(at=adjacency).abs().sum()) == 0
    assert float(R.heatmap(at=features).sum()) == pytest.approx(1)
    if name == "as given":  # LRP-0 of x by hand: both sums with A held
        R = nrm.Explainer(model, rules.Zero(), batch_axis=None)(A, x, target=(0, 1))
        z = x * model.lin.weight[1].detach()
        share = A.sum(0) * torch.relu(model.lin(x)[:, 1]).detach()
        expected = z / z.sum(1, keepdim=True) * (share / share.sum())[:, None]
        torch.testing.assert_close(R.heatmap(at=features), expected)
    for alpha, asked in ((Uniform(), 0.5), (Shares(0.8, 0.2), 0.2)):
        composite = Composite([], Zero(), alpha_default=alpha)
        R = nrm.Explainer(model, composite, batch_axis=None)(A, x, target=(0, 1))
        if name not in ("of a gate", "symmetric"):
            assert float(R.heatmap(at=adjacency).sum()) == pytest.approx(asked)


def test_structure_by_its_name():
    class Edges(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 4, bias=False).double()

        def forward(self, x, edge_index, edge_weight):
            messages = self.lin(x)[edge_index[0]] * edge_weight[:, None]
            arrived = torch.zeros(NODES, 4, dtype=x.dtype).index_add(0, edge_index[1], messages)
            return arrived.sum(0, keepdim=True)

    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    explainer = nrm.Explainer(Edges().eval(), batch_axis=None)
    R = explainer(drawn(NODES, 3), edges, drawn(4, seed=2), target=(0, 0))
    assert float(R.heatmap(at="x").sum()) == pytest.approx(1)
    assert float(R.heatmap(at="edge_weight").abs().sum()) == 0


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (
            lambda s, a, x: (a @ x.T).sum(0, keepdim=True),
            3,
        ),  # vectors of two inputs
        (lambda s, a, x: (x @ a).sum(0, keepdim=True), 3),  # a hypernetwork's layer
        (lambda s, a, x: (torch.relu(s.lin(x)) @ a).sum(0, keepdim=True), 4),
    ],
)
def test_what_happens_to_be_square_is_a_value(function, size):
    """Nothing of it counts the places of the other input: its default is that of other sizes."""
    model = of(function, lin=nn.Linear(3, 4))
    model.lin.weight.data.abs_()
    R = nrm.Explainer(model, batch_axis=None)(drawn(size, size), drawn(NODES, 3), target=(0, 1))
    for variable in R.graph.inputs:
        assert float(R.heatmap(at=variable.name).sum()) == pytest.approx(0.5)


def test_two_inputs_alike_share_alike():
    """Neither is told to be structure: both are square and as they were given."""
    model = of(lambda s, a, b: (a @ b).sum(0, keepdim=True))
    R = nrm.Explainer(model, batch_axis=None)(drawn(3, 3), drawn(3, 3, seed=1), target=(0, 1))
    for variable in R.graph.inputs:
        assert float(R.heatmap(at=variable.name).sum()) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("gate", "takes"),
    [
        (torch.relu, 0.5),
        (lambda h: h.clamp(min=0), 0.5),
        (lambda h: h * (h > 0), 0.5),
        (F.silu, 0),
        (torch.sigmoid, 0),
    ],
)
def test_a_rectified_factor_is_a_value_and_a_sigmoid_a_gate(gate, takes):
    model = of(
        lambda s, x, y: gate(s.a(x)) * s.b(y),
        a=nn.Linear(3, 2, bias=False),
        b=nn.Linear(3, 2, bias=False),
    )
    model.a.weight.data.abs_()
    R = nrm.Explainer(model)(drawn(2, 3), drawn(2, 3, seed=1), target=1)
    found = R.heatmap(at=R.graph.inputs[0].name).sum(1)
    torch.testing.assert_close(found, torch.full((2,), takes).double())
