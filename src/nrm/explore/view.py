"""What the explorer asks of a measure, and its answer: totals, columns, flows, a heatmap.

An answer comes in parts, the quickest first (`answer`): what is explained; every column with the
relevance of its parts, from one run forward and back; then the flows between adjacent columns,
pair by pair. Every number says which relevance it is, what it took, and the Python that gives it.
All of them are public queries of `Measure`.
"""

from __future__ import annotations

import base64
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nrm.condition import Condition, Sets
from nrm.errors import QueryError
from nrm.explore.answers import (
    Columns,
    Cost,
    Done,
    Explained,
    Flows,
    Found,
    Heatmap,
    Node,
    Number,
    Part,
    Request,
    Shown,
)
from nrm.explore.opened import Column, Opened, columns_of, target_of
from nrm.explore.selection import Selected, parse, part_of
from nrm.joint import Division, partition
from nrm.measure import Measure

MOST_MESSAGES = 64
"""At once, that a formula may need."""
LINKS = 48
"""Flows that are drawn between two columns."""
FLOWS, SECONDS = 10, 30.0
"""Flows through all columns that a search finds, and when it ends at the latest."""

Check = Callable[[], None]
"""Raises, where nobody waits for the answer any more."""


def answer(R: Measure, request: Request, opened: Opened, check: Check) -> Iterator[Part]:
    """The parts of an answer.

    Arguments:
        R: of the input, of any target.
        check: is called between passes.

    Raises:
        NrmError: something is asked for that is not there.
    """
    target, _, symbol = target_of(request.target, request.against, R)
    asked = _Asked(R.of(target), request, opened, symbol, check)
    yield asked.explained()
    found = asked.columns()
    yield found
    costs = [found.cost]
    for lower, upper in zip(found.columns, found.columns[1:], strict=False):
        check()
        flows = asked.flows(lower, upper)
        costs.append(flows.cost)
        yield flows
    yield Done(Cost(sum(c.milliseconds for c in costs), sum(c.passes for c in costs)))


def search(R: Measure, request: Request, opened: Opened, tell: Callable[[float], None]) -> Found:
    """The most relevant flows through all columns, found by the exact search or until time is up.

    Arguments:
        tell: is called after every message with the gap that is left; it may raise.

    Raises:
        NrmError: something is asked for that is not there, or lies below a column.
    """
    target, _, symbol = target_of(request.target, request.against, R)
    return _Asked(R.of(target), request, opened, symbol, lambda: None).search(tell)


