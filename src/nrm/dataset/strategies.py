"""The strategies by which a class is recognised: clusters of its samples' heatmaps (SpRAy).

Samples that are recognised by the same thing have relevance in the same places. `strategies`
explains the samples of a class, makes their heatmaps coarse and of one length, and divides them
into clusters; one that lies apart from all others is something to look at: a watermark, a border,
another kind of picture (Lapuschkin et al. 2019, "Unmasking Clever Hans predictors").

Clusters are those of the graph of nearest neighbours: the smallest eigenvectors of its normalised
Laplacian, of which the largest gap between eigenvalues says how many (von Luxburg 2007). Or those
of HDBSCAN, which leaves samples between clusters out. They come in the order of their
*conductance*: which share of the links of a cluster (or of all other samples, if those have fewer)
leads out of it; of two alike the smaller one comes first. Clusters of one kind of picture that
passes into another have many such links, a cluster of something else has hardly any. Needs
scikit-learn.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from nrm.dataset.samples import Read, Sample
from nrm.dataset.shard import Explains
from nrm.dataset.sketch import Floats, Ints
from nrm.dataset.sources import Source, as_source
from nrm.display import Progress, Shown, Table, counted
from nrm.errors import InputError, NrmError, QueryError, RelevanceWarning, TargetError, first_line
from nrm.explainer import Explainer
from nrm.measure import Measure
from nrm.methods import in_units

try:
    import scipy.linalg
    from scipy.sparse.csgraph import laplacian
    from sklearn.cluster import HDBSCAN, KMeans
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_samples
    from sklearn.neighbors import kneighbors_graph
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "clusters of heatmaps need scikit-learn: pip install 'nrm[dataset]'", name="sklearn"
    ) from error

Method = Literal["spectral", "hdbscan"]
Embedding = Literal["tsne", "umap"]

SIDE = 14
"""Heatmaps are made as coarse as this, by means."""
FEWEST = 10
"""Samples of a class, of which clusters can be made."""
NEIGHBOURS = 10
MOST = 10
"""Clusters that the gap between eigenvalues chooses from."""
STANDS_OUT = 0.07
"""The conductance below which a cluster is more than a way to divide what has no parts. Of classes
of digits without anything planted no cluster came below 0.09 (docs/dataset_pictures.md)."""
NOBODY = -1
"""The cluster of samples that are in none."""


@dataclass(frozen=True)
class Strategy:
    """One cluster.

    Attributes:
        rows: its samples, as rows of `Strategies`: the most typical first, that is those
            whose heatmap is nearest to the mean of all of them.
        conductance: the share of links between neighbours that lead out of it: 0 where it is
            alone, 1 - its share of all samples where it is no cluster at all.
        silhouette: how much nearer they are to each other than to the next cluster, from -1 to 1,
            the mean over them (Rousseeuw 1987).
        heatmap: `[side, side]`, their mean.
        share: how many of the class's samples it has, from 0 to 1.
    """

    rows: Ints
    conductance: float
    silhouette: float
    heatmap: Floats
    share: float

    @property
    def stands_out(self) -> bool:
        """Whether it is more than a way to divide what has no parts: hardly linked to the others,
        and not most of them itself."""
        return self.conductance < STANDS_OUT and self.share <= 0.5

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Typical:
    """Samples of a strategy, with their inputs and heatmaps.

    Attributes:
        samples: the most typical first.
        heatmaps: of each, shaped like its input.
    """

    samples: list[Sample]
    heatmaps: list[Tensor]


@dataclass(frozen=True, repr=False)
class Strategies(Shown):
    """Clusters of the heatmaps of a class.

    Attributes:
        explained: the class.
        samples: `[n]`, their numbers in the data set.
        names: where they are from.
        labels: their true classes, where they are known.
        heatmaps: `[n, side, side]`, coarse and of length one.
        clusters: `[n]`, the place of its strategy in `found`; `NOBODY` for none.
        found: the strategies, the one that lies furthest apart first.
        eigenvalues: of the graph's Laplacian, the smallest ones; none for HDBSCAN.
        places: `[n, 2]`, where to draw each sample, similar ones side by side.
        skipped: how many samples could not be read or explained.
        cautions: how many batches each kind of warning was given for (`nrm.errors.Cautions`).
    """

    explained: int
    samples: Ints
    names: list[str]
    labels: list[int | None]
    heatmaps: Floats
    clusters: Ints
    found: list[Strategy]
    eigenvalues: Floats
    places: Floats
    skipped: int
    cautions: dict[str, int]

    @property
    def outstanding(self) -> list[Strategy]:
        """Those that are more than a way to divide what has no parts."""
        return [one for one in self.found if one.stands_out]

    def typical(self, explainer: Explainer, source: Source, strategy: int, k: int = 6) -> Typical:
        """The most typical samples of a strategy, read and explained again.

        Arguments:
            strategy: its place in `found`.
        """
        samples, heatmaps = [], []
        for row in self.found[strategy].rows[:k]:
            sample = source.sample(int(self.samples[row]))
            if sample.error is not None:
                raise InputError(f"sample {sample.name} cannot be read any more: {sample.error}")
            samples.append(sample)
            heatmaps.append(_measure(explainer, [sample], self.explained).heatmap()[0])
        return Typical(samples, heatmaps)

    def table(self) -> Table:
        rows = [
            (str(number), str(len(one)), f"{one.conductance:.3f}", f"{one.silhouette:.2f}",
             "stands out" if one.stands_out else "",
             ", ".join(self.names[row] for row in one.rows[:3]))
            for number, one in enumerate(self.found)
        ]  # fmt: skip
        notes = []
        alone = int((self.clusters == NOBODY).sum())
        if alone:
            notes.append(f"{alone} samples are in no cluster.")
        if not self.outstanding:
            notes.append(
                f"No cluster stands out (conductance below {STANDS_OUT}): these divide samples "
                "that pass into each other."
            )
        if self.skipped:
            notes.append(f"{self.skipped} samples could not be read or explained.")
        if self.cautions:
            said = ", ".join(f"{kind} in {count} batches" for kind, count in self.cautions.items())
            notes.append(f"Warnings (docs/dataset.md): {said}.")
        return Table(
            f"Clusters of {len(self.samples)} heatmaps of class {self.explained}",
            ("cluster", "samples", "conductance", "silhouette", "", "typical"),
            rows,
            notes,
        )


def strategies(
    explainer: Explainer,
    data: Any,
    explained: int,
    *,
    target: Explains = "predicted",
    most: int = 1000,
    method: Method = "spectral",
    clusters: int | None = None,
    embedding: Embedding = "tsne",
    side: int = SIDE,
    read: Read | None = None,
    batch: int = 32,
    progress: Progress = False,
) -> Strategies:
    """Clusters of the heatmaps of one class (SpRAy).

    The same samples give the same clusters.

    Arguments:
        data, read: as for `nrm.dataset.relmax`; inputs are pictures `[C, H, W]` or `[H, W]`.
        explained: the class: the output that is explained.
        target: which samples are of it: those whose largest output it is (`"predicted"`), those
            with its label (`"true"`), or all, where it is the class itself.
        most: samples to look at; the first ones of the class, in the order of the data set.
        clusters: how many; by default as the gap between eigenvalues says. HDBSCAN finds their
            number itself.
        embedding: how `places` are found; `"umap"` needs the package umap-learn.
        side: how coarse heatmaps are made: `side` x `side`, each the mean of its pixels.
        batch: how many samples are explained at once.
        progress: whether to show it, or a function to call with how many heatmaps were made.

    Raises:
        InputError: the class has too few samples, or inputs are no pictures.
    """
    _check(explained, target, most, method, clusters, embedding, side, batch)
    source = as_source(data, read)
    kept = _Kept()
    members = itertools.islice(_members(explainer, source, explained, target, batch, kept), most)
    maps: list[Tensor] = []
    bar = counted(progress, f"samples of class {explained}", None, rate="samples/s")
    with bar as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", RelevanceWarning)  # counted
        for group in _groups(members, batch):
            maps += _coarse(explainer, group, explained, side, kept)
            advance(len(group))
    if len(maps) < FEWEST:
        why = f" ({kept.skipped} could not be, the last because: {kept.last})" if kept.last else ""
        raise InputError(
            f"class {explained} has {len(maps)} samples that could be explained{why}: clusters "
            f"need {FEWEST}"
        )
    heatmaps = torch.stack(maps).numpy()
    flat = heatmaps.reshape(len(heatmaps), -1)
    graph = _neighbours(flat)
    eigenvalues: Floats = np.empty(0)
    if method == "spectral":
        assigned, eigenvalues = _spectral(graph, clusters)
    else:
        assigned = HDBSCAN(min_cluster_size=max(5, len(flat) // 50), copy=True).fit_predict(flat)
    found, numbered = _ordered(heatmaps, graph, np.asarray(assigned, np.int64))
    samples = kept.samples
    return Strategies(
        explained,
        np.array([sample.number for sample in samples]),
        [sample.name for sample in samples],
        [sample.label for sample in samples],
        heatmaps,
        numbered,
        found,
        eigenvalues,
        _places(flat, embedding),
        kept.skipped,
        dict(sorted(kept.cautions.items())),
    )


# -- heatmaps --------------------------------------------------------------------------------------


class _Kept:
    """What is kept of the samples of a class: no inputs."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.skipped = 0
        self.last = ""
        self.cautions: Counter[str] = Counter()

    def skip(self, reason: str) -> None:
        """A sample that cannot be read or explained."""
        self.skipped, self.last = self.skipped + 1, reason


