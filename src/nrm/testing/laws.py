"""The laws that every propagation keeps, whatever its values."""

from __future__ import annotations

import torch

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
        result.fill_(torch.nan)
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
