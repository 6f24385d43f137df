"""What tests of the explorer's page do and read in a browser."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor


def settled(page: Any, times: int = 1) -> None:
    """Wait until so many answers are whole. (Its own way to wait runs code that the page's policy
    forbids.)"""
    root, end = page.locator("#explorer"), time.monotonic() + 30
    while int(root.get_attribute("data-ready") or 0) < times:
        assert time.monotonic() < end, page.locator("#explorer").inner_text()
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
