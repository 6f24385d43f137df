"""Ablation: the network above a layer, with sets of its neurons and without, as differences.

Each set of a partition is removed in a run of its own. Of all runs only the part above the layer is
computed, many at once where the model takes batches. Each is one sample of a measure of differences
(`nrm.differences`): what the network has with the set and not without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Node

from nrm.build import build_graph
from nrm.capture.above import Above, above
from nrm.capture.run import Copies, Interpreter, Plan, Values
from nrm.composites import LRPZero
from nrm.errors import QueryError
from nrm.explanation import Explanation
from nrm.graph import Graph, Variable
from nrm.joint import Partition
from nrm.prepare import Pass, Program
from nrm.query import Starts
from nrm.removal import Removal, by_variable, replacement

_HELD = 4
"""How many of a value there are, roughly: in both runs, their difference, and its derivative."""


class Ablation:
    """Runs of the part above a layer, with the sets of a partition and without.

    Arguments:
        of: what is explained of the samples.
        parts: of the layer; they are disjoint.
        removal: what removed activations become.

    Attributes:
        graph: that of the part above the layer.
        together: whether several sets can be removed at once, each in a copy of the samples.
        bytes: what one copy takes, roughly.

    Raises:
        QueryError: nothing lies above the layer, or the removal makes no sense.
        UnsupportedOperatorError: an operator has no slope between two runs.
    """

    def __init__(self, of: Explanation, parts: Partition, removal: Removal) -> None:
        self._of, self._parts, self._variable = of, parts, parts.variable
        forward = of.forward_pass
        part, self._program = _part(of.graph, parts.variable, forward)
        self.graph = self._program.graph
        # Refused before anything runs, if at all.
        self._removed = self._activations_removed(by_variable(removal, of.graph))
        captured = of.graph.captured
        values: Values = {}

        def keep(node: Node, value: Any) -> Any:
            values[node] = value
            return value

        plan = Plan.of(captured.graph, {of.graph.explained, *captured.inputs})
        start = captured.constants | dict(zip(captured.inputs, forward.inputs, strict=True))
        with torch.inference_mode(False), torch.no_grad():
            Interpreter(plan, start, keep).compute()
            copies = Copies.of(captured, plan.wanted, forward.inputs, values)
        tells = copies.possible and all(copies.tells(node) for node in part.starts)
        self.together = tells and parts.variable.batch_axis is not None
        self.bytes = 0
        if self.together:
            self.bytes = _HELD * sum(copies.bytes(node) for node in part.origin.values())
        self._value = values[part.starts[0]]
        self._starts = [(node, values[node]) for node in part.starts]
        self._copies = Copies({node: values[node] for node in part.starts}, copies.layouts)

    def run(self, chosen: Sequence[int]) -> tuple[Pass, Starts]:
        """The pass of the differences that some sets make, and its messages at the output.

        Arguments:
            chosen: the numbers of sets; of each there is a copy of all samples, one after another.

        Returns:
            messages of the share of what is explained that each set has, and in its units.
        """
        copies, of = len(chosen), self._of
        here, *others = self._copied(copies)
        masks = self._parts.split(torch.ones_like(self._value).unsqueeze(0), chosen)
        reference = torch.where(masks != 0, self._removed, self._value)
        if copies > 1:
            samples = self._variable.canonical(reference).flatten(0, 1).unsqueeze(0)
            reference = self._variable.restored(samples, copies * of.batch)
        before = reference[0].to(here)
        forward = self._program.run([here, *others], lambda: None, [before, *others])
        forward.copies, forward.cautions = copies, of.forward_pass.cautions
        output = of.graph.output

        def for_copies(values: Tensor) -> Tensor:
            view = output.canonical(values.unsqueeze(0))
            view = view.repeat(1, copies, *[1] * (view.dim() - 2))
            return output.restored(view, copies * of.batch)

        weights = for_copies(of.output_weights())
        # Others may be infinite.
        terms = torch.where(weights == 0, 0.0, weights * forward.amount.unsqueeze(0))
        scale = output.by_sample(of.scale).expand(of.output_weights().shape)
        top = self.graph.output
        return forward, {True: {top: terms / for_copies(scale)}, False: {top: terms}}

    def _copied(self, copies: int) -> list[Tensor]:
        """The inputs of the part, of several copies of all samples."""
        if copies == 1:
            return [value for _, value in self._starts]
        chosen = torch.zeros(copies, dtype=torch.long, device=self._value.device)
        return [self._copies.take(node, value, chosen) for node, value in self._starts]

    def _activations_removed(
        self, removal: str | float | dict[Variable, str | float | Tensor]
    ) -> Tensor:
        """What the activations of the layer become, shaped like the layer."""
        variable = self._variable
        if isinstance(removal, dict) and set(removal) != {variable}:
            raise QueryError(
                f"only neurons of {self._parts.name!r} are removed: say what they become."
            )
        view = variable.canonical(self._of.forward_pass.value(variable).unsqueeze(0))
        samples = [
            replacement(removal, variable, variable.restored(view[:, s : s + 1], 1)[0])
            for s in range(view.shape[1])
        ]
        return variable.restored(torch.stack(samples).view_as(view), view.shape[1])[0]


_PARTS: WeakKeyDictionary[Graph, dict[Variable, tuple[Above, Program]]] = WeakKeyDictionary()
"""The parts above layers of each graph, with their programs: they hold for all inputs."""


def _part(graph: Graph, variable: Variable, forward: Pass) -> tuple[Above, Program]:
    """The part above a layer, for differences between two runs.

    Raises:
        QueryError: nothing lies above it, or it is not computed.
        UnsupportedOperatorError: an operator has no slope between two runs.
    """
    if variable.node is None:
        raise QueryError(f"{variable.name!r} enters late and is computed nowhere: remove others.")
    if variable is graph.output:
        raise QueryError(f"{variable.name!r} is what is explained: nothing lies above it.")
    known = _PARTS.setdefault(graph, {})
    if variable not in known:
        part = above(graph.captured, variable.node, graph.explained)
        made = build_graph(part.captured, LRPZero(), False, differences=True)
        _rename(made, part, graph)
        known[variable] = part, Program(made, False, forward.program.shared)
    return known[variable]


def _rename(made: Graph, part: Above, graph: Graph) -> None:
    """Give the variables of a part the names that they have in the whole, and what is known of
    their axes."""
    for variable in made.variables:
        if variable.node is None:
            continue
        origin = part.origin[variable.node]
        whole = graph.by_node.get(origin)
        if whole is None:
            name, *aliases = part.names.get(origin, [variable.name])
        else:
            name, aliases = whole.name, list(whole.aliases)
            variable.shape, variable.batch_axis = whole.shape, whole.batch_axis
            variable.shared, variable.channel_axis = whole.shared, whole.channel_axis
        variable.name, variable.aliases = name, tuple(aliases)
        if variable.producer is not None:
            variable.producer.address = name
    made.set_variables(made.variables)
