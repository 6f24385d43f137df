"""Masks in torch's own transformers, and what decides in Python about them."""

import pytest
import torch
from torch import nn

import nrm
from nrm.errors import InputError

WIDTH, HEADS = 4, 2


def drawn(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def made(kind, *args, **options):
    torch.manual_seed(0)
    return kind(*args, batch_first=True, **options).double().eval()


def encoder(layers=1):
    layer = made(nn.TransformerEncoderLayer, WIDTH, HEADS, 8)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def causal(size):
    return nn.Transformer.generate_square_subsequent_mask(size, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["float", "boolean", "told"])
def test_a_causal_mask_of_an_encoder_is_no_mask_on_what_came_before(kind):
    model, x = encoder(), drawn(1, 4, WIDTH)
    mask = causal(4)
    told = {"is_causal": True} if kind == "told" else {}
    R = nrm.Explainer(model, batch_axis=None)(
        x, mask=mask != 0 if kind == "boolean" else mask, target=(0, 2, 1), **told
    )
    alone = nrm.Explainer(model, batch_axis=None)(x[:, :3], target=(0, 2, 1))
    torch.testing.assert_close(R.heatmap()[:, :3], alone.heatmap())
    assert R.heatmap()[:, 3:].abs().max() == 0
    torch.testing.assert_close(R.biases(), alone.biases())
    assert R.graph.captured.method == "export"


def test_key_padding_masks_are_shorter_sequences():
    model, x = encoder(), drawn(2, 4, WIDTH)
    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[0, 3] = True
    R = nrm.Explainer(model)(x, src_key_padding_mask=padding, target=(1, 2))
    short = nrm.Explainer(model)(x[:1, :3], target=(1, 2))
    torch.testing.assert_close(R.heatmap()[0, :3], short.heatmap()[0])
    assert R.heatmap()[1, 3].abs().min() > 0
    assert R.heatmap()[0, 3].abs().max() == 0


class Language(nn.Module):
    """A model that makes its mask itself, as most do."""

    def __init__(self):
        super().__init__()
        self.body = encoder()

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x)
        return self.body(x, mask=mask)[:, 1]


def test_a_mask_made_within_serves_any_batch():
    model, x = Language().eval(), drawn(3, 4, WIDTH)
    R = nrm.Explainer(model)(x, target=1)
    one = nrm.Explainer(model.body)(x[:, :2], target=(1, 1))
    torch.testing.assert_close(R.heatmap()[:, :2], one.heatmap())
    assert R.graph.captured.method == "export"
    assert R.graph.captured.batched


def test_decoders_and_the_whole_transformer_take_all_masks_at_once():
    model = made(nn.Transformer, WIDTH, HEADS, 1, 1, 8)
    source, goal = drawn(1, 3, WIDTH), drawn(1, 3, WIDTH, seed=1)
    padding = torch.tensor([[False, False, True]])
    R = nrm.Explainer(model, batch_axis=None)(
        source,
        goal,
        tgt_mask=causal(3),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
        target=(0, 1, 0),
    )
    alone = nrm.Explainer(model)(source[:, :2], goal[:, :2], target=(1, 0))
    for name in ("src", "tgt"):
        found = R.heatmap(at=name)
        torch.testing.assert_close(found[0, :2], alone.heatmap(at=name)[0])
        assert found[:, 2].abs().max() == 0
    assert R.diagnostics().worst_cut_deviation < 1e-12


def test_attention_beside_a_branch_in_python_is_traced():
    class Branching(Language):
        def forward(self, x):
            return super().forward(x) if x.sum() > -100 else x

    x = drawn(1, 4, WIDTH)
    R = nrm.Explainer(Branching().eval())(x, target=1)
    assert R.graph.captured.method == "eager"
    plain = nrm.Explainer(Language().eval())(x, target=1)
    torch.testing.assert_close(R.heatmap(), plain.heatmap())


def test_masks_may_be_infinite_and_other_inputs_may_not():
    model, x = encoder(), drawn(1, 3, WIDTH)
    broken = causal(3)
    broken[0, 0] = torch.nan
    with pytest.raises(InputError, match="'mask' holds NaN"):
        nrm.Explainer(model, batch_axis=None)(x, mask=broken, target=(0, 0, 0))
    with pytest.raises(InputError, match="NaN or infinite"):
        nrm.Explainer(model)(x / 0, target=(0, 0))
