"""A graph to look at: its layers by name, and the network in proper form (appendix A).

In the proper form layers lie one after the other, with virtual copies. A variable stands one layer
above the highest of its operands. What is needed further up than in the next layer is copied
through identities until it is: a skip connection, or a late input (a bias seen as an input, an
input that enters in the middle). All walks cross every layer exactly once, so that the relevance of
each layer, copies included, sums to one. The copies exist here only: message passing needs none.
The explained output is the one variable of the last layer. Early outputs do not occur, because one
tensor is explained; several outputs that a function joins are copied up to it like skips.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nrm.display import Shown, Table, sizes
from nrm.engine import Messages, one_by_one, send
from nrm.errors import UnknownLayerError
from nrm.graph import Graph, Variable
from nrm.prepare import Pass


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


class Listing(Shown):
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
                sizes([None if size < 0 else size for size in layer.shape]),
                "cut" if layer.cut else "",
                ", ".join(layer.aliases),
            )
            for layer in self.layers
        ]

    def table(self) -> Table:
        cuts = sum(layer.cut for layer in self.layers)
        note = f"{len(self)} layers, {cuts} of them cuts, which every walk crosses."
        heads = ("layer", "kind", "module", "shape", "cut", "also called")
        return Table("", heads, self.rows(), [note])


_UNSET = {"composite": "what suits the model", "bias": "what the composite assumes"}


def settings_table(settings: Mapping[str, object]) -> Table:
    """What an explainer explains, and how."""
    model = settings["model"]
    rows = [("model", type(model).__name__)]
    if isinstance(model, nn.Module):
        rows.append(("parameters", f"{sum(p.numel() for p in model.parameters()):,}"))
    for name, value in settings.items():
        if name == "model" or (value is None and name not in (*_UNSET, "batch_axis")):
            continue
        rows.append((name, _UNSET[name] if value is None and name in _UNSET else str(value)))
    return Table("Explainer", (), rows)


def _layer(variable: Variable, cut: bool) -> Layer:
    producer = variable.producer
    shape = variable.neuron_sizes
    return Layer(
        variable.name,
        variable.aliases,
        producer.kind if producer else variable.kind,
        producer.module_type.rpartition(".")[2] if producer else "",
        tuple(size if size is not None else -1 for size in shape),
        variable.channel_axis_of(shape) if shape else 0,
        cut,
    )


# -- The proper form -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerPart:
    """One variable in one layer.

    Attributes:
        name: the variable's address.
        copy: `None` where the variable itself stands; else what it is a copy of, `"skip"` or
            `"late input"`.
        neurons: how many, for each sample.
        relevance: `[batch]`.
    """

    name: str
    copy: str | None
    neurons: int
    relevance: Tensor


@dataclass(frozen=True)
class ProperLayer:
    """Neurons that every walk crosses exactly once.

    Attributes:
        index: 0 for the inputs.
        neurons: variables first, copies after.
    """

    index: int
    neurons: list[LayerPart]

    @property
    def total(self) -> Tensor:
        """`[batch]`: the relevance of all neurons, which must be one."""
        return torch.stack([part.relevance for part in self.neurons]).sum(0)


@dataclass(frozen=True, repr=False)
class ProperForm(Shown):
    """The layers, inputs first. Prints as a table."""

    layers: list[ProperLayer]

    def __iter__(self) -> Iterator[ProperLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> ProperLayer:
        return self.layers[index]

    def table(self) -> Table:
        rows = [
            (
                f"layer {layer.index}: total {layer.total.mean():.6f}" if place == 0 else "",
                f"{part.relevance.mean():+.4f}",
                f"{part.name} [{part.neurons}]",
                f"(copy: {part.copy})" if part.copy else "",
            )
            for layer in reversed(self.layers)
            for place, part in enumerate(layer.neurons)
        ]
        note = "Relevances are means over the samples; in brackets, how many neurons each has."
        return Table("", (), rows, [note])


class _Held:
    """Adds the relevance of all variables of a layer to `held`, once all above it is done.

    Arguments:
        only: the sample that is looked at, if it is one.
    """

    def __init__(
        self,
        held: dict[int, dict[Variable, Tensor]],
        levels: dict[Variable, int],
        batch: int,
        only: int | None,
    ) -> None:
        self.held, self.levels, self.batch, self.only = held, levels, batch, only
        self._seen: set[int] = set()

    def __call__(self, variable: Variable, travelling: Messages, arrived: Messages) -> None:
        level = self.levels[variable]
        if level in self._seen:
            return
        self._seen.add(level)
        there = self.held.setdefault(level, {})
        for v, message in (*travelling.items(), *arrived.items()):
            part = v.per_sample(message, self.batch, self.only)[0]
            there[v] = there[v] + part if v in there else part


def proper_form(forward: Pass, start: Messages) -> ProperForm:
    """Lay out the graph in layers, with the relevance of each (appendix A)."""
    graph, batch = forward.graph, forward.batch
    levels = _levels(graph)
    members = _members(graph, levels)
    held: dict[int, dict[Variable, Tensor]] = {}
    order = sorted(graph.variables, key=lambda v: (-levels[v], -v.index))
    apart = all(v.tells_samples(batch) for v in graph.variables)
    for sample, alone in enumerate([start] if apart else one_by_one(start, batch)):
        look = _Held(held, levels, batch, None if apart else sample)
        send(forward, alone, dict.fromkeys(graph.leaves), observe=look, order=order)
    nothing = forward.output.new_zeros(batch)
    layers = []
    for index, present in enumerate(members):
        layers.append(
            ProperLayer(
                index,
                [
                    LayerPart(
                        variable.name,
                        None if levels[variable] == index else _copy_of(variable),
                        _count(forward, variable),
                        held.get(index, {}).get(variable, nothing),
                    )
                    for variable in present
                ],
            )
        )
    return ProperForm(layers)


def depth(graph: Graph) -> int:
    """How many layers the proper form has: `L + 1`."""
    return max(_levels(graph).values()) + 1


def _levels(graph: Graph) -> dict[Variable, int]:
    """One more than the highest operand; 0 for leaves."""
    levels: dict[Variable, int] = {}
    for variable in graph.variables:  # parents first
        operands = variable.producer.operands if variable.producer else ()
        levels[variable] = max((levels[v] + 1 for v in operands), default=0)
    return levels


def _members(graph: Graph, levels: dict[Variable, int]) -> list[list[Variable]]:
    """The variables of each layer, and after them those that are copied through it."""
    last = dict(levels)  # the highest layer where a copy is needed
    for operation in graph.operations:
        for operand in operation.operands:
            last[operand] = max(last[operand], levels[operation.output] - 1)
    members: list[list[Variable]] = [[] for _ in range(max(levels.values()) + 1)]
    for variable, level in levels.items():
        members[level].append(variable)
    for variable, level in levels.items():
        for between in range(level + 1, last[variable] + 1):
            members[between].append(variable)
    return members


def _copy_of(variable: Variable) -> str:
    return "late input" if variable.is_leaf else "skip"


def _count(forward: Pass, variable: Variable) -> int:
    return variable.neuron_shape(forward.shape(variable)).numel()
