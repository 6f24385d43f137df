"""Models in half precision, and under autocast, are answered in single precision."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import nrm
from nrm.composites import CPLRP, AttnLRP, GammaFlat
from nrm.errors import CaptureError, InputError, QueryError

HALVES = [torch.bfloat16, torch.float16]


class RMSNorm(nn.Module):
    """As Llama's: in single precision whatever it is given."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        given = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(given)


class TransformerBlock(nn.Module):
    """Embeddings, attention under a mask of the input's type, a gate, both kinds of norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), RMSNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.gate, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, ids):
        h = self.embed(ids)
        batch, length, width = h.shape
        q, k, v = (
            part.view(batch, length, 2, 8).transpose(1, 2)
            for part in self.qkv(self.norm1(h)).chunk(3, -1)
        )
        lowest = torch.finfo(h.dtype).min
        mask = torch.full((length, length), lowest, dtype=h.dtype, device=h.device).triu(1)
        scores = q @ k.transpose(-1, -2) / 8**0.5 + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(q)
        h = h + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        x = self.norm2(h)
        h = h + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(h).float()


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Branching(nn.Module):
    """Only an eager trace captures it."""

    def __init__(self):
        super().__init__()
        self.body = conv_net()
        self.register_buffer("scale", torch.tensor(0.3))

    def forward(self, x):
        y = self.body(x) * self.scale + torch.ones(3, dtype=x.dtype)
        return y * 2 if x.sum() > -1e4 else y


class Mixed(nn.Module):
    """Convolutions in half precision, a norm in single."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.conv(x)
        h = self.norm(h.float()).to(h.dtype).relu()
        return self.head(h.mean((2, 3)))

    def to_half(self, half):
        self.to(half)
        self.norm.float()
        return self


class Autocast(nn.Module):
    """Parts in half precision, within each other, beside one with gradients."""

    def __init__(self, branches=False):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.branches = branches

    def forward(self, x):
        if self.branches and x.sum() < -1e4:
            return x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.a(x).relu()
            with torch.autocast("cpu", enabled=False):
                h = self.b(h.float())
            with torch.enable_grad():
                h = h.relu()
            return self.c(h)


def conv_net():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    nn.init.uniform_(net[1].running_var, 0.5, 2)
    nn.init.normal_(net[1].running_mean, std=0.3)
    return net


PICTURE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)
SERIES = (torch.arange(2 * 3 * 16) * 0.7).sin().view(2, 3, 16)
IDS = torch.tensor([[1, 5, 3, 8], [2, 2, 7, 19]])

MODELS = {
    "conv": (conv_net, PICTURE, 1, None),
    "conv, by derivatives": (conv_net, PICTURE, 1, CPLRP()),
    "block": (TransformerBlock, IDS, (-1, 2), None),
    "block, all of attention": (TransformerBlock, IDS, (-1, 2), AttnLRP()),
    "block, bounded": (TransformerBlock, IDS, (-1, 2), GammaFlat()),
    "fused attention": (FusedAttention, SERIES, 2, None),
    "recurrent": (Recurrent, SERIES[..., :4].contiguous(), 0, None),
    "eager": (Branching, PICTURE[:1], 1, None),
    "mixed": (Mixed, PICTURE, 1, None),
}


def cast(tree, dtype):
    return pytree.tree_map_only(
        torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree
    )


def both(model, half, inputs, target, composite=None, **settings):
    """The measures of a model in half precision, and of its copy in single precision."""
    model = model.to_half(half) if hasattr(model, "to_half") else model.to(half)
    return measures(
        model, copy.deepcopy(model).float(), half, inputs, target, composite, **settings
    )


def measures(model, single, half, inputs, target, composite=None, **settings):
    inputs = cast(inputs, half)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    R, S = (
        nrm.Explainer(m, composite, **settings)(**cast(inputs, dtype), target=target)
        for m, dtype in ((model, half), (single, torch.float32))
    )
    after = model.state_dict()
    assert {name: x.dtype for name, x in before.items()} == {n: x.dtype for n, x in after.items()}
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    return R, S


