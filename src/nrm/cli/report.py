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
from nrm.capture.digest import of_weights
from nrm.capture.run import Interpreter, Plan
from nrm.cli.commands import RESULT, CommandError, as_text
from nrm.cli.models import classes_of
from nrm.cli.weights import Read
from nrm.explainer import Explainer
from nrm.graph import Operation, Variable
from nrm.heads import look_through
from nrm.io import Picture, Say, check_folder, filled_at_once
from nrm.measure import Measure
from nrm.search import Flow, Flows
from nrm.sets import channels
from nrm.targets import Average, Combination, Contrast

MOST_COLUMNS = 8
"""How many flows the overview shows; every flow has a picture of its own."""
MOST_LARGEST = 5
SOFTMAX = "softmax of the logits"
INPUT, HEATMAP, OVERVIEW = "input.png", "heatmap.png", "overview.png"
_OURS = re.compile(r"(target_(\d+_)+)?(flow_\d+|heatmap|overview)\.png")
_OF_PLACES = ("avgpool", "interpolation")
"""Kinds of operations that make places of a map out of others."""
_OTHERS = ("torchvision", "numpy", "PIL", "matplotlib")


@dataclass(frozen=True)
class Target:
    """An output that is explained.

    Attributes:
        index: among the model's outputs.
        label: its name.
        alone: it is the only one.
        against: the output that it is explained against, if it is, and its name.
        map: the output is a map of classes; the mean of this one is explained,
        place: or its value there.
    """

    index: int
    label: str | None = None
    alone: bool = False
    against: int | None = None
    against_label: str | None = None
    map: bool = False
    place: tuple[int, ...] | None = None

    @property
    def title(self) -> str:
        named = "the output" if self.alone else f"class {self.index}"
        where = f" at {self.place}" if self.place else ", its mean" if self.map else ""
        title = (named if self.label is None else self.label) + where
        if self.against is None:
            return title
        return f"{title} rather than {self.against_label or f'class {self.against}'}"

    @property
    def rather_than(self) -> dict[str, Any]:
        """What a result says of the output that it is explained against, if it is."""
        if self.against is None:
            return {}
        return {"against": self.against, "against_label": self.against_label}

    @property
    def asked(self) -> int | tuple[int, ...] | Combination:
        """What an explainer is given."""
        place = self.place or ()
        if self.against is not None:
            return Contrast((self.index, *place), (self.against, *place))
        if self.map and not place:
            return Average(self.index)
        return (self.index, *place) if place else self.index

    @property
    def file(self) -> str:
        """How files of it begin, beside those of other targets."""
        return "_".join(map(str, ("target", self.index, *(self.place or ())))) + "_"


@dataclass(frozen=True)
class Subject:
    """What is explained, by name.

    Attributes:
        targets: an explanation each.
        labels: names of all outputs.
        made_from: what else the result depends on, as it stands in `result.json`.
    """

    image: str
    model: str
    targets: Sequence[Target]
    labels: Sequence[str] | None = None
    made_from: dict[str, Any] = field(default_factory=dict)


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

    Arguments:
        layers: whose most relevant channel combinations are searched, if any are named.
        top: how many of them.
        seconds: when a search ends that is not over.

    Returns:
        what `result.json` holds.
    """
    check_folder(out, "--out")
    graph = explainer.graph(picture.x)
    for layer in layers:
        graph.variable(layer)  # unknown names are refused before the long steps
    entries: list[dict[str, Any]] = []
    with filled_at_once(out, RESULT, "--out") as folder:
        for target in subject.targets:
            several = len(subject.targets) > 1
            if several:
                say(target.title)
            R = explainer(picture.x, target=target.asked)
            flows = None
            if layers:
                say(f"searching the most relevant channel combinations of {', '.join(layers)}")
                flows = R.top(*layers, k=top, seconds=seconds)
            say("checking the totals over all cuts")
            prefix = target.file if several else ""
            entries.append(_entry(R, target, flows, prefix))
            say("the heatmaps, and drawing them")
            _draw(R, picture, target, flows, [subject.model, *layers], entries[-1], prefix, folder)
        result = _result(R, subject, layers, entries)
        result["pictures"] = sorted(file.name for file in folder.iterdir())
        (folder / RESULT).write_text(to_json(result), encoding="utf-8")
        outdated = _outdated(out, result["pictures"])
    for file in outdated:
        file.unlink(missing_ok=True)
    return result


def explanations(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What `result.json` says of each target."""
    return list(result.get("explanations", [result]))


def to_json(result: Any) -> str:
    """As it stands in `result.json` and on stdout."""
    return json.dumps(result, indent=2, ensure_ascii=False) + "\n"


def lines(result: dict[str, Any]) -> list[str]:
    """What is said of each target in a line."""
    found = []
    for entry in explanations(result):
        what = "" if result["outputs"] == 1 else f"class {entry['target']}"
        if entry["label"] is not None:
            what = f"{entry['label']} ({what})" if what else entry["label"]
        if "against" in entry:
            other = entry["against_label"] or f"class {entry['against']}"
            what += f" rather than {other}"
        found.append(f"{result['image']}: {', '.join(filter(None, (what, amounts(entry))))}")
    return found


