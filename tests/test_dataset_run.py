"""Runs over data sets: against everything computed at once, and however they are interrupted."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="nrm[dataset] is not installed")

import pyarrow.parquet as pq
import torch
from support.dataset import ASKED, LAYERS, PAIR, Deadly, assert_equal, data, network
from torch import Tensor, nn

import nrm
from nrm.dataset import Results, Stream, relmax, storage, tables
from nrm.errors import InputError, NrmError, QueryError, StorageError, UnknownLayerError
from nrm.methods import in_units

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> Results:
    """The run that others are compared with."""
    out = tmp_path_factory.mktemp("whole")
    return relmax(nrm.Explainer(model), data(), LAYERS, out, **ASKED)


def run(model: nn.Module, out: Path, given: Any = None, **options: Any) -> Results:
    return relmax(
        nrm.Explainer(model), data() if given is None else given, LAYERS, out, **ASKED | options
    )


# -- against everything at once --------------------------------------------------------------------


@pytest.mark.parametrize("target", ["predicted", "true", 1])
@pytest.mark.parametrize("scale", ["normalized", "logit"])
def test_statistics_are_those_of_all_samples_at_once(
    model: nn.Module, tmp_path: Path, target: Any, scale: Any
) -> None:
    x, y = data()
    found = run(model, tmp_path, target=target, scale=scale)
    R = nrm.Explainer(model)(x, target={"predicted": None, "true": y, 1: 1}[target])
    assert R.target is not None
    classes = R.target.numpy()
    assert found.samples == len(x)
    for layer in LAYERS:
        values = {
            "relevance": in_units(R, R.channels(layer), scale).double().numpy(),
            "activation": R.activations(layer).amax((2, 3)).double().numpy(),
        }
        for quantity, exact in values.items():
            near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5 * np.abs(exact).max()}
            rows = found.statistics(layer, quantity)  # type: ignore[arg-type]
            assert rows["count"].to_pylist() == [len(x)] * exact.shape[1]
            np.testing.assert_allclose(rows["mean"].to_numpy(), exact.mean(0), **near)
            np.testing.assert_allclose(rows["variance"].to_numpy(), exact.var(0), **near)
            np.testing.assert_allclose(rows["highest"].to_numpy(), exact.max(0), **near)
            for one in np.unique(classes):
                rows = found.statistics(layer, quantity, int(one))  # type: ignore[arg-type]
                of = exact[classes == one]
                assert rows["count"].to_pylist() == [len(of)] * exact.shape[1]
                np.testing.assert_allclose(rows["mean"].to_numpy(), of.mean(0), **near)
                np.testing.assert_allclose(rows["lowest"].to_numpy(), of.min(0), **near)
            ranks = np.sort(exact, 0)[int(np.ceil(0.75 * len(x))) - 1]
            quantile = found.quantile(layer, 0.75, quantity)  # type: ignore[arg-type]
            np.testing.assert_allclose(quantile, ranks, rtol=1 / 30, atol=near["atol"])
            assert (quantile == found.statistics(layer, quantity)["q75"].to_numpy()).all()  # type: ignore[arg-type]
            for part in range(exact.shape[1]):
                of = exact[:, part]
                best = found.references(layer, part, quantity)  # type: ignore[arg-type]
                np.testing.assert_allclose([one.value for one in best], -np.sort(-of)[:4], **near)
                for one in best:
                    np.testing.assert_allclose(one.value, of[one.sample], **near)
                    assert one.label == int(y[one.sample])
                    assert one.explained == classes[one.sample]
                    assert one.output == pytest.approx(float(R.scale[one.sample]), rel=1e-4)
    joint = in_units(R, R.joint(*PAIR), scale).double().numpy()
    for explained in (None, *map(int, np.unique(classes))):
        of = joint if explained is None else joint[classes == explained]
        flows = found.flows(*PAIR, explained, k=99)
        assert len(flows) == joint[0].size
        near = {"rel": 1e-3, "abs": 1e-5 * np.abs(joint).max()}
        for flow in flows:
            assert flow.mean == pytest.approx(of.mean(0)[flow.parts], **near)
            assert flow.highest == pytest.approx(of.max(0)[flow.parts], **near)
            assert joint[flow.sample][flow.parts] == pytest.approx(flow.highest, **near)
        assert [flow.mean for flow in flows] == sorted((f.mean for f in flows), reverse=True)
    lowest = found.flows(*PAIR, k=1, smallest=True)[0]
    assert lowest.mean == min(flow.mean for flow in found.flows(*PAIR, k=99))


def test_relmax_of_methods_has_the_same_samples(model: nn.Module, whole: Results) -> None:
    x, _ = data()
    expected = nrm.methods.relmax(nrm.Explainer(model), x.split(8), "3", k=4)
    for part in range(5):
        found = whole.references("3", part)
        values = expected.values[:, part].tolist()
        assert [one.value for one in found] == pytest.approx(values, rel=1e-4, abs=1e-6)
        if values[-1] > 1e-3:
            assert [one.sample for one in found] == expected.indices[:, part].tolist()


def test_parts_may_be_neurons_axes_and_sets(model: nn.Module, tmp_path: Path) -> None:
    x, _ = data(20)
    R = nrm.Explainer(model)(x)
    options: dict[str, Any] = {"k": 2, "batch": 8, "shard": 16}
    explainer = nrm.Explainer(model)
    by_neuron = relmax(explainer, x, "3", tmp_path / "n", by="neuron", **options)
    exact = R.marginal("3").flatten(1).double().mean(0)
    assert by_neuron.statistics("3")["mean"].to_pylist() == pytest.approx(exact.tolist(), abs=1e-5)
    rows = relmax(explainer, x, ["1"], tmp_path / "a", by=1, activation="sum", **options)
    exact = R.activations("1").sum((1, 3)).double().mean(0)
    found = rows.statistics("1", "activation")["mean"].to_pylist()
    assert found == pytest.approx(exact.tolist(), rel=1e-5)
    corner, several = nrm.patch("1", slice(0, 2), slice(0, 2)), nrm.channels("3", 1, 2)
    across = nrm.channels("1", 0) | nrm.channels("3", 0)  # which a walk may visit twice
    sets = {"corner": corner, "several": several, "across": across}
    found = relmax(explainer, x, {"mine": sets}, tmp_path / "s", **options)
    assert found.layers == {"mine": ["corner", "several", "across"]}
    exact = torch.stack([R(one) for one in sets.values()], 1).double().mean(0)
    assert found.statistics("mine")["mean"].to_pylist() == pytest.approx(exact.tolist(), abs=1e-5)
    values = R.activations("1"), R.activations("3")
    largest = [
        values[0][:, :, :2, :2].amax((1, 2, 3)),
        values[1][:, 1:3].amax((1, 2, 3)),
        torch.maximum(values[0][:, 0].amax((1, 2)), values[1][:, 0].amax((1, 2))),
    ]
    exact = torch.stack(largest, 1).double().mean(0)
    got = found.statistics("mine", "activation")["mean"].to_pylist()
    assert got == pytest.approx(exact.tolist(), rel=1e-5)
    assert [one.value for one in found.references("mine", "across")] == pytest.approx(
        R(across).sort(descending=True).values[:2].tolist(), rel=1e-4
    )


def test_heatmaps_are_those_of_the_samples(model: nn.Module, whole: Results) -> None:
    x, y = data()
    found = whole.heatmaps(nrm.Explainer(model), (x, y), "3", 4, k=2)
    assert found.inputs.shape == found.heatmaps.shape == (2, 1, 6, 6)
    for one, given, heatmap in zip(found.references, found.inputs, found.heatmaps, strict=True):
        assert torch.equal(given, x[one.sample])
        R = nrm.Explainer(model)(x[one.sample][None], target=one.explained)
        torch.testing.assert_close(heatmap, R.heatmap(nrm.channels("3", 4))[0])
        assert float(heatmap.sum()) == pytest.approx(one.value, rel=1e-3)
    conditional = whole.heatmaps(
        nrm.Explainer(model), (x, y), "3", 4, "activation", 1, conditional=True
    )
    assert float(conditional.heatmaps.sum()) == pytest.approx(1, rel=1e-3)
    with pytest.raises(InputError, match="another data set"):
        whole.heatmaps(nrm.Explainer(model), (x + 1, y), "3", 4)
    other = network()
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(InputError, match="other weights"):
        whole.heatmaps(nrm.Explainer(other), (x, y), "3", 4)


# -- interrupted, and by several -------------------------------------------------------------------


def in_a_child(work: Callable[[], object]) -> int:
    """The id of a process that does it; forked, so that it starts in no time."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_at_any_moment_and_resumed(model: nn.Module, tmp_path: Path, whole: Results) -> None:
    shards = tmp_path / "shards"

    class Slow:
        """Reads as slowly as a disk."""

        x, y = data()

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            time.sleep(0.002)
            return self.x[index], int(self.y[index])

    for wanted in (1, 3):
        child = in_a_child(lambda: run(model, tmp_path, Slow()))
        until = time.monotonic() + 30
        while len(list(shards.glob("0*"))) < wanted and time.monotonic() < until:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert wanted <= len(list(shards.glob("0*"))) < 5
        half = nrm.open_results(tmp_path)
        assert not half.complete
        assert 0 < half.samples < 70
    assert_equal(run(model, tmp_path, Slow()), whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_while_a_shard_is_written(
    model: nn.Module, tmp_path: Path, whole: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    itself = pq.write_table
    written = 0

    def dies(*args: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        if written == 9:  # in the middle of the second shard
            os.kill(os.getpid(), signal.SIGKILL)
        itself(*args, **options)

    def work() -> None:
        monkeypatch.setattr(tables.pq, "write_table", dies)
        run(model, tmp_path)

    os.waitpid(in_a_child(work), 0)
    left = [path.name for path in (tmp_path / "shards").iterdir()]
    assert len(left) == 2
    assert any(name.endswith(".part") for name in left)
    assert nrm.open_results(tmp_path).samples == 16
    assert_equal(run(model, tmp_path), whole)
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith(".part")]


def test_workers_give_the_same_and_one_that_dies_costs_its_shard(
    model: nn.Module, tmp_path: Path, whole: Results
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    deadly = Deadly(marks, (20,))
    (marks / "armed").touch()
    found = run(model, tmp_path / "out", deadly, workers=2)
    assert (marks / "killed20").exists()
    assert_equal(found, whole)


def test_what_fails_in_a_worker_is_said(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="cannot be sent"):
        run(model, tmp_path / "a", lambda: iter(zip(*data(), strict=True)), workers=2)
    for count in (0, -1, True):
        with pytest.raises(InputError, match="positive"):
            run(model, tmp_path / "b", workers=count)


def test_a_run_again_computes_nothing(
    model: nn.Module, whole: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nrm.dataset.shard.Work, "shard", lambda *_: pytest.fail("computed again"))
    assert_equal(run(model, whole.path), whole)


def test_a_stream_of_unknown_length(model: nn.Module, tmp_path: Path, whole: Results) -> None:
    x, y = data()

    def items() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(x, y, strict=True)

    assert_equal(run(model, tmp_path / "a", items), whole)
    # A length that is a multiple of a shard's shows only where nothing follows.
    first = run(model, tmp_path / "b", Stream(lambda: zip(x[:32], y[:32], strict=True), shard=16))
    assert first.samples == 32
    assert_equal(first, run(model, tmp_path / "b2", (x[:32], y[:32])))
    # Interrupted, it goes on.
    out = tmp_path / "c"
    seen = 0

    def stop(_: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, out, items, progress=stop)
    assert nrm.open_results(out).samples == 32
    assert_equal(run(model, out, items), whole)


# -- what is wrong ---------------------------------------------------------------------------------


def test_samples_that_cannot_be_read_or_explained_are_listed(
    model: nn.Module, tmp_path: Path
) -> None:
    x, y = data()
    items: list[Any] = list(zip(x, y.tolist(), strict=True))
    items[0] = (torch.full((1, 6, 6), torch.inf), 0)
    items[17] = "no sample"
    items[33] = (torch.rand(1, 7, 6), 0)  # another size, which the linear layer does not take
    items[50] = (x[50], 9)  # a class that does not exist
    found = run(model, tmp_path, items, target="true")
    reasons = {number: reason for number, _, reason in found.skipped}
    assert sorted(reasons) == [0, 17, 33, 50]
    assert "infinite" in reasons[0]
    assert "tensor" in reasons[17]
    assert "out of range" in reasons[50]
    assert found.samples == 66
    good = [n for n in range(70) if n not in reasons]
    R = nrm.Explainer(model)(x[good], target=y[good])
    exact = R.channels("3").double().mean(0).tolist()
    assert found.statistics("3")["mean"].to_pylist() == pytest.approx(exact, abs=1e-5)
    assert "4 skipped" in str(found)


def test_five_per_cent_of_pictures_are_corrupt(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="nrm[cli] is not installed")
    random = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(60):
        file = folder / f"{number:03}.png"
        image.fromarray(random.integers(0, 256, (6, 6), dtype=np.uint8)).save(file)
        if number % 20 == 7:
            file.write_bytes(file.read_bytes()[:40])
    model = network()

    def grey(picture: Any) -> Tensor:
        return torch.from_numpy(np.array(picture.convert("L"))).float()[None] / 255

    options = {**ASKED, "readers": 3}
    found = relmax(nrm.Explainer(model), folder, LAYERS, tmp_path / "out", read=grey, **options)
    assert [name for _, name, _ in found.skipped] == ["007.png", "027.png", "047.png"]
    assert found.samples == 57
    numbers = {one.sample for part in range(5) for one in found.references("3", part)}
    assert not numbers & {7, 27, 47}
    assert_equal(
        found,
        relmax(nrm.Explainer(model), folder, LAYERS, tmp_path / "o2", read=grey, **ASKED),
    )


def test_a_folder_of_another_run_is_refused(
    model: nn.Module, whole: Results, tmp_path: Path
) -> None:
    x, y = data()
    other = network()
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    for word, work in (
        ("weights", lambda: run(other, whole.path)),
        ("data", lambda: run(model, whole.path, (x + 1, y))),
        ("target", lambda: run(model, whole.path, target="true")),
        ("batch", lambda: run(model, whole.path, batch=4)),
        ("layers", lambda: relmax(nrm.Explainer(model), (x, y), "1", whole.path, **ASKED)),
        (
            "composite",
            lambda: relmax(
                nrm.Explainer(model, nrm.composites.LRPZero()), (x, y), LAYERS, whole.path, **ASKED
            ),
        ),
    ):
        with pytest.raises(InputError, match=f"another run.*{word}"):
            work()
    manifest = json.loads((whole.path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    for work in (lambda: nrm.open_results(tmp_path), lambda: run(model, tmp_path)):
        with pytest.raises(InputError, match="form 99"):
            work()
    with pytest.raises(InputError, match="no results"):
        nrm.open_results(tmp_path / "nothing")


def test_a_damaged_shard_is_named_and_computed_again(
    model: nn.Module, tmp_path: Path, whole: Results
) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, progress=stop)
    file = tmp_path / "shards" / "00000000" / "top.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    for work in (lambda: nrm.open_results(tmp_path), lambda: run(model, tmp_path)):
        with pytest.raises(InputError, match=r"00000000 is damaged. Delete"):
            work()
    for each in file.parent.iterdir():
        each.unlink()
    file.parent.rmdir()
    assert_equal(run(model, tmp_path), whole)


def test_a_full_disk_ends_the_run_and_keeps_what_is_finished(
    model: nn.Module, tmp_path: Path, whole: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    itself = pq.write_table

    def full(table: Any, file: Path, **options: Any) -> None:
        if "00000002" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        itself(table, file, **options)

    monkeypatch.setattr(tables.pq, "write_table", full)
    with pytest.raises(StorageError, match=r"is full. All shards that were finished are kept"):
        run(model, tmp_path)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["00000000", "00000001"]
    monkeypatch.undo()
    assert_equal(run(model, tmp_path), whole)


def test_where_nothing_can_be_written(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        run(model, tmp_path / "file")
    with pytest.raises(InputError, match="not a folder"):
        run(model, tmp_path / "file" / "below")
    (tmp_path / "shards").mkdir()
    with pytest.raises(InputError, match=r"no manifest.json"):
        run(model, tmp_path)
    if os.path.exists("/proc/self") and sys.platform == "linux":  # where nobody writes
        with pytest.raises(NrmError, match=r"written|such file|folder"):
            run(model, Path("/proc/self/results"))


def test_two_runs_do_not_write_to_one_folder(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no such locks on this system")

    def meanwhile(_: int) -> None:
        run(model, tmp_path)

    with pytest.raises(StorageError, match=f"in use by another run, process {os.getpid()}"):
        run(model, tmp_path, progress=meanwhile)
    (tmp_path / "in-use").write_text("1")  # of a process that is no more
    assert run(model, tmp_path).complete


def test_questions_that_do_not_fit_are_refused_before_the_work(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for options, error, text in (
        ({"target": "best"}, InputError, "'predicted', 'true' or a class"),
        ({"target": 7}, NrmError, "out of range"),
        ({"k": 0}, InputError, "k is a positive"),
        ({"batch": True}, InputError, "batch is a positive"),
        ({"threads": 0}, InputError, "threads is a positive"),
        ({"activation": "mean"}, InputError, "activation is one of"),
        ({"scale": "original"}, InputError, "no marginals"),
        ({"scale": "percent"}, QueryError, "scale is"),
        ({"joint": [("1", "9")]}, UnknownLayerError, "no layer is called '9'"),
        ({"workers": 2, "ray": True}, InputError, "either workers or ray"),
    ):
        with pytest.raises(error, match=text):
            run(model, out, **options)
    for layers, text in (([], "no layers"), (["1", "1"], "named twice"), ({"a": "1"}, "its name")):
        with pytest.raises(InputError, match=text):
            relmax(nrm.Explainer(model), data(), layers, out, **ASKED)  # type: ignore[arg-type]
    with pytest.raises(UnknownLayerError):
        relmax(nrm.Explainer(model), data(), "conv9", out, **ASKED)
    with pytest.raises(InputError, match=r"no sample can be read: .*no label"):
        run(model, out, data()[0], target="true")
    maps = nrm.Explainer(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU()).eval())
    with pytest.raises(NrmError, match=r"\[batch, classes\]"):
        relmax(maps, data(), "0", out, k=1)
    monkeypatch.setattr(nrm.dataset.run, "MOST_JOINT", 1000)
    with pytest.raises(InputError, match="joint statistics of 3 classes"):
        run(model, out)
    assert not out.exists()
    assert run(model, out, joint_classes=[2]).flows(*PAIR, 2)


def test_a_model_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    model = network()

    def change(_: int) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)

    with pytest.raises(QueryError, match="weights changed"):
        run(model, tmp_path, progress=change)


def test_results_refuse_what_they_do_not_hold(whole: Results) -> None:
    for ask, text in (
        (lambda: whole.kept("tops"), "no table"),
        (lambda: whole.references("9", 0), "no statistics of '9'"),
        (lambda: whole.references("3", 5), "has 5 parts"),
        (lambda: whole.references("3", "eye"), "none called 'eye'"),
        (lambda: whole.statistics("3", "size"), "quantity is one of"),  # type: ignore[arg-type]
        (lambda: whole.quantile("3", 2), "from 0 to 1"),
        (lambda: whole.flows("3", "1"), "no joint statistics"),
        (lambda: whole.about(10**9), "nothing is kept"),
    ):
        with pytest.raises(QueryError, match=text):
            ask()


def test_tables_are_read_without_nrm(whole: Results) -> None:
    shards = [storage._SHARDS, "*", "moments.parquet"]
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.read_parquet(whole.path / "merged" / "parts.parquet")
    assert list(frame.columns) == tables.MERGED["parts"].names
    assert len(frame) == 2 * (4 + 5)
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    counted = duckdb.sql(
        f"select layer, sum(count) from '{whole.path.joinpath(*shards)}' "
        "where quantity = 'relevance' and part = 0 group by layer order by layer"
    ).fetchall()
    assert counted == [("1", 70), ("3", 70)]
    best = duckdb.sql(
        f"select name, value from '{whole.path}/merged/top.parquet' join "
        f"'{whole.path}/merged/samples.parquet' using (sample) "
        "where layer = '3' and quantity = 'relevance' and part = 4 and rank = 0"
    ).fetchall()
    first = whole.references("3", 4)[0]
    assert best == [(first.name, first.value)]
