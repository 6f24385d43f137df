"""Clusters of a class's heatmaps: on heatmaps made up, and a watermark planted on digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="nrm[dataset] is not installed")
pytest.importorskip("sklearn", reason="nrm[dataset] is not installed")

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from support.dataset import data, network
from torch import Tensor, nn

import nrm
from nrm.dataset import pictures
from nrm.dataset.sources import Rows, as_source
from nrm.dataset.strategies import NOBODY, Strategies, strategies
from nrm.errors import InputError, QueryError

pytestmark = pytest.mark.usefixtures("captured_once")

CLASS = 8


class Linear(nn.Module):
    """Output k is the sum of the pixels of its own half: relevance is the pixels themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.of = nn.Linear(64, 2, bias=False)
        with torch.no_grad():
            self.of.weight.fill_(0.01)
            self.of.weight[0] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """`[N, 2]` of `[N, 1, 8, 8]`."""
        found: Tensor = self.of(x.flatten(1))
        return found


@pytest.fixture(scope="module")
def made_up() -> tuple[nrm.Explainer, Tensor, np.ndarray]:
    """Pictures with a blob at the top left (40), or at the bottom right (20)."""
    generator = torch.Generator().manual_seed(0)
    x = 0.05 * torch.rand((60, 1, 8, 8), generator=generator)
    kind = np.arange(60) % 3 == 0
    for number in range(60):
        place = slice(5, 7) if kind[number] else slice(1, 4)
        x[number, 0, place, place] += 0.5 + torch.rand((), generator=generator)
    return nrm.Explainer(Linear().eval(), nrm.composites.LRPZero()), x, kind


def found_of(made_up: tuple[nrm.Explainer, Tensor, np.ndarray], **options: Any) -> Strategies:
    explainer, x, _ = made_up
    return strategies(explainer, x, 0, **options)


def test_two_kinds_are_two_clusters(made_up: tuple[nrm.Explainer, Tensor, np.ndarray]) -> None:
    found = found_of(made_up)
    explainer, x, kind = made_up
    assert [len(one) for one in found.found] == [20, 40]  # alike: the smaller is first
    assert len({(bool(k), int(c)) for k, c in zip(kind, found.clusters, strict=True)}) == 2
    assert [one.conductance for one in found.found] == [0, 0]  # nothing leads from one to the other
    assert found.outstanding == found.found[:1]  # and the other is what it stands out from
    assert found.eigenvalues[:3] == pytest.approx([0, 0, found.eigenvalues[2]], abs=1e-9)
    assert found.eigenvalues[2] > 0.01
    # Relevance in units of the output is the pixels (LRP-0), of length one.
    exact = x[:, 0].double().numpy()
    exact = exact / np.linalg.norm(exact, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(found.heatmaps, exact, rtol=1e-4)
    for number, one in enumerate(found.found):
        assert (found.clusters[one.rows] == number).all()
        mean = exact[one.rows].mean(0)
        np.testing.assert_allclose(one.heatmap, mean, rtol=1e-4)
        distances = np.linalg.norm(exact[one.rows] - mean, axis=(1, 2))
        assert (np.diff(distances) > -1e-6).all()
    assert "stands out" in str(found)
    typical = found.typical(explainer, as_source(x), 0, 3)
    assert [sample.number for sample in typical.samples] == found.found[0].rows[:3].tolist()
    torch.testing.assert_close(typical.heatmaps[0], explainer(x, target=0).heatmap()[
        found.found[0].rows[0]])  # fmt: skip


def test_the_same_again_and_by_other_batches(
    made_up: tuple[nrm.Explainer, Tensor, np.ndarray],
) -> None:
    found, again = found_of(made_up), found_of(made_up, batch=7)
    assert (found.clusters == again.clusters).all()
    assert (found.samples == again.samples).all()
    np.testing.assert_allclose(found.heatmaps, again.heatmaps, rtol=1e-5, atol=1e-7)
    same = found_of(made_up)
    assert (found.places == same.places).all()


def test_conductance_and_silhouette_by_hand(
    made_up: tuple[nrm.Explainer, Tensor, np.ndarray],
) -> None:
    found = found_of(made_up, clusters=5)
    flat = found.heatmaps.reshape(60, -1)
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=2)
    order = np.argsort(distance + np.diag(np.full(60, np.inf)), axis=1)[:, :10]
    links = np.zeros((60, 60))
    np.put_along_axis(links, order, 1.0, 1)
    links = (links + links.T) / 2
    assert len(found.found) == 5
    for number, one in enumerate(found.found):
        inside = found.clusters == number
        away = links[inside][:, ~inside].sum()
        least = min(links[inside].sum(), links[~inside].sum())
        assert one.conductance == pytest.approx(away / least)
        values = []
        for row in np.flatnonzero(inside):
            own = distance[row][inside].sum() / max(inside.sum() - 1, 1)
            nearest = min(
                distance[row][found.clusters == c].mean() for c in range(5) if c != number
            )
            values.append((nearest - own) / max(nearest, own) if inside.sum() > 1 else 0)
        assert one.silhouette == pytest.approx(np.mean(values), abs=1e-6)
    conductances = [one.conductance for one in found.found]
    assert conductances == sorted(conductances)


