"""Forward messages: what the rest of a walk does, seen from every neuron (the transpose of eq. 24).

`F(j) = sum_i R(i|j) F(i)`, started at the neurons of a set, gives `R(set | j)` for every neuron j
downstream in one pass. With a formula there is one `F` for each state that it can be in. Times
the backward message in the same state it is the relevance of j jointly with the formula, as in
hidden Markov models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from nrm.automaton import Automaton, State, is_settled
from nrm.graph import Variable
from nrm.passing import Mask
from nrm.program import Pass


class ForwardMessages:
    """The relevance with which one formula comes to hold, at every neuron and in every state.

    Arguments:
        wanted: the states in which messages are needed, by variable, once it is visited.
        normalized: `False` multiplies unnormalised contributions (eq. 26) down to the leaves.
        open_to: factors at the neurons of some variables, as for `nrm.passing.travel`.
    """

    def __init__(
        self,
        forward: Pass,
        automaton: Automaton,
        wanted: Mapping[Variable, Iterable[State]],
        normalized: bool = True,
        open_to: Mapping[Variable, Mask] | None = None,
    ) -> None:
        self.forward, self.automaton = forward, automaton
        self.normalized, self.open_to = normalized, open_to or {}
        self._known: dict[Variable, dict[State, Tensor]] = {}
        with torch.inference_mode(False), torch.no_grad():
            needed = self._needed(wanted)
            for variable in forward.graph.variables:  # parents first
                if variable in needed:
                    self._known[variable] = self._push(variable, needed[variable])

    def after(self, variable: Variable, state: State | None) -> Tensor | None:
        """`[1, *shape]`: of walks that have visited a neuron in a state; `None`: zero."""
        if state is None or state[0] is False:
            return None
        if self._is_one(state):
            return self._ones(variable)
        return self._known[variable][state]

    def before(self, variable: Variable, state: State | None) -> Tensor | None:
        """`[1, *shape]`: of walks that come to a neuron in a state; `None`: zero."""
        if state is None:
            return None
        found: Tensor | None = None
        for then, mask in self.automaton.visit(state, variable):
            onward = self.after(variable, then)
            if onward is not None:
                part = onward if mask is None else onward * mask
                found = part if found is None else found + part
        way = self.open_to.get(variable)
        return found if found is None or way is None else found * way

    def _needed(self, wanted: Mapping[Variable, Iterable[State]]) -> dict[Variable, set[State]]:
        """The states in which messages have to be computed, from the output down."""
        needed = {v: {s for s in states if not self._is_known(s)} for v, states in wanted.items()}
        for variable in reversed(self.forward.graph.variables):
            producer = variable.producer
            for state in needed.get(variable, ()):
                for operand in producer.operands if producer else ():
                    coming = self.automaton.arrive(state, operand)
                    if coming is not None:
                        after = (then for then, _ in self.automaton.visit(coming, operand))
                        unknown = {then for then in after if not self._is_known(then)}
                        needed.setdefault(operand, set()).update(unknown)
        return {variable: states for variable, states in needed.items() if states}

    def _push(self, variable: Variable, states: Collection[State]) -> dict[State, Tensor]:
        if variable.producer is None:  # all is settled, and holds: what fails is known
            return {state: self._ones(variable) for state in states}
        chosen = list(states)
        masses: list[Tensor | None] = []
        for operand in variable.producer.operands:
            coming = [self.before(operand, self.automaton.arrive(s, operand)) for s in chosen]
            nothing = self._ones(operand) * 0
            rows = [nothing if row is None else row for row in coming]
            masses.append(None if all(row is None for row in coming) else torch.cat(rows))
        shape = self.forward.shape(variable)
        if all(mass is None for mass in masses):
            return {state: self.forward.output.new_zeros((1, *shape)) for state in chosen}
        propagation = self.forward.propagations[variable.producer]
        pushed = propagation.send_up(masses, shape, self.normalized)
        return {state: pushed[k : k + 1] for k, state in enumerate(chosen)}

    def _is_known(self, state: State) -> bool:
        return state[0] is False or self._is_one(state)

    def _is_one(self, state: State) -> bool:
        """All walks on count, and their relevance sums to one."""
        return is_settled(state) and bool(state[0]) and self.normalized and not self.open_to

    def _ones(self, variable: Variable) -> Tensor:
        return self.forward.output.new_ones(()).expand((1, *self.forward.shape(variable)))
