"""Queries drawn at random, and what the oracle says to each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import nrm
from support.fuzz.flows import Flows, Holds
from support.fuzz.networks import Network


@dataclass
class Asked:
    """One measure, and the flows of each of its samples.

    Attributes:
        tolerance: of rounding, relative to the total variation.
    """

    R: nrm.Measure
    network: Network
    flows: list[Flows]
    raw: list[Flows]
    tolerance: float
    rng: np.random.Generator

    @property
    def names(self) -> list[str]:
        """Variables that walks visit, but for leaves that enter late."""
        same = {step.name for step in self.network.steps if step.same}
        order = self.flows[0].order
        return [name for name in order if not {".", "~"} & set(name) and name not in same]

    def laid(self, found: Tensor, name: str) -> list[np.ndarray]:
        """A tensor shaped like a variable, for each sample."""
        axis = self.R.graph.variable(self.network.address(name)).batch_axis
        found = found.detach().double()
        rows = found[None] if axis is None else found.movedim(axis, 0)
        return [row.flatten().numpy() for row in rows]


Answer = tuple[str, Sequence[object], Callable[[int], object], bool]
"""A query, what was found for each sample, what is right for one, and whether unnormalised."""


def queries(asked: Asked, rounds: int) -> Iterator[Callable[[], Iterator[Answer]]]:
    """All kinds of queries, one after the other."""
    yield lambda: _everything(asked)
    for _ in range(rounds):
        yield lambda: _about_sets(asked)
    yield lambda: _combinations(asked)


def _everything(asked: Asked) -> Iterator[Answer]:
    """Marginals of all variables, leaves, biases, layers of the proper form."""
    R, flows, address = asked.R, asked.flows, asked.network.address
    plain = [flow.asked().marginals() for flow in flows]
    every = R.marginals()
    for name in flows[0].order:
        known = address(name)
        if "~" in name or ("." not in name and name not in asked.names):
            continue
        if name.endswith((".fill", ".padding", ".flat")) and known not in every:
            continue  # nothing flows there: below
        yield (
            f"R.marginals()[{known!r}]",
            asked.laid(every[R.graph.variable(known).name], name),
            lambda b, n=name: plain[b][n],
            False,
        )
    for name in asked.names:
        known = address(name)
        yield (
            f"R.marginal({known!r})",
            asked.laid(R.marginal(known), name),
            (lambda b, n=name: plain[b][n]),
            False,
        )
        yield f"R({known!r})", list(R(known)), lambda b, n=name: plain[b][n].sum(), False
    leaves = [v.name for v in R.graph.leaves]
    yield "leaves", list(sum(R(leaf) for leaf in leaves)), lambda b: 1.0, False
    shares = R.biases()
    given = {*asked.network.leaves}
    late = [n for n in flows[0].leaves if n not in given and asked.network.address(n) in shares]
    for name in late:
        yield (
            f"R.biases()[{name!r}]",
            list(shares[address(name)]),
            (lambda b, n=name: plain[b][n].sum()),
            False,
        )
    unknown = sorted(shares.keys() - {address(n) for n in flows[0].leaves})
    if unknown:
        hidden = [name for name in flows[0].leaves if "~" in name]
        yield (
            f"R.biases() of {unknown}",
            list(sum(shares[name] for name in unknown)),
            (lambda b: sum(plain[b][name].sum() for name in hidden)),
            False,
        )
    for layer in R.proper_form():
        yield f"R.proper_form()[{layer.index}].total", list(layer.total), lambda b: 1.0, False
    health = R.diagnostics()
    yield "worst cut", [health.worst_cut_deviation] * len(flows), lambda b: 0.0, False


@dataclass
class Sets:
    """Some random neuron sets, for the package and for each sample's oracle."""

    texts: list[str]
    events: list[nrm.formulas.NeuronSet]
    masks: list[list[dict[str, np.ndarray]]]


def _sets(asked: Asked, count: int) -> Sets:
    rng, texts, events = asked.rng, [], []
    batch = len(asked.flows)
    masks: list[list[dict[str, np.ndarray]]] = [[] for _ in range(batch)]
    for _ in range(count):
        chosen = rng.choice(asked.names, min(len(asked.names), 1 + (rng.random() < 0.3)), False)
        united, parts = None, []
        for name in map(str, chosen):
            size = asked.flows[0].sizes[name]
            by_sample = rng.random() < 0.2
            mask = rng.random((batch if by_sample else 1, size)) < 0.6
            mask[:, rng.integers(size)] = True
            if rng.random() < 0.15:
                mask[:] = True
            shape = asked.network.shape(name)
            laid = torch.from_numpy(mask).view(len(mask), *shape)
            one = nrm.mask(asked.network.address(name), laid if by_sample else laid[0])
            united = one if united is None else united | one
            parts.append((name, mask))
        assert united is not None
        events.append(united)
        texts.append("|".join(f"{n}{m.astype(int).tolist()}" for n, m in parts))
        for b in range(batch):
            masks[b].append({n: m[b % len(m)] for n, m in parts})
    return Sets(texts, events, masks)


