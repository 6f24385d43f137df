"""Linear layers and ReLUs: subgraphs, walks and additive relevance, every walk enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

import nrm
from benchmarks.methods import definitions
from benchmarks.methods.table import Row, deviation
from nrm import methods
from nrm.rules import PlainGamma

GAMMA = 0.25


def chain_rows() -> Iterator[Row]:
    """Linear layers and ReLUs under LRP-gamma, every walk enumerated."""
    rng = np.random.default_rng(0)
    sizes = (4, 6, 5, 3)
    weights = [rng.normal(size=pair) for pair in itertools.pairwise(sizes)]
    x, target = rng.random(4), 1
    layers: list[nn.Module] = []
    for weight in weights:
        layers += [linear(torch.from_numpy(weight)), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval()
    R = nrm.Explainer(model, PlainGamma(GAMMA))(torch.from_numpy(x)[None], target=target)
    factors = definitions.contributions(weights, x, GAMMA)
    all_walks = definitions.walks([definitions.columns(f) for f in factors], target, 1.0)
    originals = definitions.walks(factors, target, float(R.scale))
    hidden = ("input", "1", "3")
    inside = ({0, 2}, {0, 1, 3, 4}, {1, 2, 4})
    sets = [nrm.neurons(layer, *chosen) for layer, chosen in zip(hidden, inside, strict=True)]

    def row(method: str, call: str, query: str, found: list[Tensor], expected: list[float]) -> Row:
        ours, other = torch.stack(found), torch.tensor(expected, dtype=torch.float64)
        return Row(method, call, query, "all walks", deviation(ours.flatten(), other))

    def stays(walk: definitions.Walk) -> bool:
        return all(i in chosen for i, chosen in zip(walk[:-1], inside, strict=True))

    yield row(
        "Subgraph LRP", "subgraph(R, S, T, …)", "R(S, T, …)",
        [methods.subgraph(R, *sets)], [definitions.total(all_walks, stays)],
    )  # fmt: skip
    yield row(
        "GNN-LRP, a walk of neurons", 'walk(R, {"layer": i, …})', "R(i, j, …)",
        [methods.walk(R, dict(zip(hidden, walk, strict=False))) for walk in all_walks],
        list(all_walks.values()),
    )  # fmt: skip
    yield row(
        "Additive relevance (Def. 3)", "additive(R, S, T, …)", "R.additive(S, T, …)",
        [methods.additive(R, *sets, layers=len(sizes))],
        [
            definitions.total(
                all_walks,
                lambda walk: sum(i in s for i, s in zip(walk, inside, strict=False)) / len(walk),
            )
        ],
    )  # fmt: skip
    yield row(
        "Originals, unnormalised (eq. 26)", "subgraph(R, S, T, …, normalized=False)",
        "R(S, T, …, normalized=False)",
        [methods.subgraph(R, *sets, normalized=False)], [definitions.total(originals, stays)],
    )  # fmt: skip


def linear(weight: Tensor) -> nn.Linear:
    """A layer without biases; the weight is `[in, out]`, as in the paper."""
    layer = nn.Linear(weight.shape[0], weight.shape[1], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.T.contiguous())
    return layer
