"""The figure of one picture: its most relevant pairs, with a heatmap of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nrm import plot
from nrm.experiments.cnn.layers import Pair
from nrm.experiments.cnn.plan import Plan
from nrm.experiments.cnn.study import Shown
from nrm.experiments.cnn.walks import PAPERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = 5


def draw_pairs(shown: Shown, plan: Plan, layers: Pair, names: Sequence[str] | None) -> Figure:
    """The photo with its heatmap; below, for each pair, the heatmap of each set and of both.

    Arguments:
        names: of the classes.
    """
    R = shown.R
    columns = [_column(shown, plan, *pair) for pair in shown.top(PAIRS)]
    what = f"class {shown.number}" if names is None else names[shown.number].split(",")[0]
    return plot.overview(
        shown.photo.shown,
        plot.Panel("all of the relevance", R.heatmap()[0]),
        columns,
        (*map(_short, layers), "both"),
        (
            what,
            f"explained: its logit, {float(R.scale):.1f}",
            f"columns: the most relevant pairs of {plan.part}s of",
            *layers,
            "titles: relevance; contribution, both in logits",
        ),
    )


def _short(layer: str) -> str:
    """The end of an address that has a name, to stand beside a row of heatmaps."""
    name = layer.rpartition(".")[2]
    return layer if name.isdigit() else name


def _column(shown: Shown, plan: Plan, i: int, j: int) -> list[plot.Panel]:
    """What flows through each set of a pair, and through both."""
    R, (first, second) = shown.R, shown.families.sets
    scale = float(R.scale)
    relevance = shown.scores[PAPERS.key][i, j]
    titles = (
        f"{plan.part} {i}: {float(R(first[i])) * scale:.2f}",
        f"{plan.part} {j}: {float(R(second[j])) * scale:.2f}",
        f"{float(relevance):.2f}; {float(shown.contribution[i, j]):.2f}",
    )
    heatmaps = R.heatmaps([first[i], second[j], [first[i], second[j]]])[:, 0]
    return [plot.Panel(title, one) for title, one in zip(titles, heatmaps, strict=True)]
