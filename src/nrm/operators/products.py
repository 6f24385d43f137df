"""Products of tensors: gates, attention, similarities; their factors share by alpha (eqs. 19-23).

Where only one factor carries relevance, the other is a constant or a weight: an elementwise
product passes the message unchanged, a matrix product is a weighted sum like a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.operators.call import Call, Function, Order, Rescaling, Slot, fill, only_operand
from nrm.operators.connections import Connections, Dense
from nrm.operators.propagation import Contribution, Ends, Propagation, Setting, through_matrix
from nrm.operators.routing import Unchanged, where_zero_stays
from nrm.operators.row import Operator, ReadsZeros, TellsZeros
from nrm.operators.samples import Samples, in_place
from nrm.operators.secants import factors
from nrm.operators.sums import WeightedSum
from nrm.rules import Activation, Normalized, Rule, Weight
from nrm.tensors import aligned, gradient_share, like, with_slope


class Product(Operator):
    """Elementwise products: `y_j = a_j b_j` gives each factor its alpha."""

    passes: tuple[str, ...] = ("self", "other")
    is_product: ClassVar[bool] = True
    function = Function("times")

    def order(self, call: Call, name: str) -> Order | None:
        return Order(by=call[self._other(name)])

    def shown(self, call: Call, carries: Callable[[Node], bool]) -> Node | None:
        return only_operand(call, carries)

    def may_hold_zeros(self, call: Call, reads: Sequence[str], graph: ReadsZeros) -> bool:
        # Of two variables it has none: a gate on zero is a gate still.
        name = self._varying(call, graph)
        return name is not None and (bool(reads) or graph.may_be_zero(call[self._other(name)]))

    def real(self, call: Call, told: TellsZeros) -> Tensor:
        name = self._varying(call, told.graph)
        assert name is not None
        real, constant = told.real(call[name]).expand(told.value.shape), call[self._other(name)]
        if told.graph.trained(constant):
            return real
        return real * (torch.as_tensor(told.plain(constant), device=real.device) != 0)

    def _other(self, name: str) -> str:
        return self.passes[1 - self.passes.index(name)]

    def _varying(self, call: Call, graph: ReadsZeros) -> str | None:
        """The one variable of a product with a constant."""
        found = [name for name in self.passes if graph.depends(call[name])]
        return found[0] if len(found) == 1 else None

    def rescaling(self, call: Call, name: str) -> Rescaling | None:
        return _by_factor("times", call[self._other(name)])

    def affine_in(self, call: Call, read: Sequence[str]) -> bool:
        return len(read) == 1

    def kind_of(self, operands: Sequence[tuple[str, Node]]) -> str:
        return self.kind if len(operands) > 1 else "scaling"

    def telescopes(self, call: Call, rule: Rule) -> bool:
        return True

    def mixed_axes(self, call: Call, dim: int) -> list[int] | None:
        return []

    def curves(self, operands: Sequence[tuple[str, Node]], along_path: bool) -> bool:
        return len(operands) > 1

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        return super().frozen(call, _shared(values, setting.alphas), setting)

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        sides = [_both(call[name], ends) for name in self.passes]
        return factors(Ends(*zip(*sides, strict=True)), setting.alphas)

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        with torch.no_grad():
            output = fill(call, values)()
        if len(values) == 1:
            return output, Unchanged(values[0].shape, output.shape)
        return output, Split(values, output.shape, setting.alphas)


class Split(Propagation):
    """A fixed share of the message for every factor."""

    exclusive = True

    def __init__(
        self, factors: Sequence[Tensor], output: torch.Size, alphas: Sequence[float]
    ) -> None:
        self.parts = [Unchanged(factor.shape, output) for factor in factors]
        self.alphas = alphas
        self.nonnegative = min(alphas) >= 0

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: Normalized = True
    ) -> list[Tensor | None]:
        return [
            part.pull(alpha * message, [True])[0] if want else None
            for part, alpha, want in zip(self.parts, self.alphas, wanted, strict=True)
        ]


class Quotient(Product):
    """Division: the numerator takes all; what it is divided by is a scale."""

    is_product: ClassVar[bool] = False
    function = Function("over")

    def function_of(self, call: Call) -> Function:
        rounded = call.get("rounding_mode") is not None
        return Function(steps=True) if rounded else self.function

    def order(self, call: Call, name: str) -> Order | None:
        if call.get("rounding_mode") is not None:
            return None
        return Order(falls=name == "other", by=call[self._other(name)])

    def shown(self, call: Call, carries: Callable[[Node], bool]) -> Node | None:
        numerator = call["self"]
        return numerator if isinstance(numerator, Node) and carries(numerator) else None

    def may_hold_zeros(self, call: Call, reads: Sequence[str], graph: ReadsZeros) -> bool:
        return list(reads) == ["self"] and not graph.depends(call["other"])

    def real(self, call: Call, told: TellsZeros) -> Tensor:
        return where_zero_stays(call, told)

    def rescaling(self, call: Call, name: str) -> Rescaling | None:
        if name != "self" or call.get("rounding_mode") is not None:
            return None
        return _by_factor("over", call["other"])

    def affine_in(self, call: Call, read: Sequence[str]) -> bool:
        return list(read) == ["self"] and call.get("rounding_mode") is None

    def telescopes(self, call: Call, rule: Rule) -> bool:
        return call.get("rounding_mode") is None

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        if call.get("rounding_mode") is not None:
            return Operator.secant(self, call, ends, setting)
        numerator, (low, high, move) = (_both(call[name], ends) for name in self.passes)
        inverse = (1 / low, 1 / high, -move / (low * high))
        return factors(Ends(*zip(numerator, inverse, strict=True)))

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        if isinstance(call["self"], Slot):
            return super().frozen(call, values, setting)
        x = values[0].detach()  # a constant divided by it: one parent
        with torch.no_grad():
            output: Tensor = fill(call, [x])()
        return with_slope(values[0], output, output / x)

    def operands(
        self, call: Call, carries: Callable[[Node], bool], address: str
    ) -> list[tuple[str, Node]]:
        return super().operands(call, carries, address)[:1]


def _both(factor: Any, ends: Ends) -> tuple[Tensor, Tensor, Tensor]:
    """A factor at the reference and at the input, and how far it moves: a constant does not."""
    if isinstance(factor, Slot):
        k = factor.index
        return ends.before[k].detach(), ends.after[k].detach(), ends.moves[k]
    whole = not isinstance(factor, Tensor) or not factor.is_floating_point()
    value = like(factor, ends.after[0]) if whole else factor  # half of True and True is no half
    return value, value, torch.zeros_like(value)


_MATRIX_ON_THE_RIGHT = ("other", "mat2", "batch2")


def _by_factor(kind: Literal["times", "over"], factor: Any) -> Rescaling | None:
    """What multiplies with a factor, or divides by it, that is not zero."""
    if isinstance(factor, Node):
        return Rescaling(kind, (factor,), matters=True, shifts=False)
    if not isinstance(factor, int | float) or factor == 0:
        return None
    return Rescaling(kind, (factor,), matters=factor < 0, shifts=False)


class MatrixProduct(WeightedSum):
    """Matrix products and einsum: `y_j = sum_k a_jk b_kj`, perhaps plus a constant.

    Each factor is a variable whose weights are the other's values.

    Arguments:
        factors: the arguments that are the two factors, or the one that lists both.
        addend: the argument that is added, if there is one.
    """

    is_product: ClassVar[bool] = True

    def __init__(
        self,
        kind: str,
        factors: tuple[str, str] | str,
        addend: str | None = None,
    ) -> None:
        super().__init__(kind)
        self.given, self.addend = factors, addend
        self.passes = (factors,) if isinstance(factors, str) else factors

    def factors(self, call: Call) -> Sequence[Any]:
        if isinstance(self.given, str):
            listed: Sequence[Any] = call[self.given]
            return listed
        return [call[name] for name in self.given]

    def affine_in(self, call: Call, read: Sequence[str]) -> bool:
        return len(read) == 1

    def check(self, call: Call, operands: Sequence[tuple[str, Node]], address: str) -> None:
        if len(self.factors(call)) != 2:
            raise UnsupportedOperatorError(
                f"{call.target} at {address!r} multiplies {len(self.factors(call))} tensors. "
                "Write it as products of two."
            )

    def kind_of(self, operands: Sequence[tuple[str, Node]]) -> str:
        return self.kind if len(operands) > 1 else "linear"

    def samples(
        self, call: Call, name: str, at: Samples, read: Sequence[int], shape: Sequence[int]
    ) -> Samples | None:
        if isinstance(self.given, str) or name == self.addend:
            return None
        summed = len(read) - 1 if name == self.given[0] else max(len(read) - 2, 0)
        return None if at.axis == summed else in_place(at, read, shape)

    def mixes_rows(self, names: Collection[str]) -> bool:
        # The matrix on the left says how much of each row goes to which: an adjacency, attention.
        return any(name in _MATRIX_ON_THE_RIGHT for name in names)

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        return self.addend is not None and call["beta"] != 0

    def adds(self, call: Call, name: str) -> bool:
        return name == self.addend

    def reads_ahead(self, operands: Sequence[tuple[str, Node]]) -> bool:
        return len(operands) == 1

    def curves(self, operands: Sequence[tuple[str, Node]], along_path: bool) -> bool:
        return len(operands) > 1

    def channel_axis(self, call: Call, inherited: int | None) -> int | None:
        return -1

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        pair, equation = self.factors(call), call.get("equation")
        scale = 1.0 if self.addend is None else float(call["alpha"])
        both = [values[f.index] if isinstance(f, Slot) else f for f in pair]
        parts = []
        for side, factor in enumerate(pair):
            if not isinstance(factor, Slot):
                continue
            weight: Tensor = both[1 - side]
            joined = None
            if equation is not None:
                joined, weight = _joined(equation, side, both[side], weight)
            share = setting.alphas[factor.index] if setting.alphas else 1.0
            weight = weight if scale == 1 else scale * weight
            parts.append(
                self._contribution(
                    call,
                    side,
                    joined,
                    factor.index,
                    both[side],
                    setting.weight(str(side), weight),
                    share,
                )
            )
        return parts

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        return super().frozen(call, _shared(values, setting.alphas), setting)

    def _contribution(
        self,
        call: Call,
        side: int,
        equation: str | None,
        operand: int,
        x: Tensor,
        w: Weight,
        share: float,
    ) -> Contribution:
        def plain(factor: Tensor, weight: Tensor) -> Tensor:
            pair = (factor, weight) if side == 0 else (weight, factor)
            if equation is None:
                return torch.matmul(*pair)
            return torch.functional.einsum(equation, *pair)

        def apply(factor: Tensor, weight: Tensor) -> Tensor:
            return plain(factor, weight) if share == 1 else share * plain(factor, weight)

        def transpose(message: Tensor, weight: Tensor) -> Tensor:
            product = message @ weight.mT if side == 0 else weight.mT @ message
            return product if share == 1 else product.mul_(share)

        def by_channels(factor: Tensor, weight: Tensor | None, share: Tensor) -> Tensor:
            return through_matrix(factor, None if weight is None else weight.mT, share)

        stacks = not isinstance(self.given, str) and _stacks_alike(x, w.value, side)
        return Contribution(
            Activation(x),
            w,
            apply,
            uniform=lambda factor: plain(factor, torch.ones_like(w.value)),
            transpose=transpose if stacks else None,
            transposes_anew=True,
            operand=operand,
            by_channels=by_channels if self._is_linear(call, side, w.value, share) else None,
            keeps_sign=share >= 0,
            share=share,
            connections=self._connections(side, w.value),
        )

    def _is_linear(self, call: Call, side: int, weight: Tensor, share: float) -> bool:
        """Whether it is a linear layer: one variable times a constant matrix on its right."""
        alone = not isinstance(self.given, str) and not isinstance(self.factors(call)[1], Slot)
        return alone and side == 0 and weight.dim() == 2 and share == 1

    def _connections(self, side: int, weight: Tensor) -> Callable[[torch.Size], Connections] | None:
        """Those of one variable with a constant matrix."""
        if isinstance(self.given, str) or weight.dim() != 2:
            return None
        if side == 0:
            return lambda output: Dense(weight.mT)
        return lambda output: Dense(weight, positions=len(output) > 1)

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        if self.addend is None or call["beta"] == 0:  # which hides even NaN
            return None
        constant: Tensor = call[self.addend] * float(call["beta"])
        return aligned(constant, dim)


class GroupedProduct(WeightedSum):
    """Rows in groups, each group times a matrix of its own, as experts have one each.

    Its call has `input` `[rows, inputs]`, `weight` `[groups, inputs, outputs]`, and `offs`, which
    says where each group ends.
    """

    affine = True
    passes = ("input",)
    applies_weights = True

    def channel_axis(self, call: Call, inherited: int | None) -> int | None:
        return -1

    def acts_on_last_axis(self, call: Call) -> bool:
        return True

    def mixed_axes(self, call: Call, dim: int) -> list[int] | None:
        return [1]

    def orphans(self, call: Call, operands: Sequence[tuple[str, Node]]) -> str | None:
        return "rest"  # rows after the last group

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        x, weight, ends = values[0], call["weight"], call["offs"]

        def uniform(factor: Tensor) -> Tensor:
            return by_groups(factor, weight.new_ones(()).expand(weight.shape), ends)

        def transpose(message: Tensor, weight: Tensor) -> Tensor:
            return by_groups(message, weight.mT, ends)

        return [
            Contribution(
                Activation(x),
                setting.weight("matrices", weight),
                lambda factor, weight: by_groups(factor, weight, ends),
                uniform,
                transpose,
                transposes_anew=True,
                keeps_sign=True,
            )
        ]

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        return None


def by_groups(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`[..., rows, inputs]` times the matrix of each row's group; zero after the last group."""
    begin, parts = 0, []
    for end, matrix in zip(ends.tolist(), matrices, strict=True):
        parts.append(rows[..., begin:end, :] @ matrix)
        begin = end
    rest = rows.new_zeros((*rows.shape[:-2], rows.shape[-2] - begin, matrices.shape[-1]))
    return torch.cat([*parts, rest], -2)