def assert_same(R, S):
    assert R.output.dtype is torch.float32
    torch.testing.assert_close(R.output, S.output, rtol=1e-5, atol=1e-6)
    leaves = [variable.name for variable in S.graph.inputs]
    assert leaves == [variable.name for variable in R.graph.inputs]
    found, expected = (M.marginals(layers=leaves) for M in (R, S))
    for name in leaves:
        assert found[name].dtype is torch.float32
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5 * scale)
    assert R.diagnostics().worst_cut_deviation < 1e-5


@cache
def halved(make, half):
    """A model in half precision and its copy in single, the same each time: captured once."""
    torch.manual_seed(0)
    model = make().eval()
    model = model.to_half(half) if hasattr(model, "to_half") else model.to(half)
    return model, copy.deepcopy(model).float()


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(
    ("name", "half"),
    [(name, torch.bfloat16) for name in MODELS]  # float16 has another range: masks, large sums
    + [(name, torch.float16) for name in MODELS if name.startswith(("conv", "block"))],
    ids=str,
)
def test_a_half_model_is_answered_as_its_copy_in_single_precision(name, half):
    make, x, target, composite = MODELS[name]
    model, single = halved(make, half)
    argument = {nn.Sequential: "input", TransformerBlock: "ids"}.get(type(model), "x")
    R, S = measures(model, single, half, {argument: x}, target, composite)
    assert R.graph.captured.method == S.graph.captured.method
    assert (R.graph.captured.method == "eager") == (name == "eager")
    assert_same(R, S)


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_every_cut_of_a_half_model_sums_to_one(half):
    model, x = halved(conv_net, half)[0], PICTURE.to(half)
    explainer = nrm.Explainer(model)
    R = explainer(input=x, target=1)
    cuts = [layer.name for layer in explainer.layers(input=x) if layer.cut]
    assert len(cuts) > 8
    for name, relevance in R.marginals(layers=cuts).items():
        assert relevance.flatten(1).sum(1) == pytest.approx(1, abs=1e-4), name


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_pairs_of_channels(half):
    R, S = measures(*halved(conv_net, half), half, {"input": PICTURE}, 1)
    assert R.joint_method("6", "4") == "contraction"
    for method in ("auto", "backward", "contraction"):
        pairs = R.joint("6", "4", method=method)
        assert pairs.dtype is torch.float32
        torch.testing.assert_close(pairs, S.joint("6", "4", method=method), rtol=1e-4, atol=1e-6)
        assert pairs.flatten(1).sum(1) == pytest.approx(1, abs=1e-4)


def test_double_precision_stays():
    model, x = conv_net().eval().double(), PICTURE.double()
    R = nrm.Explainer(model)(x, target=1)
    assert R.output.dtype is R.heatmap().dtype is torch.float64
    assert R.diagnostics().worst_cut_deviation < 1e-12
    constants = R.graph.captured.constants.values()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert own <= {tensor.data_ptr() for tensor in constants}


def test_weights_in_single_precision_are_not_copied():
    model = Mixed().to_half(torch.bfloat16).eval()
    constants = nrm.Explainer(model).graph(PICTURE.bfloat16()).captured.constants
    kept = {tensor.data_ptr() for tensor in constants.values()}
    assert model.norm.weight.data_ptr() in kept
    assert model.conv.weight.data_ptr() not in kept


def test_a_weight_used_twice_is_copied_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    constants = nrm.Explainer(Tied().eval().bfloat16()).graph(IDS).captured.constants
    assert len({tensor.data_ptr() for tensor in constants.values()}) == 1


