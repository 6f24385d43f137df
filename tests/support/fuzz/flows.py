"""A second oracle, for networks with too many walks to list: dense matrices, pass by pass.

The parents of every neuron and the contributions of each come from `oracle.Oracle`, neuron by
neuron; here they become one column-stochastic matrix for each two variables, and what a walk has
visited so far is a state. It shares nothing with the package, and is checked against the list of
all walks where that is short (`tests/test_fuzz.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from support import oracle as o

Event = Mapping[str, np.ndarray]
"""A set of neurons: a mask for each of its variables."""

Holds = Callable[[tuple[bool, ...]], bool]
"""What is asked of a walk, given which events it visits."""


class Flows:
    """One sample of one network, from its output down.

    Arguments:
        explained: an output neuron; or the unnormalised relevance of all (eq. 13).
        normalized: `False`: the unnormalised contributions (eq. 26).
    """

    def __init__(self, net: o.Oracle, explained: int | np.ndarray, normalized: bool = True) -> None:
        self.net = net
        output = net.values[net.output]
        self.unnormalized = np.zeros(len(output))
        if isinstance(explained, int):
            self.unnormalized[explained] = output[explained]
            self.start = (np.arange(len(output)) == explained).astype(float)
        else:
            self.unnormalized[:] = explained
            self.start = explained / explained.sum()
        if not normalized:
            self.start = self.unnormalized
        self.order = list(_from_output(net))
        self.sizes = {name: _size(net, name) for name in self.order}
        self.matrices: dict[str, dict[str, np.ndarray]] = {}
        self._sizes: dict[str, dict[str, np.ndarray]] = {}  # the same, two of one parent apart
        self.leaves = [name for name in self.order if name in net.leaves]
        for name in self.order:
            if name in net.leaves:
                continue
            columns: dict[str, np.ndarray] = {}
            sizes: dict[str, np.ndarray] = {}
            for j in range(self.sizes[name]):
                for (parent, i), share in net.column((name, j), normalized):
                    if parent not in columns:
                        columns[parent] = np.zeros((self.sizes[parent], self.sizes[name]))
                        sizes[parent] = np.zeros_like(columns[parent])
                    columns[parent][i, j] += share
                    sizes[parent][i, j] += abs(share)
            self.matrices[name], self._sizes[name] = columns, sizes

    def leads(self, name: str, below: str) -> bool:
        """Whether walks from one variable may come to another."""
        above = {below}
        for other in reversed(self.order):
            if not above.isdisjoint(self.matrices.get(other, {})):
                above.add(other)
        return name != below and name in above

    def asked(
        self,
        events: Sequence[Event] = (),
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> Asked:
        """Walks told apart by the events that they visit.

        Arguments:
            weights: walks count with the product of the weights of their neurons; neurons of
                weight zero are closed.
        """
        return Asked(self, events, weights or {})

    @cached_property
    def variation(self) -> float:
        """The sum of the absolute relevance of all walks."""
        messages = {name: np.zeros(size) for name, size in self.sizes.items()}
        messages[self.net.output] += np.abs(self.start)
        for name in self.order:
            for parent, matrix in self._sizes.get(name, {}).items():
                messages[parent] += matrix @ messages[name]
        return float(sum(messages[leaf].sum() for leaf in self.leaves))


class Asked:
    """The walks of `Flows`, with a state for every combination of events visited so far."""

    def __init__(
        self, flows: Flows, events: Sequence[Event], weights: Mapping[str, np.ndarray]
    ) -> None:
        self.flows, self.count, self.weights = flows, len(events), weights
        self.bits = {name: np.zeros(size, dtype=int) for name, size in flows.sizes.items()}
        for k, event in enumerate(events):
            for name, mask in event.items():
                if name in self.bits:
                    self.bits[name] |= mask.astype(int) << k

    @cached_property
    def _arrived(self) -> dict[str, np.ndarray]:
        """`[states, neurons]`: what reaches every neuron, it itself visited."""
        flows, states = self.flows, 2**self.count
        waiting = {name: np.zeros((states, size)) for name, size in flows.sizes.items()}
        waiting[flows.net.output][0] = flows.start
        arrived = {}
        for name in flows.order:
            message = self._visit(name, waiting[name])
            arrived[name] = message
            for parent, matrix in flows.matrices.get(name, {}).items():
                waiting[parent] += message @ matrix.T
        return arrived

    def _visit(self, name: str, message: np.ndarray) -> np.ndarray:
        if name in self.weights:
            message = message * self.weights[name]
        bits = self.bits[name]
        if not bits.any():
            return message
        moved, neurons = np.zeros_like(message), np.arange(message.shape[1])
        for state, row in enumerate(message):
            moved[state | bits, neurons] += row
        return moved

    def _accepted(self, holds: Holds) -> np.ndarray:
        return np.array(
            [
                float(holds(tuple(bool(state >> k & 1) for k in range(self.count))))
                for state in range(2**self.count)
            ]
        )

    def _onward(self, holds: Holds) -> dict[str, np.ndarray]:
        """`[states, neurons]`: the relevance with which walks from there end accepted."""
        flows, accepted = self.flows, self._accepted(holds)
        onward: dict[str, np.ndarray] = {}
        for name in reversed(flows.order):
            if name not in flows.matrices:
                onward[name] = np.repeat(accepted[:, None], flows.sizes[name], 1)
                continue
            total = np.zeros((len(accepted), flows.sizes[name]))
            for parent, matrix in flows.matrices[name].items():
                neurons = np.arange(flows.sizes[parent])
                for state in range(len(accepted)):
                    ahead = onward[parent][state | self.bits[parent], neurons]
                    total[state] += self._weight(parent, ahead) @ matrix
            onward[name] = total
        return onward

    def _weight(self, name: str, values: np.ndarray) -> np.ndarray:
        return values * self.weights[name] if name in self.weights else values

    def relevance(self, holds: Holds = all) -> float:
        """The sum over the walks of which it holds."""
        accepted = self._accepted(holds)
        return float(sum((accepted @ self._arrived[leaf]).sum() for leaf in self.flows.leaves))

    def outcomes(self) -> dict[tuple[bool, ...], float]:
        """The relevance of each combination of events."""
        found = sum(self._arrived[leaf].sum(1) for leaf in self.flows.leaves)
        return {
            tuple(bool(state >> k & 1) for k in range(self.count)): float(found[state])
            for state in range(2**self.count)
        }

    def marginals(self, holds: Holds = all) -> dict[str, np.ndarray]:
        """The relevance of every neuron of every variable, of walks of which it holds."""
        onward = self._onward(holds)
        return {name: (self._arrived[name] * onward[name]).sum(0) for name in self.flows.order}

    def conditionals(self, holds: Holds = all) -> dict[str, np.ndarray]:
        """That of all walks from a neuron on."""
        onward = self._onward(holds)
        return {
            name: onward[name][self.bits[name], np.arange(self.flows.sizes[name])]
            for name in self.flows.order
        }


def _from_output(net: o.Oracle) -> Iterator[str]:
    """The variables that walks can visit, children before their parents."""
    above: dict[str, list[str]] = {}
    for (name, _), parents in net.parents.items():
        found = above.setdefault(name, [])
        found += [p.neuron[0] for p in parents if p.neuron[0] not in found]
    done: dict[str, None] = {}

    def follow(name: str) -> None:
        if name not in done:
            for parent in above.get(name, ()):
                follow(parent)
            done[name] = None

    follow(net.output)
    return reversed(done)


def _size(net: o.Oracle, name: str) -> int:
    """How many neurons; a bias has as many as the variable where it enters."""
    return len(net.values[name] if name in net.values else net.values[name.rpartition(".")[0]])
