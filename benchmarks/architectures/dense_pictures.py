"""From pictures to pictures: segmentation, autoencoders, diffusion, operators on fields."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nrm
from benchmarks.architectures.cases import Case, case, pictured, transformers_package
from nrm.torchvision_mismatch import import_torchvision


class UNet(nn.Module):
    """Two levels down and up, the skips concatenated."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = _block(3, 16), _block(16, 32), _block(32, 64)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = (
            nn.ConvTranspose2d(width, width // 2, 2, stride=2)
            if transposed
            else nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                nn.Conv2d(width, width // 2, 1),
            )
            for width in (64, 32)
        )
        self.merge2, self.merge1 = _block(64, 32), _block(32, 16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        c = self.middle(self.pool(b))
        b = self.merge2(torch.cat([self.up2(c), b], 1))
        a = self.merge1(torch.cat([self.up1(b), a], 1))
        logits: Tensor = self.head(a)
        return logits


def _block(width: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


@case("U-Net, transposed convolutions")
def _unet_transposed() -> Case:
    return Case(UNet(transposed=True), (torch.randn(1, 3, 48, 48),), target=(None, 20, 20))


@case("U-Net, bilinear interpolation")
def _unet_bilinear() -> Case:
    return Case(UNet(transposed=False), (torch.randn(1, 3, 48, 48),), target=(None, 20, 20))


def _segmented(head: Any, width: int) -> Case:
    """torchvision's frame of a segmenter, upon a small backbone."""
    models = import_torchvision().models
    resnet = models.resnet
    backbone = models._utils.IntermediateLayerGetter(
        resnet.ResNet(resnet.Bottleneck, [1] * 4, replace_stride_with_dilation=[False, True, True]),
        {"layer4": "out"},
    )
    model = models.segmentation.fcn.FCN(backbone, head(width, 4))
    return pictured(model, 32, target=(None, 16, 16), options={"output": "out"})


@case("FCN", "torchvision")
def _fcn() -> Case:
    return _segmented(import_torchvision().models.segmentation.fcn.FCNHead, 2048)


@case("DeepLabV3", "torchvision")
def _deeplab() -> Case:
    return _segmented(import_torchvision().models.segmentation.deeplabv3.DeepLabHead, 2048)


@case("LRASPP", "torchvision")
def _lraspp() -> Case:
    model = import_torchvision().models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    )
    return pictured(model, 64, target=(None, 32, 32), options={"output": "out"})


@case("SegFormer", "transformers")
def _segformer() -> Case:
    transformers = transformers_package()
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        num_labels=4,
    )
    inputs = {"pixel_values": torch.randn(1, 3, 64, 64)}
    model = transformers.SegformerForSemanticSegmentation(config)
    return Case(model, (), inputs, target=(None, 8, 8), options={"output": "logits"})


@case("convolutional autoencoder")
def _autoencoder() -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 12),
        nn.Linear(12, 256),
        nn.Unflatten(1, (16, 4, 4)),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
    )
    return Case(model, (torch.randn(1, 1, 16, 16),), target=(0, 8, None))