def test_a_changed_half_weight_is_noticed():
    model, x = conv_net().eval().bfloat16(), PICTURE.bfloat16()
    explainer = nrm.Explainer(model)
    R = explainer(x, target=1)
    with torch.no_grad():
        model[4].weight.mul_(2)
    with pytest.raises(QueryError, match="changed"):
        R.heatmap()
    again = nrm.Explainer(model)(x, target=1).heatmap()
    torch.testing.assert_close(explainer(x, target=1).heatmap(), again)


def test_a_capture_in_half_precision_is_used_again():
    explainer = nrm.Explainer(conv_net().eval().bfloat16())
    graph = explainer.graph(PICTURE.bfloat16())
    assert explainer.graph(PICTURE.repeat(2, 1, 1, 1).bfloat16()) is graph


def test_inputs_are_those_that_the_model_takes():
    explainer = nrm.Explainer(conv_net().eval().bfloat16())
    with pytest.raises(InputError, match="bfloat16"):
        explainer(PICTURE)
    with pytest.raises(InputError, match="float8"):
        explainer(PICTURE.to(torch.float8_e4m3fn))


def test_output_relevance_may_be_the_models_own_output():
    model, x = conv_net().eval().bfloat16(), PICTURE.bfloat16()
    relevance = model(x).detach().abs()
    explainer = nrm.Explainer(model)
    found = explainer(x, output_relevance=relevance).heatmap()
    torch.testing.assert_close(
        found, explainer(x, output_relevance=relevance.float()).heatmap(), rtol=0, atol=0
    )


@pytest.mark.parametrize("branches", [False, True], ids=["export", "eager"])
def test_autocast_within_a_model(branches):
    torch.manual_seed(0)
    model, x = Autocast(branches).eval(), torch.randn(1, 6)
    R = nrm.Explainer(model)(x, target=1)
    assert R.graph.captured.method == ("eager" if branches else "export")
    plain = nn.Sequential(model.a, nn.ReLU(), model.b, nn.ReLU(), model.c).eval()
    S = nrm.Explainer(plain)(x, target=1)
    assert_same(R, S)
    names = {variable.name for variable in R.graph.variables}
    assert {"a", "b", "c"} <= names


def test_autocast_around_a_call():
    model = conv_net().eval()
    expected = nrm.Explainer(model)(PICTURE, target=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        R = nrm.Explainer(model)(PICTURE, target=1)
    torch.testing.assert_close(R.output, expected.output)  # rounded it would be off by 1e-3
    torch.testing.assert_close(R.heatmap(), expected.heatmap())


def test_half_precision_as_torchs_default():
    class Defaults(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 4)

        def forward(self, x):
            shift = torch.arange(16) / 4 + torch.zeros(16)
            return self.a(x * torch.full((16,), 0.5) + shift) @ torch.eye(4)

    torch.set_default_dtype(torch.bfloat16)
    try:
        model, x = Defaults().eval(), SERIES[:, 0].bfloat16()
        R = nrm.Explainer(model)(x, target=1)
        relevance, output = R.heatmap(), R.output
    finally:
        torch.set_default_dtype(torch.float32)
    S = nrm.Explainer(copy.deepcopy(model).float())(x.float(), target=1)
    torch.testing.assert_close(output, S.output)
    torch.testing.assert_close(relevance, S.heatmap(), rtol=1e-4, atol=1e-5)


def test_numbers_in_8_bits_on_the_way():
    """Rounding, as any cast: relevance passes it; what the model stores so is a constant."""

    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 8)
            self.register_buffer("weight", torch.randn(3, 8).to(torch.float8_e4m3fn))

        def forward(self, x):
            h = self.first(x).to(torch.float8_e4m3fn).to(x.dtype)
            return h @ self.weight.to(x.dtype).t()

    torch.manual_seed(0)
    model = Quantised().eval()
    model.first.bfloat16()
    R = nrm.Explainer(model)(SERIES[:, 0].bfloat16(), target=1)
    assert R.output.dtype is torch.float32
    assert R.diagnostics().worst_cut_deviation < 1e-5


