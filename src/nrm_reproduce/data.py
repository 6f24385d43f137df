"""What experiments read: handwritten digits, photographs, made series, molecules."""

from __future__ import annotations

import gzip
import json
import random
import struct
import zlib
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nrm import io
from nrm.cli import demo
from nrm.errors import InputError

DIGITS = "digits"
"""`--data digits`: scikit-learn's, which need no files."""
FOLDERS = ("", "mnist", "MNIST", "MNIST/raw", "raw")
"""Where in the folder of data MNIST may lie: as itself, as torchvision leaves it."""
PARTS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
"""Of MNIST: how their files begin, and how many digits they hold."""
PHOTOS = "imagenet"
"""The folder of photographs, in that of the data."""
LABELS = Path(PHOTOS) / "classes.txt"
STATES = 3
"""Of a series, at every step."""
ATOMS = ("C", "N", "O", "F", "I", "Cl", "Br")
"""What the node types of molecules stand for."""

_SIDE, _CLASSES = 28, 10
_PICTURES, _LABELS = 0x803, 0x801
"""The first four bytes of idx files: unsigned bytes on three axes, and on one."""
_HELD_OUT = {"mnist": 1_000, DIGITS: 100}
_DIGITS_TRAINING = 1_400
_SUFFIXES = (".jpg", ".jpeg", ".png")
_MOLECULES = "mutag.json"


# -- handwritten digits as flat pictures -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """Pictures `[N, side * side]` from 0 to 1, and their classes `[N]`."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in three parts.

    Attributes:
        train: what the network learns from.
        held_out: of the training set, kept from the network: to choose rules on.
        test: what is reported on, in the order of its file.
    """

    name: str
    train: Part
    held_out: Part
    test: Part

    def standardised(self) -> Data:
        """With mean zero and deviation one over the pixels that the network learns from."""
        mean, deviation = self.train.x.mean(), self.train.x.std()
        parts = (self.train, self.held_out, self.test)
        return Data(self.name, *(Part((part.x - mean) / deviation, part.y) for part in parts))


def load_flat(data: str) -> Data:
    """The data set that a command line names: a folder with MNIST in it, or `digits`.

    Raises:
        InputError: the files are not there, or not MNIST's.
    """
    return _digits() if data == DIGITS else _mnist(Path(data))


def _mnist(folder: Path) -> Data:
    train, test = (_part(folder, *PARTS[name]) for name in ("train", "test"))
    return _divided("mnist", train, test)


def _part(folder: Path, prefix: str, count: int) -> Part:
    pictures = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"), (count, _SIDE, _SIDE))
    labels_file = _find(folder, f"{prefix}-labels-idx1-ubyte")
    labels = read_idx(labels_file, (count,)).long()
    if int(labels.max()) >= _CLASSES:
        raise InputError(f"{labels_file}: a label is {int(labels.max())}, MNIST's are 0 to 9.")
    return Part(pictures.flatten(1).float() / 255, labels)


def read_idx(file: Path, shape: tuple[int, ...]) -> Tensor:
    """The bytes of an idx file, gzipped or not, as a tensor.

    Raises:
        InputError: it is damaged, or of another kind or size than `shape` says.
    """
    raw = file.read_bytes()
    if file.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{file}: not a whole gzip file ({error}).") from error
    magic = _PICTURES if len(shape) == 3 else _LABELS
    begin = struct.pack(f">{1 + len(shape)}I", magic, *shape)
    if raw[:4] != begin[:4]:
        raise InputError(
            f"{file}: begins with {raw[:4].hex() or 'nothing'}, an idx file of "
            f"{len(shape)} axes of bytes with {begin[:4].hex()}."
        )
    size = len(begin) + torch.Size(shape).numel()
    if raw[: len(begin)] != begin or len(raw) != size:
        whole = raw[4 : len(begin)]
        found = [number for (number,) in struct.iter_unpack(">I", whole[: len(whole) // 4 * 4])]
        raise InputError(
            f"{file}: {' x '.join(map(str, found))} in {len(raw)} bytes; MNIST's is "
            f"{' x '.join(map(str, shape))} in {size}."
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=len(begin)).view(shape)


def _find(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise InputError(
            f"--data {folder}: no such folder. Give one that holds MNIST, or {DIGITS!r}."
        )
    for place in FOLDERS:
        for file in (folder / place / name, folder / place / f"{name}.gz"):
            if file.is_file():
                return file
    raise InputError(
        f"--data {folder}: neither {name} nor {name}.gz is in it, or in its "
        f"{', '.join(FOLDERS[1:])}. torchvision.datasets.MNIST({str(folder)!r}, download=True) "
        f"puts them there; --data {DIGITS} needs no files."
    )


def _digits() -> Data:
    images, y = demo.digits()
    x = images.flatten(1)
    # Those of one writer lie together in the file, so that parts are drawn, always alike.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen, others = order[:_DIGITS_TRAINING], order[_DIGITS_TRAINING:]
    return _divided(DIGITS, Part(x[seen], y[seen]), Part(x[others], y[others]))


def _divided(name: str, train: Part, test: Part) -> Data:
    kept = len(train) - _HELD_OUT[name]
    return Data(
        name,
        Part(train.x[:kept], train.y[:kept]),
        Part(train.x[kept:], train.y[kept:]),
        test,
    )


# -- photographs ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture, a photograph or a digit.

    Attributes:
        x: the model's input, `[1, C, H, W]`.
        shown: `[H, W, 3]` or `[H, W]` from 0 to 1.
    """

    name: str
    x: Tensor
    shown: io.Pixels


