"""What `nrm tokens` does: a language model in a folder, a text, and which tokens made the output.

Models are those of transformers, read from a folder of this machine: nothing is downloaded, and no
code that lies in the folder is run.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nrm import coloured
from nrm.cli.commands import SECOND, TOP, CommandError, as_text
from nrm.cli.models import find_target
from nrm.cli.report import to_json
from nrm.display import Table
from nrm.errors import NrmError, first_line, one_line, some
from nrm.explainer import Explainer
from nrm.generated import NOTE, Generation
from nrm.io import Say, write_text, written_at_once
from nrm.measure import Measure
from nrm.search import Flows
from nrm.targets import Contrast
from nrm.teacher_forcing import generation
from nrm.torchvision_mismatch import import_torchvision

Kind = Literal["causal", "masked", "classes"]
"""What a model says: the token that follows, the one under a mask, or the class of a text."""

_KINDS: dict[str, tuple[Kind, str]] = {
    "ForCausalLM": ("causal", "AutoModelForCausalLM"),
    "LMHeadModel": ("causal", "AutoModelForCausalLM"),
    "ForMaskedLM": ("masked", "AutoModelForMaskedLM"),
    "ForSequenceClassification": ("classes", "AutoModelForSequenceClassification"),
}
_EXTRA = "pip install 'nrm[language]'"
_MOST = 10


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, in evaluation mode."""

    name: str
    model: nn.Module
    tokenizer: Any
    kind: Kind

    @property
    def labels(self) -> list[str]:
        """The names of a classifier's classes."""
        config: Any = self.model.config
        return [str(config.id2label[k]) for k in range(config.num_labels)]

    def words(self, ids: Sequence[int]) -> list[str]:
        """Each token as it stands in the text: together they are the text."""
        found, before = [], ""
        for end in range(1, len(ids) + 1):
            text = self._text(ids[:end])
            # A letter in several tokens shows with the last of them.
            whole = text.startswith(before)
            found.append(text[len(before) :] if whole else self._text(ids[end - 1 : end]))
            before = text
        return found

    def word(self, token: int) -> str:
        """One token as text."""
        return self._text([token])

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text


@dataclass(frozen=True)
class Explained:
    """A text whose tokens are explained.

    Attributes:
        words, ids: its tokens.
        position: whose output is explained; `None` for a class.
        target, against: outputs, by index and as text.
        measure: of it.
        relevance: `[tokens]`, shares.
        flows: combinations of channels, if layers were named, with the tokens that each comes from.
    """

    words: list[str]
    ids: list[int]
    position: int | None
    target: tuple[int, str]
    against: tuple[int, str] | None
    measure: Measure
    relevance: Tensor
    flows: Flows | None
    by_flow: list[Tensor]

    @property
    def scale(self) -> float:
        return float(self.measure.scale[0])

    @property
    def title(self) -> str:
        than = "" if self.against is None else f" rather than {coloured.shown(self.against[1])!r}"
        what = "logit" if self.against is None else "difference of logits"
        return f"{coloured.shown(self.target[1])!r}{than}: {what} {self.scale:.4g}"

    def lines(self) -> list[coloured.Line]:
        """The text in colour, in units of what is explained; below, what each combination of
        channels comes from."""
        lines = [coloured.Line("", self.words, (self.relevance * self.scale).tolist())]
        for place, row in enumerate(self.by_flow, 1):
            lines.append(coloured.Line(f"flow {place}", self.words, (row * self.scale).tolist()))
        return lines

    def table(self) -> Table:
        """The most relevant tokens."""
        order = self.relevance.abs().argsort(descending=True, stable=True)[:_MOST].tolist()
        rows = [
            (
                str(place),
                repr(coloured.shown(self.words[place])),
                f"{float(self.relevance[place]):+.3f}",
                f"{float(self.relevance[place]) * self.scale:+.3f}",
            )
            for place in order
        ]
        rest = 1 - float(self.relevance.sum())
        notes = [f"Biases and other constants take {rest:+.3f}."]
        return Table("", ("place", "token", "share", "share x scale"), rows, notes)

    def as_json(self) -> dict[str, Any]:
        """What there is, for `json.dumps`."""
        found: dict[str, Any] = {
            "tokens": self.words,
            "ids": self.ids,
            "position": self.position,
            "target": {"index": self.target[0], "text": self.target[1]},
            "against": None,
            "explained": self.measure.explained,
            "scale": self.scale,
            "relevance": self.relevance.tolist(),
        }
        if self.against is not None:
            found["against"] = {"index": self.against[0], "text": self.against[1]}
        if self.flows is not None:
            found["gap"] = self.flows.gap
            found["flows"] = [
                {
                    "channels": flow.parts,
                    "relevance": flow.relevance,
                    "share": flow.share,
                    "tokens": row.tolist(),
                }
                for flow, row in zip(self.flows, self.by_flow, strict=True)
            ]
        return found


