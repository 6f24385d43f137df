"""Recurrent layers and cells, written out step by step; also of sequences of several lengths.

Hidden and cell states become variables of the graph like any other, with names by time step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.operators import Call

aten = torch.ops.aten


class StepsAlongBatchError(Exception):
    """What was taken for the batch axis is time: it cannot have any size."""


# -- recurrent layers and cells, step by step ----------------------------------------------------

Step = Callable[[Tensor, Any, Tensor, Any], Any]
"""From what the input adds to the gates, the state before, and the recurrent weight and bias, to
the state after."""


def _lstm_step(added: Tensor, state: Any, weight: Tensor, bias: Any) -> Any:
    hidden, cell = state
    i, f, g, o = (torch.nn.functional.linear(hidden, weight, bias) + added).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _take_step(
    step: Step, added: Tensor, state: Any, weight: Tensor, bias: Any, projection: Tensor | None
) -> Any:
    """A step, whose hidden state may be projected (`proj_size`)."""
    hidden, *others = step(added, state, weight, bias)
    if projection is not None:
        hidden = torch.nn.functional.linear(hidden, projection)
    return (hidden, *others)


def _gru_step(added: Tensor, state: Any, weight: Tensor, bias: Any) -> Any:
    (hidden,) = state
    xr, xz, xn = added.chunk(3, -1)
    hr, hz, hn = torch.nn.functional.linear(hidden, weight, bias).chunk(3, -1)
    update = (xz + hz).sigmoid()
    new = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (new * (1 - update) + hidden * update,)


def _rnn_step(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(added: Tensor, state: Any, weight: Tensor, bias: Any) -> Any:
        (hidden,) = state
        return (activation(torch.nn.functional.linear(hidden, weight, bias) + added),)

    return step


def cell(step: Step) -> Callable[..., Any]:
    """One step, as `aten.lstm_cell` and the like take their arguments."""

    def one_step(
        x: Tensor, state: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
    ) -> Any:
        before = state if isinstance(state, list | tuple) else (state,)
        after = step(torch.nn.functional.linear(x, w_ih, b_ih), before, w_hh, b_hh)
        return after if isinstance(state, list | tuple) else after[0]

    return one_step


Write = Callable[..., Any]
"""Writes what a function gives for nodes, `write(function, *arguments)`, and gives its nodes."""


@dataclass(frozen=True)
class _Run:
    """One direction of one layer: its step, with weights, and the states it starts with.

    Attributes:
        initial: `[samples, *state]` for each kind of state.
    """

    step: Step
    initial: tuple[Node, ...]
    weights: tuple[Node, Node]
    biases: tuple[Any, Any]
    projection: Node | None

    def over(
        self, write: Write, x: Node, sizes: Sequence[int] | None, reverse: bool
    ) -> tuple[list[Node], tuple[Node, ...]]:
        """The hidden state after each step, in the order of time, and the last states.

        Arguments:
            x: `[steps, samples, inputs]`, or packed: `[all samples of the first step, ...]`.
            sizes: of packed sequences, how many are there at each step, the longest first.
        """
        (w_ih, w_hh), (b_ih, b_hh) = self.weights, self.biases
        each = write(_added, x, w_ih, b_ih, None if sizes is None else list(sizes))
        state, hidden, ended = self.initial, [], list[tuple[Node, ...]]()
        if sizes is not None and reverse:
            state = tuple(write(_rows, kind, 0, sizes[-1]) for kind in state)
        before = 0 if sizes is None else sizes[-1 if reverse else 0]
        for place in reversed(range(len(each))) if reverse else range(len(each)):
            if sizes is not None:
                here = sizes[place]
                if here < before:  # the shortest end
                    ended.append(tuple(write(_rows, kind, here, before) for kind in state))
                    state = tuple(write(_rows, kind, 0, here) for kind in state)
                elif here > before:  # backwards, they begin
                    state = tuple(
                        write(torch.cat, [kind, write(_rows, start, before, here)])
                        for kind, start in zip(state, self.initial, strict=True)
                    )
                before = here
            state = write(_take_step, self.step, each[place], state, w_hh, b_hh, self.projection)
            hidden.append(state[0])
        if ended:
            ended.append(state)
            state = tuple(write(torch.cat, list(kind[::-1])) for kind in zip(*ended, strict=True))
        return hidden[::-1] if reverse else hidden, state


def _added(x: Tensor, weight: Tensor, bias: Any, sizes: list[int] | None) -> Sequence[Tensor]:
    """What the input adds to the gates at each step."""
    if sizes is None and not isinstance(x.shape[0], int):
        raise StepsAlongBatchError
    added = torch.nn.functional.linear(x, weight, bias)
    return added.unbind(0) if sizes is None else added.split(sizes)  # type: ignore[no-untyped-call]


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    return x[start:end]


def _steps_first(x: Tensor) -> Tensor:
    """Also back again."""
    return x.transpose(0, 1)


def recurrent(step: Step) -> Callable[..., Any]:
    """All steps of all layers and directions, as `aten.lstm.input` and the like take arguments."""

    def network(write: Write, x: Node, *given: Any) -> tuple[Node, ...]:
        *layers, batch_first = given
        x = write(_steps_first, x) if batch_first else x
        x, *ends = _layers(write, step, x, None, *layers)
        return (write(_steps_first, x) if batch_first else x, *ends)

    return network


def packed(step: Step) -> Callable[..., Any]:
    """The same of packed sequences, as `aten.lstm.data` and the like take arguments."""
    return lambda write, data, sizes, *layers: _layers(write, step, data, sizes, *layers)


def _layers(
    write: Write,
    step: Step,
    x: Node,
    sizes: Sequence[int] | None,
    initial: Any,
    weights: list[Node],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Node, ...]:
    """All layers and directions; `sizes` as for `_Run.over`, the rest as torch's operators have."""
    kinds = initial if isinstance(initial, list | tuple) else [initial]
    directions = 2 if bidirectional else 1
    each = len(weights) // (directions * num_layers)
    ends: list[Any] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            run = layer * directions + direction
            w_ih, w_hh, *more = weights[run * each : (run + 1) * each]
            b_ih, b_hh = more[:2] if has_biases else (None, None)
            projection = more[-1] if each == (5 if has_biases else 3) else None
            state = tuple(write(torch.select, kind, 0, run) for kind in kinds)
            direct = _Run(step, state, (w_ih, w_hh), (b_ih, b_hh), projection)
            hidden, state = direct.over(write, x, sizes, reverse=bool(direction))
            # `name_steps` knows the outputs of a layer by what joins them.
            outputs.append(write(torch.stack if sizes is None else torch.concat, hidden))
            ends.append(state)
        x = write(torch.cat, outputs, -1) if bidirectional else outputs[0]
    return (x, *(write(torch.stack, list(kind)) for kind in zip(*ends, strict=True)))


