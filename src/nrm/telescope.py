"""LRP-0 that counts all it adds up, as one backward pass: gradient x input where it is exact.

If every operation divides by what it really added up, the divisions cancel along the depth: with
`m_j = y_j g_j`, a weighted sum passes `m_i = x_i sum_j w_ij g_j`, so that `g` travels by plain
derivatives of the operations, with attention, gates, scales and slopes held constant. One call of
autograd replaces message passing, wherever neither masks nor leaves on the way need more.

The graph has attention written out, so that its weights are variables. By derivatives the fused
operator gives the same in a fraction of the time (`Fusion`): its inputs' derivatives are multiplied
by the alphas on the way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from nrm.capture.expand import attention, attention_scores
from nrm.capture.run import Interpreter, Plan, Values
from nrm.graph import Graph, Operation, Variable
from nrm.operators import Setting
from nrm.operators.call import Call
from nrm.operators.columns import column_floor, smaller_than, without_vanished
from nrm.tensors import full_precision, gradient_share


@dataclass
class Fusion:
    """A part of the graph that one operator computes.

    Attributes:
        target, args, kwargs: the operator's call, on graph nodes.
        shares: what of the result's relevance each input takes; inputs that are missing take none.
    """

    target: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shares: dict[Node, float]

    @property
    def reads(self) -> list[Node]:
        """The nodes among the arguments."""
        return _nodes((self.args, self.kwargs))

    def __call__(self, values: Mapping[Node, Any]) -> Tensor:
        """The result, differentiable."""

        def take(node: Node) -> Any:
            value = values[node]
            if not isinstance(value, Tensor):
                return value
            return gradient_share(value, self.shares.get(node, 0.0))

        args, kwargs = map_arg((self.args, self.kwargs), take)
        return self.target(*args, **kwargs)

    def hides_vanished(self, values: Mapping[Node, Any], result: Tensor) -> bool:
        """Whether something that is added up vanishes within, or only if it is written out.

        Relevance does not pass there, and the operator's derivative would not know.
        """
        args, kwargs = map_arg((self.args, self.kwargs), lambda node: _detached(values[node]))
        with torch.no_grad():
            if self.shares_scores:
                for sums in attention_scores(*args, **kwargs):
                    if smaller_than(sums, column_floor(sums.dtype)) is not None:
                        return True
            value = args[2]
            low, high = torch.aminmax(value)
            rounding = torch.finfo(value.dtype).eps * max(-float(low), float(high))
            near = smaller_than(result, rounding)
            if near is None:
                return False
            floor = column_floor(value.dtype)
            written_out = attention(*args, **kwargs)[near].abs() <= floor
            return not torch.equal(written_out, result[near].abs() <= floor)

    @property
    def shares_scores(self) -> bool:
        """Whether queries and keys take relevance, so that it passes their products."""
        return any(self.shares.get(node, 0.0) for node in _nodes(self.args[:2]))


def fusions(graph: Graph) -> dict[Node, Fusion]:
    """The operators that were written out, by the node of their result."""
    found = {}
    for node, variable in graph.by_node.items():
        written_out = node.meta.get("fused")
        if written_out is not None and variable.producer is not None:
            target, args, kwargs = written_out
            inputs = _nodes((args, kwargs))
            if len(set(inputs)) < len(inputs):
                continue  # one tensor in two roles takes differently in each
            found[node] = Fusion(target, args, kwargs, _shares(graph, variable, inputs))
    return found


def _shares(graph: Graph, output: Variable, inputs: Sequence[Node]) -> dict[Node, float]:
    """The product of the alphas from the result to each input, over all ways between."""
    shares: dict[Variable, float] = {output: 1.0}
    ends = {graph.by_node[node] for node in inputs if node in graph.by_node}
    for variable in reversed(graph.variables[: output.index + 1]):
        if variable not in shares or variable in ends or variable.producer is None:
            continue
        operation = variable.producer
        alphas = operation.alphas or (1.0,) * len(operation.slots)
        for slot, alpha in zip(operation.slots, alphas, strict=True):
            operand = graph.by_node[slot]
            shares[operand] = shares.get(operand, 0.0) + shares[variable] * alpha
    return {v.node: shares.get(v, 0.0) for v in ends if v.node is not None}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _nodes(arguments: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(arguments, found.append)
    return found


# -- when the divisions cancel, and the backward pass ---------------------------------------------

Messages = dict[Variable, Tensor]


def telescopes(graph: Graph) -> bool:
    """Whether the divisions of all operations cancel, and nothing on the way rounds derivatives.

    Some models compute norms in single precision whatever they are given.
    """
    return all(
        _counts_all(operation) and is_precise(operation, graph) for operation in graph.operations
    )


def is_precise(operation: Operation, graph: Graph) -> bool:
    """Whether an operation is computed at least as precisely as the output."""
    return _precision(operation.output) <= _precision(graph.output)


def _precision(variable: Variable) -> float:
    assert variable.node is not None
    return torch.finfo(variable.node.meta["val"].dtype).eps


def _counts_all(operation: Operation) -> bool:
    """Whether the columns of an operation sum to its output."""
    operator, call, rule = operation.operator, operation.call, operation.rule
    dropped = operator.has_bias(call, operation.named_slots, rule)
    dropped = dropped and operation.late_leaf != "bias"
    return not dropped and operator.telescopes(call, rule)


class ByDerivatives(Interpreter, ABC):
    """A forward pass whose variables autograd connects.

    Arguments:
        settings: how each operation propagates.
        given: inputs and constants.

    Attributes:
        found: the tensors whose derivatives relevance goes by; late leaves have none.
    """

    def __init__(
        self, graph: Graph, settings: Mapping[Operation, Setting], plan: Plan, given: Values
    ) -> None:
        super().__init__(plan, given)
        self.variables, self.settings = graph, settings
        self.found: dict[Variable, Tensor] = {}
        for leaf in graph.leaves:
            if leaf.node in given:
                self.env[leaf.node] = self.start(leaf, leaf.node, given[leaf.node])

    def run_node(self, n: Node) -> Any:
        variable = self.variables.by_node.get(n)
        if variable is None:
            return super().run_node(n)
        if variable.producer is None:
            return self.start(variable, n, super().run_node(n))
        return self.operate(variable, n, variable.producer)

    @abstractmethod
    def start(self, leaf: Variable, node: Node, value: Tensor) -> Tensor:
        """Note where derivatives end; the value that the pass goes on with."""

    @abstractmethod
    def operate(self, variable: Variable, node: Node, operation: Operation) -> Tensor:
        """Note what an operation computes; the value that the pass goes on with."""


class HiddenSumError(Exception):
    """Something vanishes within a fused operator, which has to be written out for this input."""


class Differentiating(ByDerivatives):
    """That of the values, with what takes no relevance constant.

    Arguments:
        fused: the operators that compute a part of the graph each, by the node of their result.
            What lies within them is not among what is `found`.

    Attributes:
        small: of sums, where they count as zero and are not.

    Raises:
        HiddenSumError: while it computes.
    """

    def __init__(
        self,
        graph: Graph,
        settings: Mapping[Operation, Setting],
        plan: Plan,
        given: Values,
        fused: Mapping[Node, Fusion],
    ) -> None:
        super().__init__(graph, settings, plan, given)
        self.fused = fused
        self.small: dict[Variable, Tensor] = {}
        self.last: LastLayer | None = None

    def telescope(self) -> Telescope:
        """The derivatives, once all is computed."""
        small = self.small
        if small:  # asked of the device once
            known = torch.stack([somewhere.any() for somewhere in small.values()]).tolist()
            small = {v: small[v] for v, any_there in zip(small, known, strict=True) if any_there}
        return Telescope(self.variables, self.found, small, self.last)

    def start(self, leaf: Variable, node: Node, value: Tensor) -> Tensor:
        self.found[leaf] = value.detach().requires_grad_()
        return self.found[leaf]

    def operate(self, variable: Variable, node: Node, operation: Operation) -> Tensor:
        if node in self.fused:
            self.found[variable] = self._fused(variable, self.fused[node])
        else:
            self.found[variable] = self._frozen(variable, operation)
        return self.found[variable]

    def _fused(self, variable: Variable, fusion: Fusion) -> Tensor:
        with torch.enable_grad():
            output = fusion(self.env)
            if fusion.hides_vanished(self.env, output.detach()):
                raise HiddenSumError
            return self._summed(variable, output)

    def _frozen(self, variable: Variable, operation: Operation) -> Tensor:
        call = operation.call.with_values(operation.arguments, self._constant)
        operands = [self.env[slot] for slot in operation.slots]
        with torch.enable_grad():
            output = operation.operator.frozen(call, operands, self.settings[operation])
            if any(output is operand for operand in operands):  # as dropout returns it
                output = output.view_as(output)  # whose derivative is its own
            if variable is self.variables.output and _has_rows(operation, operands[0], output):
                self.last = LastLayer(operation, call, self.settings[operation])
            return self._summed(variable, output) if operation.operator.adds_up else output

    def _summed(self, variable: Variable, output: Tensor) -> Tensor:
        """A sum without its derivatives where it vanishes."""
        output, counts_as_zero = without_vanished(output)
        if counts_as_zero is not None:
            self.small[variable] = counts_as_zero
        return output

    def _constant(self, node: Node) -> Any:
        return _detached(self.env[node])


@dataclass
class LastLayer:
    """A linear layer that computes the output, row by row alike, such as that of a vocabulary.

    Relevance starts at one neuron, or a few, of few rows. From the others no derivative comes, and
    by far the most of what the layer computes is left out.
    """

    operation: Operation
    call: Call
    setting: Setting

    @property
    def operand(self) -> Variable:
        return self.operation.operands[0]

    def derivatives(self, message: Tensor, output: Tensor, operand: Tensor) -> Tensor | None:
        """`[K, *operand]`, of messages `[K, *output]`; `None` where it is not worth it.

        It is neither where relevance has to be scaled, or cannot be divided by values: there all
        rows are looked at.
        """
        rows = message.flatten(0, -2)
        chosen = (rows != 0).any(-1).nonzero()[:, 0]
        if 2 * len(chosen) > len(rows) or not len(chosen):
            return None
        places = chosen % operand.shape[:-1].numel()
        gradient = _over_values(rows[chosen], output.flatten(0, -2)[places])
        if gradient is None or _scale(float(gradient.abs().amax()), gradient.dtype) != 1:
            return None
        with torch.enable_grad():
            given = operand.flatten(0, -2)[places].detach().requires_grad_()
            made = self.operation.operator.frozen(self.call, [given], self.setting)
            made, _ = without_vanished(made)
        (found,) = torch.autograd.grad(made, given, gradient)
        all_rows = found.new_zeros((len(rows), operand.shape[-1]))
        all_rows[chosen] = found
        return all_rows.view(len(message), *operand.shape)


def _has_rows(operation: Operation, operand: Tensor, output: Tensor) -> bool:
    """Whether an operation is a layer that does the same to every row of its operand."""
    operator = operation.operator
    return (
        operator.is_layer
        and operator.adds_up
        and len(operation.slots) == 1
        and operand.dim() > 1
        and operator.acts_on_last_axis(operation.call)
        and output.shape[:-1] == operand.shape[:-1]
    )


class Telescope:
    """A forward pass whose derivatives are the relevances divided by the values.

    Where a sum vanishes its derivative is cut off, as messages pass nothing on there
    (`nrm.tensors.without_vanished`); relevance that comes to such a neuron all
    the same is split by message passing alone.

    Arguments:
        values: every variable but late leaves, connected by autograd.
        small: of sums, where they count as zero and are not.
        last: the layer that computes the output, if its rows are alike.
    """

    def __init__(
        self,
        graph: Graph,
        values: Mapping[Variable, Tensor],
        small: Mapping[Variable, Tensor] | None = None,
        last: LastLayer | None = None,
    ) -> None:
        self.graph, self.values, self.small, self.last = graph, values, small or {}, last

    @full_precision()
    def send(self, messages: Messages, stops: Mapping[Variable, Tensor | None]) -> Messages | None:
        """What arrives at the stops (see `nrm.engine.send`); `None`: it cannot say."""
        if any(variable not in self.values for variable in (*messages, *stops)):
            return None
        if len(stops) > 1 and any(self.graph.upstream(v) & stops.keys() for v in stops):
            return None  # who meets a stop first needs message passing
        if not messages:
            return {}  # nothing arrived where they were to start: no walk passes there
        if not all(self.values[variable].requires_grad for variable in messages):
            return None
        below = self._below_the_output(messages, stops)
        begun = below or {v: _over_values(m, self.values[v].detach()) for v, m in messages.items()}
        gradients = [gradient for gradient in begun.values() if gradient is not None]
        if len(gradients) < len(begun):
            return None
        largest = max(float(gradient.abs().amax()) for gradient in gradients)
        scale = _scale(largest, gradients[0].dtype)
        if scale != 1:
            gradients = [gradient * scale for gradient in gradients]
        leading = self.graph.leading_to(stops)
        ends = [*stops, *(v for v in self.small if v in leading and v not in stops)]
        many = max(map(len, gradients))  # one stands for as many as there are of others
        gradients = [gradient.expand(many, *gradient.shape[1:]) for gradient in gradients]
        single = many == 1
        found = torch.autograd.grad(
            [self.values[variable] for variable in begun],
            [self.values[variable] for variable in ends],
            [gradient[0] for gradient in gradients] if single else gradients,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=not single,
        )
        arrived: Messages = {}
        kind = next(iter(messages.values())).dtype  # an input may be of less than what reads it
        for variable, gradient in zip(ends, found, strict=True):
            if gradient is None:
                continue
            value = self.values[variable].detach()
            message = torch.where(gradient == 0, 0.0, value * gradient)  # values may be -inf
            message = message.unsqueeze(0) if single else message
            if scale != 1:
                message = message / scale
            if not bool(torch.isfinite(message).all()):
                return None  # it overflowed on the way, perhaps for want of division
            if variable in self.small and _matters(message, self.small[variable]):
                return None  # relevance that came to a sum that counts as zero
            if variable in stops:
                mask, message = stops[variable], message.to(kind)
                arrived[variable] = message if mask is None else message * mask
        return arrived

    def _below_the_output(
        self, messages: Messages, stops: Mapping[Variable, Tensor | None]
    ) -> dict[Variable, Tensor | None] | None:
        """The derivatives below the last layer, where only those of few of its rows are asked."""
        output, last = self.graph.output, self.last
        if last is None or set(messages) != {output} or output in stops or output in self.small:
            return None
        operand = self.values[last.operand]
        if not operand.requires_grad:
            return None
        found = last.derivatives(messages[output], self.values[output].detach(), operand.detach())
        return None if found is None else {last.operand: found}


def _over_values(message: Tensor, value: Tensor) -> Tensor | None:
    """Relevance over value, zero where there is none; `None` where it cannot be told.

    That is at neurons that count as zero, and where the type has no such number.
    """
    kind = torch.finfo(value.dtype)
    gradient = torch.where(message == 0, 0.0, message / value)
    lost = gradient.abs() < kind.tiny  # also at infinite values
    unknown = (value.abs() <= kind.tiny) | lost | ~gradient.isfinite()
    if bool((unknown & (message.abs() > kind.tiny)).any()):
        return None
    return torch.where(unknown, 0.0, gradient)


def _scale(largest: float, dtype: torch.dtype) -> float:
    """A power of two by which derivatives are multiplied on the way, so that none underflows."""
    if largest == 0 or abs(math.log2(largest)) < -math.log2(torch.finfo(dtype).tiny) / 4:
        return 1.0
    return 2.0 ** -round(math.log2(largest))


def _matters(message: Tensor, small: Tensor) -> bool:
    """Whether relevance at neurons that count as zero is more than a trace."""
    kind = torch.finfo(message.dtype)
    return bool((message.abs()[:, small] > kind.tiny**0.5).any())