def drawn_formula(
    events: Sequence[nrm.formulas.Formula], rng: np.random.Generator
) -> tuple[str, nrm.formulas.Formula, Holds]:
    """A formula over events called a, b, c."""
    letters = "abc"[: len(events)]
    text, formula = letters[0], events[0]
    holds: Holds = lambda h: h[0]  # noqa: E731
    if rng.random() < 0.4:
        text, formula, holds = f"~{text}", ~formula, lambda h: not h[0]
    for k in range(1, len(events)):
        before, negated = holds, rng.random() < 0.3
        other = ~events[k] if negated else events[k]
        name = ("~" if negated else "") + letters[k]
        way = int(rng.integers(4))

        def value(h: tuple[bool, ...], k: int = k, negated: bool = negated) -> bool:
            return h[k] != negated

        if way == 0:
            text, formula = f"({text} & {name})", formula & other
            holds = lambda h, p=before, v=value: p(h) and v(h)  # noqa: E731
        elif way == 1:
            text, formula = f"({text} | {name})", formula | other
            holds = lambda h, p=before, v=value: p(h) or v(h)  # noqa: E731
        elif way == 2:
            text, formula = f"({text} ^ {name})", formula ^ other
            holds = lambda h, p=before, v=value: p(h) != v(h)  # noqa: E731
        else:
            text, formula = f"({text} >> {name})", formula >> other
            holds = lambda h, p=before, v=value: not p(h) or v(h)  # noqa: E731
    return text, formula, holds


def _about_sets(asked: Asked) -> Iterator[Answer]:
    """Joint, conditional and marginal relevance of random sets, formulas, weights."""
    R, rng, flows = asked.R, asked.rng, asked.flows
    sets = _sets(asked, int(rng.integers(1, 4)))
    a, about = sets.events, ", ".join(f"{n}={t}" for n, t in zip("abc", sets.texts, strict=False))
    known = [flow.asked(sets.masks[b]) for b, flow in enumerate(flows)]
    yield f"R(*sets), {about}", list(R(*a)), lambda b: known[b].relevance(), False
    text, formula, holds = drawn_formula(a, rng)
    about = f"{text}, {about}"
    yield f"R({about})", list(R(formula)), lambda b: known[b].relevance(holds), False
    pair = R.relevances(formula, a[0])
    yield f"R.relevances({about})", list(pair[0]), lambda b: known[b].relevance(holds), False
    yield (
        f"R.relevances(a), {about}",
        list(pair[1]),
        (lambda b: known[b].relevance(lambda h: h[0])),
        False,
    )
    found = R.outcomes(*a)
    for state in known[0].outcomes():
        values = found.get(state, torch.zeros(len(flows)))
        yield (
            f"R.outcomes(*sets)[{state}], {about}",
            list(values),
            (lambda b, s=state: known[b].outcomes()[s]),
            False,
        )
    if len(a) > 1:
        given = R(a[0], given=a[1:])
        below = [flow.relevance(lambda h: all(h[1:])) for flow in known]

        def conditional(b: int) -> object:
            certain = abs(below[b]) > 1e-2
            return known[b].relevance() / below[b] if certain else float(given[b])

        yield f"R(a, given=rest), {about}", list(given), conditional, False
    name = str(rng.choice(asked.names))
    layer = asked.network.address(name)
    yield (
        f"R.marginal({layer!r}, {about})",
        asked.laid(R.marginal(layer, formula), name),
        (lambda b: known[b].marginals(holds)[name]),
        False,
    )
    leaf = str(rng.choice([n for n in asked.names if n in flows[0].leaves]))
    at = asked.network.address(leaf)
    heat = R.heatmap(*a, at=at)
    yield (
        f"R.heatmap(*sets, at={at!r}), {about}",
        asked.laid(heat, leaf),
        (lambda b: known[b].marginals()[leaf]),
        False,
    )
    if len(a) > 1:
        there = asked.laid(R.marginal(layer, a[0], given=a[1:]), name)
        yield (
            f"R.marginal({layer!r}, a, given=rest), {about}",
            there,
            (lambda b: known[b].marginals()[name] / below[b] if abs(below[b]) > 1e-2 else there[b]),
            False,
        )
    several = R.heatmaps([formula, list(a), a[0]], at=at)
    for k, of in enumerate((holds, all, lambda h: h[0])):
        yield (
            f"R.heatmaps([formula, sets, a])[{k}], {about}",
            asked.laid(several[k], leaf),
            (lambda b, of=of: known[b].marginals(of)[leaf]),
            False,
        )
    every = R.marginals(formula)
    for other in rng.choice(asked.names, min(3, len(asked.names)), False):
        place = R.graph.variable(asked.network.address(str(other))).name
        yield (
            f"R.marginals(formula)[{place!r}], {about}",
            (asked.laid(every[place], str(other))),
            (lambda b, n=str(other): known[b].marginals(holds)[n]),
            False,
        )
    ahead = R.conditionals(*a)
    for other in rng.permutation(asked.names)[:3]:
        place = R.graph.variable(asked.network.address(str(other))).name
        if place in ahead:
            yield (
                f"R.conditionals(*sets)[{place!r}], {about}",
                (asked.laid(ahead[place], str(other))),
                (lambda b, n=str(other): known[b].conditionals()[n]),
                False,
            )
    yield from _weights(asked, sets, about)
    yield from _unnormalized(asked, sets, about)


