"""Options that several commands have, and how they are read. Imports nothing that takes long."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from nrm.cli.commands import AUTO, COMPOSITES, CommandError, composites_beginning, refuse_unread


class Bias(StrEnum):
    """What becomes of biases (see `nrm.Explainer`)."""

    drop = "drop"
    input = "input"


class Head(StrEnum):
    """What becomes of the last function (see `nrm.Explainer`)."""

    logits = "logits"
    keep = "keep"


ModelName = Annotated[
    str,
    typer.Option("--model", help="module:factory of the model, called without arguments."),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="State dict to load, alone or in a checkpoint: .safetensors, .pt, .pth, .ckpt, ..."
    ),
]
WeightsPart = Annotated[
    str | None,
    typer.Option(help="Which part of --weights holds them, where there are several: ema, ..."),
]
OutputName = Annotated[
    str | None,
    typer.Option(
        "--output",
        help="Which output to explain, of a model with several: its name or index, or a path of "
        "these with dots between.",
    ),
]
HeadChoice = Annotated[
    Head,
    typer.Option(
        "--head",
        help="Explain the logits behind a last softmax or sigmoid, or keep it and explain the "
        "output as it is.",
    ),
]
CompositeName = Annotated[
    str,
    typer.Option(
        help=f"Which rules apply: {', '.join((AUTO, *COMPOSITES))}, or one that the model's "
        "module registers; with parameters in brackets, 'GammaFlat(0.1)'.",
        autocompletion=composites_beginning,
    ),
]
BiasChoice = Annotated[
    Bias | None,
    typer.Option(
        help="Biases neither emit nor take relevance, or are inputs; by default what the "
        "composite assumes."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, of one that takes groups of options: dataclasses, an option a field."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    kinds = {one.name: one.annotation for one in own if isinstance(one.annotation, type)}
    groups = {name: kind for name, kind in kinds.items() if is_dataclass(kind)}
    parts = {name: inspect.signature(one, eval_str=True).parameters for name, one in groups.items()}
    options = [option for o in own for option in parts.get(o.name, {o.name: o}).values()]

    @wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{part: given.pop(part) for part in parts[name]})
        command(**given)

    named = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in options]
    called.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in named}
    return called


def progress(quiet: bool) -> Callable[[str], None]:
    """Progress, on stderr."""
    return lambda text: None if quiet else typer.echo(f"{text} …", err=True)


def check_part(weights: Path | None, part: str | None) -> None:
    if weights is None:
        refuse_unread({"--weights-part": part}, "without --weights")
    if part == "":
        raise CommandError("--weights-part: name a part of the file, e.g. ema")


def named_layers(given: Sequence[str] | None) -> list[str]:
    """The names in all of them, with commas between."""
    named = [name.strip() for text in given or () for name in text.split(",")]
    if given and not all(named):
        raise CommandError(
            f"--layers {','.join(given)!r}: give names of layers, e.g. 'conv1,conv2'"
        )
    return named
