"""`additive`: additive and joint relevance of clusters beside interventions (Fig. A.3)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

import nrm
from nrm import composites
from nrm.errors import NrmError
from nrm.evaluation import Families, Interventions, pearson
from nrm_reproduce import additive
from nrm_reproduce.additive import (
    EFFECTS,
    SCORES,
    Effect,
    Score,
    additive_ceiling,
    effects,
    overlap,
    scores,
)
from nrm_reproduce.data import Photo, read_photo
from nrm_reproduce.networks import Pictured, squeezenet
from nrm_reproduce.report import PAGE, RESULT, Request


class Branching(nn.Module):
    """A skip connection, so that a walk may pass a layer or not."""

    def __init__(self, activation):
        super().__init__()
        linear = not isinstance(activation, nn.ReLU)
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=not linear)
        self.first = activation
        self.branch = nn.Conv2d(6, 6, 3, padding=1, bias=not linear)
        self.second = activation
        self.last = nn.Conv2d(6, 8, 3, stride=2, bias=not linear)
        self.third = activation
        self.head = nn.Linear(8, 4, bias=not linear)

    def forward(self, x):
        x = self.first(self.stem(x))
        x = x + self.second(self.branch(x))
        return self.head(self.third(self.last(x)).mean((2, 3)))


def tiny():
    torch.manual_seed(3)
    return Branching(nn.ReLU())


def linear():
    torch.manual_seed(3)
    return Branching(nn.Identity())


def _picture(seed=0):
    return torch.rand(1, 3, 17, 17, generator=torch.Generator().manual_seed(seed)).double()


def _explained(model, composite=None):
    x = _picture()
    return x, nrm.Explainer(model.double().eval(), composite)(x)


def _hooked(model, x, zeroed):
    """The model's output while forward hooks zero some modules' outputs."""
    handles = [
        getattr(model, name).register_forward_hook(
            lambda module, args, out, gone=gone: out * (~gone)
        )
        for name, gone in zeroed.items()
    ]
    try:
        with torch.no_grad():
            return model(x)[0]
    finally:
        for handle in handles:
            handle.remove()


def families_of(R, *parts):
    """The clusters of two layers, as scores take them."""
    given = {part.layer: part for part in parts}
    return Families(R, list(given), lambda R, layer: given[layer])


@pytest.mark.parametrize("upper", ["branch", "last"])
def test_contributions_are_those_of_forward_hooks(upper):
    model = tiny()
    x, R = _explained(model)
    target = int(R.target)
    a, b = nrm.clusters(R, "stem", 3), nrm.clusters(R, upper, 4)
    interventions = Interventions(nrm.Explainer(model), x, target=target)
    found = effects(families_of(R, a, b), interventions)
    whole = _hooked(model, x, {})[target]
    first = [a.labels == i for i in range(3)]
    second = [b.labels == j for j in range(4)]
    for i, gone in enumerate(first):
        for j, also in enumerate(second):
            alone = _hooked(model, x, {upper: also})[target]
            both = _hooked(model, x, {"stem": gone, upper: also})[target]
            torch.testing.assert_close(found[Effect.TOTAL][i, j], whole - both)
            joint = whole - _hooked(model, x, {"stem": gone})[target] - alone + both
            torch.testing.assert_close(found[Effect.JOINT][i, j], joint)
    assert found[Effect.JOINT].abs().max() > 1e-3


def test_scores_are_queries_of_the_measure():
    _, R = _explained(tiny())
    a, b = nrm.clusters(R, "stem", 3), nrm.clusters(R, "last", 4)
    found = scores(families_of(R, a, b))
    for i, s in enumerate(a):
        for j, t in enumerate(b):
            expected = {
                Score.JOINT: R(s, t),
                Score.ADDITIVE: R.additive(s, t, layers=2),
                Score.EITHER: R(s | t),
                Score.PRODUCT: R(s) * R(t),
            }
            for score, value in expected.items():
                torch.testing.assert_close(found[score][i, j], value[0])
    one = torch.tensor(1.0).double()
    torch.testing.assert_close(found[Score.JOINT].sum(), one)  # both layers are cuts
    torch.testing.assert_close(found[Score.PRODUCT].sum(), one)
    # Over two layers, the additive relevance is the mean of the other two.
    torch.testing.assert_close(
        found[Score.ADDITIVE], (found[Score.JOINT] + found[Score.EITHER]) / 2
    )


def test_relevance_is_contribution_where_the_network_is_linear():
    """Removing neurons removes the walks that visit them, and nothing else changes."""
    x, R = _explained(linear(), composites.LRPZero())
    for layer in ("branch", "last"):
        a, b = nrm.clusters(R, "stem", 3), nrm.clusters(R, layer, 3)
        interventions = Interventions(nrm.Explainer(linear().double().eval()), x, target=R.target)
        families = families_of(R, a, b)
        found, by_score = effects(families, interventions), scores(families)
        torch.testing.assert_close(by_score[Score.JOINT] * R.scale, found[Effect.JOINT])
        torch.testing.assert_close(by_score[Score.EITHER] * R.scale, found[Effect.TOTAL])


def test_overlap_is_the_share_of_the_picture_in_both():
    coarse = torch.tensor([[0, 1], [0, 1]])
    fine = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [2, 2, 2, 2], [2, 2, 2, 1]])
    expected = torch.tensor([[0.25, 0.25], [0, 1 / 16], [0.25, 3 / 16]])
    torch.testing.assert_close(overlap(fine, coarse, 3, 2), expected)
    torch.testing.assert_close(overlap(coarse, fine, 2, 3), expected.T)


def test_no_sum_over_rows_and_columns_correlates_better_than_the_ceiling():
    made = torch.Generator().manual_seed(0)
    values = torch.rand(4, 5, generator=made).double()
    ceiling = additive_ceiling(values)
    tried = [
        pearson(rows[:, None] + columns, values)
        for rows, columns in (
            (torch.randn(4, generator=made), torch.randn(5, generator=made)) for _ in range(200)
        )
    ]
    assert 0.5 * ceiling < max(tried) <= ceiling < 1
    assert additive_ceiling(values[:, :1] + values[:1]) == pytest.approx(1)


@pytest.fixture
def network(monkeypatch):
    """The tiny model in place of the experiment's network."""
    photos = [
        Photo(f"picture {seed}", _picture(seed), _picture(seed)[0].permute(1, 2, 0).numpy())
        for seed in range(4)
    ]
    model = tiny().double().eval().requires_grad_(False)
    found = Pictured("SqueezeNet", "tiny", "noise", model, photos, None)
    monkeypatch.setattr(
        additive, "pictured", lambda request, count: replace(found, photos=photos[:count])
    )
    return found


