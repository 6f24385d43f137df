"""Beginnings of walks of nodes, with the message of each at the node it has come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nrm.chunks import in_chunks, message_size
from nrm.graph import Variable
from nrm.passing import send
from nrm.program import Pass


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Walks from the output down to a layer.

    Attributes:
        variable: the layer.
        axis: that of the nodes in a message `[K, *shape]`.
        nodes: `[P, layers so far]`, the node of every walk in each layer.
        held: `[P, *features]`, the message of each at its last node; elsewhere it has none.
        parents: `[P]`, which prefix each came from.
    """

    variable: Variable
    axis: int
    nodes: Tensor
    held: Tensor
    parents: Tensor

    @classmethod
    def split(cls, message: Tensor, variable: Variable, axis: int) -> Prefixes:
        """The parts of a message `[1, *shape]`, one for each node that holds any."""
        place = axis + 1
        if variable.batch_axis is not None and variable.batch_axis <= axis:
            place += 1
        parents, nodes, held = _parts(message, place)
        return cls(variable, place, nodes[:, None], held, parents)

    @property
    def relevance(self) -> Tensor:
        """`[P]`: the joint relevance of the nodes so far."""
        return self.held.flatten(1).sum(1)

    def strongest(self, beam: int) -> Prefixes:
        """Those with the largest sum of absolute relevance."""
        return self._at(self.held.abs().flatten(1).sum(1).topk(beam).indices)

    def step(self, forward: Pass, lower: Variable, memory: int) -> Prefixes:
        """Every prefix with every node of a lower layer that its message gets to."""
        shape = forward.shape(self.variable)
        found: list[tuple[Tensor, Tensor, Tensor]] = []

        def stepped(chosen: Sequence[int]) -> None:
            part = self._at(slice(chosen[0], chosen[-1] + 1))
            arrived = send(forward, {self.variable: part._messages(shape)}, {lower: None})
            if lower in arrived:
                parents, nodes, held = _parts(arrived[lower], self.axis)
                found.append((parents + chosen[0], nodes, held))

        each = message_size(forward, self.variable, lower)
        in_chunks(range(len(self)), memory, each, stepped)
        if not found:
            blank = self.held.new_zeros((0, *forward.shape(lower)))
            found.append(_parts(blank, self.axis))
        parents, nodes, held = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        so_far = torch.cat([self.nodes[parents], nodes[:, None]], 1)
        return Prefixes(lower, self.axis, so_far, held, parents)

    def merged(self, ways: list[int]) -> tuple[Prefixes, list[int]]:
        """One prefix for each last node, and how many walks it stands for.

        Arguments:
            ways: the same for the prefixes that these came from.
        """
        last, group = torch.unique(self.nodes[:, -1], return_inverse=True)
        held = self.held.new_zeros((len(last), *self.held.shape[1:]))
        held.index_add_(0, group, self.held.abs())
        counts = [0] * len(last)
        for place, parent in zip(group.tolist(), self.parents.tolist(), strict=True):
            counts[place] += ways[parent]
        parents = torch.arange(len(last), device=last.device)
        return Prefixes(self.variable, self.axis, last[:, None], held, parents), counts

    def _messages(self, shape: torch.Size) -> Tensor:
        """`[P, *shape]`."""
        message = self.held.new_zeros((len(self), *shape))
        every = torch.arange(len(self), device=message.device)
        message.movedim(self.axis, 1)[every, self.nodes[:, -1]] = self.held
        return message

    def _at(self, chosen: Tensor | slice) -> Prefixes:
        return Prefixes(
            self.variable, self.axis, self.nodes[chosen], self.held[chosen], self.parents[chosen]
        )

    def __len__(self) -> int:
        return len(self.nodes)


def _parts(message: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a message `[K, *shape]` holds at each node: its row, the node, and `[P, *features]`."""
    by_node = message.movedim(axis, 1)
    holds = by_node.flatten(2).ne(0).any(2) if by_node.dim() > 2 else by_node.ne(0)
    rows, nodes = holds.nonzero(as_tuple=True)
    return rows, nodes, by_node[rows, nodes]
