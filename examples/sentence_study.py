"""Does the relevance of tokens predict what masking a token does? Methods on 36 pairs, as a table.

    python examples/sentence_study.py       # minutes

The encoder is that of `sentence_similarity.py`, which says what to install; with `captum` for
integrated gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sentence_similarity import PAIRS, Batch, LengthCounts, Similarity, load, token_relevance
from torch import Tensor

import nrm
from nrm.composites import AttnLRP, Composite, Everywhere, kind, path
from nrm.rules import Gamma, Identity, Shares, Zero

Method = Callable[[Similarity, Batch], tuple[Tensor, Tensor, Tensor | None]]
"""Token relevances of sentences A and B, and the total variation, where there is one."""


def replaced(model: Similarity, batch: Batch, token: int) -> Tensor:
    """How much the similarity drops when a token of sentence A is replaced: `[batch, tokens]`.

    Not a number at [CLS], [SEP] and padding.
    """
    drops = torch.full(batch.ids_a.shape, float("nan"))
    with torch.no_grad():
        other = model.direction(batch.mask_b, input_ids=batch.ids_b)

        def similarity(ids: Tensor) -> Tensor:
            return (model.direction(batch.mask_a, input_ids=ids) * other).sum(-1)

        before = similarity(batch.ids_a)
        for place in range(1, batch.ids_a.shape[1] - 1):
            ids = batch.ids_a.clone()
            ids[:, place] = token
            inside = batch.mask_a[:, place + 1] == 1
            drops[inside, place] = (before - similarity(ids))[inside]
    return drops


def deleted(model: Similarity, batch: Batch) -> Tensor:
    """How much the similarity drops when a token of sentence A is taken out: `[batch, tokens]`."""
    drops = torch.full(batch.ids_a.shape, float("nan"))
    with torch.no_grad():
        other = model.direction(batch.mask_b, input_ids=batch.ids_b)
        before = (model.direction(batch.mask_a, input_ids=batch.ids_a) * other).sum(-1)
        for place in range(1, batch.ids_a.shape[1] - 1):
            kept = [i for i in range(batch.ids_a.shape[1]) if i != place]
            rest = model.direction(batch.mask_a[:, kept], input_ids=batch.ids_a[:, kept])
            drops[:, place] = before - (rest * other).sum(-1)
    return drops


def by_relevance(composite: Composite | None = None, bias: str | None = None) -> Method:
    """Token relevances of the measure."""

    def method(model: Similarity, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        R = nrm.Explainer(model, composite, bias=bias)(*batch.inputs)  # type: ignore[arg-type]
        a, b = token_relevance(R)
        return a, b, R.diagnostics().total_variation

    return method


def both_sides(one_side: Callable[[Similarity, Batch], Tensor]) -> Method:
    """A method that explains the tokens of sentence A alone."""
    return lambda model, batch: (one_side(model, batch), one_side(model, batch.swapped), None)


def embedded(model: Similarity, batch: Batch) -> tuple[Tensor, Callable[..., Tensor], Any]:
    """Sentence A's word embeddings, the similarity as a function of them, its other arguments."""

    def similarity(x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        return (model.direction(mask, inputs_embeds=x) * other).sum(-1)

    with torch.no_grad():
        x = model.encoder.get_input_embeddings()(batch.ids_a)  # type: ignore[operator]
        other = model.direction(batch.mask_b, input_ids=batch.ids_b)
    return x, similarity, (batch.mask_a, other)


def gradient_x_input(model: Similarity, batch: Batch) -> Tensor:
    """The derivative by the word embeddings, times these."""
    x, similarity, others = embedded(model, batch)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(similarity(x, *others).sum(), x)
    return (gradient * x).sum(-1).detach()


def integrated_gradients(baseline: int | None) -> Callable[[Similarity, Batch], Tensor]:
    """From zeros, or from the embedding of a token."""

    def one_side(model: Similarity, batch: Batch) -> Tensor:
        from captum.attr import IntegratedGradients

        x, similarity, others = embedded(model, batch)
        start = torch.zeros_like(x)
        if baseline is not None:
            start += model.encoder.get_input_embeddings().weight[baseline].detach()  # type: ignore[operator]
        found: Tensor = IntegratedGradients(similarity).attribute(
            x, start, additional_forward_args=others, n_steps=50, internal_batch_size=len(x)
        )
        return found.sum(-1).detach()

    return one_side


def methods(tokenizer: Any) -> dict[str, Method]:
    """Everything that the study compares."""
    mask, unknown = tokenizer.mask_token_id, tokenizer.unk_token_id
    taylor = Composite(
        [(kind("softmax"), Zero()), (path("*.attention.*"), Shares(0.8, 0.2))], Zero(), bias="input"
    )
    identity = Composite([(kind("layernorm"), Identity())], Zero(), bias="input")
    return {
        "LengthCounts(1/3)": by_relevance(LengthCounts()),
        "CPLRP (default)": by_relevance(),
        "attention Shares(0.8, 0.2), softmax by Taylor": by_relevance(taylor),
        "AttnLRP": by_relevance(AttnLRP()),
        "Gamma(0.05), bias as input": by_relevance(Everywhere(Gamma(0.05)), "input"),
        "Gamma(0.25), bias as input": by_relevance(Everywhere(Gamma(0.25)), "input"),
        "Gamma(0.25), bias dropped": by_relevance(Everywhere(Gamma(0.25)), "drop"),
        "CPLRP, layer norm as identity": by_relevance(identity),
        "integrated gradients from [MASK]": both_sides(integrated_gradients(mask)),
        "integrated gradients from zero": both_sides(integrated_gradients(None)),
        "gradient x input": both_sides(gradient_x_input),
        "yardstick: [UNK] instead of [MASK]": both_sides(lambda m, b: replaced(m, b, unknown)),
        "yardstick: token deleted": both_sides(deleted),
    }


def pearson(relevance: Tensor, drops: Tensor) -> Tensor:
    """`[batch]`: each pair's correlation over the tokens that were masked."""
    found = []
    for x, y in zip(relevance, drops, strict=True):
        masked = ~y.isnan()
        found.append(torch.corrcoef(torch.stack([x[masked], y[masked]]))[0, 1])
    return torch.stack(found)


def interval(values: Tensor, samples: int = 10_000) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (samples, len(values)), generator=generator)
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