# -- the folder ------------------------------------------------------------------------------------


def load(folder: Path, device: torch.device, say: Say = lambda text: None) -> Loaded:
    """The model of a folder, in single precision and in evaluation mode, and its tokenizer.

    Arguments:
        folder: as transformers saves it, or one with a single `.gguf` file; or such a file.

    Raises:
        CommandError: there is no such folder, a package is missing, or it holds no such model.
    """
    folder, options = _place(folder)
    transformers = _transformers("gguf_file" in options)
    options |= {"local_files_only": True, "trust_remote_code": False}
    say(f"loading {as_text(folder)}")
    try:
        with redirect_stderr(io.StringIO()):  # bars that no option turns off
            config = transformers.AutoConfig.from_pretrained(str(folder), **options)
            kind, maker = _kind(config)
            model, found = getattr(transformers, maker).from_pretrained(
                str(folder), config=config, output_loading_info=True, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
    except NrmError:
        raise
    except Exception as error:  # any file may lie in a folder
        if isinstance(error, MemoryError):
            raise
        raise CommandError(
            f"{as_text(folder)} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    missing = sorted(found.get("missing_keys", ()))
    if missing:
        raise CommandError(
            f"{as_text(folder)} has no weights for {some(missing, 3)}: they would be random"
        )
    nn.Module.float(model)  # which a model that was quantised once refuses by its own
    return Loaded(as_text(folder), model.eval().to(device), tokenizer, kind)


def _place(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder, and the file in it that is read if that is of llama.cpp's format."""
    if folder.is_file() and folder.suffix == ".gguf":
        return folder.parent, {"gguf_file": folder.name}
    if not folder.is_dir():
        raise CommandError(
            f"there is no folder {as_text(folder)}: MODEL is a folder with a model of transformers "
            "or a .gguf file; nothing is downloaded"
        )
    if (folder / "config.json").is_file():
        return folder, {}
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if len(files) == 1:
        return folder, {"gguf_file": files[0]}
    if files:
        raise CommandError(f"{as_text(folder)} has several .gguf files, name one: {some(files)}")
    raise CommandError(f"{as_text(folder)} has neither a config.json nor a .gguf file")


def _transformers(gguf: bool) -> Any:
    needed = ("transformers", *(("gguf", "accelerate") if gguf else ()))
    for package in needed:
        if find_spec(package) is None:
            raise CommandError(f"{package} is not installed: {_EXTRA}")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    if find_spec("torchvision") is not None:
        import_torchvision()  # before transformers does
    transformers: Any = importlib.import_module("transformers")  # untyped
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _kind(config: Any) -> tuple[Kind, str]:
    """What a model says, and which class of transformers makes it.

    Raises:
        CommandError: it is of another kind.
    """
    names = list(getattr(config, "architectures", None) or ())
    if not names:  # a .gguf file names none
        return _KINDS["ForCausalLM"]
    for end, found in _KINDS.items():
        if names[0].endswith(end):
            return found
    raise CommandError(
        f"the folder holds a {names[0]}: nrm tokens explains causal language models, masked ones, "
        "and classifiers of texts"
    )


# -- what is explained -----------------------------------------------------------------------------


def explain(
    loaded: Loaded,
    explainer: Explainer,
    text: str,
    target: str,
    against: str | None,
    position: int | None,
    layers: Sequence[str],
    top: int,
    seconds: float,
    say: Say = lambda text: None,
) -> Explained:
    """One output for a text, and the share of every token.

    Raises:
        CommandError: there is no such target or position.
    """
    inputs = _inputs(loaded, text, explainer)
    ids = inputs["input_ids"]
    say(f"capturing the model for {ids.shape[1]} tokens")
    place = _position(loaded, ids, position)
    with torch.no_grad():
        logits = explainer.model(**inputs).logits[0]
    outputs = logits if place is None else logits[place]
    chosen = _output(loaded, target, outputs, None)
    other = None if against is None else _output(loaded, against, outputs, chosen)
    neuron: Any = chosen if place is None else (place, chosen)
    if other is not None:
        neuron = Contrast(neuron, other if place is None else (place, other))
    R = explainer(**inputs, target=neuron)
    relevance = R.tokens()[0]
    flows, by_flow = None, []
    if layers:
        say(f"searching the most relevant channel combinations of {', '.join(layers)}")
        flows = R.top(*layers, k=top, seconds=seconds)
        by_flow = [R.tokens(*flow.sets)[0] for flow in flows]
    return Explained(
        loaded.words(ids[0].tolist()),
        ids[0].tolist(),
        place,
        (chosen, _named(loaded, chosen)),
        None if other is None else (other, _named(loaded, other)),
        R,
        relevance,
        flows,
        by_flow,
    )


def generate(
    loaded: Loaded,
    explainer: Explainer,
    text: str,
    count: int,
    against: str | None,
    say: Say = lambda text: None,
) -> Generation:
    """What the model goes on with, word by word the likeliest, and every step of it explained.

    Raises:
        CommandError: the model generates nothing.
    """
    if loaded.kind != "causal":
        raise CommandError("--generate needs a causal language model, and this is none")
    ids = _inputs(loaded, text, explainer)["input_ids"]
    say(f"generating up to {count} tokens")
    model: Any = loaded.model
    with torch.no_grad():
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=_padding(loaded),
        )
    if whole.shape[1] == ids.shape[1]:
        raise CommandError("the model ends the text at once: there is nothing to explain")
    other: Any = None
    if against is not None:
        other = "next" if against == SECOND else _token(loaded, against, None)
    say(f"capturing the model for {whole.shape[1]} tokens, and explaining all steps")
    words = loaded.words(whole[0].tolist())
    found = generation(explainer, whole, ids.shape[1], words=words, against=other)
    if found.against is None:
        return found
    return replace(found, against_words=tuple(map(loaded.word, found.against.tolist())))


def _padding(loaded: Loaded) -> int:
    known = (loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


def _inputs(loaded: Loaded, text: str, explainer: Explainer) -> dict[str, Tensor]:
    """The model's arguments, without a mask that hides nothing; the ids first."""
    device = next(explainer.model.parameters()).device
    try:
        given = loaded.tokenizer(text, return_tensors="pt")
    except Exception as error:  # of any tokenizer
        raise CommandError(f"the text cannot be split into tokens: {one_line(error)}") from error
    found = {"input_ids": given["input_ids"].long().to(device)}
    if not found["input_ids"].numel():
        raise CommandError("the text has no token")
    if loaded.kind != "causal" and "token_type_ids" in given:
        found["token_type_ids"] = given["token_type_ids"].to(device)
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if longest is not None and found["input_ids"].shape[1] > longest:
        raise CommandError(
            f"the text has {found['input_ids'].shape[1]} tokens, the model takes {longest}"
        )
    return found


def _position(loaded: Loaded, ids: Tensor, wanted: int | None) -> int | None:
    """The position whose output is explained.

    Raises:
        CommandError: there is none of that number, or no mask or several.
    """
    length = ids.shape[1]
    if loaded.kind == "classes":
        if wanted is not None:
            raise CommandError("--position has no effect for a classifier of texts: leave it out")
        return None
    if wanted is not None:
        if not -length <= wanted < length:
            raise CommandError(f"position {wanted} is out of range: there are {length} tokens")
        return wanted % length
    if loaded.kind == "causal":
        return length - 1
    mask = loaded.tokenizer.mask_token
    masked = (ids[0] == loaded.tokenizer.mask_token_id).nonzero().flatten().tolist()
    if len(masked) != 1:
        raise CommandError(
            f"the text has {len(masked)} masks: write one {mask} where the model is to guess, or "
            "give --position"
        )
    return int(masked[0])


def _named(loaded: Loaded, output: int) -> str:
    return loaded.labels[output] if loaded.kind == "classes" else loaded.word(output)


def _output(loaded: Loaded, wanted: str, outputs: Tensor, target: int | None) -> int:
    """The index of the output that is meant.

    Arguments:
        outputs: `[tokens of the vocabulary or classes]`.
        target: what it is contrasted with, if it is.

    Raises:
        CommandError: there is none, or it is the target itself.
    """
    folded = wanted.casefold()
    if folded == TOP or (folded == SECOND and target is not None):
        at = outputs.clone()
        if target is not None:
            at[target] = -torch.inf
        return int(at.argmax())
    if loaded.kind == "classes":
        found = find_target(wanted, loaded.labels, outputs)
    else:
        found = _token(loaded, wanted, outputs)
    if found == target:
        raise CommandError(f"--against {wanted!r} is the target itself")
    return found


def _token(loaded: Loaded, wanted: str, outputs: Tensor | None) -> int:
    """A token by its text or its number.

    A word may be one token after a blank and another without: the likelier one is meant.

    Raises:
        CommandError: it is no token, or several.
    """
    size = len(loaded.tokenizer) if outputs is None else len(outputs)
    number = re.fullmatch(r"id:(\d+)", wanted)
    if number is not None:
        index = int(number[1])
        if index >= size:
            raise CommandError(f"token {index} is out of range: there are {size} (from 0)")
        return index
    if wanted in loaded.tokenizer.all_special_tokens:
        return int(loaded.tokenizer.convert_tokens_to_ids(wanted))
    ways = [wanted] if wanted[:1].isspace() else [wanted, f" {wanted}"]
    split = [loaded.tokenizer.encode(way, add_special_tokens=False) for way in ways]
    single = {ids[0] for ids in split if len(ids) == 1}
    single.discard(loaded.tokenizer.unk_token_id)
    if not single:
        parts = some([repr(loaded.word(token)) for token in split[0]])
        raise CommandError(
            f"{wanted!r} is no single token: it is split into {parts or 'nothing'}; give one of "
            "them, or a number as id:5"
        )
    if outputs is None:  # every step has its own: the word after a blank
        return int(split[-1][0]) if len(split[-1]) == 1 else min(single)
    likeliest: int = max(single, key=lambda token: float(outputs[token]))
    return likeliest


# -- what is written -------------------------------------------------------------------------------

_NOTE = "Orange raises what is explained, blue lowers it."


def write(
    found: Explained | Generation,
    about: dict[str, Any],
    json_file: Path | None,
    html_file: Path | None,
    picture: Path | None,
) -> None:
    """The files that were asked for, each complete or not at all.

    Arguments:
        about: what else stands in the JSON.
    """
    if json_file is not None:
        write_text(json_file, to_json(about | found.as_json()))
    if html_file is not None:
        notes = [NOTE if isinstance(found, Generation) else _NOTE]
        write_text(html_file, coloured.page(found.lines(), found.title, notes))
    if picture is not None:
        from nrm import plot

        with written_at_once(picture) as beside:
            figure = plot.text(found.lines(), title=found.title)
            figure.savefig(beside, format="png")


def drawn(found: Explained | Generation) -> Any:
    """What is shown on a terminal."""
    from rich.console import Group

    if isinstance(found, Generation):
        return found
    return Group(coloured.rich(found.lines(), found.title, [_NOTE]), found.table().rich())


def versions() -> dict[str, str]:
    """Of the packages that read models and texts."""
    names = ("transformers", "tokenizers", "gguf")
    return {
        name: str(sys.modules[name].__version__)
        for name in names
        if name in sys.modules and hasattr(sys.modules[name], "__version__")
    }
