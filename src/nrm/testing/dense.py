"""Every `R(i|j)` built another way, from single connections, and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nrm.operators import fill
from nrm.rules import Activation, Identity, Weight, Zero
from nrm.testing.prepared import CLOSE, Case

STEP = 1e-4
"""How far one neuron is moved to see where it goes."""


def check_values(case: Case) -> None:
    look = "Look at the row's contributions, or at the terms and gates of the rule."
    row, setting = case.row, case.setting
    axes = row.mixed_axes(case.node_call, case.values[0].dim())
    if row.by_derivatives:
        expected = _by_derivatives(case)
    elif isinstance(setting.rule, Identity) and row.accepts_identity:
        expected = at_the_same_place(case)
    elif row.adds_up and _is_linear(case):
        expected = _Connections(case).shares()
    elif row.adds_up and type(setting.rule) is Zero:
        expected = _by_frozen(case)
    elif row.moves:
        expected, look = _by_moving(case), "Look at who is whose parent."
    elif axes == [] and not row.adds_up:
        expected, look = at_the_same_place(case), "Look at who is whose parent, and the alphas."
    else:
        return
    case.compare("values", case.dense, expected, look)


def _is_linear(case: Case) -> bool:
    """Whether the operator itself is linear in each operand: no part of it is held constant."""
    return case.row.is_product or not case.row.curves(case.slots, along_path=False)


def differences(
    run: Callable[[Sequence[Tensor]], Tensor], values: Sequence[Tensor], operand: int, step: float
) -> Tensor:
    """`[parents, neurons]`: what each neuron becomes more if one parent does, over the step."""
    base = run(values).flatten()
    found = []
    for i in range(values[operand].numel()):
        moved = values[operand].clone()
        moved.view(-1)[i] += step
        changed = run([*values[:operand], moved, *values[operand + 1 :]]).flatten()
        found.append((changed - base) / step)
    return torch.stack(found) if found else base.new_zeros((0, len(base)))


class _Connections:
    """A weighted sum, weight by weight: what a rule makes of every connection.

    `T~_ij = sum_g gate_g(j) sum_t factor_t(i) weight_t(i, j)` (eq. 14), evaluated for one neuron j
    at a time, from weights that are read off the operator by moving single neurons.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.rule = case, case.setting.rule
        self.weights, self.there = [], []
        for operand, value in enumerate(case.values):
            weight = differences(case.run, case.values, operand, 1.0)
            self._check_adds_up(operand, value, weight)
            self.weights.append(torch.where(weight.abs() > 1e-9, weight, 0.0))
            there = weight.abs() > 1e-9
            if isinstance(case.call.get("weight"), Tensor):  # one of zero connects all the same
                there |= (
                    differences(_with_weights_of_one(case), case.values, operand, 1.0).abs() > 1e-9
                )
            self.there.append(there.double())

    def _check_adds_up(self, operand: int, value: Tensor, weight: Tensor) -> None:
        case = self.case
        draw = torch.Generator().manual_seed(3)
        step = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        values = list(case.values)
        values[operand] = value + step
        change = case.run(values).flatten() - case.run(case.values).flatten()
        if not torch.allclose(change, step.flatten() @ weight, CLOSE, CLOSE):
            case.fail(
                "traits",
                f"adds_up is said of the row, but the function is not linear in "
                f"{case.operands[operand]}",
                "Give it another kind of row, or say that it `curves`.",
            )

    def shares(self) -> list[Tensor]:
        """`R(i|j)`."""
        setting = self.case.setting
        contributions = self._after_activation() if setting.following else self._contributions()
        total = torch.stack([part.sum(0) for part in contributions]).sum(0)
        floor = max(self.rule.stabilizer, torch.finfo(total.dtype).tiny)
        vanished = total.abs() <= floor
        if not setting.following:
            self._check_unnormalized(contributions)
        counts = self._parents(real=True)
        every = self._parents(real=False)
        number = torch.stack([part.sum(0) for part in counts]).sum(0)
        counts = [
            torch.where(number > 0, one, other) for one, other in zip(counts, every, strict=True)
        ]
        number = torch.stack([part.sum(0) for part in counts]).sum(0)
        shares = [
            torch.where(
                vanished,
                count / number.clamp(min=1),
                part / torch.where(vanished, 1.0, total),
            )
            for part, count in zip(contributions, counts, strict=True)
        ]
        if setting.late_leaf not in (None, "bias"):  # what neurons without any parent give to
            shares.append(torch.diag((number == 0).double()))
        return shares

    def _contributions(self) -> list[Tensor]:
        """`T~_ij` of every operand, the bias last."""
        groups = [
            self._groups(operand, value, weight)
            for operand, (value, weight) in enumerate(
                zip(self.case.values, self.weights, strict=True)
            )
        ]
        own = [
            value.flatten()[:, None] * weight * self._alpha(operand)
            for operand, (value, weight) in enumerate(
                zip(self.case.values, self.weights, strict=True)
            )
        ]
        if self.case.setting.late_leaf == "bias":
            groups.append(self._groups_of_bias())
            own.append(torch.diag(self._bias))
        own_sum = torch.stack([part.sum(0) for part in own]).sum(0)
        sums = [
            torch.stack([parts[g].sum(0) for parts in groups]).sum(0) for g in range(len(groups[0]))
        ]
        self._check_claims(sums, own_sum)
        if self.rule.by_sign:
            negative = own_sum < 0
            return [torch.where(negative, -parts[1], parts[0]) for parts in groups]
        gates = self.rule.gates(sums, None)
        return [
            torch.stack([gate * part for gate, part in zip(gates, parts, strict=True)]).sum(0)
            for parts in groups
        ]

    def _groups(self, operand: int, value: Tensor, weight: Tensor) -> list[Tensor]:
        real = self.case.setting.real[operand] if self.case.setting.real else None
        x = Activation(value, real=real)
        columns = []
        for j in range(weight.shape[1]):
            column = Weight(weight[:, j].view(value.shape))
            columns.append(
                [self._added(terms, value.shape) for terms in self.rule.groups(x, column)]
            )
        there = self.there[operand] * self._alpha(operand)
        return [
            torch.stack([groups[g] for groups in columns], 1) * there
            for g in range(len(columns[0]))
        ]

    def _groups_of_bias(self) -> list[Tensor]:
        real = self._real_bias
        x = Activation(torch.ones_like(self._bias), constant=True, real=real)
        groups = self.rule.groups(x, Weight(self._bias))
        return [torch.diag(self._added(terms, self._bias.shape)) for terms in groups]

    @staticmethod
    def _added(terms: Sequence[tuple[Tensor, Tensor | None]], shape: torch.Size) -> Tensor:
        total = torch.zeros(shape, dtype=torch.float64)
        for factor, weight in terms:
            total = total + (factor if weight is None else factor * weight)
        return total.flatten()

    def _after_activation(self) -> list[Tensor]:
        """`phi(z_j) - phi(z_j - z_ij)`, for rules that read the activation that follows."""
        case, z = self.case, self.case.output.flatten()

        def phi(value: Tensor) -> Tensor:
            for call in case.setting.following:
                value = fill(call, [value])()
            return value

        lost = [
            phi(z) - phi(z - value.flatten()[:, None] * weight)
            for value, weight in zip(case.values, self.weights, strict=True)
        ]
        if case.setting.late_leaf == "bias":
            alone = phi(z) - phi(z - self._bias)
            others = torch.stack([part.sum(0) for part in lost]).sum(0)
            rests = getattr(self.rule, "rest_to_bias", False)
            lost.append(torch.diag(phi(z) - others if rests else alone))
        return lost

    def _parents(self, real: bool) -> list[Tensor]:
        """One for every connection, `real`: but for those from explicit zeros."""
        found = []
        for operand, there in enumerate(self.there):
            mask = self.case.setting.real[operand] if real and self.case.setting.real else None
            found.append(there if mask is None else there * mask.reshape(-1, 1))
        if self.case.setting.late_leaf == "bias":
            ones = torch.ones_like(self._bias)
            found.append(torch.diag(ones if self._real_bias is None else self._real_bias))
        return found

    def _alpha(self, operand: int) -> float:
        alphas = self.case.setting.alphas
        return alphas[operand] if alphas else 1.0

    @property
    def _bias(self) -> Tensor:
        """What is added to every neuron: the function of nothing but zeros."""
        nothing = [torch.zeros_like(value) for value in self.case.values]
        return self.case.run(nothing).flatten()

    @property
    def _real_bias(self) -> Tensor | None:
        find = getattr(self.case.row, "real_bias", None)
        real = None if find is None else find(self.case.call, self.case.values, self.case.setting)
        return None if real is None else real.expand(self.case.output.shape).flatten().double()

    def _check_claims(self, sums: Sequence[Tensor], own_sum: Tensor) -> None:
        rule, case = self.rule, self.case
        if rule.reuses_sum and not torch.allclose(sums[0], own_sum, CLOSE, CLOSE):
            case.fail(
                "values",
                "the rule is said to reuse the operator's own sum, but its terms add up to another",
                "Look at `reuses_sum`.",
            )
        opposed = rule.opposed_sum(sums[0], own_sum) if rule.by_sign else None
        if opposed is not None and not torch.allclose(opposed, sums[1], CLOSE, CLOSE):
            case.fail("values", "group 1 adds up to something else than opposed_sum says",
                      "Look at `opposed_sum`.")  # fmt: skip

    def _check_unnormalized(self, contributions: list[Tensor]) -> None:
        case = self.case
        if case.setting.late_leaf not in (None, "bias"):
            contributions = [*contributions, torch.zeros_like(case.dense[-1])]
        one_each = case.row.mixed_axes(case.node_call, case.values[0].dim()) == []
        if one_each and len(case.values) == 1 and case.setting.late_leaf is None:
            return  # a message passes it unchanged, whatever its T~
        found = case.lay_out(case.propagation, normalized=False)
        case.compare("values", found, contributions, "This is T~ itself, before normalisation.")


