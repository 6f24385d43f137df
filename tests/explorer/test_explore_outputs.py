"""Outputs at several places in the explorer: words at positions, classes of pixels and nodes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from support.opened import answered, opens
from torch import Tensor, nn

import nrm
from nrm.errors import QueryError
from nrm.explore import answers
from nrm.explore.columns import chosen_at_first, columns_of
from nrm.explore.opened import Input, Opened
from nrm.measure import Measure

pytestmark = pytest.mark.usefixtures("captured_once")


class Segments(nn.Module):
    """Classes of every pixel, `[classes, H, W]` or, on request, `[H, W, classes]`."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.conv1, self.a = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU()
        self.conv2, self.last = nn.Conv2d(3, 5, 3, padding=1), last

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv2(self.a(self.conv1(x)))
        return found.permute(0, 2, 3, 1) if self.last else found


class Nodes(nn.Module):
    """A graph network that tells the class of every node."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(2, 4), nn.Linear(4, 3)
        self.register_buffer("adjacency", torch.eye(4) + torch.eye(4).roll(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin2(self.adjacency @ torch.relu(self.lin1(self.adjacency @ x)))
        return found


def language_models() -> Iterator[nn.Module]:
    from nrm.torchvision_mismatch import import_torchvision

    with warnings.catch_warnings(), suppress(ModuleNotFoundError):
        warnings.filterwarnings("ignore", "torchvision's compiled operators", RuntimeWarning)
        import_torchvision()  # transformers imports it
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"vocab_size": 40, "num_hidden_layers": 1}
    llama = transformers.LlamaConfig(
        **shape, hidden_size=8, intermediate_size=12, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    gpt = transformers.GPT2Config(
        vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    yield transformers.LlamaForCausalLM(llama).eval()
    yield transformers.GPT2LMHeadModel(gpt).eval()


def check_target(
    R: Measure, opened: Opened, target: list[int], against: list[int] | None = None
) -> Any:
    """An answer of an output at a place, beside the explainer asked for it; what is explained."""
    first = chosen_at_first(columns_of(R.graph, opened, R))
    found, _, explained = answered(R, opened, columns=first, target=target, against=against)
    wanted: Any = tuple(target)
    if against is not None:
        wanted = nrm.Contrast(wanted, tuple(against))
    right = opened.explainer(*opened.inputs[0].args, **opened.inputs[0].named, target=wanted)
    layer = opened.place or R.graph.inputs[0].name
    assert answers.numbers(found.heatmap).sum() == pytest.approx(
        float(right.marginal(layer).sum()), abs=1e-4
    )
    for one in found.columns:
        for node in one.nodes[:3]:
            chosen = nrm.channels(one.layer, node.index, axis=one.axis)
            assert node.value == pytest.approx(float(right(chosen)), abs=1e-5)
    assert explained.scale == pytest.approx(float(right.scale), rel=1e-5)
    return explained


@pytest.mark.parametrize("number", [0, 1], ids=["llama", "gpt2"])
def test_the_next_word_at_any_position(number: int) -> None:
    """Logits `[1, 8, 40]` of ids `[1, 8]`: where, and which word."""
    model = list(language_models())[number]
    ids = torch.randint(40, (1, 8), generator=torch.Generator().manual_seed(1))
    words = [f"word{k}" for k in range(40)]
    embedding = "model.embed_tokens" if number == 0 else "transformer.wte"
    one = Input("it", (), "", {"input_ids": ids}, words=[words[k] for k in ids[0].tolist()])
    explainer = nrm.Explainer(model, output="logits")
    opened = Opened("it", "words", explainer, [one], "", words, place=embedding, axis=0)
    R = opened.measure(one)
    explained = check_target(R, opened, [-1, 12])
    assert (explained.place, explained.places, explained.after) == ([7], [8], 1)
    assert (explained.target, explained.count) == (12, 40)
    assert explained.label == "word12 at 7"
    values = R.output[0, 7]
    assert [k for k, _, _ in explained.outputs[:3]] == values.topk(3).indices.tolist()
    contrast = check_target(R, opened, [2, 5], [2, 7])
    assert contrast.label == "word5 at 2 − word7 at 2"
    found, _, told = answered(R, opened, target=[3, None])
    assert told.target == int(R.output[0, 3].argmax())
    assert found.total.notation == f"R((3, {told.target}))"
    heads = [one for one in columns_of(R.graph, opened, R) if one.kind == "attention"]
    assert [one.ways[0].size for one in heads] == [2]


@pytest.mark.parametrize("last", [False, True], ids=["classes first", "classes last"])
@pytest.mark.parametrize("labels", [None, list("abcde")], ids=["unnamed", "named"])
def test_a_class_of_a_pixel(last: bool, labels: list[str] | None) -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 1, 6, 7)
    opened, R = opens(Segments(last).eval(), [x], "picture", labels=labels)
    place, number = [2, 5], 3
    target = [*place, number] if last else [number, *place]
    explained = check_target(R, opened, target)
    assert (explained.place, explained.places, explained.target) == (place, [6, 7], number)
    assert (explained.after, explained.count) == (2 if last else 0, 5)
    assert explained.label == f"{'d' if labels else 'output 3'} at (2, 5)"
    largest = answered(R, opened)[2]
    of = [*largest.place[: largest.after], largest.target, *largest.place[largest.after :]]
    assert R.output[0][tuple(of)] == R.output.max()  # what is explained where nobody says


def test_a_class_of_a_node() -> None:
    torch.manual_seed(0)
    opened, R = opens(Nodes().eval(), [torch.randn(1, 4, 2)], "graph", labels=list("abc"), axis=0)
    explained = check_target(R, opened, [1, 2])
    assert (explained.place, explained.target, explained.label) == ([1], 2, "c at 1")


OUTPUTS: list[tuple[Any, str]] = [
    (3, "named by 3 numbers"), ([1, 2], "named by 3 numbers"), ([1, 2, 9], "they are 0 to 6"),
    ([5, 2, 2], "they are 0 to 4"), ([-1, 2, 2], "they are 0 to 4"), ([1, True, 2], "whole"),
    ([1, "2", 2], "whole"), ([1, None, 2], "whole"), ({"a": 1}, "whole"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "why"), OUTPUTS, ids=lambda value: str(value)[:30])
def test_what_is_no_output_is_refused(
    target: Any, why: str, segments: tuple[Opened, Measure]
) -> None:
    opened, R = segments
    with pytest.raises(QueryError) as refused:
        answered(R, opened, target=target)
    assert why in str(refused.value)
    with pytest.raises(QueryError):
        answered(R, opened, target=[0, 0, 0], against=target)


@pytest.fixture(scope="module")
def segments() -> tuple[Opened, Measure]:
    torch.manual_seed(0)
    return opens(Segments(False).eval(), [torch.rand(1, 1, 6, 7)], "picture")


def test_values_beside_outputs_are_of_what_is_explained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)).eval()
    x = torch.rand(1, 4)
    opened, R = opens(model, [x], "series", labels=["a", "b", "c"])
    _, _, explained = answered(R, opened)
    logits = dict(enumerate(model[0](x)[0].tolist()))
    assert explained.what == "logits behind softmax"
    assert {k: value for k, _, value in explained.outputs} == pytest.approx(logits)
    assert explained.target == max(logits, key=logits.__getitem__)
    assert explained.scale == pytest.approx(logits[explained.target])
