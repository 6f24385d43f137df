"""Poison for whatever comes out of rules and rows: what something else sees then shows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

import nrm
from nrm import rules
from nrm.operators import Propagation, WeightedSum

RULES = {
    "zero": rules.Zero(), "gamma": rules.Gamma(0.25), "zplus": rules.ZPlus(),
    "alphabeta": rules.AlphaBeta(2.0, 1.0), "flat": rules.Flat(), "wsquare": rules.WSquare(),
    "plain": rules.PlainGamma(0.5), "box": rules.ZBox(-9.0, 9.0),
    "occlusion": rules.Occlusion(), "gradients": rules.LocalLinear(),
}  # fmt: skip


def tensors_in(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that can be reached from something, closures included."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (str, int, float, type, torch.dtype)):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    inner: list[Any] = []
    if isinstance(thing, dict):
        inner = list(thing.values())
    elif isinstance(thing, (list, tuple, set, frozenset)):
        inner = list(thing)
    elif isinstance(thing, FunctionType):
        inner = [*(thing.__closure__ or ()), *(thing.__defaults__ or ())]
    elif isinstance(thing, CellType):
        inner = [thing.cell_contents]
    elif isinstance(thing, MethodType):
        inner = [thing.__self__]
    elif isinstance(thing, partial):
        inner = [thing.func, *thing.args, *thing.keywords.values()]
    elif type(thing).__module__.startswith(("nrm", "tests", "test_")):
        inner = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    for part in inner:
        yield from tensors_in(part, seen)


class Watched:
    """Tensors as they were."""

    def __init__(self, *things: Any) -> None:
        self.tensors = list(tensors_in(list(things)))
        self.before = [tensor.detach().clone() for tensor in self.tensors]

    def check(self, what: str) -> None:
        for tensor, before in zip(self.tensors, self.before, strict=True):
            assert torch.equal(tensor.detach().nan_to_num(), before.nan_to_num()), what
            assert torch.equal(tensor.isnan(), before.isnan()), what


def poison_pull(propagation: Propagation, message: Tensor, count: int, where: str) -> None:
    wanted = [True] * count
    kept = [
        part.clone() for part in propagation.send_on(message.clone(), wanted) if part is not None
    ]
    watched = Watched(propagation)  # what is computed when it is first asked for is there now
    pulled = propagation.send_on(message.clone(), wanted)
    parts = [part for part in pulled if part is not None]
    watched.check(f"{where}: pull wrote to what it was prepared with")
    for part, before in zip(parts, kept, strict=True):
        torch.testing.assert_close(part, before, msg=f"{where}: a sibling was overwritten")
        part.fill_(torch.nan)
    watched.check(f"{where}: what pull returned is seen by its state")
    again = propagation.send_on(message.clone(), wanted)
    torch.testing.assert_close(again, kept, msg=f"{where}: another answer the second time")
    for alone in range(count if count > 1 else 0):  # what is not wanted changes nothing
        only = propagation.send_on(message.clone(), [place == alone for place in range(count)])
        torch.testing.assert_close(only[alone], kept[alone])


def poison_push(
    propagation: Propagation, masses: list[Tensor], shape: torch.Size, where: str
) -> None:
    first = propagation.send_up(masses, shape).clone()
    watched = Watched(propagation, masses)
    torch.testing.assert_close(propagation.send_up(masses, shape), first, msg=where)
    watched.check(f"{where}: push wrote to what it was given, or prepared with")


def poison(R: nrm.Measure, only_sums: bool = False) -> None:
    """Poison what comes out of every operation of a measure (or every one that a rule decides)."""
    forward = R.forward_pass
    torch.manual_seed(1)
    with torch.no_grad():
        for operation in R.graph.operations:
            if only_sums and not isinstance(operation.operator, WeightedSum):
                continue
            propagation = forward.propagations[operation]
            shape = forward.shape(operation.output)
            for many, laid_out in ((1, False), (1, True), (3, False)):
                message = torch.randn(many, *shape).double()
                if laid_out:  # as channels last lie
                    message = message.transpose(1, -1).contiguous().transpose(1, -1)
                poison_pull(propagation, message, len(operation.operands), operation.address)
            masses = [
                torch.randn(3, *forward.shape(operand)).double() for operand in operation.operands
            ]
            poison_push(propagation, masses, shape, operation.address)