def _members(
    explainer: Explainer,
    source: Source,
    explained: int,
    target: Explains,
    batch: int,
    kept: _Kept,
) -> Iterator[Sample]:
    """The samples of the class, in the order of the data set."""
    for group in _groups(_readable(source, batch, kept), batch):
        if target == "predicted":
            classes = _predicted(explainer, group, kept)
            yield from (s for s, one in zip(group, classes, strict=True) if one == explained)
        else:
            yield from (s for s in group if target == explained or s.label == explained)


def _predicted(explainer: Explainer, group: Sequence[Sample], kept: _Kept) -> list[int | None]:
    """The largest output of each; `None` where it cannot be computed."""
    try:
        found = _measure(explainer, group, None).target
    except NrmError as error:
        if len(group) > 1:
            return [one for sample in group for one in _predicted(explainer, [sample], kept)]
        kept.skip(first_line(error))
        return [None]
    if found is None or found.dim() != 1:
        raise TargetError("classes are those of a model whose output is [batch, classes]")
    classes: list[int | None] = found.tolist()
    return classes


def _readable(source: Source, batch: int, kept: _Kept) -> Iterator[Sample]:
    """All samples that can be read, while two threads read ahead."""
    with ThreadPoolExecutor(2) as pool:
        for shard in itertools.count() if source.shards is None else range(source.shards):
            loads, some = source.read(shard), False
            while group := list(itertools.islice(loads, batch)):
                some = True
                for sample in pool.map(lambda load: load(), group):
                    if sample.error is None:
                        yield sample
                    else:
                        kept.skip(sample.error)
            if source.shards is None and not some:
                return


