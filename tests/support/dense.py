"""A second engine, for networks of any size: columns `R(i|j)`, and walks that pass sets.

Two things that share nothing with what they check. A column is found by the rule's textbook formula
from derivatives of the operation itself, run anew, and compared with what `pull` makes of a unit
message. And messages are sent by a loop of a dozen lines, which multiplies those columns along all
paths (eqs. 24, 25); what the measure answers to a query is compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

import nrm
from nrm import rules
from nrm.graph import Operation, Variable
from nrm.operators import Call, fill
from support import oracle as o

Chosen = tuple[Variable, Tensor]
"""Neurons of a variable: a mask of ones and zeros of its shape, batch axis included."""

FORMULAS: dict[type[rules.Rule], Callable[..., o.ColumnRule]] = {
    rules.Zero: lambda rule: o.zero,
    rules.Epsilon: lambda rule: o.zero,
    rules.PlainGamma: lambda rule: o.plain_gamma(rule.gamma),
    rules.Gamma: lambda rule: o.sign_aware_gamma(rule.gamma),
    rules.ZPlus: lambda rule: o.zplus,
    rules.AlphaBeta: lambda rule: o.alpha_beta(rule.alpha, rule.beta),
}
"""The rules for which an explicit zero is no parent anyway, whatever the network."""


# -- columns -------------------------------------------------------------------------------------


def pulled(R: nrm.Measure, operation: Operation, neuron: int) -> list[Tensor | None]:
    """`R(i|j)` for each operand, as the propagation makes it of a message of one at neuron j."""
    message = torch.zeros(1, *R.forward_pass.shape(operation.output), dtype=R.output.dtype)
    message.view(-1)[neuron] = 1
    wanted = [True] * len(operation.operands)
    parts = R.forward_pass.propagations[operation].pull(message, wanted)
    return [None if part is None else part[0].detach() for part in parts]


class Formula:
    """An operation run anew on its operands, and the rule of its columns written out."""

    def __init__(self, operation: Operation, call: Call, values: Sequence[Tensor]) -> None:
        self.operation, self.call, self.values = operation, call, values
        self.late = operation.late_leaf == "bias"
        self.leaves = [value.detach().clone().requires_grad_() for value in values]
        self.output = self.run(self.leaves)
        self.computed = self.output.detach()

    def run(self, operands: Sequence[Tensor]) -> Tensor:
        result: Tensor = fill(self.call, [operand.clone() for operand in operands])()
        return result

    @cached_property
    def is_affine(self) -> bool:
        """Whether it is affine in all of its operands together, to rounding."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            a, b = (
                [torch.randn(v.shape, generator=generator).to(v.dtype) for v in self.values]
                for _ in range(2)
            )
            at = [self.run(v) for v in (a, b, [x + y for x, y in zip(a, b, strict=True)])]
            nothing = self.run([torch.zeros_like(v) for v in self.values])
        size = max(float(v.abs().max()) for v in (*at, nothing))
        off = float((at[0] + at[1] - at[2] - nothing).abs().max())
        return off <= 1e-9 * max(1.0, size)  # not where anything is no number

    def column(self, neuron: int) -> list[Tensor] | None:
        """`R(i|j)` of a neuron j for each operand, the sum of it for a late leaf.

        `None` where this page has no formula: of what is neither affine in its operands nor an
        activation, of rules other than `FORMULAS`, and where the column nearly vanishes.
        """
        values, late = self.values, self.late
        if self.operation.kind == "activation" and len(values) == 1:
            if late or values[0].shape != self.output.shape:
                return None
            part = torch.zeros_like(values[0], memory_format=torch.contiguous_format)
            part.view(-1)[neuron] = 1
            return [part]
        if not self.is_affine:
            return None
        try:
            found = torch.autograd.grad(
                self.output.reshape(-1)[neuron],
                self.leaves,
                allow_unused=True,
                materialize_grads=True,
                retain_graph=True,
            )
        except RuntimeError as error:  # `aten.copy` has no derivative of its own
            if "not implemented" not in str(error):
                raise
            return None
        gradients = [gradient.contiguous() for gradient in found]
        connected = [g.flatten().nonzero().flatten() for g in gradients]
        if sum(map(len, connected)) == 1 and not late:
            return [(g != 0).to(g) for g in gradients]
        # What passes by its derivatives does so as under LRP-0, whatever the rule.
        rule = rules.Zero() if self.operation.operator.by_derivatives else self.operation.rule
        if type(rule) not in FORMULAS or len(self.operation.alphas) > 1:
            return None
        parents = [
            o.Parent((str(k), i), a, w)
            for k, (g, where) in enumerate(zip(gradients, connected, strict=True))
            for i, a, w in zip(
                where.tolist(),
                values[k].detach().flatten()[where].tolist(),
                g.flatten()[where].tolist(),
                strict=True,
            )
        ]
        if late:
            added = sum(p.value * p.weight for p in parents)
            rest = float(self.computed.flatten()[neuron]) - added
            parents.append(o.Parent(("late", 0), 1.0, rest, constant=True))
        contributions = FORMULAS[type(rule)](rule)(parents)
        total = sum(contributions)
        if abs(total) <= 1e-3 * sum(abs(c) for c in contributions):
            return None  # such columns are asked for elsewhere, by hand
        parts = [torch.zeros_like(g) for g in gradients]
        for parent, contribution in zip(parents, contributions, strict=True):
            if not parent.constant:
                parts[int(parent.neuron[0])].view(-1)[parent.neuron[1]] = contribution / total
        if late:
            parts.append(torch.tensor(contributions[-1] / total, dtype=gradients[0].dtype))
        return parts


