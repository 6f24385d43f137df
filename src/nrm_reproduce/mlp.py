"""`mlp-mnist`: joint relevance of neurons in a multilayer perceptron (Table 2, Fig. 4, App. J).

Second- and third-order relevance of single neurons, beside interventions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nrm.display import counted
from nrm.evaluation import Evaluation
from nrm.evaluation.scores import SCORES
from nrm.rules import PlainGamma
from nrm_reproduce import comparison
from nrm_reproduce.comparison import (
    BASELINES,
    DOTS,
    OTHERS,
    READING,
    Cloud,
    Comparison,
    Curve,
    Sample,
    Walks,
    colours,
    draw_correlations,
    draw_curves,
    draw_scatter,
)
from nrm_reproduce.data import DIGITS, Data, Part, load_flat
from nrm_reproduce.networks import INPUT, LAYERS, RECIPES, Perceptron, trained_mlp
from nrm_reproduce.report import Experiment, Picture, Report, Request, Row, Table, Value, versions

NAME = "mlp-mnist"
PAPERS = Walks("joint", "NRM (gamma 0.1)", PlainGamma(0.1), "drop")
"""The paper's. The baselines are those of its explainer."""
WALKS = (PAPERS, *OTHERS)
METHODS = {walks.key: walks.method for walks in WALKS} | BASELINES
"""In the order of tables and figures."""


@dataclass(frozen=True)
class Order:
    """Combinations of one neuron of each of some layers.

    Attributes:
        most: the largest k of SC_k; to order more of them takes longer than to find them.
        samples, choosing: on how many pictures by default, and on how many walks are chosen.
        paper: the correlations of Table 2, by method.
    """

    layers: tuple[str, ...]
    choosing: int
    paper: Mapping[str, float]
    samples: int = 100
    most: int = 100_000

    @property
    def title(self) -> str:
        """The layers, as figures and JSON name them."""
        return ", ".join(self.layers)


SECOND = Order(LAYERS, 20, {"joint": 0.947, "lrp": 0.46, "occlusion": 0.20, "activation": 0.15})
THIRD = Order((INPUT, *LAYERS), 4, {"joint": 0.447})


@dataclass(frozen=True)
class Variant:
    """Another network on the same data, of which pairs are compared too.

    Attributes:
        hidden: widths of the hidden layers.
        standardised: of pixels with mean zero and deviation one, as networks are often fed.
    """

    hidden: tuple[int, int]
    standardised: bool


VARIANTS: Mapping[str, tuple[Variant, ...]] = {
    "mnist": tuple(
        Variant(hidden, standardised)
        for standardised in (False, True)
        for hidden in ((64, 32), (128, 64), (256, 128), (512, 256))
    ),
    DIGITS: (),
}
VARIANTS_SAMPLES = 30


