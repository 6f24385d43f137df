"""Whether a measure's numbers can be trusted: totals over cuts, cancellation, failing columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nrm.display import Shown, Table, numbers
from nrm.engine import Messages, one_by_one, send
from nrm.errors import CANCELS, VARIATION
from nrm.graph import Graph, Operation, Variable
from nrm.operators import Columns, fill
from nrm.prepare import Pass


@dataclass(frozen=True)
class Cut:
    """What crosses one cut: a variable together with all that bypasses it.

    Attributes:
        name: the variable that message passing had reached.
        alone: the variable is a cut by itself; nothing bypasses it.
        total: `[batch]`, the relevance over the cut, which must be one.
        variation: `[batch]`, the sum of absolute relevances: what exceeds one cancels.
    """

    name: str
    alone: bool
    total: Tensor
    variation: Tensor

    @property
    def deviation(self) -> float:
        """The largest `|1 - total| / max(1, variation)` over the batch."""
        return float(((1 - self.total).abs() / self.variation.clamp(min=1)).max())


@dataclass(frozen=True, repr=False)
class Diagnostics(Shown):
    """A measure's health.

    Attributes:
        cuts: from the output down to the leaves.
        columns: for every weighted sum, how much relevance met columns that nearly fail.
        leaf_share: share `[batch]` of every leaf; `bias_share` adds up those of biases.
        tolerance: columns count as nearly zero where `|sum T~| < tolerance * sum |T~|`.
        mixed: variables whose cuts are not listed, because they mix the samples of the batch in
            one axis: explain one sample to see them.
    """

    cuts: list[Cut]
    columns: list[Columns]
    leaf_share: dict[str, Tensor]
    bias_share: Tensor
    tolerance: float
    mixed: list[str]

    @property
    def worst_cut_deviation(self) -> float:
        """The largest deviation of a cut's total from one, relative to max(1, variation)."""
        return max(cut.deviation for cut in self.cuts)

    @property
    def total_variation(self) -> Tensor:
        """`[batch]`: the sum of absolute relevances at the leaves."""
        return self.cuts[-1].variation

    @property
    def nearly_zero(self) -> float:
        """The largest relevance, in absolute size, that met nearly zero columns of one layer."""
        return max((c.nearly_zero for c in self.columns), default=0.0)

    def table(self) -> Table:
        first, *further = str(self).splitlines()
        rows = [
            (cut.name, numbers(cut.total.tolist()), numbers(cut.variation.tolist()))
            for cut in sorted(self.cuts, key=lambda cut: -cut.deviation)
        ]
        notes = [*further, "Totals must be 1; what a variation exceeds 1 by cancels."]
        return Table(first, ("cut, worst first", "total", "variation"), rows, notes)

    def __str__(self) -> str:
        worst = max(self.cuts, key=lambda cut: cut.deviation)
        lines = [
            f"worst cut: {worst.name} deviates from 1 by {worst.deviation:.2e}, "
            f"over {len(self.cuts)} cuts",
            f"total variation at the leaves: {float(self.total_variation.max()):.4g}",
            f"share of biases: {float(self.bias_share.max()):.4g}",
        ]
        for c in sorted(self.columns, key=lambda c: -c.nearly_zero)[:3]:
            if c.nearly_zero > 0:
                lines.append(
                    f"{c.address}: relevance {c.nearly_zero:.3g} met columns that sum to less "
                    f"than {self.tolerance:g} of their size (smallest {c.smallest:.1e})"
                )
        negative = max(self.columns, key=lambda c: c.negative, default=None)
        if negative is not None and negative.negative > 0:
            lines.append(
                f"{negative.address}: relevance {negative.negative:.3g} met negative columns, "
                "which flip its sign"
            )
        return "\n".join(lines)


# -- The look at every cut.

Crossing = Sequence[tuple[Variable, Tensor]]
"""The variables that a cut crosses, with their messages."""


