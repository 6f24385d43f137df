"""Recurrent layers and cells written out step by step, with names for their hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError


class StepsAlongBatchError(Exception):
    """What was taken for the batch axis is time: it cannot have any size."""


Step = Callable[[Tensor, Any, Tensor, Any], Any]
"""From what the input adds to the gates, the state before, and the recurrent weight and bias, to
the state after."""


def _lstm_step(added: Tensor, state: Any, weight: Tensor, bias: Any) -> Any:
    hidden, cell = state
    i, f, g, o = (torch.nn.functional.linear(hidden, weight, bias) + added).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


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


def recurrent(step: Step) -> Callable[..., Any]:
    """All steps of all layers and directions, as `aten.lstm.input` and the like take arguments."""

    def network(
        x: Tensor,
        initial: Any,
        weights: list[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        kinds = initial if isinstance(initial, list | tuple) else [initial]
        each = 4 if has_biases else 2
        directions = 2 if bidirectional else 1
        if len(weights) != each * directions * num_layers:
            raise UnsupportedOperatorError(
                "no rule covers recurrent layers with projections (proj_size)."
            )
        x = x.transpose(0, 1) if batch_first else x
        if not isinstance(x.shape[0], int):
            raise StepsAlongBatchError
        ends: list[Any] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                run = layer * directions + direction
                w_ih, w_hh, *biases = weights[run * each : (run + 1) * each]
                b_ih, b_hh = biases or (None, None)
                added = torch.nn.functional.linear(x, w_ih, b_ih).unbind(0)
                state = tuple(kind[run] for kind in kinds)
                hidden = []
                for one in reversed(added) if direction else added:
                    state = step(one, state, w_hh, b_hh)
                    hidden.append(state[0])
                outputs.append(torch.stack(hidden[::-1] if direction else hidden))
                ends.append(state)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        x = x.transpose(0, 1) if batch_first else x
        return (x, *(torch.stack(kind) for kind in zip(*ends, strict=True)))

    return network


STEPS = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _rnn_step(torch.tanh),
    "rnn_relu": _rnn_step(torch.relu),
}


def name_steps(node: Node, new: Sequence[Node]) -> None:
    """Name the hidden (and cell) state of each time step: `h_l0[3]`, `c_l1_reverse[0]`.

    Every layer and direction ends by stacking its hidden states, in the order of time.
    """
    name = str(node.target).split(".")[1]
    if name.removesuffix("_cell") not in STEPS:
        return
    for inner in new:
        inner.meta["recurrent"] = True  # its constants are states
    if name not in STEPS:
        return
    layers, bidirectional = node.args[4], node.args[7]
    assert isinstance(layers, int)
    directions = 2 if bidirectional else 1
    stacks = [n for n in new if n.target is torch.ops.aten.stack.default]
    for number, stack in enumerate(stacks[: layers * directions]):
        layer, reverse = divmod(number, directions)
        of = f"l{layer}" + ("_reverse" if reverse else "")
        states = stack.args[0]
        assert isinstance(states, list | tuple)
        for step, hidden in enumerate(states):
            assert isinstance(hidden, Node)
            hidden.meta["label"] = f"h_{of}[{step}]"
            if name == "lstm":
                squashed = hidden.args[1]
                assert isinstance(squashed, Node)
                cell = squashed.args[0]
                assert isinstance(cell, Node)
                cell.meta["label"] = f"c_{of}[{step}]"
