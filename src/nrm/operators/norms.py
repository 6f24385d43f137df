"""Norms, softmax and its logarithm: linear maps whose coefficients are held constant.

A layer, group or instance norm
`y_j = (x_j - mean x) g_j / sigma + b_j` has the contributions of x, of its centring and of the
bias. Seen so, each operation divides by what it really added up, and slopes telescope along the
depth; as an identity (`rules.Identity`) the shift breaks that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.operators.call import WEIGHTS, Call, Function, fill
from nrm.operators.connections import OneParent
from nrm.operators.propagation import Contribution, Ends, Propagation, Setting
from nrm.operators.routing import PassThrough, Unchanged
from nrm.operators.secants import factors, inverse_root
from nrm.operators.sums import Elementwise, WeightedSum
from nrm.rules import Activation, Identity, Rule, Weight
from nrm.tensors import aligned, per_channel, with_transpose


class Centring(WeightedSum):
    """Operators with `y_j = own_j x_j + shared_j sum_i weight_i x_i + b_j`, i in the group of j.

    The two parts of a neuron's own contribution count as two parents.
    """

    accepts_identity: ClassVar[bool] = True

    def reads_ahead(self, operands: Sequence[tuple[str, Node]]) -> bool:
        return False

    def curves(self, operands: Sequence[tuple[str, Node]], along_path: bool) -> bool:
        return True

    @abstractmethod
    def coefficients(self, call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`own`, `shared`, and `weight` (`None`: one, else not negative), broadcastable to x."""

    @abstractmethod
    def add_up(self, call: Call, x: Tensor) -> Tensor:
        """The sum over each group, for each of its neurons: broadcastable to x."""

    def values(self, x: Tensor) -> Tensor:
        """The values of x that contribute."""
        return x

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        x = Activation(self.values(values[0]))
        own, shared, weight = self.coefficients(call, values[0])

        centring = setting.weight("shared", shared)
        if weight is not None:
            centring = Shared(shared, weight, f"{call.target} at {setting.address!r}")

        def gather(factor: Tensor, weight_of_group: Tensor) -> Tensor:
            if isinstance(centring, Shared):
                factor = factor * centring.of_parents(weight_of_group)
            return self.add_up(call, factor) * weight_of_group

        return [
            Contribution(x, setting.weight("own", own), keeps_sign=True),
            Contribution(
                x,
                centring,
                gather,
                lambda factor: self.add_up(call, factor).expand(x.value.shape),
                keeps_sign=weight is None or bool((weight >= 0).all()),
            ),
        ]

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        x = values[0]
        own, shared, weight = self.coefficients(call, x.detach())
        output = x * own + self.add_up(call, x if weight is None else x * weight) * shared
        bias = self.bias(call, [x.detach()], setting.output_dim)
        return output if bias is None else output + bias

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        if isinstance(setting.rule, Identity):
            with torch.no_grad():
                output = fill(call, values)()
            return output, Unchanged(values[0].shape, output.shape)
        return super().prepare(call, values, setting)


