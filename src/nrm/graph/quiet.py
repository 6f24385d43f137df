"""What a capture needs of the whole process, and gives back: one at a time, silently."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO, cast

import torch

_CAPTURES = threading.RLock()
"""Of all explainers: torch.export and traces change torch itself while they run."""


@contextmanager
def capturing() -> Iterator[None]:
    """Alone among captures; transformer layers by their parts; quietly, without gradients."""
    with _CAPTURES, ExitStack() as after, torch.no_grad():
        fused = torch.backends.mha.get_fastpath_enabled()
        after.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        # Export warns of attributes that a recurrent layer sets; the outputs are compared.
        after.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        after.enter_context(_silent())
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing of what torch tells of failing captures, whole graphs among it, by this thread."""
    here = threading.get_ident()

    def is_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    loggers = [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "torch"
    ]
    before = sys.stderr
    quiet = cast(TextIO, _Elsewhere(before, here))
    try:
        for logger in loggers:
            logger.addFilter(is_elsewhere)
        sys.stderr = quiet
        yield
    finally:
        if sys.stderr is quiet:  # or someone else's by now
            sys.stderr = before
        for logger in loggers:
            logger.removeFilter(is_elsewhere)


class _Elsewhere:
    """A stream for all threads but one, whose writing goes nowhere."""

    def __init__(self, stream: TextIO | None, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread or self._stream is None:
            return len(text)
        return self._stream.write(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
