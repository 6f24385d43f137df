"""A random network under a random composite, and what is wrong with the answers about it."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

import nrm
from support.fuzz import drawing, queries, references, walks
from support.fuzz.flows import Flows
from support.fuzz.networks import BATCH, Described, Network
from support.fuzz.queries import Answer, Asked
from support.fuzz.removals import Removed
from support.fuzz.walks import Walks


@dataclass
class Finding:
    """One answer that is wrong."""

    way: str
    query: str
    found: object
    expected: object

    def __str__(self) -> str:
        return f"{self.way}: {self.query}\n    found    {self.found}\n    expected {self.expected}"


@dataclass
class Explained:
    """What is explained of each sample: an output neuron, or the relevance of all of them."""

    of: list[int] | list[np.ndarray]

    def arguments(self, rows: Sequence[int], dtype: torch.dtype) -> dict[str, object]:
        """For a call of the explainer."""
        chosen = [self.of[row] for row in rows]
        if isinstance(chosen[0], np.ndarray):
            return {"output_relevance": torch.from_numpy(np.stack(chosen)).to(dtype)}
        return {"target": chosen if len(set(chosen)) > 1 else chosen[0]}


@dataclass
class Case:
    """A network under a composite, with all that is asked about it.

    Attributes:
        reference: other inputs, if walks are those of the differences from them.
    """

    seed: int
    network: Network
    walks: Walks
    reference: dict[str, torch.Tensor] | None = None

    @classmethod
    def drawn(cls, seed: int) -> Case:
        network = drawing.draw(seed)
        chosen = walks.draw(network, np.random.default_rng([seed, 1]))
        rng = np.random.default_rng([seed, 5])
        differs = chosen.of_differences and rng.random() < 0.3
        return cls(seed, network, chosen, references.draw(network, rng) if differs else None)

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: python tests/fuzzing.py --seed {self.seed} --count 1\n"
            f"{self.walks.text}, bias={self.walks.bias!r}"
            f"{', from a reference' if self.reference else ''}\n{self.network}"
        )

    def explained(self) -> Explained:
        """What is explained of each sample."""
        rng = np.random.default_rng([self.seed, 2])
        outputs = self.network.values[self.network.output].shape[1]
        way = rng.random()
        if way < 0.6:
            return Explained([int(rng.integers(outputs))] * BATCH)
        if way < 0.8 or self.network.head or self.reference:
            return Explained(rng.integers(0, outputs, BATCH).tolist())
        relevance = rng.integers(0, 4, (BATCH, outputs)).astype(float)
        relevance[:, 0] += 1
        return Explained(list(relevance))

    def flows(self, explained: Explained | None = None) -> tuple[list[Flows], list[Flows]] | None:
        """Of every sample, normalised and not; `None` where rounding decides what is right."""
        nets = [self._described(sample) for sample in range(BATCH)]
        if any(net.doubtful() for net in nets):
            return None
        of = (explained or self.explained()).of
        if self.reference and any(
            net.values[net.output][what] == 0 for net, what in zip(nets, of, strict=True)
        ):
            return None  # refused: the same in both
        flows = [Flows(net, what) for net, what in zip(nets, of, strict=True)]
        raw = [Flows(net, what, normalized=False) for net, what in zip(nets, of, strict=True)]
        if max(flow.variation for flow in flows) > 1e6:
            return None
        return flows, raw

    def _described(self, sample: int) -> Described:
        if self.reference is None:
            return self.walks.describe(self.network, sample)
        return references.described(self.network, self.walks, self.reference, sample)

    def findings(self) -> Iterator[Finding]:
        """Whatever is wrong; nothing if rounding decides what is right."""
        known, explained = self.flows(), self.explained()
        if known is None:
            return
        flows, raw = known
        rng = np.random.default_rng([self.seed, 4])
        nets = [flow.net for flow in flows]
        condition = max(net.condition() for net in nets)
        model, inputs = self.network.model(), self.network.inputs
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
            if tolerance * condition > 0.1 or (dtype is torch.float32 and self.seed % 3):
                continue
            model = model.to(dtype)
            explainer = nrm.Explainer(model, self.walks.composite, bias=self.walks.bias)
            given = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
            kind = str(dtype).removeprefix("torch.")
            for way, rows in (("in a batch", range(BATCH)), ("alone", [int(rng.integers(BATCH))])):
                if dtype is torch.float32 and way == "alone":
                    continue
                chosen = {name: x[list(rows)] for name, x in given.items()}
                asked_for = explained.arguments(rows, dtype)
                if self.reference is not None:
                    asked_for["reference"] = {
                        name: x[list(rows)].to(given[name].dtype)
                        for name, x in self.reference.items()
                    }
                try:
                    R = explainer(**chosen, **asked_for)
                except Exception as error:
                    yield Finding(f"{kind}, {way}", "Explainer", *_failure(error))
                    continue
                measures = [("", R)]
                if R.forward_pass.telescope is not None:
                    slow = explainer(**chosen, **asked_for)
                    slow.forward_pass.telescope = None
                    measures.append((", by messages", slow))
                for path, measure in measures:
                    asked = Asked(
                        measure,
                        self.network,
                        [flows[row] for row in rows],
                        [raw[row] for row in rows],
                        tolerance * condition,
                        np.random.default_rng([self.seed, 3]),
                    )
                    rounds = 2 if way == "in a batch" and dtype is torch.float64 else 1
                    yield from compare(asked, f"{kind}, {way}{path}", rounds)
                if rounds == 2 and self.reference is None and self.seed % 3 == 1:
                    yield from self._removed(R, explained)

    def _removed(self, R: nrm.Measure, explained: Explained) -> Iterator[Finding]:
        """What is wrong where sets of a layer are removed."""
        targets = [of for of in explained.of if isinstance(of, int)]
        rng = np.random.default_rng([self.seed, 6])
        if not targets:
            return
        text = "blocks"
        try:
            removed = Removed.draw(R, self.network, targets, rng)
            for query, found, right in removed.answers(rng) if removed else ():
                text = f"blocks of {removed.text}: {query}"
                off = np.abs(found.numpy() - right) if found.shape == right.shape else np.inf
                if not np.all(off <= 1e-7 * max(1.0, np.abs(right).max())):
                    yield Finding("float64, in a batch", text, found, right)
        except Exception as error:
            yield Finding("float64, in a batch", f"what comes after {text}", *_failure(error))

    def smaller(self, finding: Finding) -> Case:
        """The same mistake in as few steps as can be found by taking out one at a time."""
        best, going = self, True
        while going:
            going = False
            for network in shorter(best.network):
                case = replace(self, network=network)
                with contextlib.suppress(Exception):
                    if any(alike(finding, other) for other in case.findings()):
                        best, going = case, True
                        break
        return best


def compare(asked: Asked, way: str, rounds: int) -> Iterator[Finding]:
    """Every answer that is not the oracle's."""
    for query in queries.queries(asked, rounds):
        text = "the first query"
        try:
            for text, found, expected, raw in query():
                yield from _wrong(asked, way, (text, found, expected, raw))
        except Exception as error:
            yield Finding(way, f"what comes after {text}", *_failure(error))


