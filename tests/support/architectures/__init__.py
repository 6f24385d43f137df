"""Small networks with every kind of operator, each as a torch module and as an oracle.

A network says neuron by neuron how walks go, for any contribution rule, any alpha of its products
and either setting of the biases. Variables that only move neurons about are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from support import oracle as o
from support.architectures.attention import (
    AddedMaskAttention,
    Attention,
    CausalAttention,
    GroupedQueryAttention,
    MaskedAttention,
    Multihead,
    WrittenAttention,
)
from support.architectures.describing import Walks
from support.architectures.moves import (
    Fills,
    GraphAttention,
    Interpolation,
    Scatter,
    ScatterMax,
    Tokens,
    Upsampling,
)
from support.architectures.products import Classifier, Linears, Norms, Products
from support.architectures.recurrent import GRU, LSTM, RNN, Gates, GRUCell, LSTMCell

NETWORKS = {
    net.__name__: net
    for net in (
        Attention, CausalAttention, MaskedAttention, AddedMaskAttention, WrittenAttention,
        GroupedQueryAttention, Multihead, Gates, LSTMCell, LSTM, GRUCell, GRU, RNN, Norms,
        Classifier, Products, Linears, Scatter, ScatterMax, Fills, Upsampling, Interpolation,
        GraphAttention, Tokens,
    )
}  # fmt: skip


@dataclass
class Case:
    """One network with one input, mostly of batch 2, and an oracle for each sample."""

    model: nn.Module
    inputs: list[Tensor]
    oracles: list[o.Oracle]


@cache
def built(network: str, seed: int) -> tuple[nn.Module, list[Tensor], np.ndarray]:
    """A network, inputs and its outputs; the same objects every time."""
    torch.manual_seed(seed)
    model = NETWORKS[network]().double().eval()
    batch = getattr(model, "batch", 2)
    inputs = [
        torch.randint(5, (batch, *shape[1:]))
        if shape[0] == "int"
        else torch.randn(batch, *shape).double()
        for shape in model.inputs
    ]
    with torch.no_grad():
        return model, inputs, model(*inputs).flatten(1).numpy()


def make(network: str, walks: Walks, seed: int = 0) -> Case:
    model, inputs, expected = built(network, seed)
    oracles = []
    for sample in range(len(expected)):
        net = o.Oracle(walks.bias == "input")
        model.describe([x[sample].numpy() for x in inputs], net, walks)
        oracles.append(net)
    found = np.stack([net.values[net.output] for net in oracles])
    np.testing.assert_allclose(found, expected, atol=1e-12)  # the description is right
    return Case(model, inputs, oracles)