def _groups(samples: Iterator[Sample], batch: int) -> Iterator[list[Sample]]:
    """Samples that follow each other and are shaped alike."""
    shaped = itertools.groupby(samples, key=lambda s: [(x.shape, x.dtype) for x in s.inputs])
    for _, alike in shaped:
        while group := list(itertools.islice(alike, batch)):
            yield group


def _measure(explainer: Explainer, group: Sequence[Sample], target: int | None) -> Measure:
    tensors = (*explainer.model.parameters(), *explainer.model.buffers())
    device = next((t.device for t in tensors), torch.device("cpu"))
    columns = zip(*(sample.inputs for sample in group), strict=True)
    inputs = [torch.stack(each).to(device) for each in columns]
    return explainer(*inputs, target=target)


def _coarse(
    explainer: Explainer, group: Sequence[Sample], explained: int, side: int, kept: _Kept
) -> list[Tensor]:
    """`[side, side]` of each sample that can be explained, of length one."""
    try:
        R = _measure(explainer, group, explained)
        found = in_units(R, R.heatmap(), "logit").detach().to("cpu", torch.float64)
    except NrmError as error:
        if len(group) == 1:
            kept.skip(first_line(error))
            return []
        each = (_coarse(explainer, [sample], explained, side, kept) for sample in group)
        return [one for maps in each for one in maps]
    if found.dim() not in (3, 4):
        raise InputError(
            f"inputs are pictures [C, H, W] or [H, W], not of shape {tuple(found.shape[1:])}"
        )
    found = found.sum(1) if found.dim() == 4 else found
    high, wide = found.shape[1:]
    coarse = adaptive_avg_pool2d(found[:, None], (min(side, high), min(side, wide)))[:, 0]
    kept.cautions.update(R.forward_pass.cautions.said)
    length = coarse.flatten(1).norm(dim=1)[:, None, None]
    kept.samples += [Sample(s.number, s.name, label=s.label) for s in group]
    return list((coarse / torch.where(length == 0, 1.0, length)).unbind())


