"""`nrm explore`: the explorer in the browser, of the digits or of a model of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nrm.cli.commands import (
    AUTO,
    IMAGENET,
    CommandError,
    composites_beginning,
    needs,
    one_line_errors,
    refuse_unread,
)
from nrm.cli.options import Debug, Weights, progress

SIZE = 224
LOCAL = "127.0.0.1"


def explore(
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Pictures to look at (default: the digits).")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="module:factory of the model, called without arguments (default: a small network "
            "that is trained on digits).",
        ),
    ] = None,
    weights: Weights = None,
    labels: Annotated[
        Path | None, typer.Option(help="Names of the classes; line k (from 0) names class k.")
    ] = None,
    size: Annotated[
        int, typer.Option(min=7, help="Side of the model's input, for the ImageNet transform.")
    ] = SIZE,
    transform: Annotated[
        str, typer.Option(help=f"{IMAGENET}, or module:name of what makes a picture a tensor.")
    ] = IMAGENET,
    composite: Annotated[
        str,
        typer.Option(
            help="Which rules apply, as for explain.", autocompletion=composites_beginning
        ),
    ] = AUTO,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an `nrm relmax` run: its model and pictures, and for a channel the "
            "samples in which it is most relevant."
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Write one HTML file that needs no server, with the answers to single clicks, and "
            "end."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help=f"Where to listen; other computers reach only what is not {LOCAL}.")
    ] = LOCAL,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    debug: Debug = False,
) -> None:
    """Look at relevance in a browser: click on channels, flows or places, and all else follows."""
    if keep is None:
        with needs("explore"):
            import fastapi  # noqa: F401
            import uvicorn  # noqa: F401
    from nrm import io
    from nrm.cli import opening
    from nrm.explore.serving import serve

    with one_line_errors(debug):
        say = progress(quiet=False)
        if results is not None:
            given = {"PICTURES": pictures or None, "--model": model, "--weights": weights}
            refuse_unread({**given, "--labels": labels}, "beside --results, which name them")
            with needs("dataset"):
                import pyarrow  # noqa: F401
            opened = opening.results(results, say)
        elif model is None:
            given = {"PICTURES": pictures or None, "--weights": weights, "--labels": labels}
            refuse_unread(given, "without --model")
            opened = opening.digits(say)
        else:
            if not pictures:
                raise CommandError("name a picture to begin with; others can be sent in the page")
            names = None if labels is None else io.read_labels(labels)
            opened = opening.pictures(
                model, weights, pictures, names, transform, size, composite, say
            )
        if keep is not None:
            opening.keep_file(opened, keep, say)
            return
        serve(opened, host, port, browser, lambda at: typer.echo(f"{at}\n(Ctrl-C ends)"))