class Variational(nn.Module):
    """The mean path of a variational autoencoder: what it makes of a picture without noise."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.mean, self.deviation = nn.Linear(32, 8), nn.Linear(32, 8)
        self.decode = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)
        z = self.mean(h)
        if self.training:
            z = z + torch.randn_like(z) * (self.deviation(h) / 2).exp()
        made: Tensor = self.decode(z)
        return made


@case("variational autoencoder")
def _variational() -> Case:
    return Case(Variational(), (torch.randn(1, 1, 8, 8),))


# diffusion ----------------------------------------------------------------------------------------


def _timestep(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of a time `[batch]`: `[batch, width]`."""
    speed = torch.exp(-torch.arange(width // 2, dtype=t.dtype) * (8 / width))
    angle = t[:, None] * speed
    return torch.cat([angle.sin(), angle.cos()], 1)


class TimedBlock(nn.Module):
    """A residual block of a diffusion network: group norms, and the time added in between."""

    def __init__(self, width: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, width), nn.Conv2d(width, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[..., None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        made: Tensor = h + self.shortcut(x)
        return made


class PixelAttention(nn.Module):
    """Attention among the pixels of a picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, width), nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        made: Tensor = x + self.out(h)
        return made


class DiffusionUNet(nn.Module):
    """A U-Net that predicts the noise in a picture at a time (Ho et al. 2020)."""

    def __init__(self, width: int = 16, time: int = 32) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = TimedBlock(width, width, time)
        self.shrink = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle, self.attention = TimedBlock(2 * width, 2 * width, time), PixelAttention(32)
        self.grow = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up = TimedBlock(2 * width, width, time)
        self.head = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(_timestep(t, self.width))
        skip = self.down(self.first(x), time)
        h = self.attention(self.middle(self.shrink(skip), time))
        h = self.grow(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        noise: Tensor = self.head(self.up(torch.cat([h, skip], 1), time))
        return noise


@case("diffusion U-Net, with the time")
def _diffusion() -> Case:
    args = (torch.randn(1, 3, 16, 16), torch.tensor([7.0]))
    return Case(DiffusionUNet(), args, target=(0, 8, None))


class DiTBlock(nn.Module):
    """A transformer's layer whose norms are shifted and scaled by the condition (adaLN-Zero)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width)
        )
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(c)[:, None].chunk(6, -1)
        h = self.norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, h, h, need_weights=False)[0]
        h = self.norm(x) * (1 + scale2) + shift2
        made: Tensor = x + gate2 * self.mlp(h)
        return made


class DiT(nn.Module):
    """A diffusion transformer: patches, a time and a class (Peebles & Xie 2023)."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.width = width
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.time, self.label = nn.Linear(width, width), nn.Embedding(10, width)
        self.blocks = nn.ModuleList(DiTBlock(width) for _ in range(layers))
        self.head = nn.Linear(width, 48)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        condition = self.time(_timestep(t, self.width)) + self.label(label)
        for block in self.blocks:
            h = block(h, condition)
        pixels = self.head(h).unflatten(1, (4, 4)).unflatten(3, (3, 4, 4))
        return torch.einsum("bhwcpq->bchpwq", pixels).reshape(x.shape)


@case("DiT, with a time and a class")
def _dit(layers: int = 2) -> Case:
    args = (torch.randn(1, 3, 16, 16), torch.tensor([7.0]), torch.tensor([3]))
    return Case(DiT(layers=layers), args, target=(0, 8, None), leaves=("x",))


# fields -------------------------------------------------------------------------------------------


class SpectralConvolution(nn.Module):
    """A filter of the lowest frequencies, and what it makes of them."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(width, width, modes, modes, 2) / width)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        low = spectrum[..., : self.modes, : self.modes]
        filtered = torch.einsum("bixy,ioxy->boxy", low, torch.view_as_complex(self.weight))
        made = torch.zeros_like(spectrum)
        made[..., : self.modes, : self.modes] = filtered
        field: Tensor = torch.fft.irfft2(made, s=x.shape[-2:])
        return field


class FourierOperator(nn.Module):
    """A Fourier neural operator on a field (Li et al. 2021)."""

    def __init__(self, activation: nn.Module, width: int = 12, layers: int = 3) -> None:
        super().__init__()
        self.activation = activation
        self.lift, self.project = nn.Conv2d(3, width, 1), nn.Conv2d(width, 1, 1)
        self.spectral = nn.ModuleList(SpectralConvolution(width, 4) for _ in range(layers))
        self.local = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            h = self.activation(spectral(h) + local(h))
        field: Tensor = self.project(h)
        return field


@case("Fourier neural operator, GELU")
def _fourier() -> Case:
    return pictured(FourierOperator(nn.GELU()), 16, target=(0, 8, None))


@case("Fourier neural operator, ReLU")
def _fourier_relu(layers: int = 3, size: int = 16) -> Case:
    model = FourierOperator(nn.ReLU(), layers=layers)
    return pictured(model, size, target=(0, size // 2, None))


class DeepONet(nn.Module):
    """A field from its samples, asked at a place: the dot product of two perceptrons."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16))
        self.trunk = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 16))

    def forward(self, samples: Tensor, place: Tensor) -> Tensor:
        asked: Tensor = (self.branch(samples) * self.trunk(place)).sum(-1, keepdim=True)
        return asked


@case("DeepONet")
def _deeponet() -> Case:
    return Case(DeepONet(), (torch.randn(1, 20), torch.randn(1, 2)))


# what moves pixels --------------------------------------------------------------------------------


class SegNet(nn.Module):
    """An autoencoder that puts the largest back where they were (Badrinarayanan et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.middle, self.unpool = nn.Conv2d(8, 8, 3, padding=1), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h, places = self.pool(F.relu(self.down(x)))
        scores: Tensor = self.up(self.unpool(F.relu(self.middle(h)), places))
        return scores


@case("SegNet, max-unpooling")
def _segnet() -> Case:
    return pictured(SegNet(), 16, target=(None, 8, 8))


class SpatialTransformer(nn.Module):
    """A picture looked at through a window that the network chooses (Jaderberg et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.window = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 6))
        self.classify = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        theta = self.window(x).unflatten(1, (2, 3))
        grid = F.affine_grid(theta, [x.shape[0], 3, 16, 16], align_corners=False)
        scores: Tensor = self.classify(F.grid_sample(x, grid, align_corners=False))
        return scores


@case("spatial transformer")
def _spatial_transformer() -> Case:
    return pictured(SpatialTransformer(), 16, refused="its argument 'grid' depends on the input")


@case("spatial transformer, sampled to first order")
def _spatial_transformer_locally() -> Case:
    fallback = nrm.operators.LocalLinear()
    return pictured(SpatialTransformer(), 16, options={"fallback": fallback})
