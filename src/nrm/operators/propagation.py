"""One operation prepared for one input: messages pass it down (`pull`) and up (`push`).

A weighted sum adds up what its operands contribute (`Contribution`), in terms of a factor and a
weight each; a message travels back through such a sum (`TermSum`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from nrm.errors import PositiveSumError, QueryError
from nrm.operators.call import Call
from nrm.rules import Activation, Normalized, Rule, Weight

if TYPE_CHECKING:
    from nrm.operators.connections import Connections

T = TypeVar("T")


@dataclass(frozen=True)
class Before:
    """What an operation read and computed at the reference, where one is given.

    Attributes:
        operands: their values.
        output: the result.
    """

    operands: Sequence[Tensor]
    output: Tensor


@dataclass(frozen=True)
class Ends:
    """An operation's operands at two points, `[*operand]` each.

    Attributes:
        before, after: their values at the reference and at the input.
        moves: `after - before`, of which something linear is made (`Operator.secant`).
    """

    before: Sequence[Tensor]
    after: Sequence[Tensor]
    moves: Sequence[Tensor]


@dataclass
class Setting:
    """How one operation propagates: its rule, and the model-wide choices it needs.

    Attributes:
        alphas: for a product, the share of each operand (eqs. 19-23).
        late_leaf: what the operand after the last stands for: `"bias"`, or a name of the
            operator's own; `None` without one.
        following: the activation after the operation, as calls of one slot each, where its rule
            reads ahead.
        path: the operands' values on the way to this input, from a baseline on, for rules that
            integrate along it.
        before: the values at the reference; contributions are those of the differences from it.
        real: for each operand 0 at its explicit zeros and 1 elsewhere, `[*operand]`; `None` (or
            nothing at all) where it has none (see `nrm.zeros`).
        addend: the same of the arguments that hold the constant added to them, by name, of
            those that have any.
        share: where a weight is found that other graphs of the same model use too.
    """

    address: str
    rule: Rule
    strict: bool
    output_dim: int
    alphas: tuple[float, ...] = ()
    late_leaf: str | None = None
    following: tuple[Call, ...] = ()
    path: Sequence[Sequence[Tensor]] = ()
    before: Before | None = None
    real: Sequence[Tensor | None] = ()
    addend: Mapping[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)
    share: Callable[[Tensor, Rule], Weight] = lambda value, rule: Weight(value)

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """Something that depends on what `name` says alone, made once."""
        if name not in self.known:
            self.known[name] = make()
        found: T = self.known[name]
        return found

    def weight(self, name: str, value: Tensor) -> Weight:
        """The weight, with what rules made of it before as long as it is the same tensor."""
        known = self.weights.get(name)
        if known is None or known.value is not value:
            known = self.weights[name] = self.share(value, self.rule)
        return known


@dataclass(frozen=True)
class Columns:
    """What a message met at the columns of one operation.

    Attributes:
        address: the operation.
        nearly_zero: |message| at columns with `|sum T~| < tolerance * sum |T~|`.
        negative: |message| at columns with a negative sum.
        vanished: |message| at columns whose contributions all vanish (split uniformly).
        smallest: the smallest `|sum T~| / sum |T~|` that any relevance met.
    """

    address: str
    nearly_zero: float
    negative: float
    vanished: float
    smallest: float


class Propagation(ABC):
    """One operation prepared for one input: messages pass it, linearly, any number of times.

    Who may write where: a message that travels lies in memory that nothing else sees, and is
    handed over with it, to be overwritten or kept; `send_on` sees to that, whatever `pull` returns.
    Forward messages are only read, and may be seen by many. What operators were given and have
    computed is never written to.
    """

    exclusive: bool = False
    """What `pull` returns lies in new memory or in the message's, no two of its results in the
    same, and `push` only reads. Others are given copies, and their results are copied. A class
    with a `pull` of its own has to say it anew."""
    output_is_free: bool = False
    """The operation's output is a tensor of its own that nothing here keeps."""
    nonnegative: bool = False
    """No `R(i|j)` is ever negative."""
    vanished: float = 0.0
    """The most relevance, in absolute size, of a message so far at columns that vanish."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "pull" in vars(cls) and "exclusive" not in vars(cls):
            cls.exclusive = False

    @abstractmethod
    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: Normalized = True
    ) -> list[Tensor | None]:
        """`m(i) = sum_j R(i|j) m(j)` for the operands wanted (eq. 24).

        Arguments:
            message: `[K, *output shape]`, K messages at once, no two elements in the same memory;
                it may be overwritten.
            wanted: for each operand, whether its message is needed.
            normalized: `False` multiplies by `T~_ij` itself (eq. 26); `Original` divides by the
                rule's own denominator (eqs. 43-46), where the operation has a rule.

        Returns:
            for each operand, the late leaf last, `[K, *operand shape]`, or `None` where not
            wanted. Where `exclusive`, no two share memory, with each other or with anything else.
        """

    def send_on(
        self, message: Tensor, wanted: Sequence[bool], normalized: Normalized = True
    ) -> list[Tensor | None]:
        """`pull`, with results that may be overwritten: nothing else sees their memory."""
        pulled = self.pull(message, wanted, normalized)
        return [
            part if part is None or (self.exclusive and dense(part)) else part.clone()
            for part in pulled
        ]

    def push(
        self, masses: Sequence[Tensor | None], shape: torch.Size, normalized: Normalized = True
    ) -> Tensor:
        """`F(j) = sum_i R(i|j) F(i)`: the transpose of `pull`, which is linear in the message.

        Arguments:
            masses: for each operand F(i), `[K, *operand shape]`, only to be read; `None` where it
                is zero.
            shape: of the output.

        Returns:
            `[K, *output shape]`, perhaps in the memory of a mass.
        """
        wanted = [mass is not None for mass in masses]
        known = [mass for mass in masses if mass is not None]
        pushed = known[0].new_zeros((len(known[0]), *shape))
        with torch.enable_grad():
            # Ones: every column takes part. A copy, which `pull` may overwrite.
            probe = known[0].new_ones((1, *shape)).requires_grad_()
            pulled = self.pull(probe.clone(), wanted, normalized)
        reached = [p for p in pulled if p is not None]
        linked = [(p, mass) for p, mass in zip(reached, known, strict=True) if p.grad_fn]
        for k, row in enumerate(pushed):
            if linked:
                (found,) = torch.autograd.grad(
                    [p for p, _ in linked],
                    probe,
                    [mass[k : k + 1] for _, mass in linked],
                    retain_graph=True,
                    materialize_grads=True,
                )
                row.copy_(found[0])
            self._check_transposed(
                row, [p.detach() * m[k] for p, m in zip(reached, known, strict=True)]
            )
        return pushed

    def send_up(
        self, masses: Sequence[Tensor | None], shape: torch.Size, normalized: Normalized = True
    ) -> Tensor:
        """`push`, of masses that are seen by others. The result is only to be read."""
        if not self.exclusive:
            masses = [None if mass is None else mass.clone() for mass in masses]
        return self.push(masses, shape, normalized)

    def _check_transposed(self, pushed: Tensor, pulled: Sequence[Tensor]) -> None:
        """What ones pull, weighed by the masses, and what the masses push add up to the same."""
        expected = sum(float(part.sum(dtype=torch.float64)) for part in pulled)
        size = sum(float(part.abs().sum(dtype=torch.float64)) for part in pulled)
        found = float(pushed.sum(dtype=torch.float64))
        # Both may be nothing but rounding, of what was pushed and what cancelled on the way to it.
        rounding = torch.finfo(pushed.dtype).eps ** 0.5 * float(pushed.abs().sum())
        if abs(found - expected) > 0.01 * size + rounding:
            raise QueryError(
                f"{type(self).__name__}.pull does not let derivatives by the message through (a "
                "detach or no_grad in it), so forward messages cannot be found from it. Leave "
                "them in, or give it a push of its own."
            )

    def by_channels(
        self, message: Tensor, operand: int, samples: int, onward: Tensor | None = None
    ) -> Iterator[Tensor] | None:
        """The relevance that passes between channels of output and operand, sample by sample.

        Found by what passes over each weight, which many connections share.

        Arguments:
            message: `[1, *output shape]`; it may be overwritten.
            samples: how many the first axis of operand and output has; one: all is one sample.
            onward: `[*operand shape]`, factors at the operand's neurons.

        Returns:
            `[channels of the output, of the operand]` for each sample; `None` where the operation
            has no weights that join channels.
        """
        return None

    def absolute(self) -> Propagation | None:
        """The same with `|R(i|j)|` or something larger, for bounds; `None` where none is known."""
        return self if self.nonnegative else None

    def late_shape(self) -> torch.Size:
        """The shape of the operand after the last (see `Operator.late_leaf`), if there is one."""
        raise NotImplementedError

    def columns(self, message: Tensor, tolerance: float) -> Columns | None:
        """What `message` meets at this operation's columns; `None` where they cannot fail."""
        return None


