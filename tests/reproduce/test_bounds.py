"""`bounds`: the figures of a picture, and the experiment from end to end."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

from nrm.errors import InputError
from nrm.evaluation import Families, Interventions, contribution_of_top, pearson
from nrm.evaluation.scores import SCORES
from nrm_reproduce import bounds
from nrm_reproduce.bounds import BEST, METHODS, OF_PAIRS, SECANTS, Case, pairs, triples
from nrm_reproduce.cnn import KMeans
from nrm_reproduce.comparison import OTHERS
from nrm_reproduce.networks import pictured
from nrm_reproduce.report import PAGE, Request


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Of clusters of some layers of a digit: what scores are given."""
    network = pictured(Request("digits", tmp_path_factory.mktemp("kept")), 1)
    explainer, x = OTHERS[0].explainer(network.model), network.photos[0].x

    def ask(*layers, removal="zero"):
        R = explainer(x)
        interventions = Interventions(explainer, x, target=R.target, removal=removal)
        return Families(R, layers, KMeans(3, 0)), interventions

    return ask


@pytest.mark.parametrize("removal", ["zero", "mean"])
def test_the_figures_of_pairs(asked, removal):
    families, interventions = asked("relu1", "relu2", removal=removal)
    found = pairs(families, interventions)
    contribution = interventions.joint(*families.sets)
    for name in ("joint", "blocks", "blocks, gating", "occlusion"):
        score = SCORES[name](families, interventions)
        assert found["pearson"][OF_PAIRS[name]] == pytest.approx(pearson(score, contribution))
    complete = [SECANTS, "path, 10 points"]
    assert all(found["pearson"][one] <= found["pearson"][BEST] + 1e-3 for one in complete)
    left = found["left"]
    assert left[SECANTS] < 1e-4
    assert left["path, 10 points"] < left["linear at x"]
    assert found["patched"][SECANTS] > found["patched"][METHODS["joint"]]


@pytest.mark.parametrize("removal", ["zero", "mean"])
def test_the_figures_of_triples(asked, removal, monkeypatch):
    monkeypatch.setattr(bounds, "TOPS", (1, 5, 30))  # of 27 triples
    families, interventions = asked("relu1", "relu2", "relu3", removal=removal)
    found = triples(families, interventions)
    assert set(found) == {"pearson", "overlap 1", "overlap 5", "reached 1", "reached 5"}
    contribution = interventions.joint(*families.sets)
    most = contribution_of_top(contribution, contribution, (1, 5))
    for name, method in METHODS.items():
        score = SCORES[name](families, interventions)
        assert found["pearson"][method] == pytest.approx(pearson(score, contribution))
        if name not in ("joint", "blocks"):
            continue  # sums have ties
        reached = contribution_of_top(score, contribution, (1, 5)) / most
        for k, share in zip((1, 5), reached.tolist(), strict=True):
            assert found[f"reached {k}"][method] == pytest.approx(share, rel=1e-4)
            own = set(score.flatten().topk(k).indices.tolist())
            wanted = set(contribution.flatten().topk(k).indices.tolist())
            assert found[f"overlap {k}"][method] == len(own & wanted) / k


def test_the_experiment_from_end_to_end(tmp_path, monkeypatch):
    cases = (Case(("relu1", "relu2")), Case(("relu1", "relu2", "relu3")))
    monkeypatch.setattr(bounds, "CASES", {"DigitNet": cases})
    monkeypatch.setattr(bounds, "CLUSTERS", {"DigitNet": 3})
    monkeypatch.setattr(bounds, "POINTS", (1, 2))
    request = Request("digits", tmp_path / "kept", samples=2)
    report = bounds.run(request)
    assert {row.samples for row in report.rows} == {2}
    assert {row.layers for row in report.rows} == {case.layers for case in cases}
    assert len({row.experiment for row in report.rows}) == 4  # two removals each
    titles = [table.title for table in report.tables]
    assert titles == [bounds.TITLES[f] for f in bounds.TITLES if f[-2:] != "50"]
    out = tmp_path / "out"
    out.mkdir()
    report.write(out)
    assert "path, 2 points" in (out / PAGE).read_text(encoding="utf-8")

    monkeypatch.setattr(bounds, "one_picture", lambda *_: pytest.fail("explained again"))
    assert bounds.run(request).as_json() == report.as_json()


@pytest.mark.parametrize("named", [("relu1",), ("relu1", "relu1"), ("a", "b", "c", "d")])
def test_layers_are_two_or_three(named, tmp_path):
    with pytest.raises(InputError, match="two or three"):
        bounds.run(Request("digits", tmp_path, samples=1, layers=(named,)))
