"""What one relevance pass costs: from the input to the heatmap at the pixels, beside the peers.

Every method explains the same target of the same random-weight model. All are built once, warmed
up, and timed in turn within one run, so that ratios to plain forward+backward hold on a noisy
machine. Peak memory is that of one pass over what was resident before, in a process of its own.

    python benchmarks/lrp_pass.py --json lrp_pass.json --models vgg16 --batches 1,8
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nrm
from nrm import composites, rules
from nrm.torchvision_mismatch import import_torchvision

Pass = Callable[[Tensor], Tensor]
Row = dict[str, Any]

METHODS = ("forward+backward", "nrm", "zennit", "captum")
OURS = {
    "flat/gamma/epsilon": composites.EpsilonGammaFlat(),
    "flat/z+/epsilon": composites.EpsilonPlusFlat(),
    "epsilon": composites.Everywhere(rules.Epsilon(1e-6)),
}
COMPOSITES = tuple(OURS)
MODELS = ("vgg16", "resnet18")
TARGET = 0
MIB = 2**20


class NotPossibleError(Exception):
    """A method has no way to do what is asked; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """One model on one batch, and how it is measured."""

    model: str
    batch: int
    size: int
    bias_std: float

    def build(self) -> nn.Module:
        """The model with random weights, the same at every call."""
        torch.manual_seed(0)
        model: nn.Module = getattr(import_torchvision().models, self.model)(weights=None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            if name.endswith("bias") and self.bias_std:
                parameter.normal_(0.0, self.bias_std)
        return model.eval()

    def input(self) -> Tensor:
        return torch.randn(
            self.batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(1)
        )


# -- the methods: a model and a composite make a pass ----------------------------------------------


def forward_backward(model: nn.Module, composite: str) -> Pass:
    """Plain gradients of the target logit with respect to the input."""

    def run(x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x)[:, TARGET].sum(), x)
        return gradient

    return run


def nrm_pass(model: nn.Module, composite: str) -> Pass:
    explainer = nrm.Explainer(model, OURS[composite])

    def run(x: Tensor) -> Tensor:
        return explainer(x, target=TARGET).heatmap()

    run.capture = explainer.graph  # type: ignore[attr-defined]
    return run