def dense(tensor: Tensor) -> bool:
    """Whether no two elements are in the same memory, so that what owns it may write to it.

    It says nothing of others that see this memory: those that were sliced from it, for one.
    """
    return all(
        stride or size == 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def pull_back(output: Tensor, leaves: Sequence[Tensor], message: Tensor) -> list[Tensor]:
    """Vector-Jacobian products `[K, *leaf shape]` of K messages `[K, *output shape]`."""
    if message.shape[0] == 1:
        gradients = torch.autograd.grad(
            output,
            leaves,
            message[0],
            retain_graph=True,
            create_graph=message.requires_grad,  # for `Propagation.push`
            allow_unused=True,
            materialize_grads=True,
        )
        return [gradient.unsqueeze(0) for gradient in gradients]
    found = torch.autograd.grad(
        output,
        leaves,
        message,
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )
    return [
        message.new_zeros((len(message), *leaf.shape)) if gradient is None else gradient
        for leaf, gradient in zip(leaves, found, strict=True)
    ]


def refuse_failing(message: Tensor, failing: Tensor, address: str, cause: str, hint: str) -> None:
    """Refuse a message that meets columns which violate the positive-sum condition (`strict`).

    Arguments:
        message: `[K, *output shape]`.
        failing: which columns those are.
        address: the operation.
        cause: whose contributions fail.
        hint: what to do.

    Raises:
        PositiveSumError
    """
    met = message.abs().sum(0)[failing]
    if bool(met.any()):
        raise PositiveSumError(
            f"strict: at {address!r} relevance of absolute size {float(met.sum()):.3g} met "
            f"{int((met > 0).sum())} neurons whose contributions {cause} sum to zero or less "
            f"(eq. 15). {hint}"
        )


# -- what operands add to a weighted sum -----------------------------------------------------------


@dataclass
class Contribution:
    """What one operand adds to the sum; by default one parent for each neuron.

    Attributes:
        x: the parents and their values.
        w: the weight that a rule may modify.
        apply: `(factor, weight) -> output`, linear in each; broadcasts to the output.
        uniform: `factor -> output` with weight one on every connection, which counts them; `None`:
            the factor itself, of one parent each.
        transpose: `([K, *output], weight) -> [K, *operand]`, the transpose of `apply` in the
            factor; without it autograd finds it, at the cost of running `apply` once.
        transposes_anew: whether `transpose` always returns new memory, which may be overwritten.
        operand: which operand this is; one may contribute in several ways.
        by_channels: `([*operand], weight, [*output]) -> [outputs, inputs]`: `w_ij factor_i share_j`
            added up over the connections of each two channels, where channels have one weight.
        keeps_sign: whether `apply` adds up factors times weights with constants of its own, if any,
            that are not negative: then it is largest where both are taken at their sizes.
        connections: the connections one by one, given the output's shape, for rules that are no
            sums of terms.
        share: what every rule's contributions are multiplied by, the alpha of a product's factor.
            `apply` and `transpose` have it in them; it stands in place of weight one.
        every: the weight one on every connection, where `apply` and `transpose` take it as any
            other weight; then `uniform` is not needed.
    """

    x: Activation
    w: Weight
    apply: Callable[[Tensor, Tensor], Tensor] = torch.mul
    uniform: Callable[[Tensor], Tensor] | None = None
    transpose: Callable[[Tensor, Tensor], Tensor] | None = None
    operand: int = 0
    by_channels: Callable[[Tensor, Tensor | None, Tensor], Tensor] | None = None
    keeps_sign: bool = False
    connections: Callable[[torch.Size], Connections] | None = None
    transposes_anew: bool = False
    share: float = 1.0
    every: Tensor | None = None

    def add(self, factor: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            return self.apply(factor, weight)
        added = factor if self.uniform is None else self.uniform(factor)
        return added if self.share == 1 else self.share * added

    def counting(self) -> Contribution:
        """The same without its share: its connections count as those of any other operand."""
        return self if self.share == 1 else replace(self, share=1.0, every=None)

    def add_each(self, factors: Tensor, weight: Tensor | None) -> Tensor:
        """The same for each of `[K, *operand]`."""
        if factors.device.type != "cpu" and len(factors) > 1:
            return torch.vmap(partial(self.add, weight=weight))(factors)
        first = self.add(factors[0], weight)
        if len(factors) == 1:
            return first.unsqueeze(0)
        found = first.new_empty((len(factors), *first.shape))
        found[0] = first
        for row, factor in zip(found[1:], factors[1:], strict=True):
            row.copy_(self.add(factor, weight))
        return found


Summand = tuple[Contribution, Tensor, Tensor | None]
"""A term of a rule: what it adds, factor and weight."""


class TermSum:
    """The terms of one group added up, over all operands."""

    def __init__(self, summands: Sequence[Summand], output: Tensor | None = None) -> None:
        self.summands = [
            (part, factor, part.every if weight is None else weight)
            for part, factor, weight in summands
        ]
        self._known = output
        self.direct = all(
            part.transpose is not None and weight is not None for part, _, weight in self.summands
        )

    @cached_property
    def output(self) -> Tensor:
        """The sum; it may broadcast to the operator's output."""
        if self._known is not None:
            return self._known
        if not self.direct:
            return self._graph[1].detach()
        with torch.no_grad():
            return add_up(part.add(factor, weight) for part, factor, weight in self.summands)

    @cached_property
    def _graph(self) -> tuple[list[Tensor], Tensor]:
        """The factors and the sum, with a local autograd graph between them."""
        leaves = [factor.detach().requires_grad_() for _, factor, _ in self.summands]
        with torch.enable_grad():
            return leaves, add_up(
                part.add(leaf, weight)
                for leaf, (part, _, weight) in zip(leaves, self.summands, strict=True)
            )

    def pull(self, share: Tensor, wanted: Sequence[bool], pulled: list[Tensor | None]) -> None:
        """Add `factor * (transposed weight) share`, term by term, to what operands get.

        All of that is new memory: derivatives may be the share itself, parts of it, one tensor
        for several operands, or what a function keeps.
        """
        chosen = [t for t, (part, *_) in enumerate(self.summands) if wanted[part.operand]]
        if not chosen:
            return
        gradients = self._transposed(chosen, share)
        for t, gradient in zip(chosen, gradients, strict=True):
            part, factor, _ = self.summands[t]
            owned = self.direct and part.transposes_anew
            if factor is part.x.every:
                product = gradient if owned else gradient.clone()
            else:
                product = gradient.mul_(factor) if owned else gradient * factor
            before = pulled[part.operand]
            pulled[part.operand] = product if before is None else product.add_(before)

    def push(self, masses: Sequence[Tensor | None]) -> Tensor | None:
        """`sum_i T_ij F(i)`: `[K, *output]`, perhaps broadcast; `None` where all F are zero."""
        added = []
        for part, factor, weight in self.summands:
            mass = masses[part.operand]
            if mass is not None:
                added.append(part.add_each(mass * factor, weight))
        return add_up(added) if added else None

    def _transposed(self, chosen: Sequence[int], share: Tensor) -> Iterator[Tensor]:
        """`(transposed weight) share` of each term in turn, to be used before the next."""
        if not self.direct:
            leaves, output = self._graph
            yield from pull_back(output, [leaves[t] for t in chosen], sum_to(share, output.shape))
            return
        for t in chosen:
            part, _, weight = self.summands[t]
            assert part.transpose is not None
            assert weight is not None
            yield part.transpose(share, weight)


def add_up(summands: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    first, *others = summands
    for summand in others:
        first = first + summand
    return first


def through_matrix(x: Tensor, weight: Tensor | None, share: Tensor) -> Tensor:
    """`w_ij x_i share_j` of each two channels, for a weight `[outputs, inputs]`; added up over all
    other axes."""
    passed = share.reshape(-1, share.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
    return passed if weight is None else passed.mul_(weight)


def sum_to(message: Tensor, shape: torch.Size) -> Tensor:
    """`[K, *output]` summed over the axes where `shape` has one column for all."""
    axes = [
        axis for axis, size in enumerate(shape, start=1) if size == 1 and message.shape[axis] > 1
    ]
    return message.sum(axes, keepdim=True) if axes else message
