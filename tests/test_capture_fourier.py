"""Linear maps by way of complex numbers, as networks write them: exact, or named."""

import pytest
import torch
from torch import nn

import nrm
from nrm import rules
from nrm.errors import UnsupportedOperatorError

SIGNAL = torch.randn((2, 3, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WINDOW = torch.hann_window(4, dtype=torch.float64)


class Of(nn.Module):
    """A function of the input, a linear layer and a complex weight."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.o = nn.Linear(3, 2).double()
        self.w = nn.Parameter(torch.randn(3, 3, 2, dtype=torch.complex128))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def operator_layer(m, x):
    """A layer of a Fourier neural operator: it writes the low modes into zeros."""
    spectrum = torch.fft.rfft(x)
    kept = torch.zeros_like(spectrum)
    kept[:, :, :2] = torch.einsum("bix,iox->box", spectrum[:, :, :2], m.w)
    return m.o(torch.fft.irfft(kept, n=x.shape[-1])[..., 1])


def masked(m, x):
    low = torch.arange(5) < 2
    return m.o(torch.fft.irfft(torch.where(low, torch.fft.rfft(x), 0), n=8).mean(2))


def transformed(x):
    return torch.stft(x[:, 0], 4, window=WINDOW, return_complex=True)


LINEAR = {
    "real transforms": lambda m, x: m.o(torch.fft.irfft(torch.fft.rfft(x) * 2, n=8)[..., 0]),
    "an operator layer": operator_layer,
    "a mask of modes": masked,
    "a long convolution": lambda m, x: m.o(
        torch.fft.irfft(
            torch.fft.rfft(x, n=16) * torch.fft.rfft(m.o.weight.repeat(2, 3)[:3, :8], n=16), n=16
        )[..., 3]
    ),
    "there and back in short time": lambda m, x: m.o(
        torch.istft(transformed(x), 4, window=WINDOW, length=8)[:, :3]
    ),
    "parts joined": lambda m, x: m.o(torch.view_as_real(transformed(x)).flatten(1)[:, :3]),
    "rectified parts": lambda m, x: m.o(
        torch.relu(torch.fft.fft(x).real[..., 1]) + torch.relu(torch.fft.fft(x).imag[..., 1])
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_gradient_times_input(name):
    model = Of(LINEAR[name]).eval()
    R = nrm.Explainer(model, rules.Zero(), bias="input")(SIGNAL, target=1)
    held = SIGNAL.clone().requires_grad_()
    with torch.enable_grad():
        model(held)[:, 1].sum().backward()
    torch.testing.assert_close(R.heatmap() * R.scale.view(-1, 1, 1), held.grad * SIGNAL)


NAMED = {
    "a magnitude": (lambda m, x: m.o(transformed(x).abs()[:, :, 0]), "stft"),
    "a product of spectra": (
        lambda m, x: m.o(torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x.tanh()))[..., 0]),
        "fft_rfft",
    ),
    "numbers other than zero": (
        lambda m, x: m.o(torch.where(torch.arange(8) < 2, torch.fft.fft(x), 1).real[..., 0]),
        "fft_fft",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_others_are_named(name):
    function, first = NAMED[name]
    with pytest.raises(UnsupportedOperatorError, match=rf"aten\.{first}.*complex numbers"):
        nrm.Explainer(Of(function).eval(), rules.Zero(), bias="input")(SIGNAL, target=1)
