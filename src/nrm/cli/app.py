"""The commands explain, layers, tokens and demo, and those of other packages (`nrm.cli.commands`).

Torch and matplotlib are imported when a command runs, not before: `nrm --help` needs neither. They
are imported outside of `one_line_errors`, where Ctrl-C ends the process at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import nrm
from nrm.cli import explore as explorer
from nrm.cli import relmax_pictures
from nrm.cli.commands import (
    AUTO,
    COMPOSITES,
    EPOCHS,
    IMAGENET,
    REFUSED,
    RESULT,
    SECOND,
    TOP,
    Command,
    CommandError,
    Commands,
    arguments,
    as_text,
    composites_beginning,
    one_line_errors,
    refuse_unread,
)
from nrm.cli.options import (
    AsJson,
    BiasChoice,
    CompositeName,
    Debug,
    Device,
    Head,
    HeadChoice,
    ModelName,
    OutputName,
    Weights,
    WeightsPart,
    check_part,
    named_layers,
    progress,
)
from nrm.display import Table

app = typer.Typer(
    cls=Commands,
    help="Relevance of any set of neurons of a PyTorch model, handled like a probability.",
    epilog="Exit codes: 0 done; 2 something given was refused, or some of several pictures; "
    "1 an error that nobody foresaw, with its traceback; 130 interrupted (Ctrl-C); 143 told to "
    "end (SIGTERM). "
    "In the last two nothing half done is left, and what was finished is kept.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

SIZE = 224
TOP_FLOWS = 5
SECONDS = 60.0
MOST_NUMBERS = 2**27
"""In an input that `nrm layers` makes."""
MOST_AXES = 12


app.add_typer(relmax_pictures.app, name="relmax")
app.command("explore", cls=Command)(explorer.explore)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nrm {nrm.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(cls=Command)
def explain(
    ctx: typer.Context,
    pictures: Annotated[
        list[Path], typer.Argument(help="Pictures to explain, and folders of them.")
    ],
    model: ModelName,
    weights: Weights = None,
    weights_part: WeightsPart = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Class to explain: its name, its index, or {TOP}; given several times, an "
            f"explanation of each (default: {TOP})."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Explain the difference to the logit of another class, by name or index, or to "
            f"{SECOND}, the likeliest other one."
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers, with commas between, whose most relevant channel combinations to find; "
            "may be given several times."
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help=f"How many combinations (default: {TOP_FLOWS})."),
    ] = None,
    search_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help=f"When to stop a search that is not over, and say the gap (default: {SECONDS:g}).",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help=f"Folder for what is drawn and {RESULT}; of several pictures, for a folder each "
            "and the index over all."
        ),
    ] = Path("out"),
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Of several pictures, explain also those whose results are there."
        ),
    ] = False,
    as_json: AsJson = False,
    composite: CompositeName = AUTO,
    bias: BiasChoice = None,
    output: OutputName = None,
    head: HeadChoice = Head.logits,
    labels: Annotated[
        Path | None, typer.Option(help="Names of the classes; line k (from 0) names class k.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=7, help=f"Side of the model's input, for the ImageNet transform (default: {SIZE})."
        ),
    ] = None,
    transform: Annotated[
        str,
        typer.Option(help=f"{IMAGENET}, or module:name of what makes a picture a tensor."),
    ] = IMAGENET,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Explain a model's output for pictures: heatmaps, and which channels work together."""
    from nrm import io
    from nrm.cli import models, report
    from nrm.cli import pictures as many
    from nrm.cli.task import Run, Task

    with one_line_errors(debug):
        say = progress(quiet=as_json)
        named = named_layers(layers)
        if not named:
            search = {"--top": top, "--search-seconds": search_seconds}
            refuse_unread(search, "without --layers: there is nothing to search")
        if search_seconds is not None and math.isnan(search_seconds):
            raise CommandError("--search-seconds: give a number of seconds, not nan")
        if transform != IMAGENET:
            refuse_unread({"--size": size}, f"beside --transform {transform}, which decides it")
        check_part(weights, weights_part)
        io.check_folder(out, "--out")
        if size is not None and size > io.LARGEST:
            raise CommandError(f"--size {size}: the largest is {io.LARGEST}")
        where = models.find_device(device)
        jobs = many.find(pictures, out, say)
        single = len(jobs) == 1 and jobs[0].folder == Path()
        if single:
            refuse_unread({"--again": again or None}, "for a single picture")
        task = Task(
            model=model,
            weights=weights,
            weights_part=weights_part,
            targets=target or [TOP],
            against=against,
            layers=named,
            top=TOP_FLOWS if top is None else top,
            seconds=SECONDS if search_seconds is None else search_seconds,
            composite=composite,
            bias=bias.value if bias else None,
            output=output,
            head=head.value,
            labels=labels,
            size=SIZE if size is None else size,
            transform=transform,
            device=where,
            command=["nrm", "explain", *map(as_text, arguments(ctx))],
        )
        run = Run(task, say)
        if single:
            result = run.explain(jobs[0].picture, out)
            if as_json:
                typer.echo(report.to_json(result), nl=False)
            else:
                _summarise(result, out)
            return
        index = many.Index(model, task.command, out, jobs)
        try:
            run.explain_all(index, again, _told(out, as_json))
        except BaseException:
            if index.done:
                typer.echo(f"{index.state()}; the same command goes on from there", err=True)
            raise
        if as_json:
            typer.echo(report.to_json(index.as_json()), nl=False)
        elif index.done:
            typer.echo(f"{index.state()}; begin with {as_text(out / many.PAGE)}.")
        if index.failed:
            raise typer.Exit(REFUSED)