def amounts(entry: dict[str, Any]) -> str:
    """The explained value and its probability, for people."""
    value = entry["logit"]
    noun = _noun(entry)
    explained = f"logit {value:.2f}"
    if "against" in entry:
        return f"difference of {noun}s {value:.4g}"
    if noun != "logit":
        named = entry["explained"].replace("values", "value").replace("output", noun)
        explained = f"{named} {value:.4g}"
    probability, source = entry["probability"], entry["probability_from"]
    if probability is None:
        return explained
    shown = f"{probability:.4f}" if probability >= 1e-3 else f"{probability:.1e}"
    # The model does not say that its logits are those of classes of which one is right.
    return f"{SOFTMAX if source == SOFTMAX else 'probability'} {shown}, {explained}"


def _noun(entry: dict[str, Any]) -> str:
    """What the explained number is."""
    logits = entry["explained"].startswith("logits") or entry["probability_from"] == SOFTMAX
    return "logit" if logits else "value"


def probabilities(R: Measure) -> tuple[Tensor, str] | tuple[None, None]:
    """`[classes]`, the probabilities of all outputs of one sample, and where they come from.

    They are the model's own where its last function makes some, a softmax (they add up to one) or
    sigmoids (each output is a label of its own). Several outputs that no function follows may be
    the logits of a classifier, of which the softmax is taken. One number alone, and what an
    activation made, is no logit: `None`, as where a last function makes no probabilities.

    Arguments:
        R: of an output with `classes` neurons.
    """
    if R.output.dim() > 2 and R.output.numel() > 1:  # a map: probabilities are of its places
        return None, None
    output = R.output.double().reshape(-1)
    functions = _last_functions(R)
    first = functions[0] if functions else None
    logarithm = first in ("log_softmax", "log_sigmoid")
    found = output.exp() if logarithm else output
    own = "the exponential of the model's output" if logarithm else "the model's output"
    shares = bool((found >= 0).all()) and bool((found <= 1 + 1e-4).all())
    whole = len(found) > 1 and abs(float(found.sum()) - 1) < 1e-3
    if shares and (whole or first in ("sigmoid", "hardsigmoid", "log_sigmoid")):
        return found, own
    if functions or len(output) == 1 or _is_activated(R.graph.output):
        return None, None
    return output.softmax(0), SOFTMAX


def _last_functions(R: Measure) -> tuple[str, ...]:
    """The functions at the model's end, also where they are kept, the outermost first."""
    if R.graph.head is not None:
        return R.graph.head.functions
    captured = R.graph.captured
    copy, twins = torch.fx.Graph(), dict[torch.fx.Node, torch.fx.Node]()
    copy.graph_copy(captured.graph, twins)
    head = look_through(copy, [twins[x] for x in captured.inputs], twins[captured.output])
    return () if head is None else head.functions


def _is_activated(output: Variable) -> bool:
    """Whether an activation made the output, but for views."""
    producer = _made_by(output)
    return producer is not None and producer.kind == "activation"


def _made_by(output: Variable) -> Operation | None:
    """The operation that computed an output, before views of it."""
    producer = output.producer
    while producer is not None and producer.operator.moves and len(producer.operands) == 1:
        producer = producer.operands[0].producer
    return producer


def _ends(R: Measure, entry: dict[str, Any]) -> tuple[str, str]:
    """What blue and red mean.

    Shares are those of what is normalised: red is what has its sign. That is the sign of the
    explained number, but where a bias that was left out turned it round.
    """
    value, noun = entry["logit"], _noun(entry)
    shared = _without_last_bias(R)
    shared = value if shared is None else shared
    if value >= 0 and shared >= 0:
        return plot.ENDS
    words = f"lowers the {noun}", f"raises the {noun}"
    return words if shared >= 0 else words[::-1]


def _without_last_bias(R: Measure) -> float | None:
    """The explained number of one sample without the bias of the last layer; `None` where there is
    none that takes no relevance. Of a map, that may be pooled or made larger after it."""
    last = _made_by(R.graph.output)
    while last is not None and last.kind in _OF_PLACES and len(last.operands) == 1:
        last = _made_by(last.operands[0])
    if last is None or last.kind not in ("linear", "conv") or R.graph.bias_is_input:
        return None
    captured, explained = R.graph.captured, R.graph.explained
    bias = last.call.get("bias")
    if bias not in captured.constants:
        return None
    known = captured.constants | dict(zip(captured.inputs, R.forward_pass.inputs, strict=True))
    known |= {bias: torch.zeros_like(known[bias])}
    values = Interpreter(Plan.of(captured.graph, {explained}, known), known).compute()
    return float((R.output_weights() * values[explained]).sum())


