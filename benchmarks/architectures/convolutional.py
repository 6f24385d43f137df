"""Convolutional networks: classifiers of pictures, of series, of volumes and of videos."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.architectures.cases import Case, case, classifier, pictured
from nrm.torchvision_mismatch import import_torchvision


@case("VGG11", "torchvision")
def _vgg() -> Case:
    return classifier("vgg11")


@case("ResNet18", "torchvision")
def _resnet(blocks: int = 2, size: int = 64) -> Case:
    """With so many blocks in each of the four stages."""
    resnet = import_torchvision().models.resnet
    return pictured(resnet.ResNet(resnet.BasicBlock, [blocks] * 4), size)


@case("DenseNet121", "torchvision")
def _densenet() -> Case:
    return classifier("densenet121")


@case("MobileNetV2", "torchvision")
def _mobilenet_v2() -> Case:
    return classifier("mobilenet_v2")


@case("MobileNetV3-S", "torchvision")
def _mobilenet_v3(blocks: int | None = None, size: int = 64) -> Case:
    """With its first blocks, by default all."""
    mobilenet = import_torchvision().models.mobilenetv3
    settings, last = mobilenet._mobilenet_v3_conf("mobilenet_v3_small")
    return pictured(mobilenet.MobileNetV3(settings[:blocks], last), size)


@case("EfficientNet-B0", "torchvision")
def _efficientnet() -> Case:
    return classifier("efficientnet_b0")


@case("1-d convnet")
def _conv1d() -> Case:
    model = nn.Sequential(
        nn.Conv1d(2, 16, 9, stride=2, padding=4),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 5, dilation=2, groups=4),
        nn.LeakyReLU(0.1),
        nn.AvgPool1d(2),
        nn.Conv1d(32, 32, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    return Case(model, (torch.randn(1, 2, 256),))


@case("3-d convnet")
def _conv3d() -> Case:
    model = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AvgPool3d(2),
        nn.Conv3d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return Case(model, (torch.randn(1, 1, 16, 16, 16),))


@case("AlexNet", "torchvision")
def _alexnet() -> Case:
    return classifier("alexnet")


@case("SqueezeNet", "torchvision")
def _squeezenet() -> Case:
    return classifier("squeezenet1_1")


@case("GoogLeNet", "torchvision")
def _googlenet() -> Case:
    model = import_torchvision().models.GoogLeNet(aux_logits=False, init_weights=False)
    return pictured(model, 64)


@case("Inception v3", "torchvision")
def _inception() -> Case:
    model = import_torchvision().models.Inception3(aux_logits=False, init_weights=False)
    return pictured(model, 96)


@case("ShuffleNetV2", "torchvision")
def _shufflenet() -> Case:
    return classifier("shufflenet_v2_x0_5")


@case("MNASNet", "torchvision")
def _mnasnet() -> Case:
    return classifier("mnasnet0_5")


@case("RegNetX", "torchvision")
def _regnet_x() -> Case:
    return classifier("regnet_x_400mf")


@case("RegNetY, squeeze and excitation", "torchvision")
def _regnet_y() -> Case:
    return classifier("regnet_y_400mf")


@case("ResNeXt, one block a stage", "torchvision")
def _resnext() -> Case:
    resnet = import_torchvision().models.resnet
    model = resnet.ResNet(resnet.Bottleneck, [1] * 4, groups=8, width_per_group=4)
    return pictured(model, 64)


@case("Wide ResNet, one block a stage", "torchvision")
def _wide_resnet() -> Case:
    resnet = import_torchvision().models.resnet
    return pictured(resnet.ResNet(resnet.Bottleneck, [1] * 4, width_per_group=128), 64)


@case("R3D-18, videos", "torchvision")
def _r3d() -> Case:
    model = import_torchvision().models.video.r3d_18(weights=None)
    return Case(model, (torch.randn(1, 3, 4, 32, 32),))


@case("R(2+1)D-18, videos", "torchvision")
def _r2plus1d() -> Case:
    model = import_torchvision().models.video.r2plus1d_18(weights=None)
    return Case(model, (torch.randn(1, 3, 4, 32, 32),))


@case("feature pyramid, a detector's backbone", "torchvision")
def _pyramid() -> Case:
    detection = import_torchvision().models.detection.backbone_utils
    model = detection.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5
    )
    return pictured(model, 64, target=(None, 4, 4), options={"output": "1"})


class TemporalBlock(nn.Module):
    """Two causal convolutions, dilated, beside a shortcut (Bai et al. 2018)."""

    def __init__(self, width: int, out: int, dilation: int) -> None:
        super().__init__()
        self.reach = 2 * dilation
        self.first = nn.utils.parametrizations.weight_norm(
            nn.Conv1d(width, out, 3, padding=self.reach, dilation=dilation)
        )
        self.second = nn.Conv1d(out, out, 3, padding=self.reach, dilation=dilation)
        self.shortcut = nn.Conv1d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x)[..., : -self.reach])
        h = F.relu(self.second(h)[..., : -self.reach])
        return F.relu(h + self.shortcut(x))


@case("temporal convolutional network")
def _temporal() -> Case:
    model = nn.Sequential(*(TemporalBlock(4 if d == 1 else 16, 16, d) for d in (1, 2, 4)))
    return Case(model, (torch.randn(1, 4, 32),), target=(None, 31))


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, each skipping to the end (van den Oord et al.)."""

    def __init__(self, width: int = 16, layers: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.dilated = nn.ModuleList(
            nn.Conv1d(width, 2 * width, 2, dilation=2**depth) for depth in range(layers)
        )
        self.residual = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.skip = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), x.new_zeros(())
        for depth, dilated in enumerate(self.dilated):
            value, gate = dilated(F.pad(x, (2**depth, 0))).chunk(2, 1)
            h = torch.tanh(value) * torch.sigmoid(gate)
            total = total + self.skip[depth](h)
            x = x + self.residual[depth](h)
        scores: Tensor = self.head(total)
        return scores


@case("WaveNet")
def _wavenet() -> Case:
    return Case(WaveNet(), (torch.randn(1, 1, 32),), target=(None, 31))


class SqueezeExcite(nn.Module):
    """A residual block whose channels are scaled by what they hold on average."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.squeeze, self.excite = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3))))))
        return F.relu(x + h * scale[..., None, None])


@case("SE-ResNet")
def _squeeze_excite() -> Case:
    layers = [nn.Conv2d(3, 16, 3, padding=1), SqueezeExcite(16), SqueezeExcite(16)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return pictured(nn.Sequential(*layers, *head), 16)


@case("text CNN")
def _text_cnn() -> Case:
    return Case(TextCNN(), (torch.randint(50, (1, 12)),))


class TextCNN(nn.Module):
    """Convolutions of several widths over words, the largest answer of each (Kim 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.convs = nn.ModuleList(nn.Conv1d(16, 8, width) for width in (2, 3, 4))
        self.head = nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.embed(ids).transpose(1, 2)
        found = [F.relu(conv(words)).amax(-1) for conv in self.convs]
        scores: Tensor = self.head(torch.cat(found, 1))
        return scores
