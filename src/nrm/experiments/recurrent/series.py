"""Series whose label is set at one step, and the networks trained on them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nrm.tensors import one_thread

STATES = 3
_BATCH = 128
_POOL = 2**15
_MOST_UPDATES = 4000
_CHECK_EVERY = 25


class Task(StrEnum):
    """What sets the label.

    Attributes:
        EVENT: the series rests in state 0 and is in state 1 or 2 at one step, any of them;
            which of the two is the label. There are only two such series for each step.
        POSITION: all states are random, and the label is the state at one fixed step.
    """

    EVENT = "event"
    POSITION = "position"


@dataclass(frozen=True)
class Series:
    """Series and their labels.

    Attributes:
        x: `[N, steps, 3]`, one-hot, in double precision.
        label: `[N]`.
        label_step: `[N]`, the step, from 0, that sets the label.
    """

    x: Tensor
    label: Tensor
    label_step: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Series:
        return Series(self.x[rows], self.label[rows], self.label_step[rows])


class LinearRNN(nn.Module):
    """A recurrent network without a nonlinearity: one linear cell and a linear read-out."""

    def __init__(self, classes: int, hidden: int = 32) -> None:
        super().__init__()
        self.hidden = hidden
        self.cell = nn.Linear(STATES + hidden, hidden)
        self.head = nn.Linear(hidden, classes)
        with torch.no_grad():  # or a new network forgets before it has learnt to remember
            self.cell.weight[:, STATES:] = nn.init.orthogonal_(torch.empty(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]` of series `[N, steps, 3]`."""
        h = x.new_zeros(x.shape[0], self.hidden)
        for t in range(x.shape[1]):
            h = self.cell(torch.cat([x[:, t], h], -1))
        logits: Tensor = self.head(h)
        return logits


@dataclass(frozen=True)
class Trained:
    """A network after training.

    Attributes:
        model: in double precision and evaluation mode.
        accuracy: on `held_out`.
        held_out: under `Task.POSITION` series that training never showed; under `Task.EVENT`,
            where there are so few, every series.
        updates: how many batches of 128 series it took.
    """

    model: LinearRNN
    accuracy: float
    held_out: Series
    updates: int


def middle(steps: int) -> int:
    """The step that sets the label under `Task.POSITION`, and in the figure under both."""
    return (steps - 1) // 2


def make_series(task: Task, steps: int, count: int, seed: int) -> Series:
    """Random series, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if task is Task.EVENT:
        every = all_events(steps)
        return every[torch.randint(len(every), (count,), generator=generator)]
    states = torch.randint(STATES, (count, steps), generator=generator)
    label_step = torch.full((count,), middle(steps))
    return Series(F.one_hot(states, STATES).double(), states[:, middle(steps)], label_step)


def all_events(steps: int) -> Series:
    """Every series of `Task.EVENT`: two for each step."""
    label_step = torch.arange(steps).repeat_interleave(STATES - 1)
    label = torch.arange(STATES - 1).repeat(steps)
    states = torch.zeros(len(label), steps, dtype=torch.long)
    states.scatter_(1, label_step[:, None], label[:, None] + 1)
    return Series(F.one_hot(states, STATES).double(), label, label_step)


def train(task: Task, steps: int, seed: int) -> Trained:
    """Train with Adam until all held-out series were right at three checks in a row.

    Gives up after 4000 updates: `accuracy` says what was reached. The same seed gives the same
    data and, on the same machine, the same network.
    """
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = LinearRNN(STATES - 1 if task is Task.EVENT else STATES)
        shown, held_out = _split(task, steps, seed)
        optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
        in_a_row, updates = 0, 0
        while updates < _MOST_UPDATES and in_a_row < 3:
            some = shown[torch.randint(len(shown), (_BATCH,))]
            optimiser.zero_grad()
            loss = F.cross_entropy(model(some.x.float()), some.label)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            updates += 1
            if updates % _CHECK_EVERY == 0:
                in_a_row = in_a_row + 1 if _accuracy(model, held_out) == 1 else 0
        model.double().eval().requires_grad_(False)
        return Trained(model, _accuracy(model, held_out), held_out, updates)


def _split(task: Task, steps: int, seed: int) -> tuple[Series, Series]:
    """Series to train on, and series to test on that are not among them where that can be."""
    if task is Task.EVENT:
        every = all_events(steps)
        return every, every
    pool = make_series(task, steps, _POOL, seed)
    states = pool.x.argmax(-1)
    code = (states * STATES ** torch.arange(steps)).sum(1)
    different, which = torch.unique(code, return_inverse=True)  # type: ignore[no-untyped-call]
    apart = (torch.rand(len(different)) < 0.1)[which]
    return pool[~apart], pool[apart]


@torch.no_grad()
def _accuracy(model: LinearRNN, series: Series) -> float:
    right = model(series.x.to(model.head.weight.dtype)).argmax(1) == series.label
    return float(right.double().mean())
