"""The examples, on weights made here where the real ones are not at hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nrm

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def g2p(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import g2p_letters

    yield g2p_letters
    sys.modules.pop("g2p_letters")


def weights(size: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {"enc_emb": (29, size), "dec_emb": (74, size), "fc_w": (74, size), "fc_b": (74,)}
    for part in ("enc", "dec"):
        shapes |= {f"{part}_w_{w}": (3 * size, size) for w in ("ih", "hh")}
        shapes |= {f"{part}_b_{b}": (3 * size,) for b in ("ih", "hh")}
    return {name: generator.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def states(w: dict[str, np.ndarray], part: str, x: np.ndarray, h: np.ndarray) -> list[np.ndarray]:
    """The package's own GRU: the reset gate after the product with the state."""
    found, size = [], h.shape[-1]
    for value in x:
        a = w[f"{part}_w_ih"] @ value + w[f"{part}_b_ih"]
        b = w[f"{part}_w_hh"] @ h + w[f"{part}_b_hh"]
        r, z = (1 / (1 + np.exp(-(a + b)[k * size : (k + 1) * size])) for k in (0, 1))
        h = (1 - z) * np.tanh(a[2 * size :] + r * b[2 * size :]) + z * h
        found.append(h)
    return found


def test_letters_of_phonemes(g2p, monkeypatch) -> None:
    monkeypatch.setattr(g2p, "LONGEST", 3)
    made = weights(6)
    model = g2p.G2P(made).eval()
    letters, said = g2p.speak(model, "cat")
    h = states(made, "enc", made["enc_emb"][letters[0]], np.zeros(6))[-1]
    spoken = made["dec_emb"][[g2p.START, *said[:-1]]]
    logits = np.stack(states(made, "dec", spoken, h)) @ made["fc_w"].T + made["fc_b"]
    assert logits.argmax(1).tolist() == said
    names, shares = g2p.explained(model, "cat")
    assert shares.shape == (len(said), 4)
    assert names == [g2p.phonemes()[phoneme] for phoneme in said]
    assert len(g2p.phonemes()) == 74
    before = torch.tensor([[g2p.START, *said[:-1]]])
    alone = nrm.Explainer(model)(letters, before, target=(1, said[1]))
    torch.testing.assert_close(shares[1], alone.tokens(at="letters")[0])


# -- one denoising step ----------------------------------------------------------------------------


@pytest.fixture
def generative(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import generative_models

    yield generative_models
    sys.modules.pop("generative_models")


def frozen_norm(x, dims, weight, bias, eps):
    mean, scale = x.mean(dims, keepdim=True), x.var(dims, keepdim=True, unbiased=False).add(eps)
    shape = [1, -1, *[1] * (x.dim() - 2)] if len(dims) > 1 else [-1]
    normed = (x - mean) * scale.rsqrt().detach()
    return normed, weight.view(shape), bias.view(shape)


def freeze(monkeypatch, functional) -> None:
    """Attention weights, scales and slopes without derivatives, as the default takes them."""

    def group_norm(x, groups, weight, bias, eps=1e-5):
        grouped = x.unflatten(1, (groups, -1))
        normed, weight, bias = frozen_norm(grouped, (2, 3, 4), weight, bias, eps)
        return normed.flatten(1, 2) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
        normed, weight, bias = frozen_norm(x, (-1,), weight, bias, eps)
        return normed * weight + bias

    def attention(q, k, v, attn_mask=None):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        return scores.softmax(-1).detach() @ v

    monkeypatch.setattr(functional, "group_norm", group_norm)
    monkeypatch.setattr(functional, "layer_norm", layer_norm)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(functional, "silu", lambda x: x * x.sigmoid().detach())


def test_a_denoising_step_is_gradient_times_input(generative, monkeypatch) -> None:
    """Of a U-Net, with all that takes no relevance frozen by hand; padding takes nothing."""
    torch.manual_seed(0)
    model, given = generative.UNet().eval().double(), generative.inputs(torch.float64)
    window = (slice(None), slice(None), *generative.WINDOW)
    patches, words, time, rest = generative.step(model, *given)
    assert patches.shape == (4, 4)
    assert words[-1] == 0
    assert float(patches.sum() + words.sum()) + time + rest == pytest.approx(1)
    freeze(monkeypatch, torch.nn.functional)
    latent, t = (x.clone().requires_grad_() for x in given[:2])
    embedded = model.words(given[2]).detach().requires_grad_()
    monkeypatch.setattr(model.words, "forward", lambda ids: embedded)
    explained = model(latent, t, *given[2:])[window].mean()
    leaves = torch.autograd.grad(explained, (latent, embedded))
    shares = [(x * g / explained).detach() for x, g in zip((latent, embedded), leaves, strict=True)]
    torch.testing.assert_close(patches, generative.by_patch(shares[0][0]))
    torch.testing.assert_close(words, shares[1][0].sum(-1))


@pytest.mark.parametrize("name", ["UNet", "DiT", "Decoder"])
def test_denoising_adds_up_over_every_cut(generative, name: str) -> None:
    torch.manual_seed(0)
    model, given = getattr(generative, name)().eval().double(), generative.inputs(torch.float64)
    given = given[:1] if name == "Decoder" else given
    target = nrm.Average(slice(None), *generative.WINDOW)
    R = nrm.Explainer(model)(*given, target=target)
    assert R.diagnostics().worst_cut_deviation < 1e-10
    if name == "DiT":
        assert R.tokens(at="words")[0, -1] == 0
    if name == "Decoder":  # the window of the picture lies over the second patch
        assert int(generative.by_patch(R.heatmap()[0]).abs().argmax()) == 1


def test_denoising_is_drawn(generative, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [("U-Net", torch.randn(4, 4), torch.randn(8)), ("decoder", torch.randn(4, 4), None)]
    generative.draw(rows, tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes()[:4] == b"\x89PNG"


def test_a_series_is_opened_in_the_explorer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An LSTM that has learnt where to look."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import explore as example

    from nrm.explore.answers import Columns, Request
    from nrm.explore.session import Sessions

    try:
        opened = example.series()
        session = Sessions(opened).new()
        part = {"layer": "input", "channels": [4], "axis": 0}
        request = Request.read({"columns": session.columns(0)[1], "selection": part})
        parts = list(session.answer(0, request, session.turn()))
        (columns,) = (one for one in parts if isinstance(one, Columns))
        R = opened.measure(opened.inputs[0])
        by_step = R.heatmap().sum(-1)[0]
        assert columns.total.value == pytest.approx(float(by_step[4]), abs=1e-6)
        assert int(by_step.abs().argmax()) == 4  # where the event is
    finally:
        sys.modules.pop("explore")