def pack(
    x: Tensor, lengths: Sequence[int], batch_first: bool
) -> tuple[Tensor, None]:  # its sizes are those of the operator
    """`torch.nn.utils.rnn.pack_padded_sequence`, of sequences the longest first."""
    x = x.transpose(0, 1) if batch_first else x
    sizes = [sum(length > step for length in lengths) for step in range(max(lengths))]
    return torch.cat([x[step, :size] for step, size in enumerate(sizes)]), None


def pad(
    sequences: Sequence[Tensor],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> Tensor:
    """`torch.nn.utils.rnn.pad_sequence`."""
    longest = max(len(each) for each in sequences)
    padded = []
    for each in sequences:
        missing = longest - len(each)
        sides = (0, missing) if padding_side == "right" else (missing, 0)
        inner = (0, 0) * (each.dim() - 1)
        padded.append(torch.nn.functional.pad(each, (*inner, *sides), value=padding_value))
    return torch.stack(padded, 0 if batch_first else 1)


def unpack(
    data: Tensor,
    batch_sizes: Sequence[int],
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> tuple[Tensor, None]:
    """`torch.nn.utils.rnn.pad_packed_sequence`."""
    inner = (0, 0) * (data.dim() - 1)
    parts = data.split(list(batch_sizes))  # type: ignore[no-untyped-call]
    steps = [
        torch.nn.functional.pad(each, (*inner, 0, batch_sizes[0] - size), value=padding_value)
        for each, size in zip(parts, batch_sizes, strict=True)
    ]
    x = torch.stack(steps)
    if total_length > len(steps):
        x = torch.nn.functional.pad(
            x, (0, 0, *inner, 0, total_length - len(steps)), value=padding_value
        )
    return x.transpose(0, 1) if batch_first else x, None


STEPS = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _rnn_step(torch.tanh),
    "rnn_relu": _rnn_step(torch.relu),
}


def name_steps(node: Node, new: Sequence[Node]) -> None:
    """Name the hidden (and cell) state of each time step: `h_l0[3]`, `c_l1_reverse[0]`.

    Every layer and direction ends by joining its hidden states, in the order of time. Those of
    packed sequences hold the samples that are as long.
    """
    name = str(node.target).split(".")[1]
    if name.removesuffix("_cell") not in STEPS:
        return
    for inner in new:
        inner.meta["recurrent"] = True  # its constants are states
    if name not in STEPS:
        return
    arguments = Call.of(node)
    layers, directions = arguments["num_layers"], 2 if arguments["bidirectional"] else 1
    joins = aten.concat.default if "batch_sizes" in arguments.arguments else aten.stack.default
    stacks = [n for n in new if n.target is joins]
    for number, stack in enumerate(stacks[: layers * directions]):
        layer, reverse = divmod(number, directions)
        of = f"l{layer}" + ("_reverse" if reverse else "")
        states = stack.args[0]
        assert isinstance(states, list | tuple)
        for step, hidden in enumerate(states):
            assert isinstance(hidden, Node)
            hidden.meta["label"] = f"h_{of}[{step}]"
            if name == "lstm":
                gated = hidden
                if hidden.target is aten.linear.default:  # projected
                    assert isinstance(hidden.args[0], Node)
                    gated = hidden.args[0]
                squashed = gated.args[1]
                assert isinstance(squashed, Node)
                cell = squashed.args[0]
                assert isinstance(cell, Node)
                cell.meta["label"] = f"c_{of}[{step}]"
