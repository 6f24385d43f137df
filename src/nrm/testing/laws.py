"""The laws that every propagation keeps, whatever its values; and whether traits are true."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.operators import Call, Operator, PassThrough
from nrm.testing.dense import STEP, at_the_same_place, differences, frozen_slopes
from nrm.testing.prepared import CLOSE, Case, place_of


def check_laws(case: Case) -> None:
    given = [value.clone() for value in (*case.given.values(), *case.values, case.output)]
    _check_columns(case)
    _check_linear(case)
    _check_transpose(case)
    _check_memory(case)
    _check_bounds(case)
    _check_channels(case)
    now = (*case.given.values(), *case.values, case.output)
    for before, after in zip(given, now, strict=True):
        if not torch.equal(before.nan_to_num(), after.nan_to_num()):
            case.fail(
                "memory",
                "a tensor that the operator was given, or its output, was written to",
                "Look for in-place operations in prepare, pull and push.",
            )


def _check_columns(case: Case) -> None:
    total = torch.stack([part.sum(0) for part in case.dense]).sum(0)
    off = (total - 1).abs().nan_to_num(torch.inf)
    if float(off.max()) > CLOSE:
        j = int(off.argmax())
        case.fail(
            "one",
            f"the parents of the output's {place_of(j, case.output.shape)} take "
            f"{float(total[j]):.9g} of its relevance, and are to take 1",
            "Look at what pull divides by, and at neurons without parents (orphans).",
        )


def _check_linear(case: Case) -> None:
    shape, look = case.output.shape, "Look for anything in pull that depends on the message."
    draw = torch.Generator().manual_seed(1)
    messages = torch.randn((3, *shape), generator=draw, dtype=torch.float64)
    messages[2] = 2 * messages[0] - 3 * messages[1]
    together = case.propagation.send_on(messages.clone(), case.wanted)
    for k in range(3):
        alone = case.propagation.send_on(messages[k : k + 1].clone(), case.wanted)
        for name, matrix, one, many in zip(case.operands, case.dense, alone, together, strict=True):
            expected = matrix @ messages[k].flatten()
            for which, found in (("alone", one), ("with others", many)):
                part = None if found is None else found[0 if found is one else k].flatten()
                if part is None or not torch.allclose(part, expected, CLOSE, CLOSE):
                    case.fail(
                        "linear",
                        f"a message sent {which} is not, in {name}, the sum of what its neurons "
                        "pass on one by one",
                        look,
                    )


def _check_transpose(case: Case) -> None:
    draw = torch.Generator().manual_seed(2)
    masses = [
        torch.randn((2, *shape), generator=draw, dtype=torch.float64) for shape in case.shapes
    ]
    kept = [mass.clone() for mass in masses]
    pushed = case.propagation.send_up(masses, case.output.shape)
    if not all(map(torch.equal, masses, kept)):
        case.fail("memory", "push writes to the masses it is given", "Look at push.")
    expected = torch.stack(
        [mass.reshape(2, -1) @ part for mass, part in zip(masses, case.dense, strict=True)]
    ).sum(0)
    off = (pushed.reshape(2, -1) - expected).abs().nan_to_num(torch.inf)
    if float(off.max()) > CLOSE * max(1.0, float(expected.abs().max())):
        j = int(off.argmax()) % off.shape[1]
        case.fail(
            "transpose",
            f"push finds at the output's {place_of(j, case.output.shape)} something else than "
            f"sum_i R(i|j) F(i), off by {float(off.max()):.3g}",
            "Look at push, or leave it out: it is then found from pull.",
        )


def _check_memory(case: Case) -> None:
    """Results are overwritten, one after the other; nothing else may change."""
    message = torch.ones((1, *case.output.shape), dtype=torch.float64)
    found = case.propagation.send_on(message.clone(), case.wanted)
    results = [part for part in found if part is not None]
    first = [result.clone() for result in results]
    for place, result in enumerate(results):
        others = [other.clone() for other in results[place + 1 :]]
        result.detach().fill_(torch.nan)
        if not all(map(torch.equal, others, results[place + 1 :])):
            case.fail(
                "memory",
                "two results of pull share memory, so that who overwrites one changes the other",
                "Return new tensors, or leave `exclusive` False.",
            )
    found = case.propagation.send_on(message, case.wanted)
    again = [part for part in found if part is not None]
    if not all(map(torch.equal, first, again)):
        case.fail(
            "memory",
            "after results of pull were overwritten, the same message passes otherwise: they "
            "share memory with what is kept",
            "Return new tensors, or leave `exclusive` False.",
        )


def _check_bounds(case: Case) -> None:
    smallest = min(float(part.min()) for part in case.dense if part.numel())
    if case.propagation.nonnegative and smallest < -CLOSE:
        case.fail(
            "bounds",
            f"the propagation is said to be nonnegative, but some R(i|j) is {smallest:.6g}",
            "Look at `nonnegative` of the propagation or the rule.",
        )
    bound = case.propagation.absolute()
    if bound is None:
        return
    for name, sizes, part in zip(case.operands, case.lay_out(bound), case.dense, strict=True):
        short = part.abs() - sizes
        if part.numel() and float(short.max()) > CLOSE:
            i, j = divmod(int(short.argmax()), short.shape[1])
            case.fail(
                "bounds",
                f"|R(i|j)| at {name}'s neuron {i} and the output's {j} is "
                f"{float(part[i, j].abs()):.6g}, more than the {float(sizes[i, j]):.6g} that "
                "absolute() says",
                "Look at absolute, or `keeps_sign` of the contributions.",
            )


def _check_channels(case: Case) -> None:
    draw = torch.Generator().manual_seed(4)
    message = torch.randn((1, *case.output.shape), generator=draw, dtype=torch.float64)
    for operand, value in enumerate(case.values):
        found = case.propagation.by_channels(message.clone(), operand, 1)
        if found is None:
            continue
        (joined,) = list(found)
        call = case.node_call
        axis = -1 if case.row.acts_on_last_axis(call) else case.row.channel_axis(call, None)
        if axis is None:
            case.fail("channels", "there is no channel axis", "Look at channel_axis.")
        of_output, of_parent = (
            torch.arange(shape[axis]).view(-1, *[1] * (-axis - 1)).expand(shape).flatten()
            for shape in (case.output.shape, value.shape)
        )
        passed = case.dense[operand] * message.flatten()
        expected = torch.zeros(case.output.shape[axis], value.shape[axis], dtype=torch.float64)
        expected.index_put_(
            (of_output[None, :].expand_as(passed), of_parent[:, None].expand_as(passed)),
            passed,
            accumulate=True,
        )
        if joined.shape != expected.shape or not torch.allclose(joined, expected, CLOSE, CLOSE):
            case.fail(
                "channels",
                f"by_channels finds for {case.operands[operand]} something else between channels "
                "than its R(i|j) add up to",
                "Look at `by_channels` of the contribution.",
            )


# -- what a row says of itself: is it so? ----------------------------------------------------------


def check_traits(case: Case) -> None:
    row, look = case.row, "Look at this trait of the row."
    if row.one_parent or row.moves:
        largest = torch.cat(case.dense).amax(0)
        if float((largest - 1).abs().max()) > CLOSE:
            case.fail("traits", "some neuron has several parents, where one_parent or moves says "
                      "one", look)  # fmt: skip
    if row.elementwise:
        for operand in range(len(case.values)):
            moved = differences(case.run, case.values, operand, STEP).abs() > 1e-9
            here = torch.stack(at_the_same_place(case)[: len(case.values)]).sum(0) > 0
            if bool((moved & ~here).any()):
                case.fail("traits", "a neuron changes with one that stands elsewhere, where "
                          "elementwise says it does not", look)  # fmt: skip
    _check_axes(case)
    if row.one_parent and row.elementwise:
        _check_function(case)
    _check_in_place(case)
    _check_zeros(case)


def _check_axes(case: Case) -> None:
    """Along all axes but the mixed ones, a neuron and its parents have the same place."""
    for operand, value in enumerate(case.values):
        axes = case.row.mixed_axes(case.node_call, value.dim())
        if axes is None:
            continue
        kept = [axis for axis in range(value.dim()) if axis not in axes]
        shape = case.output.shape
        theirs = range(len(shape) - len(kept), len(shape)) if len(shape) != value.dim() else kept
        parents, neurons = case.dense[operand].abs().gt(1e-12).nonzero(as_tuple=True)
        for axis, other in zip(kept, theirs, strict=True):
            at = torch.unravel_index(parents, value.shape)[axis]
            there = torch.unravel_index(neurons, shape)[other]
            if value.shape[axis] > 1 and not torch.equal(at, there):
                case.fail("traits", f"parents lie along axis {axis}, which mixed_axes leaves out",
                          "Look at mixed_axes.")  # fmt: skip


def _check_function(case: Case) -> None:
    """Of a function of one neuron each: its order, its sign, and whether it changes values."""
    function, look = case.row.function_of(case.node_call), "Look at `function` of the row."
    order = case.row.order(case.node_call, case.operands[0])
    (value, *_), result = case.values, case.output
    if isinstance(case.row, PassThrough) and case.row.at_zero != "unknown":
        there = case.run([torch.zeros_like(value)])
        if bool((there != 0).any()):
            case.fail("traits", f"at_zero={case.row.at_zero!r} is said of it, but at zero it is "
                      f"{float(there.flatten()[0]):.6g}", "Look at at_zero.")  # fmt: skip
    if function.same and not torch.equal(result, value.expand(result.shape)):
        case.fail("traits", "function.same is said of it, but it changes values", look)
    if function.positive and bool((result < 0).any()):
        case.fail("traits", "function.positive is said of it, but a result is negative", look)
    if order is not None and value.shape == result.shape and not isinstance(order.by, Node):
        for chosen in (value > 0,) if order.among_positive else (value > 0, value < 0):
            ranked = result[chosen][value[chosen].argsort()]
            ranked = -ranked if order.falls else ranked
            if bool((ranked.diff() < -CLOSE).any()):
                case.fail("traits", "results are not in the order that function.order says", look)


def _check_in_place(case: Case) -> None:
    if not case.row.overwritable or case.row.in_place is None:
        return
    values = [value.clone() for value in case.values]
    output, _ = case.row.prepare(replace(case.call, target=case.row.in_place), values, case.setting)
    if not torch.equal(output, case.output):
        case.fail("traits", "the in-place variant computes something else", "Look at in_place.")


class _Zeros:
    """A graph, and values, of which some of one operand are explicit zeros (see `nrm.zeros`)."""

    def __init__(self, case: Case, operand: Node, mask: Tensor) -> None:
        self.value: Tensor = torch.empty(0)
        self.graph = self
        self._call, self._operand, self._mask = case.node_call, operand, mask
        self._given = case.given | {operand: case.given[operand] * mask}
        self._varying = {node for _, node in case.slots}

    def depends(self, node: Any) -> bool:
        return node in self._varying

    def trained(self, factor: Any) -> bool:
        return False

    def may_be_zero(self, constant: Any) -> bool:
        return bool((torch.as_tensor(self.plain(constant)) == 0).any())

    def placed(self, call: Call, row: Operator) -> bool:
        return True

    def real(self, argument: Any) -> Tensor:
        if argument is self._operand:
            return self._mask
        return (
            torch.as_tensor(self.plain(argument), dtype=torch.float64).ne(0).double()
            if (not isinstance(argument, Node))
            else torch.ones_like(self.plain(argument), dtype=torch.float64)
        )

    def some(self, argument: Any) -> bool:
        return argument is self._operand

    def plain(self, argument: Any) -> Any:
        return self._given[argument] if isinstance(argument, Node) else argument

    def run(self, /, **changed: Any) -> Tensor:
        found: Tensor = self._call.map(self.plain)(**changed)
        return found


def _check_zeros(case: Case) -> None:
    """Where a row says that a result is an explicit zero, it is zero."""
    for name, node in case.slots:
        mask = torch.ones_like(case.given[node])
        mask.view(-1)[::2] = 0.0
        zeros = _Zeros(case, node, mask)
        if not case.row.may_hold_zeros(case.node_call, [name], zeros):
            continue
        zeros.value = zeros.run()
        real = case.row.real(case.node_call, zeros)
        wrong = (real == 0) & (zeros.value != 0)
        if bool(wrong.any()):
            place = [int(axis) for axis in wrong.nonzero()[0]]
            case.fail(
                "explicit zeros",
                f"with zeros in {name}, the output's {place} is said to be an explicit zero, and "
                f"is {float(zeros.value[tuple(place)]):.6g}",
                "Look at may_hold_zeros and real, or keeps_zeros.",
            )


def check_telescoping(case: Case) -> None:
    """Relevance over value passes by derivatives: `R(i|j) y_j = x_i dy_j/dx_i`."""
    row, setting = case.row, case.setting
    dropped = row.has_bias(case.node_call, case.slots, setting.rule)
    if not row.telescopes(case.node_call, setting.rule):
        return
    output, slopes = frozen_slopes(case)
    if not torch.allclose(output, case.output, atol=1e-9):
        case.fail("telescopes", "frozen returns another output than the operator",
                  "Look at frozen.")  # fmt: skip
    if dropped and setting.late_leaf != "bias":
        return  # what is dropped is missing in the sum
    expected = [part * case.output.flatten() for part in case.dense[: len(case.values)]]
    found = [
        value.flatten()[:, None] * slope for value, slope in zip(case.values, slopes, strict=True)
    ]
    late = case.dense[len(case.values) :]
    case.compare(
        "telescopes",
        [*found, *late],
        [*expected, *late],
        "This is x_i times the derivative of frozen, and R(i|j) y_j; look at frozen, telescopes "
        "and, of a PassThrough, at_zero.",
    )
