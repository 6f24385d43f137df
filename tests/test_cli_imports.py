"""What the command imports before it has anything to compute, and the words it lists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the command line's packages are not installed")

import nrm
from nrm import composites
from nrm.cli.commands import COMPOSITES
from nrm.cli.models import find_composite

SOURCES = str(Path(nrm.__file__).parents[1])


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--help"], ["--version"], ["nope"]])
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from nrm.cli import main\n"
        f"sys.argv = ['nrm', *{arguments}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = ('torch', 'numpy', 'scipy', 'matplotlib', 'PIL', 'nrm.io', 'nrm.explainer')\n"
        "sys.exit(str([name for name in heavy if name in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": SOURCES},
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "[]"


def test_every_composite_that_is_listed_is_made() -> None:
    assert find_composite("auto", None) is None
    for name in COMPOSITES:
        if name != "EpsilonGammaBox":
            assert type(find_composite(name.lower(), None)) is type(getattr(composites, name)())