def _wrong(asked: Asked, way: str, answer: Answer) -> Iterator[Finding]:
    text, found, expected, raw = answer
    flows = asked.raw if raw else asked.flows
    for b, value in enumerate(found):
        right = np.asarray(expected(b), dtype=float)
        size = flows[b].variation if raw else max(1.0, flows[b].variation)
        allowed = asked.tolerance * size * (100 if "given" in text else 10)
        if text.startswith("R.activations"):
            allowed = asked.tolerance * max(1.0, np.abs(right).max())
        off = np.abs(np.asarray(value, dtype=float) - right)
        if right.shape != np.shape(value) or not (off <= allowed + 1e-300).all():
            yield Finding(f"{way}, sample {b}", text, np.asarray(value), right)
            return


def _failure(error: Exception) -> tuple[str, str]:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})", "an answer"


def alike(one: Finding, other: Finding) -> bool:
    head = one.query.split("(")[0].split("[")[0]
    return other.query.startswith(head) and isinstance(one.found, str) == isinstance(
        other.found, str
    )


def shorter(network: Network) -> Iterator[Network]:
    """Networks without one step."""
    shapes = {name: value.shape for name, value in network.values.items()}
    for step in reversed(network.steps):
        for read in dict.fromkeys(step.reads):
            if shapes[read] == shapes[step.name] and network.values[read].is_floating_point():
                found = network.without(step.name, read)
                if found.steps:
                    yield found
