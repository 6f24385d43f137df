"""The listing of a graph for people: what can be addressed, and under which name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nrm.errors import UnknownLayerError
from nrm.graph import Graph, Variable


@dataclass(frozen=True)
class Layer:
    """One addressable variable.

    Attributes:
        name: its address; `aliases` are further ones.
        kind: conv, linear, activation, ... or input, bias, constant.
        module: the type of the module that computes it.
        shape: without the batch axis.
        channel_axis: of that shape.
        cut: whether every walk crosses it, so that its relevance is one.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    module: str
    shape: tuple[int, ...]
    channel_axis: int
    cut: bool


class Listing:
    """All addressable variables, inputs first. Prints as a table."""

    def __init__(self, graph: Graph) -> None:
        cuts = set(graph.cuts)
        self.layers = [_layer(variable, variable in cuts) for variable in graph.variables]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if name == layer.name or name in layer.aliases:
                return layer
        raise UnknownLayerError(name, [layer.name for layer in self.layers])

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """Name, kind, module, shape, cut, aliases: as text."""
        return [
            (
                layer.name,
                layer.kind,
                layer.module,
                " x ".join(map(str, layer.shape)),
                "cut" if layer.cut else "",
                ", ".join(layer.aliases),
            )
            for layer in self.layers
        ]

    def __str__(self) -> str:
        rows = [("layer", "kind", "module", "shape", "cut", "also called"), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def _layer(variable: Variable, cut: bool) -> Layer:
    producer = variable.producer
    shape = list(variable.shape)
    if variable.batch_axis is not None and shape:
        del shape[variable.batch_axis]
    channel = variable.channel_axis
    return Layer(
        variable.name,
        variable.aliases,
        producer.kind if producer else variable.kind,
        producer.module_type.rpartition(".")[2] if producer else "",
        tuple(size if size is not None else -1 for size in shape),
        0 if channel is None else len(shape) + channel,
        cut,
    )