class _Asked:
    """A request to a measure, with what both its columns and its flows need."""

    def __init__(
        self, R: Measure, request: Request, opened: Opened, symbol: str, check: Check
    ) -> None:
        self.R, self.request, self.opened, self.check = R, request, opened, check
        self.symbol = symbol
        self.forward = R.forward_pass  # once: each look at it looks at the whole model
        self.selected: Selected | None = parse(request.selection, R.graph)
        known = {column.layer: column for column in columns_of(R.graph, opened, R)}
        for layer in request.columns:
            if layer not in known:
                R.graph.variable(layer)  # says so, where there is none of that name
                raise QueryError(f"{layer!r} is no cut with channels, so that it is no column.")
        names = [layer for layer in known if layer in request.columns]
        self.layers: list[Column] = [known[name] for name in names]
        self.messages = 1
        if self.selected is not None:
            self.messages = R.plan(self.selected.formula).channels
            if self.messages > MOST_MESSAGES:
                raise QueryError(
                    f"this formula needs {self.messages} messages at once, more than "
                    f"{MOST_MESSAGES}: select less."
                )
        # Kept here, so that the measure keeps what it works out about it.
        formula = () if self.selected is None else (self.selected.formula,)
        self.condition = Condition(*formula)
        self.given = request.mode == "given" and self.selected is not None
        self.known = 1.0  # what joint relevances are divided by

    # -- how numbers are named -------------------------------------------------------------------

    def notation(self, *first: str) -> str:
        """`R(first, selection, k)`; or `R(first | selection, k)`."""
        selection = [] if self.selected is None else [self.selected.notation]
        if self.given and first:
            return f"R({', '.join(first)} | {', '.join([*selection, self.symbol])})"
        return f"R({', '.join([*first, *selection, self.symbol])})"

    def python(self, *first: str, query: str = "R") -> str:
        """The query with the selection, jointly or given."""
        arguments = list(first)
        if self.selected is not None:
            given = self.given and (first or query != "R")
            arguments.append(f"{'given=' if given else ''}{self.selected.python}")
        return f"{query}({', '.join(arguments)})"

    def divided(self, joint: float) -> float:
        """A joint relevance as it is shown: divided by what is given, 0 where that is 0."""
        if not self.given:
            return joint
        return joint / self.known if self.known else 0.0

    # -- what is shown ---------------------------------------------------------------------------

    def explained(self) -> Explained:
        """The output, and the largest of all outputs."""
        R, request = self.R, self.request
        values = R.output.reshape(-1)
        chosen, label = None, str(R.quantity)
        if request.against is None:
            chosen = int(self.symbol)
            label = self.opened.label(chosen)
        else:
            of = int(values.argmax()) if request.target is None else request.target
            label = f"{self.opened.label(of)} − {self.opened.label(request.against)}"
            chosen = of
        largest = values.topk(min(10, len(values))).indices.tolist()
        wanted = [k for k in (chosen, request.against) if k is not None and k not in largest]
        outputs = [(k, self.opened.label(k), float(values[k])) for k in [*largest, *wanted]]
        scale = float(R.scale[0])
        return Explained(chosen, request.against, label, scale, R.explained, outputs)

    def columns(self) -> Columns:
        """All columns and the heatmap at the input."""
        R, opened = self.R, self.opened
        place = opened.place or R.graph.inputs[0].name
        begin = time.perf_counter()
        end = R.graph.output.name
        with warnings.catch_warnings(record=True) as met:
            warnings.simplefilter("always")
            layers = [place, *(column.layer for column in self.layers), end]
            found = R.marginals(self.condition, layers=layers)
        if self.selected is not None:  # all walks begin at the output
            self.known = math.fsum(found[end].double().reshape(-1).tolist())
        heat = self._heatmap(place, found[place])
        shown = [self._column(column, found[column.layer]) for column in self.layers]
        passes = 1 if self.selected is None else 2 * self.messages
        total = Number(self.known, self._total(), self._line())
        cautions = list(dict.fromkeys(str(one.message) for one in met))
        return Columns(total, shown, heat, _cost(begin, passes), cautions)

    def _total(self) -> str:
        selection = [] if self.selected is None else [self.selected.notation]
        return f"R({', '.join([*selection, self.symbol])})"

    def _line(self) -> str:
        return "R()" if self.selected is None else f"R({self.selected.python})"

    def _heatmap(self, place: str, message: Tensor) -> Heatmap:
        """Relevance at the places of the input."""
        variable = self.R.graph.variable(place)
        shaped = variable.canonical(message.unsqueeze(0))[0, 0]
        if self.opened.kind == "picture":
            colours = variable.channel_axis_of(shaped.shape)
            values = shaped.sum(colours) if shaped.dim() == 3 else shaped
        else:
            along = variable.axis_of(shaped.shape, self.opened.axis)
            values = shaped.movedim(along, 0).flatten(1).sum(1) if shaped.dim() > 1 else shaped
        values = values.double() / self.known if self.given and self.known else values.double()
        if self.given and not self.known:
            values = torch.zeros_like(values)
        small = values.float().contiguous().cpu().numpy().astype("<f4")
        index = f"i_{{{place}}}"
        plain = self.opened.place is None
        query = self.python(
            *([] if plain else [repr(place)]), query="R.heatmap" if plain else "R.marginal"
        )
        return Heatmap(
            place,
            list(small.shape),
            base64.b64encode(small.tobytes()).decode(),
            float(values.sum()),
            self.notation(index),
            query,
            self.python(_of(place, self.opened.axis)),
        )

    def _column(self, column: Column, message: Tensor) -> Shown:
        values = self._by_part(column, message)
        largest = values.abs().topk(min(self.request.top, len(values))).indices.tolist()
        chosen = [k for k in self._selected_in(column) if k not in largest and k < len(values)]
        shown = [*largest, *chosen[: self.request.top]]
        nodes = [Node(k, self.divided(float(values[k]))) for k in shown]
        total = self.divided(math.fsum(values.tolist()))
        rest = total - math.fsum(node.value for node in nodes)
        each = self.python(_of(column.layer, column.axis))
        whole = column.axis is None
        return Shown(
            column.layer,
            column.axis,
            column.size,
            total,
            nodes,
            len(values) - len(nodes),
            rest if len(values) > len(nodes) else 0.0,
            self.notation(f"S_{{{column.layer}}}"),
            self.python(repr(column.layer), query="R.channels") if whole else each,
            each,
        )

    def _by_part(self, column: Column, message: Tensor) -> Tensor:
        """The relevance of each part of a column, in double precision: `[parts]`."""
        by: Division = "channel" if column.axis is None else column.axis
        parts = partition(column.layer, by, self.forward)
        return parts.add_up(message.double().unsqueeze(0))[0, 0].cpu()

    def _selected_in(self, column: Column) -> list[int]:
        """The channels of a column that the selection names."""
        return sorted(set(_named(self.request.selection, column)))

    # -- flows -----------------------------------------------------------------------------------

    def flows(self, lower: Shown, upper: Shown) -> Flows:
        """The joint relevance of the parts shown of two columns."""
        R, begin = self.R, time.perf_counter()
        one, two = self._known(lower), self._known(upper)
        channels = one.axis is None and two.axis is None
        a, b = [node.index for node in lower.nodes], [node.index for node in upper.nodes]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said of the columns already
            above = self._above(upper.layer)
            if above and channels and R.joint_method(lower.layer, upper.layer) == "contraction":
                how, passes = "one contraction of all pairs", 1 + self.messages
                more = () if self.selected is None else (self.condition,)
                table = R.joint(lower.layer, upper.layer, *more)[0][a][:, b]
            else:
                b = [node.index for node in upper.nodes if node.value != 0]
                table, passes = self._from_above(one, a, two, b)
                how = f"a message from each of {len(b)} parts of {upper.layer}"
        links = [
            (i, j, self.divided(float(table[row, column])))
            for row, i in enumerate(a)
            for column, j in enumerate(b)
        ]
        links = [link for link in links if link[2] != 0.0]
        links.sort(key=lambda link: -abs(link[2]))
        first, second = (_of(c.layer, c.axis) for c in (one, two))
        return Flows(
            lower.layer,
            upper.layer,
            links[:LINKS],
            how,
            self.notation(f"S_{{{lower.layer}}}", f"S_{{{upper.layer}}}"),
            self.python(f"{first}, {second}"),
            _cost(begin, passes),
        )

    def _above(self, layer: str) -> bool:
        """Whether a walk at a layer has nothing more to meet of the selection."""
        if self.selected is None:
            return True
        apart = self.selected.apart_at(self.R.graph.variable(layer), self.R.graph)
        return apart is not None and not apart[1]

    def _from_above(
        self, lower: Column, a: Sequence[int], upper: Column, b: Sequence[int]
    ) -> tuple[Tensor, int]:
        """`[a, b]`: parts of a layer jointly with parts of one above; and the messages it took.

        Every walk crosses the lower layer once. Where what is selected is decided either before or
        after, a message from each part of the upper layer is weighed at the lower one by how walks
        go on from there: one forward message for all.
        """
        R = self.R
        if not b:
            return torch.zeros(len(a), 0), 0
        parts = [part_of(upper.layer, k, upper.axis).formula for k in b]
        apart = None
        if self.selected is not None:
            apart = self.selected.apart_at(R.graph.variable(lower.layer), R.graph)
        weight: Tensor | None = None
        if self.selected is None or apart is None:
            each: list[list[Sets]] = [[part, self.condition] for part in parts]
            passes = len(b) * (1 if self.selected is None else 2 * self.messages)
        else:
            so_far, onward = apart
            each = [[part, *so_far] for part in parts]
            passes = len(b)
            if onward:
                weight = R.conditionals(*onward, layers=[lower.layer])[lower.layer]
                passes += self.messages
        found = R.heatmaps(each, at=lower.layer, progress=lambda done: self.check())
        rows = found if weight is None else found * weight
        return torch.stack([self._by_part(lower, row)[list(a)] for row in rows], 1), passes

    def search(self, tell: Callable[[float], None]) -> Found:
        """The most relevant flows through all columns."""
        axes = {column.axis for column in self.layers}
        if len(self.layers) < 2 or len(axes) > 1:
            raise QueryError("flows go through two columns or more that are divided alike.")
        (axis,) = axes
        names = [column.layer for column in self.layers]
        by: Division = "channel" if axis is None else axis
        begin = time.perf_counter()
        more = () if self.selected is None else (self.condition,)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self.R.top(
                *names, *more, k=FLOWS, by=by, order="absolute", seconds=SECONDS, progress=tell
            )
            if self.given:
                self.known = float(self.R(self.condition)[0])
        options = f"k={FLOWS}, by={by!r}, order='absolute', seconds={SECONDS:g}"
        sets = [] if self.selected is None else [f"nrm.Condition({self.selected.python})"]
        given = self.given and self.selected is not None
        if given and self.selected is not None:
            sets, options = [], f"given={self.selected.python}, {options}"
        return Found(
            names,
            [
                ([flow.parts[name] for name in names], self.divided(flow.relevance))
                for flow in found
            ],
            found.gap if math.isfinite(found.gap) else None,
            self.notation(*(f"S_{{{name}}}" for name in names)),
            f"R.top({', '.join([*map(repr, names), *sets, options])})",
            _cost(begin, found.expanded),
        )

    def _known(self, shown: Shown) -> Column:
        return next(column for column in self.layers if column.layer == shown.layer)


def _of(layer: str, axis: int | None) -> str:
    """How one part of a column is written; the page puts the number in."""
    along = "" if axis is None else f", axis={axis}"
    return f"nrm.channels({layer!r}, #{along})"


def _named(given: Any, column: Column) -> Iterator[int]:
    if not isinstance(given, dict):
        return
    if given.get("layer") == column.layer and given.get("axis") == column.axis:
        yield from given.get("channels", [])
    if "not" in given:
        yield from _named(given["not"], column)
    for part in given.get("parts", []):
        yield from _named(part, column)


def _cost(begin: float, passes: int) -> Cost:
    return Cost(1000 * (time.perf_counter() - begin), passes)
