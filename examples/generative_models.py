"""One denoising step explained: which patch of the latent picture, which word of the prompt.

    python examples/generative_models.py --out step.png

Three small networks with random weights, built as those of latent diffusion are: a U-Net with
cross-attention to a text, a diffusion transformer (DiT) whose tokens read the text beside the
patches, and the decoder of a variational autoencoder. What is explained is the mean of what a
network predicts within a window; the relevance is shared out among the latent's patches, the
words, the time and the biases, and adds up to one. With trained weights nothing else changes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nrm

WORDS = ["a", "small", "red", "house", "by", "the", "sea"]
CHANNELS, SIDE, PATCH, WIDTH = 4, 16, 4, 32
WINDOW = (slice(4, 8), slice(8, 12))
"""Rows and columns of the output that are explained."""


def of_time(t: Tensor) -> Tensor:
    """Sines and cosines of a time `[batch]`: `[batch, WIDTH]`."""
    speed = torch.exp(-torch.arange(WIDTH // 2, dtype=t.dtype) * (8 / WIDTH))
    angle = t[:, None] * speed
    return torch.cat([angle.sin(), angle.cos()], 1)


class Attention(nn.Module):
    """Every `x` looks at every `y`, with four heads; `seen` hides the padding of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(z).unflatten(-1, (4, -1)).transpose(1, 2)
            for layer, z in ((self.query, x), (self.key, y), (self.value, y))
        )
        mask = None if seen is None else seen[:, None, None, :].bool()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        made: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return made


class Block(nn.Module):
    """A residual block of a diffusion network: group norms, and the time added in between."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.time, self.shortcut = nn.Linear(WIDTH, out), nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time(F.silu(time))[..., None, None]
        made: Tensor = self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return made


class UNet(nn.Module):
    """Predicts the noise in a latent at a time, reading a text (Rombach et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, WIDTH)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.first = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.down, self.middle = Block(WIDTH, WIDTH), Block(WIDTH, WIDTH)
        self.shrink = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.itself, self.text = Attention(), Attention()
        self.up = Block(2 * WIDTH, WIDTH)
        self.norm, self.last = nn.GroupNorm(4, WIDTH), nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)

    def forward(self, latent: Tensor, t: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        words, time = self.words(text), self.time(of_time(t))
        skip = self.down(self.first(latent), time)
        h = self.middle(self.shrink(skip), time)
        x = h.flatten(2).transpose(1, 2)
        normed = self.norms[0](x)
        x = x + self.itself(normed, normed)
        x = x + self.text(self.norms[1](x), words, seen)
        h = F.interpolate(x.transpose(1, 2).view(h.shape), scale_factor=2.0, mode="nearest")
        h = self.up(torch.cat([h, skip], 1), time)
        noise: Tensor = self.last(F.silu(self.norm(h)))
        return noise


class DiT(nn.Module):
    """Patches and words in one sequence; the time scales and shifts (Peebles & Xie 2023)."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, WIDTH)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.patches = nn.Conv2d(CHANNELS, WIDTH, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.1 * torch.randn(1, (SIDE // PATCH) ** 2, WIDTH))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attentions = nn.ModuleList(Attention() for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(layers)
        )
        self.modulate = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(layers))
        self.last = nn.Linear(WIDTH, CHANNELS * PATCH * PATCH)

    def forward(self, latent: Tensor, t: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        x = self.patches(latent).flatten(2).transpose(1, 2) + self.positions
        count = x.shape[1]
        x = torch.cat([x, self.words(text)], 1)
        seen = torch.cat([torch.ones_like(seen[:, :1]).expand(-1, count), seen], 1)
        time = F.silu(self.time(of_time(t)))
        for attention, mlp, modulate in zip(self.attentions, self.mlps, self.modulate, strict=True):
            shift, scale, shift2, scale2 = modulate(time)[:, None].chunk(4, -1)
            h = self.norm(x) * (1 + scale) + shift
            x = x + attention(h, h, seen)
            x = x + mlp(self.norm(x) * (1 + scale2) + shift2)
        side = SIDE // PATCH
        pixels = (
            self.last(x[:, :count]).unflatten(1, (side, side)).unflatten(3, (CHANNELS, PATCH, -1))
        )
        return torch.einsum("bhwcpq->bchpwq", pixels).reshape(latent.shape)


class Decoder(nn.Module):
    """From a latent to a picture of twice its side, as a variational autoencoder does it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1), Block(WIDTH, WIDTH)
        self.norm, self.last = nn.GroupNorm(4, WIDTH), nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        h = F.interpolate(self.middle(self.first(latent)), scale_factor=2.0, mode="nearest")
        picture: Tensor = self.last(F.silu(self.norm(h)))
        return picture


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A noisy latent, its time, a text of seven words with one place of padding, and its mask."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, CHANNELS, SIDE, SIDE, generator=generator, dtype=dtype)
    text = torch.tensor([[*range(1, len(WORDS) + 1), 0]])
    return latent, torch.tensor([7.0], dtype=dtype), text, (text > 0).long()


