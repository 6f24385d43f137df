"""What was found of a data set, drawn: reference samples, flows, strategies of a class.

Inputs are drawn as they are, scaled from 0 to 1; `seen` makes them what a person is to see, where
they were normalised (`denormalised` undoes the ImageNet transform).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from matplotlib.figure import Figure
from torch import Tensor

from nrm import sheets
from nrm.dataset.results import Flow, Heatmaps, Results
from nrm.dataset.sources import Source
from nrm.dataset.strategies import NOBODY, Strategies
from nrm.errors import InputError
from nrm.explainer import Explainer
from nrm.io import imagenet_bounds, shown
from nrm.methods import crp
from nrm.plot import Image
from nrm.sets import channels
from nrm.sheets import SHARE, Row, Tile

Seen = Callable[[Tensor], Image]
"""Makes an input, without a batch axis, a picture."""

MOST_CLUSTERS = 8
"""Strategies of which samples are drawn."""
SCALES = (
    "Red is relevance for the explained output, blue against it (where that is negative, the other "
    "way round); each picture is on its own scale."
)
UNITS = "Red raises the explained output, blue lowers it; each picture is on its own scale."
"""In its place, where relevance is in the units of that output."""
_NAME = 22


def denormalised(x: Tensor) -> Image:
    """What `nrm.io.imagenet` made of a picture, as it was."""
    low, high = (bound.to(x) for bound in imagenet_bounds())
    return ((x - low) / (high - low)).clamp(0, 1)


def references(
    found: Heatmaps,
    *,
    title: str = "",
    share: float | None = SHARE,
    seen: Seen = shown,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Reference samples, whole and cut to where the part's relevance lies.

    Arguments:
        found: of `Results.heatmaps`.
        share: of the relevance's size in a cut: the smallest square that holds it
            (`nrm.sheets.where`). `None`: nothing is cut.
        labels: names of classes.
    """
    titles = [
        f"{short(one.name)}\n{one.value:.3g} · {class_of(one.explained, labels)}"
        for one in found.references
    ]
    pictures = [seen(_picture(x)) for x in found.inputs]
    rows = sheets.references(titles, pictures, list(found.heatmaps), share)
    notes = [UNITS if found.scale == "logit" else SCALES]
    if share is not None:
        notes.append(f"Cut to the smallest square that holds {share:.0%} of the size of relevance.")
    return sheets.grid(rows, title, notes)


def flows(
    results: Results,
    explainer: Explainer,
    source: Source,
    found: Sequence[Flow],
    *,
    title: str = "",
    seen: Seen = shown,
) -> Figure:
    """Pairs of channels, each on the sample where its joint relevance is largest.

    Below the sample: the relevance jointly with both channels, and with either of them.

    Arguments:
        found: of `Results.flows`.
    """
    first, second = found[0].layers if found else ("", "")
    rows: dict[str, list[Tile | None]] = {name: [] for name in ("sample", "jointly", second, first)}
    for flow in found:
        about, sample = results.about(flow.sample), source.sample(flow.sample)
        if sample.error is not None:
            raise InputError(f"sample {sample.name} cannot be read any more: {sample.error}")
        R = explainer(*(x.unsqueeze(0) for x in sample.inputs), target=about["explained"])
        lower, upper = (channels(*one) for one in zip(flow.layers, flow.parts, strict=True))
        picture = seen(_picture(sample.inputs[0]))
        words = f"{flow.parts[0]} & {flow.parts[1]}: {flow.mean:.3g}\n{short(sample.name)}"
        rows["sample"].append(Tile(picture, title=words))
        for name, sets in (("jointly", (lower, upper)), (second, (upper,)), (first, (lower,))):
            rows[name].append(Tile(picture, crp(R, *sets)[0]))
    notes = [
        "Above: channels, their mean joint relevance, and the sample where it is largest.",
        SCALES,
    ]
    return sheets.grid([Row(name, tiles) for name, tiles in rows.items()], title, notes)


def strategies(
    found: Strategies,
    explainer: Explainer,
    source: Source,
    *,
    k: int = 6,
    title: str = "",
    seen: Seen = shown,
) -> Figure:
    """The clusters of a class as a map, and typical samples of each with their heatmaps.

    Arguments:
        k: how many samples of each.
    """
    rows = []
    for number, one in enumerate(found.found[:MOST_CLUSTERS]):
        typical = found.typical(explainer, source, number, k)
        mean = Tile(
            None, one.heatmap, title=f"mean of {len(one)}\nconductance {one.conductance:.3f}"
        )
        pictures: list[Tile | None] = [mean]
        heatmaps: list[Tile | None] = [None]
        for sample, heatmap in zip(typical.samples, typical.heatmaps, strict=True):
            picture = seen(_picture(sample.inputs[0]))
            pictures.append(Tile(picture, title=short(sample.name)))
            heatmaps.append(Tile(picture, heatmap))
        rows += [Row(f"cluster {number}", pictures), Row("relevance", heatmaps)]
    notes = [SCALES]
    if len(found.found) > MOST_CLUSTERS:
        notes.append(f"{len(found.found) - MOST_CLUSTERS} more clusters are not drawn.")
    if (found.clusters == NOBODY).any():
        notes.append("Grey samples are in no cluster.")
    return sheets.clustered(rows, found.places, found.clusters, found.eigenvalues, title, notes)


def short(name: str) -> str:
    """The end of a sample's name, to stand above a picture."""
    last = PurePosixPath(name).name
    return last if len(last) <= _NAME else f"…{last[1 - _NAME :]}"


def class_of(number: int, labels: Sequence[str] | None) -> str:
    """A class by its name, where it has one."""
    return labels[number] if labels and number < len(labels) else f"class {number}"


def _picture(x: Tensor) -> Tensor:
    if x.dim() not in (2, 3):
        raise InputError(f"inputs are pictures [C, H, W] or [H, W], not of shape {tuple(x.shape)}")
    return x if x.dim() == 3 else x[None]
