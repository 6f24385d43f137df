"""What `nrm explore` opens: the digits, or a model of one's own with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from nrm.cli import demo, models
from nrm.cli.commands import IMAGENET, CommandError, as_text
from nrm.cli.relmax import Made
from nrm.explainer import Explainer
from nrm.explore.kept import keep
from nrm.explore.opened import Input, Opened, Sample
from nrm.io import Picture, Say, check_folder, imagenet, read_image, read_sent, shown, transformed

EPOCHS = 6
"""For which the network of the digits is trained: it is to be there in seconds."""


def digits(say: Say, epochs: int = EPOCHS) -> Opened:
    """The network of `nrm demo`, trained for a shorter time, and a digit of each kind."""
    say("training a small network on scikit-learn's digits")
    network = demo.trained(epochs)
    inputs = []
    for digit in range(10):
        picture, _ = demo.example(network, digit)
        python = f"picture, _ = demo.example(network, {digit})\ninputs, named = (picture.x,), {{}}"
        inputs.append(Input(f"digit {digit}", (picture.x,), python, pixels=picture.shown))
    python = (
        "from nrm.cli import demo\n"
        f"network = demo.trained({epochs})\n"
        "explainer = nrm.Explainer(network.model)"
    )
    labels = [str(k) for k in range(10)]
    inputs = [*inputs[3:], *inputs[:3]]  # begins with the three, as the demo does
    return Opened("DigitNet", "picture", Explainer(network.model), inputs, python, labels)


def pictures(
    spec: str,
    weights: Path | None,
    files: list[Path],
    labels: list[str] | None,
    transform: str,
    size: int,
    composite: str,
    say: Say,
) -> Opened:
    """A model of pictures, and those that are named; others may be sent."""
    find = models.find_composite(composite, None)
    read = [_picture(file, transform, size, say) for file in files]
    say(f"loading {spec}")
    device = models.find_device("cpu")
    model: nn.Module = models.load_model(spec, weights, device)
    names = labels
    inputs = []
    for path, picture in zip(files, read, strict=True):
        python = _read_again(repr(str(path.resolve())), transform, size)
        inputs.append(Input(path.name, (picture.x,), python, pixels=picture.shown))
    if names is None:
        outputs = models.classes_of(models.output_of(model, read[0].x, None)[1])
        names = models.known_labels(len(outputs))

    def sent(data: bytes, name: str) -> Input:
        picture = _transformed(read_sent(data), transform, size)
        python = _read_again("sys.argv[1]", transform, size, "import sys\n")
        return Input(name or "sent", (picture.x,), python, pixels=picture.shown)

    chosen = "" if find is None else f", models.find_composite({composite!r}, None)"
    file = "None" if weights is None else f"Path({str(weights.resolve())!r})"
    python = (
        "from pathlib import Path\n"
        "import torch\n"
        "from nrm.cli import models\n"
        f"model = models.load_model({spec!r}, {file}, torch.device('cpu'))\n"
        f"explainer = nrm.Explainer(model{chosen})"
    )
    return Opened(spec, "picture", Explainer(model, find), inputs, python, names, sent)


def _picture(file: Path, transform: str, size: int, say: Say) -> Picture:
    return _transformed(read_image(file, say), transform, size)


def _transformed(image: Any, transform: str, size: int) -> Picture:
    if transform == IMAGENET:
        return imagenet(image, size)
    return transformed(image, models.find_attribute(transform), transform)


def _read_again(path: str, transform: str, size: int, more: str = "") -> str:
    opened = f"from pathlib import Path\n{more}from nrm import io\n"
    image = f"io.read_image(Path({path}))"
    if transform == IMAGENET:
        return f"{opened}inputs, named = (io.imagenet({image}, {size}).x,), {{}}"
    made = f"io.transformed({image}, models.find_attribute({transform!r}), {transform!r})"
    return f"{opened}from nrm.cli import models\ninputs, named = ({made}.x,), {{}}"


def results(folder: Path, say: Say, most: int = 6) -> Opened:
    """The model of an `nrm relmax` run, with samples of its data set, and those of each channel.

    Raises:
        InputError, CommandError: there is no run, or it was not made by the command.
    """
    from nrm.dataset.results import open_results
    from nrm.dataset.sources import SHARD

    found = open_results(folder)
    made = Made.from_manifest(found.manifest)
    say(f"loading {made.model}")
    explainer = made.explainer()
    found.require(explainer)
    source = made.source(found.manifest["data"].get("shard", SHARD))
    names = None
    inputs, numbers = [], range(min(most, found.samples))
    for sample in (source.sample(number) for number in numbers):
        if sample.error is not None:
            continue
        args = tuple(x.unsqueeze(0) for x in sample.inputs)
        inputs.append(Input(sample.name, args, "", pixels=shown(sample.inputs[0])))
        outputs = models.output_of(explainer.model, args[0], made.output)[1]
        names = models.known_labels(len(models.classes_of(outputs)))

    def references(layer: str, channel: int) -> list[Sample]:
        kept = found.heatmaps(explainer, source, layer, channel, k=most)
        return [
            Sample(one.name, one.value, shown(x), relevance.sum(0).cpu().numpy())
            for one, x, relevance in zip(kept.references, kept.inputs, kept.heatmaps, strict=True)
        ]

    if not inputs:
        raise CommandError(f"--results {as_text(folder)}: no sample of its data can be read")
    return Opened(
        made.model, "picture", explainer, inputs, "", names,
        references=references, referenced=list(found.layers),
    )  # fmt: skip


def keep_file(opened: Opened, file: Path, say: Say) -> None:
    """Write the explorer as one HTML file."""
    check_folder(file.parent, "--keep")
    if file.is_dir():
        raise CommandError(f"--keep {as_text(file)}: it is a folder; name a file")
    keep(opened, file, say=say)
