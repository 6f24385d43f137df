"""Every token of a generated text explained at once: teacher forcing.

A causal language model that reads the whole text says at every position what it would say next, as
it did when it wrote the text token by token: what comes after a position does not change it. So
one forward pass has all steps. Step t explains the token that was written, at the position before
it; the steps are targets of one measure, whose messages travel together (`Measure.by_target`).
An encoder and decoder reads a source beside the text, and both take relevance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nrm.capture.cache import is_cache
from nrm.display import Progress, counted
from nrm.errors import InputError, TargetError
from nrm.explainer import Explainer
from nrm.explanation import Target
from nrm.generated import Generation
from nrm.graph import first_tokens, tokens_of
from nrm.measure import Measure
from nrm.targets import Combination

Other = int | Sequence[int] | Tensor | Literal["next"] | None
"""What else a step might have said: one token for all steps, one for each, or the likeliest one."""
Words = Sequence[str] | Callable[[list[int]], str] | None

_TOGETHER = 64  # steps whose relevance is kept by neuron before it is added up by token


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
    texts = _Texts.of(ids, mask, prompts)
    # The first step is the target that the measure is made with; all others follow from it.
    R = explainer(*(() if source is not None else (ids,)), target=texts.said(0), **named)
    logits = _logits(R, ids)
    others = None if against is None else _others(against, logits, texts)
    steps: list[Target] = []
    for k in range(texts.steps):
        said = texts.said(k)
        steps.append(said if others is None else _Step(said[:, 0], said[:, 1], others[:, k]))
    relevance = _by_token(R, steps, _layers(R, source, at), memory, progress)
    read = torch.ones(ids.shape[0], 0, dtype=torch.bool) if source is None else _read(named)
    whole = ids if source is None else torch.cat([source, ids], 1)
    if relevance.shape[2] != whole.shape[1]:
        raise InputError(
            f"there are {relevance.shape[2]} embeddings for {whole.shape[1]} tokens; name those of "
            "the text with at="
        )
    scale = texts.logits(logits, texts.tokens)
    if others is not None:
        scale = scale - texts.logits(logits, others)
    results = []
    for text, (begin, end) in enumerate(texts.spans):
        there = torch.zeros(ids.shape[1], dtype=torch.bool)
        there[begin:end] = True
        kept = torch.cat([read[text].cpu(), there]).nonzero()[:, 0].to(ids.device)
        own, before = whole[text, kept], int(read[text].sum())
        length = texts.lengths[text]
        other = None if others is None else others[text, :length]
        results.append(
            Generation(
                _words(words, own, text, len(ids)),
                own,
                before + prompts[text],
                relevance[:length, text][:, kept],
                scale[text, :length].clone(),
                other,
                None if other is None else _words(words if callable(words) else None, other, 0, 1),
                before,
            )
        )
    return results


@dataclass(frozen=True, eq=False)
class _Texts:
    """Where the steps of a batch of texts lie.

    Attributes:
        spans: where each text begins and ends, without its padding.
        lengths: how many steps each has.
        places: `[batch, steps]`, of each step's token; of a text with fewer steps the last again.
        tokens: `[batch, steps]`, what was written there.
    """

    spans: list[tuple[int, int]]
    lengths: list[int]
    places: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, prompts: Sequence[int]) -> _Texts:
        """Those of some ids, of which a mask says what counts.

        Raises:
            InputError: a text has no step, or lies in several pieces.
        """
        spans = _spans(mask, ids, prompts)
        begins = [begin + prompt for (begin, _), prompt in zip(spans, prompts, strict=True)]
        lengths = [end - begin for (_, end), begin in zip(spans, begins, strict=True)]
        places = torch.tensor(
            [
                [begin + min(step, length - 1) for step in range(max(lengths))]
                for begin, length in zip(begins, lengths, strict=True)
            ],
            device=ids.device,
        )
        return cls(spans, lengths, places, ids.gather(1, places))

    @property
    def steps(self) -> int:
        """How many the longest text has."""
        return self.places.shape[1]

    def said(self, step: int) -> Tensor:
        """`[batch, 2]`: the position that says each token of a step, and the token."""
        return torch.stack([self.places[:, step] - 1, self.tokens[:, step]], 1)

    def logits(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """`[batch, steps]`: what the position before each step says of a token."""
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        return logits[rows, self.places - 1, tokens]


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


def _logits(R: Measure, ids: Tensor) -> Tensor:
    """`[batch, tokens, vocabulary]`, those that are explained: behind a last softmax, if any."""
    logits = R.graph.output.canonical(R.forward_pass.output.unsqueeze(0))[0]
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise TargetError(
            f"the output {tuple(logits.shape)} is not [batch, tokens, vocabulary] for texts "
            f"{tuple(ids.shape)}: every position has to say what follows"
        )
    return logits


def _others(
    against: Sequence[Other],
    logits: Tensor,
    texts: _Texts,
) -> Tensor:
    """`[batch, steps]`, what each step is explained against.

    Raises:
        TargetError: it is the token itself, or there is none for each step.
    """
    tokens = texts.tokens
    if isinstance(against, str | int) or len(against) != len(tokens):
        raise TargetError(f"give what to explain against for each of the {len(tokens)} texts")
    found, count = tokens.clone(), tokens.shape[1]
    for text, other in enumerate(against):
        length = texts.lengths[text]
        if isinstance(other, str):
            if other != "next":
                raise TargetError(
                    f"against is a token, one for each step, or 'next', not {other!r}"
                )
            at = logits[text, texts.places[text] - 1].clone()
            at[torch.arange(count), tokens[text]] = -torch.inf
            found[text] = at.argmax(-1)
            continue
        plain: Any = other
        if hasattr(plain, "tolist"):  # tensors and arrays
            plain = plain.tolist()
        each = [plain] * length if isinstance(plain, int) else list(plain or ())
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
