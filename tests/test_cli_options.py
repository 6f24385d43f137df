"""What is explained: outputs, heads, several targets; with what code a command ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer", reason="the command line's packages are not installed")

from PIL import Image
from support.command_line import run
from typer.testing import CliRunner

import nrm
from nrm import composites, io
from nrm.cli import app as commands
from nrm.cli import report
from nrm.cli.commands import CommandError
from nrm.cli.models import output_of

HERE = __name__


def tiny(*last: nn.Module, outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(100, outputs), *last
        )


class Several(nn.Module):
    """Returns logits, an image, and a list of two."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny()

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = self.body(x)
        return {"logits": logits, "picture": x, "more": [logits[:, :2], -logits], "0": 2 * logits}


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = tiny(outputs=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x).squeeze(1)
        return found


def small(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((12, 12)))).permute(2, 0, 1).float() / 255


def broken() -> nn.Module:
    model = tiny()
    model[3].bias.data[1] = torch.nan  # type: ignore[operator, union-attr]
    return model


def not_a_number(image: Image.Image) -> Tensor:
    return small(image) * torch.nan


def saturated() -> nn.Module:
    """Two labels whose sigmoids are one, the second with the larger logit."""
    model = tiny(nn.Sigmoid())
    model[3].weight.data.mul_(1e-3)  # type: ignore[operator, union-attr]
    model[3].bias.data = torch.tensor([300.0, 400.0, -1.0])  # type: ignore[union-attr]
    return model


MODELS = {
    "plain": tiny,
    "broken": broken,
    "nothing_returned": lambda: _Nothing(),
    "several": Several,
    "squeezed": Squeezed,
    "saturated": saturated,
    "softmax": lambda: tiny(nn.Softmax(1)),
    "sigmoid": lambda: tiny(nn.Sigmoid()),
    "log_softmax": lambda: tiny(nn.LogSoftmax(1)),
    "tanh": lambda: tiny(nn.Tanh()),
    "relu_then_view": lambda: tiny(nn.ReLU(), nn.Flatten()),
}
globals().update(MODELS)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a picture, in which nothing is drawn."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    for name in ("single", "overview"):
        monkeypatch.setattr(report.plot, name, lambda *_, **__: None)
    monkeypatch.setattr(report.plot, "save", lambda figure, path: path.write_bytes(b"drawn"))
    return tmp_path


def explain(model: str, *more: object) -> Any:
    own = ["--model", f"{HERE}:{model}", "--transform", f"{HERE}:small"]
    return run("explain", "picture.png", *own, *more)


def found(model: str, *more: object) -> dict[str, Any]:
    result = explain(model, *more, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def x() -> Tensor:
    return small(io.read_image(Path("picture.png")))[None]


# -- outputs ---------------------------------------------------------------------------------------


def test_one_of_several_outputs(here: Path) -> None:
    logits = tiny()(x())[0].detach()
    for name, expected in (("logits", logits), ("more.1", -logits), ("0", 2 * logits)):
        told = found("several", "--output", name, "--target", "1")
        assert told["output"] == name
        assert told["logit"] == pytest.approx(float(expected[1]), rel=1e-4)
    for given, parts in (
        ([], ["choose one tensor of it with --output: logits [1, 3], picture [1, 3, 12"]),
        (["--output", "logit"], ["--output 'logit': there is none; there are: logits [1, 3]"]),
    ):  # fmt: skip
        result = explain("several", *given)
        assert result.exit_code == 2
        assert all(part in result.stderr for part in parts), result.stderr
    result = explain("plain", "--output", "0")
    assert "--output has no effect: the model returns one tensor" in result.stderr


def test_outputs_by_the_way_to_them() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return [{"a.b": x, 3: -x}, (x + 1,)]

    given = torch.ones(1, 2)
    for wanted, spec, value in (
        ("0.a.b", (0, "a.b"), 1),
        ("0.3", (0, 3), -1),
        ("1.0", (1, 0), 2),
        ("-1.0", (-1, 0), 2),
    ):
        output, tensor = output_of(Nested(), given, wanted)
        assert (output, float(tensor[0, 0])) == (spec, value)
    with pytest.raises(CommandError, match=r"there is none; there are: 0\.a\.b"):
        output_of(Nested(), given, "0.4")


def test_layers_of_one_of_several_outputs(here: Path) -> None:
    shape = ["--input-shape", "1,3,12,12", "--json"]
    result = run("layers", "--model", f"{HERE}:several", *shape, "--output", "more.0")
    assert result.exit_code == 0, result.output
    assert "body.0" in {row["name"] for row in json.loads(result.stdout)}
    result = run("layers", "--model", f"{HERE}:several", *shape)
    assert "choose one tensor of it with --output" in result.stderr


def test_one_number_has_no_probability(here: Path) -> None:
    told = found("squeezed")
    assert told["probability"] is None
    assert told["outputs"] == 1
    assert told["logit"] == pytest.approx(float(Squeezed()(x())[0].detach()), rel=1e-4)
    assert "picture.png: value " in explain("squeezed", "--target", "0").stdout


def test_outputs_that_say_nothing(here: Path) -> None:
    """NaN is blamed on the weights that hold it, else on the picture."""
    for model, message in (
        ("broken", "error: the model's output is NaN: there are NaN in 3.bias"),
        ("nothing_returned", "error: the model returns a NoneType, and no tensor in it"),
    ):
        result = explain(model)
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, message)
    own = ["--model", f"{HERE}:plain", "--transform", f"{HERE}:not_a_number"]
    result = run("explain", "picture.png", *own)
    assert (result.exit_code, "the model's output for this picture holds NaN" in result.stderr) == (
        2,
        True,
    )