class Shared(Weight):
    """Weights `shared_j weight_i` that are never laid out: there is one for every two neurons.

    A rule is shown `shared_j` alone. What it makes of the product follows, where it makes a power
    of the size of what it is shown (as all rules here do): `weight_i` takes the same power.

    Arguments:
        parents: `weight_i`, not negative.
        where: which operation it is, for errors.
    """

    def __init__(self, value: Tensor, parents: Tensor, where: str) -> None:
        super().__init__(value)
        self._parents, self._where = parents, where
        self._powers: dict[int, float] = {id(value): 1.0}  # of tensors that are kept here

    def derive(self, key: Hashable, modify: Callable[[Tensor], Tensor]) -> Tensor:
        found = super().derive(key, modify)
        if id(found) not in self._powers:
            self._powers[id(found)] = self._power(modify)
        return found

    def size(self, made: Tensor) -> Tensor:
        key = ("size", id(made))  # what was made is kept, so that no other has its id
        if key not in self._derived:
            self._derived[key] = made.abs()
            self._powers[id(self._derived[key])] = self._powers[id(made)]
        return self._derived[key]

    def of_parents(self, made: Tensor) -> Tensor:
        """What becomes of `weight_i` where a rule made this of `shared_j`."""
        power = self._powers[id(made)]
        return self._parents if power == 1 else self._parents**power

    def _power(self, modify: Callable[[Tensor], Tensor]) -> float:
        """How a modified weight grows with the weight.

        Raises:
            UnsupportedOperatorError: by no power of it.
        """
        sizes = self.value.new_tensor([1.0, 2.0, 3.0, 5.0])
        powers = []
        for sign in (1, -1):
            made = modify(sign * sizes)
            if bool((made == 0).all()):
                continue  # this sign is left out
            power = float(torch.log2(made[1] / made[0]))
            powers.append(round(power) if abs(power - round(power)) < 1e-5 else power)
            if not torch.allclose(made, made[0] * sizes ** powers[-1], rtol=1e-5, atol=0):
                powers = []
                break
        if not powers or max(powers) - min(powers) > 1e-5:
            raise UnsupportedOperatorError(
                f"the rule chosen for {self._where} makes of a weight something else than a power "
                "of it, and this operator has a weight for every two neurons, which are not laid "
                "out. Choose another rule for it in the composite."
            )
        return powers[0]


