"""Indirect objects: what relevance, and what others, say of patching and of circuits.

"When Mary and John went to the store, John gave a drink to" is to go on with Mary. Explained is by
how much her logit is above his; each prompt has a counterfactual of the same tokens but for names:
three others, or the other one of the two repeated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nrm
from nrm.composites import CPLRP, Circuits, Composite
from nrm.display import counted
from nrm.errors import InputError
from nrm.evaluation.store import Store, digest
from nrm.targets import Combination
from nrm_reproduce import attribution
from nrm_reproduce.edge_ablation import SHARES, Llama, Pairs, area, curve, distance

PROMPTS = 120
NAMES = (
    *("Mary", "John", "Tom", "James", "Sarah", "Anna", "Mark", "Paul", "David", "Michael"),
    *("Emma", "Peter", "Lisa", "Laura", "Kate", "Jack", "Daniel", "Alice", "Robert", "Simon"),
)
PLACES = ("store", "park", "school", "office", "garden", "station")
OBJECTS = ("drink", "book", "ring", "bone", "snack", "computer")
TEMPLATES = (
    "When {A} and {B} went to the {P}, {S} gave a {O} to",
    "Then, {A} and {B} had a long talk at the {P}. {S} handed a {O} to",
    "After {A} and {B} left the {P}, {S} wanted to send a {O} to",
)
OTHERS, REPEATED = "three other names", "the other name repeated"
"""What a counterfactual has."""
KINDS = (OTHERS, REPEATED)
REFERENCE = "nrm, reference"
RANDOM = "random"
TASK, PROMPT, HALF = "one for all prompts", "one for each prompt", "one for the other half"
"""Circuits: by the mean of the scores over the prompts of a kind, or by each one's own; or by the
mean over one half of the prompts for those of the other, either way round."""
SIGNED, SIZED = "score", "absolute score"
"""By what edges are ranked."""
RESAMPLES = 1000


# -- prompts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt with its counterfactual.

    Attributes:
        ids, others: tokens of the two, as many.
        right, wrong: the indirect object and the subject, tokens.
        kind: which counterfactual it is.
    """

    text: str
    other: str
    ids: tuple[int, ...]
    others: tuple[int, ...]
    right: int
    wrong: int
    kind: str