class _Sums:
    """What messages add up to over each sample: found once, however many cuts they cross."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        # With the message, so that its id stays its own.
        self._known: dict[tuple[Variable, int], tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, variable: Variable, message: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch]`: the sum of the relevances, and that of their absolute values."""
        key = (variable, id(message))
        if key not in self._known:
            total = variable.per_sample(message, self.batch)[0]
            variation = variable.per_sample(message.abs(), self.batch)[0]
            self._known[key] = message, total, variation
        return self._known[key][1:]

    def forget(self, variable: Variable) -> None:
        """Let the messages at a variable go."""
        for key in [key for key in self._known if key[0] is variable]:
            del self._known[key]

    def cut(self, name: str, alone: bool, crossing: Crossing) -> Cut:
        """What crosses one cut, added up."""
        crossed = [self.of(variable, message) for variable, message in crossing]
        total, variation = (torch.stack(parts).sum(0) for parts in zip(*crossed, strict=True))
        return Cut(name, alone, total, variation)


def diagnose(forward: Pass, start: Messages, tolerance: float) -> Diagnostics:
    """Send the output relevance to the leaves and look at every cut on the way."""
    graph, batch = forward.graph, forward.batch
    alone = set(graph.cuts)
    cuts: list[Cut] = []
    columns: list[Columns] = []
    mixed: list[str] = []
    sums = _Sums(batch)

    def look(variable: Variable, travelling: Messages, arrived: Messages) -> None:
        crossing = (*travelling.items(), *arrived.items())
        if all(v.tells_samples(batch) for v, _ in crossing):
            cuts.append(sums.cut(variable.name, variable in alone, crossing))
        else:
            mixed.append(variable.name)
        if variable.producer is not None:
            met = forward.propagations[variable.producer].columns(travelling[variable], tolerance)
            if met is not None:
                columns.append(met)
            sums.forget(variable)

    arrived = send(forward, start, dict.fromkeys(graph.leaves), observe=look)
    nothing = torch.zeros(batch, dtype=forward.output.dtype, device=forward.output.device)
    shares = _shares(forward, start, list(arrived), arrived)
    crossing = _reached_by_derivatives(forward, start, arrived)
    if crossing is not None and all(leaf.tells_samples(batch) for leaf in arrived):
        cuts.append(sums.cut("leaves, by derivatives", False, crossing))
    biases = [shares[leaf.name] for leaf in arrived if leaf.kind == "bias"]
    return Diagnostics(cuts, columns, shares, sum(biases, nothing), tolerance, mixed)


def _reached_by_derivatives(forward: Pass, start: Messages, arrived: Messages) -> Crossing | None:
    """What arrives at the leaves, with those reached by derivatives as queries see them."""
    if forward.telescope is None:
        return None
    reached = [leaf for leaf in arrived if leaf in forward.telescope.values]
    found = forward.telescope.send(start, dict.fromkeys(reached)) if reached else None
    return None if found is None else list((arrived | found).items())


def bias_shares(forward: Pass, start: Messages) -> dict[str, Tensor]:
    """The share `[batch]` of every leaf but inputs."""
    constants = [v for v in forward.graph.leaves if v.kind in ("bias", "constant")]
    arrived = send(forward, start, dict.fromkeys(constants)) if constants else {}
    return _shares(forward, start, constants, arrived)


def _shares(
    forward: Pass, start: Messages, leaves: Sequence[Variable], arrived: Messages
) -> dict[str, Tensor]:
    """The share `[batch]` of every leaf, with a pass for each sample where they are mixed."""
    batch = forward.batch
    shares = {leaf.name: forward.output.new_zeros(batch) for leaf in leaves}
    mixed = [leaf for leaf in arrived if not leaf.tells_samples(batch)]
    for leaf, message in arrived.items():
        if leaf not in mixed:
            shares[leaf.name] = leaf.per_sample(message, batch)[0]
    for sample, alone in enumerate(one_by_one(start, batch) if mixed else ()):
        for leaf, message in send(forward, alone, dict.fromkeys(mixed)).items():
            shares[leaf.name] += leaf.per_sample(message, batch, sample)[0]
    return shares


# -- What a person is warned of.


def warn_of_cancelling(forward: Pass, start: Messages, variable: Variable, message: Tensor) -> None:
    """Warn, once, where absolute relevances of a result add up to a thousand times the total.

    Arguments:
        message: what a query found at a variable, before a condition divides it.
    """
    if variable.tells_samples(forward.batch):
        variation = float(variable.per_sample(message.abs(), forward.batch).max())
    else:
        variation = float(torch.linalg.vector_norm(message, 1)) / forward.batch
    warn_of_variation(forward, start, variable.name, variation)


