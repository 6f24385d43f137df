"""Every token of a generated text explained at once: teacher forcing.

A causal language model that reads the whole text says at every position what it would say next, as
it did when it wrote the text token by token: what comes after a position does not change it. So
one forward pass has all steps. Step t explains the token that was written, at the position before
it; the steps are targets of one measure, whose messages travel together (`Measure.by_target`).
An encoder and decoder reads a source beside the text, and both take relevance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nrm import coloured
from nrm.capture.cache import is_cache
from nrm.coloured import Line
from nrm.display import Progress, Shown, Table, counted
from nrm.errors import InputError, TargetError
from nrm.explainer import Explainer
from nrm.explanation import Target
from nrm.graph import first_tokens, tokens_of
from nrm.measure import Measure
from nrm.targets import Combination

Other = int | Sequence[int] | Literal["next"] | None
"""What else a step might have said: one token for all steps, one for each, or the likeliest one."""
Words = Sequence[str] | Callable[[list[int]], str] | None

_TOGETHER = 64  # steps whose relevance is kept by neuron before it is added up by token


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
        against: `[steps]`, the tokens explained against; `None` where the logit itself is.
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


_MOST = 5
NOTE = (
    "Orange raises the logit of the token in the frame (on a terminal underlined), blue lowers it."
)


def _than(step: Step) -> str:
    return "" if step.against is None else f" rather than {coloured.shown(step.against)!r}"


def generation(
    explainer: Explainer,
    ids: Tensor | Sequence[int],
    prompt: int,
    *,
    source: Tensor | Sequence[int] | None = None,
    words: Words = None,
    against: Other = None,
    at: str | None = None,
    memory: int = 2**28,
    progress: Progress = False,
    **named: Any,
) -> Generation:
    """What every generated token of a text came from, in one forward pass and one run.

    Equal to explaining each step by itself, with the text up to it, for models that look back
    only: their tokens see nothing of what follows.

    Arguments:
        explainer: of a causal language model; its output is `[batch, tokens, vocabulary]`, logits
            of the token that follows (`nrm.Explainer(model, output="logits")`).
        ids: the whole text, `[tokens]` or `[1, tokens]`; or what `model.generate` returned, with
            `return_dict_in_generate` too.
        prompt: how many of its tokens were given; all after them are explained.
        source: of an encoder and decoder (T5, BART) what the encoder reads, `[tokens]` or
            `[1, tokens]`; `ids` is what the decoder reads and writes, the token that it starts
            with included. The result has the source's tokens in front.
        words: the tokens as text, or a function that makes text of a list of ids, such as
            `tokenizer.decode`; by default the ids. Of a source its words first.
        against: explain the difference to the logit of another token: one for all steps, one for
            each step, or `"next"`, the likeliest other token of each.
        at: the embeddings; by default those of the first integer input.
        memory: bytes that the messages travelling at once may take, roughly.
        progress: whether to show a progress bar; or a function to call instead, with the number of
            steps just done.
        named: further arguments of the model. With a cache (`past_key_values=`) `ids` are the
            tokens after those that it stands for, and its keys and values take a share.

    Raises:
        InputError: there is no step, or the ids are none.
        TargetError: the output is none of a language model, or a token is explained against itself.

    Example:
        >>> ids = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=20)
        >>> explainer = nrm.Explainer(model, output="logits")
        >>> nrm.generation(explainer, ids, prompt=n, words=tokenizer.decode)
    """
    ids = torch.as_tensor(_sequences(ids))
    if ids.dim() == 1:
        ids = ids.unsqueeze(0)
    if ids.dim() == 2 and len(ids) > 1:
        raise InputError(f"{len(ids)} texts are given; explain them with nrm.generations(...)")
    if source is not None:
        source = torch.as_tensor(source)
        source = source.unsqueeze(0) if source.dim() == 1 else source
    others = None if against is None else [against]
    (found,) = generations(
        explainer, ids, [prompt], source=source, words=words, against=others, at=at,
        memory=memory, progress=progress, **named,
    )  # fmt: skip
    return found


def generations(
    explainer: Explainer,
    ids: Tensor,
    prompts: Sequence[int],
    *,
    source: Tensor | None = None,
    attention_mask: Tensor | None = None,
    words: Words | Sequence[Sequence[str]] = None,
    against: Sequence[Other] | None = None,
    at: str | None = None,
    memory: int = 2**28,
    progress: Progress = False,
    **named: Any,
) -> list[Generation]:
    """The same for a batch of texts, padded on either side to one length.

    Where texts are padded on the left, positions count from their first token, if the model takes
    `position_ids` and none are given.

    Arguments:
        ids: `[batch, tokens]`, or what `model.generate` returned.
        prompts: of each text, how many of its own tokens were given.
        source: of an encoder and decoder, `[batch, tokens of the source]`.
        attention_mask: `[batch, tokens]`, zero at padding; each text in one piece. Where there is
            a source it is that of the source, as for the model, and `decoder_attention_mask` that
            of the texts. Beside a cache it has the tokens of that in front, as for the model.
        words: a function that makes text of a list of ids; or the words of each text.
        against: as for `generation`, one for each text.
        others: as for `generation`.

    Returns:
        a result for each text, without its padding.
    """
    ids = _sequences(ids)
    _check_ids(ids)
    for option in ("reference", "target", "output_relevance"):
        if option in named:
            raise InputError(
                f"generations take no {option}=: each step explains its own token. Explain one "
                f"step with explainer(ids, {option}=...)."
            )
    mask, named = _masks(explainer, ids, source, attention_mask, named)
    spans = _spans(mask, ids, prompts)
    # The first step is the target that the measure is made with; all others follow from it.
    count = max(end - begin - prompt for (begin, end), prompt in zip(spans, prompts, strict=True))
    places = torch.tensor(
        [
            [min(begin + prompt + step, end - 1) for step in range(count)]
            for (begin, end), prompt in zip(spans, prompts, strict=True)
        ],
        device=ids.device,
    )
    tokens = ids.gather(1, places)
    start = torch.stack([places[:, 0] - 1, tokens[:, 0]], 1)
    R = explainer(*(() if source is not None else (ids,)), target=start, **named)
    logits = _logits(R, ids)
    others = None if against is None else _others(against, logits, places, tokens, spans, prompts)
    steps: list[Target] = []
    for k in range(count):
        place, token = places[:, k] - 1, tokens[:, k]
        said = torch.stack([place, token], 1)
        steps.append(said if others is None else _Step(place, token, others[:, k]))
    relevance = _by_token(R, steps, _layers(R, source, at), memory, progress)
    read = torch.ones(ids.shape[0], 0, dtype=torch.bool) if source is None else _read(named)
    whole = ids if source is None else torch.cat([source, ids], 1)
    if relevance.shape[2] != whole.shape[1]:
        raise InputError(
            f"there are {relevance.shape[2]} embeddings for {whole.shape[1]} tokens; name those of "
            "the text with at="
        )
    scale = _values(logits, places, tokens)
    if others is not None:
        scale = scale - _values(logits, places, others)
    results = []
    for text, ((begin, end), prompt) in enumerate(zip(spans, prompts, strict=True)):
        there = torch.zeros(ids.shape[1], dtype=torch.bool)
        there[begin:end] = True
        kept = torch.cat([read[text].cpu(), there]).nonzero()[:, 0].to(ids.device)
        own, before = whole[text, kept], int(read[text].sum())
        length = end - begin - prompt
        other = None if others is None else others[text, :length]
        results.append(
            Generation(
                _words(words, own, text, len(ids)),
                own,
                before + prompt,
                relevance[:length, text][:, kept],
                scale[text, :length].clone(),
                other,
                None if other is None else _words(words if callable(words) else None, other, 0, 1),
                before,
            )
        )
    return results


def _masks(
    explainer: Explainer,
    ids: Tensor,
    source: Tensor | None,
    attention_mask: Tensor | None,
    named: dict[str, Any],
) -> tuple[Tensor, dict[str, Any]]:
    """What of the texts counts, and the arguments of the model by name.

    Raises:
        InputError: there is a source that the model does not read, or none that it needs.
    """
    named = dict(named)
    if attention_mask is not None:
        named["attention_mask"] = attention_mask
    reads_source = _takes(explainer, "decoder_input_ids")
    if source is None:
        if reads_source:
            raise InputError(
                f"{type(explainer.model).__name__} is an encoder and decoder: give what the "
                "encoder reads as source=, and the decoder's tokens as the text."
            )
        if attention_mask is None:
            return torch.ones_like(ids), named
        before = _cached(named)
        if before and attention_mask.shape != (len(ids), before + ids.shape[1]):
            raise InputError(
                f"the mask is {tuple(attention_mask.shape)}: beside a cache of {before} tokens, "
                f"that of {ids.shape[1]} more says of all of them which count, as for the model: "
                f"{(len(ids), before + ids.shape[1])}."
            )
        if "position_ids" not in named and _takes(explainer, "position_ids"):
            places = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            plain = torch.arange(places.shape[1], device=places.device)
            if bool(((places != plain) & attention_mask.bool()).any()):
                named["position_ids"] = places[:, before:]
        return attention_mask[:, before:], named
    if not reads_source:
        raise InputError(
            f"{type(explainer.model).__name__} takes no decoder_input_ids=: it reads no source "
            "beside the text. Put what it is to read in front of the text."
        )
    _check_ids(source)
    if len(source) != len(ids):
        raise InputError(f"{len(source)} sources for {len(ids)} texts")
    named |= {"input_ids": source, "decoder_input_ids": ids}
    mask = named.get("decoder_attention_mask", torch.ones_like(ids))
    return mask, named


def _cached(named: dict[str, Any]) -> int:
    """How many tokens a given cache stands for."""
    cache: Any = named.get("past_key_values")
    return int(cache.get_seq_length()) if is_cache(cache) else 0


def _read(named: dict[str, Any]) -> Tensor:
    """`[batch, tokens of the source]`: which of them count."""
    mask: Tensor = named.get("attention_mask", torch.ones_like(named["input_ids"]))
    return mask.bool()


def _layers(R: Measure, source: Tensor | None, at: str | None) -> list[str]:
    """The embeddings of the tokens, those of the source first."""
    if source is None:
        return [first_tokens(R.graph) if at is None else at]
    own = tokens_of(R.graph, "decoder_input_ids") if at is None else at
    return [tokens_of(R.graph, "input_ids"), own]


def _by_token(
    R: Measure,
    steps: Sequence[Target],
    layers: Sequence[str],
    memory: int,
    progress: Progress,
) -> Tensor:
    """`[steps, batch, tokens]`, the tokens of all layers one after the other."""
    rows = []
    with counted(progress, "steps", len(steps)) as advance:
        for begin in range(0, len(steps), _TOGETHER):
            chosen, found = steps[begin : begin + _TOGETHER], []
            for layer in layers:
                told = advance if layer == layers[-1] else False
                by_neuron = R.by_target(chosen, at=layer, memory=memory, progress=told)
                found.append(by_neuron.sum(-1))
            rows.append(torch.cat(found, -1))
    return torch.cat(rows)


@dataclass(frozen=True, eq=False)
class _Step(Combination):
    """One step of every text: the difference of two logits, those of other tokens in each.

    Attributes:
        position: `[batch]`, the position before the token.
        token: `[batch]`.
        other: `[batch]`, what is subtracted.
    """

    position: Tensor
    token: Tensor
    other: Tensor

    def __str__(self) -> str:
        pairs = zip(self.position.tolist(), self.token.tolist(), strict=True)
        return f"output {', '.join(map(str, pairs))} minus token {self.other.tolist()}"

    def weights(self, output: Tensor) -> Tensor:
        found, rows = torch.zeros_like(output), torch.arange(len(output), device=output.device)
        found[rows, self.position, self.token] = 1.0
        found[rows, self.position, self.other] = -1.0
        return found


def _sequences(ids: Any) -> Any:
    """The texts of what `generate(..., return_dict_in_generate=True)` returns."""
    return getattr(ids, "sequences", ids)


def _check_ids(ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        given = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"the texts are integer ids [batch, tokens], not {given}")


def _takes(explainer: Explainer, name: str) -> bool:
    return name in inspect.signature(explainer.model.forward).parameters


def _spans(mask: Tensor, ids: Tensor, prompts: Sequence[int]) -> list[tuple[int, int]]:
    """Where each text begins and ends.

    Raises:
        InputError: it has no step, or lies in several pieces.
    """
    if mask.shape != ids.shape:
        raise InputError(f"the mask is {tuple(mask.shape)}, the texts {tuple(ids.shape)}")
    if len(prompts) != len(ids):
        raise InputError(f"{len(ids)} texts, and the lengths of {len(prompts)} prompts")
    spans = []
    for text, (row, prompt) in enumerate(zip(mask.bool().tolist(), prompts, strict=True)):
        length = sum(row)
        begin = row.index(True) if length else 0
        if not all(row[begin : begin + length]):
            raise InputError(f"text {text} lies in several pieces: padding is at an end")
        if not 1 <= prompt < length:
            raise InputError(
                f"the prompt of text {text} is {prompt} tokens: at least one is given, and of its "
                f"{length} tokens at least one is explained"
            )
        spans.append((begin, begin + length))
    return spans


def _logits(R: Measure, ids: Tensor) -> Tensor:
    """`[batch, tokens, vocabulary]`."""
    logits = R.output
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise TargetError(
            f"the output {tuple(logits.shape)} is not [batch, tokens, vocabulary] for texts "
            f"{tuple(ids.shape)}: every position has to say what follows"
        )
    return logits


def _values(logits: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """`[batch, steps]`: what the position before each place says of a token."""
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    return logits[rows, places - 1, tokens]


def _others(
    against: Sequence[Other],
    logits: Tensor,
    places: Tensor,
    tokens: Tensor,
    spans: Sequence[tuple[int, int]],
    prompts: Sequence[int],
) -> Tensor:
    """`[batch, steps]`, what each step is explained against.

    Raises:
        TargetError: it is the token itself, or there is none for each step.
    """
    if isinstance(against, str | int) or len(against) != len(tokens):
        raise TargetError(f"give what to explain against for each of the {len(tokens)} texts")
    found, count = tokens.clone(), tokens.shape[1]
    for text, other in enumerate(against):
        begin, end = spans[text]
        length = end - begin - prompts[text]
        if isinstance(other, str):
            if other != "next":
                raise TargetError(
                    f"against is a token, one for each step, or 'next', not {other!r}"
                )
            at = logits[text, places[text] - 1].clone()
            at[torch.arange(count), tokens[text]] = -torch.inf
            found[text] = at.argmax(-1)
            continue
        each = [other] * length if isinstance(other, int) else list(other or ())
        if len(each) != length:
            raise TargetError(f"{len(each)} tokens to explain against, for {length} steps")
        outside = [k for k in each if not 0 <= k < logits.shape[-1]]
        if outside:
            raise TargetError(
                f"token {outside[0]} is out of range: there are {logits.shape[-1]} (from 0)"
            )
        same = [k for k, other in enumerate(each) if other == int(tokens[text, k])]
        if same:
            raise TargetError(
                f"step {same[0]} is explained against token {each[same[0]]}, which it said itself"
            )
        found[text, :length] = torch.tensor(each, device=found.device)
        found[text, length:] = each[-1]  # of steps that are left out in the end
    return found


def _words(words: Any, ids: Tensor, text: int, texts: int) -> tuple[str, ...]:
    if words is None:
        return tuple(f" {token}" for token in ids.tolist())
    if callable(words):
        return tuple(words([token]) for token in ids.tolist())
    given = words if texts == 1 and isinstance(next(iter(words), None), str) else words[text]
    if len(given) != len(ids):
        raise InputError(f"{len(given)} words for {len(ids)} tokens")
    return tuple(given)
