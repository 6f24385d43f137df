"""Gates and recurrent cells."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support import oracle as o
from support.architectures.describing import (
    Walks,
    by_position,
    every,
    pair,
    parameters,
    plus,
    sigmoid,
)
from support.oracle import Neuron


class Gates(nn.Module):
    """A gated input, SwiGLU, and a gated linear unit."""

    inputs = ((2,),)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.up = nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 3)
        self.down, self.glu = nn.Linear(3, 4), nn.GLU()

    def forward(self, x: Tensor) -> Tensor:
        h = x * torch.sigmoid(self.a(x))
        return self.glu(self.down(F.silu(self.gate(h)) * self.up(h)))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        net.linear("a", walks.column, "input", *parameters(self.a))
        net.identity(":sigmoid", "a", sigmoid)
        h = net.split(":mul", [every("input", 2), every(":sigmoid", 2)], walks.shares(0, 1))
        net.linear("gate", walks.column, h, *parameters(self.gate))
        net.linear("up", walks.column, h, *parameters(self.up))
        net.identity(":silu", "gate", lambda v: v * sigmoid(v))
        h = net.split(":mul@1", [every(":silu", 3), every("up", 3)], walks.shares(1, 0))
        net.linear("down", walks.column, h, *parameters(self.down))
        net.elementwise("glu:sigmoid", every("down", 4)[2:], sigmoid)
        net.split("glu", [every("down", 2), every("glu:sigmoid", 2)], walks.shares(0, 1))


class LSTMCell(nn.Module):
    """One step, from a state that is an input too."""

    inputs = ((2,), (2,), (2,))

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(2, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return self.head(torch.cat(self.cell(x, (h, c)), 1))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        for name, value in zip("xhc", x, strict=True):
            net.input(name, value)
        cell = self.cell
        net.linear("cell:linear", walks.column, "x", *pair(cell, "ih"))
        net.linear("cell:linear@1", walks.column, "h", *pair(cell, "hh"))
        net.add("cell:add", walks.column, [("cell:linear@1", 1.0), ("cell:linear", 1.0)])
        _lstm_step(net, walks, "cell", "c", 0, "cell:add@1", "cell")
        net.cat(":cat", "cell", "cell:add@1")
        net.linear("head", walks.column, ":cat", *parameters(self.head))


class LSTM(nn.Module):
    """Two steps from a state of zeros."""

    inputs = ((2, 2),)

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        w, bias = pair(self.rnn, "ih_l0")
        w_hh, b_hh = pair(self.rnn, "hh_l0")
        by_position(net, "rnn:linear", walks, "input", 2, (w, bias))
        plus(net, "rnn:add", walks, every("rnn:linear", 8), b_hh)
        _lstm_step(net, walks, "rnn", None, 0, "rnn.c_l0[0]", "rnn.h_l0[0]")
        net.linear("rnn:linear@2", walks.column, "rnn.h_l0[0]", w_hh, b_hh)
        after = net.pick("rnn:unbind.1", every("rnn:linear", 16)[8:])
        net.add("rnn:add@2", walks.column, [("rnn:linear@2", 1.0), (after, 1.0)])
        _lstm_step(net, walks, "rnn", "rnn.c_l0[0]", 1, "rnn.c_l0[1]", "rnn.h_l0[1]")
        net.identity(":select", "rnn.h_l0[1]")


def _lstm_step(
    net: o.Oracle, walks: Walks, scope: str, state: str | None, step: int, cell: str, hidden: str
) -> None:
    """The gates i, f, g, o of the sum `<scope>:add`; without a state it is a constant leaf."""

    def name(op: str, number: int) -> str:
        return f"{scope}:{op}" + (f"@{number}" if number else "")

    gates = every(name("add", 2 * step), 8)
    forget = net.elementwise(name("sigmoid", 3 * step), gates[2:4], sigmoid)
    if state is None:
        state = net.input(f"{scope}:select@1", np.zeros(2))
    kept = net.split(name("mul", 3 * step), [every(forget, 2), every(state, 2)], walks.shares(2, 0))
    net.elementwise(name("sigmoid", 3 * step + 1), gates[:2], sigmoid)
    net.elementwise(name("tanh", 2 * step), gates[4:6], np.tanh)
    added = net.split(
        name("mul", 3 * step + 1),
        [every(name("sigmoid", 3 * step + 1), 2), every(name("tanh", 2 * step), 2)],
        walks.shares(2, 1),
    )
    net.add(cell, walks.column, [(kept, 1.0), (added, 1.0)])
    net.elementwise(name("sigmoid", 3 * step + 2), gates[6:], sigmoid)
    net.identity(name("tanh", 2 * step + 1), cell, np.tanh)
    squashed = every(name("tanh", 2 * step + 1), 2)
    net.split(hidden, [every(name("sigmoid", 3 * step + 2), 2), squashed], walks.shares(2, 1))


class GRUCell(nn.Module):
    inputs = ((2,), (2,))

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, 2)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.cell(x, h)

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("x", x[0])
        net.input("h", x[1])
        net.linear("cell:linear", walks.column, "x", *pair(self.cell, "ih"))
        net.linear("cell:linear@1", walks.column, "h", *pair(self.cell, "hh"))
        from_x, from_h = every("cell:linear", 6), every("cell:linear@1", 6)
        _gru_step(net, walks, "cell", from_x, from_h, "h", 0, "cell")


class GRU(nn.Module):
    """Two steps; a state of zeros makes what the first takes from it a constant."""

    inputs = ((2, 2),)

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        w_hh, b_hh = pair(self.rnn, "hh_l0")
        by_position(net, "rnn:linear", walks, "input", 2, pair(self.rnn, "ih_l0"))
        first, second = every("rnn:linear", 12)[:6], every("rnn:linear", 12)[6:]
        _gru_step(net, walks, "rnn", first, b_hh, None, 0, "rnn.h_l0[0]")
        net.linear("rnn:linear@2", walks.column, "rnn.h_l0[0]", w_hh, b_hh)
        state = every("rnn:linear@2", 6)
        _gru_step(net, walks, "rnn", second, state, "rnn.h_l0[0]", 1, "rnn.h_l0[1]")
        net.identity(":select", "rnn.h_l0[1]")


def _gru_step(
    net: o.Oracle,
    walks: Walks,
    scope: str,
    x: list[Neuron],
    h: list[Neuron] | np.ndarray,
    state: str | None,
    step: int,
    hidden: str,
) -> None:
    """Gates r, z and the candidate n; without a state what `h` adds is a constant."""

    def name(op: str, number: int) -> str:
        return f"{scope}:{op}" + (f"@{number}" if number else "")

    def gate(number: int, part: slice) -> str:
        """Add what comes from the state, and squash."""
        added = name("add", 4 * step + number)
        if isinstance(h, np.ndarray):
            plus(net, added, walks, x[part], h[part])
        else:
            terms = [
                (j, *neuron, 1.0)
                for j, both in enumerate(zip(x[part], h[part], strict=True))
                for neuron in both
            ]
            net.weighted(added, walks.column, 2, terms)
        return net.identity(name("sigmoid", 2 * step + number), added, sigmoid)

    update, reset = gate(0, slice(2, 4)), gate(1, slice(0, 2))
    constant = isinstance(h, np.ndarray)
    into = every(net.input(f"{scope}:chunk.2@1", h[4:]), 2) if constant else h[4:]
    candidate = net.split(name("mul", 3 * step), [every(reset, 2), into], walks.shares(2, 0))
    terms = [(j, *n, 1.0) for part in (x[4:], every(candidate, 2)) for j, n in enumerate(part)]
    net.weighted(name("add", 4 * step + 2), walks.column, 2, terms)
    new = net.identity(name("tanh", step), name("add", 4 * step + 2), np.tanh)
    if net.bias_is_input:
        rest = net.add(name("rsub", step), walks.column, [(update, -1.0)], np.ones(2))
    else:
        rest = net.identity(name("rsub", step), update, lambda v: 1 - v)
    renewed = net.split(
        name("mul", 3 * step + 1), [every(new, 2), every(rest, 2)], walks.shares(1, 2)
    )
    if state is None:
        state = net.input(f"{scope}:select", np.zeros(2))
    kept = net.split(
        name("mul", 3 * step + 2), [every(state, 2), every(update, 2)], walks.shares(0, 2)
    )
    net.add(hidden, walks.column, [(renewed, 1.0), (kept, 1.0)])


class RNN(nn.Module):
    """A plain recurrent layer in both directions, then one more step by a cell."""

    inputs = ((2, 2),)

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, 1, batch_first=True, bidirectional=True, nonlinearity="relu")
        self.cell = nn.RNNCell(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x[:, 0], self.rnn(x)[0][:, 1])

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        number = 0
        for suffix, order in (("", (0, 1)), ("_reverse", (1, 0))):
            w_hh, b_hh = pair(self.rnn, "hh_l0" + suffix)
            into = "rnn:linear" + (f"@{number}" if number else "")
            by_position(net, into, walks, "input", 2, pair(self.rnn, "ih_l0" + suffix))
            state = None
            for step, t in enumerate(order):
                total = 2 * (suffix != "") + step
                added = "rnn:add" + (f"@{total}" if total else "")
                if state is None:
                    plus(net, added, walks, [(into, t)], b_hh)
                else:
                    linear = f"rnn:linear@{number + 2}"
                    net.linear(linear, walks.column, state, w_hh, b_hh)
                    terms = [(0, linear, 0, 1.0), (0, into, t, 1.0)]
                    net.weighted(added, walks.column, 1, terms)
                state = net.relu(f"rnn.h_l0{suffix}[{t}]", added)
            number += 3
        net.pick(":select@1", [("rnn.h_l0[1]", 0), ("rnn.h_l0_reverse[1]", 0)])
        net.pick(":select", every("input", 2))
        net.linear("cell:linear", walks.column, ":select", *pair(self.cell, "ih"))
        net.linear("cell:linear@1", walks.column, ":select@1", *pair(self.cell, "hh"))
        net.add("cell:add", walks.column, [("cell:linear@1", 1.0), ("cell:linear", 1.0)])
        net.identity("cell", "cell:add", np.tanh)
