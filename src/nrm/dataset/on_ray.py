"""Shards as tasks of a Ray cluster: on this machine, or at an address. Needs `nrm[ray]`.

Tasks over shards, not Ray Data: shards are named pieces that are committed by name, of which each
is computed by one function; blocks that are shuffled and joined would only have to be taken apart
again. Work is put into the cluster's object store once, and every process keeps it with its
captured model. The run's own process commits what comes back: workers need no shared disk for
results, only for data that are paths.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from nrm.dataset.drivers import TRIES, Engine, packed, unpacked
from nrm.dataset.shard import ShardResult, Work
from nrm.errors import InputError, NrmError, QueryError, first_line

try:
    import ray
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "runs on a cluster need Ray: pip install 'nrm[ray]'", name="ray"
    ) from error

_AHEAD = 2
"""Shards given out for each processor of the cluster, so that nobody waits for the next."""
_KEPT: dict[str, Work] = {}
"""The last work of a process of the cluster, with its captured model."""


def tasks(address: str | None = None, num_gpus: float = 0) -> Engine:
    """An engine on a Ray cluster.

    Arguments:
        address: of an existing cluster, `"auto"` for the one that this machine is part of; by
            default the one that this process is connected to, or a new one on this machine.
        num_gpus: of a task; may be a fraction. The model is then moved to the task's GPU.

    Raises:
        InputError: the cluster does not answer.
    """

    def engine(work: Work, shards: Iterator[int]) -> Iterator[ShardResult]:
        with _Connected(address):
            yield from _results(work, shards, num_gpus)

    return engine


class _Connected:
    """A connection to a cluster, closed at the end if it was made here."""

    def __init__(self, address: str | None) -> None:
        self._address, self._ours = address, False

    def __enter__(self) -> None:
        if ray.is_initialized():
            return
        try:
            ray.init(
                address=self._address,
                include_dashboard=None if self._address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # many kinds, of several layers
            raise InputError(
                f"ray: no cluster at {self._address or 'this machine'}: {error}"
            ) from (error)
        self._ours = True

    def __exit__(self, *_: object) -> None:
        if self._ours:
            ray.shutdown()


def _results(work: Work, shards: Iterator[int], num_gpus: float) -> Iterator[ShardResult]:
    content = packed(work)
    mark = hashlib.sha256(content).hexdigest()
    held, path = ray.put(content), list(sys.path)
    task = ray.remote(_shard).options(
        num_cpus=work.question.threads, num_gpus=num_gpus, max_retries=TRIES
    )
    places = max(1, _processors() // work.question.threads)
    running: dict[Any, int] = {}

    def start() -> None:
        number = next(shards, None)
        if number is not None:
            running[task.remote(held, mark, number, num_gpus > 0, path)] = number

    for _ in range(_AHEAD * places):
        start()
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        number = running.pop(ready)
        result = _taken(ready, number)
        start()
        yield result


def _processors() -> int:
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(found.get("CPU", 1))


def _taken(ready: Any, number: int) -> ShardResult:
    try:
        found: ShardResult | NrmError = ray.get(ready)
    except ray.exceptions.RayError as error:
        why = getattr(error, "cause", None) or error
        raise QueryError(
            f"ray: shard {number} was not computed: {type(why).__name__}: {first_line(why)}"
        ) from error
    if isinstance(found, NrmError):
        raise found
    return found


def _shard(
    content: bytes, mark: str, number: int, on_gpu: bool, path: Sequence[str]
) -> ShardResult | NrmError:
    """What a process of the cluster computes; errors on purpose are results, as they are.

    Arguments:
        path: where the run's own process looks for modules; looked at last.
    """
    if mark not in _KEPT:
        sys.path += [place for place in path if place not in sys.path]
        _KEPT.clear()
        _KEPT[mark] = unpacked(content, "cuda:0" if on_gpu else None)  # Ray shows a task its own
    try:
        return _KEPT[mark].shard(number)
    except NrmError as error:
        return error
