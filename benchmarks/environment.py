"""Environments for peers that pin what others need in another version, made on demand."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CRP = "zennit-crp==0.6.0"
LXT = ("lxt==2.1", "transformers>=4.52,<5")
"""LXT's release does not import beside transformers 5."""
_INSIDE = "NRM_CRP_ENVIRONMENT"


def inside_crp() -> bool:
    """Whether this process runs where zennit-crp is."""
    return os.environ.get(_INSIDE) == "1"


def run_inside_crp(environment: Path, module: str) -> int:
    """Run a benchmark again, with its arguments, in an environment with zennit-crp."""
    python = with_packages(environment, CRP, "pyarrow")
    command = [str(python), "-m", module, *sys.argv[1:]]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, _INSIDE: "1"}, check=False
    ).returncode


def with_packages(environment: Path, *packages: str) -> Path:
    """The Python of an environment with this project and some packages, made on demand."""
    python = environment / "bin" / "python"
    if not (environment / "ready").exists():
        venv.create(environment, with_pip=True)
        torch_here = f"torch=={torch.__version__.partition('+')[0]}"
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, torch_here], check=True)
        subprocess.run([*pip, torch_here, "-e", f"{ROOT}[cli]", *packages], check=True)
        (environment / "ready").touch()
    return python
