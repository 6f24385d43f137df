"""One explanation as a folder of pictures and a `result.json`, which says what it was made from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nrm import __version__, plot
from nrm.capture.digest import lasting
from nrm.cli.commands import RESULT, CommandError, as_text
from nrm.explainer import Explainer
from nrm.io import Picture, Say, check_folder, filled_at_once
from nrm.measure import Measure
from nrm.search import Flow, Flows
from nrm.sets import channels

MOST_COLUMNS = 8
"""How many flows the overview shows; every flow has a picture of its own."""
SIGMOID = "sigmoid of the logit"
_OTHERS = ("torchvision", "numpy", "PIL", "matplotlib")


@dataclass(frozen=True)
class Subject:
    """What is explained, by name.

    Attributes:
        made_from: what else the result depends on, as it stands in `result.json`.
    """

    image: str
    model: str
    target: int
    label: str | None = None
    made_from: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"class {self.target}" if self.label is None else self.label


def report(
    explainer: Explainer,
    picture: Picture,
    subject: Subject,
    layers: Sequence[str],
    out: Path,
    *,
    top: int = 5,
    seconds: float | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Explain one picture and write everything to a folder, complete or not at all.

    Returns:
        what `result.json` holds.
    """
    check_folder(out, "--out")
    say("capturing the model and passing the picture through it")
    R = explainer(picture.x, target=subject.target)
    for layer in layers:
        R.graph.variable(layer)  # unknown names are refused before the long steps
    say("the heatmap of all relevance")
    everything = R.heatmap()[0]
    flows = None
    if layers:
        say(f"searching the most relevant channel combinations of {', '.join(layers)}")
        flows = R.top(*layers, k=top, seconds=seconds)
    say("checking the totals over all cuts")
    checks = R.diagnostics()
    result = _result(explainer, R, subject, layers, flows)
    result["worst_cut_deviation"] = checks.worst_cut_deviation
    result["total_variation"] = float(checks.total_variation[0])
    with filled_at_once(out, RESULT, "--out") as folder:
        say("drawing")
        _draw(R, picture, everything, flows, subject, result, folder)
        result["pictures"] = sorted(file.name for file in folder.iterdir())
        (folder / RESULT).write_text(to_json(result), encoding="utf-8")
        outdated = _outdated(out, result["pictures"])
    for file in outdated:
        file.unlink(missing_ok=True)
    return result


def to_json(result: Any) -> str:
    """As it stands in `result.json` and on stdout."""
    return json.dumps(result, indent=2, ensure_ascii=False) + "\n"


def amounts(result: dict[str, Any]) -> str:
    """The explained value and its probability, for people."""
    value = result["logit"]
    explained = f"logit {value:.2f}"
    if result["explained"].startswith("values"):
        explained = f"{result['explained'].replace('values', 'value')} {value:.4g}"
    probability, source = result["probability"], result["probability_from"]
    if probability is None:
        return explained
    shown = f"{probability:.4f}" if probability >= 1e-3 else f"{probability:.1e}"
    # One number may be anything; of several, the softmax is what classifiers are trained with.
    named = source if source == SIGMOID else "probability"
    return f"{named} {shown}, {explained}"


def probability(R: Measure) -> tuple[float, str] | tuple[None, None]:
    """The probability of the explained class of one sample, and where it comes from.

    From the model's own last function if it has one, else by the one that such logits are trained
    with: `None` where the output is no probability.

    Arguments:
        R: of an output `[1, classes]`.
    """
    assert R.target is not None
    output, target = R.output[0].double(), int(R.target[0])
    head = R.graph.head
    if head is None and len(output) == 1:
        return float(torch.sigmoid(output[0])), SIGMOID
    name = None if head is None else head.functions[0]
    logarithm = name in ("log_softmax", "log_sigmoid")
    found = output.exp() if logarithm else output
    shares = bool((found >= 0).all()) and bool((found <= 1 + 1e-4).all())
    whole = abs(float(found.sum()) - 1) < 1e-3
    own = "the model's output" if not logarithm else "the exponential of the model's output"
    if shares and (whole or name in ("sigmoid", "hardsigmoid", "log_sigmoid")):
        return float(found[target]), own
    if head is not None:
        return None, None  # scaled, or no probability to begin with
    return float(torch.softmax(output, 0)[target]), "softmax of the logits"


def _result(
    explainer: Explainer,
    R: Measure,
    subject: Subject,
    layers: Sequence[str],
    flows: Flows | None,
) -> dict[str, Any]:
    chance, source = probability(R)
    return {
        "image": subject.image,
        "model": subject.model,
        "target": subject.target,
        "label": subject.label,
        "explained": R.explained,
        "probability": chance,
        "probability_from": source,
        "logit": float(R.scale[0]),
        "layers": list(layers),
        "composite": repr(R.graph.specification),
        "bias": "input" if R.graph.bias_is_input else "drop",
        "worst_cut_deviation": None,
        "total_variation": None,
        "search": None if flows is None else "exact" if flows.exact else "stopped",
        # How far beyond the last flow others may still be: null where nothing is known.
        "gap": flows.gap if flows is not None and math.isfinite(flows.gap) else None,
        "visited": None if flows is None else flows.visited,
        "flows": [
            {
                "sets": {layer: [channel] for layer, channel in flow.parts.items()},
                "relevance": flow.relevance,
                "share": flow.share,
                "picture": f"flow_{k}.png",
            }
            for k, flow in enumerate(flows or (), start=1)
        ],
        **subject.made_from,
        "pictures": [],
    }


