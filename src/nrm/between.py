"""Messages from one layer to another, of walks on which a formula may still come to hold.

A search goes from layer to layer. Where sets that are asked for lie above all of its layers, a
message says all of the walks so far. Where they lie further down, what is left of the formula may
differ from walk to walk: it is a state (`nrm.automaton`), and messages have rows for each. A walk
and the state that it is in together take the place of the walk, so that all else stays as it is:
sums over walks are sums over rows, too, and absolute sizes of them bound any part of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nrm.automaton import FAILS, HOLDS, Automaton, State
from nrm.engine import finite, push_between, send_between, travel
from nrm.graph import Graph, Variable
from nrm.prepare import Pass
from nrm.query import ForwardMessages, Query
from nrm.tensors import full_precision


class Between:
    """The walks from one layer down to another.

    Messages are `[rows, *shape]`, and so is what is pushed up: as many rows for each state that
    walks leave the layer in, state by state.

    Arguments:
        states: in which walks leave the upper layer.
        automaton: what may become of them; `None`: there is one state, and nothing is left open.
    """

    def __init__(
        self,
        graph: Graph,
        upper: Variable,
        lower: Variable,
        automaton: Automaton | None = None,
        states: Sequence[State] = ((),),
    ) -> None:
        self.upper, self.lower, self.states = upper, lower, list(states)
        self._graph, self._automaton = graph, automaton
        self._leading = graph.leading_to([lower])
        _, self._after = self._followed(states)
        self.arriving: list[State] = list(self._after.get(lower, ())) or [_NOTHING]
        if automaton is None:
            self.arriving = self.states

    @property
    def single(self) -> bool:
        """Whether there is one state at both ends."""
        return len(self.states) == len(self.arriving) == 1

    def send(self, forward: Pass, message: Tensor) -> Tensor:
        """What arrives of messages at the lower layer."""
        if self._automaton is None:
            return send_between(forward, message, self.upper, self.lower)
        rows = len(message) // len(self.states)
        pieces = dict(zip(self.states, torch.split(message, rows), strict=True))
        way = _ToLower(self, self._automaton)
        with torch.inference_mode(False), torch.no_grad():
            travel(forward, {self.upper: pieces}, way)
        nothing = message.new_zeros((rows, *forward.shape(self.lower)))
        return torch.cat([way.arrived.get(state, nothing) for state in self.arriving])

    @full_precision()
    def push(self, forward: Pass, mass: Tensor) -> Tensor:
        """`F(j) = sum_i R(i|j) F(i)` over the walks to the lower layer: the transpose of `send`."""
        if self._automaton is None:
            return push_between(forward, mass, self.lower, self.upper)
        pieces = torch.split(mass, len(mass) // len(self.arriving))
        known = {self.lower: dict(zip(self.arriving, pieces, strict=True))}
        with torch.inference_mode(False), torch.no_grad():
            for variable in self._graph.variables[self.lower.index + 1 : self.upper.index + 1]:
                if variable in self._after and variable in self._leading:
                    known[variable] = self._pushed(forward, variable, known, pieces[0])
        return torch.cat([known[self.upper][state] for state in self.states])

    def weighed(self, forward: Pass, k: int, mass: Tensor | None) -> Tensor | None:
        """What is at the lower layer, as walks see it that left the upper one in its k-th state.

        Where `keeps_apart`.

        Arguments:
            mass: at the lower layer, a row for each state that walks arrive in; `None`: one
                everywhere.

        Returns:
            `[1, *shape of lower]`; `None`: one everywhere.
        """
        if self._automaton is None:
            return mass
        nothing = forward.output.new_zeros((1, *forward.shape(self.lower)))
        (coming,) = self._followed([self.states[k]])[0].get(self.lower, (None,))
        if coming is None:
            return nothing
        branches = self._automaton.visit(coming, self.lower)
        if mass is None and [mask for _, mask in branches] == [None]:
            return None
        pieces = [nothing + 1] * len(self.arriving) if mass is None else torch.split(mass, 1)
        rows = dict(zip(self.arriving, pieces, strict=True))
        for then, mask in branches:
            nothing = nothing + (rows[then] if mask is None else rows[then] * mask)
        return nothing

    @property
    def keeps_apart(self) -> bool:
        """Whether what is left open of a walk is the same wherever it goes between the layers."""
        if self._automaton is None:
            return True
        for state in self.states:
            coming, _ = self._followed([state])
            if len(coming.get(self.lower, ())) > 1:
                return False
            for variable, arrived in coming.items():
                ways = [self._automaton.visit(one, variable) for one in arrived]
                if variable is not self.lower and any(
                    len(branches) != 1 or branches[0][1] is not None for branches in ways
                ):
                    return False
        return True

    # -- states on the way -----------------------------------------------------------------------

    def _followed(
        self, states: Collection[State]
    ) -> tuple[dict[Variable, dict[State, None]], dict[Variable, dict[State, None]]]:
        """The states in which walks come to variables on the way, and in which they leave them."""
        coming: dict[Variable, dict[State, None]] = {}
        after = {self.upper: dict.fromkeys(states)}
        automaton = self._automaton
        if automaton is None:
            return coming, after
        for variable in self._graph.variables[self.lower.index : self.upper.index + 1][::-1]:
            if variable in coming:
                left = (automaton.visit(state, variable) for state in coming[variable])
                after[variable] = dict.fromkeys(then for branches in left for then, _ in branches)
            if variable is self.lower or variable not in after or variable.producer is None:
                continue
            for operand in variable.producer.operands:
                if operand in self._leading:
                    for state in after[variable]:
                        then = automaton.arrive(state, operand)
                        if then is not None:
                            coming.setdefault(operand, {})[then] = None
        return coming, after

    def _pushed(
        self,
        forward: Pass,
        variable: Variable,
        known: Mapping[Variable, Mapping[State, Tensor]],
        like: Tensor,
    ) -> dict[State, Tensor]:
        """What one variable's neurons have of what is known of their parents, state by state."""
        states, rows = list(self._after[variable]), len(like)
        assert variable.producer is not None
        masses: list[Tensor | None] = []
        for operand in variable.producer.operands:
            found = [self._before(operand, state, known) for state in states]
            nothing = like.new_zeros((rows, *forward.shape(operand)))
            each = [nothing if one is None else one for one in found]
            masses.append(None if all(one is None for one in found) else torch.cat(each))
        shape = forward.shape(variable)
        if all(mass is None for mass in masses):
            return {state: like.new_zeros((rows, *shape)) for state in states}
        pushed = forward.propagations[variable.producer].send_up(masses, shape)
        return dict(zip(states, torch.split(pushed, rows), strict=True))

    def _before(
        self,
        operand: Variable,
        state: State,
        known: Mapping[Variable, Mapping[State, Tensor]],
    ) -> Tensor | None:
        """Of walks that come to a parent from a neuron that they leave in a state."""
        assert self._automaton is not None
        there = known.get(operand)
        coming = None if there is None else self._automaton.arrive(state, operand)
        if there is None or coming is None:
            return None
        found: Tensor | None = None
        for then, mask in self._automaton.visit(coming, operand):
            part = there[then] if mask is None else there[then] * mask
            found = part if found is None else found + part
        return found


