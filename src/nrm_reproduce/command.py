"""`nrm reproduce NAME`: the experiments by name, with own figures beside the paper's.

The command is found by its entry point in the group `nrm.commands`. This file imports no experiment
and nothing that the library does not need, so that `nrm --help` is quick and runs without the
extra `nrm[reproduce]`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nrm.cli.app import print_table
from nrm.cli.commands import CommandError, needs, one_line_errors, out_of_memory
from nrm.errors import InputError, NrmError, one_line

if TYPE_CHECKING:
    from nrm_reproduce.report import Experiment, Report, Request, Table

EXPERIMENTS = {
    "mlp-mnist": "mlp:EXPERIMENT",
    "cnn-channels": "cnn:CNN_CHANNELS",
    "cnn-clusters": "cnn:CNN_CLUSTERS",
    "rnn": "recurrent:EXPERIMENT",
    "additive": "additive:EXPERIMENT",
    "rules": "rules:EXPERIMENT",
    "bounds": "bounds:EXPERIMENT",
    "mutag": "mutag:EXPERIMENT",
    "tracr": "tracr:EXPERIMENT",
    "circuits": "circuits:EXPERIMENT",
    "networks": "across_networks:EXPERIMENT",
}
"""Where each is, in this package."""
ALL = "all"
"""The paper's experiments one after the other: all but those on graphs and on circuits, which have
data of their own kind, and on many networks, which takes long."""
OF_ALL = tuple(
    name for name in EXPERIMENTS if name not in ("mutag", "tracr", "circuits", "networks")
)
KEPT = "kept"
"""The folder in `--out` that a run after an interruption goes on from."""
INCOMPLETE = 1
"""How the command ends where some of several experiments could not be run."""

_CPU = "cpu"
_DIGITS, _PAGE, _RESULT = "digits", "report.html", "result.json"  # as data.py and report.py say
_REASONS = (NrmError, OSError, MemoryError, ImportError)
"""For which, and for want of memory, an experiment may fail without the others failing too."""


def reproduce(
    name: Annotated[str, typer.Argument(help=f"Which: {', '.join((*EXPERIMENTS, ALL))}.")],
    out: Annotated[Path, typer.Option(help=f"Folder for {_PAGE}, its pictures and {_RESULT}.")],
    data: Annotated[
        str, typer.Option(help="Folder of the data set, or 'digits': scikit-learn's.")
    ] = _DIGITS,
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
    model: Annotated[
        Path | None, typer.Option(help="Folder of a language model of transformers, for circuits.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where that, networks or bounds run: cpu, cuda, …")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Which of several networks, with commas between.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="Do this part of the work alone: 1/4 is the first of four."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of training, choices and the bootstrap.")
    ] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help=f"Where to write {_RESULT} as well.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run an experiment of the paper; the same command again goes on after an interruption."""
    from nrm import io

    with one_line_errors(debug):
        experiment = find(name)
        io.check_folder(out, "--out")
        given_ones = {
            "layers": layers,
            "weights": weights,
            "model": model,
            "device": device,
            "only": only,
            "part": part,
        }
        for option, given in given_ones.items():
            if given and option not in experiment.options:
                raise CommandError(f"--{option}: {name} takes none")
        _check_json(json_file, out)
        report = experiment.run(
            _request(
                data,
                out / KEPT,
                samples,
                tuple(_layers(text) for text in layers or ()),
                weights,
                seed,
                model,
                device or _CPU,
                tuple(name.strip() for name in (only or "").split(",") if name.strip()),
                None if part is None else _part(part),
            )
        )
        with io.filled_at_once(out, _RESULT, "--out") as folder:
            report.write(folder)
        if json_file is not None:
            io.write_text(json_file, report.as_json())
        _summarise(report)
        typer.echo(f"Pictures and {_RESULT} are in {out}; begin with {out / _PAGE}.")
        for part, reason in report.failures.items():
            typer.echo(f"error: {part}: {reason}", err=True)
        if report.failures:
            raise typer.Exit(INCOMPLETE)