# -- heads and probabilities -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "head", "source", "explained"),
    [
        ("softmax", "logits", "the model's output", "logits behind softmax"),
        ("softmax", "keep", "the model's output", "output"),
        ("sigmoid", "logits", "the model's output", "logits behind sigmoid"),
        ("sigmoid", "keep", "the model's output", "output"),
        ("log_softmax", "keep", "the exponential of the model's output", "output"),
        ("plain", "keep", "softmax of the logits", "output"),
        ("tanh", "logits", None, "output"),
        ("relu_then_view", "logits", None, "output"),
    ],
)
def test_heads_and_where_probabilities_come_from(
    here: Path, model: str, head: str, source: str | None, explained: str
) -> None:
    told = found(model, "--head", head, "--target", "2")
    assert (told["head"], told["probability_from"], told["explained"]) == (head, source, explained)
    logits, output = (MODELS[name]()(x())[0].detach() for name in ("plain", model))
    behind = logits if head == "logits" and "behind" in explained else output
    assert told["logit"] == pytest.approx(float(behind[2]), rel=1e-4)
    soft = logits.sigmoid() if model == "sigmoid" else logits.softmax(0)
    for entry in told["largest"]:
        k = entry["target"]
        expected = None if source is None else pytest.approx(float(soft[k]), rel=1e-4)
        assert entry["value"] == pytest.approx(float(output[k]), rel=1e-4)
        assert entry["probability"] == expected
        if k == 2:
            assert told["probability"] == expected


def test_what_people_read(here: Path) -> None:
    assert ", softmax of the logits 0." in explain("plain").stdout
    assert ", probability 0." in explain("sigmoid").stdout
    kept = explain("softmax", "--head", "keep").stdout
    assert ", probability 0." in kept
    assert "logit" not in kept
    assert "(class" not in kept
    assert ": class" in kept


def test_the_largest_of_those_that_a_sigmoid_rounds_to_one(here: Path) -> None:
    assert found("saturated")["target"] == 1


