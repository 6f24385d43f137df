"""`rnn`: what each rule makes of a series whose label is set at one step."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

import nrm
from nrm_reproduce import recurrent
from nrm_reproduce.data import Task, middle
from nrm_reproduce.networks import train_rnn
from nrm_reproduce.recurrent import COMPOSITES, METHODS, Method, relevance_over_time
from nrm_reproduce.report import PAGE, RESULT, Request

STEPS = 10
SEEDS = range(2)
TASKS = list(Task)


@cache
def _trained(task, seed, steps=STEPS):
    return train_rnn(task, steps, seed)


@cache
def _found(task, seed, steps=STEPS):
    trained = _trained(task, seed, steps)
    series = trained.held_out[:100]
    return series, relevance_over_time(trained.model, series)


def _all(task, method):
    """Relevance over time and label steps, over all networks."""
    each = [_found(task, seed) for seed in SEEDS]
    over_time = torch.cat([found[method].over_time for _, found in each])
    return over_time, torch.cat([series.label_step for series, _ in each])


@pytest.mark.parametrize("task", TASKS)
def test_every_network_is_always_right(task):
    for seed in SEEDS:
        trained = _trained(task, seed)
        assert trained.accuracy == 1
        right = trained.model(trained.held_out.x).argmax(1) == trained.held_out.label
        assert right.all()


def test_everything_that_crosses_between_two_steps_sums_to_one():
    trained = _trained(Task.EVENT, 0)
    series = trained.held_out
    R = nrm.Explainer(trained.model, COMPOSITES[Method.PLAIN])(series.x, target=series.label)
    cuts = {cut.name: cut for cut in R.diagnostics().cuts}
    for name in ("cell", *(f"cell@{t}" for t in range(1, STEPS))):
        off = (1 - cuts[name].total).abs() / cuts[name].variation.clamp(min=1)
        assert float(off.max()) < 1e-12, name
    for task in TASKS:
        for seed in SEEDS:
            for method in COMPOSITES:
                assert _found(task, seed)[1][method].cut_deviation < 1e-12


@pytest.mark.parametrize("task", TASKS)
def test_the_relevance_of_all_steps_and_biases_is_one(task):
    for seed in SEEDS:
        _, found = _found(task, seed)
        for method in COMPOSITES:
            total = found[method].over_time.sum(1) + found[method].biases
            size = found[method].over_time.abs().sum(1).clamp(min=1)
            assert float(((total - 1).abs() / size).max()) < 1e-12
        assert not found[Method.PLAIN].biases.any()
        assert found[Method.LRP_ALL].biases.any()


def test_lrp_zero_with_biases_is_gradient_times_input_on_a_linear_network():
    for task in TASKS:
        trained = _trained(task, 0)
        series, found = _found(task, 0)
        x = series.x.clone().requires_grad_()
        logit = trained.model(x).gather(1, series.label[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(logit.sum(), x)
        expected = (gradient * x).detach().sum(-1) / logit.detach()[:, None]
        assert torch.allclose(found[Method.LRP_ALL].over_time, expected, atol=1e-9, rtol=1e-9)


def test_the_sign_aware_rule_finds_the_event():
    for seed in SEEDS:
        series, found = _found(Task.EVENT, seed)
        over_time = found[Method.SIGN_AWARE].over_time
        by_label_step = torch.stack(
            [over_time[series.label_step == step].mean(0) for step in range(STEPS)]
        )
        hits = by_label_step.argmax(1) == torch.arange(STEPS)
        assert int(hits.sum()) >= STEPS - 1
        # The plain rule does not.
        plain = found[Method.PLAIN].over_time.argmax(1) == series.label_step
        assert float(plain.double().mean()) < 0.6


def test_the_sign_aware_rule_favours_the_first_step_where_all_steps_carry_a_state():
    """A limit of the rule that the documentation states: gamma spreads relevance along h."""
    sign_aware, label_step = _all(Task.POSITION, Method.SIGN_AWARE)
    assert float(sign_aware[:, 0].mean()) > 0.4
    assert float(sign_aware[:, middle(STEPS)].mean()) < 0.2
    lrp_all, _ = _all(Task.POSITION, Method.LRP_ALL)
    assert float((lrp_all.argmax(1) == label_step).double().mean()) > 0.7


@pytest.mark.parametrize("task", TASKS)
def test_the_plain_rule_explodes_and_the_sign_aware_rule_does_not(task):
    plain, _ = _all(task, Method.PLAIN)
    sign_aware, _ = _all(task, Method.SIGN_AWARE)
    assert float(plain.abs().sum(1).max()) > 100 * float(sign_aware.abs().sum(1).max())
    assert float(sign_aware.abs().sum(1).median()) < 1.5


def test_what_is_unnormalised_grows_with_the_length_of_the_series():
    short, long = (
        float(found[Method.UNNORMALIZED].over_time.sum(1).abs().median())
        for _, found in (_found(Task.POSITION, 0, 4), _found(Task.POSITION, 0, STEPS))
    )
    assert 1e-2 < short < 10
    assert long > 50


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run without interruption finds."""
    return recurrent.run(_request(tmp_path_factory.mktemp("whole"), seed=1), steps=3)


