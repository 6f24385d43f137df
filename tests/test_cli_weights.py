"""Files of weights as they are common: parts, prefixes, and what is refused of them."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors", reason="the command line's packages are not installed")

from safetensors.torch import save_file

from nrm.cli.weights import Read, load_weights, read_weights
from nrm.errors import InputError


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), fc=nn.Linear(4, 2))
    )


WANTED = net(1).state_dict()


def named(change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): value for name, value in WANTED.items()}


def loaded(path: Path, model: nn.Module | None = None, part: str | None = None) -> Read:
    """Load, and check that every number arrived."""
    model = net(0) if model is None else model
    read = load_weights(model, path, part)
    for one, other in zip(model.state_dict().values(), WANTED.values(), strict=True):
        assert torch.equal(one, other)
    return read


PLAIN = dict(WANTED)


@pytest.mark.parametrize(
    ("held", "part"),
    [
        (PLAIN, None),
        ({"state_dict": PLAIN, "epoch": 3, "best": torch.tensor(0.5)}, "state_dict"),
        ({"model": PLAIN, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, "model"),
        ({"model_state_dict": PLAIN, "loss": 0.1}, "model_state_dict"),
        ({"net": PLAIN, "acc": 93.1, "epoch": 7}, "net"),
        ({"ema": PLAIN, "step": 9}, "ema"),
        ({"ema": {"shadow": PLAIN, "decay": 0.99}}, "ema.shadow"),
        ({"weights_of_mine": PLAIN, "epoch": 1}, "weights_of_mine"),
        ({"model": {"state_dict": PLAIN, "config": {"depth": 20}}}, "model.state_dict"),
        ({"state_dict": PLAIN, "ema": net(2).state_dict()}, "state_dict"),
        ({"hyper_parameters": {"lr": 0.1}, "state_dict": PLAIN, "callbacks": {}}, "state_dict"),
    ],
)
def test_parts_of_checkpoints(held: Mapping[str, Any], part: str | None, tmp_path: Path) -> None:
    for name in ("a.pth", "a.ckpt", "a.pth.tar", "a.th", "a.bin"):
        torch.save(held, tmp_path / name)
        assert loaded(tmp_path / name).part == part


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: f"module.{n}", "without 'module.'"),
        (lambda n: f"model.{n}", "without 'model.'"),
        (lambda n: f"_orig_mod.{n}", "without '_orig_mod'"),
        (lambda n: f"model.module.{n}", "without 'model.module.'"),
        (lambda n: f"module._orig_mod.{n}", "without 'module.' and '_orig_mod'"),
        (lambda n: f"net.{n}", "without 'net.'"),
        (lambda n: n.replace("bn.", "bn._orig_mod."), "without '_orig_mod'"),
    ],
)
def test_names_of_wrappers_are_left_out(
    change: Callable[[str], str], words: str, tmp_path: Path
) -> None:
    torch.save({"state_dict": named(change)}, tmp_path / "a.ckpt")
    assert loaded(tmp_path / "a.ckpt") == Read("state_dict", words)
    save_file(named(change), tmp_path / "a.safetensors")
    assert loaded(tmp_path / "a.safetensors") == Read(None, words)


def test_names_that_the_model_itself_has_are_kept(tmp_path: Path) -> None:
    class Lit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net(0)

    torch.save(named(lambda n: f"model.{n}"), tmp_path / "same.pt")
    assert loaded(tmp_path / "same.pt", Lit()) == Read()
    torch.save(PLAIN, tmp_path / "bare.pt")
    assert loaded(tmp_path / "bare.pt", Lit()).names == "with 'model.' before"
    torch.save(named(lambda n: f"module.model.{n}"), tmp_path / "more.pt")
    assert loaded(tmp_path / "more.pt", Lit()).names == "without 'module.'"
    torch.save(named(lambda n: f"module.{n}"), tmp_path / "other.pt")
    assert loaded(tmp_path / "other.pt", Lit()).names == "without 'module.', with 'model.' before"


def test_what_is_no_weight_may_be_missing_or_more(tmp_path: Path) -> None:
    """Counts of batches, which old files have not, and of averages."""
    old = {name: value for name, value in PLAIN.items() if "num_batches" not in name}
    torch.save({f"module.{n}": v for n, v in old.items()} | {"n_averaged": torch.tensor(4)},
               tmp_path / "a.pt")  # fmt: skip
    assert loaded(tmp_path / "a.pt").names == "without 'module.'"


def test_a_part_is_chosen(tmp_path: Path) -> None:
    told: list[str] = []
    other = net(2).state_dict()
    torch.save({"generator": PLAIN, "discriminator": other}, tmp_path / "a.pt")
    torch.save({"model": other, "ema": {"module": PLAIN}}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="generator, discriminator: choose one with --weights-p"):
        load_weights(net(0), tmp_path / "a.pt")
    assert loaded(tmp_path / "a.pt", part="generator").part == "generator"
    assert loaded(tmp_path / "b.pt", part="ema.module").part == "ema.module"
    load_weights(net(0), tmp_path / "b.pt", say=told.append)
    assert told == [f"weights {tmp_path / 'b.pt'}: its part 'model' (it also holds ema.module)"]
    with pytest.raises(InputError, match=r"no part 'nothing' .* there are: model, ema\.module"):
        load_weights(net(0), tmp_path / "b.pt", "nothing")


def test_what_does_not_match_is_named(tmp_path: Path) -> None:
    state = named(lambda n: f"model.{n}")
    state["model.fc.weight"] = torch.zeros(9, 4)
    state |= {f"loss.{k}": torch.ones(1) for k in range(5)}
    del state["model.conv.bias"]
    torch.save({"state_dict": state, "ema": PLAIN}, tmp_path / "a.ckpt")
    with pytest.raises(InputError) as refused:
        load_weights(net(0), tmp_path / "a.ckpt")
    for part in (
        "its part 'state_dict' does not fit the model. missing keys: conv.bias; ",
        "unknown keys: loss.0, loss.1, loss.2 and 2 more; ",
        "other shapes: fc.weight is (9, 4) instead of (2, 4).",
        "It also holds ema (--weights-part).",
    ):
        assert part in str(refused.value)


class Trained:
    """What only running code could make."""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"this is junk text, some bytes of it\n", "not a file of weights that torch"),
        ("a.ckpt", b"\x00" * 99, "not a file of weights that torch"),
        ("a.pt", b"1785425525", "not a file of weights that torch"),
        ("a.pt", b"\x80\x02junk", "cannot be read"),
        ("a.pth", b"PK\x03\x04 and no more", "cannot be read"),
        ("a.safetensors", b"\x10" * 40, "cannot be read"),
        ("a.npz", b"", "expected a .safetensors, .pt, .pth, .ckpt, .bin, .th or .pth.tar file"),
        ("a.pt", net(0), r"it holds torch\.nn\.modules\.container\.Sequential"),
        ("a.ckpt", {"state_dict": {}, "args": argparse.Namespace(lr=1)}, "holds argparse.Names"),
        ("a.pt", {"state_dict": PLAIN, "best": Trained()}, "it holds test_cli_weights.Trained"),
        ("a.pt", [1, 2], "not a state dict .*: a list"),
        ("a.pt", {}, "not a state dict .*: it is empty"),
        ("a.pt", PLAIN | {"epoch": 3}, "not a state dict .*: epoch is a int"),
        ("a.pt", PLAIN | {"fc.bias": torch.tensor([0, torch.nan])}, r"there are NaN in fc\.bias"),
    ],
)  # fmt: skip
def test_what_holds_no_weights(name: str, content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(InputError, match=message) as refused:
        load_weights(net(0), tmp_path / name)
    assert name in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_no_code_in_a_file_runs(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": PLAIN, "x": Evil()}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="not a state dict alone"):
        read_weights(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists()
