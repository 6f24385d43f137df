"""`nrm reproduce NAME`: the paper's experiments, with own figures beside the paper's."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from nrm.cli.errors import CommandError, one_line_errors
from nrm.cli.folder import check_folder, filled_at_once
from nrm.experiments.mlp.data import DIGITS
from nrm.experiments.report import PAGE, RESULT, Report
from nrm.experiments.reproduce import EXPERIMENTS, find
from nrm.experiments.request import Request
from nrm.experiments.tables import Table

KEPT = "kept"
"""The folder in `--out` that a run after an interruption goes on from."""
INCOMPLETE = 1
"""How the command ends where some of several experiments could not be run."""


def reproduce(
    name: Annotated[str, typer.Argument(help=f"Which: {', '.join(EXPERIMENTS)}.")],
    out: Annotated[Path, typer.Option(help=f"Folder for {PAGE}, its pictures and {RESULT}.")],
    data: Annotated[
        str, typer.Option(help="Folder of the data set, or 'digits': scikit-learn's.")
    ] = DIGITS,
    samples: Annotated[
        int | None, typer.Option(min=1, help="How many samples to report on.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="Two layers with a comma between; may be given several times."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights of VGG16, instead of the network in the data.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of training, choices and the bootstrap.")
    ] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help=f"Where to write {RESULT} as well.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run an experiment of the paper; the same command again goes on after an interruption."""
    with one_line_errors(debug):
        experiment = find(name)
        check_folder(out)
        for option, given in (("layers", layers), ("weights", weights)):
            if given and option not in experiment.options:
                raise CommandError(f"--{option}: {name} takes none")
        _check_json(json_file, out)
        report = experiment.run(
            Request(
                data,
                out / KEPT,
                samples,
                tuple(_layers(text) for text in layers or ()),
                weights,
                seed,
                progress=sys.stderr.isatty(),
                say=lambda line: typer.echo(line, err=True),
            )
        )
        with filled_at_once(out, last=RESULT) as folder:
            report.write(folder)
        if json_file is not None:
            _write_whole(json_file, report.as_json())
        _summarise(report)
        typer.echo(f"Pictures and {RESULT} are in {out}; begin with {out / PAGE}.")
        for part, reason in report.failures.items():
            typer.echo(f"error: {part}: {reason}", err=True)
        if report.failures:
            raise typer.Exit(INCOMPLETE)


def _check_json(file: Path | None, out: Path) -> None:
    """Refuse what would lie in the way of the report."""
    if file is None:
        return
    if file.is_dir():
        raise CommandError(f"--json {file}: it is a folder, not a file")
    if file.resolve().is_relative_to(out.resolve()) and file.resolve() != (out / RESULT).resolve():
        raise CommandError(f"--json {file}: it is in --out, where {RESULT} is written anyway")


def _layers(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    names = tuple(name.strip() for name in text.split(","))
    if len(names) < 2 or not all(names):
        raise CommandError(f"--layers {text}: give names of layers with commas between")
    return names


def _write_whole(file: Path, text: str) -> None:
    """Beside it first, so that no half of it is ever seen."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(beside, file)
    finally:
        Path(beside).unlink(missing_ok=True)


def _summarise(report: Report) -> None:
    """The facts and the tables for people."""
    typer.echo(report.title)
    for name, value in report.facts.items():
        typer.echo(f"  {name}: {value}")
    for table in report.all_tables():
        typer.echo()
        typer.echo(table.title)
        _print(table)
        if table.note:
            typer.echo(table.note)
    for note in report.notes:
        typer.echo(note)


def _print(table: Table) -> None:
    drawn = Drawn(box=None, pad_edge=False)
    for head in table.heads:
        drawn.add_column(Text(head), overflow="fold")
    for texts, _ in table.texts():
        drawn.add_row(*map(Text, texts))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
        console.width = console.measure(drawn).maximum
    console.print(drawn)
