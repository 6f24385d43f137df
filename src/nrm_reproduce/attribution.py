"""What others say of components and edges, in plain torch, and patching, which they all estimate.

Attribution patching (Nanda 2023): the derivative at x, times the difference of activations. RelP
(Jafari et al. 2025): the same with the derivatives of LRP. Integrated gradients: the mean of
derivatives on the straight way of embeddings from the other input to x. EAP (Syed et al. 2023) and
EAP-IG (Hanna et al. 2024): an edge has the derivative by what its receiver reads, times what its
sender writes at x less what it writes at the other input. Nothing here knows of nrm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nrm_reproduce.edge_ablation import Llama, Pairs, Run, split

PARTS = ("residual streams", "attention outputs", "MLP outputs")
"""What is patched, one of each in every layer: a stream is that after the layer."""
STEPS = 5
"""Of integrated gradients."""


def activations(network: Llama, run: Run) -> Tensor:
    """`[N, parts, layers, tokens, features]`."""
    heads = network.heads
    by_layer = split(run.senders[:, 1:], 1, -1, heads + 1)
    attention, mlps = by_layer[:, :, :heads].sum(2), by_layer[:, :, heads]
    return torch.stack([torch.stack(run.streams[2::2], 1), attention, mlps], 1)


@dataclass(frozen=True, eq=False)
class Slopes:
    """Derivatives of the difference of logits.

    Attributes:
        parts: `[N, parts, layers, tokens, features]`, by what is patched.
        senders: `[N, senders, tokens, features]`, by what each component writes.
        receivers: `[N, receivers, tokens, features]`, by what each reads.
    """

    parts: Tensor
    senders: Tensor
    receivers: Tensor

    def __add__(self, other: Slopes) -> Slopes:
        return Slopes(
            self.parts + other.parts,
            self.senders + other.senders,
            self.receivers + other.receivers,
        )

    def __truediv__(self, number: int) -> Slopes:
        return Slopes(self.parts / number, self.senders / number, self.receivers / number)


def slopes(network: Llama, pairs: Pairs, embedded: Tensor | None = None) -> Slopes:
    """Derivatives at the inputs.

    Arguments:
        embedded: in the place of the inputs' embeddings.
    """
    count, tokens = pairs.ids.shape
    layers, heads, size = len(network.layers), network.heads, network.embedding.shape[1]
    x = (network.embedded(pairs.ids) if embedded is None else embedded).detach()
    each = (count, heads + 1, tokens, size)
    pushes = [x.new_zeros(each).requires_grad_() for _ in range(layers)]
    pushes.append(torch.zeros_like(x).requires_grad_())
    with torch.enable_grad():
        run = network.run(pairs.ids, pairs.right, pairs.wrong, x.requires_grad_(), pushes)
        found = torch.autograd.grad(run.output.sum(), [*run.streams, *pushes])
    streams, read = found[: 2 * layers + 1], found[2 * layers + 1 :]
    after_attention, after_mlp = streams[1::2], streams[2::2]
    writes = [streams[0].unsqueeze(1)]
    for attention, mlp in zip(after_attention, after_mlp, strict=True):
        writes += [attention.unsqueeze(1).expand(-1, heads, -1, -1), mlp.unsqueeze(1)]
    of_layers = torch.stack([torch.stack(s, 1) for s in (after_mlp, after_attention, after_mlp)], 1)
    return Slopes(of_layers, torch.cat(writes, 1), torch.cat([*read[:-1], read[-1][:, None]], 1))


def integrated(network: Llama, pairs: Pairs, places: Sequence[float]) -> Slopes:
    """The mean of derivatives at places on the way of embeddings: zero: the others, one: x."""
    here, there = network.embedded(pairs.ids), network.embedded(pairs.others)
    total = slopes(network, pairs, there + places[0] * (here - there))
    for place in places[1:]:
        total = total + slopes(network, pairs, there + place * (here - there))
    return total / len(places)


# -- the methods -----------------------------------------------------------------------------------


def by_component(network: Llama, relp: Llama, pairs: Pairs) -> dict[str, Tensor]:
    """What each method says that patching loses: `[N, parts, layers, tokens]`."""
    with torch.no_grad():
        here = activations(network, network.run(pairs.ids))
        change = here - activations(network, network.run(pairs.others))
    at = slopes(network, pairs).parts
    middles = [(k + 0.5) / STEPS for k in range(STEPS)]
    return {
        "attribution patching": (change * at).sum(-1),
        "RelP coefficients": (change * slopes(relp, pairs).parts).sum(-1),
        f"integrated gradients, {STEPS} steps": (
            (change * integrated(network, pairs, middles).parts).sum(-1)
        ),
        "gradient x input": (here * at).sum(-1),
    }


def by_edge(network: Llama, relp: Llama, pairs: Pairs) -> dict[str, Tensor]:
    """What each method says of edges: `[N, receivers, senders]`; zero where there is none."""
    with torch.no_grad():
        here = network.run(pairs.ids).senders
        change = here - network.run(pairs.others).senders
    at = slopes(network, pairs)
    ends = [(k + 1) / STEPS for k in range(STEPS)]  # as EAP-IG's own code has them
    nodes = (change * at.senders).sum((-1, -2))
    edges = network.edges.to(change.device)
    found = {
        "EAP": _edges(change, at.receivers),
        f"EAP-IG, {STEPS} steps": _edges(change, integrated(network, pairs, ends).receivers),
        "EAP with RelP coefficients": _edges(change, slopes(relp, pairs).receivers),
        "attribution patching of nodes": nodes.unsqueeze(1).expand(-1, len(edges), -1),
        "gradient x input": _edges(here, at.receivers),
    }
    return {name: scores * edges for name, scores in found.items()}


def _edges(written: Tensor, slope: Tensor) -> Tensor:
    return slope.flatten(2) @ written.flatten(2).transpose(1, 2)


# -- exact patching --------------------------------------------------------------------------------


@torch.no_grad()
def patched(network: Llama, pairs: Pairs, memory: int = 2**30) -> Tensor:
    """What the output loses when a part, at one position, is as it is for the other input.

    Before the first token that differs nothing is different, and nothing is run.

    Arguments:
        memory: bytes that copies of the inputs may take at once.

    Returns:
        `[N, parts, layers, tokens]`.
    """
    here = network.run(pairs.ids, pairs.right, pairs.wrong)
    there = network.run(pairs.others)
    change = activations(network, there) - activations(network, here)
    found = change.new_zeros(change.shape[:-1])
    differs = (pairs.ids != pairs.others).cummax(1).values
    rows, places = differs.nonzero(as_tuple=True)
    size = network.embedding.shape[1]
    # An MLP's hidden layer, several times over, is the most that a copy needs.
    each = 16 * pairs.ids.shape[1] * size * network.embedding.element_size()
    step = max(1, memory // each)

    def lost(part: int, layer: int, stream: int, mlp_next: bool) -> None:
        for begin in range(0, len(rows), step):
            row, place = rows[begin : begin + step], places[begin : begin + step]
            x = here.streams[stream][row].clone()
            x[torch.arange(len(row), device=x.device), place] += change[row, part, layer, place]
            output = _finished(network, x, layer, mlp_next, pairs[row])
            found[row, part, layer, place] = here.output[row] - output

    for layer in range(len(network.layers)):
        lost(0, layer, 2 * layer + 2, False)
        lost(1, layer, 2 * layer + 1, True)
        lost(2, layer, 2 * layer + 2, False)
    return found


def _finished(network: Llama, x: Tensor, layer: int, mlp_next: bool, pairs: Pairs) -> Tensor:
    """The output, from a residual stream after a layer's attention or after its MLP on."""
    if mlp_next:
        x = x + network.mlp(layer, x)
    for above in range(layer + 1, len(network.layers)):
        x = x + network.attention(above, x)
        x = x + network.mlp(above, x)
    return network.told(x, pairs.right, pairs.wrong)