def _draw(
    R: Measure,
    picture: Picture,
    everything: Tensor,
    flows: Flows | None,
    subject: Subject,
    result: dict[str, Any],
    folder: Path,
) -> None:
    """All pictures of one explanation."""
    if everything.dim() != 3:
        raise CommandError(f"the input is no picture: its shape is {tuple(everything.shape)}")
    seen = picture.shown
    plot.save_photo(seen, folder / "input.png")
    # Relevance is normalised by what is explained: where that is negative, red is what made it so.
    value = "value" if result["explained"].startswith("values") else "logit"
    ends = plot.ENDS if result["logit"] >= 0 else (f"raises the {value}", f"lowers the {value}")
    title = f"relevance for “{subject.title}”"
    figure = plot.single(everything, picture=seen, title=title, ends=ends)
    plot.save(figure, folder / "heatmap.png")
    singles = _Singles(R)
    columns: list[list[plot.Panel]] = []
    for flow, entry in zip(flows or (), result["flows"], strict=True):
        joint = R.heatmap(*flow.sets)[0]
        named = " & ".join(f"{layer} channel {c}" for layer, c in flow.parts.items())
        amount = _amount(flow.relevance, flow.share)
        figure = plot.single(joint, picture=seen, title=f"{named}\n{amount}", ends=ends)
        plot.save(figure, folder / entry["picture"])
        if len(columns) < MOST_COLUMNS:
            columns.append(_column(flow, joint, amount, singles))
    rows = [*result["layers"], "jointly"] if len(result["layers"]) > 1 else result["layers"]
    figure = plot.overview(
        seen,
        plot.Panel("LRP heatmap", everything),
        columns,
        rows,
        _facts(result, subject),
        ends,
    )
    plot.save(figure, folder / "overview.png")


def _column(flow: Flow, joint: Tensor, amount: str, singles: _Singles) -> list[plot.Panel]:
    """A flow in the overview: its channels one by one, then all of them jointly."""
    if len(flow.parts) == 1:
        (channel,) = flow.parts.values()
        return [plot.Panel(f"channel {channel}\n{amount}", joint)]
    panels = [singles.panel(layer, channel) for layer, channel in flow.parts.items()]
    together = " & ".join(str(channel) for channel in flow.parts.values())
    return [*panels, plot.Panel(f"{together}\n{amount}", joint)]


class _Singles:
    """Panels of single channels, each computed once."""

    def __init__(self, R: Measure) -> None:
        self._R = R
        self._relevances: dict[str, Tensor] = {}
        self._panels: dict[tuple[str, int], plot.Panel] = {}

    def panel(self, layer: str, channel: int) -> plot.Panel:
        """The heatmap of one channel."""
        if layer not in self._relevances:
            self._relevances[layer] = self._R.channels(layer)[0]
        if (layer, channel) not in self._panels:
            relevance = float(self._relevances[layer][channel])
            total = float(self._relevances[layer].sum())
            amount = _amount(relevance, relevance / total if total else 0.0)
            heatmap = self._R.heatmap(channels(layer, channel))[0]
            self._panels[layer, channel] = plot.Panel(f"channel {channel}\n{amount}", heatmap)
        return self._panels[layer, channel]


def _amount(relevance: float, share: float) -> str:
    return f"R = {relevance:#.3g}, share {share:.2%}"


def _facts(result: dict[str, Any], subject: Subject) -> list[str]:
    """What stands beside the pictures of the overview."""
    facts = [
        subject.title,
        f"class {result['target']}, {amounts(result)}",
        f"{result['model']}, {result['composite']}",
        f"worst cut deviation {result['worst_cut_deviation']:.1e}, "
        f"total variation {result['total_variation']:.4g}",
    ]
    if result["flows"]:
        shown = min(len(result["flows"]), MOST_COLUMNS)
        how = "most relevant"
        if result["search"] != "exact":
            how += " found (search stopped)"
        of = "channels" if len(result["layers"]) == 1 else "channel combinations"
        facts.append(f"below: the {shown} {how} {of}")
    return facts


def _outdated(out: Path, pictures: Sequence[str]) -> list[Path]:
    """Pictures of flows that an earlier result in the folder had and this one has not."""
    try:
        earlier = json.loads((out / RESULT).read_text(encoding="utf-8"))["pictures"]
        names = {name for name in earlier if re.fullmatch(r"flow_\d+\.png", name)}
    except (OSError, ValueError, KeyError, TypeError):
        return []  # no earlier result, or none of ours
    return [out / name for name in sorted(names.difference(pictures))]


# -- what a result was made from -------------------------------------------------------------------


def weights_used(model: nn.Module, file: Path | None) -> dict[str, Any]:
    """Where a model's weights come from, and which they are.

    Without a file the factory gave them: random ones, or whatever it loaded.

    Returns:
        the file with its SHA-256, and that of the values that were used.
    """
    return {
        "source": "factory" if file is None else "file",
        "file": None if file is None else as_text(file),
        "sha256": None if file is None else file_digest(file),
        "values_sha256": _values_digest(model),
    }


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def versions(spec: str = "") -> dict[str, str]:
    """Of Python, of nrm, and of the packages that had a part in a result.

    Arguments:
        spec: `module:factory`, whose package is one of them.
    """
    found = {
        "python": platform.python_version(),
        "nrm": __version__,
        "torch": str(torch.__version__),
    }
    for name in (*_OTHERS, spec.partition(":")[0].partition(".")[0]):
        module = sys.modules.get(name)
        version = getattr(module, "__version__", None) or (module and _installed(name))
        if version and name not in found:
            found[name] = str(version)
    return found


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def _values_digest(model: nn.Module) -> str:
    """The SHA-256 of all parameters and buffers, with their names."""
    lines = [
        f"{name} {value.dtype} {tuple(value.shape)} {lasting(value)}\n"
        for name, value in (*model.named_parameters(), *model.named_buffers())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
