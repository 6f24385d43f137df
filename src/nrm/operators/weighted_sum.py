"""Weighted sums: where a contribution rule decides how a message is shared out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nrm.errors import PositiveSumError, QueryError
from nrm.operators.base import Columns, Operator, Propagation, Setting, fill, pull_back
from nrm.operators.call import Call
from nrm.rules import Activation, Gate, Weight


@dataclass
class Contribution:
    """What one operand adds to the sum.

    Attributes:
        x: the parents and their values.
        w: the weight that a rule may modify.
        apply: `(factor, weight) -> output`, linear in each; broadcasts to the output.
        uniform: `factor -> output` with weight one on every connection.
    """

    x: Activation
    w: Weight
    apply: Callable[[Tensor, Tensor], Tensor]
    uniform: Callable[[Tensor], Tensor]

    def add(self, factor: Tensor, weight: Tensor | None) -> Tensor:
        return self.uniform(factor) if weight is None else self.apply(factor, weight)


class WeightedSum(Operator):
    """A sum of the contributions of one or several operands, plus perhaps a constant, the bias.

    A row says its `contributions` and its `bias`; propagation by any rule follows.
    """

    @abstractmethod
    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        """What each operand contributes."""

    def bias(self, call: Call, dim: int) -> Tensor | None:
        """The constant that is added, with `dim` axes as the output has, or `None`."""
        return None

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        values = [value.detach() for value in values]
        parts = self.contributions(call, values, setting)
        rule = setting.rule
        reads_sum = rule.reuses_sum or rule.needs_sum
        if setting.bias_is_input:
            bias = self.bias(call, setting.output_dim)
            if bias is not None:
                parts.append(_bias_as_input(bias.to(values[0]), values[0], setting))
        shared = SharedOut(parts, setting)
        if not reads_sum:
            with torch.no_grad():
                return fill(call, values)(), shared
        output = shared.own_sum()
        if not setting.bias_is_input:
            bias = self.bias(call, setting.output_dim)
            if bias is not None:
                output = output + bias
        return output, shared


class SharedOut(Propagation):
    """A weighted sum prepared for one input: each message is shared out by the rule.

    Groups of terms (see `nrm.rules.base`) are evaluated when the first message arrives, each with
    a local autograd graph whose vector-Jacobian product carries messages. All of it is kept, so
    that further messages cost one product per group.
    """

    def __init__(self, parts: list[Contribution], setting: Setting) -> None:
        self.parts, self.setting, self.rule = parts, setting, setting.rule
        self._groups: dict[int, _Group] = {}
        self._own_sum: Tensor | None = None  # held until the column sums are known

    def own_sum(self) -> Tensor:
        """`sum_i z_ij` over all operands: what the operator itself adds up."""
        if self.rule.reuses_sum:
            return self.group(0).output.detach()
        with torch.no_grad():
            self._own_sum = _total(part.apply(part.x.value, part.w.value) for part in self.parts)
        return self._own_sum

    def operand_shape(self, index: int) -> torch.Size:
        return self.parts[index].x.value.shape

    @cached_property
    def terms(self) -> list[list[list[tuple[Tensor, Tensor | None]]]]:
        """Operand -> group -> terms."""
        return [[list(group) for group in self.rule.groups(part.x, part.w)] for part in self.parts]

    def group(self, index: int) -> _Group:
        if index not in self._groups:
            self._groups[index] = _Group(
                [
                    (operand, part, factor, weight)
                    for operand, part in enumerate(self.parts)
                    for factor, weight in self.terms[operand][index]
                ]
            )
        return self._groups[index]

    @cached_property
    def uniform(self) -> _Group:
        """Every parent counts the same: what a vanished column falls back to."""
        return _Group(
            [(operand, part, part.x.ones, None) for operand, part in enumerate(self.parts)]
        )

    @cached_property
    def gates_and_sums(self) -> tuple[Sequence[Gate], Tensor, Tensor | None]:
        """Gates, column sums (infinite where vanished), and where they vanish (`None`: nowhere)."""
        with torch.no_grad():
            sums = _SumsOnDemand(self, len(self.terms[0]))
            gates = self.rule.gates(sums, self._own_sum)
            total = self.rule.total(sums, gates, self._own_sum)
            self._own_sum = None
            floor = max(self.rule.stabilizer, torch.finfo(total.dtype).tiny)
            if float(torch.linalg.vector_norm(total, ord=-float("inf"))) > floor:  # the smallest
                return gates, total, None
            vanished = total.abs() <= floor
            return gates, total.masked_fill(vanished, float("inf")), vanished

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: bool = True
    ) -> list[Tensor | None]:
        gates, total, vanished = self.gates_and_sums
        if self.setting.strict:
            self._refuse_failing_columns(message, total, vanished)
        pulled: list[Tensor | None] = [None] * len(self.parts)
        if normalized:
            if vanished is not None:
                stranded = message * vanished
                if bool(stranded.any()):
                    self._split_uniformly(stranded, wanted, pulled)
            message = _divide(message, total)
        for index, share in self._gated(message, gates).items():
            self.group(index).pull(share, wanted, pulled)
        for operand, part in enumerate(self.parts):
            if wanted[operand] and pulled[operand] is None:
                pulled[operand] = message.new_zeros((message.shape[0], *part.x.value.shape))
        return pulled

    def _gated(self, message: Tensor, gates: Sequence[Gate]) -> dict[int, Tensor]:
        """Each group's part of a message, where there is any."""
        shares: dict[int, Tensor] = {}
        for index, gate in enumerate(gates[1:], start=1):
            if isinstance(gate, Tensor) or gate != 0.0:
                share = message * gate
                if bool(share.any()):
                    shares[index] = share
        first = gates[0]
        if isinstance(first, float):
            if first != 0.0:
                shares[0] = message if first == 1.0 else message * first
        elif self.rule.exclusive_gates and not shares:
            shares[0] = message  # nothing for the other groups: all of it is the first one's
        else:
            shares[0] = message * first
        return shares

    def _split_uniformly(
        self, stranded: Tensor, wanted: Sequence[bool], pulled: list[Tensor | None]
    ) -> None:
        parents = self.uniform.output.detach()
        if bool(((parents == 0) & (stranded != 0)).any()):
            raise QueryError(
                f"relevance reached neurons of {self.setting.address!r} that have no parents "
                "(their whole receptive field is padding), so it has nowhere to go. Use "
                "bias='input', or a composite whose upper rules give such neurons none."
            )
        self.uniform.pull(stranded / parents.masked_fill(parents == 0, 1.0), wanted, pulled)

    def magnitude(self) -> Tensor:
        """`sum_i |T~_ij|` of every column."""
        gates, total, vanished = self.gates_and_sums
        with torch.no_grad():
            if self.rule.nonnegative:
                return total if vanished is None else total.masked_fill(vanished, 0.0)
            magnitude: Tensor | float = 0.0
            for index, gate in enumerate(gates):
                size = _total(
                    part.add(factor.abs(), None if weight is None else weight.abs())
                    for operand, part in enumerate(self.parts)
                    for factor, weight in self.terms[operand][index]
                )
                magnitude = magnitude + size * torch.as_tensor(gate).abs().to(size)
            assert isinstance(magnitude, Tensor)
            return magnitude

    def columns(self, message: Tensor, tolerance: float) -> Columns:
        _, total, vanished = self.gates_and_sums
        magnitude = self.magnitude().expand(total.shape)
        mass = message.abs().sum(0).expand(total.shape)
        if vanished is None:
            vanished = torch.zeros_like(total, dtype=torch.bool)
        ratio = torch.where(vanished, 0.0, total.abs() / magnitude)
        empty = vanished & (magnitude <= torch.finfo(total.dtype).tiny)
        reached = ratio[(mass > 0) & ~empty]
        return Columns(
            address=self.setting.address,
            nearly_zero=float(mass[(ratio < tolerance) & ~empty].sum()),
            negative=float(mass[total < 0].sum()),
            vanished=float(mass[empty].sum()),
            smallest=float(reached.min()) if reached.numel() else 1.0,
        )

    def _refuse_failing_columns(
        self, message: Tensor, total: Tensor, vanished: Tensor | None
    ) -> None:
        if self.rule.nonnegative:
            return
        failing = total < 0
        if vanished is not None:
            # Contributions that all vanish are no violation: the uniform split defines them.
            failing = failing | (vanished & (self.magnitude() > torch.finfo(total.dtype).tiny))
        mass = (message.abs() * failing).sum()
        if bool(mass > 0):
            raise PositiveSumError(
                f"strict: at {self.setting.address!r} relevance of absolute size {float(mass):.3g} "
                f"met {int((failing & (message != 0)).any(0).sum())} neurons whose contributions "
                f"under {self.rule} sum to zero or less (eq. 15). The Gamma, ZPlus and Flat rules "
                "cannot fail so."
            )