LAYERS = [("stem", "last"), ("branch", "last")]


def _request(folder, **more):
    return Request("anywhere", folder / "kept", **{"samples": 3, "layers": tuple(LAYERS), **more})


def test_the_experiment_from_end_to_end(network, tmp_path):
    additive.run(_request(tmp_path)).write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "additive-2.png",
        "additive.png",
        "correlations.png",
        "kept",
        PAGE,
        RESULT,
        "scatter.png",
    ]
    result = json.loads((tmp_path / RESULT).read_text(encoding="utf-8"))
    pairs = result["details"]["pairs"]
    assert [tuple(pair["layers"]) for pair in pairs] == LAYERS
    rows = {(tuple(row["layers"]), row["method"]): row for row in result["rows"]}
    assert len(rows) == len(LAYERS) * len(Effect) * len(Score)
    (table,) = result["tables"]
    limits = {(line[0], line[1], line[2][:5]): line[3:] for line in table["lines"]}
    assert len(limits) == 12
    for pair in pairs:
        each = {score: {effect: [] for effect in Effect} for score in Score}
        assert len(pair["pictures"]) == 3
        for one in pair["pictures"]:
            for score, by_effect in each.items():
                for effect, values in by_effect.items():
                    said, lost = one["scores"][score], one["contributions"][effect]
                    values.append(pearson(torch.tensor(said), torch.tensor(lost)))
                    method = f"{SCORES[score]}, with {EFFECTS[effect]}"
                    assert one["correlations"][method] == pytest.approx(values[-1], abs=1e-6)
        layers = tuple(pair["layers"])
        for effect in Effect:
            for score in Score:
                row = rows[layers, f"{SCORES[score]}, with {EFFECTS[effect]}"]
                assert row["pearson"] == pytest.approx(np.mean(each[score][effect]), abs=1e-6)
                assert row["ci_low"] <= row["pearson"] <= row["ci_high"]
                assert (row["paper"], row["samples"]) == (None, 3)
            mean, low, high, count = limits[", ".join(layers), EFFECTS[effect], "joint"]
            lacks = np.subtract(each[Score.JOINT][effect], each[Score.ADDITIVE][effect])
            assert mean == pytest.approx(lacks.mean(), abs=1e-6)
            assert low <= mean <= high
            assert count == 3
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4
    assert "Correlation with what removing two clusters does" in page


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take longer than all else."""
    monkeypatch.setattr(additive, "draw_pictures", lambda *_: ())


def test_it_goes_on_after_an_interruption(network, undrawn, tmp_path, monkeypatch):
    whole = additive.run(_request(tmp_path / "whole")).as_json()
    real, calls = additive.compare, []

    def interrupted(explainer, photo, layers, *more):
        calls.append((photo.name, layers))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(explainer, photo, layers, *more)

    monkeypatch.setattr(additive, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        additive.run(_request(tmp_path))
    assert additive.run(_request(tmp_path)).as_json() == whole
    rest = [("picture 2", LAYERS[0]), *((f"picture {n}", LAYERS[1]) for n in range(3))]
    assert calls[3:] == rest  # those before were not compared again
    assert additive.run(_request(tmp_path)).as_json() == whole
    assert len(calls) == 7

    for damage in ("{", "{}", '{"labels": [1]}'):  # as a full disk may leave it
        file = next(f for f in (tmp_path / "kept").rglob("*.json") if f.stem != "settings")
        file.write_text(damage)
        assert additive.run(_request(tmp_path)).as_json() == whole
    assert len(calls) == 10


def test_more_pictures_and_layers_keep_those_before(network, undrawn, tmp_path):
    few = additive.run(_request(tmp_path, samples=2, layers=(LAYERS[0],)))
    more = additive.run(_request(tmp_path, samples=4))
    (before,), (after, _) = (run.details["pairs"] for run in (few, more))
    assert after["pictures"][:2] == before["pictures"]


def test_other_weights_are_not_taken_for_the_same(network, undrawn, tmp_path):
    before = additive.run(_request(tmp_path))
    with torch.no_grad():
        network.model.head.weight += 1
    after = additive.run(_request(tmp_path))
    assert before.facts["weights"] != after.facts["weights"]
    assert before.rows != after.rows


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("stem",), "name two different layers"),
        (("stem", "stem"), "name two different layers"),
        (("stem", "branch", "last"), "name two different layers"),
        (("last", "stem"), "Name the lower layer first"),
        (("stem", "nowhere"), "nowhere"),
        (("stem", "head"), "no channels"),
    ],
)
def test_layers_that_cannot_be_compared(network, tmp_path, layers, message):
    with pytest.raises(NrmError, match=message):
        additive.run(_request(tmp_path, layers=(layers,)))
    assert not list(tmp_path.iterdir())


def test_joint_relevance_predicts_what_is_lost_only_jointly(torchvision_models, shared):
    layers = ("features.10", "features.12")
    photo = read_photo(shared / "imagenet" / "n01833805_hummingbird.JPEG")
    with torch.no_grad():
        explainer = nrm.Explainer(squeezenet(shared), additive.COMPOSITE)
        found = additive.correlations(additive.compare(explainer, photo, layers, 4, 0))
    means = {
        (score, effect): found[additive.method(score, effect)]
        for score in Score
        for effect in Effect
    }
    assert means[Score.JOINT, Effect.JOINT] > 0.85
    assert means[Score.JOINT, Effect.JOINT] > means[Score.ADDITIVE, Effect.JOINT] + 0.1
    assert means[Score.ADDITIVE, Effect.TOTAL] > 0.8
    assert means[Score.EITHER, Effect.TOTAL] > means[Score.ADDITIVE, Effect.TOTAL]
