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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nrm.condition import Condition, Sets
from nrm.errors import QueryError
from nrm.explore.answers import (
    Columns,
    Cost,
    Done,
    Flows,
    Found,
    Heatmap,
    Node,
    Number,
    Part,
    Request,
    Shown,
)
from nrm.explore.columns import divided_columns
from nrm.explore.divided import By, Divided
from nrm.explore.explained import Aim, target_of
from nrm.explore.opened import Opened
from nrm.explore.selection import Selected, parse
from nrm.joint import Division, Parts
from nrm.measure import Measure
from nrm.sets import variables_of

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
    aim = target_of(request.target, request.against, R, opened)
    cautions = R.forward_pass.cautions  # what is to be known of numbers is said of each answer
    with cautions.anew() as heard:
        asked = _Asked(R.of(aim.target), request, opened, aim, check)
    yield aim.explained(asked.R, opened)
    with cautions.anew(heard) as more:
        found = asked.columns()
    heard |= more
    yield replace(found, cautions=list(heard.values()))
    costs = [found.cost]
    for lower, upper in zip(found.columns, found.columns[1:], strict=False):
        check()
        with cautions.anew(heard) as more:
            flows = asked.flows(lower, upper)
        heard |= more
        costs.append(flows.cost)
        yield replace(flows, cautions=list(more.values()))
    yield Done(Cost(sum(c.milliseconds for c in costs), sum(c.passes for c in costs)))


def search(R: Measure, request: Request, opened: Opened, tell: Callable[[float], None]) -> Found:
    """The most relevant flows through all columns, found by the exact search or until time is up.

    Arguments:
        tell: is called after every message with the gap that is left; it may raise.

    Raises:
        NrmError: something is asked for that is not there.
    """
    aim = target_of(request.target, request.against, R, opened)
    with R.forward_pass.cautions.anew() as heard:
        found = _Asked(R.of(aim.target), request, opened, aim, lambda: None).search(tell)
    return replace(found, cautions=list(heard.values()))


