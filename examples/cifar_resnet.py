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

import nrm
from nrm_reproduce.pretrained import CIFAR_CLASSES as CLASSES
from nrm_reproduce.pretrained import ResNet, cifar_picture, cifar_resnet


def resnet20() -> ResNet:
    """For `nrm explain --model cifar_resnet:resnet20`, run in this folder."""
    return ResNet(3)


def resnet56() -> ResNet:
    return ResNet(9)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--blocks", type=int, default=3)
    options = parser.parse_args()
    model, x = cifar_resnet(options.weights, options.blocks), cifar_picture(options.picture)
    R = nrm.Explainer(model)(x)
    assert R.target is not None
    health = R.diagnostics()
    sys.stdout.write(f"{CLASSES[int(R.target)]}, worst cut {health.worst_cut_deviation:.1e}\n")
    before, after = f"layer1.{options.blocks - 1}", "layer2.0"
    sys.stdout.write(f"{R.top(before, after, k=12)}\n")


if __name__ == "__main__":
    main()
