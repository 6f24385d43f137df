"""Transformers and mixers of pictures, and of sound; pictures beside texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.architectures.cases import (
    IDS,
    SMALL,
    Case,
    case,
    classifier,
    ids_of,
    pictured,
    transformers_package,
)
from nrm.torchvision_mismatch import import_torchvision


@case("ConvNeXt-T", "torchvision")
def _convnext() -> Case:
    return classifier("convnext_tiny")


@case("Swin-T", "torchvision")
def _swin() -> Case:
    return classifier("swin_t")


@case("ViT-B/16, 3 layers", "torchvision")
def _vit() -> Case:
    model = import_torchvision().models.VisionTransformer(
        image_size=224,
        patch_size=16,
        num_layers=3,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
        num_classes=10,
    )
    nn.init.normal_(model.heads[-1].weight, std=0.02)  # zero at first
    return Case(model, (torch.randn(1, 3, 224, 224),))


@case("ViT (transformers)", "transformers")
def _vittransformers_package() -> Case:
    transformers = transformers_package()
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=64,
        patch_size=8,
        num_labels=5,
    )
    inputs = {"pixel_values": torch.randn(1, 3, 64, 64)}
    model = transformers.ViTForImageClassification(config)
    return Case(model, (), inputs, options={"output": "logits"})


@case("CLIP", "transformers")
def _clip(layers: int = 2) -> Case:
    transformers = transformers_package()
    text = {**SMALL, "num_hidden_layers": layers}
    vision = {
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    ids = ids_of()
    ids[:, -1] = IDS["eos_token_id"]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }
    return Case(
        transformers.CLIPModel(config),
        (),
        inputs,
        options={"output": "logits_per_image"},
        leaves=(None, "pixel_values"),
    )


@case("MaxViT", "torchvision")
def _maxvit() -> Case:
    model = import_torchvision().models.MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=5,
    )
    return pictured(model, 32)


@case("Swin V2", "torchvision")
def _swin_v2() -> Case:
    models = import_torchvision().models.swin_transformer
    model = models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
        num_classes=5,
        block=models.SwinTransformerBlockV2,
        downsample_layer=models.PatchMergingV2,
    )
    return pictured(model, 32)


_PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


def _seen(name: str, model: str = "ForImageClassification", size: int = 32, **config: Any) -> Case:
    """One of transformers' classifiers of pictures, with a configuration of its own."""
    transformers = transformers_package()
    built = getattr(transformers, name + model)(getattr(transformers, f"{name}Config")(**config))
    inputs = {"pixel_values": torch.randn(1, 3, size, size)}
    return Case(built, (), inputs, options={"output": "logits"})


@case("DeiT", "transformers")
def _deit() -> Case:
    return _seen("DeiT", **_PATCHES)


@case("BEiT", "transformers")
def _beit() -> Case:
    return _seen("Beit", **_PATCHES, use_relative_position_bias=True)


@case("DINOv2", "transformers")
def _dinov2() -> Case:
    return _seen("Dinov2", **_PATCHES)


@case("ViT-MAE, encoder", "transformers")
def _mae() -> Case:
    note = "all patches kept, in an order given as `noise`"
    built = _seen("ViTMAE", "Model", **_PATCHES, mask_ratio=0.0)
    kwargs = {**built.kwargs, "noise": torch.rand(1, 16)}
    return Case(
        built.model,
        (),
        kwargs,
        target=(0, None),
        options={"output": "last_hidden_state"},
        leaves=("pixel_values",),
        note=note,
    )


@case("ConvNeXt V2", "transformers")
def _convnext_v2() -> Case:
    return _seen("ConvNextV2", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=5)


@case("Swin (transformers)", "transformers")
def _swin_transformers() -> Case:
    sizes: dict[str, Any] = {
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    return _seen("Swin", image_size=32, patch_size=4, num_labels=5, **sizes)


@case("PoolFormer", "transformers")
def _poolformer() -> Case:
    return _seen("PoolFormer", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=5)


@case("MobileViT", "transformers")
def _mobilevit() -> Case:
    return _seen(
        "MobileViT",
        size=64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 48],
        num_labels=5,
    )


class MixerLayer(nn.Module):
    """A perceptron among the patches, then one among the channels (Tolstikhin et al. 2021)."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.among_patches, self.among_channels = (
            nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
            for size in (patches, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.among_patches(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        made: Tensor = x + self.among_channels(self.norm2(x))
        return made


class Patches(nn.Module):
    """A picture as rows of patches: `[batch, patches, width]`."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.conv(x).flatten(2).transpose(1, 2)
        return patches


class Average(nn.Module):
    """The average over patches or steps, scored."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(x.mean(1))
        return scores


@case("MLP-Mixer")
def _mixer() -> Case:
    layers = [MixerLayer(16, 32) for _ in range(2)]
    return pictured(nn.Sequential(Patches(32, 8), *layers, nn.LayerNorm(32), Average(32, 5)), 32)


class SpatialGate(nn.Module):
    """gMLP's layer: half of the channels, mixed among patches, gates the other half."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mix = nn.Conv1d(patches, patches, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = nn.functional.gelu(self.up(self.norm(x))).chunk(2, -1)
        made: Tensor = x + self.down(value * self.mix(self.inner(gate)))
        return made


@case("gMLP")
def _gmlp() -> Case:
    layers = [SpatialGate(16, 32) for _ in range(2)]
    return pictured(nn.Sequential(Patches(32, 8), *layers, Average(32, 5)), 32)


class Residual(nn.Module):
    """Something beside a shortcut."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.inner(x)
        return made


@case("ConvMixer")
def _convmixer() -> Case:
    def layer() -> list[nn.Module]:
        deep = nn.Conv2d(16, 16, 5, groups=16, padding="same")
        return [
            Residual(nn.Sequential(deep, nn.GELU(), nn.BatchNorm2d(16))),
            nn.Conv2d(16, 16, 1),
            nn.GELU(),
            nn.BatchNorm2d(16),
        ]

    first = [nn.Conv2d(3, 16, 4, stride=4), nn.GELU(), nn.BatchNorm2d(16)]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return pictured(nn.Sequential(*first, *layer(), *layer(), *last), 32)


# sound --------------------------------------------------------------------------------------------


@case("Whisper, encoder", "transformers")
def _whisper() -> Case:
    transformers = transformers_package()
    config = transformers.WhisperConfig(
        vocab_size=100,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_source_positions=16,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        **IDS,
    )
    model = transformers.WhisperModel(config).encoder
    inputs = {"input_features": torch.randn(1, 8, 32)}
    return Case(model, (), inputs, target=(4, None), options={"output": "last_hidden_state"})


@case("Wav2Vec2", "transformers")
def _wav2vec2() -> Case:
    transformers = transformers_package()
    config = transformers.Wav2Vec2Config(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[16, 16, 16],
        conv_stride=[5, 2, 2],
        conv_kernel=[10, 3, 3],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    inputs = {"input_values": torch.randn(1, 400)}
    model = transformers.Wav2Vec2ForCTC(config)
    return Case(model, (), inputs, target=(4, None), options={"output": "logits"})
