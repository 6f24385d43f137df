"""A generated text with what every token of it came from: as a table, in colour, as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nrm import coloured
from nrm.coloured import Line
from nrm.display import Shown, Table

NOTE = (
    "Orange raises the logit of the token in the frame (on a terminal underlined), blue lowers it."
)
_MOST = 5


@dataclass(frozen=True)
class Step:
    """One token of a text, and what it came from.

    Attributes:
        place: of the token in the text.
        word: the token.
        against: the token that it is explained against, if any.
        relevance: `[tokens]`, shares; zero from the token itself on.
        scale: the explained logit, or difference of logits.
    """

    place: int
    word: str
    against: str | None
    relevance: Tensor
    scale: float


@dataclass(frozen=True)
class Generation(Shown):
    """The relevance of every token of a text for each token that was generated after it.

    Attributes:
        words: the tokens of the text, without padding; of an encoder and decoder those of the
            source in front.
        ids: `[tokens]`.
        prompt: how many of them were given; the others are explained, a step each.
        relevance: `[steps, tokens]`, shares of what each step explains. A row sums to one minus
            what biases, other constants and a given cache take.
        scale: `[steps]`, the explained logits (or differences): a row times its scale is in their
            units.
        against, against_words: `[steps]`, the tokens explained against, and these as text; `None`
            where the logit itself is explained.
        source: how many tokens in front are those of a source, that an encoder read.
    """

    words: tuple[str, ...]
    ids: Tensor
    prompt: int
    relevance: Tensor
    scale: Tensor
    against: Tensor | None
    against_words: tuple[str, ...] | None = None
    source: int = 0

    def __len__(self) -> int:
        return len(self.relevance)

    def __iter__(self) -> Iterator[Step]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Step:
        if not -len(self) <= step < len(self):
            raise IndexError(f"there are {len(self)} steps, and none of number {step}")
        step %= len(self)
        place = self.prompt + step
        other = None if self.against_words is None else self.against_words[step]
        row = self.relevance[step]
        return Step(place, self.words[place], other, row, float(self.scale[step]))

    def lines(self) -> list[Line]:
        """The steps as coloured text: what stood there before each token, and the token.

        In units of the logits, so that a step of next to no difference shows next to no colour.
        """
        return [
            Line(
                f"{step.scale:+.2f}{_than(step)}",
                self.words[: step.place + 1],
                (step.relevance[: step.place + 1] * step.scale).tolist(),
                step.place,
            )
            for step in self
        ]

    @property
    def title(self) -> str:
        """How many tokens are explained, by what, in a line."""
        what = "logits" if self.against is None else "differences of logits"
        source = f"the {self.source} of the source and " if self.source else ""
        by = f"{source}those before them"
        return f"{len(self)} generated tokens, explained by {by} ({what} in front)"

    def table(self) -> Table:
        """A row for each step: its token, what is explained, and the most relevant tokens."""
        rows = []
        for step in self:
            order = step.relevance.abs().argsort(descending=True, stable=True)
            most = [k for k in order[:_MOST].tolist() if step.relevance[k] != 0]
            named = ", ".join(
                f"{coloured.shown(self.words[k])!r} ({k}) {float(step.relevance[k]):+.2f}"
                for k in most
            )
            rest = 1 - float(step.relevance.sum())
            word = f"{coloured.shown(step.word)!r}{_than(step)}"
            rows.append((str(step.place), word, f"{step.scale:.4g}", named, f"{rest:+.2f}"))
        heads = ("place", "token", "scale", "most relevant tokens (place), shares", "rest")
        notes = ["The rest of each share is taken by biases, other constants and a given cache."]
        return Table(self.title, heads, rows, notes)

    def html(self) -> str:
        """A page in colour, of one file."""
        return coloured.page(self.lines(), self.title, [NOTE])

    def as_json(self) -> dict[str, Any]:
        """What there is, for `json.dumps`."""
        return {
            "tokens": list(self.words),
            "ids": self.ids.tolist(),
            "prompt": self.prompt,
            "source": self.source,
            "steps": [
                {
                    "place": step.place,
                    "token": step.word,
                    "against": step.against,
                    "scale": step.scale,
                    "relevance": step.relevance.tolist(),
                }
                for step in self
            ],
        }

    def _repr_html_(self) -> str:
        return coloured.html(self.lines(), self.title, [NOTE])

    def __rich__(self) -> Any:
        return coloured.rich(self.lines(), self.title, [NOTE])


def _than(step: Step) -> str:
    return "" if step.against is None else f" rather than {coloured.shown(step.against)!r}"
