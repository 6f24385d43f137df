"""`mlp-mnist`: the experiment end to end, and its figures against a formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

from nrm.evaluation import faithfulness
from nrm_reproduce import mlp, networks
from nrm_reproduce.comparison import BASELINES, JointRelevance
from nrm_reproduce.mlp import METHODS
from nrm_reproduce.networks import trained_mlp
from nrm_reproduce.report import PAGE, RESULT, Request


@pytest.fixture
def run(small, command, monkeypatch):
    """The command with the small network; fails with what it printed.

    Walks are chosen on two pictures each.
    """
    for order in ("SECOND", "THIRD"):
        monkeypatch.setattr(mlp, order, replace(getattr(mlp, order), choosing=2))

    def run(out, *more, samples=2):
        given = ("mlp-mnist", "--data", "digits", "--out", out, "--samples", samples)
        found = command(*given, *more)
        assert found.exit_code == 0, found.output
        return found

    return run


def test_the_experiment_from_end_to_end(run, result, tmp_path):
    out = tmp_path / "out"
    found = run(out, "--json", tmp_path / "deep" / "copy.json")
    assert sorted(file.name for file in out.iterdir()) == [
        "correlations.png",
        "curves.png",
        "kept",
        PAGE,
        RESULT,
        "scatter.png",
    ]
    assert (tmp_path / "deep" / "copy.json").read_text() == (out / RESULT).read_text()
    told = result(out)
    rows = told["rows"]
    assert [set(row) for row in rows] == [
        {"experiment", "layers", "method", "pearson", "ci_low", "ci_high", "paper", "samples"}
    ] * len(rows)
    orders = [["relu1", "relu2"], ["x", "relu1", "relu2"]]
    assert [row["layers"] for row in rows] == [layers for layers in orders for _ in METHODS]
    assert [row["method"] for row in rows] == [*METHODS.values()] * 2
    assert {row["experiment"] for row in rows} == {"mlp-mnist"}
    assert {row["samples"] for row in rows} == {2}
    for row in rows:
        assert row["ci_low"] <= row["pearson"] <= row["ci_high"]
    papers = {(len(row["layers"]), row["method"]): row["paper"] for row in rows}
    assert papers[2, METHODS["joint"]] == 0.947
    assert papers[3, METHODS["joint"]] == 0.447
    assert papers[2, METHODS["zero"]] is None
    # joint relevance knows more of joint contributions than what is known of single neurons
    second = {row["method"]: row["pearson"] for row in rows[: len(METHODS)]}
    assert second[METHODS["zero"]] > 0.9 > max(second[METHODS[name]] for name in BASELINES)
    page = (out / PAGE).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("<!doctype html>", "")  # nothing to be fetched
    assert "0.947" in page
    assert "not the same one" in page
    assert "0.947" in found.output
    assert str(out / PAGE) in found.output


def test_it_goes_on_after_an_interruption(run, command, result, undrawn, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    run(whole)

    out = tmp_path / "out"
    real, calls = JointRelevance.__call__, []

    def interrupted(self, families, interventions):
        calls.append(self)
        if len(calls) == 2 * mlp.SECOND.choosing + 3:  # the second picture to report on
            raise KeyboardInterrupt
        return real(self, families, interventions)

    monkeypatch.setattr(JointRelevance, "__call__", interrupted)
    given = ("mlp-mnist", "--data", "digits", "--out", out, "--samples", 2)
    stopped = command(*given)
    assert stopped.exit_code == 130
    assert [file.name for file in out.iterdir()] == ["kept"]  # no half of a report

    monkeypatch.setattr(JointRelevance, "__call__", real)
    monkeypatch.setattr(networks, "train_mlp", lambda *_: pytest.fail("trained again"))
    run(out)
    assert result(out) == result(whole)

    monkeypatch.setattr(
        faithfulness, "joint_contributions", lambda *_: pytest.fail("evaluated again")
    )
    run(out)
    assert result(out) == result(whole)


def test_more_samples_keep_those_before(run, result, undrawn, tmp_path):
    out = tmp_path / "out"
    run(out, samples=1)
    before = result(out)["details"]["relu1, relu2"]["samples"]
    run(out, samples=3)
    after = result(out)["details"]["relu1, relu2"]["samples"]
    assert after[: len(before)] == before
    assert [row["sample"] for row in after[:: len(METHODS)]] == ["test 0", "test 1", "test 2"]


def test_other_networks(run, result, undrawn, tmp_path, monkeypatch):
    same = mlp.Variant((12, 8), False)
    others = (same, mlp.Variant((12, 8), True), mlp.Variant((16, 8), False))
    monkeypatch.setitem(mlp.VARIANTS, "digits", others)
    run(tmp_path / "out", samples=1)
    told = result(tmp_path / "out")
    (table,) = told["tables"]
    papers, *lines = table["lines"]
    assert papers[4:] == [mlp.SECOND.paper.get(method) for method in METHODS]
    assert [line[:2] for line in lines] == [
        ["64-12-8-10", "from 0 to 1"],
        ["64-12-8-10", "standardised"],
        ["64-16-8-10", "from 0 to 1"],
    ]
    assert lines[0][4:] == [row["pearson"] for row in told["rows"][: len(METHODS)]]
    assert len({line[4] for line in lines}) == 3


def test_standardised_pixels(digits):
    found = digits.standardised()
    assert float(found.train.x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(found.train.x.std()) == pytest.approx(1, abs=1e-5)
    back = found.test.x * digits.train.x.std() + digits.train.x.mean()
    torch.testing.assert_close(back, digits.test.x, atol=1e-5, rtol=0)


def test_figures_against_contributions_written_out(small, digits, tmp_path):
    """The second-order correlation from the formula of this network, without the engine's."""
    net = trained_mlp(digits, tmp_path / "w.safetensors")
    model = net.model
    one = mlp.compared(net, mlp.SECOND)
    found = one.report(mlp.samples(digits.test, "test", 1), Request("digits", tmp_path))
    with torch.no_grad():
        x = digits.test.x[0]
        h = model.relu1(model.fc1(x))
        z = model.fc2(h)
        target = int(model(x).argmax())
        without = (z - h[:, None] * model.fc2.weight.T).relu()
        lost = (z.relu() - without) * model.head.weight[target]
        # LRP-0 with biases: what arrives at a neuron, shared out by z_ij / z_j
        relevance = h[:, None] * model.fc2.weight.T * (z > 0) * model.head.weight[target]
    expected = float(np.corrcoef(relevance.flatten(), lost.flatten())[0, 1])
    assert found.values("zero")[0] == pytest.approx(expected, abs=1e-5)
    assert found.values("joint", f"SC_{lost.numel()}")[0] == pytest.approx(
        float(lost.sum()), abs=1e-4
    )