def _weights(asked: Asked, sets: Sets, about: str) -> Iterator[Answer]:
    """What closes neurons or counts them."""
    R, flows, rng = asked.R, asked.flows, asked.rng
    rest = sets.events[1:]
    inside = [
        flow.asked(sets.masks[b][1:], _open(sets.masks[b][0])) for b, flow in enumerate(flows)
    ]
    yield (
        f"R(*rest, within=a), {about}",
        list(R(*rest, within=sets.events[0])),
        (lambda b: inside[b].relevance()),
        False,
    )
    name = str(rng.choice(asked.names))
    layer = asked.network.address(name)
    there = R.marginal(layer, *rest, within=sets.events[0])
    yield (
        f"R.marginal({layer!r}, *rest, within=a), {about}",
        asked.laid(there, name),
        (lambda b: inside[b].marginals()[name]),
        False,
    )
    known = [flow.asked(sets.masks[b]) for b, flow in enumerate(flows)]
    weights = {
        str(n): rng.integers(-2, 3, asked.flows[0].sizes[n]).astype(float)
        for n in rng.choice(asked.names, min(2, len(asked.names)), False)
    }
    laid = {
        asked.network.address(n): torch.from_numpy(w).view(asked.network.shape(n))
        for n, w in weights.items()
    }
    text = f"{ {n: w.tolist() for n, w in weights.items()} }, {about}"
    yield (
        f"R.weighted(sum) {text}",
        list(R.weighted(laid, *sets.events)),
        (lambda b: sum(float(w @ known[b].marginals()[n]) for n, w in weights.items())),
        False,
    )
    products = [flow.asked(sets.masks[b], weights) for b, flow in enumerate(flows)]
    yield (
        f"R.weighted(product) {text}",
        (list(R.weighted(laid, *sets.events, over="product"))),
        (lambda b: products[b].relevance()),
        False,
    )
    plain = [flow.asked() for flow in flows]

    def visits(b: int) -> float:
        of = plain[b].marginals()
        united: dict[str, np.ndarray] = {}
        for event in sets.masks[b]:
            for n, mask in event.items():
                united[n] = united.get(n, mask) | mask
        return sum(float(of[n][mask].sum()) for n, mask in united.items()) / 4

    yield (
        f"R.additive(*sets, layers=4), {about}",
        list(R.additive(*sets.events, layers=4)),
        (visits),
        False,
    )


def _unnormalized(asked: Asked, sets: Sets, about: str) -> Iterator[Answer]:
    R, raw = asked.R, asked.raw
    known = [flow.asked(sets.masks[b]) for b, flow in enumerate(raw)]
    yield (
        f"R(*sets, normalized=False), {about}",
        list(R(*sets.events, normalized=False)),
        (lambda b: known[b].relevance()),
        True,
    )
    name = str(asked.rng.choice(asked.names))
    layer = asked.network.address(name)
    found = R.marginal(layer, *sets.events, normalized=False)
    yield (
        f"R.marginal({layer!r}, *sets, normalized=False), {about}",
        asked.laid(found, name),
        (lambda b: known[b].marginals()[name]),
        True,
    )


