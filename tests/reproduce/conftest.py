"""Fixtures that tests of several experiments share."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _captured_once(captured_once):
    """Experiments explain one network by many walks."""


@pytest.fixture(autouse=True, scope="module")
def _trained_in_a_hurry():
    """The network of the demo: how well it reads its digits is of no account here."""
    demo = pytest.importorskip("nrm.cli.demo", reason="the command line is not installed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "trained", partial(demo.trained, 2))
        yield


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    """Figures are drawn with few pixels, which take longest."""
    matplotlib = pytest.importorskip("matplotlib", reason="nrm[reproduce] is not installed")
    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", 30)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are empty, where a test reads what was found: drawing takes longer."""
    from matplotlib.figure import Figure

    from nrm_reproduce import cnn, mlp, rules

    for module in (cnn, mlp, rules):
        for name in [name for name in vars(module) if name.startswith("draw_")]:
            monkeypatch.setattr(module, name, lambda *_: Figure())


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets and pretrained networks, which is not everywhere."""
    if not DATA.is_dir():
        pytest.skip("needs the data sets and pretrained networks of ../shared/data")
    return DATA


@pytest.fixture(scope="session")
def digits():
    """Scikit-learn's digits as flat pictures."""
    from nrm_reproduce.data import load_flat

    return load_flat("digits")


@pytest.fixture
def small(monkeypatch):
    """A perceptron so small that all of its experiments take seconds."""
    from nrm_reproduce import networks

    recipe = networks.Recipe((12, 8), epochs=15, batch=32, rate=5e-3, accuracy=0.85)
    monkeypatch.setitem(networks.RECIPES, "digits", recipe)


@pytest.fixture(scope="session")
def command():
    """`nrm reproduce` alone: a function of its arguments."""
    import typer
    from typer.testing import CliRunner

    from nrm.cli.commands import Command
    from nrm_reproduce.command import reproduce

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command)(reproduce)
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="session")
def result():
    """What is in the `result.json` of a folder."""
    return lambda out: json.loads((out / "result.json").read_text(encoding="utf-8"))
