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
from nrm.removal import ByVariable, Removal, by_variable, replacement
from nrm.tensors import full_precision

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
        self._part, self._program = part_above(of.graph, parts.variable, forward)
        part = self._part
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
            copies = Copies.of_first(captured, plan.wanted, forward.inputs, values)
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
        copies = len(chosen)
        here, *others = self._copied(copies)
        inputs, reference = [here, *others], [self._without(chosen).to(here), *others]
        forward = self._program.run(inputs, lambda: None, reference)
        return forward, starts_of(forward, self._of, copies)

    def values(self, nodes: Sequence[Node], chosen: Sequence[int]) -> list[Any]:
        """What nodes of the whole model hold without some sets, one copy for each.

        Arguments:
            nodes: of the model; those that do not depend on the layer hold what they always do.
        """
        copies, part = len(chosen), self._part
        inside = {node: copy for copy, node in part.origin.items()}
        wanted = [inside[node] for node in nodes if node in inside]
        _, *others = self._copied(copies)
        given = dict(zip(part.captured.inputs, [self._without(chosen), *others], strict=True))
        known = part.captured.constants | given
        with torch.inference_mode(False), torch.no_grad(), full_precision():
            found = Interpreter(Plan.of(part.captured.graph, wanted, known), known).compute()
        rest = [node for node in nodes if node not in inside]
        forward = self._of.forward_pass
        alike = forward.program.values(forward.inputs, rest) if rest else {}
        place = torch.zeros(copies, dtype=torch.long, device=self._value.device)
        taken = {
            node: value
            if copies == 1
            else Copies({node: value}, self._copies.layouts).take(node, value, place)
            for node, value in alike.items()
        }
        return [found[inside[node]] if node in inside else taken[node] for node in nodes]

    def _without(self, chosen: Sequence[int]) -> Tensor:
        """The layer's values without each of some sets."""
        masks = self._parts.split(torch.ones_like(self._value).unsqueeze(0), chosen)
        removed = torch.where(masks != 0, self._removed, self._value)
        if len(chosen) > 1:
            samples = self._variable.canonical(removed).flatten(0, 1).unsqueeze(0)
            removed = self._variable.restored(samples, len(chosen) * self._of.batch)
        return removed[0]

    def _copied(self, copies: int) -> list[Tensor]:
        """The inputs of the part, of several copies of all samples."""
        if copies == 1:
            return [value for _, value in self._starts]
        chosen = torch.zeros(copies, dtype=torch.long, device=self._value.device)
        return [self._copies.take(node, value, chosen) for node, value in self._starts]

    def _activations_removed(self, removal: ByVariable) -> Tensor:
        if isinstance(removal, dict) and set(removal) != {self._variable}:
            raise QueryError(
                f"only neurons of {self._parts.name!r} are removed: say what they become."
            )
        return activations_removed(self._of, self._variable, removal)


def activations_removed(of: Explanation, variable: Variable, removal: ByVariable) -> Tensor:
    """What the activations of a layer become where they are removed, shaped like the layer."""
    view = variable.canonical(of.forward_pass.value(variable).unsqueeze(0))
    samples = [
        replacement(removal, variable, variable.restored(view[:, s : s + 1], 1)[0])
        for s in range(view.shape[1])
    ]
    return variable.restored(torch.stack(samples).view_as(view), view.shape[1])[0]


def starts_of(forward: Pass, of: Explanation, copies: int) -> Starts:
    """The messages at the output of a pass of differences: of shares, and in units of the output.

    Arguments:
        forward: of copies of all samples, one after another.
        of: what is explained of them.
    """
    output = of.graph.output

    def for_copies(values: Tensor) -> Tensor:
        view = output.canonical(values.unsqueeze(0))
        view = view.repeat(1, copies, *[1] * (view.dim() - 2))
        return output.restored(view, copies * of.batch)

    forward.copies, forward.cautions = copies, of.forward_pass.cautions
    weights = for_copies(of.output_weights())
    # Others may be infinite.
    terms = torch.where(weights == 0, 0.0, weights * forward.amount.unsqueeze(0))
    scale = output.by_sample(of.scale).expand(of.output_weights().shape)
    top = forward.graph.output
    return {True: {top: terms / for_copies(scale)}, False: {top: terms}}


_PARTS: WeakKeyDictionary[Graph, dict[Variable, tuple[Above, Program]]] = WeakKeyDictionary()
"""The parts above layers of each graph, with their programs: they hold for all inputs."""


def part_above(graph: Graph, variable: Variable, forward: Pass) -> tuple[Above, Program]:
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
