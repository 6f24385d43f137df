"""What depends on an input and is not followed is named: it never counts as a constant."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nrm
from nrm import rules
from nrm.errors import CaptureError, UnsupportedOperatorError

pytestmark = pytest.mark.usefixtures("captured_once")


class Of(nn.Module):
    """A function of the input and a linear layer."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.o = nn.Linear(3, 2).double()
        self.function = function

    def forward(self, *inputs):
        return self.function(self.o, *inputs)


X = torch.tensor([[0.9, 0.2, 0.6], [0.3, 0.7, 0.1]], dtype=torch.float64)


@cache
def of(function):
    """The same object every time, so that it is captured once."""
    return Of(function).eval()


def explained(function, *inputs, bias="input", rule=None):
    explainer = nrm.Explainer(of(function), rule or rules.Zero(), bias=bias)
    return explainer(*(inputs or (X,)), target=0)


def gradient_times_input(model, x, target=0):
    held = x.clone().requires_grad_()
    with torch.enable_grad():
        model(held)[:, target].sum().backward()
    return held.grad * x


def turned(x):
    """A rotation of each two of six, as rotary embeddings are written in some models."""
    pairs = torch.view_as_complex(x.repeat(1, 2).view(-1, 3, 2))
    by = torch.polar(torch.ones(3, dtype=x.dtype), torch.arange(3).to(x))
    return torch.view_as_real(pairs * by).sum(-1)


