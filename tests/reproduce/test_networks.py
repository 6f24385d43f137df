"""The networks: training is seeded and kept, pretrained ones are those that were published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

from safetensors.torch import save_file

from nrm.errors import InputError
from nrm.evaluation.store import digest
from nrm_reproduce import networks
from nrm_reproduce.data import Task, load_flat, load_molecules
from nrm_reproduce.networks import (
    RECIPES,
    NotAccurateError,
    load_gin,
    of_class,
    pictured,
    train_rnn,
    trained_mlp,
)
from nrm_reproduce.report import Request


def test_training_is_seeded_and_kept(small, digits, tmp_path, monkeypatch):
    epochs = []
    state = torch.random.get_rng_state()
    first = trained_mlp(digits, tmp_path / "a" / "w.safetensors", seed=1, advance=epochs.append)
    assert not first.loaded
    assert sum(epochs) == RECIPES["digits"].epochs
    assert first.accuracy >= RECIPES["digits"].accuracy
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(p.requires_grad for p in first.model.parameters())
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["w.safetensors"]

    again = trained_mlp(digits, tmp_path / "b.safetensors", seed=1)
    assert again.digest == first.digest

    monkeypatch.setattr(networks, "train_mlp", lambda *_: pytest.fail("trained again"))
    loaded = trained_mlp(digits, tmp_path / "a" / "w.safetensors", seed=1)
    assert loaded.loaded
    assert (loaded.digest, loaded.accuracy) == (first.digest, first.accuracy)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[key])


def test_weights_of_something_else_are_replaced(small, digits, tmp_path):
    file = tmp_path / "w.safetensors"
    first = trained_mlp(digits, file, seed=1)
    other = trained_mlp(digits, file, seed=2)
    assert not other.loaded
    assert other.digest != first.digest
    file.write_bytes(file.read_bytes()[:200])  # as a full disk may leave it
    healed = trained_mlp(digits, file, seed=2)
    assert not healed.loaded
    assert healed.digest == other.digest
    assert trained_mlp(digits, file, seed=2).loaded


def test_a_network_that_is_not_accurate_is_not_kept(digits, tmp_path):
    file = tmp_path / "w.safetensors"
    hasty = networks.Recipe((4, 4), epochs=1, batch=64, rate=1e-3, accuracy=0.95)
    with pytest.raises(NotAccurateError, match="of the test digits, fewer than 95"):
        trained_mlp(digits, file, recipe=hasty)
    assert not file.exists()


def test_the_network_of_mnist_is_as_accurate_as_the_papers(shared, tmp_path):
    """Also when it is trained in fewer epochs, with larger steps."""
    recipe = replace(RECIPES["mnist"], epochs=3, rate=5e-3)
    assert recipe.accuracy == 0.977
    found = trained_mlp(load_flat(str(shared)), tmp_path / "w.safetensors", recipe=recipe)
    assert found.accuracy >= 0.977


def test_networks_of_other_seeds_differ_and_of_the_same_seed_do_not():
    weight, same, other = (
        train_rnn(Task.POSITION, 3, seed).model.cell.weight for seed in (0, 0, 1)
    )
    assert torch.equal(weight, same)
    assert not torch.allclose(weight, other)


def test_one_class_of_a_linear_layer():
    model = nn.Sequential()
    model.classifier = nn.Sequential(nn.Linear(4, 3, bias=False))
    narrow = of_class(model, 2).classifier
    x = torch.rand(2, 4)
    torch.testing.assert_close(narrow(x), model.classifier(x)[:, 2:])


def folder_of_pictures(tmp_path):
    from PIL import Image

    (tmp_path / "imagenet").mkdir()
    Image.new("RGB", (300, 260), "green").save(tmp_path / "imagenet" / "a.png")
    return tmp_path


class Small(nn.Sequential):
    """In VGG16's place, which has half a gigabyte."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, stride=32), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
        self.append(nn.Flatten()).append(nn.Linear(125, 6)).append(nn.ReLU())
        self.append(nn.Linear(6, 3))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_of_ones_own(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "VGG16", f"{__name__}:Small")
    torch.manual_seed(3)
    model = Small()
    file = tmp_path / f"weights.{suffix}"
    save = torch.save if suffix == "pth" else save_file
    save(model.state_dict(), file)
    request = Request(str(folder_of_pictures(tmp_path)), tmp_path, weights=file)
    assert digest(pictured(request, 1).model) == digest(model.eval())
    assert pictured(request, 1).said == f"VGG16, with the weights of {file.name}"
    assert pictured(request, 1).kind == "VGG16"
    save({"0.weight": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="does not fit the model"):
        pictured(request, 1)


def test_digits_that_the_network_has_not_seen():
    few, more = (pictured(Request("digits", Path()), count) for count in (3, 5))
    assert few.model is more.model  # trained once
    assert {photo.name for photo in few.photos} < {photo.name for photo in more.photos}
    right = [int(few.model(p.x).argmax()) for p in few.photos]
    assert len(right) == 3
    assert "scikit-learn's digits" in few.said
    with pytest.raises(InputError, match="--weights are those of VGG16"):
        pictured(Request("digits", Path(), weights=Path("vgg.pth")), 1)


def test_the_logits_are_those_stored(shared):
    model, stored = load_gin(shared / "graphs")
    molecules = load_molecules(shared / "graphs")
    logits = torch.stack([model(m.adjacency, m.features) for m in molecules])
    assert logits.shape == stored.shape == (188, 2)
    assert torch.allclose(logits, stored.double(), atol=1e-6 * float(stored.abs().max()))
    right = logits.argmax(1) == torch.tensor([m.label for m in molecules])
    assert int(right.sum()) == 170


def test_a_folder_without_the_graph_network_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no mutag_gin3\.safetensors"):
        load_gin(tmp_path)