COLUMNS = ("method", "chosen on", "held out", "minus default", "all, A", "all, B", "TV")
"""Of the table."""


def study(model: Similarity, tokenizer: Any, console: Console) -> None:
    """Print how well each method's token relevance correlates with what masking does."""
    batch = Batch.of(PAIRS, tokenizer)
    drops_a, drops_b = (replaced(model, b, tokenizer.mask_token_id) for b in (batch, batch.swapped))
    held_out = torch.arange(len(PAIRS)) % 2 == 1
    table = Table(title="mean Pearson of token relevance with the drop under [MASK]")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right")
    found = {}
    for name, method in methods(tokenizer).items():
        a, b, variation = method(model, batch)
        found[name] = (pearson(a, drops_a), pearson(b, drops_b), variation)
        console.print(f"{name}: {float(found[name][0].mean()):.3f}", style="dim")
    default = found["CPLRP (default)"][0]
    for name, (a, b, variation) in found.items():
        table.add_row(
            name,
            f"{float(a[~held_out].mean()):.3f}",
            _mean(a[held_out]),
            _mean((a - default)[held_out], signed=True),
            _mean(a),
            _mean(b),
            "" if variation is None else f"{float(variation.median()):.3g}",
        )
    console.print(table)


def _mean(values: Tensor, signed: bool = False) -> str:
    low, high = interval(values)
    style = "+.3f" if signed else ".3f"
    return f"{float(values.mean()):{style}} [{low:{style}}, {high:{style}}]".replace("[", r"\[")


def main() -> None:
    study(*load(), Console())


if __name__ == "__main__":
    main()
