"""`python -m nrm.experiments.recurrent --out DIR`"""

# Annotations are evaluated here, because typer reads those of the command in `main`.

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from nrm.cli.extras import needs
from nrm.experiments.recurrent.drawing import draw
from nrm.experiments.recurrent.relevance import SEEDS, STEPS, experiment
from nrm.experiments.recurrent.series import Task

PICTURE, RESULT = "recurrent.png", "recurrent.json"


def main(args: Sequence[str] | None = None) -> None:
    """The command; `args` are those of the command line unless given."""
    with needs("cli"):
        import matplotlib  # noqa: F401
        import typer
        from rich.console import Console
        from rich.progress import Progress

        from nrm import plot
        from nrm.cli.errors import one_line_errors
        from nrm.cli.folder import check_folder, filled_at_once

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def recurrent(
        out: Annotated[Path, typer.Option(help=f"Folder for {PICTURE} and {RESULT}.")] = Path(
            "recurrent"
        ),
        seeds: Annotated[int, typer.Option(min=1, help="How many networks for each task.")] = SEEDS,
        steps: Annotated[int, typer.Option(min=3, max=32, help="Length of a series.")] = STEPS,
        json_file: Annotated[
            Path | None, typer.Option("--json", help=f"Write {RESULT} also here.")
        ] = None,
        debug: Annotated[
            bool, typer.Option("--debug", help="Show the traceback of an error.")
        ] = False,
    ) -> None:
        """Train linear recurrent networks and draw their relevance over time."""
        with one_line_errors(debug):
            check_folder(out)
            with Progress(console=Console(stderr=True), transient=True) as progress:
                bar = progress.add_task("networks", total=len(Task) * seeds)
                result = experiment(seeds, steps, lambda: progress.advance(bar))
            text = json.dumps(result, indent=2) + "\n"
            with filled_at_once(out, last=RESULT) as folder:
                plot.save(draw(result), folder / PICTURE)
                (folder / RESULT).write_text(text, encoding="utf-8")
            if json_file is not None:
                _replace(json_file, text)
            for line in _report(result):
                typer.echo(line)
            typer.echo(f"{PICTURE} and {RESULT} are in {out}.")

    app(args=args, prog_name="python -m nrm.experiments.recurrent")


def _report(result: dict[str, Any]) -> Iterator[str]:
    """The result in a few lines."""
    for task, found in result["tasks"].items():
        accuracies = [network["accuracy"] for network in found["networks"]]
        reached = sum(accuracy == 1 for accuracy in accuracies)
        yield (
            f"{task}: {reached} of {len(accuracies)} networks are always right "
            f"(worst accuracy {min(accuracies):.2%})"
        )
        for method, numbers in found["methods"].items():
            at, variation = numbers["at_label_step"], numbers["total_variation"]
            yield (
                f"  {method:<13} label step: median {at['median']:.3g}, largest of all in "
                f"{numbers['largest_at_label_step']:.0%}; sum of sizes: median "
                f"{variation['median']:.3g}, at most {variation['largest']:.3g}"
            )


def _replace(file: Path, text: str) -> None:
    """Write beside, then rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(beside, file)
    finally:
        Path(beside).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