class Normalization(Centring):
    """A norm over groups of neurons of one sample.

    Arguments:
        groups: `(call, x) -> x` with the neurons of a group in the last axis.
        by_channel: whether gain and bias have one entry for each channel (axis 1), or for each
            neuron of the last axes.
    """

    passes = ("input",)
    applies_weights = True
    function = Function("normalization")

    def __init__(
        self, kind: str, groups: Callable[[Call, Tensor], Tensor], by_channel: bool
    ) -> None:
        super().__init__(kind)
        self.groups, self.by_channel = groups, by_channel

    def acts_on_last_axis(self, call: Call) -> bool:
        return not self.by_channel

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        return call["bias"] is not None and not isinstance(rule, Identity)

    def coefficients(self, call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.no_grad():
            grouped = self.groups(call, x)
            variance = grouped.var(-1, keepdim=True, correction=0)
            scale = torch.rsqrt(variance + call["eps"]).expand_as(grouped).reshape(x.shape)
            gain = call["weight"]
            if gain is not None:
                scale = scale * self._aligned(gain, x.dim())
            return scale, -scale / grouped.shape[-1], None

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        if isinstance(setting.rule, Identity):
            return super().frozen(call, values, setting)
        x = values[0].detach()
        with torch.no_grad():
            if self.groups is last_axes:  # the operator's own statistics
                shape, gain, bias = call["normalized_shape"], call["weight"], call["bias"]
                output, _, own = torch.native_layer_norm(x, shape, gain, bias, call["eps"])
                own = own if gain is None else own * gain
            else:
                output = fill(call, [x])()
                own, _, _ = self.coefficients(call, x)

        def transpose(message: Tensor) -> Tensor:
            grouped = self.groups(call, message * own)
            mean = grouped.sum(-1, keepdim=True) / grouped.shape[-1]
            return (grouped - mean).reshape(message.shape)

        return with_transpose(values[0], output, transpose)

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        """`(x - mean) r gain`, `r = v ** -1/2`: the product rule, `Dv` by its mean as well."""
        grouped = [self.groups(call, t) for t in (ends.before[0], ends.after[0], ends.moves[0])]
        centred = [t - t.mean(-1, keepdim=True) for t in grouped]
        scaled = _over_root(centred, call["eps"]).reshape(ends.after[0].shape)
        gain = call["weight"]
        return scaled if gain is None else scaled * self._aligned(gain, scaled.dim())

    def add_up(self, call: Call, x: Tensor) -> Tensor:
        grouped = self.groups(call, x)
        return grouped.sum(-1, keepdim=True).expand_as(grouped).reshape(x.shape)

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        bias = call["bias"]
        return None if bias is None else self._aligned(bias, dim)

    def _aligned(self, value: Tensor, dim: int) -> Tensor:
        return per_channel(value, dim) if self.by_channel else aligned(value, dim)


def _over_root(points: Sequence[Tensor], eps: float) -> Tensor:
    """`c / sqrt(mean c^2 + eps)` along the last axis, between two points.

    Arguments:
        points: both, and how far it moves.
    """
    low, high, move = points[0].detach(), points[1].detach(), points[2]
    squares = [c.square().mean(-1, keepdim=True) + eps for c in (low, high)]
    grown = ((low + high) * move).mean(-1, keepdim=True)
    first, last = (square.rsqrt() for square in squares)
    return factors(Ends((low, first), (high, last), (move, inverse_root(*squares) * grown)))


class RootMeanSquare(PassThrough):
    """RMS norm: an identity; between two inputs, by its scale as well."""

    def __init__(self, kind: str) -> None:
        function = Function("normalization")
        super().__init__(kind, at_zero="zero", elementwise=False, function=function)

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        x, sizes = ends.after[0], call["normalized_shape"]
        eps = torch.finfo(x.dtype).eps if call["eps"] is None else call["eps"]
        points = (ends.before[0], x, ends.moves[0])
        grouped = [t.flatten(t.dim() - len(sizes)) for t in points]
        scaled = _over_root(grouped, eps).reshape(x.shape)
        return scaled if call["weight"] is None else scaled * call["weight"]


def last_axes(call: Call, x: Tensor) -> Tensor:
    """Layer norm: all neurons of the last axes are one group."""
    return x.reshape(*x.shape[: x.dim() - len(call["normalized_shape"])], -1)


def channel_groups(call: Call, x: Tensor) -> Tensor:
    """Group norm: some channels with all their positions are one group."""
    return x.reshape(x.shape[0], call["num_groups"], -1)


def single_channels(call: Call, x: Tensor) -> Tensor:
    """Instance norm: each channel is a group."""
    return x.reshape(*x.shape[:2], -1)


# -- Softmax and its logarithm, where relevance reaches them.
# A softmax is an identity, or linearised at its input (Taylor); a log-softmax is a logit less one
# number. Most attention gives it none: against a softmax, the value takes all
# (`rules.ValueTakesAll`).


class Softmax(Centring):
    """`s_j ~ sum_i s_j (delta_ij - s_i) x_i + b_j`: any contribution rule on that is a Taylor rule.

    Without a choice by the composite it is an identity: each neuron has the logit it stands at
    for its only parent.
    """

    passes = ("self",)
    function = Function("softmax", gate=WEIGHTS, hides_sign=True, positive=True)
    default_rule: ClassVar[Rule | None] = Identity()

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        # What is beyond the expansion is no constant: only the expansion has it.
        return not isinstance(rule, Identity) and not rule.first_order

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        output: Tensor = fill(call, values)()  # its derivative is the Taylor expansion
        return output

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        shares = [call(self=x.detach()) for x in (ends.before[0], ends.after[0])]
        means, shift = _log_means(shares, ends, call["dim"])
        return means * (ends.moves[0] - shift)

    def indifferent(self, call: Call, values: Sequence[Tensor]) -> list[Tensor] | None:
        x = values[0].detach()
        masked = x <= torch.finfo(x.dtype).min / 2  # with -inf, or the least number there is
        return [torch.where(masked, x, 0.0)]

    def values(self, x: Tensor) -> Tensor:
        # Logits masked with -inf have no share, whatever they are.
        return x.masked_fill(x == -torch.inf, 0.0)

    def coefficients(self, call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        share = call(self=x)
        return share, -share, share

    def add_up(self, call: Call, x: Tensor) -> Tensor:
        return x.sum(call["dim"], keepdim=True)

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        """What the softmax is beyond its linear part."""
        share, x = call(self=values[0]), self.values(values[0])
        rest: Tensor = share * (1 - x + (share * x).sum(call["dim"], keepdim=True))
        return rest


def _log_means(shares: Sequence[Tensor], ends: Ends, dim: int) -> tuple[Tensor, Tensor]:
    """A softmax between two points: `Ds_i = L_i (Dx_i - Dz)`, where `z = log sum_k exp x_k`.

    `L_i = (s_i - s'_i) / (log s_i - log s'_i)`, the logarithmic mean, makes that exact; and as all
    `Ds_i` add up to zero, `Dz = sum_k L_k Dx_k / sum_k L_k`.

    Arguments:
        shares: the softmax at both.

    Returns:
        `L`, and `Dz`, linear in the move.
    """
    (low, high), move = shares, ends.moves[0]
    grown = [x.detach().logsumexp(dim, keepdim=True) for x in (ends.before[0], ends.after[0])]
    apart = move.detach() - (grown[1] - grown[0])
    half = apart / 2
    near = (low * high).sqrt() * torch.where(
        half.abs() > 1e-4, torch.sinh(half) / half, 1 + half.square() / 6
    )
    means = torch.where(apart.abs() > 1, (high - low) / apart, near)
    means = torch.where((low == 0) & (high == 0) | ~means.isfinite(), 0.0, means)
    total = means.sum(dim, keepdim=True).clamp(min=torch.finfo(means.dtype).tiny)
    return means, (means * move).sum(dim, keepdim=True) / total


class Touching(WeightedSum):
    """A weighted sum that touches a curved function at the input, where both are the same.

    The slope is held constant; by what the sum misses the function is a bias.
    """

    passes = ("self",)

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        return not rule.first_order

    def curves(self, operands: Sequence[tuple[str, Node]], along_path: bool) -> bool:
        return True


class LogSoftmax(Touching, Elementwise):
    """`y_j = x_j - log sum_i exp x_i`: a logit, less one number that is a bias in all but name.

    The number depends on all logits, and no walk leads on from there: where biases are inputs it
    ends in a leaf.
    """

    function = Function("log_softmax", hides_sign=True)

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        x = values[0]
        one = torch.ones((), dtype=x.dtype, device=x.device)
        return [
            Contribution(
                Activation(x),
                setting.weight("one", one),
                keeps_sign=True,
                connections=partial(OneParent, one, x.shape),
            )
        ]

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        shares = [call(self=x.detach()).exp() for x in (ends.before[0], ends.after[0])]
        _, shift = _log_means(shares, ends, call["dim"])
        return ends.moves[0] - shift

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        return -values[0].detach().logsumexp(call["dim"], keepdim=True)

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        shift = self.bias(call, values, setting.output_dim)
        assert shift is not None
        return values[0] + shift


class LogSumExp(Touching):
    """`y = sum_i s_i x_i + H`, with the softmax `s` held constant, its entropy `H` for a bias.

    That is the plane which touches it at the input.
    """

    function = Function("logsumexp")

    def reads_ahead(self, operands: Sequence[tuple[str, Node]]) -> bool:
        return False

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        x = values[0]

        def add_up(factor: Tensor) -> Tensor:
            return factor.sum(call["dim"], call["keepdim"])

        return [
            Contribution(
                Activation(x.masked_fill(x == -torch.inf, 0.0)),
                setting.weight("share", self._shares(call, x)),
                lambda factor, weight: add_up(factor * weight),
                add_up,
                keeps_sign=True,
            )
        ]

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        x = values[0].detach()
        entropy: Tensor = torch.special.entr(self._shares(call, x))
        return entropy.sum(call["dim"], call["keepdim"])

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        output: Tensor = fill(call, values)()  # its derivatives are the shares
        return output

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        shares = [self._shares(call, x.detach()) for x in (ends.before[0], ends.after[0])]
        _, grown = _log_means(shares, ends, call["dim"])
        output: Tensor = grown.sum(call["dim"], keepdim=call["keepdim"])  # of size one
        return output

    @staticmethod
    def _shares(call: Call, x: Tensor) -> Tensor:
        shares: Tensor = (x - x.logsumexp(call["dim"], True)).exp()
        return shares.nan_to_num(0.0)