def _request(folder, **more):
    return Request("no data", folder / "kept", **{"samples": 2, **more})


def test_the_experiment_from_end_to_end(whole, tmp_path):
    whole.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recurrent.png", PAGE, RESULT]
    result = json.loads((tmp_path / RESULT).read_text(encoding="utf-8"))
    assert result["rows"] == []
    assert result["details"]["steps"] == 3
    for task in TASKS:
        found = result["details"]["tasks"][task]
        assert [network["accuracy"] for network in found["networks"]] == [1.0, 1.0]
        assert "2 of 2 networks always right" in result["facts"][task]
        for method in Method:
            assert len(found["methods"][method]["curve"]["median"]) == 3
    (table,) = result["tables"]
    assert [line[:2] for line in table["lines"]] == [
        [task, name] for task in TASKS for name in METHODS.values()
    ]
    medians = [line[2] for line in table["lines"]]
    assert medians == [
        result["details"]["tasks"][task]["methods"][method]["at_label_step"]["median"]
        for task in TASKS
        for method in Method
    ]
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "Correlation" not in page  # there is none
    assert table["title"] in page
    assert page.count("data:image/png;base64,") == 1


def test_it_goes_on_after_an_interruption(whole, tmp_path, monkeypatch):
    real, studied = recurrent.studied, []
    first = 1_000_000  # of the seed 1

    def interrupted(task, steps, seed):
        studied.append((task, seed))
        if len(studied) == 4:
            raise KeyboardInterrupt
        return real(task, steps, seed)

    monkeypatch.setattr(recurrent, "studied", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recurrent.run(_request(tmp_path, seed=1), steps=3)
    for task, damage in (
        (Task.EVENT, "{"),
        (Task.POSITION, '{"digest": "0", "value": {"seed": 0, "found": []}}'),
    ):
        next((tmp_path / "kept").glob(f"*/{task}-{first}.json")).write_text(damage)
    short = next((tmp_path / "kept").glob(f"*/{Task.EVENT}-{first + 1}.json"))
    kept = json.loads(short.read_text())
    kept["value"]["label_step"] = [0]
    short.write_text(json.dumps(kept))
    assert recurrent.run(_request(tmp_path, seed=1), steps=3).as_json() == whole.as_json()
    # what was whole was not trained again
    again = [(task, first + n) for task in (Task.EVENT, Task.POSITION) for n in (0, 1)]
    assert studied[4:] == again
    assert recurrent.run(_request(tmp_path, seed=1), steps=3).as_json() == whole.as_json()
    assert len(studied) == 8


def test_other_seeds_have_other_networks_and_more_keep_those_before(whole, tmp_path):
    one, more = (recurrent.run(_request(tmp_path, samples=count), steps=3) for count in (1, 2))
    for task in TASKS:
        (first,), all_of_them, others = (
            run.details["tasks"][task]["networks"] for run in (one, more, whole)
        )
        assert all_of_them[0] == first
        assert len({network["seed"] for network in all_of_them + others}) == 4
