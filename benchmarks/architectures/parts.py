"""torch's own transformers, parts of networks, and small networks of odd shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.architectures.cases import Case, case


@case("nn.TransformerEncoder")
def _transformer_encoder(layers: int = 3) -> Case:
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return Case(model, (torch.randn(1, 10, 32),), target=(4, None))


class Bag(nn.Module):
    """A bag of words and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 16, mode="mean")
        self.perceptron = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.perceptron(self.bag(ids))
        return scores


@case("EmbeddingBag")
def _bag() -> Case:
    return Case(Bag(), (torch.randint(50, (1, 10)),))


@case("GroupNorm and InstanceNorm")
def _norms() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.InstanceNorm2d(16, affine=True),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return Case(model, (torch.randn(1, 3, 24, 24),))


class EinsumAttention(nn.Module):
    """Attention written with einsum, and a gated linear unit, each beside a skip connection."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gated = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GLU())
        self.down, self.head = nn.Linear(2 * width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
        x = x + self.down(self.gated(x))
        scores: Tensor = self.head(x.mean(1))
        return scores


@case("einsum attention and GLU")
def _einsum() -> Case:
    return Case(EinsumAttention(), (torch.randn(1, 10, 32),))


class Branching(nn.Module):
    """Goes as deep as its input asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(8, 32), nn.Linear(32, 32)
        self.even, self.odd = nn.Linear(32, 5), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        depth = 1 + int(h.sum() > 1) + int(h.max() > 1)
        for _ in range(depth):
            h = F.relu(self.again(h)) + h
        scores: Tensor = self.even(h) if depth % 2 == 0 else self.odd(h)
        return scores


@case("data-dependent control flow")
def _branching() -> Case:
    note = "captured anew at every call, which is most of the ratio"
    return Case(Branching(), (torch.randn(1, 8),), note=note)


# torch's transformers, with masks -----------------------------------------------------------------


class Masked(nn.Module):
    """torch's encoder of words, told which of them are padding."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.embed = causal, nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=causal)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        found = self.encoder(
            self.embed(ids),
            mask=mask.to(self.head.weight.dtype) if self.causal else None,
            src_key_padding_mask=None if self.causal else ids == 0,
        )
        scores: Tensor = self.head(found[:, -1 if self.causal else 0])
        return scores


@case("nn.TransformerEncoder, padding mask")
def _padded_encoder() -> Case:
    ids = torch.randint(1, 50, (1, 8))
    ids[:, -2:] = 0
    return Case(Masked(causal=False), (ids,))


@case("nn.TransformerEncoder, causal mask, norms first")
def _causal_encoder() -> Case:
    return Case(Masked(causal=True), (torch.randint(1, 50, (1, 8)),))


@case("nn.TransformerDecoder, causal mask")
def _decoder() -> Case:
    layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
    masks = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(6)}
    args = (torch.randn(1, 6, 32), torch.randn(1, 8, 32))
    return _with_masks(nn.TransformerDecoder(layer, 2), args, masks, ("tgt", "memory"))


@case("nn.Transformer, both masks")
def _transformer() -> Case:
    model = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
    padding = torch.zeros(1, 8, dtype=torch.bool)
    padding[:, -2:] = True
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(6),
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
    }
    args = (torch.randn(1, 8, 32), torch.randn(1, 6, 32))
    return _with_masks(model, args, masks, ("src", "tgt"))


def _with_masks(
    model: nn.Module, args: tuple[Tensor, ...], masks: dict[str, Tensor], leaves: tuple[str, ...]
) -> Case:
    """A mask of positions has no batch axis: all of a call is one sample."""
    return Case(model, args, masks, (0, 5, None), {"batch_axis": None}, leaves)


# small networks -----------------------------------------------------------------------------------


class Highway(nn.Module):
    """A layer that a gate mixes with its own input (Srivastava et al. 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.made, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return gate * F.relu(self.made(x)) + (1 - gate) * x


@case("highway network")
def _highway() -> Case:
    model = nn.Sequential(nn.Linear(8, 16), Highway(16), Highway(16), nn.Linear(16, 5))
    return Case(model, (torch.randn(1, 8),))


class Siamese(nn.Module):
    """Two inputs through one network, scored by how far apart they come out."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        scores: Tensor = self.head((self.tower(a) - self.tower(b)).abs())
        return scores


@case("siamese network")
def _siamese() -> Case:
    return Case(Siamese(), (torch.randn(1, 8), torch.randn(1, 8)), leaves=("a", "b"))


class TwoTowers(nn.Module):
    """A user's words and an item, each a unit vector: their cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(50, 16, mode="mean")
        self.user = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.item = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, ids: Tensor, item: Tensor) -> Tensor:
        user = F.normalize(self.user(self.words(ids)), dim=-1)
        return (user * F.normalize(self.item(item), dim=-1)).sum(-1, keepdim=True)


@case("two towers, cosine")
def _towers() -> Case:
    args = (torch.randint(50, (1, 6)), torch.randn(1, 8))
    return Case(TwoTowers(), args, leaves=(None, "item"))