class _Asked:
    """A request to a measure, with what both its columns and its flows need."""

    def __init__(
        self, R: Measure, request: Request, opened: Opened, aim: Aim, check: Check
    ) -> None:
        self.R, self.request, self.opened, self.check = R, request, opened, check
        self.symbol = aim.notation
        self.forward = R.forward_pass  # once: each look at it looks at the whole model
        self.selected: Selected | None = parse(request.selection, R)
        self.divided: list[Divided] = divided_columns(R, opened, request.columns, self.forward)
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

    def divided_by(self, joint: float) -> float:
        """A joint relevance as it is shown: divided by what is given, 0 where that is 0."""
        if not self.given:
            return joint
        return joint / self.known if self.known else 0.0

    # -- what is shown ---------------------------------------------------------------------------

    def columns(self) -> Columns:
        """All columns and the heatmap at the input."""
        R, opened = self.R, self.opened
        place = opened.place or R.graph.inputs[0].name
        begin = time.perf_counter()
        end = R.graph.output.name
        layers = [place, *(layer for one in self.divided for layer in one.layers), end]
        found = R.marginals(self.condition, layers=layers)
        if self.selected is not None:  # all walks begin at the output
            self.known = math.fsum(found[end].double().reshape(-1).tolist())
        heat = self._heatmap(place, found[place])
        shown = [self._column(one, found) for one in self.divided]
        passes = 1 if self.selected is None else 2 * self.messages
        total = Number(self.known, self._total(), self._line())
        return Columns(total, shown, heat, _cost(begin, passes))

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
            self.python(_place(place, self.opened.axis)),
        )

    def _column(self, column: Divided, messages: Mapping[str, Tensor]) -> Shown:
        values = column.add_up(messages, self.forward)
        largest = values.abs().topk(min(self.request.top, len(values))).indices.tolist()
        named = {column.numbers.index(k) for k in self._selected_in(column) if k in column.numbers}
        chosen = sorted(named - set(largest))[: self.request.top]
        nodes = []
        for place in (*largest, *chosen):
            number, value = column.numbers[place], self.divided_by(float(values[place]))
            nodes.append(Node(number, value, column.part(number).python))
        if column.by.how in ("places", "steps") and self.opened.kind in ("words", "series"):
            nodes.sort(key=lambda node: node.index)  # as one reads them
        total = self.divided_by(math.fsum(values.tolist())) if column.is_one_layer else None
        others = len(values) - len(nodes)
        rest = 0.0
        if others and total is not None:
            rest = total - math.fsum(node.value for node in nodes)
        by, each = column.by, self.python("#")
        whole = by.how == "channels"
        return Shown(
            column.layer, by.axis, by.how, by.of, by.word, len(values), total, nodes, others, rest,
            self.notation(f"S_{{{column.layer}}}"),
            self.python(repr(column.layer), query="R.channels") if whole else each,
            each, *_where(column),
        )  # fmt: skip

    def _selected_in(self, column: Divided) -> list[int]:
        """The parts of a column that the selection names."""
        return sorted(set(_named(self.request.selection, column)))

    # -- flows -----------------------------------------------------------------------------------

    def flows(self, lower: Shown, upper: Shown) -> Flows:
        """The joint relevance of the parts shown of two columns."""
        R, begin = self.R, time.perf_counter()
        one, two = self._known(lower), self._known(upper)
        channels = one.by == two.by == By()
        a, b = [node.index for node in lower.nodes], [node.index for node in upper.nodes]
        alone = channels and self._above(upper.layer)
        if alone and R.joint_method(lower.layer, upper.layer) == "contraction":
            how, passes = "one contraction of all pairs", 1 + self.messages
            more = () if self.selected is None else (self.condition,)
            table = R.joint(lower.layer, upper.layer, *more)[0][a][:, b]
        else:
            b = [node.index for node in upper.nodes if node.value != 0]
            table, passes = self._from_above(one, a, two, b)
            how = f"a message from each of {len(b)} parts of {upper.layer}"
        largest = table.flatten().abs().topk(min(LINKS, table.numel())).indices
        rows, places = (found.tolist() for found in torch.unravel_index(largest, table.shape))
        links = [
            (a[row], b[place], value)
            for row, place in zip(rows, places, strict=True)
            if (value := self.divided_by(float(table[row, place]))) != 0.0
        ]
        return Flows(
            lower.layer,
            upper.layer,
            links,
            how,
            self.notation(f"S_{{{lower.layer}}}", f"S_{{{upper.layer}}}"),
            self.python("#, #"),
            _cost(begin, passes),
        )

    def _above(self, layer: str) -> bool:
        """Whether a walk at a layer has nothing more to meet of the selection."""
        if self.selected is None:
            return True
        apart = self.selected.apart_at(self.R.graph.variable(layer), self.R.graph)
        return apart is not None and not apart[1]

    def _from_above(
        self, lower: Divided, a: Sequence[int], upper: Divided, b: Sequence[int]
    ) -> tuple[Tensor, int]:
        """`[a, b]`: parts of a column jointly with parts of one above; and the messages it took.

        A walk visits a layer once at most. Where what is selected is decided either before or
        after, a message from each part of the upper layer is weighed at the lower one by how walks
        go on from there: one forward message for all. A column of several layers, as hidden states
        are, is asked for all of them with each part of the other.
        """
        R = self.R
        if not b:
            return torch.zeros(len(a), 0), 0
        rows = [lower.numbers.index(k) for k in a]
        parts = [upper.part(k).chosen for k in b]
        if not lower.is_one_layer:
            columns = []
            for part in parts:
                self.check()
                there = R.marginals(part, self.condition, layers=lower.layers)
                columns.append(lower.add_up(there, self.forward)[rows])
            return torch.stack(columns, 1), len(b) * 2 * self.messages
        variable = R.graph.variable(lower.layer)
        further = R.graph.upstream(variable)
        above = not any(v in further for part in parts for v in variables_of(part, R.graph))
        apart = None
        if self.selected is not None and above:
            apart = self.selected.apart_at(variable, R.graph)
        weight: Tensor | None = None
        if self.selected is None or apart is None:
            each: list[list[Sets]] = [[part, self.condition] for part in parts]
            once = self.selected is None and above
            passes = len(b) * (1 if once else 2 * self.messages)
        else:
            so_far, onward = apart
            each = [[part, *so_far] for part in parts]
            passes = len(b)
            if onward:
                weight = R.conditionals(*onward, layers=[lower.layer])[lower.layer]
                passes += self.messages
        found = R.heatmaps(each, at=lower.layer, progress=lambda done: self.check())
        if weight is not None:
            found = found * weight
        values = [lower.add_up({lower.layer: row}, self.forward)[rows] for row in found]
        return torch.stack(values, 1), passes

    def search(self, tell: Callable[[float], None]) -> Found:
        """The most relevant flows through all columns."""
        if len(self.divided) < 2 or not all(one.is_one_layer for one in self.divided):
            raise QueryError(
                "flows go through two columns or more, of which a walk visits one part each: not "
                "through the hidden states of all steps."
            )
        names = [one.layer for one in self.divided]
        by, sides = self._sides()
        begin = time.perf_counter()
        more = () if self.selected is None else (self.condition,)
        found = self.R.top(
            *(side for side, _ in sides),
            *more,
            k=FLOWS,
            by=by,
            order="absolute",
            seconds=SECONDS,
            progress=tell,
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
                ([flow.parts[name] for name in names], self.divided_by(flow.relevance))
                for flow in found
            ],
            found.gap if math.isfinite(found.gap) else None,
            self.notation(*(f"S_{{{name}}}" for name in names)),
            f"R.top({', '.join([*(line for _, line in sides), *sets, options])})",
            _cost(begin, found.expanded),
        )

    def _sides(self) -> tuple[Division, list[tuple[Parts, str]]]:
        """What the columns are divided by where they are layers by name; and each, with Python.

        By name they are where all are divided alike, and channels always; else their parts are
        given one by one.
        """
        alike = {(one.by.how, one.by.axis) for one in self.divided}
        by: Division = "channel"
        if len(alike) == 1 and self.divided[0].by.axis is not None:
            by = self.divided[0].by.axis
        found: list[tuple[Parts, str]] = []
        for one in self.divided:
            named = one.by.how == "channels" or (by != "channel" and one.by.how == "places")
            line = repr(one.layer) if named else one.python()
            found.append((one.layer if named else one.sets(), line))
        return by, found

    def _known(self, shown: Shown) -> Divided:
        return next(one for one in self.divided if one.layer == shown.layer)


def _place(layer: str, axis: int | None) -> str:
    """How one place of the input is written; the page puts the number in."""
    along = "" if axis is None else f", axis={axis}"
    return f"nrm.channels({layer!r}, #{along})"


def _named(given: Any, column: Divided) -> Iterator[int]:
    if not isinstance(given, dict):
        return
    if "channels" in given and given.get("layer") == column.layer and By.read(given) == column.by:
        yield from given["channels"]
    if "not" in given:
        yield from _named(given["not"], column)
    for part in given.get("parts", []):
        yield from _named(part, column)


def _where(column: Divided) -> tuple[str | None, list[int]]:
    """Of clusters, which is at which position."""
    if column.labels is None:
        return None, []
    numbers = column.labels.to(torch.uint8).contiguous().numpy()
    return base64.b64encode(numbers.tobytes()).decode(), list(numbers.shape)


def _cost(begin: float, passes: int) -> Cost:
    return Cost(1000 * (time.perf_counter() - begin), passes)
