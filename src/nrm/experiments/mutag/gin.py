"""The graph network: blocks that average over neighbours, then apply linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from nrm.composites import Composite, path
from nrm.errors import InputError
from nrm.rules import PlainGamma

GAMMA = 3.0
_FILE = "mutag_gin3.safetensors"
_READOUT = 20**0.5
_WIDE = 10  # what is narrower is the output, without a ReLU


class Block(nn.Module):
    """Half the sum over neighbours and the node itself, then linear layers with ReLUs."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, mean: Tensor, h: Tensor) -> Tensor:
        h = mean @ h
        for layer in self.layers:
            h = layer(h)
            if h.shape[-1] > _WIDE:
                h = torch.relu(h)
        return h


class GIN(nn.Module):
    """A graph isomorphism network that gives one vector of logits for a graph.

    Arguments:
        widths: of every block, the widths of its features from input to output.
    """

    def __init__(self, widths: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, widths))

    def forward(self, adjacency: Tensor, features: Tensor) -> Tensor:
        """The logits.

        Arguments:
            adjacency: `[nodes, nodes]`, boolean, with every node its own neighbour.
            features: `[nodes, features]`.
        """
        mean = adjacency.to(features.dtype).T / 2
        h = features
        for block in self.blocks:
            h = block(mean, h)
        return h.sum(0) / _READOUT


def load_gin(folder: Path) -> tuple[GIN, Tensor]:
    """The pretrained network in a folder, in double precision, and the logits stored beside it.

    Raises:
        InputError: there is none.
    """
    from safetensors.torch import load_file

    file = folder / _FILE
    if not file.is_file():
        raise InputError(f"{folder} holds no {_FILE}")
    stored = load_file(file)
    logits = stored.pop("logits")
    weights = {name: w for name, w in stored.items() if ".weight" in name}
    count = 1 + max(int(name.partition(".")[0].removeprefix("block")) for name in weights)
    widths = []
    for block in range(1, count):
        own = [weights[name] for name in sorted(weights) if name.startswith(f"block{block}.")]
        widths.append([own[0].shape[0], *(w.shape[1] for w in own)])
    model = GIN(widths)
    state = {}
    for name, value in stored.items():
        block_name, _, entry = name.partition(".")
        place = f"blocks.{int(block_name.removeprefix('block')) - 1}.layers.{entry[-1]}"
        kind = entry[:-1]
        state[f"{place}.{kind}"] = value.T if kind == "weight" else value
    model.load_state_dict(state)
    return model.double().eval().requires_grad_(False), logits


def gammas(blocks: int) -> list[float]:
    """The authors' schedule: falling in equal steps from 3 in the first block to 0 in the last."""
    return torch.linspace(GAMMA, 0, blocks).tolist() if blocks > 1 else [0.0]


def composite(blocks: int) -> Composite:
    """LRP-gamma as in GNN-LRP, with biases in the denominators."""
    by_block = [
        (path(f"blocks.{block}*"), PlainGamma(gamma)) for block, gamma in enumerate(gammas(blocks))
    ]
    return Composite([*by_block], PlainGamma(0.0), name="GNN-LRP", bias="input")
