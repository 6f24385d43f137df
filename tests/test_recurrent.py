"""The recurrent experiment: what each rule makes of a series whose label is set at one step."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

import nrm
from nrm.experiments.recurrent import (
    COMPOSITES,
    Method,
    Task,
    all_events,
    make_series,
    middle,
    relevance_over_time,
    train,
)
from nrm.experiments.recurrent.__main__ import PICTURE, RESULT, main

STEPS = 10
SEEDS = range(2)
TASKS = list(Task)


@cache
def _trained(task, seed, steps=STEPS):
    return train(task, steps, seed)


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


def test_series_set_their_label_at_the_label_step():
    for task in TASKS:
        series = make_series(task, 7, 200, seed=3)
        state = series.x.argmax(-1).gather(1, series.label_step[:, None])[:, 0]
        assert torch.equal(state, series.label + (1 if task is Task.EVENT else 0))
        assert torch.equal(series.x.sum(-1), torch.ones(200, 7, dtype=torch.float64))
        assert torch.equal(series.x, make_series(task, 7, 200, seed=3).x)
        assert not torch.equal(series.x, make_series(task, 7, 200, seed=4).x)
    assert (make_series(Task.POSITION, 7, 5, 0).label_step == middle(7)).all()
    events = all_events(7)
    assert len(events.x.flatten(1).unique(dim=0)) == len(events) == 14
    assert (events.x[..., 1:].sum((1, 2)) == 1).all()


@pytest.mark.parametrize("task", TASKS)
def test_every_network_is_always_right(task):
    for seed in SEEDS:
        trained = _trained(task, seed)
        assert trained.accuracy == 1
        right = trained.model(trained.held_out.x).argmax(1) == trained.held_out.label
        assert right.all()


def test_networks_of_other_seeds_differ_and_of_the_same_seed_do_not():
    weight, same, other = (train(Task.POSITION, 3, seed).model.cell.weight for seed in (0, 0, 1))
    assert torch.equal(weight, same)
    assert not torch.allclose(weight, other)


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
            size = found[method].total_variation.clamp(min=1)
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


def test_the_command_writes_its_results(tmp_path):
    out, file = tmp_path / "new" / "out", tmp_path / "copy.json"
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(out), "--seeds", "1", "--steps", "3", "--json", str(file)])
    assert ended.value.code == 0
    assert sorted(path.name for path in out.iterdir()) == [RESULT, PICTURE]
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert file.read_text() == (out / RESULT).read_text()
    result = json.loads(file.read_text())
    assert result["steps"] == 3
    for task in TASKS:
        found = result["tasks"][task]
        assert [network["accuracy"] for network in found["networks"]] == [1.0]
        for method in Method:
            assert len(found["methods"][method]["curve"]["median"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.json", "new"]


def test_the_command_refuses_a_file_as_its_folder(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "taken"), "--seeds", "1", "--steps", "4"])
    assert ended.value.code == 2
    assert "is not a folder" in capsys.readouterr().err