def test_bits_of_numbers_are_refused():
    class Bits(nn.Module):
        def forward(self, x):
            return (x.view(torch.int16) & -16).view(x.dtype) + x

    class Same(nn.Module):
        def forward(self, x):
            return x.view(x.dtype).sum(1) * 2

    x = SERIES.bfloat16()
    with pytest.raises(CaptureError, match="bits"):
        nrm.Explainer(Bits().eval())(x)
    R = nrm.Explainer(Same().eval())(x, target=3)
    torch.testing.assert_close(R.output, 2 * x.float().sum(1))


def test_a_graph_within_the_graph_is_refused():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 3)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda y: self.a(y), lambda y: -self.a(y), (x,))

    with pytest.raises(CaptureError, match=r"(?i)cond"):
        nrm.Explainer(Chooses().eval())(SERIES[:, 0])


def test_resnet(torchvision_models):
    torch.manual_seed(0)
    resnet = torchvision_models.resnet
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]).eval()
    x = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    R, S = both(model, torch.bfloat16, {"x": x}, 3)
    assert_same(R, S)
    torch.testing.assert_close(
        R.channels("layer3.0.conv1"), S.channels("layer3.0.conv1"), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "half"), [("gpt2", torch.float16), ("llama", torch.bfloat16)], ids=str
)
def test_language_models(torchvision_models, name, half):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=32, n_embd=32, n_layer=1, n_head=4,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    ids = torch.tensor([[3, 14, 15, 9, 26, 5]])
    inputs = {"input_ids": ids, "use_cache": False}
    R, S = both(model.eval(), half, inputs, (-1, 7), output="logits")
    assert_same(R, S)
    torch.testing.assert_close(R.tokens(), S.tokens(), rtol=1e-4, atol=1e-5)


def convolutions_are_full() -> bool:
    """Whether convolutions would be in full precision on a GPU that has a shorter one."""
    return not torch.backends.cudnn.allow_tf32


class Watched(nn.Module):
    """A convolution that notes in which precision it runs, also when it is captured."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append(convolutions_are_full())
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("telescopes", [True, False])
def test_relevance_is_found_in_full_precision(monkeypatch, telescopes):
    """On GPUs torch rounds convolutions by default: never those of nrm, and always put back."""
    assert not convolutions_are_full()
    model, seen = Watched().eval(), []
    composite = nrm.composites.LRPZero() if telescopes else GammaFlat()
    x = torch.rand(2, 1, 6, 6)
    R = nrm.Explainer(model, composite, bias="input" if telescopes else None)(x, target=0)
    assert all(model.seen)
    assert model.seen
    backward, forward = torch.autograd.grad, torch.nn.functional.conv2d

    def noted(function):
        def call(*args, **kwargs):
            seen.append(convolutions_are_full())
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch.autograd, "grad", noted(backward))
    monkeypatch.setattr(torch.nn.functional, "conv2d", noted(forward))
    R.heatmap()
    R.joint("conv", "head")
    R.conditionals(nrm.channels("conv", 1))
    R(~nrm.channels("conv", 1))
    assert all(seen)
    assert not convolutions_are_full()


def test_precision_is_put_back_after_an_error():
    from nrm.tensors import full_precision

    def fails():
        with full_precision():
            assert convolutions_are_full()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not convolutions_are_full()


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="since torch 2.9")
def test_precision_as_later_releases_of_torch_name_it():
    """Who has set it in the new way is not read in the old one, which torch refuses."""
    from nrm.tensors import full_precision

    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = torch.backends.fp32_precision, conv.fp32_precision, matmul.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with full_precision():
            assert conv.fp32_precision == matmul.fp32_precision == "ieee"
        assert conv.fp32_precision == matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision, conv.fp32_precision, matmul.fp32_precision = before
    assert torch.backends.cudnn.allow_tf32