def _open(event: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: mask.astype(float) for name, mask in event.items()}


def _combinations(asked: Asked) -> Iterator[Answer]:
    """All pairs of neurons of two layers, by every method; all channels; the best pairs."""
    R, flows, rng = asked.R, asked.flows, asked.rng
    names = [
        n for n in asked.names if R.graph.variable(asked.network.address(n)).batch_axis is not None
    ]
    if len(names) < 2:
        return
    for _ in range(2):
        first, second = map(str, rng.choice(names, 2, False))
        a, b_ = asked.network.address(first), asked.network.address(second)
        expected = [_pairs(flow, first, second) for flow in flows]
        for method in ("auto", "backward", "forward"):
            pairs = R.joint(a, b_, by="neuron", method=method)
            yield (
                f"R.joint({a!r}, {b_!r}, by='neuron', method={method!r})",
                ([p.double().numpy() for p in pairs]),
                (lambda b, e=expected: e[b]),
                False,
            )
        if not R.activations(a)[0].dim() or not R.activations(b_)[0].dim():
            continue
        masks = [_channels(R, n) for n in (a, b_)]
        for text, coarse in (("", R.joint(a, b_)), (", memory=1", R.joint(a, b_, memory=1))):
            yield (
                f"R.joint({a!r}, {b_!r}{text})",
                [p.double().numpy() for p in coarse],
                (lambda b, e=expected, m=masks: m[0] @ e[b] @ m[1].T),
                False,
            )
        yield (
            f"R.channels({a!r})",
            [row.double().numpy() for row in R.channels(a)],
            (lambda b, n=first, m=masks: m[0] @ flows[b].asked().marginals()[n]),
            False,
        )
        yield from _three(asked, first, second)
        if not (flows[0].leads(first, second) or flows[0].leads(second, first)):
            continue  # refused: no walk passes both
        best = R.top(a, b_, by="neuron", k=3, order="absolute")
        largest = sorted(expected[0].ravel(), key=abs, reverse=True)[: len(list(best))]
        yield (
            f"R.top({a!r}, {b_!r}, by='neuron', k=3, order='absolute')",
            ([np.abs([flow.relevance for flow in best])]),
            (lambda b, e=largest: np.abs(e)),
            False,
        )


def _three(asked: Asked, first: str, second: str) -> Iterator[Answer]:
    """All combinations of two parts of each of three layers, a layer given twice left out."""
    R, rng, flows = asked.R, asked.rng, asked.flows
    third = str(rng.choice(asked.names))
    chosen = [n for n in dict.fromkeys((first, second, third)) if flows[0].sizes[n] > 1]
    if len(chosen) < 2:
        return
    layers = [asked.network.address(n) for n in chosen]
    if any(R.graph.variable(layer).batch_axis is None for layer in layers):
        return
    masks, sets = [], []
    for name, layer in zip(chosen, layers, strict=True):
        mask = rng.random(flows[0].sizes[name]) < 0.5
        mask[:2] = True, False
        masks.append([mask, ~mask])
        laid = torch.from_numpy(mask).view(asked.network.shape(name))
        sets.append([nrm.mask(layer, laid), nrm.mask(layer, ~laid)])
    found = R.joint(*sets)
    text = ", ".join(
        f"{layer}{m[0].astype(int).tolist()}" for layer, m in zip(layers, masks, strict=True)
    )

    def right(b: int) -> np.ndarray:
        values = np.zeros((2,) * len(chosen))
        for place in np.ndindex(*values.shape):
            parts = zip(chosen, masks, place, strict=True)
            values[place] = flows[b].asked([{n: m[k]} for n, m, k in parts]).relevance()
        return values

    yield f"R.joint of {text} and the rest", [row.double().numpy() for row in found], right, False


def _pairs(flow: Flows, first: str, second: str) -> np.ndarray:
    found = []
    for i in range(flow.sizes[first]):
        mask = np.arange(flow.sizes[first]) == i
        found.append(flow.asked([{first: mask}]).marginals()[second])
    return np.array(found)


def _channels(R: nrm.Measure, layer: str) -> np.ndarray:
    """Which neurons each channel of a layer has, as its channel axis says: `[C, neurons]`."""
    variable = R.graph.variable(layer)
    shape = list(R.activations(layer).shape)
    del shape[variable.batch_axis or 0]
    axis = variable.channel_axis
    axis = 0 if axis is None else len(shape) + axis
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    return np.array(
        [np.isin(numbers, numbers.take(c, axis)).ravel() for c in range(shape[axis])], dtype=float
    )
