"""CIFAR-10 residual networks with shortcuts without weights, and what flows along them.

    python examples/cifar_resnet.py WEIGHTS.safetensors PICTURE.jpg [--blocks 3]

A shortcut that halves the picture and doubles the channels has no weights: `x[:, :, ::2, ::2]`,
padded with channels of zeros by `F.pad`. Channel k goes on as channel k + pad, which `R.top` shows
as the most relevant pairs of the two layers. 3 blocks a stage are ResNet20, 9 are ResNet56.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nrm

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.pad = channels // 4 if stride == 2 else 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu(out + x)


class ResNet(nn.Module):
    """For pictures `[N, 3, 32, 32]`, normalised by `MEAN` and `STD`."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = Block(channels_in, channels, stride)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        h = self.layer3(self.layer2(self.layer1(h)))
        logits: Tensor = self.linear(h.mean((2, 3)))
        return logits


def resnet20() -> ResNet:
    """For `nrm explain --model cifar_resnet:resnet20`, run in this folder."""
    return ResNet(3)


def resnet56() -> ResNet:
    return ResNet(9)


def pretrained(weights: Path, blocks: int = 3) -> ResNet:
    from safetensors.torch import load_file

    model = ResNet(blocks)
    model.load_state_dict(load_file(weights))
    return model.eval()


def read(picture: Path) -> Tensor:
    """`[1, 3, 32, 32]`, as the network takes it."""
    from PIL import Image
    from torchvision.transforms.functional import normalize, pil_to_tensor

    pixels = pil_to_tensor(Image.open(picture).convert("RGB")).float() / 255
    found: Tensor = normalize(pixels, MEAN, STD).unsqueeze(0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--blocks", type=int, default=3)
    options = parser.parse_args()
    from nrm.torchvision_mismatch import import_torchvision

    import_torchvision()
    model, x = pretrained(options.weights, options.blocks), read(options.picture)
    R = nrm.Explainer(model)(x)
    assert R.target is not None
    health = R.diagnostics()
    sys.stdout.write(f"{CLASSES[int(R.target)]}, worst cut {health.worst_cut_deviation:.1e}\n")
    before, after = f"layer1.{options.blocks - 1}", "layer2.0"
    sys.stdout.write(f"{R.top(before, after, k=12)}\n")


if __name__ == "__main__":
    main()