def _shared(factors: Sequence[Tensor], alphas: Sequence[float]) -> Sequence[Tensor]:
    """The factors as they are, with derivatives times alpha."""
    if len(factors) == 1:
        return factors
    return [gradient_share(factor, alpha) for factor, alpha in zip(factors, alphas, strict=True)]


def _joined(equation: str, side: int, x: Tensor, weight: Tensor) -> tuple[str, Tensor]:
    """An equation of two factors as one factor sees it: its weight, added up along the axes that
    einsum sums over in the weight alone. What lies along them is one connection.

    Arguments:
        side: the place of the factor whose weight it is.
        x, weight: that factor, and the other.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:  # in the order of the alphabet, what stands there once
        once = sorted(c for c in set(left) - set(",.") if left.count(c) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    term = terms[1 - side]
    stretched = ""  # an axis of one neuron, which all along the weight's axis are connected with
    if "." not in terms[side]:
        stretched = "".join(c for c, n in zip(terms[side], x.shape, strict=True) if n == 1)
    shared = (set(terms[side]) - set(stretched)) | set(result)
    alone = [c for c in term if c != "." and c not in shared]
    if not alone:
        return f"{','.join(terms)}->{result}", weight
    kept = "".join(c for c in term if c not in alone)
    terms[1 - side] = kept
    return f"{','.join(terms)}->{result}", torch.functional.einsum(f"{term}->{kept}", weight)


def _stacks_alike(x: Tensor, weight: Tensor, side: int) -> bool:
    """Whether the transposed product has the shape of `x` without a sum over copies."""
    if min(x.dim(), weight.dim()) < 2:
        return False
    if x.dim() == weight.dim():
        return x.shape[:-2] == weight.shape[:-2]
    return side == 0 and weight.dim() == 2