def by_patch(relevance: Tensor) -> Tensor:
    """`[channels, side, side]` added up by patch: `[side / PATCH, side / PATCH]`."""
    side = relevance.shape[-1] // PATCH
    return relevance.sum(0).view(side, PATCH, side, PATCH).sum((1, 3))


def step(model: nn.Module, *given: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """Of one denoising step: the shares of every patch, of every word, of the time, and the rest.

    The rest is that of biases and other constants, such as the positions.
    """
    R = nrm.Explainer(model)(*given, target=nrm.Average(slice(None), *WINDOW))
    patches, words = by_patch(R.heatmap(at="latent")[0]), R.tokens(at="words")[0]
    time = float(R.heatmap(at="t").sum())
    return patches, words, time, 1 - float(patches.sum() + words.sum()) - time


def draw(rows: list[tuple[str, Tensor, Tensor | None]], path: Path) -> None:
    """A row for each network: its patches, and its words."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.5 * len(rows)), dpi=130, layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for (title, patches, words), (left, right) in zip(rows, grid, strict=True):
        bound = float(patches.abs().max())
        drawn = left.imshow(patches, cmap="PuOr_r", vmin=-bound, vmax=bound)
        scale = 1 if "decoder" not in title else 2  # its picture is twice as large
        rows_, columns = ((w.start / PATCH / scale, w.stop / PATCH / scale) for w in WINDOW)
        x, y = (columns[0] - 0.5, columns[1] - 0.5), (rows_[0] - 0.5, rows_[1] - 0.5)
        left.plot([x[0], x[1], x[1], x[0], x[0]], [y[0], y[0], y[1], y[1], y[0]], "k--", lw=1.2)
        left.set_title(f"{title}: patches of the latent", fontsize=9)
        left.set(xticks=[], yticks=[])
        figure.colorbar(drawn, ax=left, shrink=0.8).ax.tick_params(labelsize=7)
        if words is None:
            right.set_axis_off()
            continue
        names = [*WORDS, "(padding)"]
        colours = ["#e66101" if value > 0 else "#5e3c99" for value in words.tolist()]
        right.barh(range(len(names)), words.tolist(), color=colours)
        right.set_yticks(range(len(names)), names, fontsize=8)
        right.invert_yaxis()
        right.axvline(0, color="0.4", lw=0.6)
        right.tick_params(axis="x", labelsize=7)
        right.set_title("words", fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to draw them")
    options = parser.parse_args()
    rows: list[tuple[str, Tensor, Tensor | None]] = []
    for name, make in (("U-Net", UNet), ("DiT", DiT)):
        torch.manual_seed(0)
        patches, words, time, rest = step(make().eval(), *inputs())
        said = "  ".join(f"{w} {v:+.3f}" for w, v in zip([*WORDS, "(padding)"], words, strict=True))
        place = divmod(int(patches.argmax()), patches.shape[1])
        sys.stdout.write(
            f"{name}: latent {float(patches.sum()):+.3f} (most: patch {place}, "
            f"{float(patches.max()):+.3f}), words {float(words.sum()):+.3f}, time {time:+.3f}, "
            f"biases and other constants {rest:+.3f}\n  {said}\n"
        )
        rows.append((name, patches, words))
    torch.manual_seed(0)
    R = nrm.Explainer(Decoder().eval())(inputs()[0], target=nrm.Average(slice(None), *WINDOW))
    patches = by_patch(R.heatmap()[0])
    sys.stdout.write(f"decoder: latent {float(patches.sum()):+.3f}\n")
    rows.append(("decoder", patches, None))
    if options.out:
        draw(rows, options.out)


if __name__ == "__main__":
    main()
