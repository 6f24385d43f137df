"""`networks`: what is compared, choosing and reporting, what is kept, the page and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

import nrm
from nrm.errors import InputError, QueryError
from nrm.evaluation import Evaluation, Families, Interventions, evaluate
from nrm.evaluation.faithfulness import Row
from nrm_reproduce import across_networks, candidates, comparison, studies
from nrm_reproduce.across_networks import Compared, Found
from nrm_reproduce.candidates import BLOCKS, CONTRIBUTION, Trial
from nrm_reproduce.comparison import BASELINES
from nrm_reproduce.data import SENTENCES
from nrm_reproduce.pretrained import Direction, cifar_picture
from nrm_reproduce.report import PAGE, RESULT, Request
from nrm_reproduce.studies import (
    CANDIDATES,
    DEFAULTS,
    STUDIES,
    Heads,
    Pair,
    Rows,
    Strongest,
    Study,
)

LAYERS = ("1", "3")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)
    ).eval()


def samples(count: int, seed: int) -> list[studies.Sample]:
    x = torch.rand(count, 1, 6, generator=torch.Generator().manual_seed(seed))
    return [(f"{seed}-{n}", (one,)) for n, one in enumerate(x)]


def study(**changes) -> Study:
    made = Study(
        "tiny",
        "tiny",
        "vectors",
        "rectified",
        network().requires_grad_(False),
        samples(2, 0),
        samples(3, 1),
        [Pair("neuron", "adjacent", LAYERS, "neuron")],
    )
    return replace(made, **changes)


@pytest.fixture
def few(monkeypatch):
    """Three walks instead of fourteen."""
    chosen = tuple(
        walks
        for walks in CANDIDATES["rectified"]
        if walks.key in ("GammaFlat(0.25), drop", "GammaFlat(0), input", "LRP-0")
    )
    monkeypatch.setitem(CANDIDATES, "rectified", chosen)
    return chosen


# -- what layers are divided into ------------------------------------------------------------------


def test_the_strongest_channels_are_those_of_largest_size():
    R = nrm.Explainer(network())(torch.rand(1, 6), target=0)
    size = R.channels("1")[0].abs()
    sets = Strongest(3)(R, "1")
    found = [float(R(chosen).abs()) for chosen in sets]
    assert sorted(found) == pytest.approx(size.topk(3).values.sort().values.tolist())
    assert len(Strongest(100)(R, "1")) == 8


def test_rows_and_heads_are_parts_of_a_layer():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(4, 6), nn.Linear(6, 1)

        def forward(self, x):
            return self.up(torch.relu(self.down(x))).sum((1, 2))[:, None]

    torch.manual_seed(1)
    R = nrm.Explainer(Mixed().eval())(torch.rand(1, 5, 4))
    marginal = R.marginal("down")[0]
    rows = [float(R(chosen)) for chosen in Rows()(R, "down")]
    assert rows == pytest.approx(marginal.sum(1).tolist(), abs=1e-6)
    heads = [float(R(chosen)) for chosen in Heads(3, 2)(R, "down")]
    assert heads == pytest.approx(marginal.view(5, 3, 2).sum((0, 2)).tolist(), abs=1e-6)


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["neuron", Strongest(4)])
def test_walks_score_their_own_joint_relevance(by):
    trial = Trial(study(), torch.device("cpu"))
    x = trial.study.reporting[0][1]
    families = Families(trial.explainers[DEFAULTS["rectified"]](*x, target=1), LAYERS, by)
    walks = trial.study.walks[-1]
    found = trial.scores(Pair("neuron", "adjacent", LAYERS, by))[walks.key](families, None)
    own = walks.explainer(trial.study.model)(*x, target=1)
    known = own.joint(*families.sets)[0] * own.scale
    torch.testing.assert_close(found, known)


def test_what_overflows_has_no_correlation(monkeypatch):
    trial = Trial(study(), torch.device("cpu"))
    walks = trial.study.walks[-1]
    x = trial.study.reporting[0][1]
    score = trial.scores(trial.study.pairs[0])[walks.key]

    def overflows(*_, **__):
        raise QueryError("overflow")

    explainer = trial.explainers[trial.study.default.key]
    families = Families(explainer(*x), LAYERS, "neuron")
    monkeypatch.setattr(trial.explainers[walks.key], "__call__", overflows, raising=False)
    monkeypatch.setattr(comparison, "Families", overflows)
    assert not score(families, Interventions(explainer, *x, target=0)).any()
    found = evaluate(explainer, [x], LAYERS, by="neuron", methods={"other": score})
    assert found.mean("other").samples == 0


def test_every_kind_has_its_default_among_walks_of_different_names():
    for kind, default in DEFAULTS.items():
        keys = [walks.key for walks in CANDIDATES[kind]]
        assert default in keys
        assert len(set(keys)) == len(keys)
    made = nrm.Explainer(network())
    R = made(torch.rand(1, 6))
    (suggested,) = {repr(R.of(0).heatmap().shape)} and [study().default]
    assert repr(nrm.composites.suggested(R.graph.captured)) == repr(suggested.rules)


# -- choosing and reporting ------------------------------------------------------------------------


def evaluation(**pearsons) -> Evaluation:
    rows = [
        Row(str(n), method, 0, 1.0, {"pearson": value})
        for method, values in pearsons.items()
        for n, value in enumerate(values)
    ]
    return Evaluation(LAYERS, tuple(rows))


def test_walks_are_chosen_on_one_half_and_means_count_what_is_not_defined_as_none(few):
    keys = [walks.key for walks in few]
    a, b, c = keys
    pair = study().pairs[0]
    first = Compared(
        pair,
        evaluation(**{a: [0.5, 0.7], b: [0.9, 0.9], c: [None, None]}),
        evaluation(**{a: [0.8, 0.8], b: [0.2, None], c: [1.0, 1.0]}),
    )
    second = Compared(
        pair,
        evaluation(**{a: [0.6, 0.6], b: [0.5, 0.5], c: [0.9, 0.9]}),
        evaluation(**{a: [0.4, 0.6], b: [0.6, 0.4], c: [1.0, 1.0]}),
    )
    found = Found(study(), [first, second], {}, [], "")
    assert found.chosen_on(b) == pytest.approx(0.7)
    assert found.chosen_on(c) == pytest.approx(0.45)
    assert found.best.key == b
    assert found.by_sample(b) == pytest.approx([0.4, 0.2])
    assert found.calm(a) is None


# -- a network from beginning to end ---------------------------------------------------------------


def not_again(*_):
    raise AssertionError("found anew")


def test_a_network_is_compared_timed_and_kept(few, tmp_path, monkeypatch):
    request = Request("digits", tmp_path)
    found = across_networks._found(Trial(study(), torch.device("cpu")), request)
    (pair,) = found.pairs
    keys = [walks.key for walks in few]
    assert pair.chosen_on.methods == tuple(keys)
    assert pair.reported.methods == (*keys, BLOCKS, *BASELINES)
    assert len(pair.chosen_on.values("LRP-0")) == 2
    assert len(pair.reported.values("LRP-0")) == 3
    # Between two hidden layers that nothing lies above of but a sum, blocks are exact.
    assert pair.row(BLOCKS).mean == pytest.approx(1, abs=1e-5)
    for walks in few:
        explainer = walks.explainer(found.study.model)
        known = [float(explainer(*x).heatmap().abs().sum()) for _, x in found.study.reporting]
        assert found.variations[walks.key]["inputs"] == pytest.approx(known, rel=1e-4)
    heatmaps, joint = found.costs
    assert set(heatmaps["ratios"]) == set(keys)
    assert {BLOCKS, CONTRIBUTION, *BASELINES} < set(joint["ratios"])
    assert all(value > 0 for value in (*heatmaps["ratios"].values(), *joint["ratios"].values()))
    assert not any(x.requires_grad for _, inputs in found.study.reporting for x in inputs)

    for method in ("_evaluate", "_cancel", "_timed"):  # all is kept
        monkeypatch.setattr(candidates.Trial, method, not_again)
    again = across_networks._found(Trial(study(), torch.device("cpu")), request)
    assert again.pairs[0].reported.rows == pair.reported.rows
    assert again.costs == found.costs
    report = across_networks.report([again], {"other": "no data"}, request)
    assert report.facts["skipped: other"] == "no data"
    json.loads(report.as_json())


def test_parts_of_the_work_make_the_same_page(few, tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, "mlp", lambda request: study())
    whole = across_networks.run(Request("digits", tmp_path / "whole", only=("mlp",)))
    done = ""
    for number in (1, 2):
        request = Request("digits", tmp_path / "parts", only=("mlp",), part=(number, 2))
        done += across_networks.run(request).facts["mlp"]
    assert done.count(" on neurons of 1 x 3") == 2
    assert done.count("total variations") == 1
    for method in ("_evaluate", "_cancel"):  # all is kept
        monkeypatch.setattr(candidates.Trial, method, not_again)
    again = across_networks.run(Request("digits", tmp_path / "parts", only=("mlp",)))
    for n in (0, 1, 2, 5):  # those without times
        assert again.tables[n].lines == whole.tables[n].lines


def test_blocks_are_complete_over_the_pairs(few):
    trial = Trial(study(), torch.device("cpu"))
    x = trial.study.reporting[1][1]
    explainer = trial.explainers[trial.study.default.key]
    families = Families(explainer(*x), LAYERS, "neuron")
    given = Interventions(explainer, *x, target=families.R.target)
    rows = trial.scores(trial.study.pairs[0])[BLOCKS](families, given).sum(1)
    lost = given.output - given.without([[one] for one in families.sets[0]])
    torch.testing.assert_close(rows, lost, atol=1e-5, rtol=1e-4)


def test_the_command_makes_a_page_and_says_what_it_skipped(
    few, command, result, tmp_path, monkeypatch
):
    made = study(name="digitnet")
    monkeypatch.setitem(STUDIES, "digitnet", lambda request: made)
    monkeypatch.setattr(studies, "SAMPLES", 2)
    out = tmp_path / "out"
    found = command("networks", "--out", out, "--only", "digitnet,squeezenet", "--samples", 2)
    assert found.exit_code == 0, found.output
    assert (out / PAGE).is_file()
    written = result(out)
    assert "skipped: squeezenet" in written["facts"]
    titles = [table["title"] for table in written["tables"]]
    assert "Correlation with joint contribution" in titles
    (line,) = written["tables"][0]["lines"]
    assert line[:4] == ["digitnet", "neurons", "adjacent", "1 x 3"]
    assert {file.name for file in out.glob("*.png")} == {
        "correlations.png",
        "defaults.png",
        "curves-digitnet.png",
    }
    assert (out / RESULT).is_file()


@pytest.mark.parametrize(
    ("only", "message"),
    [("resnet21", "networks are squeezenet"), ("squeezenet", "there is nothing to run on")],
)
def test_what_cannot_be_run_is_refused(command, tmp_path, only, message):
    found = command("networks", "--out", tmp_path / "out", "--only", only)
    assert found.exit_code == 2
    assert message in found.output


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b"])
def test_a_part_is_one_of_some(command, tmp_path, part):
    found = command("networks", "--out", tmp_path / "out", "--part", part)
    assert found.exit_code == 2
    assert f"--part {part}: give which of how many" in found.output


# -- the networks ----------------------------------------------------------------------------------


def test_the_direction_of_a_sentence_is_a_cosine():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 4)

        def forward(self, input_ids, attention_mask):
            return type("Found", (), {"last_hidden_state": self.words(input_ids)})

    model = Direction(Encoder())
    ids, mask = torch.tensor([[3, 5, 0]]), torch.tensor([[1, 1, 0]])
    other = model.embedded(torch.tensor([[7, 8]]), torch.ones(1, 2))
    mean = model.encoder.words(ids[:, :2]).mean(1)
    known = torch.cosine_similarity(mean, model.encoder.words(torch.tensor([[7, 8]])).mean(1))
    torch.testing.assert_close(model(ids, mask, other), known)


def test_sentences_are_twenty_pairs_of_different_ones():
    assert len({sentence for pair in SENTENCES for sentence in pair}) == 40


@pytest.mark.parametrize("name", ["squeezenet", "resnet20", "mutag"])
def test_studies_name_layers_in_their_order_and_keep_samples_apart(
    shared, torchvision_models, tmp_path, name
):
    made = STUDIES[name](Request(str(shared), tmp_path, samples=2))
    names = [name for name, _ in (*made.choosing, *made.reporting)]
    assert len(set(names)) == len(names) == 3
    graph = made.explainer(made.default).graph(*made.reporting[0][1])
    for pair in made.pairs:
        lower, upper = (graph.variable(layer) for layer in pair.layers)
        assert lower in graph.upstream(upper)
    assert {pair.near for pair in made.pairs} == {"adjacent", "distant"}


def test_pictures_of_cifar_are_read_as_they_were_trained_on(shared):
    from PIL import Image

    file = shared / "cifar10" / "cat_0001.jpg"
    with Image.open(file) as picture:
        red = picture.convert("RGB").getpixel((5, 7))[0]
    found = cifar_picture(file)
    assert found.shape == (1, 3, 32, 32)
    assert float(found[0, 0, 7, 5]) == pytest.approx((red / 255 - 0.485) / 0.229, abs=1e-5)


def test_too_few_samples_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, "mlp", lambda request: study(choosing=[]))
    with pytest.raises(InputError, match="too few samples"):
        across_networks.run(Request("digits", tmp_path, only=("mlp",)))
