"""The commands explain, layers and demo, and those of other packages (`nrm.cli.commands`).

Torch and matplotlib are imported when a command runs, not before: `nrm --help` needs neither. They
are imported outside of `one_line_errors`, where Ctrl-C ends the process at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import nrm
from nrm.cli.commands import (
    AUTO,
    COMPOSITES,
    EPOCHS,
    IMAGENET,
    RESULT,
    TOP,
    Command,
    CommandError,
    Commands,
    arguments,
    as_text,
    one_line_errors,
    refuse_unread,
)

app = typer.Typer(
    cls=Commands,
    help="Relevance of any set of neurons of a PyTorch model, handled like a probability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SIZE = 224
TOP_FLOWS = 5
SECONDS = 60.0
MOST_NUMBERS = 2**27
"""In an input that `nrm layers` makes."""
MOST_AXES = 12


class Bias(StrEnum):
    """What becomes of biases (see `nrm.Explainer`)."""

    drop = "drop"
    input = "input"


ModelName = Annotated[
    str,
    typer.Option("--model", help="module:factory of the model, called without arguments."),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="State dict to load: .safetensors, .pt or .pth."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


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
    image: Annotated[Path, typer.Argument(help="The picture to explain.")],
    model: ModelName,
    weights: Weights = None,
    target: Annotated[
        str, typer.Option(help=f"Class to explain: its name, its index, or {TOP}.")
    ] = TOP,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers, with commas between, whose most relevant channel combinations to find; "
            "may be given several times."
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help=f"How many combinations.  [default: {TOP_FLOWS}]"),
    ] = None,
    search_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="When to stop a search that is not over, and say the gap.  "
            f"[default: {SECONDS:g}]",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help=f"Folder for the pictures and {RESULT}.")] = Path("out"),
    as_json: AsJson = False,
    composite: Annotated[
        str,
        typer.Option(
            help=f"Which rules apply: {', '.join((AUTO, *COMPOSITES))}; or one that the model's "
            "module registers."
        ),
    ] = AUTO,
    bias: Annotated[
        Bias | None,
        typer.Option(
            help="Biases neither emit nor take relevance, or are inputs; by default what the "
            "composite assumes."
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Names of the classes; line k (from 0) names class k.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=7, help=f"Side of the model's input, for the ImageNet transform.  [default: {SIZE}]"
        ),
    ] = None,
    transform: Annotated[
        str,
        typer.Option(help=f"{IMAGENET}, or module:name of what makes a picture a tensor."),
    ] = IMAGENET,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Explain a model's output for a picture: heatmaps, and which channels work together."""
    from nrm import io
    from nrm.cli import models, report

    with one_line_errors(debug):
        say = _say(quiet=as_json)
        named = _layers(layers)
        if not named:
            search = {"--top": top, "--search-seconds": search_seconds}
            refuse_unread(search, "without --layers: there is nothing to search")
        if search_seconds is not None and math.isnan(search_seconds):
            raise CommandError("--search-seconds: give a number of seconds, not nan")
        if transform != IMAGENET:
            refuse_unread({"--size": size}, f"beside --transform {transform}, which decides it")
        io.check_folder(out, "--out")
        if size is not None and size > io.LARGEST:
            raise CommandError(f"--size {size}: the largest is {io.LARGEST}")
        where = models.find_device(device)
        opened = io.read_image(image, say)
        if transform == IMAGENET:
            picture = io.imagenet(opened, SIZE if size is None else size)
        else:
            picture = io.transformed(opened, models.find_attribute(transform), transform)
        bounds = picture.bounds and (picture.bounds[0].to(where), picture.bounds[1].to(where))
        models.find_attribute(model)  # whose module may give composites names
        rules = models.find_composite(composite, bounds)
        say(f"loading {model}")
        network = models.load_model(model, weights, where)
        if weights is None:
            say("no --weights: the model is used with the weights that its factory gives it")
        picture = io.Picture(picture.x.to(where), picture.shown, picture.bounds)
        logits = models.logits_of(network, picture.x)
        names = models.find_labels(labels, len(logits))
        index = models.find_target(target, names, logits)
        made_from = {
            "image_sha256": report.file_digest(image),
            "weights": report.weights_used(network, weights),
            "transform": {"name": transform, "input": list(picture.x.shape)},
            "device": str(where),
            "versions": report.versions(model),
            "command": ["nrm", "explain", *map(as_text, arguments(ctx))],
        }
        label = names[index] if names else None
        subject = report.Subject(as_text(image), model, index, label, made_from)
        explainer = nrm.Explainer(network, rules, bias=bias.value if bias else None)
        result = report.report(
            explainer,
            picture,
            subject,
            named,
            out,
            top=TOP_FLOWS if top is None else top,
            seconds=SECONDS if search_seconds is None else search_seconds,
            say=say,
        )
        if as_json:
            typer.echo(report.to_json(result), nl=False)
        else:
            _summarise(result, report.amounts(result), out)


@app.command("layers", cls=Command)
def list_layers(
    model: ModelName,
    weights: Weights = None,
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
        x = torch.rand(_shape(input_shape), generator=torch.Generator().manual_seed(0))
        listing = nrm.Explainer(models.load_model(model, weights, where)).layers(x.to(where))
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
        print_table(heads, listing.rows())


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
        say = _say(quiet=False)
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
            _summarise(result, report.amounts(result), folder)


def _say(quiet: bool) -> Callable[[str], None]:
    """Progress, on stderr."""
    return lambda text: None if quiet else typer.echo(f"{text} …", err=True)


def _layers(given: Sequence[str] | None) -> list[str]:
    """The names in all of them, with commas between."""
    named = [name.strip() for text in given or () for name in text.split(",")]
    if given and not all(named):
        raise CommandError(
            f"--layers {','.join(given)!r}: give names of layers, e.g. 'conv1,conv2'"
        )
    return named


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


def _summarise(result: dict[str, Any], amounts: str, out: Path) -> None:
    """The short result for people."""
    what = f"class {result['target']}"
    if result["label"] is not None:
        what = f"{result['label']} ({what})"
    typer.echo(f"{result['image']}: {what}, {amounts}")
    if result["flows"]:
        layers = result["layers"]
        rows = [
            (
                str(k),
                *(str(flow["sets"][layer][0]) for layer in layers),
                f"{flow['relevance']:.4g}",
                f"{flow['share']:.2%}",
                flow["picture"],
            )
            for k, flow in enumerate(result["flows"], start=1)
        ]
        heads = ("flow", *(f"{layer} channel" for layer in layers), "relevance", "share", "picture")
        print_table(heads, rows)
    typer.echo(f"Worst cut deviation {result['worst_cut_deviation']:.1e}.")
    typer.echo(f"Pictures and {RESULT} are in {out}; begin with {out / 'overview.png'}.")


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """On a terminal as wide as that is, elsewhere as wide as the table, so that nothing breaks."""
    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(Text(head), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # text as it is: names may hold brackets
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
        console.width = console.measure(table).maximum
    console.print(table)
