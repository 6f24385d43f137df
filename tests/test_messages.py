"""What a person reads who gave something wrong: what it was, where, and what to do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import nrm
from nrm import composites, rules
from nrm.errors import CaptureError, InputError, NeuronSetError, QueryError, TargetError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)
    return nn.Sequential(*layers).eval()


X = torch.rand(2, 3)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("3.weight", "nan", "the model's parameter '3.weight' holds NaN values"),
        ("0.bias", "inf", "the model's parameter '0.bias' holds infinite values"),
        ("1.running_var", "nan", "the model's buffer '1.running_var' holds NaN values"),
    ],
)
def test_weights_that_are_no_numbers_are_named(name, value, said):
    model = network()
    with torch.no_grad():
        model.state_dict()[name].view(-1)[0] = float(value)
    with pytest.raises(CaptureError, match=said) as refusal:
        nrm.Explainer(model)(X, target=0)
    assert "random" not in str(refusal.value)


def test_weights_that_are_no_numbers_any_more_are_named():
    """Also where nobody looks whether the model is what was captured."""
    model = network()
    explainer = nrm.Explainer(model, check="none")
    explainer(X, target=0)
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises((TargetError, CaptureError), match=r"parameter '3\.weight' holds NaN"):
        explainer(X, target=0)


def test_an_output_that_overflows_is_said_to():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))  # no fault in it

        def forward(self, x):
            return torch.exp(100 * self.linear(x).abs() + 100) + self.mask

    with pytest.raises(CaptureError, match=r"its parameters are finite.*overflows"):
        nrm.Explainer(Large().eval())(X, target=0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("GammaFlat", r"nrm\.composites\.by_name\('GammaFlat'\)"),
        ("epsilonplus", r"nrm\.composites\.by_name\('EpsilonPlus'\)"),
        ("whatever else", r"nrm\.composites\.by_name\('GammaFlat'\)"),
        (composites.AttnLRP, r"Call it: AttnLRP\(\)"),
        (rules.Gamma, r"Call it: Gamma\(\)"),
        (3, "a rule, not 3"),
    ],
)
def test_what_stands_in_the_place_of_a_composite(given, said):
    with pytest.raises(TypeError, match=said):
        nrm.Explainer(network(), given)


def test_models_in_training_mode():
    with pytest.raises(InputError, match=r"it is in training mode.*model\.eval\(\)\.$"):
        nrm.Explainer(network().train())(X)
    model = network()
    model[1].train()
    with pytest.raises(InputError, match="its module '1' is in training mode"):
        nrm.Explainer(model)(X)
    with pytest.raises(InputError, match="a new module begins in training mode"):
        nrm.Explainer(nn.Sequential(network()))(X)


def test_inputs_that_are_no_numbers_are_named():
    with pytest.raises(InputError, match="the input holds NaN"):
        nrm.Explainer(network())(X * torch.nan)


MISSING = {
    "from nrm import plot": ("matplotlib", "pip install 'nrm[cli]'"),
    "import nrm; nrm.plot": ("matplotlib", "pip install 'nrm[cli]'"),
    "import nrm.interop.captum": ("captum", 'pip install "nrm[captum]"'),
    "import nrm.interop.pyg": ("torch_geometric", 'pip install "nrm[models]"'),
}


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What each of those lines says in a Python of its own where the packages are missing."""
    code = ["import json, sys", "said = {}"]
    code += [f"sys.modules[{package!r}] = None" for package, _ in MISSING.values()]
    for line in MISSING:
        code += ["try:", f"    {line}"]
        code += ["except ModuleNotFoundError as error:", f"    said[{line!r}] = str(error)"]
    run = [sys.executable, "-c", "\n".join([*code, "print(json.dumps(said))"])]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("line", MISSING)
def test_a_missing_package_says_what_to_install(answers, line):
    package, said = MISSING[line]
    assert package in answers[line]
    assert said in answers[line]


def test_unnormalised_relevance_that_overflows_asks_for_double_precision():
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(16):
        layers += [nn.Linear(3, 3, bias=False), nn.Tanh()]
        layers[-2].weight.data.abs_().mul_(1e3)
    model, x, a = nn.Sequential(*layers).eval(), torch.rand(1, 3) + 0.5, nrm.channels("0", 1)
    R = nrm.Explainer(model, rules.Zero())(x, target=0)
    with pytest.raises(QueryError, match=r"overflowed torch.float32.*normalized=False.*double"):
        R(a, normalized=False)
    R = nrm.Explainer(model.double(), rules.Zero())(x.double(), target=0)
    assert float(R(a, normalized=False)) > torch.finfo(torch.float32).max


def test_channels_in_a_list():
    with pytest.raises(
        NeuronSetError, match=r"nrm.channels\('0', 1, 2\), not as a list.*\*\[1, 2\]"
    ):
        nrm.channels("0", [1, 2])  # type: ignore[arg-type]


def test_evaluation_of_an_input_without_a_batch_axis():
    with pytest.raises(InputError, match=r"with a batch axis in front \(x\[None\]\)"):
        nrm.evaluate(nrm.Explainer(network()[3:].eval()), [torch.rand(4)], ["0"])


@pytest.mark.parametrize("target", [torch.rand(200, 200) > 0.5, (0, 1, 0), [[0, 1], [1, 0]]])
def test_targets_of_other_shapes_are_not_printed_whole(target):
    with pytest.raises(TargetError) as refusal:
        nrm.Explainer(network())(X, target=target)
    assert "a target is an int" in str(refusal.value)
    assert len(str(refusal.value)) < 300
