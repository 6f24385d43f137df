"""What is selected in the explorer: JSON as a formula, in the paper's notation, and as Python.

    {"op": "and", "parts": [{"layer": "relu2", "channels": [3]},
                            {"layer": "relu3", "channels": [0], "by": "clusters", "of": 6},
                            {"not": {"patch": [0, 5, 4, 10]}}]}

A part is some channels of a layer, some places along another of its axes (`"axis"`), some heads,
clusters or time steps (`"by"`, see `divided`), a patch of the input, the negation of a part, or
several joined by `and` or `or`. Nothing of it is ever run as code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import Any

from nrm.errors import QueryError
from nrm.explore.divided import By, divide, is_index, shortly
from nrm.formulas import Formula, Not, conjunction, united
from nrm.graph import Graph, Variable
from nrm.measure import Measure
from nrm.sets import channels, patch, variables_of

DEEPEST, MOST_PARTS, MOST_CHANNELS = 8, 24, 4096
"""How far parts may be nested, and how many there may be; and channels in one of them."""

_AND, _OR, _NOT = "∧", "∨", "¬"


@dataclass(frozen=True)
class Selected:
    """A formula, three times.

    Attributes:
        formula: as queries take it.
        notation: in the paper's symbols; `_{...}` stands below the line.
        python: the line that makes it.
        joined: whether it is made of parts, so that brackets are needed around it.
    """

    formula: Formula
    notation: str
    python: str
    joined: bool = False

    def enclosed(self) -> Selected:
        """In brackets, where they are needed."""
        if not self.joined:
            return self
        return Selected(self.formula, f"({self.notation})", f"({self.python})")

    def apart_at(
        self, variable: Variable, graph: Graph
    ) -> tuple[list[Formula], list[Formula]] | None:
        """What is decided of a walk once it is at a layer, and what is decided further up.

        The formula is their conjunction. `None` where a part of it is decided by both.
        """
        upstream = graph.upstream(variable)
        so_far: list[Formula] = []
        onward: list[Formula] = []
        for part in conjunction([self.formula]):
            lie = {v in upstream for event in part.events for v in variables_of(event, graph)}
            if len(lie) > 1:
                return None
            (onward if True in lie else so_far).append(part)
        return so_far, onward


def parse(given: Any, R: Measure) -> Selected | None:
    """What a request selects; `None` where it is nothing.

    Arguments:
        given: JSON as above; its layers are those of the graph.
        R: of the input, of any target; it finds clusters.

    Raises:
        QueryError, UnknownLayerError, NeuronSetError: it is none of that.
    """
    if given is None:
        return None
    if _count(given, 0) > MOST_PARTS:
        raise QueryError(f"a selection has at most {MOST_PARTS} parts.")
    return _parsed(given, R)


def _count(given: Any, depth: int) -> int:
    if depth > DEEPEST:
        raise QueryError(f"a selection is nested at most {DEEPEST} deep.")
    if not isinstance(given, dict):
        raise QueryError(f"a part of a selection is an object, not {shortly(given)}.")
    if "not" in given:
        return _count(given["not"], depth + 1)
    if "op" not in given:
        return 1
    parts = given.get("parts")
    if not isinstance(parts, list) or not parts:
        raise QueryError("give the parts of a selection as a list with at least one in it.")
    return sum(_count(part, depth + 1) for part in parts)


def _parsed(given: dict[str, Any], R: Measure) -> Selected:
    if "not" in given:
        inner = _parsed(given["not"], R).enclosed()
        return Selected(Not(inner.formula), f"{_NOT}{inner.notation}", f"~{inner.python}")
    if "op" in given:
        return _joined(given, R)
    layer = given.get("layer", R.graph.inputs[0].name)
    if not isinstance(layer, str):
        raise QueryError(f"a layer is named by a text, not {shortly(layer)}.")
    by = By.read(given)
    if by.how != "steps":
        R.graph.variable(layer)
    if "channels" in given:
        return _of_parts(R, layer, _whole(given["channels"], "channels"), by)
    if "patch" in given:
        return _of_patch(layer, _whole(given["patch"], "the ends of a patch"))
    raise QueryError("a part of a selection names channels, a patch, 'not', or 'op' with 'parts'.")


def _joined(given: dict[str, Any], R: Measure) -> Selected:
    if given["op"] not in ("and", "or"):
        raise QueryError(f"parts are joined by 'and' or 'or', not {shortly(given['op'])}.")
    if len(given["parts"]) == 1:
        return _parsed(given["parts"][0], R)
    parts = [_parsed(part, R).enclosed() for part in given["parts"]]
    both = given["op"] == "and"
    return Selected(
        reduce(and_ if both else or_, (part.formula for part in parts)),
        f" {_AND if both else _OR} ".join(part.notation for part in parts),
        f" {'&' if both else '|'} ".join(part.python for part in parts),
        joined=True,
    )


def _of_parts(R: Measure, layer: str, chosen: Sequence[int], by: By) -> Selected:
    notation = f"S_{{{layer}:{by.word}{', '.join(map(str, chosen))}}}"
    if by.how in ("channels", "places"):
        along = "" if by.axis is None else f", axis={by.axis}"
        line = f"nrm.channels({layer!r}, {', '.join(map(str, chosen))}{along})"
        return Selected(channels(layer, *chosen, axis=by.axis), notation, line)
    divided = divide(R, layer, by)
    parts = [divided.part(number) for number in dict.fromkeys(chosen)]
    line = " | ".join(part.python for part in parts)
    line = f"({line})" if len(parts) > 1 else line
    return Selected(united([part.chosen for part in parts]), notation, line)


def _of_patch(layer: str, ends: Sequence[int]) -> Selected:
    if len(ends) % 2 or not ends:
        raise QueryError("a patch has a beginning and an end for each axis: [y0, y1, x0, x1].")
    pairs = [(ends[k], ends[k + 1]) for k in range(0, len(ends), 2)]
    if any(begin < 0 or end <= begin for begin, end in pairs):
        raise QueryError(f"a patch begins at 0 or later, and ends after it: {list(ends)}.")
    return Selected(
        patch(layer, *(slice(begin, end) for begin, end in pairs)),
        f"S_{{{layer}:[{', '.join(f'{begin}–{end - 1}' for begin, end in pairs)}]}}",
        f"nrm.patch({layer!r}, {', '.join(f'slice({begin}, {end})' for begin, end in pairs)})",
    )


def _whole(given: Any, what: str) -> list[int]:
    if not isinstance(given, list) or not given or not all(map(is_index, given)):
        raise QueryError(f"{what} are given as a list of whole numbers, not {shortly(given)}.")
    if len(given) > MOST_CHANNELS:
        raise QueryError(f"{what}: at most {MOST_CHANNELS} numbers.")
    return given
