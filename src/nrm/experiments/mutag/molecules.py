"""The molecules of MUTAG (Debnath et al., 1991)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nrm.errors import InputError

ATOMS = ("C", "N", "O", "F", "I", "Cl", "Br")
"""What the node types stand for."""
_FILE = "mutag.json"


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
    file = folder / _FILE
    if not file.is_file():
        raise InputError(f"{folder} holds no {_FILE}")
    return [
        Molecule(
            one["num_nodes"],
            tuple((a, b) for a, b in one["edges"]),
            tuple(one["node_type"]),
            one["label"],
        )
        for one in json.loads(file.read_text(encoding="utf-8"))
    ]