def check_columns(
    R: nrm.Measure, seed: int = 0, each: int = 2, operations: int | None = None
) -> dict[str, int]:
    """Compare columns of random neurons of every operation with the formula.

    Arguments:
        each: how many of every operation.
        operations: of how many, drawn at random; by default of all.

    Returns:
        how many columns of each kind of operation there were a formula for.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = R.graph.operations
    if operations is not None and operations < len(chosen):
        places = torch.randperm(len(chosen), generator=generator)[:operations]
        chosen = [chosen[place] for place in sorted(places.tolist())]
    checked: dict[str, int] = {}
    for operation, (call, values) in zip(chosen, R.forward_pass.calls(chosen), strict=True):
        formula = Formula(operation, call, values)
        size = formula.output.numel()
        for neuron in torch.randint(size, (each,), generator=generator).tolist():
            expected = formula.column(neuron)
            if expected is None:
                continue
            checked[operation.kind] = checked.get(operation.kind, 0) + 1
            where = f"{operation.address}, {operation.kind}, {operation.rule}, neuron {neuron}"
            _alike(pulled(R, operation, neuron), expected, where, formula.late)
    return checked


def _alike(
    found: Sequence[Tensor | None], expected: Sequence[Tensor], where: str, late: bool
) -> None:
    parts = list(found)
    if len(parts) > len(expected):  # a leaf of neurons that have no other parents
        assert parts.pop().count_nonzero() == 0, where  # type: ignore[union-attr]
    for k, (part, wanted) in enumerate(zip(parts, expected, strict=True)):
        part = torch.zeros_like(wanted) if part is None else part
        if late and k == len(expected) - 1:
            part = part.sum()  # a leaf may be shared: by all positions of a channel, say
        _close(part, wanted, 1e-9 * max(1.0, float(wanted.abs().max())), where)


def column_sums(R: nrm.Measure, operation: Operation) -> Tensor:
    """`sum_i T~_ij` of every neuron j of an operation: what ones at all parents push up to it."""
    forward = R.forward_pass
    ones = [
        torch.ones(1, *forward.shape(operand), dtype=R.output.dtype)
        for operand in operation.operands
    ]
    shape = forward.shape(operation.output)
    return forward.propagations[operation].push(ones, shape, normalized=False)[0]


# -- walks ---------------------------------------------------------------------------------------


def marginal(
    R: nrm.Measure,
    variable: Variable,
    sets: Sequence[Chosen] = (),
    start: Tensor | None = None,
) -> Tensor:
    """`[*shape]`: what comes to a variable of the walks that pass all sets, which lie above it.

    Arguments:
        sets: from the output down; each lies upstream of those before it.
        start: the output relevance; by default one at the measure's target.
    """
    place: Variable = R.graph.output
    message = one_at_target(R) if start is None else start
    for stop, mask in sets:
        message = _carried(R, message, place, stop) * mask
        place = stop
    return _carried(R, message, place, variable)


def one_at_target(R: nrm.Measure) -> Tensor:
    """One at every sample's target."""
    message = torch.zeros(R.forward_pass.shape(R.graph.output), dtype=R.output.dtype)
    assert R.target is not None
    axis = R.graph.output.batch_axis
    if axis is None:
        message[tuple(R.target.flatten().tolist())] = 1
        return message
    by_sample = message.movedim(axis, 0)
    for sample, target in enumerate(R.target):
        by_sample[(sample, *target.flatten().tolist())] = 1
    return message