def test_hdbscan_leaves_some_out(made_up: tuple[nrm.Explainer, Tensor, np.ndarray]) -> None:
    found = found_of(made_up, method="hdbscan")
    _, _, kind = made_up
    assert len(found.found) >= 2
    assert not len(found.eigenvalues)
    inside = found.clusters != NOBODY
    for number in range(len(found.found)):
        assert len(set(kind[found.clusters == number])) == 1
    if not inside.all():
        assert "in no cluster" in str(found)


def test_which_samples_are_of_the_class() -> None:
    x, y = data(70)
    explainer = nrm.Explainer(network())
    predicted = explainer(x).target
    assert predicted is not None
    given, most_often = (x, y), int(predicted.mode().values)
    kinds = (
        (most_often, "predicted", predicted == most_often),
        (1, "true", y == 1),
        (1, 1, y >= 0),
    )
    for one, target, exact in kinds:
        found = strategies(explainer, given, one, target=target, batch=16)  # type: ignore[arg-type]
        assert found.samples.tolist() == exact.nonzero().flatten().tolist()
        assert found.labels == y[exact].tolist()
    few = strategies(explainer, given, 1, target="true", most=12)
    assert few.samples.tolist() == (y == 1).nonzero().flatten().tolist()[:12]
    assert few.heatmaps.shape == (12, 6, 6)
    coarse = strategies(explainer, given, 1, target="true", most=12, side=3)
    exact = explainer(x[few.samples], target=1)
    logit = nrm.methods.lrp(exact, scale="logit").double().sum(1)
    mean = logit.view(12, 3, 2, 3, 2).mean((2, 4))
    mean = mean / mean.flatten(1).norm(dim=1)[:, None, None]
    np.testing.assert_allclose(coarse.heatmaps, mean.numpy(), rtol=1e-3, atol=1e-5)


class Holed:
    """Data of which every seventh sample cannot be read."""

    def __len__(self) -> int:
        return 70

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index % 7 == 0:
            raise OSError("gone")
        x, y = data(70)
        return x[index], int(y[index])


def test_what_cannot_be_read_is_skipped_and_told() -> None:
    found = strategies(nrm.Explainer(network()), Rows(Holed()), 1, target="true")
    assert found.skipped == 10
    assert not (found.samples % 7 == 0).any()
    assert "10 samples could not be read" in str(found)


def test_what_is_refused() -> None:
    x, y = data(70)
    explainer = nrm.Explainer(network())
    for options, text in (
        ({"explained": -1}, "a class is its number"),
        ({"target": "best"}, "'predicted', 'true' or the class itself"),
        ({"target": 2}, "'predicted', 'true' or the class itself"),
        ({"method": "kmeans"}, "method is one of"),
        ({"embedding": "pca"}, "embedding is one of"),
        ({"method": "hdbscan", "clusters": 3}, "leave `clusters` out"),
        ({"clusters": 1}, "two or more"),
        ({"most": 3}, "most is at least"),
        ({"side": 0}, "side is at least"),
    ):
        with pytest.raises(InputError, match=text):
            strategies(explainer, (x, y), **{"explained": 1, **options})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has 0 samples"):
        strategies(explainer, (x, torch.zeros(70, dtype=torch.long)), 1, target="true")
    pytest.importorskip("sklearn")
    try:
        import umap  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(QueryError, match="pip install umap-learn"):
            strategies(explainer, (x, y), 1, target="true", embedding="umap")


# -- a watermark -----------------------------------------------------------------------------------


def digits(share: float) -> tuple[Tensor, Tensor, Tensor]:
    """scikit-learn's digits in 12 x 12 pixels, some of one class with a mark at the upper edge.

    Arguments:
        share: of that class.

    Returns:
        pictures, classes, and which have the mark.
    """
    given = load_digits()
    x = F.pad(torch.tensor(given.images, dtype=torch.float32)[:, None] / 16, (2, 2, 2, 2))
    y = torch.tensor(given.target)
    generator = torch.Generator().manual_seed(0)
    marked = (y == CLASS) & (torch.rand(len(y), generator=generator) < share)
    x[marked, :, 0:2, 9:12] = 1.0
    return x, y, marked


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """A small network that knows them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(12):
            for some in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[some]), y[some]).backward()
                optimizer.step()
    model.eval()
    assert (model(x).argmax(1) == y).float().mean() > 0.98
    return model


def test_a_planted_watermark_is_the_first_cluster() -> None:
    x, y, marked = digits(0.3)
    model = trained(x, y)
    explainer = nrm.Explainer(model)
    found = strategies(explainer, (x, y), CLASS)
    first = marked.numpy()[found.samples[found.found[0].rows]]
    others = np.setdiff1d(np.arange(len(found.samples)), found.found[0].rows)
    assert first.mean() > 0.95
    assert marked.numpy()[found.samples[others]].mean() < 0.05
    assert found.found[0].stands_out
    # And it is at the mark that its samples are recognised.
    typical = found.typical(explainer, as_source((x, y)), 0, 5)
    for heatmap in typical.heatmaps:
        size = heatmap.abs().sum(0)
        assert float(size[0:3, 8:12].sum() / size.sum()) > 0.2
    figure = pictures.strategies(found, explainer, as_source((x, y)), k=3, title="eights")
    assert len(figure.subfigs) == 2


def test_without_a_watermark_no_cluster_stands_out() -> None:
    x, y, _ = digits(0.0)
    found = strategies(nrm.Explainer(trained(x, y)), (x, y), CLASS)
    assert not found.outstanding
    assert min(one.conductance for one in found.found) > 0.08
    assert "No cluster stands out" in str(found)
