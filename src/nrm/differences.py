"""Walks of differences: a forward pass at the input beside one at a reference.

Every operation reads the values of both, and its contributions are those of the differences, by its
slope between the two (`nrm.operators.secants`). What is left to say here: what may be different at
all, and the way by derivatives, on which no division is left. For with `m_j = g_j (y_j - y'_j)`
every operation passes `g` by its own slopes. Uniform weights beside those of a softmax
(`rules.FromUniform`) are a reference of its own, in one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.capture.call import ModelCall
from nrm.capture.nodes import is_mask
from nrm.capture.run import Interpreter, Plan, Values
from nrm.errors import InputError, UnsupportedOperatorError
from nrm.graph import Graph, Operation, Variable
from nrm.operators import Call, Setting, fill
from nrm.operators.propagation import Before
from nrm.operators.secants import change, difference
from nrm.telescope import ByDerivatives, Telescope, is_precise
from nrm.tensors import check_dense, for_all_samples, like, with_slope


class Reference:
    """The values at the reference.

    Arguments:
        values: of all nodes that operations read or compute.
    """

    def __init__(self, graph: Graph, known: Values) -> None:
        wanted = {v.node for v in graph.variables if v.node is not None}
        wanted |= {node for op in graph.operations for _, node in op.call.nodes()}
        plan = Plan.of(graph.captured.graph, wanted | {graph.explained}, known)
        self.values = Interpreter(plan, known).compute()

    def setting(
        self, operation: Operation, setting: Setting, values: Mapping[Node, Any]
    ) -> Setting:
        """How an operation propagates differences.

        Arguments:
            values: those at the input that it reads.

        Raises:
            UnsupportedOperatorError: something else than its operands differs.
        """
        slots = set(operation.arguments)
        for name, place, node in operation.call.places():
            if (name, place) in slots or name == operation.operator.looks_like:
                continue
            here, there = values[node], self.values[node]
            if here is not there and not _same(here, there):
                raise UnsupportedOperatorError(
                    f"{operation.call.target} at {operation.address!r}: its argument {name!r} is "
                    "another at the reference than at the input, and carries no relevance that "
                    "could say what this changes. Give a reference for which it is the same."
                )
        assert operation.output.node is not None
        before = Before(
            [self.values[slot] for slot in operation.slots], self.values[operation.output.node]
        )
        return replace(setting, before=before)


class Uniform:
    """Weights that prefer nothing, beside those that a softmax makes (`rules.FromUniform`)."""

    def __init__(self) -> None:
        self.values: Values = {}

    def setting(
        self, operation: Operation, setting: Setting, call: Call, values: Sequence[Tensor]
    ) -> Setting:
        """How an operation that makes, moves or uses weights propagates.

        Arguments:
            call, values: as for `Operator.prepare`.
        """
        output = operation.output.node
        assert output is not None
        if operation.weights == "used":
            nothing = [torch.zeros_like(x) for x in values]
            begun = [
                self.values.get(slot, zero)
                for slot, zero in zip(operation.slots, nothing, strict=True)
            ]
            with torch.no_grad():
                return replace(setting, before=Before(begun, fill(call, nothing)()))
        begun = operation.operator.indifferent(call, values) or [self.values[operation.slots[0]]]
        with torch.no_grad():
            self.values[output] = fill(call, begun)()
        if operation.weights == "moved":
            return setting
        return replace(setting, before=Before(begun, self.values[output]))

    def release(self, node: Node) -> None:
        self.values.pop(node, None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    return type(a) is type(b) and bool(a == b)


def telescopes(graph: Graph) -> bool:
    """Whether every operation passes relevance over difference by its slopes alone."""
    return all(
        op.operator.has_secant
        and (not op.operator.adds_up or op.operator.telescopes(op.call, op.rule))
        and is_precise(op, graph)
        for op in graph.operations
    )


class Differencing(ByDerivatives):
    """That of the differences from the values at the reference."""

    def __init__(
        self,
        graph: Graph,
        settings: Mapping[Operation, Setting],
        plan: Plan,
        given: Values,
        reference: Reference,
    ) -> None:
        self.reference = reference
        super().__init__(graph, settings, plan, given)

    def telescope(self) -> Telescope:
        """The derivatives, once all is computed."""
        return Telescope(self.variables, self.found)

    def start(self, leaf: Variable, node: Node, value: Tensor) -> Tensor:
        self.found[leaf] = change(self.reference.values[node], value).requires_grad_()
        return value

    def operate(self, variable: Variable, node: Node, operation: Operation) -> Tensor:
        setting = self.reference.setting(operation, self.settings[operation], self.env)
        call = operation.call.with_values(operation.arguments, self.env.__getitem__)
        operands = [self.env[slot] for slot in operation.slots]
        with torch.no_grad():
            value: Tensor = fill(call, operands)()
        assert setting.before is not None
        moves = [self.found[operand] for operand in operation.operands[: len(operands)]]
        rise = change(setting.before.output, value)
        with torch.enable_grad():
            linear = difference(operation.operator, call, operands, moves, setting)
            # What is the same in both has no relevance to pass on, but its slope is not zero.
            found = with_slope(linear.expand(rise.shape), rise, rise != 0)
        self.found[variable] = found
        return value


# -- which inputs a reference is -------------------------------------------------------------------


def reference_of(call: ModelCall, given: Any, batch_axis: int | None = 0) -> list[Tensor]:
    """The tensors of a call at a reference.

    Arguments:
        given: a tensor or a number for the one input, or a mapping from names of inputs to these.
        batch_axis: of the inputs; what has an axis less is one sample for all.

    Raises:
        InputError: they do not look like the inputs.
    """
    chosen = [i for i, name in enumerate(call.names) if not is_mask(name)]
    if not isinstance(given, Mapping):
        if len(chosen) != 1:
            names = ", ".join(repr(call.names[i]) for i in chosen)
            raise InputError(
                f"the model has the inputs {names}: give a reference for some by name, "
                "reference={name: tensor}. Those left out are the same in both."
            )
        given = {call.names[chosen[0]]: given}
    tensors = list(call.tensors)
    for name, value in given.items():
        if name not in call.names:
            raise InputError(
                f"a reference is given for {name!r}, and the inputs are "
                f"{', '.join(map(repr, call.names))}."
            )
        x = tensors[call.names.index(name)]
        start = value if isinstance(value, Tensor) else like(value, x)
        check_dense(start, "a reference")
        if start.dtype.is_floating_point != x.dtype.is_floating_point or start.device != x.device:
            raise InputError(
                f"the reference for {name!r} is {start.dtype} on {start.device}, the input "
                f"{x.dtype} on {x.device}."
            )
        try:
            start = for_all_samples(start.detach().to(x.dtype), x, batch_axis).clone()
        except RuntimeError:
            raise InputError(
                f"the reference for {name!r} has shape {tuple(start.shape)}, the input "
                f"{tuple(x.shape)}: they are compared neuron by neuron, so give it the same shape "
                "(or that of one sample)."
            ) from None
        if start.is_floating_point() and not is_mask(name) and not bool(start.isfinite().all()):
            raise InputError(f"the reference for {name!r} holds NaN or infinite values")
        tensors[call.names.index(name)] = start
    return tensors