@app.command("layers", cls=Command)
def listnamed_layers(
    model: ModelName,
    weights: Weights = None,
    weights_part: WeightsPart = None,
    output: OutputName = None,
    head: HeadChoice = Head.logits,
    input_shape: Annotated[
        str, typer.Option(help="Shape of the input, batch axis first.")
    ] = "1,3,224,224",
    as_json: AsJson = False,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """List every layer that can be named, with its shape, and whether all relevance crosses it."""
    import torch

    from nrm.cli import models, report

    with one_line_errors(debug):
        where = models.find_device(device)
        check_part(weights, weights_part)
        x = torch.rand(_shape(input_shape), generator=torch.Generator().manual_seed(0)).to(where)
        network, _ = models.loaded(model, weights, where, weights_part)
        chosen, _ = models.output_of(network, x, output, "inputs")
        listing = nrm.Explainer(network, output=chosen, head=head.value).layers(x)
        if as_json:
            rows = [
                {
                    "name": layer.name,
                    "aliases": list(layer.aliases),
                    "kind": layer.kind,
                    "module": layer.module,
                    "shape": list(layer.shape),
                    "channel_axis": layer.channel_axis,
                    "cut": layer.cut,
                }
                for layer in listing
            ]
            typer.echo(report.to_json(rows), nl=False)
            return
        heads = ("layer", "kind", "module", "shape", "cut", "also called")
        print_table(Table("", heads, listing.rows()))


@app.command("tokens", cls=Command)
def explain_tokens(
    ctx: typer.Context,
    model: Annotated[
        Path, typer.Argument(help="Folder with a model of transformers, or with a .gguf file.")
    ],
    text: Annotated[str, typer.Argument(help="The text, or the prompt.")],
    target: Annotated[
        str | None,
        typer.Option(
            help=f"Token to explain (its text, or id:5), or class (name or index), or {TOP}, the "
            f"likeliest (default: {TOP})."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Explain the difference to the logit of another token or class, or to "
            f"{SECOND}, the likeliest other one."
        ),
    ] = None,
    position: Annotated[
        int | None,
        typer.Option(
            help="Of which token the output is explained, from 0, or from -1 at the end (default: "
            "the last one, or the mask)."
        ),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            min=1, help="Go on for so many tokens, each the likeliest, and explain all of them."
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers, with commas between, whose most relevant channel combinations to find, "
            "and the tokens that these come from."
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help=f"How many combinations (default: {TOP_FLOWS}).")
    ] = None,
    composite: Annotated[
        str,
        typer.Option(
            help=f"Which rules apply: {', '.join((AUTO, *COMPOSITES))}; with parameters in "
            "brackets, 'AttnLRP()'.",
            autocompletion=composites_beginning,
        ),
    ] = AUTO,
    bias: BiasChoice = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for all numbers, in JSON.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="File for the text in colour, a page.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--png", help="File for the text in colour, a picture.")
    ] = None,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Explain a language model's output for a text: which tokens it comes from."""
    from nrm.cli import models, report, tokens

    with one_line_errors(debug):
        named = named_layers(layers)
        if not named:
            refuse_unread({"--top": top}, "without --layers: there is nothing to search")
        if generate is not None:
            given = {"--target": target, "--position": position, "--layers": named or None}
            refuse_unread(given, "beside --generate, which explains every token it makes")
        for file in (json_file, html_file, picture):
            if file is not None and file.is_dir():
                raise CommandError(f"{as_text(file)} is a folder: name a file")
        where, say = models.find_device(device), progress(quiet=False)
        rules = models.find_composite(composite, None)
        loaded = tokens.load(model, where, say)
        explainer = nrm.Explainer(
            loaded.model, rules, bias=bias.value if bias else None, output="logits"
        )
        found: Any
        if generate is not None:
            found = tokens.generate(loaded, explainer, text, generate, against, say)
        else:
            found = tokens.explain(
                loaded, explainer, text, target or TOP, against, position, named,
                TOP_FLOWS if top is None else top, SECONDS, say,
            )  # fmt: skip
        about = {
            "model": loaded.name,
            "text": text,
            "rules": composite,
            "command": ["nrm", "tokens", *map(as_text, arguments(ctx))],
            "versions": report.versions() | tokens.versions(),
        }
        tokens.write(found, about, json_file, html_file, picture)
        Console(highlight=False).print(tokens.drawn(found))