def _with_weights_of_one(case: Case) -> Callable[[Sequence[Tensor]], Tensor]:
    """The function with ones in the place of its weight."""
    ones = torch.ones_like(case.call["weight"])
    call = replace(case.call, arguments=case.call.arguments | {"weight": ones})
    return lambda values: fill(call, values)()


def _by_frozen(case: Case) -> list[Tensor]:
    """`x_i df_j/dx_i` of what a row says to hold constant, and its bias; over the sum."""
    parts = [
        value.flatten()[:, None] * slope
        for value, slope in zip(case.values, frozen_slopes(case)[1], strict=True)
    ]
    if case.setting.late_leaf == "bias":
        added = case.row.bias(case.call, case.values, case.output.dim())
        assert added is not None
        parts.append(torch.diag(added.expand(case.output.shape).flatten()))
    total = torch.stack([part.sum(0) for part in parts]).sum(0)
    return [part / total for part in parts]


def frozen_slopes(case: Case) -> tuple[Tensor, list[Tensor]]:
    """What `frozen` returns, and its derivatives `[parents, neurons]` by each operand."""
    leaves = [value.clone().requires_grad_() for value in case.values]
    with torch.enable_grad():
        output = case.row.frozen(case.call, leaves, case.setting)
    columns = []
    for j in range(output.numel()):
        if not output.requires_grad:
            columns.append([torch.zeros_like(leaf) for leaf in leaves])
            continue
        columns.append(
            list(
                torch.autograd.grad(
                    output.flatten()[j], leaves, retain_graph=True, materialize_grads=True,
                    allow_unused=True,
                )
            )
        )  # fmt: skip
    slopes = [
        torch.stack([column[k].flatten() for column in columns], 1) for k in range(len(leaves))
    ]
    return output.detach(), slopes