def prompts(tokenizer: Any, count: int = PROMPTS, seed: int = 0) -> list[Prompt]:
    """Prompts by turns of three templates, of the two orders of names and of the two kinds.

    Raises:
        InputError: the tokenizer has too few of the words as one token.
    """

    def single(words: Sequence[str]) -> dict[str, int]:
        split = {w: tokenizer.encode(f" {w}", add_special_tokens=False) for w in words}
        return {word: ids[0] for word, ids in split.items() if len(ids) == 1}

    names, places, objects = single(NAMES), single(PLACES), single(OBJECTS)
    if len(names) < 5 or not places or not objects:
        raise InputError(
            f"the model's tokenizer has {len(names)} of the names, {len(places)} of the places and "
            f"{len(objects)} of the objects as one token: 5, 1 and 1 are needed"
        )
    draw = random.Random(seed)
    found = []
    for number in range(count):
        template = TEMPLATES[number % 3]
        a, b, c, d, e = draw.sample(list(names), 5)
        subject, indirect = (b, a) if number // 3 % 2 == 0 else (a, b)
        kind = KINDS[number // 6 % 2]
        words = {"P": draw.choice(list(places)), "O": draw.choice(list(objects))}
        text = template.format(A=a, B=b, S=subject, **words)
        if kind == OTHERS:
            other = template.format(A=c, B=d, S=e, **words)
        else:
            other = template.format(A=a, B=b, S=indirect, **words)
        ids, others = (tuple(tokenizer(t)["input_ids"]) for t in (text, other))
        if len(ids) != len(others):
            raise InputError(f"{text!r} and {other!r} are split into unequally many tokens")
        found.append(Prompt(text, other, ids, others, names[indirect], names[subject], kind))
    return found


def together(some: Sequence[Prompt], device: torch.device) -> Pairs:
    """Prompts of equally many tokens."""
    return Pairs(
        torch.tensor([p.ids for p in some], device=device),
        torch.tensor([p.others for p in some], device=device),
        torch.tensor([p.right for p in some], device=device),
        torch.tensor([p.wrong for p in some], device=device),
    )


def batches(some: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Numbers of prompts that have equally many tokens."""
    lengths: dict[int, list[int]] = {}
    for number, prompt in enumerate(some):
        lengths.setdefault(len(prompt.ids), []).append(number)
    for numbers in lengths.values():
        for begin in range(0, len(numbers), size):
            yield numbers[begin : begin + size]


# -- relevance -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Names(Combination):
    """For each sample the difference of two tokens' logits at the end."""

    right: Tensor
    wrong: Tensor

    def __str__(self) -> str:
        return "the logit of the right name minus that of the other"

    def weights(self, output: Tensor) -> Tensor:
        found = torch.zeros_like(output)
        rows = torch.arange(len(output), device=output.device)
        found[rows, -1, self.right] += 1
        found[rows, -1, self.wrong] -= 1
        return found


class Relevance:
    """What nrm says, with a reference and without.

    Arguments:
        model: of transformers.
        network: the same, written out.
    """

    def __init__(self, model: nn.Module, network: Llama) -> None:
        self.network = network
        self.explainers = {
            name: nrm.Explainer(model, composite, output="logits")
            for name, composite in self.composites().items()
        }

    @staticmethod
    def composites() -> dict[str, Composite | None]:
        return {REFERENCE: None, "nrm, Circuits()": Circuits(), "nrm, CPLRP()": CPLRP()}

    def measure(self, name: str, pairs: Pairs) -> nrm.Measure:
        options = {"reference": pairs.others} if name == REFERENCE else {}
        target = Names(pairs.right, pairs.wrong)
        return self.explainers[name](pairs.ids, target=target, **options)

    def by_component(self, pairs: Pairs) -> dict[str, Tensor]:
        """`[N, parts, layers, tokens]`: of differences; or relevance / value x difference."""
        with torch.no_grad():
            here = attribution.activations(self.network, self.network.run(pairs.ids))
            there = attribution.activations(self.network, self.network.run(pairs.others))
        found = {}
        for name in self.explainers:
            R = self.measure(name, pairs)
            names = self._layers()
            marginals = R.marginals(layers=[n for part in names for n in part])
            relevance = torch.stack([torch.stack([marginals[n] for n in p], 1) for p in names], 1)
            if name == REFERENCE:
                scores = relevance.sum(-1)
            else:
                share = torch.where(here == 0, 0.0, (here - there) / here)
                scores = (relevance * share).sum(-1)
                name = f"{name} / value x difference"
            found[name] = (scores * R.scale.view(-1, 1, 1, 1)).detach()
        return found

    def by_edge(self, pairs: Pairs, memory: int) -> dict[str, Tensor]:
        """`[N, receivers, senders]`, in units of what is explained; zero where there is no edge."""
        found = {}
        for name in (REFERENCE, "nrm, Circuits()"):
            R = self.measure(name, pairs)
            edges = R.edges(nrm.components(R), memory=memory)
            rows = [edges.receivers.index(receiver) for receiver in self.network.receivers]
            columns = [edges.senders.index(sender) for sender in self.network.senders]
            scores = edges.relevance[:, rows][:, :, columns] * R.scale.view(-1, 1, 1)
            found[name] = scores * self.network.edges.to(scores.device)
        return found

    def _layers(self) -> tuple[list[str], list[str], list[str]]:
        layers = [f"model.layers.{number}" for number in range(len(self.network.layers))]
        return (
            layers,
            [f"{layer}.self_attn.o_proj" for layer in layers],
            [f"{layer}.mlp.down_proj" for layer in layers],
        )


# -- correlations ----------------------------------------------------------------------------------


def moments(scores: Tensor, truth: Tensor) -> Tensor:
    """`[..., 6]`: what correlations over `[..., layers, tokens]` are made of."""
    a, b = scores.double().flatten(-2), truth.double().flatten(-2)
    one = torch.ones_like(a)
    return torch.stack([one.sum(-1), *((x * y).sum(-1) for x, y in _pairs(one, a, b))], -1)


def _pairs(one: Tensor, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(one, a), (one, b), (a, a), (b, b), (a, b)]


def pearson(found: np.ndarray) -> np.ndarray:
    """Of `[..., 6]` moments; where one of the two does not vary, zero."""
    n, a, b, aa, bb, ab = np.moveaxis(found, -1, 0)
    of_a, of_b = np.maximum(aa - a * a / n, 0), np.maximum(bb - b * b / n, 0)
    size = np.sqrt(of_a * of_b)
    return np.where(size > 0, (ab - a * b / n) / np.where(size > 0, size, 1), 0.0)


# -- all figures -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Setting:
    """What the figures are made with.

    Attributes:
        memory: bytes that a step may take.
        batch: prompts that are explained at once.
    """

    prompts: Sequence[Prompt]
    relevance: Relevance
    network: Llama
    relp: Llama
    store: Store
    seed: int
    memory: int
    batch: int
    progress: bool = False
    say: Callable[[str], None] = lambda line: None

    @property
    def device(self) -> torch.device:
        return self.network.embedding.device

    def of(self, kind: str) -> list[int]:
        """The numbers of the prompts of a kind."""
        return [n for n, prompt in enumerate(self.prompts) if prompt.kind == kind]

    def each(self, numbers: Sequence[int]) -> list[list[int]]:
        """Batches of some prompts."""
        chosen = [self.prompts[number] for number in numbers]
        return [[numbers[k] for k in batch] for batch in batches(chosen, self.batch)]

    def pairs(self, numbers: Sequence[int]) -> Pairs:
        return together([self.prompts[number] for number in numbers], self.device)


def setting(
    model: nn.Module,
    tokenizer: Any,
    store: Callable[[str], Store],
    count: int | None = None,
    seed: int = 0,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Setting:
    """With sizes that suit the model's device.

    Arguments:
        store: where what is found is kept, of a model by its digest.
    """
    network, relp = Llama(model), Llama(model, relp=True)
    on_cpu = network.embedding.device.type == "cpu"
    return Setting(
        prompts(tokenizer, count or PROMPTS, seed),
        Relevance(model, network),
        network,
        relp,
        store(digest(dict(model.named_parameters()))[:12]),
        seed,
        2**28 if on_cpu else 2**34,
        2 if on_cpu else 20,
        progress,
        say,
    )


def correlations(known: Setting) -> dict[str, Any]:
    """How well each method says what patching loses.

    Returns:
        `methods`, and for each prompt `[methods, parts, 6]` moments, as lists.
    """
    kept: dict[int, Any] = {
        number: known.store.read(_kept(known, number)) for number in range(len(known.prompts))
    }
    with counted(known.progress, "prompts patched", len(known.prompts)) as advance:
        advance(sum(found is not None for found in kept.values()))
        for kind in KINDS:
            missing = [number for number in known.of(kind) if kept[number] is None]
            for numbers in known.each(missing):
                known.say(f"patching {len(numbers)} prompts")
                methods, rows = _correlated(known, numbers)
                for number, row in zip(numbers, rows, strict=True):
                    kept[number] = {"methods": methods, "moments": row}
                    known.store.write(_kept(known, number), kept[number])
                advance(len(numbers))
    of_prompts = list(kept.values())
    return {
        "methods": of_prompts[0]["methods"],
        "moments": [found["moments"] for found in of_prompts],
    }


def _kept(known: Setting, number: int) -> str:
    """Under which name what patching a prompt finds is kept: one for each, for any batch size."""
    prompt = known.prompts[number]
    return f"patching-{digest([prompt.ids, prompt.others])[:12]}"


def _correlated(known: Setting, numbers: Sequence[int]) -> tuple[list[str], list[Any]]:
    """The methods, and for each prompt `[methods, parts, 6]`."""
    pairs = known.pairs(numbers)
    truth = attribution.patched(known.network, pairs, known.memory)
    scores = known.relevance.by_component(pairs)
    scores |= attribution.by_component(known.network, known.relp, pairs)
    rows = torch.stack([moments(found, truth) for found in scores.values()], 1)
    return list(scores), rows.tolist()


def circuits(known: Setting, kind: str) -> dict[str, Any]:
    """What the best edges of each method leave of the output, for the prompts of a kind.

    Returns:
        `prompts`, their numbers; `whole` and `none`, `[N]`, the outputs at them and at their
        counterfactuals; and `outputs`: by method, by what edges are ranked and by whose scores
        circuits are chosen `[shares, N]`.
    """
    numbers = known.of(kind)
    some = [known.prompts[number] for number in numbers]
    key = f"circuits-halves-{digest([[p.ids, p.others] for p in some])[:12]}"
    return dict(known.store.once(key, lambda: _circuits(known, numbers)))


def _circuits(known: Setting, numbers: Sequence[int]) -> dict[str, Any]:
    parts = known.each(numbers)
    order = [number for part in parts for number in part]
    scores: dict[str, Tensor] = {}
    collected: dict[str, list[Tensor]] = {}
    ends: list[tuple[Tensor, Tensor]] = []
    with counted(known.progress, "prompts explained", len(order)) as advance:
        for part in parts:
            known.say(f"edges of {len(part)} prompts")
            pairs = known.pairs(part)
            found = known.relevance.by_edge(pairs, known.memory)
            found |= attribution.by_edge(known.network, known.relp, pairs)
            for name, values in found.items():
                collected.setdefault(name, []).append(values.cpu())
            with torch.no_grad():
                ends.append(
                    (
                        known.network.run(pairs.ids, pairs.right, pairs.wrong).output,
                        known.network.run(pairs.others, pairs.right, pairs.wrong).output,
                    )
                )
            advance(len(part))
    scores = {name: torch.cat(values) for name, values in collected.items()}
    drawn = torch.Generator().manual_seed(known.seed)
    scores[RANDOM] = torch.rand(next(iter(scores.values())).shape, generator=drawn)
    outputs: dict[str, Any] = {}
    first = halves(len(order), known.seed)
    chosen = (TASK, PROMPT) if len(order) < 2 else (TASK, HALF, PROMPT)
    with counted(known.progress, "methods ablated", len(scores)) as advance:
        for name, values in scores.items():
            known.say(f"circuits of {name}")
            outputs[name] = {
                ranked: {
                    whose: _ablated(
                        known, parts, _chosen_by(values, whose, first), ranked == SIZED
                    ).tolist()
                    for whose in chosen
                }
                for ranked in (SIGNED, SIZED)
            }
            advance(1)
    return {
        "prompts": order,
        "whole": torch.cat([whole for whole, _ in ends]).tolist(),
        "none": torch.cat([none for _, none in ends]).tolist(),
        "outputs": outputs,
    }


def halves(count: int, seed: int) -> Tensor:
    """`[count]`: which of some prompts are of the first half, drawn at random."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first = torch.zeros(count, dtype=torch.bool)
    first[drawn[: count // 2]] = True
    return first


def _chosen_by(scores: Tensor, whose: str, first: Tensor) -> Tensor:
    """`[N, receivers, senders]`: the scores that each prompt's circuit is chosen by.

    Arguments:
        scores: of each prompt.
        first: `[N]`, which of them are of the first half.
    """
    if whose == TASK:
        return scores.mean(0, keepdim=True).expand_as(scores)
    if whose == PROMPT:
        return scores
    of_first, of_second = scores[first].mean(0), scores[~first].mean(0)
    return torch.where(first[:, None, None], of_second, of_first)


def _ablated(
    known: Setting, parts: Sequence[Sequence[int]], scores: Tensor, by_size: bool
) -> Tensor:
    """`[shares, N]`."""
    found, begin = [], 0
    for part in parts:
        own = scores[begin : begin + len(part)]
        found.append(curve(known.network, known.pairs(part), own, by_size, known.memory))
        begin += len(part)
    return torch.cat(found, 1).cpu()


# -- what they come to -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A figure with its interval, by bootstrap over prompts.

    Attributes:
        less: by how much it is below that of nrm with a reference, prompts drawn alike.
    """

    value: float
    low: float
    high: float
    less: float = 0.0
    less_low: float = 0.0
    less_high: float = 0.0


def _figures(draw: Callable[[np.ndarray], np.ndarray], count: int, seed: int) -> list[Figure]:
    """Figures of several methods, nrm with a reference first.

    Arguments:
        draw: `[methods]`, from the numbers of the samples that count.
    """
    own = draw(np.arange(count))
    rng = np.random.default_rng(seed)
    drawn = np.stack([draw(rng.integers(0, count, count)) for _ in range(RESAMPLES)])
    less = drawn[:, :1] - drawn
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    less_low, less_high = np.percentile(less, [2.5, 97.5], axis=0)
    return [
        Figure(*map(float, row))
        for row in zip(own, low, high, own[0] - own, less_low, less_high, strict=True)
    ]


def pooled(found: dict[str, Any], part: int, chosen: Sequence[int], seed: int) -> list[Figure]:
    """Of each method, over all layers, positions and chosen prompts together."""
    known = np.array([found["moments"][number] for number in chosen])[:, :, part]
    return _figures(lambda rows: pearson(known[rows].sum(0)), len(known), seed)


def by_prompt(found: dict[str, Any], part: int, chosen: Sequence[int], seed: int) -> list[Figure]:
    """Of each method, the mean over prompts of the correlations in each."""
    known = pearson(np.array([found["moments"][number] for number in chosen])[:, :, part])
    return _figures(lambda rows: known[rows].mean(0), len(known), seed)


def chosen_by(found: dict[str, Any]) -> list[str]:
    """By whose scores circuits are chosen."""
    one = next(iter(found["outputs"].values()))
    return list(one[SIGNED])


def curves(found: dict[str, Any], whose: str, ranked: str) -> np.ndarray:
    """`[methods, shares, N]`: outputs."""
    return np.array([one[ranked][whose] for one in found["outputs"].values()])


def areas(
    found: dict[str, Any], whose: str, ranked: str, seed: int, until_one: bool = False
) -> list[Figure]:
    """CPR of each method, or CMD; the circuits are those of all prompts, whichever are drawn."""
    outputs = curves(found, whose, ranked)
    whole, none = np.array(found["whole"]), np.array(found["none"])
    measured = distance if until_one else area

    def draw(rows: np.ndarray) -> np.ndarray:
        left = (outputs[:, :, rows] - none[rows]).sum(-1) / (whole - none)[rows].sum()
        return measured(torch.from_numpy(left), SHARES).numpy()

    return _figures(draw, len(whole), seed)
