"""The examples in docstrings of the public names run, on small models with the names they use."""

from __future__ import annotations

import ast
import doctest
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm import composites, evaluation, methods, operators, rules, sets, testing
from nrm.torchvision_mismatch import import_torchvision

pytest.importorskip("sklearn", reason="nrm[demo] is not installed")
pytest.importorskip("transformers", reason="nrm[models] is not installed")


class Pictured(nn.Module):
    """Layers under the names of VGG16, of few channels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for count, width in ((2, 16), (2, 16), (3, 16), (3, 16), (3, 51)):
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc1, self.fc2 = nn.Linear(51, 4), nn.Linear(4, 346)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(self.features(x).mean((2, 3)))))


class Stemmed(nn.Module):
    """Two layers by name, and what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.layer1 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(torch.relu(self.conv1(x))).sum((2, 3))


def language_model() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_torchvision()
        from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=8, n_head=6, n_embd=24, n_positions=32, vocab_size=20, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def examples(of: object) -> list[str]:
    """The statements of a docstring."""
    return [one.source for one in doctest.DocTestParser().get_examples(inspect.getdoc(of) or "")]


def run(of: object, names: dict[str, Any], only: slice = slice(None)) -> dict[str, Any]:
    """Run them, each statement that is an expression for its value."""
    found = examples(of)[only]
    assert found
    for source in found:
        exec(compile(ast.parse(source), f"<{of!r}>", "exec"), names)
    return names


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """What examples about pictures take as given."""
    torch.manual_seed(0)
    model, image = Pictured().eval(), torch.rand(1, 3, 112, 112)
    explainer = nrm.Explainer(model)
    layers = ["features.26", "features.28", "fc1"]
    given = {"nrm": nrm, "model": model, "image": image, "x": image, "layers": layers}
    given |= {"explainer": explainer, "R": explainer(image), "Explainer": nrm.Explainer}
    return given | vars(composites) | vars(rules) | vars(methods) | vars(sets)


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """What examples about texts take as given."""
    gpt2, ids = language_model(), torch.arange(3)[None]
    explainer = nrm.Explainer(gpt2, output="logits")
    given = {"nrm": nrm, "gpt2": gpt2, "ids": ids, "token": 3, "mary": 4, "john": 5}
    return given | {"explainer": explainer, "Explainer": nrm.Explainer}


PICTURES = {
    "Blocks": (nrm.Blocks, slice(None)),
    "Condition": (nrm.Condition, slice(None)),
    "Explainer": (nrm.Explainer, slice(2)),
    "Measure.of": (nrm.Measure.of, slice(None)),
    "Measure.joint": (nrm.Measure.joint, slice(None)),
    "Measure.top": (nrm.Measure.top, slice(None)),
    "Contrast": (nrm.Contrast, slice(1)),
    "clusters": (nrm.clusters, slice(None)),
    "patch": (nrm.patch, slice(None)),
    "Composite": (composites.Composite, slice(None)),
    "applied": (composites.Composite.applied, slice(None)),
    "crp_conditions": (methods.crp_conditions, slice(None)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_examples_about_pictures(shown, name):
    of, only = PICTURES[name]
    run(of, dict(shown), only)


def test_examples_about_texts(written):
    run(nrm.Explainer, written, slice(2, None))
    edges = run(nrm.Measure.edges, written, slice(1))["edges"]
    assert len(edges.top(5)) == 5
    assert len(edges("a3.h5", "m7")) == 1
    run(nrm.Contrast, written, slice(1, None))


def test_the_example_of_a_generated_text(written):
    class Tokenizer:
        """Of a text of two tokens."""

        def __call__(self, text: str, return_tensors: str) -> dict[str, Tensor]:
            return {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2)}

        def decode(self, ids: list[int]) -> str:
            return f" {ids[0]}"

    names = {"nrm": nrm, "model": written["gpt2"], "tokenizer": Tokenizer(), "text": "", "n": 2}
    run(nrm.generation, names)


def test_examples_about_small_networks():
    torch.manual_seed(0)
    layers = (nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model = nn.Sequential(*layers).eval()
    explainer = nrm.Explainer(model)
    images = list(torch.rand(2, 1, 5))
    names = {"explainer": explainer, "images": images, "nrm": nrm, **vars(evaluation)}
    found = run(nrm.evaluate, names)["found"]
    assert found.mean("joint").samples == 2
    stemmed = nrm.Explainer(Stemmed().eval())(torch.rand(1, 3, 6, 6))
    run(nrm.Measure.edges, {"R": stemmed, "nrm": nrm}, slice(2, None))


def test_examples_of_combinations_of_positions():
    model, image = nn.Conv2d(3, 16, 1).eval(), torch.rand(1, 3, 90, 90)
    names = {"explainer": nrm.Explainer(model), "nrm": nrm, "image": image}
    run(nrm.Average, names | {"mask": torch.ones(16, 90, 90, dtype=torch.bool)})


def test_examples_of_checks_and_rows():
    names = {"nrm": nrm, "torch": torch, "Tensor": Tensor}
    names |= vars(rules) | vars(testing)
    run(testing.check_rule, names)
    run(testing.check_operator, names, slice(2))  # the last is of a row of one's own
    assert run(operators.operation, names)["cube"](torch.tensor(2.0)) == 8
