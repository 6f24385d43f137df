"""Generated texts, all steps at once: equal to step by step, padded either side, shown."""

from __future__ import annotations

import io
import json
import warnings
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm import coloured
from nrm.coloured import Line
from nrm.errors import InputError, TargetError

pytestmark = pytest.mark.usefixtures("captured_once")

VOCABULARY = 31


class Tiny(nn.Module):
    """A causal transformer by hand: no other package is needed."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        logits: Tensor = self.head(x)
        return logits


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().double().eval()


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from nrm.torchvision_mismatch import import_torchvision

    with warnings.catch_warnings(), suppress(ModuleNotFoundError):
        warnings.filterwarnings("ignore", "torchvision's compiled operators", RuntimeWarning)
        import_torchvision()
    import transformers

    return transformers


@cache
def llama(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config).double().eval()
    return model


@cache
def gpt2(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config).double().eval()
    return model


IDS = torch.tensor([[5, 9, 3, 17, 8, 22, 11]])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_steps_equal_step_by_step(transformers: Any, name: str) -> None:
    model = {"llama": llama, "gpt2": gpt2}[name](transformers)
    explainer = nrm.Explainer(model, output="logits")
    found = nrm.generation(explainer, IDS, prompt=4)
    contrast = nrm.generation(explainer, IDS, prompt=4, against="next")
    assert found.relevance.shape == (3, 7)
    assert len(explainer._captures) == 1
    tokens = "model.embed_tokens" if name == "llama" else "transformer.wte"
    for step in range(3):
        place = 4 + step
        grown = IDS[:, :place]  # as the model read it when it said the token
        alone = explainer(grown, target=(-1, int(IDS[0, place])))
        expected = alone.tokens(at=tokens)[0]
        torch.testing.assert_close(found.relevance[step, :place], expected, rtol=0, atol=1e-10)
        assert not found.relevance[step, place:].any()
        torch.testing.assert_close(found.scale[step], alone.scale[0])
        logits = alone.output[0, -1].clone()
        logits[IDS[0, place]] = -torch.inf
        other = int(logits.argmax())
        assert contrast.against is not None
        assert int(contrast.against[step]) == other
        alone = alone.of(nrm.Contrast((-1, int(IDS[0, place])), (-1, other)))
        expected = alone.tokens(at=tokens)[0]
        torch.testing.assert_close(
            contrast.relevance[step, :place], expected, rtol=1e-10, atol=1e-10
        )
        assert not contrast.relevance[step, place:].any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(transformers: Any, name: str, side: str) -> None:
    model = {"llama": llama, "gpt2": gpt2}[name](transformers)
    explainer = nrm.Explainer(model, output="logits")
    short = IDS[0, :5]
    padding = torch.zeros(2, dtype=torch.long)
    row = torch.cat([padding, short] if side == "left" else [short, padding])
    mask = torch.cat([padding, torch.ones_like(short)])
    ids = torch.stack([IDS[0], row])
    mask = torch.stack([torch.ones(7, dtype=torch.long), mask if side == "left" else mask.flip(0)])
    both = nrm.generations(explainer, ids, [4, 2], attention_mask=mask)
    for found, text, prompt in zip(both, (IDS[0], short), (4, 2), strict=True):
        alone = nrm.generation(explainer, text, prompt)
        assert found.ids.tolist() == text.tolist()
        assert found.relevance.shape == alone.relevance.shape
        torch.testing.assert_close(found.relevance, alone.relevance, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.scale, alone.scale)
    chosen = nrm.generations(explainer, ids, [4, 2], attention_mask=mask, against=[7, "next"])
    alone = nrm.generation(explainer, short, 2, against="next")
    torch.testing.assert_close(chosen[1].relevance, alone.relevance, rtol=1e-10, atol=1e-10)
    assert chosen[0].against is not None
    assert chosen[0].against.tolist() == [7, 7, 7]


def test_caches_of_the_model_do_not_matter(transformers: Any) -> None:
    """What it keeps for later calls is no output."""
    model = llama(transformers)
    explainer = nrm.Explainer(model, output="logits")
    found = [nrm.generation(explainer, IDS, 5, use_cache=use) for use in (True, False)]
    torch.testing.assert_close(found[0].relevance, found[1].relevance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("composite", [None, nrm.composites.Circuits()])
def test_a_given_cache_is_an_input(transformers: Any, composite: Any) -> None:
    """Its share is what, with all tokens given, comes to what was read before, from above."""
    model = gpt2(transformers)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(IDS[:, :4], past_key_values=cache)
    explainer = nrm.Explainer(model, composite, output="logits", bias="input")
    R = explainer(IDS[:, 4:], past_key_values=cache, target=(-1, 5))
    assert cache.get_seq_length() == 4  # nothing was written into it
    whole = explainer(IDS, target=(-1, 5))
    torch.testing.assert_close(R.scale, whole.scale, rtol=0, atol=1e-10)
    new, every = R.tokens(at="transformer.wte"), whole.tokens(at="transformer.wte")
    torch.testing.assert_close(new, every[:, 4:], rtol=0, atol=1e-10)
    leaves = {"values": "values"} | ({} if composite is None else {"keys": "keys"})
    sets = {role: nrm.components(whole, role, tokens=True) for role in leaves}
    before = {
        (role, layer): [
            chosen
            for name, chosen in sets[role].items()
            if name.startswith(f"a{layer}.") and int(name.rpartition("@")[2]) < 4
        ]
        for role in leaves
        for layer in range(2)
    }
    united = {key: _united(chosen) for key, chosen in before.items()}
    upper = _united([united[role, 1] for role in leaves])
    for role in leaves:
        for layer in range(2):
            leaf = nrm.neurons(f"past_key_values.{layer}.{role}")
            # what enters by the lower layer has not entered by the upper one
            expected = united[role, layer] if layer else united[role, layer] & ~upper
            torch.testing.assert_close(R(leaf), whole(expected), rtol=0, atol=1e-10)
            assert float(R(leaf).abs()) > 1e-6
    # all steps, and a cache of another length
    found = nrm.generation(explainer, IDS[:, 4:], 1, past_key_values=cache)
    steps = nrm.generation(explainer, IDS, 5)
    torch.testing.assert_close(found.relevance, steps.relevance[:, 4:], rtol=0, atol=1e-10)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(IDS[:, :3], past_key_values=cache)
    found = nrm.generation(explainer, IDS[:, 3:], 2, past_key_values=cache)
    torch.testing.assert_close(found.relevance, steps.relevance[:, 3:], rtol=0, atol=1e-10)


def test_a_mask_beside_a_cache_is_of_all_tokens(transformers: Any) -> None:
    """One of the new tokens alone would say that the model is to read three in place of seven."""
    model = gpt2(transformers)
    explainer = nrm.Explainer(model, output="logits")
    ids = torch.cat([IDS, IDS.flip(1)])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(ids[:, :4], attention_mask=mask[:, :4], position_ids=places[:, :4],
              past_key_values=cache)  # fmt: skip
    whole = nrm.generations(explainer, ids, [5, 3], attention_mask=mask)
    new = nrm.generations(explainer, ids[:, 4:], [1, 1], attention_mask=mask, past_key_values=cache)
    for every, found in zip(whole, new, strict=True):
        torch.testing.assert_close(found.scale, every.scale, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.relevance, every.relevance[:, -3:], rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="beside a cache of 4 tokens"):
        nrm.generations(
            explainer, ids[:, 4:], [1, 1], attention_mask=mask[:, 4:], past_key_values=cache
        )


def _united(sets: list[Any]) -> Any:
    found = sets[0]
    for one in sets[1:]:
        found = found | one
    return found


def test_caches_that_hold_something_else_are_refused(transformers: Any) -> None:
    model = llama(transformers)
    explainer = nrm.Explainer(model, output="logits")
    static = transformers.StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(InputError, match="Leave the cache out"):
        explainer(IDS, past_key_values=static, target=(-1, 5))
    empty = transformers.DynamicCache()
    found = nrm.generation(explainer, IDS, 5, past_key_values=empty)
    expected = nrm.generation(explainer, IDS, 5)
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=0, atol=1e-12)
    assert empty.get_seq_length() == 0


def test_what_generate_returns_is_a_text(transformers: Any) -> None:
    model = llama(transformers)
    explainer = nrm.Explainer(model, output="logits")
    kept = model.generate(
        IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    found = nrm.generation(explainer, kept, prompt=7)
    expected = nrm.generation(explainer, kept.sequences, prompt=7)
    assert found.ids.tolist() == kept.sequences[0].tolist()
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=0, atol=0)
    (again,) = nrm.generations(explainer, kept, [7])
    torch.testing.assert_close(again.relevance, expected.relevance, rtol=0, atol=0)


@cache
def t5(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        relative_attention_num_buckets=8, relative_attention_max_distance=16,
    )  # fmt: skip
    model: nn.Module = transformers.T5ForConditionalGeneration(config).double().eval()
    return model


@cache
def bart(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=32, decoder_start_token_id=2, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, forced_eos_token_id=None, init_std=0.3,
    )  # fmt: skip
    model: nn.Module = transformers.BartForConditionalGeneration(config).double().eval()
    return model


SOURCE = torch.tensor([[5, 9, 3, 17, 8, 4]])
WRITTEN = torch.tensor([[2, 7, 11, 4, 20]])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_source_and_the_text_so_far(transformers: Any, name: str) -> None:
    """All steps at once equal step by step, of the source's tokens and of the text's."""
    model = {"t5": t5, "bart": bart}[name](transformers)
    explainer = nrm.Explainer(model, output="logits")
    found = nrm.generation(explainer, WRITTEN, 1, source=SOURCE)
    contrast = nrm.generation(explainer, WRITTEN, 1, source=SOURCE[0].tolist(), against="next")
    assert found.relevance.shape == (4, 11)
    assert len(explainer._captures) == 1
    assert (found.source, found.prompt, len(found)) == (6, 7, 4)
    assert found.ids.tolist() == [*SOURCE[0].tolist(), *WRITTEN[0].tolist()]
    step = 2
    grown, said = WRITTEN[:, : 1 + step], int(WRITTEN[0, 1 + step])
    R = explainer(input_ids=SOURCE, decoder_input_ids=grown, target=(-1, said))
    layers = [v.name for v in R.graph.inputs if v.kind == "embedding"]
    assert ["encoder" in layer for layer in layers] == [True, False]
    expected = torch.cat([R.tokens(at=layer) for layer in layers], 1)[0]
    row = found.relevance[step]
    torch.testing.assert_close(row[: 7 + step], expected, rtol=0, atol=1e-10)
    assert row[:6].abs().min() > 1e-9
    assert not row[7 + step :].any()
    torch.testing.assert_close(found.scale[step], R.scale[0])
    assert contrast.against is not None
    R = R.of(nrm.Contrast((-1, said), (-1, int(contrast.against[step]))))
    expected = torch.cat([R.tokens(at=layer) for layer in layers], 1)[0]
    row = contrast.relevance[step, : 7 + step]
    torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-10)
    if name == "bart":
        return
    # a batch of sources and texts, padded
    sources = torch.cat([SOURCE, SOURCE.roll(1)])
    sources[1, 4:] = 1
    mask = torch.ones_like(sources)
    mask[1, 4:] = 0
    texts, own = WRITTEN.repeat(2, 1), torch.ones_like(WRITTEN).repeat(2, 1)
    own[1, 4:] = 0
    both = nrm.generations(
        explainer, texts, [1, 2], source=sources, attention_mask=mask, decoder_attention_mask=own
    )
    torch.testing.assert_close(both[0].relevance, found.relevance, rtol=0, atol=1e-10)
    alone = nrm.generation(explainer, WRITTEN[:, :4], 2, source=sources[1:, :4])
    assert both[1].ids.tolist() == alone.ids.tolist()
    assert both[1].source == 4
    torch.testing.assert_close(both[1].relevance, alone.relevance, rtol=0, atol=1e-10)


def test_sources_shown_and_refused(transformers: Any, tiny: Tiny) -> None:
    model = t5(transformers)
    explainer = nrm.Explainer(model, output="logits")
    kept = model.generate(SOURCE, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    words = [f"w{k}" for k in range(6 + kept.sequences.shape[1])]
    found = nrm.generation(explainer, kept, 1, source=SOURCE, words=words)
    assert found.words == tuple(words)
    assert "explained by the 6 of the source" in str(found)
    assert found[0].place == 7
    assert list(found.lines()[0].words) == words[:8]
    assert found.as_json()["source"] == 6
    with pytest.raises(InputError, match="is an encoder and decoder: give"):
        nrm.generation(explainer, WRITTEN, 1)
    with pytest.raises(InputError, match="Tiny takes no decoder_input_ids"):
        nrm.generation(nrm.Explainer(tiny), IDS, 4, source=SOURCE)
    with pytest.raises(InputError, match="2 sources for 1 texts"):
        nrm.generation(explainer, WRITTEN, 1, source=SOURCE.repeat(2, 1))
    cache = kept.past_key_values
    with pytest.raises(InputError, match="EncoderDecoderCache"):
        nrm.generation(explainer, WRITTEN, 1, source=SOURCE, past_key_values=cache)


@pytest.mark.parametrize("head", ["softmax", "log_softmax"])
@pytest.mark.parametrize("against", [None, 6, "next"])
def test_scales_are_the_logits_behind_a_last_softmax(head: str, against: Any) -> None:
    class Ends(Tiny):
        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = getattr(torch, head)(super().forward(ids), -1)
            return found

    torch.manual_seed(0)
    explainer = nrm.Explainer(Ends().double().eval())
    ids = torch.tensor([[3, 1, 4, 15, 9]])
    made = nrm.generation(explainer, ids, prompt=2, against=against)
    plain = nrm.generation(nrm.Explainer(_without_head(explainer.model)), ids, 2, against=against)
    torch.testing.assert_close(made.scale, plain.scale)
    torch.testing.assert_close(made.relevance, plain.relevance)
    for step in range(3):
        place, said = step + 1, int(ids[0, step + 2])
        target: Any = (place, said)
        if made.against is not None:
            target = nrm.Contrast(target, (place, int(made.against[step])))
        R = explainer(ids, target=target)
        torch.testing.assert_close(made.scale[step : step + 1], R.scale)
        torch.testing.assert_close(made.relevance[step], R.tokens()[0])


def _without_head(model: nn.Module) -> nn.Module:
    plain = Tiny().double().eval()
    plain.load_state_dict(model.state_dict())
    return plain


def test_in_pieces_and_told(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    explainer, told = nrm.Explainer(tiny), []
    whole = nrm.generation(explainer, IDS, 1)
    monkeypatch.setattr("nrm.teacher_forcing._TOGETHER", 4)
    pieces = nrm.generation(explainer, IDS, 1, memory=1, progress=told.append)
    torch.testing.assert_close(whole.relevance, pieces.relevance)
    assert told == [1] * 6
    other = nrm.generation(explainer, IDS, 1, against=[1, 2, 3, 4, 5, 6], at="embed")
    assert other.against is not None
    expected = explainer(IDS, target=nrm.Contrast((2, 17), (2, 3))).tokens()[0]
    torch.testing.assert_close(other.relevance[2], expected)
    logits = tiny(IDS)[0, 2]
    torch.testing.assert_close(other.scale[2], logits[17] - logits[3])
    for same in (torch.arange(1, 7), np.arange(1, 7)):
        again = nrm.generation(explainer, IDS, 1, against=same)
        assert again.against is not None
        assert again.against.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"prompt": 7}, InputError, "the prompt of text 0 is 7 tokens"),
        ({"prompt": 0}, InputError, "at least one is given"),
        ({"against": 22}, TargetError, "step 1 is explained against token 22"),
        ({"against": [1]}, TargetError, "1 tokens to explain against, for 3 steps"),
        ({"against": 40}, TargetError, "token 40 is out of range"),
        ({"against": "best"}, TargetError, "or 'next'"),
        ({"words": ["a"]}, InputError, "1 words for 7 tokens"),
        ({"reference": IDS}, InputError, "take no reference="),
        ({"at": "head"}, None, ""),
    ],
)
def test_what_is_refused(tiny: Tiny, options: dict[str, Any], kind: Any, message: str) -> None:
    explainer = nrm.Explainer(tiny)
    options = {"prompt": 4} | options
    if kind is None:  # any layer of a vector for each token does
        assert nrm.generation(explainer, IDS, **options).relevance.shape == (3, 7)
        return
    with pytest.raises(kind, match=message):
        nrm.generation(explainer, IDS, **options)


def test_several_texts_are_another_question(tiny: Tiny) -> None:
    explainer = nrm.Explainer(tiny)
    with pytest.raises(InputError, match=r"nrm\.generations"):
        nrm.generation(explainer, IDS.repeat(2, 1), 3)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
    with pytest.raises(InputError, match="lies in several pieces"):
        nrm.generations(explainer, IDS, [3], attention_mask=mask)
    with pytest.raises(InputError, match="integer ids"):
        nrm.generation(explainer, torch.rand(1, 4), 3)
    classes = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Flatten(), nn.Linear(28, 3)).eval()
    with pytest.raises((InputError, TargetError)):
        nrm.generation(nrm.Explainer(classes), IDS, 3)


def test_shown(tiny: Tiny) -> None:
    words = ["The", " <b>", "\n", " [red]", " d", " e", " f"]
    found = nrm.generation(nrm.Explainer(tiny), IDS, 4, words=words, against="next")
    assert len(found) == 3
    assert [step.word for step in found] == words[4:]
    assert found[-1].place == 6
    with pytest.raises(IndexError):
        found[3]
    text = str(found)
    assert "rather than" in text
    assert "⏎" in text
    page = found.html()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page.split("</b>", 1)[1]
    assert page.count("outline: 2px solid") == 3
    kept = json.loads(json.dumps(found.as_json()))
    assert kept["steps"][1]["relevance"] == found.relevance[1].tolist()
    assert kept["tokens"] == words
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=80, file=io.StringIO(), color_system="truecolor")
    console.print(found)
    printed = console.file.getvalue()
    assert "[red]" in printed
    assert "48;2;" in printed  # the background of a word


def test_colours_are_signed_and_end_at_the_limit() -> None:
    assert coloured.colour(0.0, 1.0) == (255, 255, 255)
    assert coloured.colour(2.0, 1.0) == coloured.FOR
    assert coloured.colour(-1.0, 1.0) == coloured.AGAINST
    half = coloured.colour(0.5, 1.0)
    assert half[0] > half[2]
    assert coloured.letters_on(coloured.AGAINST) == (255, 255, 255)
    assert coloured.letters_on((255, 255, 255)) == (0, 0, 0)
    assert coloured.limit_of([Line("", ["a"], [0.0])]) == 1
