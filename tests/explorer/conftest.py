"""Fixtures that several tests of the explorer share: a small model that is open, and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.browser import browser
from support.explored import looked_at, make_opened

from nrm.explore.opened import Opened
from nrm.measure import Measure


@pytest.fixture(scope="module")
def opened() -> Opened:
    return make_opened()


@pytest.fixture(scope="module")
def R(opened: Opened) -> Measure:
    return opened.measure(opened.inputs[0])


@pytest.fixture(scope="module")
def address(opened: Opened) -> Iterator[str]:
    """Where a server of it listens."""
    from nrm.explore.serving import running  # needs packages that may be missing

    with running(opened) as found:
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    """The page, loaded; whatever it complains of fails the test."""
    with looked_at(chromium, address) as found:
        yield found
