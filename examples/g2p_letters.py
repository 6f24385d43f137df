"""Which letters a phoneme comes from: the GRU encoder-decoder of the package g2p-en, explained.

    pip download --no-deps g2p-en && unzip -j g2p_en-*.whl g2p_en/checkpoint20.npz
    python examples/g2p_letters.py checkpoint20.npz nightingale --out letters.png

The encoder reads the letters, the decoder what it has spoken so far. The relevance of every
phoneme is shared out among all letters and the phonemes before it: one capture, one forward pass,
and all phonemes in one run (`R.by_target`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nrm

LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
"""Each is spoken without stress, or with the first or second."""
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
START, END, LONGEST = 2, 3, 20


def phonemes() -> list[str]:
    """The decoder's outputs, in the order of its weights."""
    stressed = [vowel + stress for vowel in VOWELS.split() for stress in "012"]
    return ["<pad>", "<unk>", "<s>", "</s>", *sorted([*stressed, "UW", *CONSONANTS.split()])]


class G2P(nn.Module):
    """Letters `[batch, n]` and what was spoken before `[batch, m]` to phonemes `[batch, m, 74]`."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        size = weights["fc_w"].shape[1]
        self.letters, self.spoken = nn.Embedding(29, size), nn.Embedding(74, size)
        self.encoder, self.decoder = (nn.GRU(size, size, batch_first=True) for _ in range(2))
        self.output = nn.Linear(size, 74)
        named = {"letters.weight": "enc_emb", "spoken.weight": "dec_emb"}
        named |= {"output.weight": "fc_w", "output.bias": "fc_b"}
        for part in ("encoder", "decoder"):
            for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
                kind = "weight" if name[0] == "w" else "bias"
                named[f"{part}.{kind}_{name[2:]}_l0"] = f"{part[:3]}_{name}"
        self.load_state_dict({name: torch.tensor(weights[of]) for name, of in named.items()})

    def forward(self, letters: Tensor, spoken: Tensor) -> Tensor:
        _, last = self.encoder(self.letters(letters))
        states, _ = self.decoder(self.spoken(spoken), last)
        logits: Tensor = self.output(states)
        return logits


def speak(model: G2P, word: str) -> tuple[Tensor, list[int]]:
    """The letters as the model takes them, and the phonemes that it says, the end included."""
    letters = torch.tensor([[*(LETTERS.index(c) if c in LETTERS else 1 for c in word), 2]])
    said: list[int] = []
    with torch.no_grad():
        while len(said) < LONGEST and (not said or said[-1] != END):
            said.append(int(model(letters, torch.tensor([[START, *said]]))[0, -1].argmax()))
    return letters, said


def explained(model: G2P, word: str) -> tuple[list[str], Tensor]:
    """The phonemes, and `[phonemes, letters]`: the share of each that comes from every letter."""
    letters, said = speak(model, word)
    before = torch.tensor([[START, *said[:-1]]])
    R = nrm.Explainer(model)(letters, before, target=(0, said[0]))
    found = R.by_target(list(enumerate(said)), at="letters").sum(-1)[:, 0]
    return [phonemes()[phoneme] for phoneme in said], found


def draw(word: str, names: list[str], shares: Tensor, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1.5 + 0.5 * len(word), 1 + 0.35 * len(names)))
    bound = float(shares.abs().max())
    axes.imshow(shares, cmap="RdBu_r", vmin=-bound, vmax=bound)
    axes.set_xticks(range(len(word) + 1), [*word, "end"])
    axes.set_yticks(range(len(names)), names)
    axes.set_title("relevance of letters (blue: against)", fontsize=9)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("word")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with np.load(options.checkpoint) as weights:  # no pickles
        model = G2P(weights).eval()
    names, shares = explained(model, options.word)
    for name, row in zip(names, shares, strict=True):
        letters = " ".join(f"{c}{v:+.2f}" for c, v in zip([*options.word, "$"], row, strict=True))
        sys.stdout.write(f"{name:5} {letters}  (rest: earlier phonemes {1 - row.sum():+.2f})\n")
    if options.out:
        draw(options.word, names, shares, options.out)


if __name__ == "__main__":
    main()