def _carried(R: nrm.Measure, message: Tensor, upper: Variable, lower: Variable) -> Tensor:
    """A message at `upper`, summed over all paths down to `lower`."""
    pending = {upper: message}
    while pending:
        variable = max(pending, key=lambda v: v.index)  # children come after their parents
        arrived = pending.pop(variable)
        if variable is lower:
            return arrived
        if variable.index < lower.index or variable.producer is None:
            continue
        operands = variable.producer.operands
        parts = R.forward_pass.propagations[variable.producer].pull(
            arrived.unsqueeze(0).clone(), [True] * len(operands)
        )
        for operand, part in zip(operands, parts, strict=True):
            if part is not None:
                before = pending.get(operand)
                pending[operand] = part[0].clone() if before is None else before + part[0]
    return torch.zeros(R.forward_pass.shape(lower), dtype=message.dtype)


def check_walks(R: nrm.Measure, seed: int = 0, queries: int = 3, tolerance: float = 1e-9) -> None:
    """Compare joint and marginal relevances of random neurons with the sums over all paths."""
    generator = torch.Generator().manual_seed(seed)
    computed = [
        v
        for v in R.graph.variables
        if v.producer is not None and v.batch_axis == 0 and len(v.shape) > 1 and v.shared == (1, 1)
    ]
    for _ in range(queries):
        leaf = _drawn(R.graph.inputs, generator)
        above = [v for v in computed if leaf in R.graph.upstream(v)]
        if not above:  # samples lie in no axis of their own, as the nodes of a graph
            _close(R.marginal(leaf.name), marginal(R, leaf), tolerance, leaf.name)
            continue
        upper = _drawn(above, generator)
        lower = _drawn([v for v in above if v in R.graph.upstream(upper)] or [upper], generator)
        chosen = [(v, _some(R, v, generator)) for v in dict.fromkeys((upper, lower))]
        sets = [nrm.mask(layer.name, mask[0].bool()) for layer, mask in chosen]
        where = f"{[layer.name for layer, _ in chosen]} to {leaf.name}"
        passed = marginal(R, chosen[-1][0], chosen[:-1]) * chosen[-1][1]
        wanted = _carried(R, passed, chosen[-1][0], leaf)
        atol = tolerance * max(1.0, float(passed.abs().sum()), float(wanted.abs().sum()))
        _close(R(*sets), passed.flatten(1).sum(1), atol, where)
        _close(R.marginal(leaf.name, *reversed(sets)), wanted, atol, where)


def _close(found: Tensor, expected: Tensor, atol: float, where: str) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0, msg=lambda m: f"{where}: {m}")


def _drawn(variables: Sequence[Variable], generator: torch.Generator) -> Variable:
    return variables[int(torch.randint(len(variables), (), generator=generator))]


def _some(R: nrm.Measure, variable: Variable, generator: torch.Generator) -> Tensor:
    """Half of a variable's neurons, the same of every sample."""
    shape = R.forward_pass.shape(variable)
    one = torch.rand(shape[1:], generator=generator) < 0.5
    one.view(-1)[0] = True
    return one.to(R.output.dtype).expand(shape)
