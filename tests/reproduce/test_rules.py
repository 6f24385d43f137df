"""`rules`: what bounds any measure, the walks compared, choosing and reporting, the report."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

from nrm.errors import InputError
from nrm.evaluation import joint_contributions
from nrm_reproduce import rules
from nrm_reproduce.cnn import CHANNELS
from nrm_reproduce.comparison import Comparison, JointRelevance
from nrm_reproduce.data import Photo
from nrm_reproduce.networks import LAYERS, Pictured
from nrm_reproduce.report import PAGE, RESULT, Request
from nrm_reproduce.rules import (
    FEW,
    REST,
    RULES,
    Ceiling,
    HalfGiven,
    Trial,
    gamma,
    nearest_product,
    outputs,
    with_lower,
    zero,
)

from .test_comparison import asked, network

TRIPLE = ("x", *LAYERS)


@pytest.fixture(scope="module")
def model():
    """One for all tests, none of which changes it."""
    return network().double()


@cache
def built(widths):
    """The network of a trial, which is captured once."""
    return network(widths)


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("shape", [(6, 4, 3), (3, 4, 6), (5, 1, 5)])
def test_the_nearest_product_is_that_of_the_largest_singular_vectors(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    found = nearest_product(values)
    for i in range(shape[1]):
        u, s, v = torch.linalg.svd(values[:, i])
        torch.testing.assert_close(found[:, i], s[0] * torch.outer(u[:, 0], v[0]))
    torch.testing.assert_close(nearest_product(found), found)


def test_the_nearest_product_with_a_given_half():
    generator = torch.Generator().manual_seed(0)
    lower, upper = torch.randn(6, 4, generator=generator), torch.randn(4, 3, generator=generator)
    lower[:, 1] = 0.0
    product = lower[:, :, None] * upper
    torch.testing.assert_close(with_lower(product, 3 * lower), product)
    values = torch.randn(6, 4, 3, generator=generator)
    left = values - with_lower(values, lower)  # nothing is left in the direction of the half
    assert torch.einsum("pij,pi->ij", left, lower).abs().max() < 1e-5


@pytest.mark.parametrize("walks", [*RULES, *outputs(zero("input"))], ids=lambda walks: walks.key)
def test_no_walks_exceed_a_ceiling(model, walks):
    for layers, ceiling in ((TRIPLE, Ceiling(active=True)), (LAYERS, Ceiling(active=True))):
        given = asked(model, layers)
        contribution = joint_contributions(given[1], *given[0].sets)
        bound = cosine(ceiling(*given), contribution)
        assert cosine(JointRelevance(walks, model, layers, "neuron")(*given), contribution) <= (
            bound + 1e-9
        )
        assert bound <= cosine(Ceiling()(*given), contribution) + 1e-9 <= 1 + 2e-9


def test_ceilings_of_halves_lie_between_their_walks_and_the_ceiling(model):
    given = asked(model, TRIPLE, seed=3)
    contribution = joint_contributions(given[1], *given[0].sets)
    own = cosine(JointRelevance(REST, model, TRIPLE, "neuron")(*given), contribution)
    bound = cosine(Ceiling()(*given), contribution)
    for layers, lower in ((TRIPLE[:2], True), (TRIPLE[1:], False)):
        half = HalfGiven(JointRelevance(REST, model, layers, "neuron"), lower)
        assert own < cosine(half(*given), contribution) < bound


def test_occlusion_walks_reach_the_ceiling_of_the_last_hidden_layers(model):
    """The rest to the bias: `f R(i, j)` is the joint contribution of every neuron j with an
    activation, and nothing of the others."""
    given = asked(model, LAYERS)
    families, interventions = given
    found = JointRelevance(REST, model, LAYERS, "neuron")(families, interventions)
    active = families.activations()[-1] > 0
    assert 0 < int(active.sum()) < len(active)
    contribution = joint_contributions(interventions, *families.sets)
    torch.testing.assert_close(found, contribution * active)
    torch.testing.assert_close(found, Ceiling(active=True)(*given))


def test_every_walk_has_a_name_of_its_own():
    for several in (RULES, FEW, (*RULES, *outputs(zero("input")), *outputs(gamma(0.1, "drop")))):
        assert len({walks.key for walks in several}) == len(several)
    assert {walks.key for walks in FEW} <= {walks.key for walks in RULES}


def trials(request):
    """Two networks, with a few walks each."""
    for name, widths in (("one", (7, 5)), ("two", (6, 4))):
        model = built(widths)
        x = torch.rand(5, 6, generator=torch.Generator().manual_seed(2))
        samples = [(str(n), x[n : n + 1]) for n in range(5)]
        walks = (zero("input"), gamma(0.1, "drop"), REST)
        ceilings = {"ceiling": Ceiling(active=True)}
        yield Trial(
            f"the {name}: {', '.join(LAYERS)}",
            Comparison(name, model, LAYERS, walks, others=ceilings),
            samples[:2],
            samples[2:],
        )


def test_the_best_walks_are_chosen_on_some_samples_and_reported_on_others(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "trials", trials)
    report = rules.run(Request("digits", tmp_path / "kept"))
    out = tmp_path / "out"
    out.mkdir()
    report.write(out)
    result = json.loads((out / RESULT).read_text())
    assert [row["experiment"] for row in result["rows"]] == ["rules: one"] * 4 + ["rules: two"] * 4
    assert {tuple(row["layers"]) for row in result["rows"]} == {LAYERS}
    assert result["facts"]["one"] == f"the one: {', '.join(LAYERS)}"
    assert {row["samples"] for row in result["rows"]} == {3}
    assert all(row["paper"] is None for row in result["rows"])
    for name in ("one", "two"):
        assert result["details"][name]["chosen"] == REST.method  # it reaches the ceiling
        assert {row["sample"] for row in result["details"][name]["samples"]} == {"2", "3", "4"}
    page = (out / PAGE).read_text()
    assert "The best walks" in page
    assert (out / "walks.png").stat().st_size > 0
    assert (out / "gammas.png").stat().st_size > 0


def test_an_interrupted_study_goes_on_and_gives_the_same(undrawn, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "trials", trials)
    whole = rules.run(Request("digits", tmp_path / "whole")).as_json()

    class StoppedError(Exception):
        pass

    def stops(after):
        left = [after]

        def score(self, *given, _own=JointRelevance.__call__):
            left[0] -= 1
            if left[0] < 0:
                raise StoppedError
            return _own(self, *given)

        return score

    for after in (3, 5):  # while walks are chosen, and while they are reported
        with monkeypatch.context() as patched:
            patched.setattr(JointRelevance, "__call__", stops(after))
            with pytest.raises(StoppedError):
                rules.run(Request("digits", tmp_path / "kept"))
    request = Request("digits", tmp_path / "kept")
    assert rules.run(request).as_json() == whole
    assert rules.run(replace(request, seed=1)).as_json() != whole


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        rules.run(Request(str(tmp_path / "nowhere"), tmp_path / "kept"))


def test_one_picture_is_not_enough(tmp_path, monkeypatch):
    torch.manual_seed(0)
    one = Pictured(
        "DigitNet", "a network", "digits", network(), [Photo("1", torch.rand(1, 6), None)], None
    )
    monkeypatch.setattr(rules, "pictured", lambda *given: one)
    with pytest.raises(InputError, match="one picture is not enough"):
        rules.convolutional(Request("digits", tmp_path), CHANNELS, 3)
