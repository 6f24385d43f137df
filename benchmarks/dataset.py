"""Statistics over a data set: what they cost beside plain forward + backward over the same data.

- `rate`: samples per second of two layers' relevance and activation statistics, beside a plain
  forward and backward pass of the explained outputs over the same loader; in turn, several times,
  once everything is captured. Seconds of the processor and of the wall; on a machine that does
  other things too, only the former say much.
- `memory`: the largest resident memory of a process of its own at 1,000 and 60,000 samples, and
  bytes in the folder for each sample.
- `workers`: how much faster two processes are than one, start-up left out.

Samples are random pictures that are made when they are read, so that memory is that of the run.
Networks have random weights: which changes no cost.

    python -m benchmarks.dataset --json dataset.json
    python -m benchmarks.dataset --models squeezenet --device cuda --batch 128 --only rate
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import nrm
from nrm.dataset import relmax
from nrm.dataset.drivers import workers
from nrm.dataset.shard import Layer, Question, Work
from nrm.dataset.sources import Rows
from nrm.torchvision_mismatch import import_torchvision

SIZES = (1_000, 60_000)
KINDS = ("rate", "memory", "workers")


class Made(Dataset[tuple[Tensor, int]]):
    """Random pictures, always the same.

    Arguments:
        shape: of one.
    """

    def __init__(self, samples: int, shape: tuple[int, ...]) -> None:
        self.samples, self.shape = samples, shape

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.samples:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        return torch.rand(self.shape, generator=generator), index % 10


def digits() -> nn.Module:
    """A convolutional network for 28 x 28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def squeezenet() -> nn.Module:
    """torchvision's, with 224 x 224 pixels."""
    return import_torchvision().models.squeezenet1_0()  # type: ignore[no-any-return]


def vgg16() -> nn.Module:
    """torchvision's, with 224 x 224 pixels."""
    return import_torchvision().models.vgg16()  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str], int]] = {
    "digits": (digits, (1, 28, 28), ["4", "8"], 2048),
    "squeezenet": (squeezenet, (3, 224, 224), ["features.9", "features.10"], 128),
    "vgg16": (vgg16, (3, 224, 224), ["features.26", "features.28"], 32),
}
"""By name: what makes it, a sample's shape, two layers, how many samples are timed at once."""


def made(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval().to(device)


def rates(
    name: str, device: str, batch: int, times: int, readers: int, samples: int | None
) -> dict[str, Any]:
    """Samples per second, plain and with statistics, the median of several turns."""
    _, shape, layers, usual = MODELS[name]
    count = samples or usual
    model, data = made(name, device), Made(count, shape)
    asked = tuple(Layer(layer) for layer in layers)
    question = Question(
        nrm.Explainer(model), asked, batch=batch, threads=torch.get_num_threads(), readers=readers
    )
    work = Work(question, Rows(data, shard=count, name="made"))

    def plain() -> None:
        for x, _ in DataLoader(data, batch):
            x = x.to(device).requires_grad_()
            model(x).amax(1).sum().backward()  # type: ignore[no-untyped-call]

    def read() -> None:
        for _ in DataLoader(data, batch):
            pass

    ways: dict[str, Callable[[], object]] = {
        "read": read,
        "plain": plain,
        "statistics": lambda: work.shard(0),
    }
    spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(times + 1):
        for way, run in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if device != "cpu":
                torch.cuda.synchronize()  # type: ignore[no-untyped-call]
            if turn:  # the first captures and warms up
                spent[way].append((time.perf_counter() - wall, time.process_time() - processor))
    middle = {
        way: [statistics.median(each) for each in zip(*turns, strict=True)]
        for way, turns in spent.items()
    }
    return {
        "model": name,
        "device": device,
        "batch": batch,
        "samples": count,
        "turns": times,
        "seconds_per_sample": {way: wall / count for way, (wall, _) in middle.items()},
        "processor_seconds_per_sample": {way: cpu / count for way, (_, cpu) in middle.items()},
        "ratio": middle["statistics"][0] / middle["plain"][0],
        "ratio_of_processor": middle["statistics"][1] / middle["plain"][1],
    }


def memory(samples: int) -> dict[str, Any]:
    """The largest resident memory of a process that runs over some samples."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __spec__.name, "--inside", str(samples)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def inside(samples: int) -> dict[str, Any]:
    """A whole run over the digits' network, in this process."""
    model = made("digits", "cpu")
    _, shape, layers, _ = MODELS["digits"]
    with tempfile.TemporaryDirectory() as folder:
        relmax(
            nrm.Explainer(model), Rows(Made(samples, shape), name="made"), layers, folder, batch=64
        )
        sizes = {
            part: sum(file.stat().st_size for file in (Path(folder) / part).rglob("*.*"))
            for part in ("shards", "merged")
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "samples": samples,
        "MiB": peak / (2**20 if sys.platform == "darwin" else 2**10),
        "bytes_per_sample": {part: size / samples for part, size in sizes.items()},
    }


def by_workers(name: str, times: int) -> dict[str, Any]:
    """Seconds that one and two processes take for the same shards, from the first result on."""
    _, shape, layers, count = MODELS[name]
    asked = tuple(Layer(layer) for layer in layers)
    shards, size = 10, max(1, count // 4)
    data = Rows(Made(shards * size, shape), shard=size, name="made")
    work = Work(Question(nrm.Explainer(made(name, "cpu")), asked, readers=0), data)
    work.probe()

    def seconds(count: int) -> float:
        """From when each process has computed a shard: import and capture are over."""
        ids = iter(range(shards))
        results = workers(count)(work, ids)
        for _ in range(count):
            next(results)
        begin, first = time.perf_counter(), count
        for _ in results:
            pass
        return (time.perf_counter() - begin) / (shards - first)

    each = {count: statistics.median(seconds(count) for _ in range(times)) for count in (1, 2)}
    return {"model": name, "seconds_per_shard": each, "speedup": each[1] / each[2]}


def main(given: Iterable[str] | None = None) -> None:
    """Measure, print, and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["digits", "squeezenet"])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--readers", type=int, default=0, help="threads that read ahead")
    parser.add_argument("--samples", type=int, help="how many are timed at once")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args(None if given is None else list(given))
    torch.set_num_threads(1)
    if asked.inside:
        sys.stdout.write(json.dumps(inside(asked.inside)))
        return
    processor = platform.processor() or platform.machine()
    found: dict[str, Any] = {"torch": str(torch.__version__), "processor": processor}
    if asked.device != "cpu":
        found["device"] = torch.cuda.get_device_name(asked.device)

    def tell(kind: str, one: dict[str, Any]) -> None:
        found.setdefault(kind, []).append(one)
        sys.stdout.write(f"{kind}: {json.dumps(one)}\n")
        sys.stdout.flush()

    for name in asked.models if "rate" in asked.only else ():
        tell(
            "rate",
            rates(name, asked.device, asked.batch, asked.times, asked.readers, asked.samples),
        )
    for samples in asked.sizes if "memory" in asked.only else ():
        tell("memory", memory(samples))
    for name in asked.models[:1] if "workers" in asked.only else ():
        tell("workers", by_workers(name, asked.times))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
