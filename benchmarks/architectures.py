"""The architectures that `benchmarks.zoo` and its test explain: small, random, offline.

A new one is a function that builds a `Case`, under a name. Its defaults are what the benchmark
explains; keywords make some of them smaller still, of the same operators.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nrm
from nrm.capture.call import ModelCall
from nrm.graph import first_tokens
from nrm.torchvision_mismatch import import_torchvision


@dataclass(frozen=True)
class Case:
    """One model, what it is called with, and what is explained of it.

    Attributes:
        target: the explained output neuron, without the batch axis; `None` along one axis stands
            for the largest output there.
        options: further arguments of the explainer.
        leaves: the inputs whose relevance the timed pass asks for, one pass each; `None`: the
            tokens, or the first input.
        note: what to know about the row.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: tuple[int | None, ...] = (None,)
    options: dict[str, Any] = field(default_factory=dict)
    leaves: tuple[str | None, ...] = (None,)
    note: str = ""

    @property
    def index(self) -> tuple[int, ...]:
        """The explained output neuron, as `build` chose it."""
        assert None not in self.target
        return tuple(int(place or 0) for place in self.target)

    def double(self) -> Case:
        """The same in double precision."""
        args, kwargs = _double(self.args), _double(self.kwargs)
        return replace(self, model=copy.deepcopy(self.model).double(), args=args, kwargs=kwargs)

    def explainer(self, composite: nrm.composites.Composite | None = None) -> nrm.Explainer:
        return nrm.Explainer(self.model, composite, **self.options)

    def explain(self, explainer: nrm.Explainer) -> nrm.Measure:
        return explainer(*self.args, target=self.index, **self.kwargs)

    def passes(self, R: nrm.Measure) -> dict[str, Tensor]:
        """The relevance of every input of `leaves`, by the name of its variable."""
        found = {}
        for at in self.leaves:
            name = at or first_leaf(R)
            is_words = R.graph.variable(name).kind == "embedding"
            found[name] = R.tokens(at=name) if is_words else R.heatmap(at=name)
        return found


def first_leaf(R: nrm.Measure) -> str:
    """The embeddings of the first integer input, or the first input."""
    try:
        return first_tokens(R.graph)
    except nrm.errors.QueryError:
        return R.graph.inputs[0].name


def _double(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, dict):
        return {name: _double(value) for name, value in values.items()}
    return tuple(_double(value) for value in values) if isinstance(values, tuple) else values


# -- the models ------------------------------------------------------------------------------------

CASES: dict[str, Callable[..., Case]] = {}
NEEDS: dict[str, str] = {}
"""The package that a case needs, beside torch."""


def case(name: str, needs: str = "") -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """List what builds a case under a name."""

    def listed(build: Callable[..., Case]) -> Callable[..., Case]:
        CASES[name] = build
        NEEDS[name] = needs
        return build

    return listed


def build(name: str, **smaller: Any) -> Case:
    """The case of this name, its weights the same at every call.

    Arguments:
        smaller: keywords of the function that builds it.
    """
    torch.manual_seed(0)
    built = CASES[name](**smaller)
    with torch.no_grad():
        stir(built.model)
    built.model.eval().requires_grad_(False)
    return replace(built, target=_largest(built))


def _largest(built: Case) -> tuple[int, ...]:
    """The explained output neuron: by a small one, relevance would be divided."""
    with torch.no_grad():
        call = ModelCall(built.model, built.args, built.kwargs, built.options.get("output"))
        output = call(*call.tensors)
    if output.dim() > len(built.target):
        output = output.select(built.options.get("batch_axis", 0), 0)
    along = output[tuple(slice(None) if place is None else place for place in built.target)]
    return tuple(int(along.argmax()) if place is None else place for place in built.target)


_ZERO_AT_FIRST = ("layer_scale", "class_token", "cls_token")


def stir(model: nn.Module) -> None:
    """Make biases, norms' scales and running statistics random: at zero and one they hide much."""
    for name, parameter in model.named_parameters():
        if parameter.dim() <= 1 or name.rpartition(".")[2] in _ZERO_AT_FIRST:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.1 * torch.randn_like(buffer))
        elif name.endswith("running_var"):
            buffer.mul_(0.5 + torch.rand_like(buffer))


@case("VGG11", "torchvision")
def _vgg() -> Case:
    return _classifier("vgg11")


@case("ResNet18", "torchvision")
def _resnet(blocks: int = 2, size: int = 64) -> Case:
    """With so many blocks in each of the four stages."""
    resnet = import_torchvision().models.resnet
    return _pictured(resnet.ResNet(resnet.BasicBlock, [blocks] * 4), size)


@case("DenseNet121", "torchvision")
def _densenet() -> Case:
    return _classifier("densenet121")


@case("MobileNetV2", "torchvision")
def _mobilenet_v2() -> Case:
    return _classifier("mobilenet_v2")


