"""docs/figures.md: what the pages quote is what the commands put out, under these names.

A row of its table *What the commands put out* has a command as small as it gets, which is run
here, or the class or columns that the command writes, where it needs what is not at hand.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import pages

pytest.importorskip("typer", reason="the command line's packages are not installed")

from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "figures.md").read_text()
DATA = ROOT.parent / "shared" / "data"
NEEDS = {
    "lrp_pass": {"torchvision": "vision", "zennit": "dev"},
    "quantus_metrics": {"torchvision": "vision", "quantus": "quantus", "sklearn": "demo"},
    "explore": {"starlette": "explore", "sklearn": "demo"},
    "dataset": {"torchvision": "vision", "pyarrow": "dataset"},
    "zoo": {"torchvision": "vision", "torch_geometric": "models", "transformers": "models"},
    "language": {"transformers": "models"},
    "mlp-mnist": {"sklearn": "demo"},
    "cnn-clusters": {"sklearn": "demo"},
    "additive": {"sklearn": "demo"},
}
"""Packages beyond those of `nrm[reproduce]`, and the extra that has them."""


class Row(NamedTuple):
    """A row of *What the commands put out*."""

    command: str
    how: str
    quoted: list[str]


def table(title: str) -> list[list[str]]:
    """The rows below a heading of the page, by cells."""
    (part,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def code(cell: str) -> list[str]:
    return [name.replace("\\|", "|") for name in re.findall(r"`([^`]+)`", cell)]


def essence(command: str) -> str:
    """What runs, without its options: `benchmarks.scaling`, `nrm reproduce rnn`."""
    words = command.removeprefix("python ").removeprefix("-m ").split()
    if words[0] == "nrm":
        return " ".join(words[: 3 if words[1] == "reproduce" else 2])
    return words[0].removesuffix(".py").replace("/", ".")


ROWS = [
    Row(*code(command), *code(how), code(quoted))
    for command, how, quoted in table("What the commands put out")
]


def test_every_command_of_numbers_says_what_it_puts_out() -> None:
    named = {essence(command) for _, cell in table("Numbers") for command in code(cell)}
    named -= {".venv.bin.pytest", "nrm reproduce all"}  # asserts; and runs the others
    assert named == {essence(row.command) for row in ROWS}


@pytest.mark.parametrize(
    "row", ROWS, ids=[f"{essence(row.command)}: {row.how}"[:70] for row in ROWS]
)
@pytest.mark.usefixtures("hurried")
def test_it_puts_out_what_is_quoted(
    row: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert row.quoted
    if re.fullmatch(r"[\w.]+", row.how):
        told = written(row.how)
    else:
        assert essence(row.how) == essence(row.command)
        told = put_out(row.how, tmp_path, monkeypatch)
    missing = [name for name in row.quoted if name not in told]
    assert not missing, sorted(told)


def written(name: str) -> set[str]:
    """The fields of a class, or columns, by their dotted name."""
    module, _, inside = name.rpartition(".")
    if module in EXAMPLES:
        found = getattr(pages.example(module.removeprefix("examples.")), inside)
    else:
        found = getattr(importlib.import_module(module), inside)
    return {field.name for field in fields(found)} if is_dataclass(found) else set(found)


EXAMPLES = {f"examples.{path.stem}" for path in (ROOT / "examples").glob("*.py")}


def put_out(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """All keys and texts in the JSON that a command writes."""
    name = essence(command).rpartition(" ")[2].rpartition(".")[2]
    for package, extra in NEEDS.get(name, {}).items():
        pages.package(package, extra)
    words = shlex.split(command)
    for number, word in enumerate(words):
        if word == "FOLDER":
            words[number] = str(llama(place / "llama"))
        elif word.startswith("DATA"):
            if not DATA.is_dir():
                pytest.skip("needs the data sets and pretrained networks of ../shared/data")
            words[number] = str(DATA) + word.removeprefix("DATA")
        elif word in ("FILE", "DIR"):
            words[number] = str(place / "out")
    if words[0] == "nrm":
        from nrm.cli.app import app

        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
        file = place / "out" / "result.json"
    else:
        words = words[2 if words[1] == "-m" else 1 :]
        module = importlib.import_module(essence(command))
        monkeypatch.setattr(sys, "argv", words)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not module.main()
        file = place / "out"
    return set(texts(json.loads(file.read_text())))


def texts(value: Any) -> Iterator[str]:
    """Keys and texts of what JSON holds."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield key
            yield from texts(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from texts(inside)
    elif isinstance(value, str):
        yield value


def llama(folder: Path) -> Path:
    """A language model in a folder, with random weights, and a tokenizer that knows one word."""
    transformers = pages.package("transformers", "models")
    tokenizers = pages.package("tokenizers", "models")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=2000, num_hidden_layers=1, **size)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch, captured_once: None) -> Iterator[None]:
    """Networks are trained shortly and pictures are coarse: figures are of no account here."""
    demo = importlib.import_module("nrm.cli.demo")
    monkeypatch.setattr(demo, "trained", partial(demo.trained, 2))
    matplotlib = pytest.importorskip("matplotlib", reason="nrm[reproduce] is not installed")
    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", 30)
    networks = importlib.import_module("nrm_reproduce.networks")
    small = networks.Recipe((12, 8), epochs=15, batch=32, rate=5e-3, accuracy=0.85)
    monkeypatch.setitem(networks.RECIPES, "digits", small)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
