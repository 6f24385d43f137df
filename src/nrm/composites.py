"""Which rule applies where: the walk specification of a whole network (section 3.3, appendix E).

A composite is a list of selectors with rules and alphas, and a default. Those of the literature are
functions at the end of this file, each under a name (`by_name`). What one chooses for a model is
shown layer by layer by `Composite.applied`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from html import escape
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from nrm.capture.nodes import Captured
from nrm.errors import QueryError
from nrm.graph import Graph, Operation
from nrm.rules import (
    Alpha,
    AlphaBeta,
    Epsilon,
    Flat,
    FromUniform,
    Gamma,
    PathIntegrated,
    Rule,
    Uniform,
    ValueTakesAll,
    ZBox,
    Zero,
    ZPlus,
)
from nrm.rules import LocalLinear as LocalLinearRule
from nrm.rules import Occlusion as OcclusionRule
from nrm.rules.contributions import Baseline
from nrm.structure import is_signed

Selector = Callable[[Operation, Graph], bool]
"""Says whether an operation is meant. Those made here can be pickled, with the composite."""

_WEIGHTED = ("conv", "linear")


@dataclass(frozen=True)
class Named:
    """Operations that some of their properties tell by name.

    Attributes:
        by: how the selector was made: `kind`, `path` or `module`.
        names: kinds, patterns of addresses, or names of module types.
    """

    by: Literal["kind", "path", "module"]
    names: tuple[str, ...]

    def __call__(self, operation: Operation, graph: Graph) -> bool:
        if self.by == "kind":
            return operation.kind in self.names
        if self.by == "path":
            return any(fnmatchcase(operation.address, pattern) for pattern in self.names)
        name = operation.module_type
        return name in self.names or name.rpartition(".")[2] in self.names

    def __repr__(self) -> str:
        return f"{self.by}({', '.join(map(repr, self.names))})"


def kind(*names: str) -> Selector:
    """Operations of these kinds: conv, linear, sum, product, layernorm, softmax, ..."""
    return Named("kind", names)


def path(*patterns: str) -> Selector:
    """Operations whose address matches one of these patterns, e.g. `features.1?`, `layer4.*`."""
    return Named("path", patterns)


def module(*types: type[nn.Module] | str) -> Selector:
    """Operations computed directly in modules of these types (or type names, `"Conv2d"`)."""
    names = (t if isinstance(t, str) else f"{t.__module__}.{t.__qualname__}" for t in types)
    return Named("module", tuple(names))


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
    """A rule for every weighted sum and an alpha for every product.

    The first selector that applies decides, else the default.

    Attributes:
        choices: selectors with a rule or an alpha; products that are sums too (matrix products)
            take one of each.
        default: the rule of weighted sums. Softmax is an identity unless a choice says otherwise,
            or the default is a gradient.
        alpha_default: how the factors of products share (eqs. 19-23).
        bias: what the composite assumes of biases, unless `Explainer(bias=...)` says otherwise.

    Example:
        >>> composite = Composite([(first, Flat()), (kind("conv"), Gamma(0.25))], Epsilon())
        >>> composite = Composite([(path("*.attention.*"), Uniform())], Zero(), bias="input")
    """

    choices: list[tuple[Selector, Rule | Alpha]]
    default: Rule
    name: str = "Composite"
    alpha_default: Alpha = field(default_factory=ValueTakesAll)
    bias: Literal["drop", "input"] = "drop"

    def __post_init__(self) -> None:
        if not isinstance(self.choices, list | tuple):
            raise TypeError(f"the choices are a list of selectors with rules, not {self.choices!r}")
        for choice in self.choices:
            pair = choice if isinstance(choice, tuple) and len(choice) == 2 else (None, None)
            if not callable(pair[0]) or not isinstance(pair[1], Rule | Alpha):
                raise TypeError(
                    "a choice is a selector (kind, path, module, first, head, or a function of an "
                    f"operation and the graph) and a rule or alpha, not {choice!r}"
                )
        if not isinstance(self.default, Rule) or not isinstance(self.alpha_default, Alpha):
            raise TypeError(
                f"the defaults are a rule and an alpha, not {self.default!r} and "
                f"{self.alpha_default!r}"
            )
        if not isinstance(self.bias, str) or self.bias not in ("drop", "input"):
            raise ValueError(f"bias is 'drop' or 'input', not {self.bias!r}")

    def rule(self, operation: Operation, graph: Graph) -> Rule:
        """The rule of one operation."""
        return self._rule(operation, graph)[0]

    def _rule(self, operation: Operation, graph: Graph) -> tuple[Rule, str]:
        """The rule of one operation, and what chose it."""
        for selector, rule in self.choices:
            if isinstance(rule, Rule) and selector(operation, graph):
                return rule, _shown(selector)
        own = operation.operator.default_rule
        if own is None or self.default.first_order:
            return self.default, "default"
        return own, f"default of {operation.kind}"

    def alpha(self, operation: Operation, graph: Graph) -> Alpha:
        """How the factors of one product share."""
        return self._alpha(operation, graph)[0]

    def _alpha(self, operation: Operation, graph: Graph) -> tuple[Alpha, str]:
        """How the factors of one product share, and what chose it."""
        for selector, alpha in self.choices:
            if isinstance(alpha, Alpha) and selector(operation, graph):
                return alpha, _shown(selector)
        return self.alpha_default, "default"

    def applied(self, graph: Graph) -> Applied:
        """What the composite chooses for every operation of a model.

        Arguments:
            graph: of the model: `Explainer(model, composite).graph(x)`, or `R.graph`.

        Example:
            >>> print(GammaFlat().applied(nrm.Explainer(model).graph(x)))
        """
        lines = []
        for operation in reversed(graph.operations):
            row = operation.operator
            found: list[tuple[str, str]] = []
            if row.is_product and len(operation.gates) > 1:
                alpha, by = self._alpha(operation, graph)
                taken = zip(operation.slots, operation.alphas, strict=True)
                shares = ", ".join(f"{graph.by_node[slot].name} {share:g}" for slot, share in taken)
                found.append((f"{alpha}: {shares}", by))
            rule, by = self._rule(operation, graph)
            if row.by_derivatives and not rule.first_order:  # whatever rule was chosen
                found.append(("LocalLinear()", f"the row of {operation.kind}"))
            elif row.adds_up or row.by_derivatives or (row.accepts_identity and not row.one_parent):
                found.append((str(rule), by))
            if not found:
                passes = "follows its neurons" if row.moves else "passes unchanged"
                found.append((passes, ""))
            lines += [(operation.address, operation.kind, what, by) for what, by in found]
        return Applied(self, tuple(lines))

    def __repr__(self) -> str:
        return self.name


def _shown(selector: Selector) -> str:
    return getattr(selector, "__name__", None) or repr(selector)


@dataclass(frozen=True)
class Applied:
    """A composite applied to a model: its choices, from the output down.

    Attributes:
        lines: of each operation the address, the kind, the rule (or what the factors of a product
            take), and the selector that chose it; a matrix product has a line for each of both.
    """

    composite: Composite
    lines: tuple[tuple[str, str, str, str], ...]

    def __str__(self) -> str:
        rows = [("operation", "kind", "rule", "chosen by"), *self.lines]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        bias = "inputs" if self.composite.bias == "input" else "dropped"
        return "\n".join([f"{self.composite} (biases: {bias})", *lines])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

        head = row(("operation", "kind", "rule", "chosen by"), "th")
        body = "".join(row(line, "td") for line in self.lines)
        return f"<table><caption>{escape(str(self.composite))}</caption>{head}{body}</table>"


# -- Composites by name.

Maker = TypeVar("Maker", bound=Callable[..., Composite])

_BY_NAME: dict[str, Callable[..., Composite]] = {}


def composite(name: str) -> Callable[[Maker], Maker]:
    """Give a function that makes a composite a name, by which `by_name` finds it.

    Arguments:
        name: of its own, in whatever case. Defined again, as in a notebook, a function takes the
            place of the one before.

    Raises:
        TypeError: there is no name, as where `@composite` has no parentheses.
        ValueError: another function has it.

    Example:
        >>> @composite("Mine")
        ... def mine(gamma: float = 0.1) -> Composite:
        ...     return Composite([(first, Flat())], Gamma(gamma), name=f"Mine({gamma})")
    """
    if not isinstance(name, str):
        raise TypeError(f'give the composite a name: @composite("Mine"), not {name!r}')

    def decorate(make: Maker) -> Maker:
        for other, owner in list(_BY_NAME.items()):
            if other.casefold() == name.casefold():
                if (owner.__module__, owner.__qualname__) != (make.__module__, make.__qualname__):
                    raise ValueError(f"a composite is called {other!r} already: {owner!r}")
                del _BY_NAME[other]
        _BY_NAME[name] = make
        return make

    return decorate


def names() -> tuple[str, ...]:
    """The names of all composites, in the order in which they were given."""
    return tuple(_BY_NAME)


def by_name(name: str, *arguments: Any, **options: Any) -> Composite:
    """A composite by its name.

    Arguments:
        name: in whatever case.
        arguments, options: its parameters; most need none, `EpsilonGammaBox` the bounds of the
            inputs.

    Raises:
        QueryError: there is none; the error says which there are.
    """
    return maker(name)(*arguments, **options)


def maker(name: str) -> Callable[..., Composite]:
    """The function that makes composites of a name (see `by_name`)."""
    known = {one.casefold(): one for one in _BY_NAME}
    found = known.get(name.casefold())
    if found is None:
        near = get_close_matches(name.casefold(), known, n=1)
        hint = f"did you mean {known[near[0]]}? " if near else ""
        raise QueryError(f"no composite is called {name!r}; {hint}there are {', '.join(_BY_NAME)}")
    return _BY_NAME[found]


def hint_for(given: object) -> str:
    """What to write for a name or a function that was given in the place of a composite."""
    if isinstance(given, str):
        known = {one.casefold(): one for one in _BY_NAME}
        near = get_close_matches(given.casefold(), known, n=1)
        return f" By name: nrm.composites.by_name({known[near[0]] if near else 'GammaFlat'!r})."
    is_rule = isinstance(given, type) and issubclass(given, Rule)
    if is_rule or given in _BY_NAME.values():
        return f" Call it: {getattr(given, '__name__', given)}()."
    return ""


def Everywhere(rule: Rule) -> Composite:
    """One rule for every weighted sum."""
    return Composite([], rule, name=f"Everywhere({rule})")


@composite("GammaFlat")
def GammaFlat(gamma: float = 0.25) -> Composite:
    """The paper's composite, nrm's default: flat first layer, gamma in between, LRP-0 at the head.

    Gamma is the sign-aware rule, whose column sums are positive whatever the signs.

    The default is for heatmaps without noise, whatever the network: their total variation is one
    on a pretrained SqueezeNet, where that of LRP-0 is near a hundred, and four on
    EfficientNet-Lite0, where that of 0.1 is 25,000. Where columns do not cancel so, a smaller
    gamma says more of what interventions find: 0.1 at hardly more noise, 0.02 to 0.05 with biases
    as inputs (docs/reproduction.md, eight networks).
    """
    return Composite(
        [(first, Flat()), (head, Gamma(0.0))], Gamma(gamma), name=f"GammaFlat({gamma})"
    )


@composite("EpsilonPlus")
def EpsilonPlus(epsilon: float = 1e-6) -> Composite:
    """z+ for convolutions, epsilon for the rest."""
    return Composite([(kind("conv"), ZPlus())], Epsilon(epsilon), name=f"EpsilonPlus({epsilon})")


@composite("EpsilonPlusFlat")
def EpsilonPlusFlat(epsilon: float = 1e-6) -> Composite:
    """Flat first layer, z+ for convolutions, epsilon for the rest."""
    return Composite(
        [(first, Flat()), (kind("conv"), ZPlus())],
        Epsilon(epsilon),
        name=f"EpsilonPlusFlat({epsilon})",
    )


@composite("EpsilonGammaFlat")
def EpsilonGammaFlat(epsilon: float = 1e-6, gamma: float = 0.25) -> Composite:
    """Flat first layer, gamma for convolutions, epsilon for the rest."""
    return Composite(
        [(first, Flat()), (kind("conv"), Gamma(gamma))],
        Epsilon(epsilon),
        name=f"EpsilonGammaFlat({epsilon}, {gamma})",
    )


@composite("EpsilonGammaBox")
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


@composite("EpsilonAlpha2Beta1Flat")
def EpsilonAlpha2Beta1Flat(epsilon: float = 1e-6) -> Composite:
    """Flat first layer, alpha2-beta1 for convolutions, epsilon for the rest."""
    return Composite(
        [(first, Flat()), (kind("conv"), AlphaBeta(2.0, 1.0))],
        Epsilon(epsilon),
        name=f"EpsilonAlpha2Beta1Flat({epsilon})",
    )


@composite("LRPZero")
def LRPZero() -> Composite:
    """LRP-0 everywhere."""
    return Composite([], Zero(), name="LRPZero()")


@composite("CPLRP")
def CPLRP(epsilon: float = 0.0) -> Composite:
    """The default for transformers: LRP-0 that counts biases, with attention and scales frozen.

    Assumes that attention weights, gates and the scale of normalisation layers only steer the
    flow: values take all, and a layer norm is the linear map it is at this input. Every
    operation divides by what it added up, so slopes telescope along the depth and totals stay
    small; it equals gradient x input with those parts detached (CP-LRP, Ali et al. 2022).
    """
    return Composite([], _zero(epsilon), name=f"CPLRP({epsilon or ''})", bias="input")


@composite("AttnLRP")
def AttnLRP(epsilon: float = 0.0) -> Composite:
    """AttnLRP (Achtibat et al. 2024): products share evenly, softmax by its Taylor expansion.

    Assumes that attention weights are features as much as values are: queries and keys take
    relevance. Norms are linear with a frozen scale, as in the authors' code (in their paper,
    identities). The softmax's expansion has a bias, so biases count as inputs. The sign of what
    cancels there is not bounded: look at `diagnostics().total_variation`.
    """
    rule = _zero(epsilon)
    return Composite(
        [(kind("softmax"), rule)],
        rule,
        name=f"AttnLRP({epsilon or ''})",
        alpha_default=Uniform(),
        bias="input",
    )


@composite("Circuits")
def Circuits(share: float = 0.1) -> Composite:
    """CP-LRP with a share for what queries and keys do: the default for circuits.

    Assumes that attention weights matter as far as they prefer some positions. Of what that
    changes, compared with uniform weights, they take a share, and pass it to queries and keys by
    halves (`rules.FromUniform`). Everything else is as in `CPLRP`: norms have a frozen scale, gates
    take nothing, biases are inputs. Every operation adds up what there is; the total variation is
    that of CP-LRP, or little more (docs/references.md).

    Arguments:
        share: see `rules.FromUniform`.
    """
    rule = FromUniform() if share == 0.1 else FromUniform(share)
    name = f"Circuits({'' if share == 0.1 else share})"
    return Composite([(kind("softmax"), rule)], Zero(), name=name, bias="input")


@composite("LRPAll")
def LRPAll(rule: Rule | None = None) -> Composite:
    """LRP for recurrent networks (Arras et al. 2017): the value takes all, the gate none.

    Assumes that gates only steer. By default LRP-0 that counts biases, whose total variation is
    that of gradient x input. The sign-aware `Gamma` is bounded at every step (by (2 + gamma) /
    gamma, so not over any number of steps), but forgets: over long series it may miss the step
    that matters (docs/recurrent.md).
    """
    chosen = Zero() if rule is None else rule
    return Composite([], chosen, name=f"LRPAll({'' if rule is None else rule})", bias="input")


@composite("Occlusion")
def Occlusion(rest_to_bias: bool = True) -> Composite:
    """Occlusion walks (section 3.5.3): each parent contributes what is lost without it.

    Assumes that a neuron's activation says what its parents are good for: a positive contribution
    to a rectified neuron counts as far as the neuron is active, and one that a larger negative
    sum outweighs counts for nothing. Parents are taken out one at a time, so that one that others
    can stand in for counts for little. Biases are inputs, and take what no parent alone takes.

    Arguments:
        rest_to_bias: otherwise a bias contributes what is lost without it, as any parent does.
            Columns then nearly cancel here and there, and over many layers the total variation
            has no bound (see `diagnostics`); so they do still where a sum has no bias.
    """
    name = "Occlusion()" if rest_to_bias else "Occlusion(rest_to_bias=False)"
    return Composite([], OcclusionRule(rest_to_bias), name=name, bias="input")


@composite("LocalLinear")
def LocalLinear() -> Composite:
    """Every operation to first order at the input: `x_i dy_j/dx_i`, gates and scales included.

    Assumes that the function is nearly linear between zero and the input. LRP-0 that counts
    biases where only sums and activations are; both factors of a product take the same. What
    does not change with the length of its input has no contributions that add up: a norm without
    bias, or a softmax of large logits, gives nearly zero columns (see `diagnostics`). Take
    `CPLRP`, or `IntegratedGradients`, for networks with those.
    """
    return Composite([], LocalLinearRule(), name="LocalLinear()", bias="input")


@composite("IntegratedGradients")
def IntegratedGradients(
    baseline: Baseline | Mapping[str, Baseline] = 0.0, steps: int = 16
) -> Composite:
    """Every operation by its derivatives, integrated while the input comes from a baseline.

    Assumes that the baseline is an input without what is to be explained, and that the straight
    way from it makes sense to the network. Contributions to a neuron add up to how far it moved;
    a bias, which does not move, contributes nothing. For networks of sums and activations this is
    LRP-0 on the differences from the baseline (DeepLIFT's rescale rule), whatever the steps.

    Arguments:
        baseline: a number or a tensor for all inputs, or by name: `{"x": 0.0, "y": tensor}`.
        steps: see `rules.PathIntegrated`.
    """
    rule = PathIntegrated(baseline, steps)
    return Composite([], rule, name=f"IntegratedGradients(steps={steps})")


def _zero(epsilon: float) -> Rule:
    """LRP-0, with a stabiliser if one is given."""
    rule = Epsilon(epsilon)
    return rule if rule.stabilizer else Zero()


def suggested(captured: Captured) -> Composite:
    """What `Explainer` uses where it is told nothing.

    `CPLRP` for networks with embeddings, normalisation layers (but for batch norm), recurrent
    layers, or one linear layer applied three times or more, as recurrent cells are: their
    activations are signed and smooth. `GammaFlat` for the others, mostly rectified. What is done
    to constants decides nothing, nor how any of it is spelled (`nrm.structure`).
    """
    return CPLRP() if is_signed(captured) else GammaFlat()