LINEAR = {
    "a Fourier transform beside": lambda o, x: o(x + torch.fft.fft(x).real),
    "its imaginary part": lambda o, x: o(x + torch.fft.fft(x.flip(-1)).imag),
    "there and back": lambda o, x: o(torch.fft.irfft(torch.fft.rfft(x), n=3)),
    "a filter": lambda o, x: o(
        torch.fft.ifft(torch.fft.fft(x) * torch.polar(x.new_ones(3), x.new_ones(3))).real
    ),
    "two inputs of one": lambda o, x: o(torch.fft.ifft(torch.complex(x, 2 * x.flip(-1))).imag),
    "rotations": lambda o, x: o(turned(x)),
    "a short-time transform": lambda o, x: (
        o(x)
        + torch.view_as_real(
            torch.stft(x.repeat(1, 4), 4, window=x.new_ones(4), return_complex=True)
        ).sum((1, 2))
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_maps_through_complex_numbers_are_exact(name):
    model = Of(LINEAR[name]).eval()
    R = explained(LINEAR[name])
    torch.testing.assert_close(R.heatmap() * R.scale[:, None], gradient_times_input(model, X))
    rest = R.scale - gradient_times_input(model, X).sum(1)  # the bias of the layer
    torch.testing.assert_close(R.biases()["o.bias"] * R.scale, rest)


NOT_LINEAR = {
    "an absolute value": lambda o, x: o(x + torch.fft.fft(x).abs()),
    "a power spectrum": lambda o, x: o(x + (torch.fft.fft(x) * torch.fft.fft(x).conj()).real),
    "a constant between": lambda o, x: o(x + (torch.fft.fft(x) + 1).real),
    "a factor of unknown kind": lambda o, x: o(x * torch.fft.fft(x).abs()),
    "the only way": lambda o, x: o(torch.fft.fft(x).abs()),
}


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_others_are_refused_by_the_first_complex_operator(name, bias):
    with pytest.raises(UnsupportedOperatorError, match=r"fft_fft.* complex numbers"):
        explained(NOT_LINEAR[name], bias=bias)


def test_a_complex_input_is_no_constant():
    with pytest.raises(UnsupportedOperatorError, match=r"input .* complex numbers"):
        explained(lambda o, x, z: o(x) + z.real, X, torch.ones(2, 2, dtype=torch.complex128))


def test_complex_gates_and_indices_take_nothing():
    plain = explained(lambda o, x: o(x), bias="drop").heatmap()
    ranked = explained(
        lambda o, x: o(x + 0 * x.gather(1, torch.fft.fft(x).abs().topk(3, -1).indices)),
        bias="drop",
    )
    torch.testing.assert_close(ranked.heatmap(), plain)
    gated = explained(lambda o, x: o(x * torch.fft.fft(x).abs().softmax(-1)))
    gate = torch.fft.fft(X).abs().softmax(-1)
    weight = Of(None).o.weight[0].detach()
    torch.testing.assert_close(gated.heatmap() * gated.scale[:, None], X * gate * weight)


class Mixing(nn.Module):
    """A layer of FNet: tokens are mixed by a Fourier transform over positions and features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, ids):
        h = self.table(ids)
        h = self.norm(h + torch.fft.fftn(h, dim=(1, 2)).real)
        return self.head(torch.relu(self.hidden(h)).mean(1))


def test_fourier_mixing_of_tokens_is_gradient_times_input():
    model = Mixing().double().eval()
    ids = torch.tensor([[1, 2, 3], [0, 5, 6]])
    R = nrm.Explainer(model)(ids, target=1)
    assert R.tokens().abs().min() > 1e-3
    vectors = model.table(ids).detach().requires_grad_()
    with torch.enable_grad():
        h = vectors + torch.fft.fftn(vectors, dim=(1, 2)).real
        centred = h - h.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.detach().pow(2).mean(-1, keepdim=True) + 1e-5)
        h = centred * scale * model.norm.weight + model.norm.bias
        model.head(torch.relu(model.hidden(h)).mean(1))[:, 1].sum().backward()
    expected = (vectors * vectors.grad).sum(-1).detach()
    torch.testing.assert_close(R.tokens() * R.scale[:, None], expected)


# -- numbers that leave tensors -------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda o, x: o(x * x.mean().item()),
        lambda o, x: o(x) + x[0, 0].item(),
        lambda o, x: o(x) + float(x.sum()),
        lambda o, x: o(x + torch.from_numpy(x.numpy() ** 2)),
        lambda o, x: o(x + torch.tensor(x.tolist(), dtype=x.dtype)),
        lambda o, x: o(x / float(x.abs().max())),
    ],
)
def test_numbers_taken_out_of_tensors_are_refused(function):
    for dtype in (torch.float64, torch.float32):
        model = Of(function).to(dtype).eval()
        with pytest.raises(
            (UnsupportedOperatorError, CaptureError), match=r"out of tensors|Python"
        ):
            nrm.Explainer(model, rules.Zero(), bias="input")(X[:1].to(dtype), target=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda o, x: o(2 * x) if x.sum() > 0 else o(x),
        lambda o, x: o(x[:, : int(x.argmax()) + 3] * 2),
        lambda o, x: o(x * (2 if float(x[0, 0]) > 0.5 else 1)),
    ],
)
def test_a_branch_that_python_took_is_followed(function):
    model = Of(function).eval()
    R = nrm.Explainer(model, rules.Zero(), bias="input")(X[:1], target=0)
    weight = model.o.weight[0].detach()
    torch.testing.assert_close(R.heatmap() * R.scale[:, None], 2 * X[:1] * weight)


# -- steps ----------------------------------------------------------------------------------------


def one_hot(h):
    return F.one_hot(h.argmax(-1), 2).to(h)


STEPS = {
    "a comparison": (lambda o, x: o(x) + (x[:, :2] > 0.5).to(x), ":add.gt"),
    "scaled": (lambda o, x: o(x) - 0.5 * (x[:, :2] > 0.5).to(x), ":sub.gt"),
    "an index": (lambda o, x: (h := o(x)) + one_hot(h), ":add.argmax"),
    "a cast": (lambda o, x: o(x) + (3 * x).long().to(x)[:, :2], ":add.to"),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_that_are_added_are_leaves_of_their_own(name):
    function, leaf = STEPS[name]
    model = Of(function).eval()
    R = explained(function)
    assert set(R.biases()) == {leaf, "o.bias"}
    torch.testing.assert_close(R.heatmap() * R.scale[:, None], gradient_times_input(model, X))
    step = (model(X) - model.o(X))[:, 0].detach()
    torch.testing.assert_close(R.biases()[leaf] * R.scale, step)
    kinds = {v.name: v.kind for v in R.graph.leaves}
    assert kinds[leaf] == "constant"
    assert kinds["o.bias"] == "bias"
    assert explained(function, bias="drop").biases() == {}


def test_inputs_without_real_values_that_are_added_are_named():
    whole = torch.tensor([[1, 2], [3, 4]])
    R = explained(lambda o, x, ages: o(x) + ages.to(x), X, whole)
    name = R.graph.captured.names[1]
    torch.testing.assert_close(R.biases()[f":add.{name}"] * R.scale, whole[:, 0].double())

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.o = nn.Linear(3, 2).double()

        def forward(self, x, mask):
            return self.o(x) + mask

    R = nrm.Explainer(Masked().eval(), rules.Zero(), bias="input")(X, X[:, :2], target=0)
    assert set(R.biases()) == {"o.bias", ":add.mask"}


@pytest.mark.parametrize(
    "function",
    [
        lambda o, x: o(x * (x > 0.25).to(x)),
        lambda o, x: o(x.masked_fill(x < 0.25, 0.0)),
        lambda o, x: o(torch.where(x > 0.25, x, 0.0)),
    ],
)
def test_steps_that_multiply_are_gates(function):
    R = explained(function)
    weight = Of(None).o.weight[0].detach()
    torch.testing.assert_close(R.heatmap() * R.scale[:, None], X * (X > 0.25) * weight)
    assert set(R.biases()) == {"o.bias"} or float(R.biases()["o.bias"].abs().min()) > 0


def test_sizes_are_constants():
    R = explained(lambda o, x: o(x) + x.shape[1] * torch.ones_like(x)[:, :2])
    assert set(R.biases()) == {"o.bias", ":add.bias"}