@case("MobileNetV3-S", "torchvision")
def _mobilenet_v3(blocks: int | None = None, size: int = 64) -> Case:
    """With its first blocks, by default all."""
    mobilenet = import_torchvision().models.mobilenetv3
    settings, last = mobilenet._mobilenet_v3_conf("mobilenet_v3_small")
    return _pictured(mobilenet.MobileNetV3(settings[:blocks], last), size)


@case("EfficientNet-B0", "torchvision")
def _efficientnet() -> Case:
    return _classifier("efficientnet_b0")


@case("ConvNeXt-T", "torchvision")
def _convnext() -> Case:
    return _classifier("convnext_tiny")


@case("Swin-T", "torchvision")
def _swin() -> Case:
    return _classifier("swin_t")


def _classifier(name: str) -> Case:
    """One of torchvision's classifiers, on a picture of 64 x 64."""
    return _pictured(getattr(import_torchvision().models, name)(weights=None), 64)


def _pictured(model: nn.Module, size: int) -> Case:
    return Case(model, (torch.randn(1, 3, size, size),))


@case("ViT-B/16, 3 layers", "torchvision")
def _vit() -> Case:
    model = import_torchvision().models.VisionTransformer(
        image_size=224,
        patch_size=16,
        num_layers=3,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
        num_classes=10,
    )
    nn.init.normal_(model.heads[-1].weight, std=0.02)  # zero at first
    return Case(model, (torch.randn(1, 3, 224, 224),))


class UNet(nn.Module):
    """Two levels down and up, the skips concatenated."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = _block(3, 16), _block(16, 32), _block(32, 64)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = (
            nn.ConvTranspose2d(width, width // 2, 2, stride=2)
            if transposed
            else nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                nn.Conv2d(width, width // 2, 1),
            )
            for width in (64, 32)
        )
        self.merge2, self.merge1 = _block(64, 32), _block(32, 16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        c = self.middle(self.pool(b))
        b = self.merge2(torch.cat([self.up2(c), b], 1))
        a = self.merge1(torch.cat([self.up1(b), a], 1))
        logits: Tensor = self.head(a)
        return logits


def _block(width: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


@case("U-Net, transposed convolutions")
def _unet_transposed() -> Case:
    return Case(UNet(transposed=True), (torch.randn(1, 3, 48, 48),), target=(None, 20, 20))


@case("U-Net, bilinear interpolation")
def _unet_bilinear() -> Case:
    return Case(UNet(transposed=False), (torch.randn(1, 3, 48, 48),), target=(None, 20, 20))


@case("1-d convnet")
def _conv1d() -> Case:
    model = nn.Sequential(
        nn.Conv1d(2, 16, 9, stride=2, padding=4),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 5, dilation=2, groups=4),
        nn.LeakyReLU(0.1),
        nn.AvgPool1d(2),
        nn.Conv1d(32, 32, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    return Case(model, (torch.randn(1, 2, 256),))


@case("3-d convnet")
def _conv3d() -> Case:
    model = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AvgPool3d(2),
        nn.Conv3d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return Case(model, (torch.randn(1, 1, 16, 16, 16),))


_BOTH = {"num_layers": 2, "bidirectional": True}


@case("RNN, stacked, bidirectional")
def _rnn(steps: int = 10) -> Case:
    model = nn.RNN(8, 16, batch_first=True, **_BOTH)
    x, middle = torch.randn(1, steps, 8), (steps - 1) // 2
    return Case(model, (x,), target=(middle, None), options={"output": 0})


@case("LSTM, stacked, bidirectional")
def _lstm() -> Case:
    model = nn.LSTM(8, 16, batch_first=True, **_BOTH)
    return Case(model, (torch.randn(1, 10, 8),), target=(4, None), options={"output": 0})


@case("LSTM, sequence first")
def _lstm_sequence_first(steps: int = 10) -> Case:
    model, x = nn.LSTM(8, 16), torch.randn(steps, 1, 8)
    options = {"output": 0, "batch_axis": 1}
    return Case(model, (x,), target=(steps - 1, None), options=options)


@case("GRU, stacked, bidirectional")
def _gru(steps: int = 10) -> Case:
    model = nn.GRU(8, 16, batch_first=True, **_BOTH)
    x, middle = torch.randn(1, steps, 8), (steps - 1) // 2
    return Case(model, (x,), target=(middle, None), options={"output": 0})


@case("GRU, sequence first, stacked, bidirectional")
def _gru_sequence_first() -> Case:
    model = nn.GRU(8, 16, **_BOTH)
    options = {"output": 0, "batch_axis": 1}
    return Case(model, (torch.randn(10, 1, 8),), target=(4, None), options=options)


class CellLoop(nn.Module):
    """An LSTM cell called step by step, over words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.cell = nn.LSTMCell(16, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.embed(ids)
        h = c = words.new_zeros(len(words), 32)
        for step in range(words.shape[1]):
            h, c = self.cell(words[:, step], (h, c))
        scores: Tensor = self.head(h)
        return scores


@case("LSTMCell in a Python loop")
def _cell_loop(steps: int = 10) -> Case:
    return Case(CellLoop(), (torch.randint(50, (1, steps)),))


# transformers' models -----------------------------------------------------------------------------

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    **_IDS,
}


