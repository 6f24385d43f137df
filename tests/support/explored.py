"""A small network of pictures that the explorer's tests look at, and how they look at a page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import nrm
from nrm.explore.opened import Input, Opened
from nrm.io import imagenet, read_sent

SIDE = 32
NAMES = ["cat", "<b>dog</b>", "owl", "fish"]
"""One of them would be markup, if anything took it for such."""


class Net(nn.Module):
    """Two convolutions and a linear layer, on pictures in colour."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.a = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.pool = nn.MaxPool2d(4)
        self.conv2, self.b = nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(8 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.conv2(self.pool(self.a(self.conv1(x))))).flatten(1))


def photograph(seed: int) -> Image.Image:
    """Blobs of colour."""
    values = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    large = nn.functional.interpolate(values, (48, 48), mode="bilinear")[0]
    return Image.fromarray((large.permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def as_input(image: Image.Image, name: str) -> Input:
    picture = imagenet(image, SIDE)
    return Input(name, (picture.x,), "", pixels=picture.shown)


def make_opened() -> Opened:
    """The network, three pictures, and others that may be sent."""
    torch.manual_seed(0)
    model = Net().eval()
    inputs = [as_input(photograph(k), f"picture {k}") for k in range(3)]
    explainer = nrm.Explainer(model)
    explainer(*inputs[0].args)  # captured before anybody waits for it
    read = lambda data, name: as_input(read_sent(data), name)  # noqa: E731
    return Opened("Net", "picture", explainer, inputs, "", NAMES, read)


# -- a page ----------------------------------------------------------------------------------------


@contextmanager
def looked_at(chromium: Any, address: str, width: int = 1280) -> Iterator[Any]:
    """A page, loaded; whatever it complains of, or asks for from elsewhere, is an error at last."""
    context = chromium.new_context(viewport={"width": width, "height": 800})
    found = context.new_page()
    wrong: list[str] = []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    asked: list[str] = []
    found.on("request", lambda request: asked.append(request.url))
    found.goto(address)
    settled(found)
    yield found
    context.close()
    assert [text for text in wrong if "422" not in text and "413" not in text] == []
    elsewhere = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert elsewhere <= {urlsplit(address).netloc, ""}


def settled(page: Any, times: int = 1, seconds: float = 30) -> None:
    """Wait until so many answers are whole. (Its own way to wait runs code that the page's policy
    forbids.)"""
    root, end = page.locator("#explorer"), time.monotonic() + seconds
    while int(root.get_attribute("data-ready") or 0) < times:
        assert time.monotonic() < end, root.inner_text()
        page.wait_for_timeout(10)


def does(page: Any, act: Any) -> None:
    """Do something, and wait for the answer."""
    before = int(page.locator("#explorer").get_attribute("data-ready"))
    act()
    settled(page, before + 1)


def total(page: Any) -> str:
    found: str = page.locator(".formula .value").inner_text()
    return found


def shown(value: Tensor) -> str:
    """As the page writes a relevance."""
    number = float(value)
    return f"{number:.4f}".replace("-", "−")


def node(page: Any, layer: str, index: int) -> Any:
    return page.locator(f".node[data-layer='{layer}'][data-index='{index}']")


def looks(page: Any, what: str, *arguments: Any) -> Any:
    """What a function of `looks.js` says of a page."""
    text = Path(__file__).with_name("looks.js").read_text()
    return page.evaluate(f"(given) => ({text.strip().rstrip(';')}).{what}(...given)", [*arguments])