@dataclass
class Found:
    """What is found of all orders, for the report."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    curves: dict[str, list[Curve]] = field(default_factory=dict)
    clouds: dict[str, list[Cloud]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    variants: list[Sequence[Value]] = field(default_factory=list)


def run(request: Request) -> Report:
    """Train or load the network, then choose walks, report, and draw, order by order."""
    data = load_flat(request.data)
    network = perceptron(data, request)
    found = Found()
    with torch.no_grad():
        for order in (SECOND, THIRD):
            _add(found, order, network, data, request)
        for variant in VARIANTS[data.name]:
            _add_variant(found, variant, data, request)
    return Report(
        NAME,
        "Joint relevance in a multilayer perceptron, beside interventions",
        found.rows,
        _pictures(found),
        {
            "data": data.name,
            "network": _widths(network),
            "test accuracy": f"{network.accuracy:.2%} of {len(data.test)}",
            "weights": network.digest,
            "seed": request.seed,
            "versions": versions(),
        },
        [*_READING, *([_OTHER_DATA] if data.name == DIGITS else []), *found.notes],
        found.details,
        tables=[_variants(found)] if found.variants else [],
    )


def perceptron(data: Data, request: Request) -> Perceptron:
    """The network of a data set, trained or from its file among what is kept."""
    recipe = RECIPES[data.name]
    request.say(f"{data.name}: multilayer perceptron …")
    with counted(request.progress, "training", recipe.epochs) as advance:
        file = request.kept / f"{data.name}.safetensors"
        network = trained_mlp(data, file, request.seed, advance=advance)
    how = "loaded" if network.loaded else "trained"
    request.say(f"{_widths(network)}, {how}: {network.accuracy:.2%} right")
    return network


def compared(network: Perceptron, order: Order) -> Comparison:
    """All methods on the combinations of an order."""
    combinations = math.prod(network.widths[layer] for layer in order.layers)
    return Comparison(
        f"{len(order.layers)}-layers",
        network.model,
        order.layers,
        WALKS,
        others={name: SCORES[name] for name in BASELINES},
        ks=comparison.steps(min(order.most, combinations)),
    )


def samples(part: Part, name: str, count: int) -> list[Sample]:
    """The first pictures of a part of the data."""
    return [(f"{name} {n}", part.x[n : n + 1]) for n in range(min(count, len(part)))]


def _add(found: Found, order: Order, network: Perceptron, data: Data, request: Request) -> None:
    one = compared(network, order)
    request.say(f"{order.title}: choosing walks …")
    best, chosen_on = one.choose(samples(data.held_out, "held out", order.choosing), request)
    request.say(f"{order.title}: test pictures …")
    reported = one.report(samples(data.test, "test", request.samples or order.samples), request)
    found.rows += comparison.rows(NAME, reported, METHODS, order.paper)
    found.notes.append(_note(order, best, chosen_on, reported))
    found.curves[order.title] = comparison.curves(reported, METHODS, one.ks)
    request.say(f"{order.title}: scatter plots …")
    found.clouds[order.title] = one.shown(data.test.x[:1]).clouds(METHODS, request.seed)
    found.details[order.title] = {
        "chosen": best.method,
        "choosing": comparison.means(chosen_on, METHODS),
        **comparison.details(reported, METHODS),
    }


def _add_variant(found: Found, variant: Variant, data: Data, request: Request) -> None:
    """Pairs of another network, on the first of the same pictures."""
    recipe = replace(RECIPES[data.name], hidden=variant.hidden, accuracy=0.8)
    if variant.standardised:
        data = data.standardised()
    name = "-".join(map(str, (*variant.hidden, *["standardised"] * variant.standardised)))
    request.say(f"{name}: {SECOND.title} …")
    file = request.kept / f"{data.name}-{name}.safetensors"
    network = trained_mlp(data, file, request.seed, recipe=recipe)
    pictures = samples(data.test, "test", request.samples or VARIANTS_SAMPLES)
    reported = compared(network, SECOND).report(pictures, request)
    means = [reported.mean(method).mean for method in METHODS]
    pixels = "standardised" if variant.standardised else "from 0 to 1"
    said = (_widths(network), pixels, f"{network.accuracy:.2%}", len(pictures))
    found.variants.append((*said, *means))
    found.details[name] = comparison.means(reported, METHODS)


def _variants(found: Found) -> Table:
    papers = ("the paper's, 784-256-128-10", None, None, None, *map(SECOND.paper.get, METHODS))
    return Table(
        f"Other networks: Pearson correlation, {SECOND.title}",
        ("network", "pixels", "test accuracy", "pictures", *METHODS.values()),
        [papers, *found.variants],
        group=2,
    )


_READING = (
    "The Pearson correlation of a score with the joint contribution of neurons, one of each "
    "layer, to the logit of the predicted class: over all combinations of a picture, then the "
    "mean over the first pictures of the test set. Neurons are removed by setting them to zero.",
    "The paper's figures are those of Table 2, for a network that its authors trained on MNIST "
    "(784-256-128-10). The NRM with gamma = 0.1 and without biases is the paper's; the other two "
    "walks are not. " + READING.format(parts="neurons"),
    "Both others divide the relevance of a neuron, which is a part of its activation, by that "
    "activation: nothing is amplified. Occlusion walks take no more from it than the neuron has, "
    "and what no input alone takes is the share of the bias.",
)
_OTHER_DATA = (
    "Here they stand beside figures of smaller digits in a smaller network: an experiment of the "
    "same kind, not the same one."
)


def _note(order: Order, best: Walks, chosen_on: Evaluation, found: Evaluation) -> str:
    """Which walks agree best on pictures that are not reported on, and what it gains."""
    count = chosen_on.mean(best.key).samples
    text = f"{order.title}: on {count} training pictures that the network has not seen, "
    if best is PAPERS:
        return text + "the paper's walks agree best."
    gain = found.difference(best.key, PAPERS.key)
    text += f"{best.method} agrees best; on the test pictures it is "
    if gain.mean is None:
        return text + "not defined."
    return text + (
        f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] from the paper's walks, picture by "
        "picture."
    )


def _pictures(found: Found) -> Sequence[Picture]:
    colour = colours(list(METHODS.values()))
    return [
        Picture(
            "correlations.png",
            "Correlation, own figures and the paper's",
            "Means over pictures with 95 % bootstrap intervals.",
            draw_correlations(found.rows, colour),
        ),
        Picture(
            "curves.png",
            "SC_k: what the most relevant combinations contribute",
            "The joint contributions of the k most relevant combinations, added up, in units of "
            "the logit: means over pictures with 95 % bootstrap intervals. The sooner a curve "
            "rises the better. With all combinations taken, which is where those of two layers "
            "end, the order does not matter any more.",
            draw_curves(found.curves, colour),
        ),
        Picture(
            "scatter.png",
            "Score and joint contribution, combination by combination",
            f"The first picture of the test set. At most {DOTS:,} combinations, drawn the likelier "
            "the farther they are from the origin; correlations are over all of them. NRM, LRP and "
            "occlusion are in units of the logit.",
            draw_scatter(found.clouds, colour),
        ),
    ]


def _widths(network: Perceptron) -> str:
    return "-".join(map(str, (*network.widths.values(), 10)))


EXPERIMENT = Experiment(NAME, run)
