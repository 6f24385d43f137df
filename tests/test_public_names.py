"""`import nrm`: quick, and every public name is there as soon as somebody asks for it."""

from __future__ import annotations

import ast
import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import nrm

SOURCES = str(Path(nrm.__file__).parents[1])
RESULTS = (
    "Measure", "Listing", "Flows", "Flow", "Diagnostics", "ProperForm", "Plan", "Clusters",
    "Evaluation",
)  # fmt: skip


def alone(code: str, *options: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": SOURCES},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_nrm_imports_no_torch() -> None:
    heavy = ("torch", "numpy", "scipy", "matplotlib", "typer", "rich", "PIL")
    code = f"import sys, nrm; print([name for name in {heavy} if name in sys.modules])"
    assert alone(code) == "[]\n"


def test_every_public_name_is_found_by_a_fresh_python() -> None:
    """One by one, all at once, and modules that no import names."""
    modules = ("rules", "composites", "methods", "operators", "errors", "graph_networks", "sets")
    code = (
        "import nrm\n"
        "listed = dir(nrm)\n"
        "assert set(nrm.__all__) <= set(listed), set(nrm.__all__) - set(listed)\n"
        "for name in nrm.__all__:\n"
        "    assert getattr(nrm, name) is getattr(nrm, name), name\n"
        f"for name in {modules}:\n"
        "    assert getattr(nrm, name).__name__ == f'nrm.{name}'\n"
        "from nrm import *\n"
        "print(len(nrm.__all__), Explainer.__name__, channels('a', 1))"
    )
    assert alone(code) == f"{len(nrm.__all__)} Explainer {nrm.channels('a', 1)}\n"


@pytest.mark.parametrize("name", RESULTS)
def test_the_types_of_results_are_public(name: str) -> None:
    assert name in nrm.__all__
    assert isinstance(getattr(nrm, name), type)


@pytest.mark.parametrize("name", ["Explainr", "nothing", "_hidden", "__wrapped__"])
def test_what_is_not_there_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'nrm' has no attribute '{name}'"):
        getattr(nrm, name)
    assert not hasattr(nrm, name)
    with pytest.raises(ImportError, match=name):
        exec(f"from nrm import {name}")


def test_a_misspelt_name_is_put_right() -> None:
    code = "import nrm; nrm.Explainr"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": SOURCES},
    )  # fmt: skip
    assert "Did you mean: 'Explainer'?" in done.stderr


def test_type_checkers_see_the_names_that_are_there() -> None:
    """What stands under TYPE_CHECKING and what is imported when it is asked for are the same."""
    tree = ast.parse(Path(nrm.__file__).read_text(encoding="utf-8"))
    (checked,) = (
        node for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )  # fmt: skip
    seen = {}
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {alias.name: node.module for alias in node.names}
    assert sorted(seen) == sorted(nrm.__all__)
    for name, module in seen.items():
        found = getattr(nrm, name)
        if isinstance(found, ModuleType):
            assert found.__name__ == f"{module}.{name}"
        else:
            assert found is getattr(sys.modules[str(module)], name)


def test_mypy_sees_them_and_refuses_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    monkeypatch.setenv("MYPYPATH", SOURCES)
    file = tmp_path / "user.py"
    file.write_text(
        "import nrm\n"
        "def ask(model: nrm.Explainer, found: nrm.Flows) -> nrm.Measure:\n"
        "    nrm.rules.Gamma(0.25)\n"
        "    return found\n"
        "nrm.Explainr\n"
    )
    said, _, _ = api.run([  # without other packages' types, which take long to read
        str(file), "--strict", "--no-error-summary", "--follow-imports=silent",
        "--no-site-packages", "--ignore-missing-imports", f"--cache-dir={tmp_path / 'cache'}",
    ])  # fmt: skip
    lines = [line.split(" error: ")[-1] for line in said.splitlines() if " error: " in line]
    assert len(lines) == 2, said
    assert 'got "Flows", expected "Measure"' in lines[0]
    assert 'Module has no attribute "Explainr"' in lines[1]


def test_what_is_pickled_is_known_by_where_it_is_defined() -> None:
    chosen = nrm.channels("conv", 3)
    again = pickle.loads(pickle.dumps(chosen))
    assert again == chosen == copy.deepcopy(chosen)
    assert type(again) is nrm.NeuronSet
    assert nrm.NeuronSet.__module__ == "nrm.formulas"
    assert pickle.loads(pickle.dumps(nrm.Explainer)) is nrm.Explainer
