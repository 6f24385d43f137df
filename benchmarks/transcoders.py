"""Direct edges between features of transcoders, beside circuit-tracer's.

Small transformers with random weights, and random transcoders in the place of their MLPs.
circuit-tracer 0.5 attributes the difference of two logits; nrm explains the same network, written
as a module that computes an MLP by its transcoder's features and adds the error. circuit-tracer's
edge from s to t is what s adds to t before its activation, with attention and norms held fixed.
nrm's is what of the output passes from t to s: that, over t's activation, times what passes t. At
the first position circuit-tracer has no nodes, so that what MLPs give there is a constant here too.

It needs transformer_lens and a transformers older than ours, so the benchmark makes an environment
of its own on demand (`--environment`).

    python -m benchmarks.transcoders --json transcoders.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nrm
from benchmarks.environment import ROOT, with_packages

PACKAGES = ("circuit-tracer==0.5.0",)
_INSIDE = "NRM_CIRCUIT_TRACER_ENVIRONMENT"
WIDTH, HEADS, TOKENS, FEATURES, VOCABULARY = 16, 4, 6, 12, 20
RIGHT, WRONG = 3, 7
"""The two logits."""


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        features: active ones, at all positions.
        edges: compared: all pairs of a receiver and a sender.
        not_zero: of them.
        difference: the largest between both sides, relative to the largest edge.
        unscaled: correlation of nrm's edges with circuit-tracer's as they are.
        logits: the largest difference of the two networks' logits.
    """

    layers: int
    seed: int
    features: int
    edges: int
    not_zero: int
    difference: float
    unscaled: float
    logits: float


class Special:
    """In the place of a tokenizer: token 1 is special, and begins every text."""

    vocab_size, all_special_ids = VOCABULARY, (1,)
    pad_token_id, bos_token_id, padding_side, name_or_path = 0, 1, "right", ""

    def decode(self, ids: Tensor) -> str:
        return " ".join(map(str, ids.tolist()))