_NOTHING: State = (FAILS,)
"""The state at a layer to which no walk comes that counts."""


class _ToLower:
    """Messages of walks that have left the upper layer, until they come to the lower one."""

    def __init__(self, between: Between, automaton: Automaton) -> None:
        self._between, self._automaton = between, automaton
        self.arrived: dict[State, Tensor] = {}

    def visit(self, variable: Variable, messages: dict[State, Tensor]) -> dict[State, Tensor]:
        if variable is self._between.upper:
            return messages
        left: dict[State, Tensor] = {}
        for state, message in messages.items():
            for then, mask in self._automaton.visit(state, variable):
                part = message if mask is None else message * mask
                left[then] = left[then] + part if then in left else part
        if variable is not self._between.lower:
            return left
        self.arrived = left
        return {}

    def arrive(self, state: State, variable: Variable) -> State | None:
        if variable not in self._between._leading:
            return None
        return self._automaton.arrive(state, variable)


# -- All layers of a search.


@dataclass(frozen=True)
class Course:
    """The walks through some layers, from the output down, on which a formula comes to hold.

    Attributes:
        start: `[states, *shape]`, the messages at the first layer.
        ways: between each layer and the next.
        onward: `[states, *shape]` at each layer, with what relevance the formula comes to hold of
            the walks that go on from each neuron; `None`: it holds of all.
    """

    start: Tensor
    ways: Sequence[Between]
    onward: Sequence[Tensor | None]

    def weighed(self, message: Tensor, place: int) -> Tensor:
        """A message at one of the layers, of the walks that count."""
        onward = self.onward[place]
        return message if onward is None else message * onward


def course(query: Query, layers: Sequence[Variable]) -> Course:
    """What the one formula of a query asks of walks through layers.

    Arguments:
        layers: from the output down, each upstream of the one before.
    """
    forward, graph, first = query.forward, query.graph, layers[0]
    pairs = itertools.pairwise(layers)
    if not query.places & graph.upstream(first):  # all is decided where the search begins
        start = finite(query.marginals([first])[first])
        ways = [Between(graph, upper, lower) for upper, lower in pairs]
        return Course(start, ways, [None] * len(layers))
    automaton, messages = query.messages_at(first)
    states = list(messages) or [_NOTHING]
    nothing = forward.output.new_zeros((1, *forward.shape(first)))
    start = finite(torch.cat([messages.get(state, nothing) for state in states]))
    ways = []
    for upper, lower in pairs:
        ways.append(Between(graph, upper, lower, automaton, ways[-1].arriving if ways else states))
    at = dict(zip(layers, [states, *(way.arriving for way in ways)], strict=True))
    found = ForwardMessages(forward, automaton, at)
    return Course(start, ways, [_onward(forward, found, layer, at[layer]) for layer in layers])


def _onward(
    forward: Pass, found: ForwardMessages, layer: Variable, states: Sequence[State]
) -> Tensor | None:
    """Forward messages at a layer, a row for each state; `None` where all of them are one."""
    if all(state == (HOLDS,) for state in states):
        return None
    nothing = forward.output.new_zeros((1, *forward.shape(layer)))
    rows = [found.after(layer, state) for state in states]
    return finite(torch.cat([nothing if row is None else row for row in rows]))
