"""Every named method beside an independent implementation of it: the tables of docs/methods.md.

zennit-crp pins a zennit older than the one tests compare with, so the benchmark makes an
environment of its own on demand (`--environment`).

    python -m benchmarks.methods --json methods.json --markdown docs/methods.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.methods.chain import chain_rows
from benchmarks.methods.graph import graph_rows
from benchmarks.methods.table import methods_table, put, residual_table

ROOT = Path(__file__).resolve().parent.parent.parent
CRP = "zennit-crp==0.6.0"


def main() -> None:
    """Computes the tables, in an environment that has zennit-crp."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="a page with places for the tables")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-crp")
    arguments = parser.parse_args()
    if os.environ.get("NRM_CRP_ENVIRONMENT") != "1":
        raise SystemExit(_run_inside(arguments.environment))
    # They import zennit-crp.
    from benchmarks.methods.convolutions import convolution_rows
    from benchmarks.methods.residual import residual_example, residual_rows

    warnings.simplefilter("ignore")
    rows = [*convolution_rows(), *residual_rows(), *chain_rows(), *graph_rows()]
    beside = list(residual_example())
    tables = {"methods": methods_table(rows), "residual": residual_table(beside)}
    sys.stdout.write("\n\n".join(tables.values()) + "\n")
    if arguments.json is not None:
        found = {"methods": [asdict(r) for r in rows], "residual": [asdict(b) for b in beside]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.markdown is not None:
        page = arguments.markdown.read_text()
        for name, table in tables.items():
            page = put(page, name, table)
        arguments.markdown.write_text(page)


def _run_inside(environment: Path) -> int:
    python = environment / "bin" / "python"
    if not (environment / "ready").exists():
        venv.create(environment, with_pip=True)
        torch_here = f"torch=={torch.__version__.partition('+')[0]}"
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, torch_here], check=True)
        subprocess.run([*pip, torch_here, "-e", f"{ROOT}[cli]", CRP], check=True)
        (environment / "ready").touch()
    command = [str(python), "-m", "benchmarks.methods", *sys.argv[1:]]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NRM_CRP_ENVIRONMENT": "1"}, check=False
    ).returncode


if __name__ == "__main__":
    main()