def find(name: str) -> Experiment:
    """The experiment of a name, imported now.

    Raises:
        InputError: there is none.
    """
    with needs("reproduce"):
        from nrm_reproduce.report import Experiment

        if name == ALL:
            return Experiment(ALL, lambda request: run_all([find(one) for one in OF_ALL], request))
        if name in EXPERIMENTS:
            module, _, attribute = EXPERIMENTS[name].partition(":")
            found: Experiment = getattr(import_module(f"nrm_reproduce.{module}"), attribute)
            return found
    known = (*EXPERIMENTS, ALL)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise InputError(f"no experiment is called {name!r}.{hint} There is: {', '.join(known)}.")


def run_all(experiments: Sequence[Experiment], request: Request) -> Report:
    """Run those that can be run, each in a folder of its own, and say why the others cannot."""
    from nrm_reproduce.report import Report, versions

    parts: list[Report] = []
    failures: dict[str, str] = {}
    for experiment in experiments:
        own = _own(request, experiment.name)
        try:
            parts.append(experiment.run(own))
        except Exception as error:
            if not (isinstance(error, _REASONS) or out_of_memory(error)):
                raise
            failures[experiment.name] = one_line(error)
            own.say(f"failed: {failures[experiment.name]}")
    names = [experiment.name for experiment in experiments]
    return Report(
        ALL,
        "The paper's experiments",
        [row for part in parts for row in part.rows],
        facts={
            "data": request.data,
            "experiments": f"{len(parts)} of {len(names)}",
            "seed": request.seed,
            "versions": versions(),
        },
        notes=("How a row is to be read, and beside what, is on the page of its experiment.",),
        heading="Correlation of relevance with contribution",
        tables=[
            *(
                replace(table, title=f"{part.experiment}: {table.title}")
                for part in parts
                for table in part.tables
            ),
            _outcomes(names, parts, failures),
        ],
        parts=parts,
        failures=failures,
    )


def _own(request: Request, name: str) -> Request:
    """The same for one experiment, which keeps things in a folder of its own."""
    return replace(
        request, kept=request.kept / name, say=lambda line: request.say(f"{name}: {line}")
    )


def _outcomes(names: Sequence[str], parts: Sequence[Report], failures: Mapping[str, str]) -> Table:
    from nrm_reproduce.report import Table

    titles = {part.experiment: part.title for part in parts}
    lines = [
        (name, "failed", failures[name]) if name in failures else (name, "done", titles[name])
        for name in names
    ]
    return Table("Experiments", ("experiment", "outcome", "what it is, or why it failed"), lines)


def _request(
    data: str,
    kept: Path,
    samples: int | None,
    layers: tuple[tuple[str, ...], ...],
    weights: Path | None,
    seed: int,
    model: Path | None,
    device: str,
    only: tuple[str, ...],
    part: tuple[int, int] | None,
) -> Request:
    from nrm_reproduce.report import Request

    return Request(
        data,
        kept,
        samples,
        layers,
        weights,
        seed,
        model,
        device,
        only,
        part,
        progress=sys.stderr.isatty(),
        say=lambda line: typer.echo(line, err=True),
    )


def _check_json(file: Path | None, out: Path) -> None:
    """Refuse what would lie in the way of the report."""
    if file is None:
        return
    if file.is_dir():
        raise CommandError(f"--json {file}: it is a folder, not a file")
    if file.resolve().is_relative_to(out.resolve()) and file.resolve() != (out / _RESULT).resolve():
        raise CommandError(f"--json {file}: it is in --out, where {_RESULT} is written anyway")


def _layers(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    names = tuple(name.strip() for name in text.split(","))
    if len(names) < 2 or not all(names):
        raise CommandError(f"--layers {text}: give names of layers with commas between")
    return names


def _part(text: str) -> tuple[int, int]:
    """Which of how many parts."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise CommandError(f"--part {text}: give which of how many, such as 1/4")
    return int(number), int(of)


def _summarise(report: Report) -> None:
    """The facts and the tables for people."""
    typer.echo(report.title)
    for name, value in report.facts.items():
        typer.echo(f"  {name}: {value}")
    for table in report.all_tables():
        typer.echo(f"\n{table.title}")
        print_table(table.shown())
    for note in report.notes:
        typer.echo(note)
