"""Sets of a layer removed (`nrm.Blocks`): what lies above it as differences, for each set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import nrm
from support.fuzz.flows import Asked, Flows, Holds
from support.fuzz.networks import BATCH, EPS, Network
from support.fuzz.queries import drawn_formula
from support.fuzz.references import described
from support.fuzz.walks import Walks

Event = dict[str, np.ndarray]


@dataclass
class Set:
    """One set removed: of each sample the flows above, and what the explained output loses.

    Attributes:
        flows: `None` where the output is the same.
        lost: as a share of the explained output.
    """

    flows: list[Flows | None]
    lost: np.ndarray


@dataclass
class Removed:
    """Disjoint sets of a layer, each removed.

    Attributes:
        blocks: what the package makes of it.
        above: the names of the layer and of all above it.
    """

    blocks: nrm.Blocks
    network: Network
    layer: str
    text: str
    sets: list[Set]
    above: list[str]

    @classmethod
    def draw(
        cls, R: nrm.Measure, network: Network, targets: Sequence[int], rng: np.random.Generator
    ) -> Removed | None:
        """Of a random layer; `None` where there is none, or rounding decides what is right."""
        known = {v.name for v in R.graph.variables}
        fitting = [
            step.name
            for step in network.steps[:-1]
            if step.batch_axis == 0
            and not (step.same or step.folds or network.rewritten(step.name))
            and {network.address(step.name)} <= known
        ]
        if not fitting:
            return None
        layer = str(rng.choice(fitting))
        value = network.values[layer]
        shape = value.shape[1:]
        owner = torch.from_numpy(rng.integers(0, 3, shape))  # the last: in no set
        masks = [owner == k for k in range(2) if bool((owner == k).any())]
        if not masks:
            return None
        instead: float | Tensor = 0.0
        if rng.random() < 0.5:
            instead = torch.from_numpy(rng.normal(size=shape)) if rng.random() < 0.5 else 0.5
        upper = _above(network, layer)
        sets = []
        for mask in masks:
            reference = {name: x.clone() for name, x in upper.inputs.items()}
            replaced = torch.as_tensor(instead, dtype=value.dtype).expand(value.shape)
            reference[layer] = torch.where(mask, replaced, value)
            found = _removed(upper, reference, targets)
            if found is None:
                return None
            sets.append(found)
        address = network.address(layer)
        removal = {address: instead} if isinstance(instead, Tensor) else instead
        blocks = nrm.Blocks(R, [nrm.mask(address, mask) for mask in masks], removal=removal)
        text = f"{layer} {owner.tolist()}, removal={instead}"
        above = [layer, *(step.name for step in upper.steps if not step.same)]
        return cls(blocks, network, layer, text, sets, above)

    def answers(self, rng: np.random.Generator) -> Iterator[tuple[str, Tensor, np.ndarray]]:
        """Queries, what was found, what is right; both `[batch, ...]`."""
        blocks = self.blocks
        lost = np.stack([one.lost for one in self.sets], 1)
        yield "each()", blocks.each(), lost
        yield "rest", blocks.rest, 1 - lost.sum(1)
        events, masks, texts = [], [], []
        for _ in range(2):
            name = str(rng.choice(self.above))
            mask = rng.random(self.network.shape(name)) < 0.6
            events.append(nrm.mask(self.network.address(name), torch.from_numpy(mask)))
            masks.append({name: mask.ravel()})
            texts.append(f"{name}{mask.astype(int).tolist()}")
            if not mask.any():
                return
        about = ", ".join(texts)
        yield f"each(a, b), {about}", blocks.each(*events), self._each(masks)
        yield f"blocks(a, b), {about}", blocks(*events), self._each(masks).sum(1)
        text, formula, holds = drawn_formula(events, rng)
        beside = (1 - lost.sum(1)) * holds((False, False))
        right = self._each(masks, holds).sum(1) + beside
        yield f"blocks({text}), {about}", blocks(formula), right
        name = str(rng.choice(self.above))
        layer = self.network.address(name)
        marginal = blocks.marginal(layer, formula)
        right = self._put_together(name, masks, holds)
        if self._batch_first(name):
            yield f"marginal({layer!r}, {text}), {about}", marginal.flatten(1), right
            if name != self.layer:
                table = blocks.joint(layer, by="neuron").flatten(2)
                right = np.stack([self._of(k, name, []) for k in range(len(self.sets))], 1)
                yield f"joint({layer!r}, by='neuron')", table, right

    def _batch_first(self, name: str) -> bool:
        return all(step.batch_axis == 0 for step in self.network.steps if step.name == name)

    def _each(self, masks: list[Event], holds: Holds = all) -> np.ndarray:
        """`[batch, sets]`."""
        found = np.zeros((BATCH, len(self.sets)))
        for k, one in enumerate(self.sets):
            for b, flow in enumerate(one.flows):
                if flow is not None:
                    found[b, k] = one.lost[b] * Asked(flow, masks, {}).relevance(holds)
        return found

    def _of(self, k: int, name: str, masks: list[Event], holds: Holds = all) -> np.ndarray:
        """`[batch, neurons]`, of one set."""
        one = self.sets[k]
        found = np.zeros((BATCH, self.network.values[name][0].numel()))
        for b, flow in enumerate(one.flows):
            if flow is not None:
                there = Asked(flow, masks, {}).marginals(holds)
                found[b] = one.lost[b] * there.get(name, np.zeros(found.shape[1]))
        return found

    def _put_together(self, name: str, masks: list[Event], holds: Holds) -> np.ndarray:
        return sum(
            (self._of(k, name, masks, holds) for k in range(len(self.sets))), start=np.zeros(1)
        )


def _above(network: Network, layer: str) -> Network:
    """What depends on a layer, with all that it reads for inputs."""
    depends, steps = {layer}, []
    for step in network.steps:
        if step.name != layer and not depends.isdisjoint(step.reads):
            depends.add(step.name)
            steps.append(step)
    given = {read for step in steps for read in step.reads} - depends | {layer}
    return Network({n: network.values[n] for n in network.values if n in given}, steps)


def _removed(upper: Network, reference: dict[str, Tensor], targets: Sequence[int]) -> Set | None:
    flows: list[Flows | None] = []
    lost = np.zeros(BATCH)
    for b, target in enumerate(targets):
        net = described(upper, Walks("LRP-0", "zero"), reference, b)
        rise, whole = (
            float(values.ravel()[target])
            for values in (net.values[net.output], upper.values[upper.output][b].numpy())
        )
        if net.doubtful() or abs(whole) <= EPS or net.condition() > 1e6:
            return None
        lost[b] = rise / whole
        flows.append(Flows(net, target) if rise else None)
    return Set(flows, lost)