def _entry(R: Measure, target: Target, flows: Flows | None, prefix: str) -> dict[str, Any]:
    """What a result says of one target."""
    found, source = probabilities(R)
    checks = R.diagnostics()
    return {
        "target": target.index,
        "label": target.label,
        **target.rather_than,
        **({"place": target.place or "mean"} if target.map else {}),
        "explained": R.explained,
        "probability": None if found is None else float(found[target.index]),
        "probability_from": source,
        "logit": float(R.scale[0]),
        "worst_cut_deviation": checks.worst_cut_deviation,
        "total_variation": float(checks.total_variation[0]),
        "search": None if flows is None else "exact" if flows.exact else "stopped",
        # How far beyond the last flow others may still be: null where nothing is known.
        "gap": flows.gap if flows is not None and math.isfinite(flows.gap) else None,
        "visited": None if flows is None else flows.visited,
        "flows": [
            {
                "sets": {layer: [channel] for layer, channel in flow.parts.items()},
                "relevance": flow.relevance,
                "share": flow.share,
                "picture": f"{prefix}flow_{k}.png",
            }
            for k, flow in enumerate(flows or (), start=1)
        ],
    }


def _result(
    R: Measure, subject: Subject, layers: Sequence[str], entries: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """All of a result: what is said of one target stands in it, of several in a list."""
    output = classes_of(R.output.double())
    found, _ = probabilities(R)
    names = subject.labels
    return {
        "image": subject.image,
        "model": subject.model,
        "layers": list(layers),
        "composite": repr(R.graph.specification),
        "bias": "input" if R.graph.bias_is_input else "drop",
        **(entries[0] if len(entries) == 1 else {"explanations": list(entries)}),
        "outputs": len(output),
        "largest": [
            {
                "target": k,
                "label": names[k] if names else None,
                "value": float(output[k]),
                "probability": None if found is None else float(found[k]),
            }
            for k in output.topk(min(MOST_LARGEST, len(output))).indices.tolist()
        ],
        **subject.made_from,
        "pictures": [],
    }


def _draw(
    R: Measure,
    picture: Picture,
    target: Target,
    flows: Flows | None,
    named: Sequence[str],
    entry: dict[str, Any],
    prefix: str,
    folder: Path,
) -> None:
    """All pictures of one explanation.

    Arguments:
        named: the model, and the layers.
    """
    everything = R.heatmap()[0]
    if everything.dim() != 3:
        raise CommandError(f"the input is no picture: its shape is {tuple(everything.shape)}")
    seen, layers = picture.shown, named[1:]
    plot.save_photo(seen, folder / INPUT)
    ends = _ends(R, entry)
    title = f"relevance for “{target.title}”"
    figure = plot.single(everything, picture=seen, title=title, ends=ends)
    plot.save(figure, folder / f"{prefix}{HEATMAP}")
    singles = _Singles(R)
    columns: list[list[plot.Panel]] = []
    for flow, found in zip(flows or (), entry["flows"], strict=True):
        joint = R.heatmap(*flow.sets)[0]
        names = " & ".join(f"{layer} channel {c}" for layer, c in flow.parts.items())
        amount = _amount(flow.relevance, flow.share)
        figure = plot.single(joint, picture=seen, title=f"{names}\n{amount}", ends=ends)
        plot.save(figure, folder / found["picture"])
        if len(columns) < MOST_COLUMNS:
            columns.append(_column(flow, joint, amount, singles))
    rows = [*layers, "jointly"] if len(layers) > 1 else layers
    facts = [
        target.title,
        amounts(entry)
        if target.alone or target.against is not None
        else f"class {target.index}, {amounts(entry)}",
        f"{named[0]}, {R.graph.specification!r}",
        f"worst cut deviation {entry['worst_cut_deviation']:.1e}, "
        f"total variation {entry['total_variation']:.4g}",
    ]
    if flows:
        how = "most relevant" if flows.exact else "most relevant found (search stopped)"
        of = "channels" if len(layers) == 1 else "channel combinations"
        facts.append(f"below: the {len(columns)} {how} {of}")
    total = plot.Panel("LRP heatmap", everything)
    figure = plot.overview(seen, total, columns, rows, facts, ends)
    plot.save(figure, folder / f"{prefix}{OVERVIEW}")


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


def _outdated(out: Path, pictures: Sequence[str]) -> list[Path]:
    """Pictures that an earlier result in the folder had and this one has not."""
    try:
        earlier = json.loads((out / RESULT).read_text(encoding="utf-8"))["pictures"]
        names = {name for name in earlier if _OURS.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError):
        return []  # no earlier result, or none of ours
    return [out / name for name in sorted(names.difference(pictures))]


# -- what a result was made from -------------------------------------------------------------------


def weights_used(model: nn.Module, file: Path | None, read: Read | None = None) -> dict[str, Any]:
    """Where a model's weights come from, and which they are.

    Without a file the factory gave them: random ones, or whatever it loaded.

    Arguments:
        read: how the file was.

    Returns:
        the file with its SHA-256, and that of the values that were used.
    """
    return {
        "source": "factory" if file is None else "file",
        "file": None if file is None else as_text(file),
        "part": None if read is None else read.part,
        "names": None if read is None else read.names,
        "sha256": None if file is None else file_digest(file),
        "values_sha256": of_weights(model),
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