class Block(nn.Module):
    """Attention, and a transcoder in the place of an MLP.

    Arguments:
        there: transformer_lens's block.
        transcoder: circuit-tracer's.
        error: `[tokens, width]`, what is left of the MLP's output.
    """

    def __init__(self, there: Any, transcoder: Any, error: Tensor, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(there.ln1, eps), norm(there.ln2, eps)
        attn = there.attn
        self.q, self.k, self.v = (
            linear(weight.permute(0, 2, 1).reshape(WIDTH, WIDTH), bias.flatten())
            for weight, bias in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
        )
        self.o = linear(attn.W_O.reshape(WIDTH, WIDTH).T, attn.b_O)
        self.encode = linear(transcoder.W_enc, transcoder.b_enc)
        self.features = nn.ReLU()
        self.decode = linear(transcoder.W_dec.T, transcoder.b_dec)
        self.error = nn.Parameter(error)
        there_are_nodes = torch.ones(TOKENS, 1)
        there_are_nodes[0] = 0
        self.register_buffer("nodes", there_are_nodes)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]` to the same."""
        read = self.norm1(x)
        q, k, v = (
            part(read).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(heads.transpose(1, 2).flatten(2))
        features = self.features(self.encode(self.norm2(x)))
        decoded: Tensor = self.decode(features * self.nodes)
        return x + decoded + self.error


class Network(nn.Module):
    """The whole of it, as nrm explains it."""

    def __init__(self, there: Any, errors: Tensor) -> None:
        super().__init__()
        eps = there.cfg.eps
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.embed.weight.data = there.W_E.data
        self.position = nn.Parameter(there.W_pos.data[:TOKENS])
        self.blocks = nn.ModuleList(
            Block(*parts, eps)
            for parts in zip(there.blocks, there.transcoders, errors, strict=True)
        )
        self.norm = norm(there.ln_final, eps)
        self.head = linear(there.unembed.W_U.T, there.unembed.old_unembed.b_U)

    def forward(self, ids: Tensor) -> Tensor:
        """`[batch, tokens]` to `[batch, tokens, vocabulary]`."""
        x = self.embed(ids) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.data, made.bias.data = weight.detach().clone(), bias.detach().clone()
    return made


def norm(there: Any, eps: float) -> nn.LayerNorm:
    made = nn.LayerNorm(WIDTH, eps)
    made.weight.data, made.bias.data = there.w.detach().clone(), there.b.detach().clone()
    return made


def replaced(layers: int, seed: int) -> Any:
    """circuit-tracer's model, with random weights and transcoders, in double precision."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import (
        TransformerLensReplacementModel,
    )
    from circuit_tracer.transcoder.single_layer_transcoder import (
        SingleLayerTranscoder,
        TranscoderSet,
    )
    from transformer_lens import HookedTransformerConfig

    torch.manual_seed(seed)
    cpu, double = torch.device("cpu"), torch.float64
    config = HookedTransformerConfig(
        n_layers=layers, d_model=WIDTH, n_ctx=TOKENS, d_head=WIDTH // HEADS, n_heads=HEADS,
        d_mlp=2 * WIDTH, d_vocab=VOCABULARY, act_fn="gelu", normalization_type="LN", device="cpu",
        dtype=double, seed=seed, model_name="tiny",
    )  # fmt: skip
    transcoders = {
        layer: SingleLayerTranscoder(WIDTH, FEATURES, F.relu, layer, device=cpu, dtype=double)
        for layer in range(layers)
    }
    made = TransformerLensReplacementModel.from_config(
        config, TranscoderSet(transcoders, "mlp.hook_in", "mlp.hook_out")
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    made.tokenizer = Special()
    return made


def compare(layers: int, seed: int) -> Row:
    """All edges of one network by both."""
    from circuit_tracer.attribution.attribute import attribute

    there = replaced(layers, seed)
    ids = torch.randint(2, VOCABULARY, (TOKENS,))
    ids[0] = 1
    head = there.unembed.W_U.detach()
    target = [("right - wrong", 1.0, head[:, RIGHT] - head[:, WRONG])]
    graph = attribute(ids, there, attribution_targets=target, batch_size=8, verbose=False)
    logits, cache = there.run_with_cache(ids[None])
    errors = there.setup_attribution(ids).error_vectors.detach().clone()
    for layer, transcoder in enumerate(there.transcoders):
        errors[layer, 0] = cache[f"blocks.{layer}.mlp.hook_out"][0, 0] - transcoder.b_dec
    network = Network(there, errors.detach()).double().eval()

    R = nrm.Explainer(network, nrm.composites.CPLRP())(
        ids[None], target=nrm.Contrast((-1, RIGHT), (-1, WRONG))
    )
    active = [tuple(feature) for feature in graph.active_features.tolist()]
    rest = slice(None)
    features = [nrm.neurons(f"blocks.{layer}.features", (at, n)) for layer, at, n in active]
    # A constant that is added lies at the leaf `bias` of the module that adds it.
    left = [nrm.neurons(f"blocks.{n}.bias", (at, rest)) for n in range(layers)
            for at in range(TOKENS)]  # fmt: skip
    tokens = [nrm.neurons("embed", (at, rest)) for at in range(TOKENS)]
    named = {str(n): chosen for n, chosen in enumerate([*features, *left, *tokens])}
    edges: Any = R.edges(named)  # type: ignore[attr-defined]

    none = [len(active) + layer * TOKENS for layer in range(layers)]  # the first position's errors
    senders = [n for n in range(len(named)) if n not in none]
    columns = [edges.senders.index(str(n)) for n in senders]
    receivers = [*map(str, range(len(active))), "output"]
    rows = [edges.receivers.index(name) for name in receivers]
    ours = (edges.relevance[0, rows][:, columns] * R.scale).detach()
    passing = (edges.entered[0, rows] * R.scale).detach()
    passing[:-1] /= graph.activation_values  # what passes a feature, over its activation
    passing[-1] = 1
    shown = graph.adjacency_matrix.double()[[*range(len(active)), -1]][:, senders]
    theirs = shown * passing[:, None]
    return Row(
        layers,
        seed,
        len(active),
        ours.numel(),
        int((theirs != 0).sum()),
        float((ours - theirs).abs().max() / theirs.abs().max()),
        float(torch.corrcoef(torch.stack([ours.flatten(), shown.flatten()]))[0, 1]),
        float((network(ids[None]) - logits).abs().max()),
    )


def main() -> None:
    """Compares several networks, in an environment that has circuit-tracer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="networks of each depth")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-circuit-tracer")
    arguments = parser.parse_args()
    if os.environ.get(_INSIDE) != "1":
        python = with_packages(arguments.environment, *PACKAGES)
        command = [str(python), "-m", "benchmarks.transcoders", *sys.argv[1:]]
        inside = {**os.environ, _INSIDE: "1"}
        raise SystemExit(subprocess.run(command, cwd=ROOT, env=inside, check=False).returncode)
    warnings.simplefilter("ignore")
    rows = [compare(layers, seed) for layers in (2, 3) for seed in range(arguments.seeds)]
    for row in rows:
        sys.stdout.write(
            f"{row.layers} layers, {row.features} features: {row.edges} edges, {row.not_zero} not "
            f"zero, differ by {row.difference:.1e} of the largest (as they are they correlate by "
            f"{row.unscaled:.2f})\n"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
