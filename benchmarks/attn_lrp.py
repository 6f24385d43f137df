"""AttnLRP on a small Llama: nrm and LXT side by side, in one run, against forward + backward.

LXT patches the model's classes for the whole process, and its release needs transformers 4, so
the benchmark makes an environment of its own on demand (`--environment`), and LXT runs on a copy
of the model in a process of its own; the steps are timed in turns.

    python -m benchmarks.attn_lrp --json attn_lrp.json
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import LXT, ROOT, with_packages
from benchmarks.lxt_tokens import gradient_times_input

TOKEN = 5


def build(config: dict[str, int]) -> Any:
    """A Llama with random weights, the same in every process."""
    from nrm.torchvision_mismatch import import_torchvision

    import_torchvision()
    transformers: Any = importlib.import_module("transformers")  # untyped
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        **config, vocab_size=1000, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return transformers.LlamaForCausalLM(settings).eval().requires_grad_(False)


def serve_lxt(connection: Connection, config: dict[str, int], ids: Tensor) -> None:
    """Runs LXT in a process of its own, one pass for each request."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = build(config)
    from lxt.efficient import monkey_patch
    from transformers.models.llama import modeling_llama

    monkey_patch(modeling_llama)
    while connection.recv() is not None:
        begin = time.perf_counter()
        relevance = gradient_times_input(model, ids, TOKEN)[0]
        connection.send((time.perf_counter() - begin, relevance))


@dataclass(frozen=True)
class Row:
    """One size of the model and one length of the text.

    Attributes:
        seconds: medians, by what took them.
        ratio: these over forward + backward.
        correlation: of the token relevances of AttnLRP, nrm's with LXT's.
        largest_difference: between them, relative to the largest.
        worst_cut: how far the worst of nrm's cuts is from one.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tokens: int
    seconds: dict[str, float]
    ratio: dict[str, float]
    correlation: float
    largest_difference: float
    worst_cut: float


def compare(config: dict[str, int], length: int, rounds: int) -> Row:
    """Times in turns, and the correlation of token relevances."""
    import nrm

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = build(config)
    ids = torch.randint(3, 900, (1, length), generator=torch.Generator().manual_seed(1))
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    lxt = multiprocessing.get_context("spawn").Process(
        target=serve_lxt, args=(theirs, config, ids), daemon=True
    )
    lxt.start()
    attn = nrm.Explainer(model, nrm.composites.AttnLRP(), output="logits")
    cp = nrm.Explainer(model, nrm.composites.CPLRP(), output="logits")

    def explain(explainer: nrm.Explainer) -> Tensor:
        return explainer(input_ids=ids, use_cache=False, target=(-1, TOKEN)).tokens()

    def timed(step: Callable[[], Tensor]) -> tuple[float, Tensor]:
        begin = time.perf_counter()
        result = step()
        return time.perf_counter() - begin, result

    def ask_lxt() -> tuple[float, Tensor]:
        ours.send("pass")
        answer: tuple[float, Tensor] = ours.recv()
        return answer

    steps: dict[str, Callable[[], tuple[float, Tensor]]] = {
        "forward + backward": lambda: timed(lambda: gradient_times_input(model, ids, TOKEN)[0]),
        "lxt AttnLRP": ask_lxt,
        "nrm AttnLRP": lambda: timed(lambda: explain(attn)),
        "nrm CPLRP": lambda: timed(lambda: explain(cp)),
    }
    relevance = {name: step()[1] for name, step in steps.items()}  # and warm up
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step()[0])
    ours.send(None)
    lxt.join()
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    measure = attn(input_ids=ids, use_cache=False, target=(-1, TOKEN))
    scaled = measure.tokens() * measure.scale[:, None]  # in units of the logit, as LXT's
    pair = torch.stack([relevance["lxt AttnLRP"][0], scaled[0]])
    return Row(
        **config,
        tokens=length,
        seconds=median,
        ratio={name: value / median["forward + backward"] for name, value in median.items()},
        correlation=float(torch.corrcoef(pair)[0, 1]),
        largest_difference=float((scaled - relevance["lxt AttnLRP"]).abs().max())
        / float(relevance["lxt AttnLRP"].abs().max()),
        worst_cut=measure.diagnostics().worst_cut_deviation,
    )


def main() -> None:
    """Runs the comparison, in an environment that has LXT."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-lxt")
    arguments = parser.parse_args()
    inside = os.environ.get("NRM_LXT_ENVIRONMENT") == "1"
    if not inside:
        raise SystemExit(_run_inside(arguments.environment))
    small = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 688,
    }
    larger = small | {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
    rows = []
    for config, length in ((small, 128), (small, 512), (larger, 256)):
        row = compare(config, length, arguments.rounds)
        rows.append(row)
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in row.ratio.items())
        sys.stdout.write(
            f"hidden {row.hidden_size}, {row.num_hidden_layers} layers, {length} tokens: "
            f"{ratios}; correlation {row.correlation:.6f}, "
            f"largest difference {row.largest_difference:.1e}\n"
        )
    if arguments.json is not None:
        beside = arguments.json.with_suffix(".part")
        beside.write_text(json.dumps([asdict(row) for row in rows], indent=1))
        beside.replace(arguments.json)


def _run_inside(environment: Path) -> int:
    python = with_packages(environment, *LXT)
    command = [str(python), "-m", "benchmarks.attn_lrp", *sys.argv[1:]]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NRM_LXT_ENVIRONMENT": "1"}, check=False
    ).returncode


if __name__ == "__main__":
    main()
