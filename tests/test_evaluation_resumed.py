"""Evaluations that were interrupted, and folders of finished samples."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.evaluated import mlp, vectors

import nrm
from nrm import composites
from nrm.errors import InputError
from nrm.evaluation.faithfulness import evaluate
from nrm.evaluation.scores import lrp


class StoppedError(Exception):
    pass


def interrupted_after(samples, count):
    yield from samples[:count]
    raise StoppedError


def test_interrupted_evaluation_goes_on(tmp_path):
    samples = [(f"picture {n}/x.png", x) for n, x in enumerate(vectors())]
    run = partial(evaluate, layers=["1", "3"], by="neuron", ks=(1, 3), seed=7)
    whole = run(nrm.Explainer(mlp()), samples)
    store = tmp_path / "deep" / "folder"
    with pytest.raises(StoppedError):
        run(nrm.Explainer(mlp()), interrupted_after(samples, 2), store=store)
    assert len(list(store.iterdir())) == 3
    explainer, explained = nrm.Explainer(mlp()), set()  # another process has another model object

    class Counting(nrm.Explainer):
        def __call__(self, *inputs, **named):
            explained.add(float(inputs[0].sum()))
            return super().__call__(*inputs, **named)

    found = run(Counting(explainer.model), samples, store=store)
    assert len(explained) == 2
    assert found == whole
    assert found.to_json() == whole.to_json()
    assert not [path for path in store.iterdir() if path.name.startswith(".")]
    # In another order, and with another sample: only that one is new.
    new = "new", 2 * samples[0][1]
    again = run(Counting(explainer.model), [*samples[::-1], new], store=store)
    assert len(explained) == 3
    assert again.values("joint")[:4] == whole.values("joint")[::-1]


def test_error_within_a_sample_keeps_those_before(tmp_path):
    calls = []

    def failing(families, interventions):
        calls.append(1)
        if len(calls) == 3:
            raise StoppedError
        return lrp(families)

    run = partial(evaluate, nrm.Explainer(mlp()), vectors(), ["1", "3"], methods={"a": failing})
    with pytest.raises(StoppedError):
        run(store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_changed_samples_and_targets_are_not_those_of_the_folder(tmp_path):
    run = partial(evaluate, nrm.Explainer(mlp()), layers=["1", "3"], store=tmp_path)
    first = run([("a", vectors()[0])])
    second = run([("a", vectors()[1])])
    assert first != second
    assert run([("a", vectors()[0])], target=first.rows[0].target).rows == first.rows
    assert run([("a", vectors()[0])], target=lambda name, x: 2).rows[0].target == 2


def other_model():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-9
    return model


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"layers": ["3", "1"]}, "layers"),
        ({"by": "channel"}, "by"),
        ({"by": lambda R, layer: [nrm.channels(layer, 0)]}, "by"),
        ({"methods": ("joint",)}, "methods"),
        ({"ks": (1, 2)}, "ks"),
        ({"seed": 1}, "seed"),
        ({"order": "absolute"}, "order"),
        ({"ranked": 0}, "ranked"),
        ({"explainer": nrm.Explainer(other_model())}, "model"),
        ({"explainer": nrm.Explainer(mlp(), composites.GammaFlat(0.25))}, "composite"),
        ({"explainer": nrm.Explainer(mlp(), bias="input")}, "rules"),
        ({"explainer": nrm.Explainer(mlp(), strict=True)}, "rules"),
    ],
)
def test_other_settings_are_refused(tmp_path, changed, named):
    settings = {
        "explainer": nrm.Explainer(mlp()),
        "samples": vectors(1),
        "layers": ["1", "3"],
        "by": "neuron",
        "store": tmp_path,
    }
    evaluate(**settings)
    evaluate(**settings)
    with pytest.raises(InputError, match=f"other settings: {named}"):
        evaluate(**settings | changed)


def test_files_that_were_cut_off_are_written_again(tmp_path):
    run = partial(evaluate, nrm.Explainer(mlp()), vectors(2), ["1", "3"], store=tmp_path)
    whole = run()
    for path in tmp_path.glob("*.json"):
        if path.name != "settings.json":
            path.write_text(path.read_text()[:20])
    assert run() == whole
    assert run() == whole
