"""Patching: what an output becomes with other values of components, or of what one hands another.

The yardstick of what direct edges say. *Component patching*: a component's neurons take other
values (zero, a mean, those of a reference run), and all that is computed from them follows. *Path
patching*: one component, the receiver, is computed with the sender's other values, every other
component held at its own; then the receiver alone takes what it became, and all that lies above
follows. So a receiver sees the change of its sender by the ways between them on which no other
component lies: the direct edge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.capture.call import ModelCall, without_autocast
from nrm.capture.run import Values
from nrm.circuits.steps import OUTPUT, Named, named
from nrm.display import Progress, counted
from nrm.engine import checked, in_chunks
from nrm.errors import InputError, NeuronSetError, QueryError
from nrm.evaluation.rerun import Rerun
from nrm.explainer import Explainer
from nrm.explanation import Target
from nrm.formulas import NeuronSet
from nrm.graph import Variable
from nrm.removal import ByVariable, Removal, by_variable, replacement
from nrm.targets import Combination


@dataclass(frozen=True)
class _Place:
    """Neurons of one component at one node.

    Attributes:
        index: which, of all there.
        instead: the values that they may take.
    """

    node: Node
    index: Tensor
    instead: Tensor


class Patching:
    """Outputs with components and direct edges patched, for one sample.

    Arguments:
        explainer: of the model; its rules decide only what is a layer.
        inputs, named: the model's arguments, one sample.
        target: an output neuron or a combination of them, as for a measure; `None`: the largest.
        components: neuron sets by name (`nrm.components(R)`), or a list of them. None of a
            component's layers may be computed from another of its layers.
        instead: what patched activations become: `"zero"`, `"mean"`, a number, or by layer, as
            for `Interventions`; heeded without a reference.
        reference: another input (or a tuple of all of the model's arguments): patched activations
            become what they are there.
        memory: bytes that the copies of the sample may take while they are computed.

    Attributes:
        output: `f_y(x)`, a scalar.
        names: of the components.
        receivers: `"output"`, then the components.

    Raises:
        InputError: there are several samples, or the reference has another shape.
        QueryError, NeuronSetError: components cannot be patched.
    """

    def __init__(
        self,
        explainer: Explainer,
        *inputs: Any,
        target: Target,
        components: Named,
        instead: Removal = "zero",
        reference: Any = None,
        memory: int = 2**28,
        **named_inputs: Any,
    ) -> None:
        if explainer.samples(*inputs, **named_inputs) != 1:
            raise InputError("one sample is patched at a time: call it for each, e.g. with x[:1].")
        measure = explainer(*inputs, target=target, **named_inputs)
        self._measure, self._model = measure, explainer.model
        self.graph, self.memory = measure.graph, checked(memory)
        call = ModelCall(explainer.model, inputs, named_inputs, explainer.output)
        given = [x.detach().clone() for x in call.tensors]
        other: Rerun | None = None
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self._model):
            self._rerun = Rerun(self.graph, given)
            if reference is not None:
                arguments = reference if isinstance(reference, tuple) else (reference,)
                there = ModelCall(explainer.model, arguments, named_inputs, explainer.output)
                if [x.shape for x in there.tensors] != [x.shape for x in given]:
                    raise InputError("the reference is shaped like the input it stands in for.")
                other = Rerun(self.graph, [x.detach().clone() for x in there.tensors])
        self._weights = self._of_target(measure.target, target)
        self.output: Tensor = self._told(self._explained())[0]
        removal = by_variable(instead, self.graph)
        self._parts = {
            name: self._places(name, chosen, removal, other)
            for name, chosen in named(components).items()
        }
        self.names = tuple(self._parts)
        self.receivers = (OUTPUT, *self.names)

    def _places(
        self, name: str, chosen: NeuronSet, removal: ByVariable, other: Rerun | None
    ) -> list[_Place]:
        """Where a component lies, and what its activations become.

        Raises:
            QueryError, NeuronSetError: it cannot be patched.
        """
        picked: dict[Variable, Tensor] = {}
        for member in chosen.members:
            variable = self.graph.variable(member.layer)
            if variable.node is None:
                raise QueryError(
                    f"{variable.name!r} enters late and is computed nowhere: leave it out of "
                    "the components that are patched."
                )
            value = self._rerun.values[variable.node]
            shape = variable.neuron_shape(value.shape)
            mask = member.select(variable, shape).cpu().reshape(-1)
            if mask.numel() != shape.numel():
                raise NeuronSetError(f"{member.text} is a mask for several samples.")
            picked[variable] = picked.get(variable, torch.zeros_like(mask)) | mask
        places = []
        for variable, mask in picked.items():
            assert variable.node is not None
            if other is None:
                value = replacement(removal, variable, self._rerun.values[variable.node])
            else:
                value = other.values[variable.node].reshape(-1)
            index = mask.nonzero()[:, 0].to(value.device)
            places.append(_Place(variable.node, index, value[index]))
            if self.graph.upstream(variable) & picked.keys():
                raise QueryError(
                    f"of the component {name!r} one layer is computed from another: it cannot "
                    "be patched as one. Name the lowest, or the highest, of its layers."
                )
        return places

    # -- components ------------------------------------------------------------------------------

    def components(self, progress: Progress = False) -> Tensor:
        """`[components]`: the output with each patched."""
        found = self.output.repeat(len(self.names))

        def patched(chosen: Sequence[int]) -> None:
            changes = [self._parts[self.names[number]] for number in chosen]
            found[list(chosen)] = self._outputs(changes)
            advance(len(chosen))

        with counted(progress, "components", len(self.names)) as advance:
            self._in_chunks(range(len(self.names)), patched)
        return _finite(found)

    # -- edges -----------------------------------------------------------------------------------

    def edges(self, progress: Progress = False) -> Tensor:
        """`[receivers, components]`: the output with each direct edge patched.

        A run for each sender, and one for each pair of which the receiver changes at all.
        """
        found = self.output.repeat(len(self.receivers), len(self.names))

        def sent(chosen: Sequence[int]) -> None:
            outputs, became = self._direct(chosen)
            found[0, list(chosen)] = outputs
            pairs: list[tuple[int, int]] = []
            changes: list[list[_Place]] = []
            for row, sender in enumerate(chosen):
                for receiver, name in enumerate(self.names):
                    places = [] if receiver == sender else self._became(name, became, row)
                    if places:
                        pairs.append((receiver + 1, sender))
                        changes.append(places)

            def handed(some: Sequence[int]) -> None:
                outputs = self._outputs([changes[one] for one in some])
                for one, output in zip(some, outputs, strict=True):
                    found[pairs[one]] = output

            self._in_chunks(range(len(pairs)), handed)
            advance(len(chosen))

        with counted(progress, "edges", len(self.names)) as advance:
            self._in_chunks(range(len(self.names)), sent)
        return _finite(found)

    def _direct(self, senders: Sequence[int]) -> tuple[Tensor, dict[Node, Tensor]]:
        """With each sender patched and all other components held: outputs, and what these became.

        Returns:
            the outputs `[senders]`; and of each node with a component `[senders, neurons]`.
        """
        held: dict[Node, list[Tensor]] = {}
        for places in self._parts.values():
            for place in places:
                held.setdefault(place.node, []).append(place.index)
        became: dict[Node, Tensor] = {}
        changes = [self._parts[self.names[number]] for number in senders]

        def hold(node: Node, rows: Tensor) -> Tensor:
            if node in held:
                became[node] = rows.clone()
                index = torch.cat(held[node])
                rows[:, index] = self._rerun.values[node].reshape(-1)[index]
            return rows

        return self._outputs(changes, hold, [*held]), became

    def _became(self, name: str, became: dict[Node, Tensor], row: int) -> list[_Place]:
        """What a component became, at the places where it differs from what it is."""
        changed = []
        for place in self._parts[name]:
            if place.node in became:
                value = became[place.node][row, place.index]
                own = self._rerun.values[place.node].reshape(-1)[place.index]
                if not torch.equal(value, own):
                    changed.append(_Place(place.node, place.index, value))
        return changed

    # -- runs ------------------------------------------------------------------------------------

    def _in_chunks(self, items: Sequence[int], work: Callable[[Sequence[int]], None]) -> None:
        each = self._each if self._rerun.copies.possible else self.memory + 1
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self._model):
            _ = self._measure.forward_pass  # refused where the model has changed since
            in_chunks(items, self.memory, each, work)

    @property
    def _each(self) -> int:
        """Bytes of one copy, with what is kept of components."""
        part = self._rerun.part([self.graph.explained], self._rerun.order, -1, copied=True)
        nodes = {place.node for places in self._parts.values() for place in places}
        return part.bytes + sum(self._rerun.copies.bytes(node) for node in nodes)

    def _outputs(
        self,
        changes: Sequence[Sequence[_Place]],
        hold: Callable[[Node, Tensor], Tensor] = lambda node, rows: rows,
        further: Sequence[Node] = (),
    ) -> Tensor:
        """`[copies]`: the output of copies of the sample, each with changes of its own.

        Arguments:
            hold: what takes the place of a node's rows `[copies, neurons]` before that.
            further: nodes where that does something.
        """
        rerun, explained = self._rerun, self.graph.explained
        at: dict[Node, list[tuple[int, _Place]]] = {node: [] for node in further}
        for row, places in enumerate(changes):
            for place in places:
                at.setdefault(place.node, []).append((row, place))
        changed = rerun.changed_by(list(at))
        begin = min(rerun.place[node] for node in at) - 1
        copies = torch.zeros(len(changes), dtype=torch.long, device=self.output.device)
        several = rerun.copies.possible

        def change(node: Node, value: Any) -> Any:
            if node not in at:
                return value
            own = rerun.copies.axis(node) is None and several  # all copies share it so far
            if own:
                raise QueryError(
                    f"{self.graph.by_node[node].name!r} cannot be patched: it is the same for all "
                    "inputs, or it is not known where the samples lie in it. Leave it out of the "
                    "components."
                )
            rows = hold(node, rerun.copies.rows(node, value, len(changes)).clone())
            for row, place in at[node]:
                rows[row, place.index] = place.instead
            return rerun.copies.unrows(node, rows)

        part = rerun.part([explained], changed, begin, copied=several)
        values: Values = rerun.compute(part, {}, copies if several else None, change)
        output = values[explained]
        if explained not in changed:
            return self.output.repeat(len(changes))
        return self._told(rerun.copies.rows(explained, output, len(changes)))

    def _of_target(self, index: Tensor | None, target: Target) -> Tensor:
        """`[neurons]`: of which sum of outputs the target is."""
        output = self._rerun.values[self.graph.explained]
        if isinstance(target, Combination):
            view = self.graph.output.canonical(output.unsqueeze(0))[0]
            combined: Tensor = target.weights(view).reshape(-1)
            return combined
        weights = torch.zeros_like(output).view(self.graph.output.neuron_shape(output.shape))
        assert index is not None
        weights[tuple(index[0].reshape(-1).tolist()) if weights.dim() else ()] = 1
        return weights.reshape(-1)

    def _explained(self) -> Tensor:
        explained: Tensor = self._rerun.values[self.graph.explained].reshape(1, -1)
        return explained

    def _told(self, rows: Tensor) -> Tensor:
        """What is explained of outputs `[copies, neurons]`."""
        there = self._weights != 0  # others may be infinite
        return torch.mv(rows[:, there], self._weights[there])


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise QueryError("with some of the values put in the output is NaN or infinite.")
    return values
