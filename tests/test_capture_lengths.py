"""Sequences of several lengths from one export, each proved, and equal to a capture of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm.capture import export as exporting
from nrm.capture.call import ModelCall
from nrm.capture.lengths import family

WORDS = 20


def tokens(length: int, batch: int = 1) -> Tensor:
    return torch.randint(0, WORDS, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch.export was called with."""
    calls: list[Any] = []
    itself = exporting.export

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options.get("dynamic_shapes"))
        return itself(*args, **options)

    monkeypatch.setattr(exporting, "export", counted)
    return calls


def of_its_own(model: nn.Module, ids: Tensor, **options: Any) -> nrm.Measure:
    """The measure from a capture for this length alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting.lengths, "family", lambda *call: None)
        return nrm.Explainer(model, output=options.pop("output", None))(ids, **options)


class Language(nn.Module):
    """Embeddings, places, causal attention: the last token's next."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 8), nn.Embedding(16, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, WORDS)

    def forward(self, ids: Tensor, use_cache: bool = False) -> Tensor:
        length = ids.shape[1]
        x = self.words(ids) + self.places(torch.arange(length, device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype)
        return self.head(self.layers(x, mask=mask, is_causal=True))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 5)
        self.layers = nn.LSTM(5, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, WORDS)

    def forward(self, ids: Tensor, use_cache: bool = False) -> Tensor:
        return self.head(self.layers(self.words(ids))[0])


class Averaged(nn.Module):
    """A sum over words, divided by how many there are, and a share of the length itself."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.words(ids).reshape(ids.shape[0] * length, 5).relu().view(-1, length, 5)
        return self.head(x.sum(1) / length + 0.1 * length)


def transformers_model(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    if name == "qwen":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=32, n_embd=16, n_layer=1, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("name", ["language", "recurrent", "llama", "qwen", "gpt2"])
def test_other_lengths_are_not_exported_again(torchvision_models, exports, name):
    torch.manual_seed(0)
    own = {"language": Language, "recurrent": Recurrent}
    model = own[name]() if name in own else transformers_model(name)
    model = model.double().eval()
    output = None if name in own else "logits"
    options = {"use_cache": False, "target": (-1, 7)}
    explainer = nrm.Explainer(model, output=output)
    explainer(tokens(5), **options)
    assert len(exports) == 1
    for length, batch in ((8, 3), (2, 1)):
        ids = tokens(length, batch)
        R = explainer(ids, **options)
        assert len(exports) == 1
        S = of_its_own(model, ids, output=output, **options)
        assert len(exports) == 2
        torch.testing.assert_close(R.tokens(), S.tokens(), rtol=0, atol=1e-10)
        torch.testing.assert_close(R.output, S.output, rtol=0, atol=1e-12)
        del exports[1:]


def test_what_is_computed_from_the_length_follows_it(exports):
    torch.manual_seed(0)
    model = Averaged().double().eval()
    explainer = nrm.Explainer(model, nrm.rules.Zero(), bias="input")
    for length in (5, 7, 3):
        R = explainer(tokens(length), target=1)
        S = of_its_own(model, tokens(length), target=1)
        torch.testing.assert_close(R.output, model(tokens(length)).detach())
        assert R.graph.captured.method == S.graph.captured.method == "export"
        alone = nrm.Explainer(model, nrm.rules.Zero(), bias="input")(tokens(length), target=1)
        torch.testing.assert_close(R.tokens(), alone.tokens(), rtol=0, atol=1e-12)


class Branching(Averaged):
    """Another network for long sequences."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x.relu() if ids.shape[1] > 4 else x.tanh()
        return self.head(x.sum(1))


def test_a_branch_on_the_length_is_exported_on_either_side(exports):
    torch.manual_seed(0)
    model = Branching().double().eval()
    explainer = nrm.Explainer(model)
    for length in (6, 3, 7, 4):
        R = explainer(tokens(length), target=1)
        S = of_its_own(model, tokens(length), target=1)
        torch.testing.assert_close(R.output, model(tokens(length)).detach())
        torch.testing.assert_close(R.tokens(), S.tokens(), rtol=0, atol=1e-10)
        operators = [variable.name for variable in R.graph.variables]
        assert any("relu" in name for name in operators) == (length > 4)


FACTOR = [1.0]


class Scaled(Averaged):
    """Reads what does not lie in it."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).relu().sum(1) * FACTOR[0])


def test_a_graph_that_is_not_the_model_at_another_length_is_exported_anew(exports):
    torch.manual_seed(0)
    model = Scaled().double().eval()
    explainer = nrm.Explainer(model)
    explainer(tokens(5), target=1)
    explainer(tokens(4), target=1)
    assert len(exports) == 1
    FACTOR[0] = 2.0
    try:
        R = explainer(tokens(3), target=1)
        assert len(exports) == 2
        torch.testing.assert_close(R.output, model(tokens(3)).detach())
        explainer(tokens(7), target=1)
        assert len(exports) == 2
    finally:
        FACTOR[0] = 1.0


def test_changed_weights_are_exported_anew(exports):
    torch.manual_seed(0)
    model = Scaled().double().eval()
    explainer = nrm.Explainer(model)
    explainer(tokens(5), target=1)
    with torch.no_grad():
        model.words.weight.mul_(-1)
    R = explainer(tokens(3), target=1)
    assert len(exports) == 2
    torch.testing.assert_close(R.output, model(tokens(3)).detach())


class Masked(Averaged):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.words(ids).relu() * mask.unsqueeze(-1)).sum(1) / mask.sum(1, True))


def test_masks_are_as_long_as_the_tokens(exports):
    torch.manual_seed(0)
    model = Masked().double().eval()
    explainer = nrm.Explainer(model)
    explainer(tokens(6), mask=torch.ones(1, 6, dtype=torch.long), target=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    R = explainer(tokens(4, 2), mask=mask, target=1)
    assert len(exports) == 1
    S = of_its_own(model, tokens(4, 2), mask=mask, target=1)
    torch.testing.assert_close(R.tokens(), S.tokens(), rtol=0, atol=1e-10)
    assert R.tokens()[mask == 0].abs().max() == 0


def test_only_token_ids_have_a_free_length():
    model = nn.Identity()
    ids, real = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4)

    def of(*inputs: Any, axis: int | None = 0) -> bool:
        return family(ModelCall(model, inputs, {}, None), axis) is not None

    assert of(ids)
    assert of(ids, real)
    assert not of(real)
    assert not of(ids.bool())
    assert not of(torch.zeros(1, 4, 5, dtype=torch.long))
    assert not of(torch.zeros(1, 3, 8, 8))
    assert not of(ids, torch.zeros(1, 5))
    assert not of(ids[:, :1])
    assert not of(ids, axis=None)
    assert not of(ids, object())  # it may decide anything
