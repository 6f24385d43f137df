"""A chain of convolutions: LRP, ConRel, RelMax and CRP beside zennit-crp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

import nrm
from benchmarks.methods import hooks
from benchmarks.methods.table import Row, deviation
from nrm import methods
from nrm.composites import EpsilonPlus


def convolution_rows() -> Iterator[Row]:
    """Without biases, under z+ and LRP-0."""
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(6, 5, 2, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(45, 4, bias=False),
    ).double().eval()  # fmt: skip
    x = hooks.STRONG * torch.rand(10, 3, 12, 12, dtype=torch.float64)
    explainer = nrm.Explainer(chain, EpsilonPlus(1e-12))
    one, target, layer = x[:1], 1, "2"
    R, every = explainer(one, target=target), explainer(x, target=target)
    a, b = nrm.channels("2", 3), nrm.channels("0", 5, 6)
    in_a, in_both = {"2": [3], "y": [1]}, {"2": [3], "0": [5, 6], "y": [1]}

    def crp(*conditions: Mapping[str, Sequence[int]]) -> Tensor:
        return hooks.heatmaps(chain, one, conditions)

    def row(method: str, call: str, query: str, found: Tensor, expected: Tensor) -> Row:
        return Row(method, call, query, "zennit-crp", deviation(found, expected))

    yield row(
        "LRP", "lrp(R)", "R.heatmap()",
        methods.lrp(R, scale="logit"), crp({"y": [target]}),
    )  # fmt: skip
    relevance = hooks.channel_relevance(chain, x, layer, target)
    yield row(
        "ConRel, every channel", 'conrel(R, "layer")', 'R.channels("layer")',
        methods.conrel(every, layer, scale="logit"), relevance,
    )  # fmt: skip
    yield row(
        "ConRel, a neuron set", "conrel(R, S)", "R(S)",
        methods.conrel(every, nrm.channels(layer, 1, 3), scale="logit"),
        relevance[:, [1, 3]].sum(1),
    )  # fmt: skip
    indices, values = hooks.reference_samples(chain, x, layer, target, 3)
    best = methods.relmax(explainer, torch.split(x, 4), layer, target, k=3, scale="logit")
    same = torch.equal(indices, best.indices)
    yield row(
        "RelMax", 'relmax(explainer, batches, "layer", k, n)', 'R.channels("layer") of each sample',
        best.values, values if same else torch.full_like(values, torch.nan),
    )  # fmt: skip
    yield row(
        "CRP, one concept", "crp(R, S)", "R.heatmap(S)",
        methods.crp(R, a, scale="logit"), crp(in_a),
    )  # fmt: skip
    yield row(
        "CRP, several concepts (eq. 37)", "crp(R, S, T)", "R.heatmap(S, T)",
        methods.crp(R, a, b, scale="logit"), crp(in_both),
    )  # fmt: skip
    yield row(
        "CRP, conditional", "crp(R, S, conditional=True)", "R.heatmap(given=S)",
        methods.crp(R, a, conditional=True), crp(in_a) / crp(in_a).sum(),
    )  # fmt: skip
    conditions = [in_both, {"y": [1]}, {"2": [0, 3], "y": [2]}, {"2": [1, 4], "y": [0, 3]}]
    yield row(
        "CRP, zennit-crp's conditions", "crp_conditions(explainer, x, conditions)",
        "R.heatmap(…) of each",
        methods.crp_conditions(explainer, one, conditions, scale="logit")[:, 0],
        torch.cat([crp(condition) for condition in conditions]),
    )  # fmt: skip