# -- clusters --------------------------------------------------------------------------------------


def _neighbours(flat: Floats) -> Floats:
    """`[n, n]`, which samples are among the nearest of each other: 0, 1/2 or 1."""
    one_way = kneighbors_graph(flat, min(NEIGHBOURS, len(flat) - 1)).toarray()
    graph: Floats = (one_way + one_way.T) / 2
    return graph


def _spectral(graph: Floats, clusters: int | None) -> tuple[Ints, Floats]:
    """The cluster of each sample, and the smallest eigenvalues of the graph's Laplacian."""
    normalised, root = laplacian(graph, normed=True, return_diag=True)
    last = min(max(MOST, clusters or 0), len(graph) - 1)
    values, vectors = scipy.linalg.eigh(normalised, subset_by_index=(0, last))
    values = values.clip(0)  # rounding
    if clusters is None:
        clusters = 2 + int(np.diff(values)[1:].argmax())  # from the gap behind the second
    spread = vectors[:, :clusters] / root[:, None]
    assigned = KMeans(clusters, n_init=10, random_state=0).fit_predict(spread)
    return np.asarray(assigned, np.int64), values


def _ordered(heatmaps: Floats, graph: Floats, assigned: Ints) -> tuple[list[Strategy], Ints]:
    """Strategies by their conductance, and of each sample which is its own."""
    flat = heatmaps.reshape(len(heatmaps), -1)
    inside = assigned != NOBODY
    met = np.unique(assigned[inside])
    silhouettes = np.zeros(len(flat))
    if 1 < len(met) < inside.sum():
        silhouettes[inside] = silhouette_samples(flat[inside], assigned[inside])
    found = []
    for one in met:
        belongs = assigned == one
        rows = np.flatnonzero(belongs)
        distance = np.linalg.norm(flat[rows] - flat[rows].mean(0), axis=1)
        rows = rows[np.argsort(distance, kind="stable")]
        away = float(graph[belongs][:, ~belongs].sum())
        links = min(float(graph[belongs].sum()), float(graph[~belongs].sum()))
        conductance = away / links if links else 1.0  # all samples are in it
        silhouette, share = float(silhouettes[rows].mean()), len(rows) / len(flat)
        found.append(Strategy(rows, conductance, silhouette, heatmaps[rows].mean(0), share))
    # Of two clusters each has the other's conductance, but for rounding: the smaller is first.
    found.sort(key=lambda one: (round(one.conductance, 9), len(one), int(one.rows.min())))
    numbered = np.full(len(flat), NOBODY, np.int64)
    for number, strategy in enumerate(found):
        numbered[strategy.rows] = number
    return found, numbered


def _places(flat: Floats, embedding: Embedding) -> Floats:
    if embedding == "umap":
        try:
            from umap import UMAP
        except ModuleNotFoundError as error:
            raise QueryError("embedding 'umap' needs umap-learn: pip install umap-learn") from error
        return np.asarray(UMAP(random_state=0).fit_transform(flat), np.float64)
    perplexity = min(30.0, (len(flat) - 1) / 3)
    found = TSNE(perplexity=perplexity, init="random", random_state=0).fit_transform(flat)
    return np.asarray(found, np.float64)


def _check(
    explained: object, target: object, most: int, method: object, clusters: int | None,
    embedding: object, side: int, batch: int,
) -> None:  # fmt: skip
    """Refuse what nothing could be made of.

    Raises:
        InputError: saying what it may be.
    """
    if isinstance(explained, bool) or not isinstance(explained, int) or explained < 0:
        raise InputError(f"a class is its number, not {explained!r}")
    if target not in ("predicted", "true", explained):
        raise InputError(f"target is 'predicted', 'true' or the class itself, not {target!r}")
    if method not in get_args(Method):
        raise InputError(f"method is one of {get_args(Method)}, not {method!r}")
    if embedding not in get_args(Embedding):
        raise InputError(f"embedding is one of {get_args(Embedding)}, not {embedding!r}")
    if method == "hdbscan" and clusters is not None:
        raise InputError("HDBSCAN finds the number of clusters itself: leave `clusters` out")
    if clusters is not None and clusters < 2:
        raise InputError(f"clusters are two or more, not {clusters!r}")
    for name, value, least in (("most", most, FEWEST), ("side", side, 1), ("batch", batch, 1)):
        if value < least:
            raise InputError(f"{name} is at least {least}, not {value!r}")
