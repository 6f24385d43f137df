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
