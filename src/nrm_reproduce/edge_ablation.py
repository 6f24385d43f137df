"""A Llama-like model in plain torch, component by component, and what is left of it with few edges.

The yardstick of circuits, written without nrm. Components are the embedding, every attention head
and every MLP; each receiver (a head, an MLP, the output) reads the sum of what the senders below it
have written. With a set of edges kept, a receiver B reads

    x'_B + sum over the kept edges A -> B of (out_A - out'_A),

primed values being those of another input: edges that are left out carry what they carry there.
An edge into a head is one into its queries, keys and values alike.

CPR (MIB; Mueller et al. 2025) is the area under the faithfulness of the k best edges, over k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nrm.errors import InputError

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Of all edges: how many the circuits of a curve have."""
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Pairs:
    """Inputs beside others, and which two tokens each asks about.

    Attributes:
        ids, others: `[N, tokens]`.
        right, wrong: `[N]`: explained is the logit of one less that of the other, at the end.
    """

    ids: Tensor
    others: Tensor
    right: Tensor
    wrong: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: slice | Tensor) -> Pairs:
        return Pairs(self.ids[chosen], self.others[chosen], self.right[chosen], self.wrong[chosen])


@dataclass(frozen=True, eq=False)
class Run:
    """What a model computes, component by component.

    Attributes:
        streams: `2 * layers + 1` times `[N, tokens, features]`: the embedding, and the residual
            stream after each attention and each MLP.
        senders: `[N, senders, tokens, features]`: what each has written.
        output: `[N]`, the difference of logits.
    """

    streams: list[Tensor]
    senders: Tensor
    output: Tensor


