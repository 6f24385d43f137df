"""Sequences of any length from one export.

A language model is exported with the number of tokens free, and that graph is kept as it is. For
every length it is copied with that number in it (`at_length`), and rewritten and proved there like
a graph exported for that length alone: nothing behind it knows of other lengths.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.utils import _pytree as pytree

from nrm.capture.call import ModelCall
from nrm.capture.nodes import Captured, is_symbolic

AXIS = 1
"""Where the tokens of a sample lie, behind the batch."""

_SIZES = (torch.SymInt, torch.SymBool, torch.SymFloat)

_LENGTH = "length"
"""Where the `meta` of a graph's inputs keeps which symbol was the length, and what it is now."""


def family(call: ModelCall, batch_axis: int | None) -> Hashable | None:
    """What calls with sequences of any length have in common; `None` for other calls.

    Sequences are whole numbers `[batch, length]`, as token ids are, with at least two tokens; all
    other inputs (masks, positions, segments) have the same two axes. Pictures and real-valued
    sequences are captured for their own size: free sizes make an export slower.
    """
    tensors = call.tensors
    shapes = {x.shape for x in tensors}
    if batch_axis != 0 or len(shapes) != 1 or len(*shapes) != 2 or tensors[0].shape[AXIS] < 2:
        return None
    if not any(map(_is_whole, tensors)) or any(type(given) is object for given in call.key):
        return None
    return (*call.key, *((x.dtype, x.device) for x in tensors))


def _is_whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)


def is_free(captured: Captured) -> bool:
    """Whether a graph that is not rewritten yet takes sequences of any length."""
    sizes = [node.meta["val"].shape for node in captured.inputs]
    lengths = {size[AXIS].node.expr for size in sizes if is_symbolic(size[AXIS])}
    batches = {size[0].node.expr for size in sizes if is_symbolic(size[0])}
    free = all(is_symbolic(size[0]) and is_symbolic(size[AXIS]) for size in sizes)
    plain = all(symbol.is_Symbol for symbol in lengths | batches)
    return free and plain and len(lengths) == 1 and lengths.isdisjoint(batches)


def known_length(captured: Captured) -> dict[sympy.Basic, sympy.Integer]:
    """The length that a graph is for, by the symbol that it was in the export; none where it is
    for one length alone."""
    return captured.inputs[0].meta.get(_LENGTH, {}) if captured.inputs else {}


def at_length(captured: Captured, inputs: Sequence[Tensor]) -> Captured:
    """A copy of a graph that takes any length, for the length of some inputs.

    Raises:
        NotImplementedError: something in it has no plain memory.
    """
    symbol = captured.inputs[0].meta["val"].shape[AXIS].node.expr
    length = {symbol: sympy.Integer(inputs[0].shape[AXIS])}
    batches = [node.meta["val"].shape[0].node for node in captured.inputs]
    putting = _Putting(length, {batch.expr: sympy.Integer(batch.hint) for batch in batches})
    graph = FxGraph()
    copies: dict[Node, Any] = {}
    for node in captured.graph.nodes:
        said = node.meta.get("val")
        value = pytree.tree_map(putting.into, said)
        if isinstance(said, _SIZES) and not isinstance(value, _SIZES):
            copies[node] = value  # a size, or what is computed from sizes alone
            continue
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        if "val" in node.meta:
            copy.meta["val"] = value
    places = [copies[node] for node in captured.inputs]
    for node in places:
        node.meta[_LENGTH] = length
    return Captured(
        graph,
        places,
        captured.names,
        {copies[node]: value for node, value in captured.constants.items()},
        copies[captured.output],
        captured.method,
        captured.batched,
        captured.batch_axis,
    )


class _Putting:
    """Puts numbers in the place of symbols, in what nodes are said to hold.

    Arguments:
        numbers: by symbol.
        batches: how many samples the export had, by the symbol that stays.
    """

    def __init__(
        self,
        numbers: dict[sympy.Basic, sympy.Integer],
        batches: dict[sympy.Basic, sympy.Integer],
    ) -> None:
        self.numbers, self.batches = numbers, batches
        self._known: dict[Hashable, Any] = {}

    def into(self, value: Any) -> Any:
        """A tensor without values, or a size, with the numbers in it."""
        if isinstance(value, _SIZES):
            return self._size(value)
        if not isinstance(value, Tensor):
            return value
        if not any(map(self._changes, (*value.shape, *value.stride()))):
            return value
        if not isinstance(value, FakeTensor) or value.is_conj() or value.is_neg():
            raise NotImplementedError
        shape, strides = (tuple(map(self._size, of)) for of in (value.shape, value.stride()))
        key = (value.dtype, value.device, len(shape), *map(_name, (*shape, *strides)))
        if key not in self._known:
            with value.fake_mode:
                self._known[key] = torch.empty_strided(
                    shape, strides, dtype=value.dtype, device=value.device
                )
        return self._known[key]

    def _changes(self, size: int | torch.SymInt) -> bool:
        return isinstance(size, torch.SymInt) and not size.node.expr.free_symbols.isdisjoint(
            self.numbers
        )

    def _size(self, size: Any) -> Any:
        if not isinstance(size, _SIZES):
            return size
        expression = size.node.expr
        if expression.free_symbols.isdisjoint(self.numbers):
            return size
        if expression not in self._known:
            self._known[expression] = self._made(size, expression.xreplace(self.numbers))
        return self._known[expression]

    def _made(self, size: Any, expression: sympy.Basic) -> Any:
        if expression in (sympy.true, sympy.false):
            return expression == sympy.true
        if expression.is_number:
            return float(expression) if isinstance(size, torch.SymFloat) else int(expression)
        if not isinstance(size, torch.SymInt):
            raise NotImplementedError
        hint = expression.xreplace(self.batches)
        if not hint.is_number:
            raise NotImplementedError
        return size.node.shape_env.create_symintnode(expression, hint=int(hint))


def _name(size: int | torch.SymInt) -> Hashable:
    return size.node.expr if isinstance(size, torch.SymInt) else size
