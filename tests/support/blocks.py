"""Networks for walks through blocks, and for references: skips, gates, attention, steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import nrm


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Pictures(nn.Module):
    """A skip connection, poolings, norms; the layer `one` lies in a branch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        return self.above(h, torch.relu(self.bn(self.one(h))))

    def above(self, h: Tensor, inner: Tensor) -> Tensor:
        """What is computed from the branch's activation, beside what bypasses it."""
        h = nn.functional.max_pool2d(h + inner, 2)
        h = torch.cat([h[:, :2] * torch.sigmoid(h[:, 2:]), self.two(h)[:, :2]], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(h, 1).flatten(1))


class Words(nn.Module):
    """Embedded tokens, attention with a mask, rows of all tokens of all samples in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.above(self.words(ids), mask)

    def above(self, h: Tensor, mask: Tensor) -> Tensor:
        parts = self.qkv(self.norm(h)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in parts)
        seen = mask[:, None, None, :]
        a = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        h = h + self.out(a.transpose(1, 2).flatten(2))
        rows = h.reshape(-1, 6)
        h = h + self.down(nn.functional.gelu(self.up(rows))).view(h.shape)
        return self.head(torch.tanh(h).mean(1))


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


IDS, MASK = (
    torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]),
    torch.tensor([[True] * 4, [True] * 3 + [False]]),
)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], str, int | str]] = {
    "channels of a branch": (Pictures, (drawn(2, 2, 6, 6),), "bn", "channel"),
    "channels before a skip": (Pictures, (drawn(2, 2, 6, 6),), "stem", "channel"),
    "rows of a picture": (Pictures, (drawn(2, 2, 6, 6),), "input", 1),
    "tokens": (Words, (IDS, MASK), "words", 0),
    "neurons in rows of all samples": (Words, (IDS, MASK), "up", "channel"),
    "steps": (Steps, (drawn(2, 4, 2),), "input", 0),
}


def case(name: str) -> tuple[nn.Module, tuple[Tensor, ...], nrm.Measure, nrm.Blocks]:
    make, inputs, layer, by = CASES[name]
    model = seeded(make)
    R = nrm.Explainer(model, nrm.composites.LRPZero())(*inputs, target=1)
    return model, inputs, R, nrm.Blocks(R, layer, by=by)


def pictures(**options: object) -> tuple[nrm.Measure, nrm.Blocks]:
    R = nrm.Explainer(seeded(Pictures))(drawn(2, 2, 6, 6), target=1)
    return R, nrm.Blocks(R, "stem", **options)
