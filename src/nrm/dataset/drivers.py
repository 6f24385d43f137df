"""Who computes shards: this process, or processes of this machine. A cluster: `on_ray`.

An engine takes work and the numbers of shards, in order, and gives their results in any order. It
draws the next number when somebody is free for it, so that numbers may end while shards are being
computed. What fails ends the run; a process that dies costs its shard, which another computes.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from nrm.dataset.shard import ShardResult, Work
from nrm.errors import InputError, NrmError, QueryError
from nrm.torchvision_mismatch import import_torchvision, is_mismatch

Engine = Callable[[Work, Iterator[int]], Iterator[ShardResult]]

TRIES = 3
"""How often a shard is begun whose processes die."""


def loop(work: Work, shards: Iterator[int]) -> Iterator[ShardResult]:
    """One shard after the other, in this process."""
    for number in shards:
        yield work.shard(number)


def workers(count: int) -> Engine:
    """As many processes as said, which start anew, read and compute on their own.

    Where there are several GPUs, they are shared out among them.

    Raises:
        InputError: it is no positive number.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"workers are a positive number, not {count!r}")

    def engine(work: Work, shards: Iterator[int]) -> Iterator[ShardResult]:
        with _Team(packed(work), count) as team:
            yield from team.results(shards)

    return engine


# -- work as bytes ---------------------------------------------------------------------------------


def packed(work: Work) -> bytes:
    """Work as bytes, for another process or machine.

    Raises:
        QueryError: something in it cannot be sent.
    """
    buffer = io.BytesIO()
    try:
        torch.save(work, buffer)
    except Exception as error:  # pickling runs any code, and fails in many ways
        raise QueryError(
            f"the model or the data set cannot be sent to other processes: {error}. Define its "
            "classes and functions at the top of a module (no lambdas), or run without workers."
        ) from error
    return buffer.getvalue()


def unpacked(content: bytes, device: str | None = None) -> Work:
    """Work that was packed, with its model on a device; by default where it was."""

    def load() -> Work:
        found: Work = torch.load(io.BytesIO(content), map_location=device, weights_only=False)
        return found

    try:
        return load()
    except RuntimeError as error:
        if not is_mismatch(error):
            raise
        import_torchvision()  # as the run's own process has it
        return load()


def device_of(work: Work, place: int) -> str | None:
    """On which device the process at a place computes: GPUs in turn, if the model is on one."""
    first = next(iter(work.question.explainer.model.parameters()), None)
    if first is None or first.device.type != "cuda" or torch.cuda.device_count() < 2:
        return None
    return f"cuda:{place % torch.cuda.device_count()}"


# -- processes of this machine ---------------------------------------------------------------------


@dataclass
class _Worker:
    """A process, and what it works on."""

    place: int
    process: BaseProcess
    line: Connection
    shard: int | None = None


class _Team:
    """Processes that compute shards; one that dies is replaced."""

    def __init__(self, content: bytes, count: int) -> None:
        self._content, self._count = content, count
        self._context = multiprocessing.get_context("spawn")
        self._members: list[_Worker] = []
        self._died: dict[int, int] = {}

    def __enter__(self) -> _Team:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            member.line.close()
            member.process.terminate()
        for member in self._members:
            member.process.join()
        self._members.clear()

    def results(self, shards: Iterator[int]) -> Iterator[ShardResult]:
        again: list[int] = []
        for place in range(self._count):
            if not self._give(self._hired(place), again, shards):
                break
        while busy := [member for member in self._members if member.shard is not None]:
            ready = wait([member.line for member in busy])
            for member in (m for m in busy if m.line in ready):
                result = self._taken(member, again)
                if result is None:
                    self._give(self._hired(member.place), again, shards)
                    continue
                self._give(member, again, shards)  # before it is looked at, so that nobody waits
                yield result

    def _hired(self, place: int) -> _Worker:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there, place), daemon=True)
        process.start()
        there.close()
        member = _Worker(place, process, here)
        self._members.append(member)
        self._send(member, self._content)
        return member

    def _give(self, member: _Worker, again: list[int], shards: Iterator[int]) -> bool:
        """Give a worker the next shard; `False` if there is none."""
        member.shard = again.pop() if again else next(shards, None)
        if member.shard is not None:
            self._send(member, member.shard)
        return member.shard is not None

    def _send(self, member: _Worker, what: Any) -> None:
        with suppress(OSError):  # it died: seen where its result is waited for
            member.line.send(what)

    def _taken(self, member: _Worker, again: list[int]) -> ShardResult | None:
        """The result of a worker; `None` if it died, and its shard is to be computed again."""
        shard = member.shard
        assert shard is not None
        member.shard = None
        try:
            found = member.line.recv()
        except (EOFError, OSError):
            self._members.remove(member)
            member.line.close()
            member.process.join()
            self._died[shard] = self._died.get(shard, 0) + 1
            if self._died[shard] >= TRIES:
                raise QueryError(
                    f"{TRIES} processes died one after the other while they computed shard "
                    f"{shard} (the last with exit code {member.process.exitcode}): there may be "
                    "not enough memory. Give fewer workers, or smaller batches."
                ) from None
            again.append(shard)
            return None
        if isinstance(found, BaseException):
            raise found
        result: ShardResult = found
        return result


def _serve(line: Connection, place: int) -> None:
    """Compute shards until the line is closed: then the run is over, or its process is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    try:
        content = line.recv()
        work: Work | None = None
        failed: Exception | None = None
        try:
            work = unpacked(content)
            device = device_of(work, place)
            work = work if device is None else unpacked(content, device)
        except Exception as error:  # told where the first result is waited for
            failed = error
        while True:
            number = line.recv()
            try:
                if failed is not None or work is None:
                    raise failed or QueryError("there is no work")
                line.send(work.shard(number))
            except (BrokenPipeError, EOFError):
                raise
            except NrmError as error:
                line.send(error)
            except Exception as error:
                line.send(QueryError(f"shard {number}: {type(error).__name__}: {error}"))
    except (EOFError, OSError):
        os._exit(0)  # nothing to clean up: nothing here writes
