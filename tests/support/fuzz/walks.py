"""How walks go: composites drawn at random, each for the package and for the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nrm import composites, rules
from nrm.composites import Composite
from support import oracle as o
from support.fuzz.networks import Described, Net, Network
from support.networks import RULES

BOX = 1024.0
COLUMNS = {name: column for name, (_, column) in RULES.items()} | {"zbox": o.zbox(-BOX, BOX)}
PACKAGE = {name: rule for name, (rule, _) in RULES.items()} | {"zbox": rules.ZBox(-BOX, BOX)}
ALPHAS: dict[str, tuple[rules.Alpha, Callable[[Sequence[int]], list[float]]]] = {
    "value": (rules.ValueTakesAll(), lambda gates: _by_rank(gates, 1.0)),
    "uniform": (rules.Uniform(), lambda gates: [0.5, 0.5]),
    "shares": (rules.Shares(0.75, 0.25), lambda gates: _by_rank(gates, 0.75)),
    "order": (rules.InOrder(0.4, 0.6), lambda gates: [0.4, 0.6]),
}


def _by_rank(gates: Sequence[int], value: float) -> list[float]:
    if gates[0] == gates[1]:
        return [0.5, 0.5]
    return [value, 1 - value] if gates[0] < gates[1] else [1 - value, value]


@dataclass
class Walks:
    """A composite.

    Attributes:
        first, head, conv: the rule of such layers, if it is another.
        steps: rules of single steps.
        taylor: whether softmax is expanded by the default rule.
    """

    text: str
    default: str
    alpha: str = "value"
    bias: str = "drop"
    first: str | None = None
    head: str | None = None
    conv: str | None = None
    taylor: bool = False
    stabilizer: float = 0.0
    steps: dict[str, str] = field(default_factory=dict)
    named: Composite | None = None

    @property
    def of_differences(self) -> bool:
        """Whether its rules say anything of differences; a box is one of values."""
        return "zbox" not in {self.default, self.first, *self.steps.values()}

    @property
    def composite(self) -> Composite:
        if self.named is not None:
            return self.named
        choices: list = [
            (composites.path(name), PACKAGE[rule]) for name, rule in self.steps.items()
        ]
        alpha = ALPHAS[self.alpha][0]
        return Composite(choices, PACKAGE[self.default], self.text, alpha, self.bias)

    def describe(self, network: Network, sample: int, kind: type[Net] = Described) -> Net:
        """The oracle of one sample."""
        bias, alphas = self.bias == "input", ALPHAS[self.alpha][1]
        net = network.describe(sample, bias, alphas, self.taylor, kind)
        kinds = {step.name: step.kind for step in network.steps}
        above = _read(net)
        visited = _below(above, net.output) | {net.output}
        for name in visited:
            rule = net.rules.get(name)
            if rule is None or rule is o.fixed:
                continue
            chosen = self._rule(name, visited, kinds, above)
            products = any(isinstance(p, o.Factor) for p in net.parents[name, 0])
            column = COLUMNS[chosen]
            net.rules[name] = o.by_alpha(column) if products else column
            net.stabilizers[name] = self.stabilizer if chosen == "zero" else 0.0
        return net

    def _rule(
        self, name: str, visited: set[str], kinds: dict[str, str], above: dict[str, set[str]]
    ) -> str:
        if name in self.steps:
            return self.steps[name]
        if kinds.get(name) not in ("conv", "linear"):
            return self.default
        layers = {n for n in visited if kinds.get(n) in ("conv", "linear")} - {name}
        if self.first and not layers & _below(above, name):
            return self.first
        if self.head and not any(name in _below(above, other) for other in layers):
            return self.head
        return self.conv if self.conv and kinds[name] == "conv" else self.default


def _read(net: Described) -> dict[str, set[str]]:
    """What each variable takes relevance to, also where none of its neurons is left."""
    above: dict[str, set[str]] = {name: set(reads) for name, reads in net.filled.items()}
    for (name, _), parents in net.parents.items():
        above.setdefault(name, set()).update(parent.neuron[0] for parent in parents)
    return above


def _below(above: dict[str, set[str]], name: str) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for parent in above.get(waiting.pop(), ()):
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def draw(network: Network, rng: np.random.Generator) -> Walks:
    """A composite at random."""
    bias = str(rng.choice(["drop", "input"]))
    alpha = str(rng.choice(list(ALPHAS)))
    way = rng.random()
    if way < 0.3:  # those whose derivatives say it all
        taylor = bool(rng.random() < 0.3)
        named = {
            "CPLRP": Walks("CPLRP()", "zero", bias="input", named=composites.CPLRP()),
            "LRPAll": Walks("LRPAll()", "zero", bias="input", named=composites.LRPAll()),
            "AttnLRP": Walks(
                "AttnLRP()", "zero", "uniform", "input", taylor=True, named=composites.AttnLRP()
            ),
            "LRP-0": Walks(f"LRP-0, {alpha}", "zero", alpha, "input"),
        }
        return (
            named[str(rng.choice(["CPLRP", "LRPAll", "AttnLRP", "LRP-0"]))]
            if not taylor
            else named["AttnLRP"]
        )
    if way < 0.5:
        return _named(bias, int(rng.integers(6)))
    if way < 0.75:
        rule = str(rng.choice(list(PACKAGE)))
        return Walks(f"{rule} everywhere, {alpha}", rule, alpha, bias)
    chosen = {
        step.name: str(rng.choice(list(PACKAGE)))
        for step in network.steps
        if step.kind != "softmax"
    }
    return Walks(f"{chosen}, {alpha}", "gamma", alpha, bias, steps=chosen)


def _named(bias: str, which: int) -> Walks:
    kind = {"bias": bias, "stabilizer": 1e-6}
    return [
        Walks(
            "GammaFlat()",
            "gamma",
            bias=bias,
            first="flat",
            head="gamma-0",
            named=composites.GammaFlat(),
        ),
        Walks("EpsilonPlus()", "zero", conv="zplus", named=composites.EpsilonPlus(), **kind),
        Walks(
            "EpsilonPlusFlat()",
            "zero",
            first="flat",
            conv="zplus",
            named=composites.EpsilonPlusFlat(),
            **kind,
        ),
        Walks(
            "EpsilonGammaFlat()",
            "zero",
            first="flat",
            conv="gamma",
            named=composites.EpsilonGammaFlat(),
            **kind,
        ),
        Walks(
            "EpsilonAlpha2Beta1Flat()",
            "zero",
            first="flat",
            conv="alpha2beta1",
            named=composites.EpsilonAlpha2Beta1Flat(),
            **kind,
        ),
        Walks(
            "EpsilonGammaBox()",
            "zero",
            first="zbox",
            conv="gamma",
            named=composites.EpsilonGammaBox(-BOX, BOX),
            **kind,
        ),
    ][which]