def _by_derivatives(case: Case) -> list[Tensor]:
    """`x_i df_j/dx_i` of the function itself; what is flat, or is left, ends in the late leaf."""
    parts = []
    for operand, value in enumerate(case.values):
        ahead, back, further, behind = (
            differences(case.run, case.values, operand, step * STEP) for step in (1, -1, 2, -2)
        )
        slope = (4 * (ahead + back) - (further + behind)) / 6  # of fourth order
        parts.append(value.flatten()[:, None] * slope)
    total = torch.stack([part.sum(0) for part in parts]).sum(0)
    constant = getattr(case.row, "constant", None)
    found = None if constant is None else constant(case.call, case.values, case.setting)
    added = torch.zeros_like(total)
    if found is not None:
        added = found.expand(case.output.shape).flatten()
    total = total + added
    flat = total.abs() <= 1e-9 * case.output.flatten().abs().clamp(min=1e-9)
    shares = [torch.where(flat, 0.0, part / torch.where(flat, 1.0, total)) for part in parts]
    return [*shares, torch.diag(torch.where(flat, 1.0, added / torch.where(flat, 1.0, total)))]


def _by_moving(case: Case) -> list[Tensor]:
    """Each neuron has the parent with which it moves, or the late leaf if it moves with none."""
    found = [
        differences(case.run, case.values, operand, STEP).round(decimals=6)
        for operand in range(len(case.values))
    ]
    if case.setting.late_leaf is not None:
        moved = torch.stack([part.sum(0) for part in found]).sum(0)
        found.append(torch.diag(1 - moved))
    return found


def at_the_same_place(case: Case) -> list[Tensor]:
    """Each neuron has the parents that stand where it does, which share by their alphas."""
    found = []
    for operand, value in enumerate(case.values):
        numbers = torch.arange(value.numel()).view(value.shape).expand(case.output.shape)
        matrix = torch.zeros(value.numel(), case.output.numel(), dtype=torch.float64)
        matrix[numbers.flatten(), torch.arange(case.output.numel())] = 1.0
        found.append(matrix * (case.setting.alphas[operand] if case.setting.alphas else 1.0))
    return found + ([torch.zeros_like(case.dense[-1])] if len(case.dense) > len(found) else [])
