"""`nrm relmax`: relevance over a data set, and what was found of one (`nrm.dataset`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from nrm.cli.commands import (
    AUTO,
    IMAGENET,
    REFUSED,
    Command,
    CommandError,
    arguments,
    as_text,
    needs,
    one_line_errors,
    refuse_unread,
)
from nrm.cli.options import (
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

if TYPE_CHECKING:
    from nrm import Explainer

LOCAL = "local"
"""A Ray cluster that is started on this machine."""
_RUN = "run"


class _RunByDefault(TyperGroup):
    """`nrm relmax --model ...` is `nrm relmax run --model ...`, and `--ray` may stand alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = [_RUN, *args]
        filled = []
        for word, following in zip(args, [*args[1:], "-"], strict=True):
            filled += [word, LOCAL] if word == "--ray" and following.startswith("-") else [word]
        found: list[str] = super().parse_args(ctx, filled)
        return found


app = typer.Typer(
    cls=_RunByDefault,
    help="Over a data set: where every channel is most relevant, and what is typical of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True)
class Made:
    """What explains a data set, and which: as a command names them, to make them anew.

    Attributes:
        data: a folder of pictures or of tar files, a tar file, or `module:factory` of a data set.
        others: as for `nrm explain`.
    """

    model: str
    weights: str | None
    weights_part: str | None
    composite: str
    bias: str | None
    output: str | None
    head: str
    data: str
    transform: str
    device: str

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Made:
        """What a run was made from.

        Raises:
            CommandError: it was not made by the command.
        """
        try:
            return cls(**manifest["made_from"]["made"])
        except (KeyError, TypeError):
            raise CommandError(
                "these results were not made by nrm relmax, and do not say which model and data "
                "they are of: use nrm.open_results(...).heatmaps(explainer, data, ...) instead"
            ) from None

    def explainer(self) -> Explainer:
        """The explainer, with its model loaded."""
        import nrm
        from nrm.cli import models
        from nrm.io import imagenet_bounds

        device = models.find_device(self.device)
        models.find_attribute(self.model)  # whose module may give composites names
        bounds = None
        if self.transform == IMAGENET:
            low, high = imagenet_bounds()
            bounds = low.to(device), high.to(device)
        composite = models.find_composite(self.composite, bounds)
        weights = None if self.weights is None else Path(self.weights)
        model, _ = models.loaded(self.model, weights, device, self.weights_part)
        output: Any = None if self.output is None else models.steps_of(self.output)
        bias: Any = self.bias
        head: Any = self.head
        return nrm.Explainer(model, composite, bias=bias, output=output, head=head)

    @property
    def is_path(self) -> bool:
        """Whether the data are files, and not a data set by its name."""
        return ":" not in self.data or Path(self.data).exists()

    def source(self, shard: int) -> Any:
        """The data set in shards."""
        from nrm.cli import models
        from nrm.dataset.sources import as_source

        read = None
        if self.transform != IMAGENET:
            read = models.find_attribute(self.transform)
        if self.is_path:
            return as_source(Path(self.data), read, shard)
        found = models.find_attribute(self.data)
        return as_source(found() if callable(found) else found, read, shard)


@app.command(_RUN, cls=Command)
def run(
    ctx: typer.Context,
    model: ModelName,
    data: Annotated[
        str,
        typer.Option(
            help="Folder of pictures (those in folders below are of that class), folder of .tar "
            "files as webdataset writes them, or module:factory of a data set."
        ),
    ],
    layers: Annotated[
        list[str], typer.Option(help="Layers, with commas between; may be given several times.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; a run that ended goes on.")],
    weights: Weights = None,
    weights_part: WeightsPart = None,
    target: Annotated[
        str, typer.Option(help="Which class to explain: predicted, true, or an index.")
    ] = "predicted",
    k: Annotated[int, typer.Option("--k", min=1, help="Samples to keep of each channel.")] = 16,
    joint: Annotated[
        list[str] | None,
        typer.Option(
            help="Two layers with a comma between, whose pairs of channels to keep the mean joint "
            "relevance of; may be given several times."
        ),
    ] = None,
    joint_classes: Annotated[
        str | None, typer.Option(help="Of which classes, with commas between (default: all).")
    ] = None,
    composite: CompositeName = AUTO,
    bias: BiasChoice = None,
    output: OutputName = None,
    head: HeadChoice = Head.logits,
    transform: Annotated[
        str,
        typer.Option(
            help=f"{IMAGENET}, or module:name of what makes a picture (or an item of the data "
            "set) a tensor, or a tensor and a label."
        ),
    ] = IMAGENET,
    batch: Annotated[int, typer.Option(min=1, help="Samples explained at once.")] = 32,
    shard: Annotated[int, typer.Option(min=1, help="Samples kept as one piece.")] = 1024,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine (default: this one).")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help=f"A Ray cluster: its address, auto, or {LOCAL} for one on this machine (which "
            "--ray alone means)."
        ),
    ] = None,
    num_gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs of a Ray task; may be a fraction.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="With which each process computes; it may change digits.")
    ] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Find where every channel of some layers is most relevant in a data set, and statistics."""
    with needs("dataset"):
        import pyarrow  # noqa: F401
    if ray is not None:
        with needs("ray"):
            import ray as _ray  # noqa: F401
    from nrm import dataset
    from nrm.cli import report

    with one_line_errors(debug):
        check_part(weights, weights_part)
        if ray is None:
            refuse_unread({"--num-gpus": num_gpus}, "without --ray")
        if joint is None:
            refuse_unread({"--joint-classes": joint_classes}, "without --joint")
        made = Made(
            model,
            None if weights is None else str(weights.absolute()),
            weights_part,
            composite,
            bias.value if bias else None,
            output,
            head.value,
            _found(data),
            transform,
            device,
        )
        say = progress(quiet=quiet)
        pairs = [_pair(text) for text in joint or ()]
        classes = None if joint_classes is None else _numbers(joint_classes)
        explained: Any = target if target in ("predicted", "true") else _number(target)
        say(f"reading {data}")
        source = made.source(shard)
        say(f"loading {model}")
        explainer = made.explainer()
        try:
            found = dataset.relmax(
                explainer,
                source,
                named_layers(layers),
                out,
                target=explained,
                k=k,
                joint=pairs,
                joint_classes=classes,
                batch=batch,
                workers=workers,
                ray={None: False, LOCAL: True}.get(ray, ray),  # type: ignore[arg-type]
                num_gpus=num_gpus or 0,
                threads=threads,
                progress=not quiet,
                made_from={
                    "made": asdict(made),
                    "command": ["nrm", "relmax", *map(as_text, arguments(ctx))],
                    "versions": report.versions(model),
                },
            )
        except KeyboardInterrupt:
            typer.echo(f"what is finished is kept in {as_text(out)}: the same command goes on")
            raise
        typer.echo(str(found))
        for _, name, reason in found.skipped[:_SHOWN]:
            typer.echo(f"skipped: {as_text(name)}: {as_text(reason)}", err=True)
        if len(found.skipped) > _SHOWN:
            where = as_text(out / "merged" / "skipped.parquet")
            typer.echo(f"and {len(found.skipped) - _SHOWN} more: {where}", err=True)
        if not found.samples:
            raise typer.Exit(REFUSED)


_SHOWN = 5


def _found(data: str) -> str:
    return str(Path(data).absolute()) if Path(data).exists() else data


def _pair(text: str) -> tuple[str, str]:
    first, comma, second = (part.strip() for part in text.partition(","))
    if not (first and comma and second) or "," in second:
        raise CommandError(f"--joint {text!r}: give two layers, e.g. 'features.9,features.10'")
    return first, second


def _number(text: str) -> int:
    if not text.isdecimal():
        raise CommandError(f"--target {text!r}: give predicted, true, or the index of a class")
    return int(text)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise CommandError(f"--joint-classes {text!r}: give indices of classes, e.g. 3,17")
    return [int(part) for part in parts]
