"""`nrm reproduce`: data sets, the network's training, the experiment end to end, its report."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from nrm.errors import InputError
from nrm.evaluation import Families, Interventions, faithfulness
from nrm.experiments.comparison import BASELINES, steps
from nrm.experiments.everything import Everything
from nrm.experiments.mlp import network, study
from nrm.experiments.mlp.data import load, read_idx
from nrm.experiments.mlp.network import RECIPES, NotAccurateError, trained
from nrm.experiments.mlp.study import METHODS
from nrm.experiments.mlp.walks import PAPERS
from nrm.experiments.recurrent.experiment import Recurrent
from nrm.experiments.recurrent.study import Network
from nrm.experiments.report import PAGE, RESULT, Report
from nrm.experiments.reproduce import EXPERIMENTS, find
from nrm.experiments.tables import Row, Table, brief, cells
from nrm.experiments.walks import OTHERS

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def _packages():
    for package in ("sklearn", "typer", "matplotlib", "PIL", "safetensors", "rich"):
        pytest.importorskip(package, reason=f"{package}, which the command needs, is missing")


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def mnist():
    if not (DATA / "mnist").is_dir():
        pytest.skip("MNIST is not there")
    return load(str(DATA))


def idx(path, magic, shape, content=None):
    head = struct.pack(f">{1 + len(shape)}I", magic, *shape)
    body = bytes(int(np.prod(shape))) if content is None else content
    raw = head + body
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


# -- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pictures", "pictures.gz"])
def test_an_idx_file_is_read_whole(tmp_path, name):
    content = bytes(range(2 * 3 * 3))
    found = read_idx(idx(tmp_path / name, 0x803, (2, 3, 3), content), (2, 3, 3))
    assert found.dtype == torch.uint8
    assert found.flatten().tolist() == list(content)


def test_a_damaged_idx_file_is_refused_by_name(tmp_path):
    file = tmp_path / "labels"
    idx(file, 0x803, (4,))
    with pytest.raises(InputError, match=r"labels: begins with 00000803.*00000801"):
        read_idx(file, (4,))
    idx(file, 0x801, (4,), content=b"abc")
    with pytest.raises(InputError, match=r"labels: 4 in 11 bytes; MNIST's is 4 in 12"):
        read_idx(file, (4,))
    idx(file, 0x801, (5,))
    with pytest.raises(InputError, match="5 in 13 bytes"):
        read_idx(file, (4,))
    file.write_bytes(b"")
    with pytest.raises(InputError, match="begins with nothing"):
        read_idx(file, (4,))
    file.write_bytes(b"\x00\x00\x08\x01\x00")
    with pytest.raises(InputError, match="5 bytes"):
        read_idx(file, (4,))
    packed = idx(tmp_path / "labels.gz", 0x801, (4,))
    packed.write_bytes(packed.read_bytes()[:-6])
    with pytest.raises(InputError, match="not a whole gzip file"):
        read_idx(packed, (4,))


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte.gz.*download=True"):
        load(str(tmp_path))


def test_labels_that_no_digit_has(tmp_path, monkeypatch):
    monkeypatch.setattr("nrm.experiments.mlp.data._PARTS", {"train": ("t", 2), "test": ("t", 2)})
    idx(tmp_path / "t-images-idx3-ubyte", 0x803, (2, 28, 28))
    idx(tmp_path / "t-labels-idx1-ubyte", 0x801, (2,), bytes([3, 10]))
    with pytest.raises(InputError, match="a label is 10"):
        load(str(tmp_path))


def test_the_parts_share_no_digit(digits):
    assert [len(digits.train), len(digits.held_out), len(digits.test)] == [1300, 100, 397]
    parts = [{x.numpy().tobytes() for x in p.x} for p in (digits.train, digits.held_out)]
    assert not parts[0] & parts[1]
    assert float(digits.train.x.min()) == 0
    assert float(digits.train.x.max()) == 1
    assert torch.equal(load("digits").test.x, digits.test.x)


def test_mnist_is_read(mnist):
    assert [len(mnist.train), len(mnist.held_out), len(mnist.test)] == [59_000, 1_000, 10_000]
    assert mnist.test.y[:5].tolist() == [7, 2, 1, 0, 4]  # as published
    assert mnist.test.x.shape == (10_000, 784)
    assert (float(mnist.test.x.min()), float(mnist.test.x.max())) == (0, 1)


# -- the network ----------------------------------------------------------------------------------


def test_training_is_seeded_and_kept(digits, tmp_path, monkeypatch):
    epochs = []
    state = torch.random.get_rng_state()
    first = trained(digits, tmp_path / "a" / "w.safetensors", seed=1, tell=epochs.append)
    assert not first.loaded
    assert sum(epochs) == RECIPES["digits"].epochs
    assert first.accuracy >= RECIPES["digits"].accuracy
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(p.requires_grad for p in first.model.parameters())
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["w.safetensors"]

    again = trained(digits, tmp_path / "b.safetensors", seed=1)
    assert again.digest == first.digest

    monkeypatch.setattr(network, "train", lambda *_: pytest.fail("trained again"))
    loaded = trained(digits, tmp_path / "a" / "w.safetensors", seed=1)
    assert loaded.loaded
    assert (loaded.digest, loaded.accuracy) == (first.digest, first.accuracy)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[key])


def test_weights_of_something_else_are_replaced(digits, tmp_path):
    file = tmp_path / "w.safetensors"
    first = trained(digits, file, seed=1)
    other = trained(digits, file, seed=2)
    assert not other.loaded
    assert other.digest != first.digest
    file.write_bytes(file.read_bytes()[:200])  # as a full disk may leave it
    healed = trained(digits, file, seed=2)
    assert not healed.loaded
    assert healed.digest == other.digest
    assert trained(digits, file, seed=2).loaded


def test_a_network_that_is_not_accurate_is_not_kept(digits, tmp_path):
    file = tmp_path / "w.safetensors"
    hasty = network.Recipe((4, 4), epochs=1, batch=64, rate=1e-3, accuracy=0.95)
    with pytest.raises(NotAccurateError, match="of the test digits, fewer than 95"):
        trained(digits, file, recipe=hasty)
    assert not file.exists()


def test_the_network_of_mnist_is_as_accurate_as_the_papers(mnist, tmp_path):
    found = trained(mnist, tmp_path / "w.safetensors")
    assert found.accuracy >= 0.977


# -- the experiment -------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A network so small that all of it takes seconds."""
    recipe = network.Recipe((12, 8), epochs=15, batch=32, rate=5e-3, accuracy=0.85)
    monkeypatch.setitem(RECIPES, "digits", recipe)