def zennit_pass(model: nn.Module, composite: str, stabilizer: float = 1e-6) -> Pass:
    """The same rules in zennit, biases dropped alike. It hooks into the model: give it a copy."""
    import_torchvision()  # before zennit imports it
    from zennit.composites import (
        LayerMapComposite,
        SpecialFirstLayerMapComposite,
        layer_map_base,
    )
    from zennit.rules import Epsilon, Flat, Gamma, ZPlus
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer
    from zennit.types import Convolution, Linear

    canonizer = ResNetCanonizer() if type(model).__name__ == "ResNet" else VGGCanonizer()
    epsilon = Epsilon(epsilon=stabilizer, zero_params=["bias"])
    if composite != "epsilon":
        options = {"stabilizer": stabilizer, "zero_params": ["bias"]}
        convolution = Gamma(gamma=0.25, **options) if "gamma" in composite else ZPlus(**options)
        layers = [
            *layer_map_base(stabilizer),
            (Convolution, convolution),
            (nn.Linear, epsilon),
        ]
        first = [(Linear, Flat(stabilizer=stabilizer, zero_params=["bias"]))]
        chosen = SpecialFirstLayerMapComposite(layers, first, canonizers=[canonizer])
    else:
        layers = [*layer_map_base(stabilizer), (Linear, epsilon)]
        chosen = LayerMapComposite(layers, canonizers=[canonizer])
    chosen.register(model)

    def run(x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        output = model(x)
        start = torch.zeros_like(output)
        start[:, TARGET] = 1.0
        (relevance,) = torch.autograd.grad(output, x, start)
        return relevance

    run.composite = chosen  # type: ignore[attr-defined] # its hooks live as long as it does
    return run


def captum_pass(model: nn.Module, composite: str) -> Pass:
    """Captum's epsilon rule. It changes modules on the way: give it a copy of the model."""
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import EpsilonRule

    if composite != "epsilon":
        raise NotPossibleError("captum has no flat rule")
    if type(model).__name__ == "ResNet":
        raise NotPossibleError(_captum_on_resnet())
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def run(x: Tensor) -> Tensor:
        for module in weighted:  # captum takes the rules away after each pass
            module.rule = EpsilonRule(1e-6)
        heatmap: Tensor = LRP(model).attribute(x.detach().clone(), target=TARGET)
        return heatmap.detach()

    return run


BUILDERS: dict[str, Callable[[nn.Module, str], Pass]] = {
    "forward+backward": forward_backward,
    "nrm": nrm_pass,
    "zennit": zennit_pass,
    "captum": captum_pass,
}


def _captum_on_resnet() -> str:
    """What captum says to a small ResNet as torchvision builds it."""
    from captum.attr import LRP

    model = Case("resnet18", 1, 64, 0.0).build()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x = Case("resnet18", 1, 64, 0.0).input()
    try:
        total = float(LRP(model).attribute(x, target=TARGET).sum() / model(x)[0, TARGET])
    except Exception as refusal:  # whatever captum raises is its reason
        return f"captum: {type(refusal).__name__}: {str(refusal).splitlines()[0]}"
    return (
        "captum has no rule for the functional addition of a ResNet: the heatmap sums to "
        f"{total:.3g} of the output"
    )


# -- time ------------------------------------------------------------------------------------------


def measure_case(case: Case, chosen: Sequence[str], repeats: int) -> list[Row]:
    """The rows of one model and batch: every method and composite, in turn in every round."""
    model, x = case.build(), case.input()
    passes: dict[tuple[str, str], Pass] = {}
    reasons: dict[tuple[str, str], str] = {}
    for method in METHODS:
        for composite in COMPOSITES:
            if method not in chosen:
                continue
            key = (method, "" if method == METHODS[0] else composite)
            try:
                passes[key] = BUILDERS[method](copy.deepcopy(model), composite)
                passes[key](x)
            except NotPossibleError as reason:
                passes.pop(key, None)
                reasons[key] = str(reason)
    seconds = interleaved(passes, x, repeats)
    return [
        _row(case, method, composite, seconds, reasons)
        for composite in COMPOSITES
        for method in METHODS
        if method in chosen
    ]


def interleaved(
    passes: dict[tuple[str, str], Pass], x: Tensor, repeats: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every pass in every round, the order turned by one from round to round."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in passes}
    keys = list(passes)
    for turn in range(repeats):
        shift = turn % len(keys)
        for key in keys[shift:] + keys[:shift]:
            gc.collect()
            begin = time.perf_counter()
            passes[key](x)
            seconds[key].append(time.perf_counter() - begin)
    return seconds


def _row(
    case: Case,
    method: str,
    composite: str,
    seconds: dict[tuple[str, str], list[float]],
    reasons: dict[tuple[str, str], str],
) -> Row:
    key = (method, "" if method == METHODS[0] else composite)
    row: Row = {
        "model": case.model,
        "batch": case.batch,
        "composite": composite,
        "method": method,
        "ratio": None,
        "seconds": None,
        "peak_mb": None,
        "peak_warm_mb": None,
    }
    if key in reasons:
        row["reason"] = reasons[key]
        return row
    row["seconds"] = statistics.median(seconds[key])
    baseline = seconds[METHODS[0], ""]
    row["ratio"] = statistics.median(
        own / plain for own, plain in zip(seconds[key], baseline, strict=True)
    )
    return row


# -- memory: one process for each pass -------------------------------------------------------------


def add_memory(rows: Sequence[Row], case: Case) -> None:
    """Fill in the peak memory of every row that has a time."""
    known: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["seconds"] is None:
            continue
        key = (row["method"], "" if row["method"] == METHODS[0] else row["composite"])
        if key not in known:
            known[key] = _in_child(case, row["method"], row["composite"])
        row.update(known[key])


def _in_child(case: Case, method: str, composite: str) -> Row:
    order = [case.model, str(case.batch), str(case.size), str(case.bias_std), method, composite]
    threads = ["--threads", str(torch.get_num_threads())]
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *threads, "--child", json.dumps(order)],
        check=True,
        capture_output=True,
        text=True,
    )
    measured: Row = json.loads(finished.stdout.splitlines()[-1])
    return measured