def warn_of_variation(forward: Pass, start: Messages, name: str, variation: float) -> None:
    """Warn, once, where the absolute relevances of one sample add up to too much.

    Arguments:
        name: where they were asked for.
    """
    if variation > VARIATION and CANCELS not in forward.cautions.said:
        forward.cautions.cancels(name, variation, _where_it_grows(forward, start))


def _where_it_grows(forward: Pass, start: Messages) -> str:
    """The operation at which the absolute sizes of all relevance grow most, in words."""
    sizes: list[tuple[Variable, float]] = []

    def look(variable: Variable, travelling: Messages, arrived: Messages) -> None:
        crossing = (*travelling.values(), *arrived.values())
        size = sum(float(torch.linalg.vector_norm(message, 1)) for message in crossing)
        sizes.append((variable, size))

    send(forward, start, dict.fromkeys(forward.graph.leaves), observe=look)
    growth = {
        variable: after / size
        for (variable, size), (_, after) in itertools.pairwise(sizes)
        if size > 0 and not variable.is_leaf
    }
    if not growth:
        return ""
    variable = max(growth, key=lambda v: growth[v])
    return f" (they grow most, {growth[variable]:.2g} times, at {variable.name!r})"


_ROUNDING = 32
"""Rounding errors that the sum of an output's terms may have made."""

_LARGE = 1e2
"""Terms are looked for where they could be so many times the largest output, or one."""


def warn_of_output(forward: Pass, relevance: Tensor, unnormalized: Tensor) -> None:
    """Warn where an explained output is within rounding of zero.

    Arguments:
        relevance, unnormalized: of the output, shaped like it (eqs. 18, 13).
    """
    values = forward.graph.output.per_sample(unnormalized.unsqueeze(0), forward.batch)[0]
    rounding = _ROUNDING * torch.finfo(values.dtype).eps
    if bool((values.abs() > rounding * _LARGE * forward.output.abs().amax().clamp(min=1)).all()):
        return
    sizes = _terms_of_output(forward, relevance, unnormalized)
    within = (values.abs() <= rounding * sizes).nonzero().flatten().tolist()
    if within:
        of = f" of sample {within[0]}" if forward.batch > 1 else ""
        forward.cautions.output_vanishes(float(values[within[0]]), float(sizes[within[0]]), of)


def _terms_of_output(forward: Pass, relevance: Tensor, unnormalized: Tensor) -> Tensor:
    """`[batch]`: the absolute sizes of what is added up to the explained outputs."""
    operations = _down_to_a_sum(forward.graph)
    # How what is explained changes with what it is made of.
    part = (relevance != 0).to(relevance.dtype)
    sizes = unnormalized.abs().unsqueeze(0)
    sizes = forward.graph.output.per_sample(sizes, forward.batch)[0]
    for operation, (call, values) in zip(operations, forward.calls(operations), strict=True):
        leaves = [value.detach().requires_grad_() for value in values]
        with torch.enable_grad():
            output = fill(call, leaves)()
        operands = operation.operands[: len(leaves)]
        apart = all(operand.tells_samples(forward.batch) for operand in operands)
        if not apart or not output.requires_grad:
            break
        gradients = torch.autograd.grad(output, leaves, part, materialize_grads=True)
        terms = [
            operand.per_sample((leaf.detach() * g).abs().unsqueeze(0), forward.batch)[0]
            for leaf, g, operand in zip(leaves, gradients, operands, strict=True)
        ]
        sizes = torch.stack([sizes, torch.stack(terms).sum(0)]).amax(0)
        part = gradients[0]
    return sizes


def _down_to_a_sum(graph: Graph) -> list[Operation]:
    """The operations from the output up to the first whose neurons have several parents."""
    found: list[Operation] = []
    variable = graph.output
    while variable.producer is not None:
        operation = variable.producer
        found.append(operation)
        row = operation.operator
        if not (row.one_parent or row.moves) or len(operation.slots) > 1:
            break
        variable = operation.operands[0]
    return found
