"""`python -m nrm.experiments.mutag --data DIR --out DIR`"""

# Annotations are evaluated here, because typer reads those of the command in `main`.

import csv
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from nrm.cli.extras import needs
from nrm.experiments.mutag.relevance import experiment

PICTURE, TABLE, RESULT = "walks.png", "subgraphs.csv", "mutag.json"


def main(args: Sequence[str] | None = None) -> None:
    """The command; `args` are those of the command line unless given."""
    with needs("cli"):
        import matplotlib  # noqa: F401
        import networkx  # noqa: F401
        import safetensors  # noqa: F401
        import typer
        from rich.console import Console
        from rich.progress import Progress

        from nrm import plot
        from nrm.cli.errors import one_line_errors
        from nrm.cli.folder import check_folder, filled_at_once
        from nrm.experiments.mutag.drawing import draw

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def mutag(
        data: Annotated[
            Path, typer.Option(help="Folder of mutag.json and mutag_gin3.safetensors.")
        ],
        out: Annotated[
            Path, typer.Option(help=f"Folder for {PICTURE}, {TABLE} and {RESULT}.")
        ] = Path("mutag"),
        graphs: Annotated[
            int | None, typer.Option(min=1, help="How many molecules; by default all.")
        ] = None,
        debug: Annotated[
            bool, typer.Option("--debug", help="Show the traceback of an error.")
        ] = False,
    ) -> None:
        """Explain a graph network on MUTAG: atoms, rings and walks of atoms."""
        with one_line_errors(debug):
            check_folder(out)
            with Progress(console=Console(stderr=True), transient=True) as progress:
                bar = progress.add_task("molecules", total=graphs)
                result, drawn = experiment(data, graphs, lambda: progress.advance(bar))
            with filled_at_once(out, last=RESULT) as folder:
                plot.save(draw(drawn), folder / PICTURE)
                _write_table(result["subgraphs"], folder / TABLE)
                text = json.dumps(result, indent=1) + "\n"
                (folder / RESULT).write_text(text, encoding="utf-8")
            for line in _report(result):
                typer.echo(line)
            typer.echo(f"{PICTURE}, {TABLE} and {RESULT} are in {out}.")

    app(args=args, prog_name="python -m nrm.experiments.mutag")


def _write_table(rows: Sequence[dict[str, Any]], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["graph", "subgraph", "nodes", "relevance"])
        for row in rows:
            nodes = " ".join(map(str, row["nodes"]))
            writer.writerow([row["graph"], row["kind"], nodes, repr(row["relevance"])])


def _report(result: dict[str, Any]) -> Iterator[str]:
    """The result in a few lines."""
    logits, checks, graphs = result["logits"], result["checks"], result["graphs"]
    yield (
        f"logits: {logits['accuracy']:.1%} right, at most {logits['largest_difference']:.1g} from "
        f"those stored (of up to {logits['largest']:.3g})"
    )
    for kind in ("atom", "ring"):
        found = [row["relevance"] for row in result["subgraphs"] if row["kind"] == kind]
        if found:
            yield (
                f"{len(found)} {kind}s: relevance {min(found):.3g} to {max(found):.3g}, "
                f"median {statistics.median(found):.3g}"
            )
    yield f"{sum(graph['walks_listed'] for graph in graphs)} walks in {len(graphs)} molecules"
    names = {
        "total": "atoms and biases add up to one",
        "walks": "walks of atoms add up to the atoms",
        "parts": "walks that stay in a ring, end at its biases or leave it add up to one",
        "subgraphs": "a subgraph's query equals its walks",
    }
    for name, text in names.items():
        yield f"{text}: off by at most {checks[name]:.1e}"


if __name__ == "__main__":
    main()