def _transformers() -> Any:
    """transformers, without its advice, after torchvision, which it imports if it can."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with contextlib.suppress(ModuleNotFoundError):
        import_torchvision()
    return importlib.import_module("transformers")


def _ids(length: int = 12, vocabulary: int = 100) -> Tensor:
    return torch.randint(3, vocabulary, (1, length))


def _encoder(name: str, **config: Any) -> Case:
    """A classifier of texts, with a mask."""
    transformers = _transformers()
    options = {**_SMALL, "num_labels": 3, **config}
    model = getattr(transformers, f"{name}ForSequenceClassification")(
        getattr(transformers, f"{name}Config")(**options)
    )
    ids = _ids()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Case(model, (), inputs, options={"output": "logits"})


@case("BERT", "transformers")
def _bert(layers: int = 3) -> Case:
    return _encoder("Bert", num_hidden_layers=layers)


@case("RoBERTa", "transformers")
def _roberta() -> Case:
    return _encoder("Roberta")


@case("DistilBERT", "transformers")
def _distilbert() -> Case:
    return _encoder("DistilBert", dim=64, hidden_dim=128, n_layers=3, n_heads=4)


def _decoder(name: str, **config: Any) -> Case:
    """A language model; what it says next is explained."""
    transformers = _transformers()
    options = {**_SMALL, **config}
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**options)
    )
    inputs = {"input_ids": _ids(), "use_cache": False}
    return Case(model, (), inputs, target=(-1, None), options={"output": "logits"})


@case("GPT-2", "transformers")
def _gpt2(layers: int = 3) -> Case:
    return _decoder("GPT2", n_embd=64, num_hidden_layers=layers, n_head=4, n_positions=64)


@case("Llama, grouped queries", "transformers")
def _llama(layers: int = 3) -> Case:
    return _decoder("Llama", num_hidden_layers=layers, num_key_value_heads=2)


@case("Qwen2", "transformers")
def _qwen2() -> Case:
    return _decoder("Qwen2", num_key_value_heads=2)


@case("Mistral", "transformers")
def _mistral() -> Case:
    return _decoder("Mistral", num_key_value_heads=2, sliding_window=6)


@case("T5", "transformers")
def _t5(layers: int = 2) -> Case:
    transformers = _transformers()
    config = transformers.T5Config(
        vocab_size=100,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=layers,
        num_heads=4,
        decoder_start_token_id=0,
        **_IDS,
    )
    inputs = {"input_ids": _ids(), "decoder_input_ids": _ids(6), "use_cache": False}
    return Case(
        transformers.T5ForConditionalGeneration(config),
        (),
        inputs,
        target=(-1, None),
        options={"output": "logits"},
    )


@case("ViT (transformers)", "transformers")
def _vit_transformers() -> Case:
    transformers = _transformers()
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=64,
        patch_size=8,
        num_labels=5,
    )
    inputs = {"pixel_values": torch.randn(1, 3, 64, 64)}
    model = transformers.ViTForImageClassification(config)
    return Case(model, (), inputs, options={"output": "logits"})


@case("CLIP", "transformers")
def _clip(layers: int = 2) -> Case:
    transformers = _transformers()
    text = {**_SMALL, "num_hidden_layers": layers}
    vision = {
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    ids = _ids()
    ids[:, -1] = _IDS["eos_token_id"]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }
    return Case(
        transformers.CLIPModel(config),
        (),
        inputs,
        options={"output": "logits_per_image"},
        leaves=(None, "pixel_values"),
    )


# graphs -------------------------------------------------------------------------------------------


class GraphNet(nn.Module):
    """Three graph convolutions and a linear layer: scores for every node."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(8, 16), layer(16, 16), layer(16, 16)])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x, edge_index))
        scores: Tensor = self.head(x)
        return scores


def _graph(layer: Callable[[Any, int, int], nn.Module]) -> Case:
    """A network on a random graph of 20 nodes and 60 edges."""
    geometric = importlib.import_module("torch_geometric.nn")
    x, edges = torch.randn(20, 8), torch.randint(20, (2, 60))
    model = GraphNet(lambda width, out: layer(geometric, width, out))
    return Case(model, (x, edges), target=(4, None))


@case("GCN", "torch_geometric")
def _gcn() -> Case:
    return _graph(lambda pyg, width, out: pyg.GCNConv(width, out))


@case("GIN", "torch_geometric")
def _gin() -> Case:
    return _graph(
        lambda pyg, width, out: pyg.GINConv(
            nn.Sequential(nn.Linear(width, out), nn.ReLU(), nn.Linear(out, out)), train_eps=True
        )
    )


@case("GraphSAGE", "torch_geometric")
def _sage() -> Case:
    return _graph(lambda pyg, width, out: pyg.SAGEConv(width, out))


@case("GAT", "torch_geometric")
def _gat() -> Case:
    return _graph(lambda pyg, width, out: pyg.GATConv(width, out // 2, heads=2))


# parts --------------------------------------------------------------------------------------------


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