@app.command("demo", cls=Command)
def run_demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(min=1, help="How long to train.")] = EPOCHS,
    debug: Debug = False,
) -> None:
    """Train a small network on handwritten digits and explain what it makes of some."""
    from nrm import io
    from nrm.cli import demo, report

    with one_line_errors(debug):
        io.check_folder(out, "--out")
        say = progress(quiet=False)
        say("training a small network on scikit-learn's digits")
        trained = demo.trained(epochs)
        typer.echo(
            f"Trained on {trained.seen} digits in {trained.seconds:.1f} s; of {len(trained.y)} "
            f"others it recognises {trained.accuracy:.1%}."
        )
        explainer = nrm.Explainer(trained.model)
        for digit in demo.DIGITS:
            picture, subject = demo.example(trained, digit)
            folder = out / f"digit_{digit}"
            result = report.report(explainer, picture, subject, demo.LAYERS, folder, top=4, say=say)
            _summarise(result, folder)


def _told(out: Path, quiet: bool) -> Callable[[Any, dict[str, Any] | str], None]:
    """Shows what became of each of several pictures."""
    from nrm.cli import report

    def tell(job: Any, found: dict[str, Any] | str) -> None:
        if isinstance(found, str):
            typer.echo(f"error: {found}", err=True)
        elif not quiet:
            for line in report.lines(found):
                typer.echo(f"{line} → {as_text(out / job.folder)}")

    return tell


def _shape(text: str) -> list[int]:
    """The shape of an input that can be made."""
    try:
        shape = [int(part) for part in text.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise CommandError(f"--input-shape {text!r}: give positive integers, e.g. 1,3,224,224")
    if len(shape) > MOST_AXES or math.prod(shape) > MOST_NUMBERS:
        raise CommandError(
            f"--input-shape {text[:40]!r}: at most {MOST_AXES} axes and {MOST_NUMBERS:,} numbers"
        )
    return shape


def _summarise(result: dict[str, Any], out: Path) -> None:
    """The short result for people."""
    from nrm.cli.report import explanations, lines

    layers = result["layers"]
    heads = ("flow", *(f"{layer} channel" for layer in layers), "relevance", "share", "picture")
    for entry, line in zip(explanations(result), lines(result), strict=True):
        typer.echo(line)
        if entry["flows"]:
            rows = [
                (
                    str(k),
                    *(str(flow["sets"][layer][0]) for layer in layers),
                    f"{flow['relevance']:.4g}",
                    f"{flow['share']:.2%}",
                    flow["picture"],
                )
                for k, flow in enumerate(entry["flows"], start=1)
            ]
            print_table(Table("", heads, rows))
    worst = max(entry["worst_cut_deviation"] for entry in explanations(result))
    typer.echo(f"Worst cut deviation {worst:.1e}.")
    first = next(name for name in result["pictures"] if name.endswith("overview.png"))
    typer.echo(f"Pictures and {RESULT} are in {out}; begin with {out / first}.")


def print_table(table: Table) -> None:
    """On a terminal as wide as that is, elsewhere as wide as the table, so that nothing breaks."""
    drawn = table.rich()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
        console.width = console.measure(drawn).maximum
    console.print(drawn)
