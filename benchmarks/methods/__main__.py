"""Every named method beside an independent implementation of it: the tables of docs/methods.md.

zennit-crp pins a zennit older than the one tests compare with, so the benchmark makes an
environment of its own on demand (`--environment`).

    python -m benchmarks.methods --json methods.json --markdown docs/methods.md
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from benchmarks.environment import ROOT, inside_crp, run_inside_crp
from benchmarks.methods.chain import chain_rows
from benchmarks.methods.graph import graph_rows
from benchmarks.methods.table import methods_table, put, residual_table


def main() -> None:
    """Computes the tables, in an environment that has zennit-crp."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="a page with places for the tables")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-crp")
    arguments = parser.parse_args()
    if not inside_crp():
        raise SystemExit(run_inside_crp(arguments.environment, "benchmarks.methods"))
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


if __name__ == "__main__":
    main()