@pytest.mark.parametrize(("weight", "bias"), [(1, 2), (1, -2), (-1, -2), (-1, 2)])
def test_red_is_what_has_the_sign_of_what_is_shared(weight: float, bias: float) -> None:
    """Also where a bias that takes no relevance turned the sign of the output round."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 1)).eval()
    model[1].weight.data = torch.tensor([[weight, -0.25 * weight]])
    model[1].bias.data = torch.tensor([float(bias)])
    x = torch.ones(1, 1, 1, 2)
    for kept in ("drop", "input"):
        R = nrm.Explainer(model, composites.LRPZero(), bias=kept)(x, target=0)  # type: ignore[arg-type]
        entry = {"explained": "output", "probability_from": None, "target": 0}
        blue, red = report._ends(R, entry | {"logit": float(R.scale[0])})
        of_first = float(R.heatmap()[0, 0, 0, 0])
        said = {"raises the value": 1, "for": 1, "lowers the value": -1, "against": -1}
        assert said[red] == -said[blue] == np.sign(of_first) * np.sign(weight)


# -- several targets -------------------------------------------------------------------------------


def test_several_targets_in_one_folder(here: Path) -> None:
    best = int(tiny()(x())[0].argmax())
    order = [best, (best + 1) % 3]
    given = [option for k in (best, order[1], "top1") for option in ("--target", k)]
    told = found("plain", *given, "--layers", "0", "--top", "1")
    assert [entry["target"] for entry in told["explanations"]] == order
    assert told["pictures"] == sorted(
        ["input.png"]
        + [f"target_{k}_{n}.png" for k in order for n in ("flow_1", "heatmap", "overview")]
    )
    for entry in told["explanations"]:
        R = nrm.Explainer(tiny().eval())(x(), target=entry["target"])
        (flow,) = R.top("0", k=1)
        assert entry["flows"][0]["relevance"] == pytest.approx(flow.relevance, rel=1e-4)
        assert entry["logit"] == pytest.approx(float(R.scale[0]), rel=1e-5)
    one = found("plain", "--target", best)  # what the earlier result had is there no more
    assert one["target"] == best
    assert {p.name for p in Path("out").iterdir()} == {*one["pictures"], "result.json"}


def test_a_class_against_another(here: Path) -> None:
    order = tiny()(x())[0].argsort(descending=True).tolist()
    for model, name in (("plain", "output"), ("softmax", "logits behind softmax")):
        told = found(model, "--against", "top2", "--layers", "0", "--top", "1")
        assert (told["target"], told["against"]) == (order[0], order[1])
        assert told["explained"] == name
        R = nrm.Explainer(tiny().eval())(x(), target=nrm.Contrast(order[0], order[1]))
        assert told["logit"] == pytest.approx(float(R.scale[0]), rel=1e-4)
        (flow,) = R.top("0", k=1)
        assert told["flows"][0]["relevance"] == pytest.approx(flow.relevance, rel=1e-4)
    said = explain("plain", "--target", order[2], "--against", order[0]).stdout
    assert f"class {order[2]} rather than class {order[0]}" in said
    assert "difference of logits -" in said
    for model, given, message in (
        ("plain", ["--target", "1", "--against", "1"], "is the target itself"),
        ("plain", ["--against", "7"], "target 7 is out of range"),
        ("squeezed", ["--against", "0"], "the model has one output"),
    ):
        refused = explain(model, *given)
        assert refused.exit_code == 2
        assert message in refused.stderr


# -- composites with parameters --------------------------------------------------------------------


def test_composites_with_parameters(here: Path) -> None:
    told = found("plain", "--composite", "cplrp(0.5)", "--target", "0", "--layers", "0")
    assert told["composite"] == "CPLRP(0.5)"

    def first(composite: composites.Composite) -> float:
        R = nrm.Explainer(tiny().eval(), composite)(x(), target=0)
        return R.top("0", k=1)[0].relevance

    assert told["flows"][0]["relevance"] == pytest.approx(first(composites.CPLRP(0.5)), rel=1e-4)
    assert abs(first(composites.CPLRP(0.5)) - first(composites.CPLRP())) > 1e-3


# -- how it ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["drop", "nonsense"])
def test_exit_codes(here: Path, monkeypatch: pytest.MonkeyPatch, bias: str) -> None:
    assert explain("plain", "--bias", bias).exit_code == (0 if bias == "drop" else 2)
    assert explain("nothing").exit_code == 2
    monkeypatch.setattr(report, "report", lambda *_, **__: 1 / 0)
    own = ["--model", f"{HERE}:plain", "--transform", f"{HERE}:small"]
    unforeseen = CliRunner().invoke(commands.app, ["explain", "picture.png", *own])
    assert unforeseen.exit_code == 1
    assert isinstance(unforeseen.exception, ZeroDivisionError)
