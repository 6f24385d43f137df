"""`nrm relmax show`, `flows` and `cluster`: what a run found, as pictures and a page.

Model and data are those that the run was made from, by its manifest, and are looked at before
anything is drawn: results of other weights or other data are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nrm.cli.commands import (
    IMAGENET,
    Command,
    CommandError,
    as_text,
    needs,
    one_line_errors,
    refuse_unread,
)
from nrm.cli.options import Debug, grouped, progress
from nrm.cli.relmax import Made, app

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nrm import Explainer
    from nrm.dataset import Results
    from nrm.display import Table
    from nrm.pages import Section

__all__ = ["app"]

INDEX = "index.html"
SHOWN = 8
"""Samples or flows, by default."""


class Quantity(StrEnum):
    """By what samples are chosen."""

    relevance = "relevance"
    activation = "activation"


class Method(StrEnum):
    """How clusters are found."""

    spectral = "spectral"
    hdbscan = "hdbscan"


class Embedding(StrEnum):
    """How the map of samples is drawn."""

    tsne = "tsne"
    umap = "umap"


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of results.")]
Out = Annotated[Path, typer.Option(help=f"Folder for the pictures and {INDEX}.")]


@dataclass(frozen=True)
class Now:
    """Where what a run was made from is by now, and how to go about it: options of all three."""

    labels: Annotated[
        Path | None, typer.Option(help="File whose line k (from 0) names class k.")
    ] = None
    data: Annotated[
        str | None, typer.Option(help="Where the data are now, if not where they were.")
    ] = None
    weights: Annotated[
        Path | None, typer.Option(help="Where the weights are now, if not where they were.")
    ] = None
    device: Annotated[
        str | None, typer.Option(help="Where to compute, if not where the run did.")
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False
    debug: Debug = False

    def names(self) -> list[str] | None:
        """Those of the classes, if they were given."""
        from nrm.io import read_labels

        return None if self.labels is None else read_labels(self.labels)

    def changed(self, made: Made) -> Made:
        """What a run was made from, where it is now."""
        weights = None if self.weights is None else str(self.weights)
        moved = {"data": self.data, "weights": weights, "device": self.device}
        return replace(made, **{name: one for name, one in moved.items() if one is not None})


@dataclass(frozen=True)
class _Opened:
    """Results, with the model and the data that they are of."""

    results: Results
    explainer: Explainer
    source: Any
    seen: Any
    labels: Sequence[str] | None

    def name(self, explained: int) -> str:
        """A class, as it stands in a title."""
        from nrm.dataset import pictures

        named = pictures.class_of(explained, self.labels)
        return named if self.labels is None else f"{named} (class {explained})"

    def facts(self, *more: tuple[str, str]) -> Table:
        """What the page says of all of it."""
        from nrm.display import Table

        manifest = self.results.manifest
        rows = [
            ("results", as_text(self.results.path.absolute())),
            ("model", str(manifest["made_from"]["made"]["model"])),
            ("rules", str(manifest["composite"])),
            ("explained", f"target {manifest['target']}"),
            *more,
        ]
        return Table("", (), rows)


@app.command("show", cls=Command)
@grouped
def show(
    folder: Folder,
    layer: Annotated[str, typer.Option(help="A layer of the run.")],
    channel: Annotated[
        list[str],
        typer.Option(help="Its channel (or the name of a part); may be given several times."),
    ],
    out: Out,
    explained: Annotated[
        int | None, typer.Option("--class", min=0, help="Only samples explained as this class.")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="How many samples.")] = SHOWN,
    by: Annotated[
        Quantity, typer.Option(help="Samples with the largest relevance, or activation.")
    ] = Quantity.relevance,
    share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Of the relevance in a cut; 0 cuts nothing (default: 0.5)."
        ),
    ] = None,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Heatmaps as shares of the channel's relevance.")
    ] = False,
    *,
    now: Now,
) -> None:
    """Draw the samples of a channel, cut to where its relevance lies."""
    _need_packages()
    with one_line_errors(now.debug):
        from nrm.dataset import pictures
        from nrm.display import Table
        from nrm.sheets import SHARE

        say = progress(quiet=now.quiet)
        opened = _opened(folder, now, say)
        results = opened.results
        parts = [_part(results, layer, text) for text in channel]
        if len(set(parts)) < len(parts):
            raise CommandError("--channel: one of them is given twice")
        drawn: list[tuple[str, str, Figure, Table]] = []
        for part in parts:
            name = results.layers[layer][part]
            say(f"heatmaps of {layer}, channel {name}")
            found = results.heatmaps(
                opened.explainer, opened.source, layer, part, by.value, k,
                explained=explained, conditional=conditional,
            )  # fmt: skip
            of = "" if explained is None else f", {opened.name(explained)}"
            title = f"{layer}, channel {name}{of}: largest {by.value}"
            figure = pictures.references(
                found, title=title, share=(SHARE if share is None else share) or None,
                seen=opened.seen, labels=opened.labels,
            )  # fmt: skip
            rows = [
                (str(place), as_text(one.name), f"{one.value:.4g}", opened.name(one.explained),
                 "" if one.label is None else opened.name(one.label), f"{one.output:.4g}")
                for place, one in enumerate(found.references, start=1)
            ]  # fmt: skip
            heads = ("", "sample", by.value, "explained", "label", "output")
            drawn.append((f"channel_{part}.png", title, figure, Table("", heads, rows)))
        facts = opened.facts(("layer", layer))
        _write(out, f"Reference samples of {layer}", facts, drawn)
        for _, title, _, table in drawn:
            typer.echo(f"{title}\n{table.text()}")


@app.command("flows", cls=Command)
@grouped
def flows(
    folder: Folder,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Two layers of the run's --joint, with a comma between (default: the first)."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder for a picture and {INDEX}; without it, the table.")
    ] = None,
    explained: Annotated[
        int | None, typer.Option("--class", min=0, help="Of this class (default: of all samples).")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="How many flows.")] = SHOWN,
    smallest: Annotated[
        bool, typer.Option("--smallest", help="The most negative ones instead.")
    ] = False,
    *,
    now: Now,
) -> None:
    """List the pairs of channels that matter most for a class, and draw them on samples."""
    _need_packages()
    with one_line_errors(now.debug):
        from nrm.dataset import open_results, pictures
        from nrm.display import Table

        if out is None:
            given = {"--data": now.data, "--weights": now.weights, "--device": now.device}
            refuse_unread(given, "without --out")
        results = open_results(folder)
        first, second = _pair(results, layers)
        found = results.flows(first, second, explained, k, smallest)
        if not found:
            raise CommandError(f"there are no joint statistics of class {explained}")
        names = now.names()
        kept = results.manifest["joint_classes"]
        if explained is not None:
            of = pictures.class_of(explained, names)
        else:  # of those classes alone whose pairs were kept
            of = "all samples" if kept is None else f"classes {', '.join(map(str, kept))}"
        title = f"{'Most negative' if smallest else 'Most relevant'} flows of {of}"
        rows = [
            (str(flow.parts[0]), str(flow.parts[1]), f"{flow.mean:.4g}", f"{flow.highest:.4g}",
             as_text(results.about(flow.sample)["name"]))
            for flow in found
        ]  # fmt: skip
        heads = (first, second, "mean", "largest", "in sample")
        table = Table("", heads, rows)
        if out is not None:
            say = progress(quiet=now.quiet)
            opened = _opened(folder, now, say)
            say("heatmaps, jointly with both channels")
            figure = pictures.flows(
                results, opened.explainer, opened.source, found, title=title, seen=opened.seen
            )
            _write(out, title, opened.facts(), [("flows.png", title, figure, table)])
        typer.echo(f"{title}\n{table.text()}")


@app.command("cluster", cls=Command)
@grouped
def cluster(
    folder: Folder,
    explained: Annotated[int, typer.Option("--class", min=0, help="The class.")],
    out: Out,
    most: Annotated[int, typer.Option(min=10, help="Samples of the class, the first ones.")] = 1000,
    method: Annotated[Method, typer.Option(help="How clusters are found.")] = Method.spectral,
    clusters: Annotated[
        int | None, typer.Option(min=2, help="How many (default: by the gap of eigenvalues).")
    ] = None,
    embedding: Annotated[
        Embedding, typer.Option(help="How the map is drawn; umap needs umap-learn.")
    ] = Embedding.tsne,
    k: Annotated[int, typer.Option("--k", min=1, help="Typical samples to draw of each.")] = 6,
    *,
    now: Now,
) -> None:
    """Divide a class by where its relevance lies (SpRAy): what stands out is worth a look."""
    _need_packages()
    with one_line_errors(now.debug):
        from nrm.dataset import pictures
        from nrm.dataset.strategies import strategies
        from nrm.display import Table

        say = progress(quiet=now.quiet)
        opened = _opened(folder, now, say)
        manifest = opened.results.manifest
        say(f"heatmaps of {opened.name(explained)}")
        found = strategies(
            opened.explainer, opened.source, explained, target=manifest["target"], most=most,
            method=method.value, clusters=clusters, embedding=embedding.value,
            batch=manifest["batch"], progress=not now.quiet,
        )  # fmt: skip
        say("typical samples, and drawing them")
        title = f"Clusters of {len(found.samples)} heatmaps of {opened.name(explained)}"
        figure = pictures.strategies(
            found, opened.explainer, opened.source, k=k, title=title, seen=opened.seen
        )
        told = found.table()
        table = Table("", told.heads, told.rows, told.notes)
        members = [
            Table(f"cluster {number}: all {len(one)}, the most typical first", ("sample",),
                  [(as_text(found.names[row]),) for row in one.rows])
            for number, one in enumerate(found.found)
        ]  # fmt: skip
        _write(out, title, opened.facts(), [("clusters.png", title, figure, table)], members)
        typer.echo(f"{title}\n{table.text()}")


def _need_packages() -> None:
    with needs("dataset"):
        import pyarrow  # noqa: F401
        import sklearn  # noqa: F401


def _opened(folder: Path, now: Now, say: Callable[[str], None]) -> _Opened:
    from nrm.dataset import open_results, pictures
    from nrm.dataset.sources import SHARD
    from nrm.io import shown

    results, names = open_results(folder), now.names()
    made = now.changed(Made.from_manifest(results.manifest))
    say(f"reading {as_text(made.data)}")
    source = made.source(results.manifest["data"].get("shard", SHARD))
    source = results.source(source)
    say(f"loading {made.model}")
    explainer = made.explainer()
    results.require(explainer)
    normalised = made.is_path and made.transform == IMAGENET  # others make their own tensors
    seen = pictures.denormalised if normalised else shown
    return _Opened(results, explainer, source, seen, names)


def _part(results: Results, layer: str, text: str) -> int:
    """The number of a part, which is given by name or number."""
    named = results.layers.get(layer, ())
    return results.part(layer, text if text in named or not text.isdecimal() else int(text))


def _pair(results: Results, layers: str | None) -> tuple[str, str]:
    if layers is None:
        if not results.pairs:
            raise CommandError(
                "the run has no joint statistics: give --joint LOWER,UPPER to nrm relmax"
            )
        return results.pairs[0]
    first, comma, second = (part.strip() for part in layers.partition(","))
    if not comma:
        raise CommandError(f"--layers {layers!r}: give two layers, e.g. 'features.9,features.10'")
    return first, second


def _write(
    out: Path,
    title: str,
    facts: Table,
    drawn: Sequence[tuple[str, str, Figure, Table]],
    more: Sequence[Table] = (),
) -> None:
    """Pictures, and a page with all of them in it: all of it, or after an error nothing."""
    from nrm import plot
    from nrm.io import filled_at_once
    from nrm.pages import Section, page

    sections: list[Section] = []
    with filled_at_once(out, INDEX, "--out") as folder:
        for file, head, figure, table in drawn:
            plot.save(figure, folder / file)
            sections.append(Section(head, (folder / file).read_bytes(), [table]))
        if more:
            sections.append(Section("All samples", None, more))
        (folder / INDEX).write_text(page(title, facts, sections), encoding="utf-8")
