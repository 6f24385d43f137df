"""`mlp-mnist`: joint relevance in a multilayer perceptron (Table 2, Fig. 4, App. J)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

import nrm
from nrm.evaluation import Evaluation
from nrm.experiments.mlp.data import DIGITS, load
from nrm.experiments.mlp.drawing import (
    Cloud,
    Curve,
    colours,
    draw_correlations,
    draw_curves,
    draw_scatter,
)
from nrm.experiments.mlp.network import RECIPES, Trained, trained
from nrm.experiments.mlp.study import DOTS, METHODS, SECOND, THIRD, Order, Study
from nrm.experiments.mlp.walks import PAPERS
from nrm.experiments.report import Picture, Report
from nrm.experiments.request import Request
from nrm.experiments.tables import Row
from nrm.experiments.walks import Walks
from nrm.progress import counted


class MlpMnist:
    """Second- and third-order relevance of single neurons, beside interventions."""

    name = "mlp-mnist"
    summary = "joint relevance of neurons in a multilayer perceptron (Table 2, Fig. 4, App. J)"
    options: frozenset[str] = frozenset()

    def run(self, request: Request) -> Report:
        """Train or load the network, then choose walks, report, and draw, order by order."""
        data = load(request.data)
        recipe = RECIPES[data.name]
        request.say(f"{data.name}: network {_widths(data.test.x.shape[1], recipe.hidden)} …")
        with counted(request.progress, "training", recipe.epochs) as tell:
            network = trained(
                data, request.kept / f"{data.name}.safetensors", request.seed, tell=tell
            )
        request.say(f"{'loaded' if network.loaded else 'trained'}: {network.accuracy:.2%} right")
        rows: list[Row] = []
        notes: list[str] = []
        curves: dict[str, list[Curve]] = {}
        clouds: dict[str, list[Cloud]] = {}
        details: dict[str, Any] = {}
        with torch.no_grad():
            for order in (SECOND, THIRD):
                layers = ", ".join(order.layers)
                study = Study(network, order, request.kept, request.seed)
                request.say(f"{layers}: choosing walks …")
                best, chosen_on = study.choose(data.held_out, request.progress)
                request.say(f"{layers}: test pictures …")
                samples = request.samples or order.samples
                found = study.report(data.test, samples, request.progress)
                rows += study.rows(self.name, found)
                notes.append(_note(order, best, chosen_on, found))
                curves[layers] = study.curves(found)
                request.say(f"{layers}: scatter plots …")
                clouds[layers] = study.clouds(data.test)
                details[layers] = _details(best, chosen_on, found)
        return Report(
            self.name,
            "Joint relevance in a multilayer perceptron, beside interventions",
            rows,
            _pictures(rows, curves, clouds),
            _facts(data.name, len(data.test), network, request.seed),
            [*_READING, *([_OTHER_DATA] if data.name == DIGITS else []), *notes],
            details,
        )


_READING = (
    "The Pearson correlation of a score with the joint contribution of neurons, one of each "
    "layer, to the logit of the predicted class: over all combinations of a picture, then the "
    "mean over the first pictures of the test set. Neurons are removed by setting them to zero.",
    "The paper's figures are those of Table 2, for a network that its authors trained on MNIST "
    "(784-256-128-10). The NRM with gamma = 0.1 and without biases is the paper's; the other two "
    "walks are not. LRP, occlusion and activation add up what is known of single neurons.",
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
    layers = ", ".join(order.layers)
    count = chosen_on.mean(best.key).samples
    text = f"{layers}: on {count} training pictures that the network has not seen, "
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


def _details(best: Walks, chosen_on: Evaluation, found: Evaluation) -> dict[str, Any]:
    return {
        "chosen": best.method,
        "choosing": [{**line, "method": METHODS[line["method"]]} for line in chosen_on.table()],
        "means": [{**line, "method": METHODS[line["method"]]} for line in found.table()],
        "samples": [{**asdict(row), "method": METHODS[row.method]} for row in found.rows],
    }


def _pictures(
    rows: list[Row], curves: dict[str, list[Curve]], clouds: dict[str, list[Cloud]]
) -> list[Picture]:
    colour = colours(list(METHODS.values()))
    return [
        Picture(
            "correlations.png",
            "Correlation, own figures and the paper's",
            "Means over pictures with 95 % bootstrap intervals.",
            draw_correlations(rows, colour),
        ),
        Picture(
            "curves.png",
            "SC_k: what the most relevant combinations contribute",
            "The joint contributions of the k most relevant combinations, added up, in units of "
            "the logit: means over pictures with 95 % bootstrap intervals. The sooner a curve "
            "rises the better. With all combinations taken, which is where those of two layers "
            "end, the order does not matter any more.",
            draw_curves(curves, colour),
        ),
        Picture(
            "scatter.png",
            "Score and joint contribution, combination by combination",
            f"The first picture of the test set. At most {DOTS:,} combinations, drawn the likelier "
            "the farther they are from the origin; correlations are over all of them. NRM, LRP and "
            "occlusion are in units of the logit.",
            draw_scatter(clouds, colour),
        ),
    ]


def _facts(name: str, count: int, network: Trained, seed: int) -> dict[str, str | int | float]:
    model = network.model
    return {
        "data": name,
        "network": _widths(model.fc1.in_features, (model.fc1.out_features, model.fc2.out_features)),
        "test accuracy": f"{network.accuracy:.2%} of {count}",
        "weights": network.digest,
        "seed": seed,
        "versions": f"nrm {nrm.__version__}, torch {torch.__version__}",
    }


def _widths(pixels: int, hidden: tuple[int, int]) -> str:
    return "-".join(map(str, (pixels, *hidden, 10)))