@dataclass(frozen=True, eq=False)
class _Layer:
    """Weights, those of a projection by head: `[heads, size, features]`."""

    attention_norm: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    write: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Llama:
    """A `LlamaForCausalLM` of transformers, written out.

    Arguments:
        model: RMS norms, rotary positions, grouped keys and values, a gated MLP; no biases.
        relp: whether derivatives are those of RelP (Jafari et al. 2025): norms and attention
            patterns count as constants, an activation as its input times a constant, and the
            factors of a gate take half each. Values are the same.

    Raises:
        InputError: the model is another, or computes something else.
    """

    def __init__(self, model: nn.Module, relp: bool = False) -> None:
        self.relp = relp
        try:
            config: Any = model.config
            body: Any = model.model
            size = getattr(config, "head_dim", None)
            self.size: int = size or config.hidden_size // config.num_attention_heads
            self.heads: int = config.num_attention_heads
            if config.hidden_act != "silu":
                raise ValueError(f"its activation is {config.hidden_act}")
            self.eps: float = config.rms_norm_eps
            self.embedding: Tensor = body.embed_tokens.weight.detach()
            head: Any = model.lm_head
            self.unembedding: Tensor = head.weight.detach()
            self.norm: Tensor = body.norm.weight.detach()
            self.layers = [self._layer(layer) for layer in body.layers]
            self._frequencies: Tensor = body.rotary_emb.inv_freq.detach()
        except (AttributeError, ValueError) as error:
            raise InputError(
                f"edges are ablated in Llama-like models, and {type(model).__name__} is none "
                f"({error})"
            ) from None
        self._check(model)

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        groups = self.heads * self.size // attention.k_proj.weight.shape[0]

        def by_head(module: nn.Linear, times: int = 1) -> Tensor:
            if module.bias is not None:
                raise ValueError("its projections have biases")
            weight = split(module.weight.detach(), 0, -1, self.size)
            return weight.repeat_interleave(times, 0)

        return _Layer(
            layer.input_layernorm.weight.detach(),
            by_head(attention.q_proj),
            by_head(attention.k_proj, groups),
            by_head(attention.v_proj, groups),
            split(attention.o_proj.weight.detach(), 1, -1, self.size).transpose(0, 1),
            layer.post_attention_layernorm.weight.detach(),
            mlp.gate_proj.weight.detach(),
            mlp.up_proj.weight.detach(),
            mlp.down_proj.weight.detach(),
        )

    def _check(self, model: nn.Module) -> None:
        ids = torch.arange(1, 9, device=self.embedding.device)[None] % len(self.embedding)
        with torch.no_grad():
            wanted = model(ids).logits[0, -1]
            own = self.normalised(self.run(ids).streams[-1][0, -1], self.norm) @ self.unembedding.T
        error = float((own - wanted).abs().max() / wanted.abs().max())
        if not error < _TOLERANCE:
            raise InputError(
                f"the {type(model).__name__}, written out as a Llama, gives other logits: they "
                f"differ by {error:.2g} of the largest"
            )

    # -- names -----------------------------------------------------------------------------------

    @cached_property
    def senders(self) -> tuple[str, ...]:
        return ("embed", *self.receivers[:-1])

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        found: list[str] = []
        for layer in range(len(self.layers)):
            found += [f"a{layer}.h{head}" for head in range(self.heads)]
            found.append(f"m{layer}")
        return (*found, "output")

    @cached_property
    def edges(self) -> Tensor:
        """`[receivers, senders]`, boolean: which are computed before."""
        each, heads = self.heads + 1, self.heads
        place = torch.arange(len(self.receivers))
        below = 1 + place // each * each + torch.where(place % each == heads, heads, 0)
        below[-1] = len(self.senders)
        return torch.arange(len(self.senders)) < below[:, None]

    # -- parts -----------------------------------------------------------------------------------

    def normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * (scale.detach() if self.relp else scale) * weight

    def embedded(self, ids: Tensor) -> Tensor:
        return self.embedding[ids]

    def attended(self, layer: int, x: Tensor) -> Tensor:
        """What heads add up, before they write: `[N, heads, tokens, size]`.

        Arguments:
            x: `[N, heads, tokens, features]`, what each reads; or one for all heads.
        """
        weights = self.layers[layer]
        h = self.normalised(x, weights.attention_norm)
        q, k, v = (self._by_head(h, w) for w in (weights.query, weights.key, weights.value))
        cos, sin = self._rotation(x.shape[-2])
        q, k = (z * cos + _turned(z) * sin for z in (q, k))
        if not self.relp:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        pattern = scores.masked_fill(later, -torch.inf).softmax(-1).detach()
        found: Tensor = pattern @ v
        return found

    def written(self, layer: int, z: Tensor) -> Tensor:
        """What each head writes: `[N, heads, tokens, features]`."""
        found: Tensor = torch.einsum("nhte,hde->nhtd", z, self.layers[layer].write)
        return found

    def attention(self, layer: int, x: Tensor) -> Tensor:
        """All heads together: `[N, tokens, features]`, from the same."""
        z = self.attended(layer, x.unsqueeze(1))
        matrix = self.layers[layer].write.transpose(0, 1).flatten(1)
        return F.linear(z.transpose(1, 2).flatten(2), matrix)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        weights = self.layers[layer]
        h = self.normalised(x, weights.mlp_norm)
        gate, up = F.linear(h, weights.gate), F.linear(h, weights.up)
        if self.relp:
            act = gate * torch.sigmoid(gate).detach()
            hidden = (act * up.detach() + act.detach() * up) / 2
        else:
            hidden = F.silu(gate) * up
        return F.linear(hidden, weights.down)

    def told(self, x: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
        """`[N]`: the difference of logits, from the last residual stream."""
        direction = self.unembedding[right] - self.unembedding[wrong]
        return (self.normalised(x[:, -1], self.norm) * direction).sum(-1)

    def _by_head(self, h: Tensor, weight: Tensor) -> Tensor:
        if h.shape[1] == 1:
            found = F.linear(h[:, 0], weight.flatten(0, 1))
            return split(found, -1, -1, self.size).transpose(1, 2)
        projected: Tensor = torch.einsum("nhtd,hed->nhte", h, weight)
        return projected

    def _rotation(self, tokens: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(tokens, device=self._frequencies.device)
        angles = places[:, None] * self._frequencies
        angles = torch.cat([angles, angles], -1)
        kind = self.embedding.dtype
        return angles.cos().to(kind), angles.sin().to(kind)

    # -- the whole -------------------------------------------------------------------------------

    def run(
        self,
        ids: Tensor,
        right: Tensor | None = None,
        wrong: Tensor | None = None,
        embedded: Tensor | None = None,
        pushes: Sequence[Tensor] | None = None,
    ) -> Run:
        """The whole model.

        Arguments:
            embedded: in the place of the ids' embeddings.
            pushes: for each layer `[N, heads + 1, tokens, features]`, and for the output `[N,
                tokens, features]`: what is added to what each receiver reads, for derivatives.
        """
        x = self.embedded(ids) if embedded is None else embedded
        streams, senders = [x], [x.unsqueeze(1)]
        for layer in range(len(self.layers)):
            push = None if pushes is None else pushes[layer]
            read = x.unsqueeze(1) if push is None else x.unsqueeze(1) + push[:, :-1]
            heads = self.written(layer, self.attended(layer, read))
            x = x + heads.sum(1)
            streams.append(x)
            mlp = self.mlp(layer, x if push is None else x + push[:, -1])
            x = x + mlp
            streams.append(x)
            senders += [heads, mlp.unsqueeze(1)]
        output = x.new_zeros(len(x))
        if right is not None and wrong is not None:
            output = self.told(x if pushes is None else x + pushes[-1], right, wrong)
        return Run(streams, torch.cat(senders, 1), output)

    @torch.no_grad()
    def ablated(self, pairs: Pairs, kept: Tensor, here: Run, there: Run) -> Tensor:
        """`[circuits, N]`: the difference of logits with the kept edges only.

        Arguments:
            kept: `[circuits, N or 1, receivers, senders]`.
            here, there: runs at the inputs and at the others.
        """
        kept = kept.to(here.senders.dtype)
        circuits, (count, tokens) = len(kept), pairs.ids.shape
        # out_A - out'_A, of each circuit
        change = torch.zeros_like(here.senders).repeat(circuits, 1, 1, 1, 1)
        change[:, :, 0] = here.senders[:, 0] - there.senders[:, 0]

        def read(first: int, number: int, below: int, stream: Tensor) -> Tensor:
            """What receivers read: `[circuits * N, number, tokens, features]`.

            Arguments:
                below: from how many senders.
                stream: what they read at the others.
            """
            rows = kept[:, :, first : first + number, :below].expand(-1, count, -1, -1)
            come = split(rows @ change[:, :, :below].flatten(3), 3, tokens, -1)
            return (stream.unsqueeze(1) + come).flatten(0, 1)

        def wrote(sender: int, out: Tensor) -> None:
            """Heads or an MLP have written: `[circuits * N, number, tokens, features]`."""
            senders = slice(sender, sender + out.shape[1])
            change[:, :, senders] = split(out, 0, circuits, count) - there.senders[:, senders]

        for layer in range(len(self.layers)):
            first = layer * (self.heads + 1)  # of the receivers; as senders they are one later
            x = read(first, self.heads, first + 1, there.streams[2 * layer])
            wrote(first + 1, self.written(layer, self.attended(layer, x)))
            last = first + self.heads
            x = read(last, 1, last + 1, there.streams[2 * layer + 1])
            wrote(last + 1, self.mlp(layer, x))
        x = read(len(self.receivers) - 1, 1, len(self.senders), there.streams[-1])[:, 0]
        told = self.told(x, pairs.right.repeat(circuits), pairs.wrong.repeat(circuits))
        return told.view(circuits, count)


def split(x: Tensor, axis: int, *sizes: int) -> Tensor:
    """One axis as several."""
    found: Tensor = x.unflatten(axis, sizes)  # type: ignore[no-untyped-call]
    return found


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


# -- circuits of every size ------------------------------------------------------------------------


def best(scores: Tensor, edges: Tensor, share: float, by_size: bool = False) -> Tensor:
    """`[..., receivers, senders]`, boolean: the edges with the highest scores.

    Arguments:
        scores: `[..., receivers, senders]`.
        edges: `[receivers, senders]`: which there are.
        share: of all edges; at least one is chosen.
        by_size: whether by absolute values.
    """
    flat = (scores.abs() if by_size else scores)[..., edges.to(scores.device)]
    count = max(1, round(share * flat.shape[-1]))
    ranks = flat.argsort(dim=-1, descending=True, stable=True)[..., :count]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, ranks, True)
    found = torch.zeros_like(scores, dtype=torch.bool)
    found[..., edges.to(scores.device)] = chosen
    return found


def curve(
    network: Llama,
    pairs: Pairs,
    scores: Tensor,
    by_size: bool = False,
    memory: int = 2**30,
    shares: Sequence[float] = SHARES,
) -> Tensor:
    """`[shares, N]`: the difference of logits with the best edges only.

    Arguments:
        scores: `[receivers, senders]`, or `[N, receivers, senders]`: a circuit for each input.
        memory: bytes that what components write may take at once.
    """
    scores = scores.to(network.embedding.device)
    each = len(network.senders) * pairs.ids.shape[1] * network.embedding.shape[1]
    # What components write lies in memory for each circuit, and is copied on the way.
    each *= 4 * len(shares) * network.embedding.element_size()
    step = max(1, memory // each)
    found = []
    for begin in range(0, len(pairs), step):
        some = pairs[begin : begin + step]
        own = scores if scores.dim() == 2 else scores[begin : begin + step]
        own = own.unsqueeze(0) if scores.dim() == 2 else own
        with torch.no_grad():
            here = network.run(some.ids)
            there = network.run(some.others)
        kept = torch.stack([best(own, network.edges, share, by_size) for share in shares])
        found.append(network.ablated(some, kept, here, there))
    return torch.cat(found, 1)


def faithfulness(outputs: Tensor, whole: Tensor, none: Tensor) -> Tensor:
    """`[shares]`: the mean that is left, from zero (no edge) to one (all of them).

    Arguments:
        outputs: `[shares, N]`.
        whole, none: `[N]`: at the inputs and at the others.
    """
    return (outputs - none).sum(-1) / (whole - none).sum()


def area(values: Tensor, shares: Sequence[float] = SHARES) -> Tensor:
    """CPR: the area under `[..., shares]` over the share of edges."""
    return torch.trapezoid(values, torch.tensor(shares, dtype=values.dtype, device=values.device))


def distance(values: Tensor, shares: Sequence[float] = SHARES) -> Tensor:
    """CMD: the area between `[..., shares]` and one."""
    return area((1 - values).abs(), shares)