def choose_photos(folder: Path, count: int, seed: int) -> list[Path]:
    """Some pictures of a folder, by name. More of them are the same ones and others.

    Raises:
        InputError: there are none.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if not files:
        raise InputError(f"{folder}: no folder with pictures ({', '.join(_SUFFIXES)}) in it.")
    random.Random(seed).shuffle(files)
    return sorted(files[:count])


def read_photo(file: Path) -> Photo:
    """A picture as ImageNet's networks take it."""
    picture = io.imagenet(io.read_image(file))
    return Photo(file.stem, picture.x, picture.shown)


def class_names(data: Path) -> list[str] | None:
    """The classes' names, where the folder of data has them."""
    return io.read_labels(data / LABELS) if (data / LABELS).is_file() else None


# -- pairs of sentences ---------------------------------------------------------------------------

SENTENCES = (
    ("The boy threw the ball over the fence.", "A child tossed a ball into the next garden."),
    ("Our flight was cancelled because of snow.", "The storm kept our plane on the ground."),
    ("She poured milk into her tea.", "The woman likes her tea with milk."),
    ("The museum opens at nine on Sundays.", "You can visit the gallery on Sunday morning."),
    ("He broke his leg while skiing.", "The skier was hurt in a bad fall."),
    ("The library bought two hundred new books.", "There are many new novels to borrow."),
    ("My sister plays chess every evening.", "My brother spends his nights with board games."),
    ("The river froze in January.", "The lake was covered with ice all winter."),
    ("A fire destroyed the wooden church.", "The old chapel burned to the ground."),
    ("Please turn off the light in the kitchen.", "The lamp above the stove is still on."),
    ("The farmer feeds his cows with fresh grass.", "Cattle graze on the green meadow."),
    ("They painted the front door blue.", "The new colour of the house is white."),
    ("The students wrote an exam in physics.", "The class was tested on mechanics."),
    ("A loud noise woke the baby.", "The infant started to cry in the night."),
    ("The shop sells shoes and leather bags.", "She bought a pair of boots in the city."),
    ("The mayor promised cheaper bus tickets.", "Public transport will cost less next year."),
    ("We cooked rice with vegetables for lunch.", "There was fried rice on the table at noon."),
    ("The satellite measures the height of the sea.", "Oceans rise as the ice melts."),
    ("The dog buried a bone in the garden.", "Our puppy dug a hole under the tree."),
    ("The singer forgot the words of her song.", "The concert ended with a long applause."),
)
"""Written for the experiment `networks`, before any result."""


# -- series whose label is set at one step ---------------------------------------------------------


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


# -- the molecules of MUTAG (Debnath et al., 1991) -------------------------------------------------


@dataclass(frozen=True, eq=False)
class Molecule:
    """A graph of atoms; hydrogens are left out.

    Attributes:
        bonds: pairs of atoms, each once.
        types: the type of each atom, an index into `ATOMS`.
        label: 0 or 1, the class.
    """

    size: int
    bonds: tuple[tuple[int, int], ...]
    types: tuple[int, ...]
    label: int

    @cached_property
    def features(self) -> Tensor:
        """`[atoms, types]`, one-hot."""
        return F.one_hot(torch.tensor(self.types), len(ATOMS)).double()

    @cached_property
    def adjacency(self) -> Tensor:
        """`[atoms, atoms]`: which atoms are bonded, or the same."""
        found = torch.eye(self.size, dtype=torch.bool)
        for a, b in self.bonds:
            found[a, b] = found[b, a] = True
        return found

    @property
    def formula(self) -> str:
        """How many atoms of each type, e.g. `C16 N1 O2`."""
        counts = [self.types.count(kind) for kind in range(len(ATOMS))]
        return " ".join(f"{a}{n}" for a, n in zip(ATOMS, counts, strict=True) if n)

    @cached_property
    def rings(self) -> tuple[tuple[int, ...], ...]:
        """A minimum basis of rings, each its atoms in ascending order."""
        import networkx

        graph = networkx.Graph(self.bonds)
        return tuple(sorted(tuple(sorted(ring)) for ring in networkx.minimum_cycle_basis(graph)))


def load_molecules(folder: Path) -> list[Molecule]:
    """The molecules in a folder's `mutag.json`.

    Raises:
        InputError: there is none.
    """
    file = folder / _MOLECULES
    if not file.is_file():
        raise InputError(f"{folder} holds no {_MOLECULES}")
    return [
        Molecule(
            one["num_nodes"],
            tuple((a, b) for a, b in one["edges"]),
            tuple(one["node_type"]),
            one["label"],
        )
        for one in json.loads(file.read_text(encoding="utf-8"))
    ]
