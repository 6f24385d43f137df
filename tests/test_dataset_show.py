"""What a run found, as pictures: `nrm relmax show`, `flows`, `cluster`, and the same in Python."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer", reason="nrm[cli] is not installed")
pytest.importorskip("pyarrow", reason="nrm[dataset] is not installed")
pytest.importorskip("sklearn", reason="nrm[dataset] is not installed")

import torch
from PIL import Image
from support.dataset import ASKED, LAYERS, PAIR, data, network
from torch import Tensor
from typer.testing import CliRunner

import nrm
from nrm.cli.app import app
from nrm.dataset import Results, pictures, relmax
from nrm.dataset.sources import as_source
from nrm.errors import InputError, QueryError
from nrm.io import imagenet

pytestmark = pytest.mark.usefixtures("captured_once")

SAMPLES = 36
GREY = f"{__name__}:grey"
PNG = b"\x89PNG\r\n"


def grey(picture: Image.Image) -> Tensor:
    """`[1, 6, 6]` from 0 to 1."""
    return torch.from_numpy(np.array(picture.convert("L"))).float()[None] / 255


def cli(*words: object) -> Any:
    return CliRunner().invoke(app, ["relmax", *map(str, words)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures in `data`, and a run over them in `out`."""
    folder, random = tmp_path_factory.mktemp("show"), np.random.default_rng(0)
    for number in range(SAMPLES):
        file = folder / "data" / "abc"[number % 3] / f"<b>{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (6, 6), dtype=np.uint8)).save(file)
    sys.modules.setdefault("test_dataset_show", sys.modules[__name__])
    done = cli(
        "--model", "support.dataset:network", "--data", folder / "data", "--transform", GREY,
        "--layers", "1,3", "--joint", "1,3", "--target", "true", "--out", folder / "out", "--k", 5,
        "--shard", 16, "--batch", 4, "--quiet",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


def page_of(out: Path) -> str:
    text = (out / "index.html").read_text(encoding="utf-8")
    assert "<b>0" not in text  # names of files are no markup
    assert 'src="http' not in text
    return text


def test_show_draws_reference_samples(place: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("ape\nbee\n<i>cat\n")
    done = cli(
        "show", place / "out", "--layer", 3, "--channel", 4, "--channel", 2, "--k", 3,
        "--labels", labels, "--out", tmp_path / "pictures", "--quiet",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    files = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert files == ["channel_2.png", "channel_4.png", "index.html"]
    assert (tmp_path / "pictures" / "channel_4.png").read_bytes().startswith(PNG)
    text = page_of(tmp_path / "pictures")
    results = nrm.open_results(place / "out")
    for channel in (2, 4):
        for one in results.references("3", channel, k=3):
            shown = one.name.replace("<", "&lt;").replace(">", "&gt;")
            assert shown in text
            assert one.name in done.stdout
            assert f"{one.value:.4g}" in text
    assert text.count("data:image/png;base64,") == 2
    assert "<i>cat" not in text


def test_show_of_a_class_and_by_activation(place: Path, tmp_path: Path) -> None:
    results = nrm.open_results(place / "out")
    best = results.references("3", 4, "activation")
    one = best[0].explained
    done = cli(
        "show", place / "out", "--layer", 3, "--channel", 4, "--class", one, "--by", "activation",
        "--share", 0, "--conditional", "--out", tmp_path, "--quiet",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    kept = [each for each in best if each.explained == one]
    text = page_of(tmp_path)
    for each in best:
        assert (Path(each.name).name[3:] in text) == (each in kept)
    assert results.references("3", 4, "activation", explained=one) == kept
    assert results.references("3", 4, "activation", 1, explained=one) == kept[:1]


def test_flows_are_listed_and_drawn(place: Path, tmp_path: Path) -> None:
    results = nrm.open_results(place / "out")
    listed = cli("flows", place / "out", "--class", 1, "--k", 3)
    assert listed.exit_code == 0, listed.output
    for flow in results.flows("1", "3", 1, 3):
        line = next(text for text in listed.stdout.splitlines() if f"{flow.mean:.4g}" in text)
        assert line.split()[:2] == [str(part) for part in flow.parts]
        assert results.about(flow.sample)["name"] in line
    drawn = cli("flows", place / "out", "--smallest", "--k", 2, "--out", tmp_path, "--quiet")
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "flows.png").read_bytes().startswith(PNG)
    assert f"{results.flows('1', '3', k=1, smallest=True)[0].mean:.4g}" in page_of(tmp_path)


def test_cluster_draws_a_class(place: Path, tmp_path: Path) -> None:
    done = cli("cluster", place / "out", "--class", 2, "--k", 2, "--out", tmp_path, "--quiet")
    assert done.exit_code == 0, done.output
    assert "Clusters of 12 heatmaps of class 2" in done.stdout
    assert (tmp_path / "clusters.png").read_bytes().startswith(PNG)
    text = page_of(tmp_path)
    for number in range(2, SAMPLES, 3):
        assert f"{number:02}.png" in text


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "pictures", "--quiet")
    show = ("show", place / "out", "--layer", "3", "--channel", "4")
    other = tmp_path / "other"
    shutil.copytree(place / "data", other)
    (other / "a" / "<b>00.png").unlink()
    for words, text in (
        (("show", tmp_path, "--layer", "3", "--channel", "4", *out), "holds no results"),
        (("show", place / "out", "--layer", "9", "--channel", "4", *out), "no statistics of '9'"),
        (("show", place / "out", "--layer", "3", "--channel", "77", *out), "has 5 parts"),
        ((*show, "--channel", "4", *out), "given twice"),
        ((*show, "--class", "77", *out), "no samples of class 77"),
        ((*show, "--data", other, *out), "another data set"),
        ((*show, "--data", tmp_path / "none", *out), "no such folder"),
        (("flows", place / "out", "--layers", "3", *out), "give two layers"),
        (("flows", place / "out", "--layers", "3,1", *out), "no joint statistics of '3' and '1'"),
        (("flows", place / "out", "--class", "77", *out), "no joint statistics of class 77"),
        (("flows", place / "out", "--device", "cpu"), "without --out"),
        (("cluster", place / "out", "--class", "77", *out), "has 0 samples"),
        (("cluster", place / "out", "--class", "1", "--method", "hdbscan", "--clusters", "2", *out),
         "leave `clusters` out"),
    ):  # fmt: skip
        done = cli(*words)
        assert done.exit_code == 2, (words, done.output)
        assert text in done.stderr, words
        assert not (tmp_path / "pictures").exists()


def test_a_copy_elsewhere_is_the_same_data(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "moved")  # with the files' times
    done = cli(
        "show", place / "out", "--layer", 3, "--channel", 4, "--k", 1, "--data",
        tmp_path / "moved", "--out", tmp_path / "pictures", "--quiet",
    )  # fmt: skip
    assert done.exit_code == 0, done.output


# -- in Python -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[nrm.Explainer, Results]:
    explainer = nrm.Explainer(network())
    return explainer, relmax(explainer, data(), LAYERS, tmp_path_factory.mktemp("run"), **ASKED)


def test_heatmaps_of_a_class(found: tuple[nrm.Explainer, Results]) -> None:
    explainer, results = found
    one = results.references("3", 1)[0].explained
    kept = results.references("3", 1, explained=one)
    shown = results.heatmaps(explainer, data(), "3", 1, explained=one)
    assert shown.references == kept
    assert all(each.explained == one for each in kept)
    x, _ = data()
    for each, picture, heatmap in zip(kept, shown.inputs, shown.heatmaps, strict=True):
        assert (picture == x[each.sample]).all()
        exact = explainer(x[[each.sample]], target=one).heatmap(nrm.channels("3", 1))[0]
        torch.testing.assert_close(heatmap, exact)
    with pytest.raises(QueryError, match=r"no samples of class 77 .* among the 4 that were kept"):
        results.heatmaps(explainer, data(), "3", 1, explained=77)
    with pytest.raises(InputError, match="another data set"):
        results.heatmaps(explainer, data(60), "3", 1)


def test_a_flow_is_drawn_with_what_it_is(found: tuple[nrm.Explainer, Results]) -> None:
    explainer, results = found
    flows = results.flows(*PAIR, k=2)
    figure = pictures.flows(results, explainer, as_source(data()), flows, title="flows")
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert len(titles) == 2
    for flow, title in zip(flows, titles, strict=True):
        assert title.startswith(f"{flow.parts[0]} & {flow.parts[1]}: {flow.mean:.3g}")
    assert len(figure.axes) == 8


def test_pictures_are_as_they_were_before_the_imagenet_transform() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    made = imagenet(Image.fromarray(pixels).resize((256, 256)))
    seen = pictures.denormalised(made.x[0])
    np.testing.assert_allclose(seen.permute(1, 2, 0).numpy(), made.shown, atol=1e-6)
    assert pictures.short("folder/" + "x" * 40 + ".png").endswith("x.png")
    assert len(pictures.short("x" * 99)) == 22
