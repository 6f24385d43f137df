"""Which rule applies where (the walk specification of a whole network)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from nrm.graph import Graph, Operation
from nrm.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Rule,
    ZBox,
    Zero,
    ZPlus,
)

Selector = Callable[[Operation, Graph], bool]
"""Says whether an operation is meant."""

_WEIGHTED = ("conv", "linear")


def kind(*names: str) -> Selector:
    """Operations of these kinds: conv, linear, sum, avgpool, batchnorm."""
    return lambda operation, graph: operation.kind in names


def path(*patterns: str) -> Selector:
    """Operations whose address matches one of these patterns, e.g. `features.1?`, `layer4.*`."""
    return lambda operation, graph: any(fnmatchcase(operation.address, p) for p in patterns)


def module(*types: type[nn.Module] | str) -> Selector:
    """Operations computed directly in modules of these types (or type names, `"Conv2d"`)."""
    names = {t if isinstance(t, str) else f"{t.__module__}.{t.__qualname__}" for t in types}
    return lambda operation, graph: (
        operation.module_type in names or operation.module_type.rpartition(".")[2] in names
    )


def first(operation: Operation, graph: Graph) -> bool:
    """Convolutions and linear layers with no other one between them and the inputs."""
    if operation.kind not in _WEIGHTED:
        return False
    below = set(operation.operands)
    for variable in reversed(graph.variables[: operation.output.index]):
        if variable in below and variable.producer is not None:
            if variable.producer.kind in _WEIGHTED:
                return False
            below.update(variable.producer.operands)
    return True


def head(operation: Operation, graph: Graph) -> bool:
    """Convolutions and linear layers with no other one between them and the output."""
    if operation.kind not in _WEIGHTED:
        return False
    above = {operation.output}
    for variable in graph.variables[operation.output.index + 1 :]:
        producer = variable.producer
        if producer is not None and any(v in above for v in producer.operands):
            if producer.kind in _WEIGHTED:
                return False
            above.add(variable)
    return True


@dataclass(frozen=True)
class Composite:
    """A rule for every weighted sum: the first selector that applies decides, else `default`.

    Example:
        >>> composite = Composite([(first, Flat()), (kind("conv"), Gamma(0.25))], Epsilon())
    """

    choices: list[tuple[Selector, Rule]]
    default: Rule
    name: str = "Composite"

    def rule(self, operation: Operation, graph: Graph) -> Rule:
        """The rule of one operation."""
        for selector, rule in self.choices:
            if selector(operation, graph):
                return rule
        return self.default

    def __repr__(self) -> str:
        return self.name


def Everywhere(rule: Rule) -> Composite:
    """One rule for every weighted sum."""
    return Composite([], rule, name=f"Everywhere({rule})")


def GammaFlat(gamma: float = 0.25) -> Composite:
    """The paper's composite, nrm's default: flat first layer, gamma in between, LRP-0 at the head.

    Gamma is the sign-aware rule, whose column sums are positive whatever the signs.
    """
    return Composite(
        [(first, Flat()), (head, Gamma(0.0))], Gamma(gamma), name=f"GammaFlat({gamma})"
    )


def EpsilonPlus(epsilon: float = 1e-6) -> Composite:
    """z+ for convolutions, epsilon for the rest."""
    return Composite([(kind("conv"), ZPlus())], Epsilon(epsilon), name=f"EpsilonPlus({epsilon})")


def EpsilonPlusFlat(epsilon: float = 1e-6) -> Composite:
    """Flat first layer, z+ for convolutions, epsilon for the rest."""
    return Composite(
        [(first, Flat()), (kind("conv"), ZPlus())],
        Epsilon(epsilon),
        name=f"EpsilonPlusFlat({epsilon})",
    )


def EpsilonGammaFlat(epsilon: float = 1e-6, gamma: float = 0.25) -> Composite:
    """Flat first layer, gamma for convolutions, epsilon for the rest."""
    return Composite(
        [(first, Flat()), (kind("conv"), Gamma(gamma))],
        Epsilon(epsilon),
        name=f"EpsilonGammaFlat({epsilon}, {gamma})",
    )


def EpsilonGammaBox(
    low: Tensor | float, high: Tensor | float, epsilon: float = 1e-6, gamma: float = 0.25
) -> Composite:
    """Box rule for the first layer, gamma for convolutions, epsilon for the rest.

    Arguments:
        low, high: bounds of the inputs; numbers or tensors that broadcast to the input.
    """
    return Composite(
        [(first, ZBox(low, high)), (kind("conv"), Gamma(gamma))],
        Epsilon(epsilon),
        name=f"EpsilonGammaBox({epsilon}, {gamma})",
    )


def EpsilonAlpha2Beta1Flat(epsilon: float = 1e-6) -> Composite:
    """Flat first layer, alpha2-beta1 for convolutions, epsilon for the rest."""
    return Composite(
        [(first, Flat()), (kind("conv"), AlphaBeta(2.0, 1.0))],
        Epsilon(epsilon),
        name=f"EpsilonAlpha2Beta1Flat({epsilon})",
    )


def LRPZero() -> Composite:
    """LRP-0 everywhere."""
    return Composite([], Zero(), name="LRPZero()")