def child(order: Sequence[str]) -> Row:
    """The peak of the first pass, caches included, and of a second one."""
    name, batch, size, bias_std, method, composite = order
    case = Case(name, int(batch), int(size), float(bias_std))
    model, x = case.build(), case.input()
    forward_backward(model, composite)(x)  # what torch itself sets up once is nobody's
    run = BUILDERS[method](model, composite)
    capture = getattr(run, "capture", None)
    if capture is not None:
        capture(x)
    return {
        "peak_mb": peak_over_resident(lambda: run(x)),
        "peak_warm_mb": peak_over_resident(lambda: run(x)),
    }


def peak_over_resident(work: Callable[[], object]) -> float:
    """MiB that `work` needed at its peak, over what was resident before it."""
    gc.collect()
    _trim()
    before = _status("VmRSS")
    if _reset_peak():
        work()
        return _status("VmHWM") - before
    sampler = _Sampler()
    with sampler:
        work()
    return sampler.peak - before


class _Sampler:
    """The largest resident size seen every millisecond, where the kernel keeps no peak for us."""

    def __enter__(self) -> _Sampler:
        self.peak = _status("VmRSS")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, _status("VmRSS"))


def _trim() -> None:
    """Give freed memory back to the kernel, where the C library can."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> float:
    """A size from /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / MIB
    raise OSError(f"/proc/self/status has no {field}")


# -- agreement -------------------------------------------------------------------------------------


def add_agreement(rows: Sequence[Row], name: str, bias_std: float) -> None:
    """How far nrm's heatmaps are from zennit's, on a small input in double precision."""
    for row in rows:
        if row["method"] == "nrm":
            row["agreement"] = agreement(name, row["composite"], bias_std)


def agreement(name: str, composite: str, bias_std: float) -> float:
    """The largest difference of the normalised heatmaps over zennit's largest relevance.

    Zennit adds its stabilizer to every denominator where nrm adds nothing, so it is made tiny.
    """
    case = Case(name, 2, 64, bias_std)
    model, x = case.build().double(), case.input().double()
    theirs = zennit_pass(copy.deepcopy(model), composite, stabilizer=1e-15)(x)
    theirs = theirs / theirs.sum((1, 2, 3), keepdim=True)
    ours = nrm_pass(model, composite)(x)
    return float((ours - theirs).abs().max() / theirs.abs().max())


# -- the command -----------------------------------------------------------------------------------


def hardware() -> str:
    """The machine and the torch that ran this."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(rows: Sequence[Row]) -> str:
    """The rows in plain columns."""
    head = ["model", "batch", "composite", "method", "ratio", "seconds", "peak MiB", "warm MiB"]
    lines = [[*head, "vs zennit"]]
    for row in rows:
        if row["seconds"] is None:
            numbers = ["-", "-", "-", "-", row["reason"]]
        else:
            numbers = [
                f"{row['ratio']:.2f}",
                f"{row['seconds']:.3f}",
                _number(row["peak_mb"]),
                _number(row["peak_warm_mb"]),
                f"{row['agreement']:.1e}" if "agreement" in row else "",
            ]
        plain = [row["model"], str(row["batch"]), row["composite"], row["method"]]
        lines.append([*plain, *numbers])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True))
        for line in lines
    )


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.0f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--bias-std", type=float, default=0.0, help="random biases instead of 0")
    parser.add_argument("--threads", type=int, default=1, help="more than one is noisy when shared")
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks out")
    parser.add_argument("--quick", action="store_true", help="small images, batch 1, 3 rounds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_all(options: argparse.Namespace) -> list[Row]:
    """Every model and batch that was asked for."""
    chosen = [METHODS[0], *(m for m in options.methods.split(",") if m != METHODS[0])]
    batches = [1] if options.quick else [int(batch) for batch in options.batches.split(",")]
    machine, rows = hardware(), []
    for name in options.models.split(","):
        for batch in batches:
            case = Case(name, batch, 64 if options.quick else 224, options.bias_std)
            found = measure_case(case, chosen, 3 if options.quick else options.repeats)
            gc.collect()
            if not options.no_memory:
                add_memory(found, case)
            if batch == batches[0] and {"nrm", "zennit"} <= set(chosen):
                add_agreement(found, name, options.bias_std)
            rows += [{**row, "hardware": machine, "bias_std": options.bias_std} for row in found]
    return rows


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.child:
        sys.stdout.write(json.dumps(child(json.loads(options.child))) + "\n")
        return
    rows = run_all(options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