class FactorizationMachine(nn.Module):
    """Pairs of features by dot products of their embeddings, beside a perceptron (DeepFM)."""

    def __init__(self, fields: int = 6, width: int = 8) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(60, width), nn.Embedding(60, 1)
        self.deep = nn.Sequential(nn.Linear(fields * width, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, ids: Tensor) -> Tensor:
        v = self.embed(ids)
        pairs = (v.sum(1).square() - v.square().sum(1)).sum(-1, keepdim=True) / 2
        scores: Tensor = self.linear(ids).sum(1) + pairs + self.deep(v.flatten(1))
        return scores


@case("factorization machine (DeepFM)")
def _factorization() -> Case:
    return Case(FactorizationMachine(), (torch.randint(60, (1, 6)),))


class CrossNetwork(nn.Module):
    """Crossed features, each layer times the input (DCN)."""

    def __init__(self, width: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            h = x * layer(h) + h
        scores: Tensor = self.head(h)
        return scores


@case("cross network (DCN)")
def _cross() -> Case:
    return Case(CrossNetwork(), (torch.randn(1, 8),))


class Mixture(nn.Module):
    """Experts that a softmax weighs, all of them used."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        said = torch.stack([expert(x) for expert in self.experts], -1)
        mixed: Tensor = (said * self.gate(x).softmax(-1)[:, None]).sum(-1)
        return mixed


@case("mixture of experts, dense")
def _mixture() -> Case:
    return Case(Mixture(), (torch.randn(1, 8),))


class Maxout(nn.Module):
    """The largest of several linear layers (Goodfellow et al. 2013)."""

    def __init__(self, width: int, out: int, pieces: int = 3) -> None:
        super().__init__()
        self.linear, self.pieces = nn.Linear(width, out * pieces), pieces

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x).unflatten(-1, (-1, self.pieces)).amax(-1)
        return found


@case("maxout network")
def _maxout() -> Case:
    return Case(
        nn.Sequential(Maxout(8, 16), Maxout(16, 16), nn.Linear(16, 5)), (torch.randn(1, 8),)
    )


class DeepSets(nn.Module):
    """A set of vectors: the sum and the largest of what each becomes."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.together = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.each(x)
        scores: Tensor = self.together(torch.cat([h.sum(1), h.amax(1)], 1))
        return scores


@case("deep sets and PointNet")
def _deep_sets() -> Case:
    return Case(DeepSets(), (torch.randn(1, 12, 4),))


class Forecaster(nn.Module):
    """A series split into its trend and the rest, each by a linear layer (DLinear)."""

    def __init__(self, steps: int = 24, ahead: int = 6) -> None:
        super().__init__()
        self.smooth = nn.AvgPool1d(5, stride=1)
        self.trend, self.rest = nn.Linear(steps, ahead), nn.Linear(steps, ahead)

    def forward(self, x: Tensor) -> Tensor:
        trend = self.smooth(F.pad(x, (2, 2), mode="replicate"))
        said: Tensor = self.trend(trend) + self.rest(x - trend)
        return said


@case("linear forecaster (DLinear)")
def _forecaster() -> Case:
    return Case(Forecaster(), (torch.randn(1, 2, 24),), target=(0, None))


class Basis(nn.Module):
    """Stacked forecasts, each block explaining what the ones before left over (N-BEATS)."""

    def __init__(self, steps: int = 16, ahead: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.steps = steps
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(steps, 32), nn.ReLU(), nn.Linear(32, steps + ahead))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        said: list[Tensor] = []
        for block in self.blocks:
            found = block(x)
            x = x - found[:, : self.steps]
            said.append(found[:, self.steps :])
        return torch.stack(said).sum(0)


@case("N-BEATS")
def _basis() -> Case:
    return Case(Basis(), (torch.randn(1, 16),))


class Tabular(nn.Module):
    """Features as words, a learned query among them (TabTransformer, FT-Transformer)."""

    def __init__(self, fields: int = 6, width: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fields, width))
        self.bias = nn.Parameter(torch.randn(fields, width))
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.layer = nn.TransformerEncoderLayer(width, 4, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = x[..., None] * self.weight + self.bias
        words = torch.cat([self.query.expand(len(x), -1, -1), words], 1)
        scores: Tensor = self.head(self.layer(words)[:, 0])
        return scores


@case("transformer of tables")
def _tabular() -> Case:
    return Case(Tabular(), (torch.randn(1, 6),))


class Radial(nn.Module):
    """Distances to centres, each through a bell (a network of radial basis functions)."""

    def __init__(self) -> None:
        super().__init__()
        self.centres, self.head = nn.Parameter(torch.randn(12, 4)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        distance = (x[:, None] - self.centres).square().sum(-1)
        scores: Tensor = self.head(torch.exp(-distance))
        return scores


@case("radial basis functions")
def _radial() -> Case:
    return Case(Radial(), (torch.randn(1, 4),))


class Waves(nn.Module):
    """Layers of sines: a field as a network (SIREN)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(3 * layer(x))
        scores: Tensor = self.head(x)
        return scores


@case("SIREN")
def _waves() -> Case:
    return Case(Waves(), (torch.randn(1, 2),))
