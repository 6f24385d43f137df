"""LXT's AttnLRP in a process of its own: its patches change the classes of a model for good.

`Lxt` starts the process with the Python of an environment that has LXT (`benchmarks.environment`),
and asks it for one pass at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import ROOT


class Lxt:
    """Tokens of one logit by LXT.

    Arguments:
        python: that of an environment with LXT.
        folder: of the model.
        token: whose logit is explained.

    Attributes:
        name: its version, and that of transformers; or why it does not run.
        runs: whether it does.
    """

    def __init__(self, python: Path, folder: Path, token: int, threads: int) -> None:
        command = [str(python), "-m", "benchmarks.lxt_tokens", str(folder), str(token)]
        self._process = subprocess.Popen(
            [*command, str(threads)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.runs = bool(line)
        self.name = json.loads(line) if line else self._last_words()

    def __call__(self, ids: Tensor) -> tuple[float, Tensor, float]:
        """Seconds of one pass; `[1, tokens]`, in units of the logit; and the logit."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(ids.tolist()) + "\n")
        self._process.stdin.flush()
        seconds, relevance, logit = json.loads(self._process.stdout.readline())
        return seconds, torch.tensor(relevance), logit

    def close(self) -> None:
        self._process.communicate()

    def _last_words(self) -> str:
        said = self._process.communicate()[1].strip().splitlines()
        return said[-1] if said else "it ended without a word"


def gradient_times_input(model: Any, ids: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """Forward and backward to the embeddings; with LXT's patches, AttnLRP.

    Returns:
        `[1, tokens]`, and the logit.
    """
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logit = model(inputs_embeds=embedded, use_cache=False).logits[0, -1, token]
    (gradient,) = torch.autograd.grad(logit, embedded)
    relevance: Tensor = (gradient * embedded.detach()).sum(-1)
    return relevance, logit.detach()


def load(folder: Path) -> Any:
    """The model in single precision, also of a folder that transformers 5 wrote."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    written = json.loads((folder / "config.json").read_text()).get("rope_parameters") or {}
    if "rope_theta" in written:  # which transformers 4 looks for elsewhere
        config.rope_theta = written["rope_theta"]
    found: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, torch_dtype=torch.float32
    )
    return found.eval().requires_grad_(False)


def serve(folder: Path, token: int) -> None:
    """One pass for each line of ids that comes in."""
    from importlib.metadata import version

    from nrm.torchvision_mismatch import import_torchvision

    import_torchvision()
    from lxt.efficient import monkey_patch
    from transformers.models.llama import modeling_llama

    monkey_patch(modeling_llama)
    model = load(folder)
    out = sys.stdout
    out.write(json.dumps(f"LXT {version('lxt')}, transformers {version('transformers')}") + "\n")
    out.flush()
    for line in sys.stdin:
        ids = torch.tensor(json.loads(line))
        begin = time.perf_counter()
        relevance, logit = gradient_times_input(model, ids, token)
        seconds = time.perf_counter() - begin
        out.write(json.dumps([seconds, relevance.tolist(), float(logit)]) + "\n")
        out.flush()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(sys.argv[3]))
    serve(Path(sys.argv[1]), int(sys.argv[2]))