class _Group:
    """The terms of one group, added up with a local autograd graph."""

    def __init__(self, terms: Sequence[tuple[int, Contribution, Tensor, Tensor | None]]) -> None:
        self.operand = [operand for operand, _, _, _ in terms]
        self.leaves = [factor.detach().requires_grad_() for _, _, factor, _ in terms]
        self.factors = [
            None if factor is part.x.ones else factor for _, part, factor, _ in terms
        ]  # None: one everywhere
        with torch.enable_grad():
            self.output = _total(
                part.add(leaf, weight)
                for leaf, (_, part, _, weight) in zip(self.leaves, terms, strict=True)
            )

    def pull(self, share: Tensor, wanted: Sequence[bool], pulled: list[Tensor | None]) -> None:
        """Add `sum_t factor_t * W_t^T share` to what is pulled for each operand."""
        chosen = [t for t, operand in enumerate(self.operand) if wanted[operand]]
        if not chosen:
            return
        gradients = pull_back(self.output, [self.leaves[t] for t in chosen], share)
        # The gradients of a plain sum are one and the same tensor.
        shared = len(chosen) > 1 or _same_memory(gradients[0], share)
        for term, gradient in zip(chosen, gradients, strict=True):
            operand, factor = self.operand[term], self.factors[term]
            if factor is None:
                product = gradient.clone() if shared else gradient
            elif shared or not gradient.is_contiguous():
                product = gradient * factor
            else:
                product = gradient.mul_(factor)
            before = pulled[operand]
            pulled[operand] = product if before is None else before + product


class _SumsOnDemand(Sequence[Tensor]):
    """Group sums, each evaluated only if a rule reads it."""

    def __init__(self, owner: SharedOut, length: int) -> None:
        self._owner, self._length = owner, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._owner.group(index).output.detach()


def _divide(message: Tensor, total: Tensor) -> Tensor:
    """`message / total`, in place where its elements are its own."""
    return message.div_(total) if message.is_contiguous() else message / total


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _total(summands: Iterator[Tensor]) -> Tensor:
    first = next(summands)
    for summand in summands:
        first = first + summand
    return first


def _bias_as_input(bias: Tensor, operand: Tensor, setting: Setting) -> Contribution:
    """A bias as a late input neuron of value one and weight b_j, for every sample."""
    shape = list(bias.shape)
    if setting.batch_axes is not None:
        at_operand, at_output = setting.batch_axes
        shape[at_output] = operand.shape[at_operand]
    ones = torch.ones((), dtype=bias.dtype, device=bias.device).expand(shape)
    return Contribution(
        Activation(ones, constant=True),
        setting.weight("bias", bias),
        apply=torch.mul,
        uniform=lambda factor: factor,
    )