def command(*args):
    """`nrm reproduce` alone; fails with what it printed."""
    import typer
    from typer.testing import CliRunner

    from nrm.cli.reproduce import reproduce

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(reproduce)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def run(out, *more, samples=2):
    given = ("mlp-mnist", "--data", "digits", "--out", out, "--samples", samples)
    found = command(*given, *more)
    assert found.exit_code == 0, found.output
    return found


def result(out):
    return json.loads((out / RESULT).read_text(encoding="utf-8"))


def test_the_experiment_from_end_to_end(small, tmp_path):
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


def test_it_goes_on_after_an_interruption(small, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    run(whole)

    out = tmp_path / "out"
    real, calls = study.JointRelevance.__call__, []

    def interrupted(self, families, interventions):
        calls.append(self)
        if len(calls) == 2 * study.SECOND.choosing + 3:  # the second picture to report on
            raise KeyboardInterrupt
        return real(self, families, interventions)

    monkeypatch.setattr(study.JointRelevance, "__call__", interrupted)
    given = ("mlp-mnist", "--data", "digits", "--out", out, "--samples", 2)
    stopped = command(*given)
    assert stopped.exit_code == 130
    assert [file.name for file in out.iterdir()] == ["kept"]  # no half of a report

    monkeypatch.setattr(study.JointRelevance, "__call__", real)
    monkeypatch.setattr(network, "train", lambda *_: pytest.fail("trained again"))
    run(out)
    assert result(out) == result(whole)

    monkeypatch.setattr(faithfulness._Task, "rows", lambda *_: pytest.fail("evaluated again"))
    run(out)
    assert result(out) == result(whole)


def test_more_samples_keep_those_before(small, tmp_path):
    out = tmp_path / "out"
    run(out, samples=1)
    before = result(out)["details"]["relu1, relu2"]["samples"]
    run(out, samples=3)
    after = result(out)["details"]["relu1, relu2"]["samples"]
    assert after[: len(before)] == before
    assert [row["sample"] for row in after[:: len(METHODS)]] == ["test 0", "test 1", "test 2"]


def test_other_walks_are_scored_as_by_an_evaluation_of_their_own(small, digits, tmp_path):
    found = trained(digits, tmp_path / "w.safetensors")
    x = digits.test.x[:1]
    paper = PAPERS.explainer(found.model)
    for layers in (("relu1", "relu2"), ("x", "relu1", "relu2")):
        families = Families(paper(x), layers, "neuron")
        interventions = Interventions(paper, x, target=int(families.R.target[0]))
        for walks in OTHERS:
            own = walks.explainer(found.model)
            expected = Families(own(x), layers, "neuron").joint() * own(x).scale
            score = study.JointRelevance(walks, found.model, layers)(families, interventions)
            torch.testing.assert_close(score, expected)


def test_figures_against_contributions_written_out(small, digits, tmp_path):
    """The second-order correlation from the formula of this network, without the engine's."""
    net = trained(digits, tmp_path / "w.safetensors")
    model = net.model
    second = study.Study(net, study.SECOND, tmp_path, 0)
    found = second.report(digits.test, 1, False)
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


def test_points_of_a_scatter_plot():
    generator = np.random.default_rng(0)
    score, contribution = generator.normal(size=(2, 5000))
    score[17] = 40
    drawn, beside = study.some(score, contribution, seed=0, most=100)
    assert len(drawn) == len(beside) == 100
    assert 40 in drawn
    pairs = set(zip(score, contribution, strict=True))
    assert pairs.issuperset(zip(drawn, beside, strict=True))
    assert study.some(score, contribution, seed=0)[0] is score


def test_ks_end_with_all_combinations():
    assert steps(100) == (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
    assert steps(69)[-2:] == (50, 69)
    assert steps(1) == (1,)


# -- the command and its report -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("mlp-mnst", "--data", "digits"), "no experiment is called 'mlp-mnst'. Did you mean"),
        (("mlp-mnist", "--data", "nowhere"), "--data nowhere: no such folder"),
    ],
)
def test_what_is_refused_takes_one_line(tmp_path, args, message):
    found = command(*args, "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert message in found.output
    assert len(found.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_json_into_a_folder_is_refused_early(tmp_path):
    page = tmp_path / "out" / "report.html"
    found = command("mlp-mnist", "--out", tmp_path / "out", "--json", page)
    assert found.exit_code == 2
    assert "where result.json is written anyway" in found.stderr
    found = command("mlp-mnist", "--data", "digits", "--out", tmp_path / "out", "--json", tmp_path)
    assert found.exit_code == 2
    assert "is a folder, not a file" in found.output


def test_experiments_are_found_by_name():
    assert "mlp-mnist" in EXPERIMENTS
    for name, experiment in EXPERIMENTS.items():
        assert find(name) is experiment
        assert experiment.name == name
        assert experiment.summary
    with pytest.raises(InputError, match=r"There is: .*mlp-mnist"):
        find("nothing of the kind")


def test_a_report_without_figures(tmp_path):
    row = Row("some", ("<a>", "b"), "a & b", None, None, None, None, 0)
    report = Report("some", "Some <title>", [row], facts={"x": 1, "share": 0.25})
    report.write(tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "Some &lt;title&gt;" in page
    assert "a &amp; b" in page
    assert "&lt;a&gt;, b" in page
    assert cells(row) == ("<a>, b", "a & b", "-", "-", "-", "0")
    assert json.loads((tmp_path / RESULT).read_text())["rows"][0]["pearson"] is None


def test_tables_of_a_report(tmp_path):
    lines = [("a<b", 0.25, None), ("a<b", 1e9, 3), ("c", -1234.5, "x & y")]
    table = Table("T > 1", ("task", "mean", "more"), lines, note="so & so")
    report = Report("some", "Some", (), tables=[table])
    report.write(tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "Correlation" not in page
    for text in ("T &gt; 1", "<td>a&lt;b</td><td>0.250</td><td>-</td>", "so &amp; so"):
        assert text in page
    assert "<td></td><td>1.00e9</td><td>3</td>" in page  # the same task
    assert page.count('class="begins"') == 2
    told = json.loads((tmp_path / RESULT).read_text())["tables"]
    assert told == [
        {"title": "T > 1", "heads": ["task", "mean", "more"], "lines": [[*x] for x in lines]}
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (-0.0, "0.00"),
        (100.0, "100"),
        (999.96, "1000"),
        (99_999.4, "99999"),
        (123_456.0, "1.23e5"),
        (-2e-7, "-2.00e-7"),
        (7, "7"),
        (None, "-"),
    ],
)
def test_numbers_of_any_size_are_brief(value, text):
    assert brief(value) == text


def test_files_in_folders_move_at_once(tmp_path):
    from nrm.cli.errors import CommandError
    from nrm.cli.folder import filled_at_once

    def fill():
        with filled_at_once(tmp_path / "out", last="z") as folder:
            (folder / "part").mkdir()
            for name in ("z", "part/z", "part/a"):
                (folder / name).write_text("new")

    fill()
    old = tmp_path / "out" / "part" / "old"
    old.write_text("old")
    fill()
    assert old.read_text() == "old"
    assert sorted(f.name for f in (tmp_path / "out").rglob("*")) == ["a", "old", "part", "z", "z"]

    (tmp_path / "out" / "z").write_text("old")
    for file in (tmp_path / "out" / "part").iterdir():
        file.unlink()
    (tmp_path / "out" / "part").rmdir()
    (tmp_path / "out" / "part").write_text("a file")
    with pytest.raises(CommandError, match="part is a file, not a folder"):
        fill()
    assert (tmp_path / "out" / "z").read_text() == "old"
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["out", "part", "z"]


# -- all of them ----------------------------------------------------------------------------------


class Little:
    """An experiment that says what it was asked."""

    summary = "something"
    options = frozenset({"layers"})

    def __init__(self, name, error=None):
        self.name, self.error = name, error

    def run(self, request):
        request.kept.mkdir(parents=True)
        (request.kept / "finished").touch()
        if self.error:
            raise self.error
        row = Row(self.name, ("a", "b"), "<some>", 0.5, 0.4, 0.6, None, request.samples or 7)
        table = Table("Of its own", ("x",), [(1.5,)], group=0)
        request.say("done")
        return Report(self.name, f"About {self.name}", [row], tables=[table])


@pytest.fixture
def every(monkeypatch):
    """Puts other experiments in place of all."""
    return lambda *parts: monkeypatch.setitem(EXPERIMENTS, "all", Everything(parts))


def test_all_of_them_are_all_others():
    names = [experiment.name for experiment in EXPERIMENTS["all"].experiments]
    assert [*names, "all"] == list(EXPERIMENTS)
    assert {"mlp-mnist", "cnn-channels", "cnn-clusters", "rnn", "additive"} <= set(names)


def test_all_of_them_have_folders_and_a_page(every, tmp_path):
    every(Little("first"), Little("second"))
    out = tmp_path / "out"
    found = command("all", "--data", "digits", "--out", out, "--json", tmp_path / "all.json")
    assert found.exit_code == 0, found.output
    assert "second: done" in found.output
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert files == {
        *(f"{part}{name}" for part in ("", "first/", "second/") for name in (PAGE, RESULT)),
        "kept/first/finished",
        "kept/second/finished",
    }
    assert (tmp_path / "all.json").read_text() == (out / RESULT).read_text()
    told = result(out)
    assert told["rows"] == [*result(out / "first")["rows"], *result(out / "second")["rows"]]
    assert [row["samples"] for row in told["rows"]] == [7, 7]
    assert told["failures"] == {}
    assert [table["title"] for table in told["tables"]] == [
        "first: Of its own",
        "second: Of its own",
        "Experiments",
    ]
    page = (out / PAGE).read_text(encoding="utf-8")
    assert '<a href="second/report.html">About second</a>' in page
    assert "<td>second</td><td>a, b</td><td>&lt;some&gt;</td>" in page


def test_one_that_fails_does_not_lose_the_others(every, tmp_path):
    missing = InputError("no photographs <here>\n at all")
    every(Little("first"), Little("second", missing), Little("third"))
    out = tmp_path / "out"
    found = command("all", "--data", "digits", "--out", out, "--samples", 3)
    assert found.exit_code == 1
    assert "error: second: no photographs <here> at all" in found.output
    assert sorted(file.name for file in out.iterdir()) == [
        "first",
        "kept",
        PAGE,
        RESULT,
        "third",
    ]
    told = result(out)
    assert told["failures"] == {"second": "no photographs <here> at all"}
    assert told["facts"]["experiments"] == "2 of 3"
    assert [row["experiment"] for row in told["rows"]] == ["first", "third"]
    assert [row["samples"] for row in told["rows"]] == [3, 3]
    assert told["tables"][-1]["lines"][1] == ["second", "failed", "no photographs <here> at all"]
    page = (out / PAGE).read_text(encoding="utf-8")
    assert "no photographs &lt;here&gt; at all" in page
    assert "second/" not in page


def test_a_mistake_in_the_code_is_not_taken_for_missing_data(every, tmp_path):
    every(Little("first"), Little("second", ZeroDivisionError()))
    found = command("all", "--data", "digits", "--out", tmp_path / "out")
    assert isinstance(found.exception, ZeroDivisionError)


def test_all_of_them_go_on_after_an_interruption(every, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setattr("nrm.experiments.recurrent.experiment.draw", lambda found: Figure())
    parts = Recurrent(steps=3), Recurrent(steps=4)
    parts[0].name = "short"
    every(*parts)

    def all_of_them(out, code=0):
        found = command("all", "--data", "digits", "--out", out, "--samples", 1)
        assert found.exit_code == code, found.output

    whole, out = tmp_path / "whole", tmp_path / "out"
    all_of_them(whole)
    real, studied = Network.studied, []

    def interrupted(*given):
        studied.append(given)
        if len(studied) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(Network, "studied", interrupted)
    all_of_them(out, code=130)
    assert [file.name for file in out.iterdir()] == ["kept"]  # no half of a report
    all_of_them(out)
    assert studied[4:] == studied[3:4]  # nothing was trained again
    for part in (".", "short", "rnn"):
        assert result(out / part) == result(whole / part)


def test_layers_are_not_for_all_of_them(tmp_path):
    given = ("--data", "digits", "--out", tmp_path / "out", "--layers", "a,b")
    found = command("all", *given)
    assert found.exit_code == 2
    assert "--layers: all takes none" in found.output
