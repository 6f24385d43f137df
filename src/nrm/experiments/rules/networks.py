"""The networks on which walks are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nrm.errors import InputError
from nrm.evaluation.faithfulness import Score
from nrm.experiments.cnn.plan import CHANNELS, CLUSTERS, Plan
from nrm.experiments.cnn.subject import load as load_pictures
from nrm.experiments.mlp.data import Part
from nrm.experiments.mlp.data import load as load_digits
from nrm.experiments.mlp.network import INPUT, LAYERS, MLP, RECIPES, trained
from nrm.experiments.request import Request
from nrm.experiments.rules.ceiling import Ceiling, HalfGiven
from nrm.experiments.rules.grid import FEW, REST, RULES, gamma, outputs, zero
from nrm.experiments.rules.trial import OneClass, Sample, Trial, Whole
from nrm.experiments.walks import JointRelevance
from nrm.progress import counted

PAIRS, TRIPLES, CHANNEL_PAIRS, CLUSTER_PAIRS = 50, 12, 12, 24
"""How many samples are reported on by default."""

ANY, ACTIVE = "ceiling: any measure", "ceiling: silent neurons take none"
LOWER = "ceiling: pixels as by occlusion, biases take the rest"
UPPER = "ceiling: neurons as by occlusion, biases take the rest"


def trials(request: Request) -> Iterator[Trial]:
    """One after the other, each when its turn comes: training and reading take their time."""
    yield from _perceptron(request)
    yield from _convolutional(request, CHANNELS, CHANNEL_PAIRS)
    yield from _convolutional(request, CLUSTERS, CLUSTER_PAIRS)


def _perceptron(request: Request) -> Iterator[Trial]:
    """Single neurons of the multilayer perceptron, by twos and by threes."""
    data = load_digits(request.data)
    recipe = RECIPES[data.name]
    request.say(f"{data.name}: multilayer perceptron …")
    with counted(request.progress, "training", recipe.epochs) as tell:
        network = trained(data, request.kept / f"{data.name}.safetensors", request.seed, tell=tell)
    model = network.model
    widths = model.fc1.in_features, model.fc1.out_features, model.fc2.out_features
    name = f"{'-'.join(map(str, widths))}-10 on {data.name}"
    yield Trial(
        "neuron-pairs",
        f"{name}: {', '.join(LAYERS)}",
        Whole(model),
        LAYERS,
        "neuron",
        (*RULES, *outputs(zero("input")), *outputs(gamma(0.1, "drop"))),
        _first(data.held_out, "held out", 20),
        _first(data.test, "test", request.samples or PAIRS),
        {ACTIVE: Ceiling(active=True)},
    )
    layers = (INPUT, *LAYERS)
    yield Trial(
        "neuron-triples",
        f"{name}: {', '.join(layers)}",
        Whole(model),
        layers,
        "neuron",
        FEW,
        _first(data.held_out, "held out", 4),
        _first(data.test, "test", request.samples or TRIPLES),
        _ceilings(model),
    )


def _ceilings(model: MLP) -> dict[str, Score]:
    """What bounds relevance of three layers."""
    lower, upper = (INPUT, LAYERS[0]), LAYERS
    return {
        ANY: Ceiling(),
        ACTIVE: Ceiling(active=True),
        LOWER: HalfGiven(JointRelevance(REST, model, lower), lower=True),
        UPPER: HalfGiven(JointRelevance(REST, model, upper), lower=False),
    }


def _first(part: Part, name: str, count: int) -> list[Sample]:
    return [(f"{name} {n}", part.x[n : n + 1]) for n in range(min(count, len(part)))]


def _convolutional(request: Request, plan: Plan, samples: int) -> Iterator[Trial]:
    """Channels or clusters of a convolutional network."""
    reported = request.samples or samples
    choosing = -(-reported // 2)
    found = load_pictures(replace(request, weights=None), reported + choosing)
    pictures = [(photo.name, photo.x) for photo in found.photos]
    if len(pictures) < 2:
        raise InputError(
            f"--data {request.data}: one picture is not enough to choose walks on one and report "
            "on another."
        )
    chosen_on = pictures[::3]
    reported_on = [picture for n, picture in enumerate(pictures) if n % 3]
    layers = plan.layers[found.kind][0]
    yield Trial(
        f"{plan.part}-pairs",
        f"{found.kind}, {plan.part}s: {', '.join(layers)}",
        OneClass(found.model),
        layers,
        plan.by(found.kind, request.seed),
        FEW,
        chosen_on,
        reported_on,
    )
