"""`python -m nrm.experiments.additive --weights FILE --pictures DIR --out DIR`"""

# Annotations are evaluated here, because typer reads those of the command in `main`.

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from nrm.cli.extras import needs
from nrm.experiments.additive.comparison import Effect, Sample, Score, experiment
from nrm.experiments.additive.correlation import LEVEL, Mean

PICTURE, RESULT = "additive.png", "additive.json"
MODEL = "torchvision.models:squeezenet1_0"
LAYERS = "features.10,features.12"
SAMPLES = 24
_SUFFIXES = (".jpg", ".jpeg", ".png")


def main(args: Sequence[str] | None = None) -> None:
    """The command; `args` are those of the command line unless given."""
    with needs("demo"):
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
        import safetensors  # noqa: F401
        import sklearn  # noqa: F401
        import torch
        import typer
        from rich.console import Console
        from rich.progress import Progress

        from nrm import plot
        from nrm.cli.composite_names import DEFAULT, NAMES, find_composite
        from nrm.cli.errors import one_line_errors
        from nrm.cli.folder import check_folder, filled_at_once
        from nrm.cli.labels import find_labels
        from nrm.cli.models import load_model
        from nrm.experiments.additive.drawing import draw
        from nrm.explainer import Explainer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def additive(
        pictures: Annotated[Path, typer.Option(help="Folder of pictures (JPEG or PNG).")],
        weights: Annotated[
            Path | None, typer.Option(help="State dict to load: .safetensors, .pt or .pth.")
        ] = None,
        out: Annotated[Path, typer.Option(help=f"Folder for {PICTURE} and {RESULT}.")] = Path(
            "additive"
        ),
        layers: Annotated[
            str, typer.Option(help="Layers, with commas between; the first pair is drawn.")
        ] = LAYERS,
        k: Annotated[int, typer.Option("--k", min=2, help="Clusters in each layer.")] = 5,
        samples: Annotated[
            int, typer.Option(min=1, help="How many of the pictures, drawn at random.")
        ] = SAMPLES,
        seed: Annotated[
            int, typer.Option(min=0, help="Of the choice, the clusters and the bootstrap.")
        ] = 0,
        composite: Annotated[
            str, typer.Option(help=f"Which rules apply: {', '.join(NAMES)}.")
        ] = DEFAULT,
        model: Annotated[str, typer.Option(help="module:factory of the model.")] = MODEL,
        size: Annotated[int, typer.Option(min=7, help="Side of the model's input.")] = 224,
        debug: Annotated[
            bool, typer.Option("--debug", help="Show the traceback of an error.")
        ] = False,
    ) -> None:
        """Compare additive and joint relevance of clusters with what removing them does."""
        with one_line_errors(debug):
            check_folder(out)
            files = choose(pictures, samples, seed)
            network = load_model(model, weights, torch.device("cpu"))
            explainer = Explainer(network, find_composite(composite, None))
            named = [name.strip() for name in layers.split(",") if name.strip()]
            with Progress(console=Console(stderr=True), transient=True) as progress:
                bar = progress.add_task("pictures", total=len(files))
                result, drawn = experiment(
                    explainer, _read(files, size), named, k, seed, lambda: progress.advance(bar)
                )
            result = {"model": model, **result}
            means = _means(result["pairs"][0]["correlations"])
            with torch.no_grad():
                names = find_labels(None, network(drawn[0].sample.x).shape[1])
            with filled_at_once(out, last=RESULT) as folder:
                plot.save(draw(drawn, means, names), folder / PICTURE)
                text = json.dumps(result, indent=1) + "\n"
                (folder / RESULT).write_text(text, encoding="utf-8")
            for line in _report(result):
                typer.echo(line)
            typer.echo(f"{PICTURE} and {RESULT} are in {out}.")

    app(args=args, prog_name="python -m nrm.experiments.additive")


def choose(folder: Path, samples: int, seed: int) -> list[Path]:
    """Some pictures of a folder, by name; which ones is up to the seed."""
    from nrm.cli.errors import CommandError

    if not folder.is_dir():
        raise CommandError(f"--pictures {folder}: no such folder")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise CommandError(f"--pictures {folder}: it holds none of {', '.join(_SUFFIXES)}")
    random.Random(seed).shuffle(files)
    return sorted(files[:samples])


def _read(files: Sequence[Path], size: int) -> Iterator[Sample]:
    from nrm.cli.pictures import imagenet, read_image

    for file in files:
        picture = imagenet(read_image(file), size)
        yield Sample(file.stem, picture.x, picture.shown)


def _means(correlations: dict[str, Any]) -> dict[Effect, dict[Score, Mean | None]]:
    return {
        effect: {
            score: None if found is None else Mean(**found)
            for score, found in ((score, correlations[effect][score]) for score in Score)
        }
        for effect in Effect
    }


def _report(result: dict[str, Any]) -> Iterator[str]:
    """The result in a few lines."""
    yield (
        f"Pearson correlation over pairs of {result['clusters']} x {result['clusters']} clusters, "
        f"mean over pictures [{LEVEL} % bootstrap interval]"
    )
    for pair in result["pairs"]:
        yield f"{' x '.join(pair['layers'])}, {len(pair['pictures'])} pictures"
        for effect in Effect:
            parts = [f"{score} {_text(pair['correlations'][effect][score])}" for score in Score]
            parts.append(f"any additive score at most {_text(pair['additive_ceiling'][effect])}")
            parts.append(f"joint - additive {_text(pair['joint_minus_additive'][effect])}")
            parts.append(f"either - additive {_text(pair['either_minus_additive'][effect])}")
            yield f"  {effect} contribution: {', '.join(parts)}"


def _text(found: dict[str, Any] | None) -> str:
    if found is None:
        return "unknown"
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


if __name__ == "__main__":
    main()
