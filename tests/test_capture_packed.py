"""Packed sequences, and recurrent layers with projections."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import nrm

pytestmark = pytest.mark.usefixtures("captured_once")


class Packed(nn.Module):
    """A classifier of sequences of several lengths."""

    def __init__(self, kind, last, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = kind(2, 3, batch_first=True, **options)
        width = self.body.proj_size or 3
        self.head = nn.Linear(width * (2 if self.body.bidirectional else 1), 2)
        self.last = last

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, state = self.body(packed)
        if self.last:  # the last hidden states, of both directions
            hidden = state[0] if isinstance(state, tuple) else state
            ends = hidden[-2:] if self.body.bidirectional else hidden[-1:]
            return self.head(torch.cat(list(ends), -1))
        padded, lengths = pad_packed_sequence(output, batch_first=True, total_length=x.shape[1] + 1)
        return self.head(padded.sum(1) / lengths.to(x)[:, None])


class Alone(Packed):
    """The same of one sequence."""

    def forward(self, x):
        output, state = self.body(x)
        if self.last:
            hidden = state[0] if isinstance(state, tuple) else state
            ends = hidden[-2:] if self.body.bidirectional else hidden[-1:]
            return self.head(torch.cat(list(ends), -1))
        return self.head(output.mean(1))


X = torch.randn((3, 3, 2), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LENGTHS = torch.tensor([2, 3, 1])

CASES = {
    "lstm": (nn.LSTM, {"num_layers": 2}, False),
    "lstm, both directions": (nn.LSTM, {"bidirectional": True}, True),
    "lstm, projected": (nn.LSTM, {"proj_size": 2, "bidirectional": True, "bias": False}, False),
    "gru, both directions": (nn.GRU, {"bidirectional": True}, False),
    "gru": (nn.GRU, {}, True),
    "rnn": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}, True),
}


@cache
def models(name):
    kind, options, last = CASES[name]
    return tuple(made(kind, last, **options).double().eval() for made in (Packed, Alone))


@pytest.mark.parametrize("name", CASES)
def test_packed_sequences_are_the_unpadded_ones_one_by_one(name):
    packed, alone = models(name)
    R = nrm.Explainer(packed, batch_axis=None)(X, LENGTHS, target=(0, 1))
    one = nrm.Explainer(alone)(X[:1, :2], target=1)
    torch.testing.assert_close(R.heatmap()[0, :2], one.heatmap()[0])
    assert R.heatmap()[0, 2:].abs().max() == 0
    assert R.heatmap()[1:].abs().max() == 0
    torch.testing.assert_close(R.scale, one.scale)


def test_states_of_packed_sequences_have_names():
    model = Packed(nn.LSTM, last=False).double().eval()
    R = nrm.Explainer(model, batch_axis=None)(X, LENGTHS, target=(1, 0))
    shapes = {v.name: v.shape for v in R.graph.variables}
    assert [shapes[f"body.h_l0[{t}]"][0] for t in range(3)] == [3, 2, 1]
    assert "body.c_l0[2]" in shapes
    assert nrm.Explainer(model)(X[:1], LENGTHS[:1], target=0).batch == 1


class ByHand(nn.Module):
    """An LSTM with projections as its documentation has it."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0")
        w_ih, w_hh, b_ih, b_hh, w_hr = (getattr(self.body, name) for name in names)
        h, c = x.new_zeros(x.shape[0], 2), x.new_zeros(x.shape[0], 3)
        for step in x.unbind(1):
            added = torch.nn.functional.linear(step, w_ih, b_ih)
            i, f, g, o = (torch.nn.functional.linear(h, w_hh, b_hh) + added).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.nn.functional.linear(torch.sigmoid(o) * torch.tanh(c), w_hr)
        return h


def test_projections_are_written_out():
    torch.manual_seed(0)
    body = nn.LSTM(2, 3, proj_size=2, batch_first=True).double().eval()
    R = nrm.Explainer(body, output=lambda result: result[0][:, -1])(X, target=1)
    expected = nrm.Explainer(ByHand(body).eval(), nrm.composites.CPLRP())(X, target=1)
    torch.testing.assert_close(R.heatmap()[:, 1:], expected.heatmap()[:, 1:])
    assert {"h_l0[2]", "c_l0[2]"} <= {v.name for v in R.graph.variables}


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_packed_sequences_is_each_alone(name):
    """Samples are told apart, also where some end before others and are sorted by length."""
    packed, alone = models(name)
    target, explain = [1, 0, 1], nrm.Explainer(alone)
    R = nrm.Explainer(packed)(X, LENGTHS, target=target)
    token = nrm.neurons("x", (0, slice(None)))
    never, steps = R(~token), nrm.neurons("x", (0, 0)) ^ nrm.neurons("x", (0, 1))
    for sample, length in enumerate(LENGTHS.tolist()):
        one = explain(X[sample : sample + 1, :length], target=target[sample])
        torch.testing.assert_close(R.heatmap()[sample, :length], one.heatmap()[0])
        assert R.heatmap()[sample, length:].abs().sum() == 0
        first = nrm.neurons("input", (0, slice(None)))
        torch.testing.assert_close(never[sample], one(~first)[0])
        torch.testing.assert_close(R.scale[sample], one.scale[0])
        both = nrm.neurons("input", (0, 0)) ^ nrm.neurons("input", (0, 1))
        torch.testing.assert_close(R(steps)[sample], one(both)[0])


class Pair(nn.Module):
    """Two kinds of sequences, each of lengths of its own, packed on their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.GRU(2, 3, batch_first=True)
        self.b = nn.LSTM(2, 3, batch_first=True, bidirectional=True)
        self.c = nn.GRU(6, 2, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x, of_x, y, of_y):
        options = {"batch_first": True, "enforce_sorted": False}
        first, _ = pad_packed_sequence(self.a(pack_padded_sequence(x, of_x, **options))[0], True)
        between = self.b(pack_padded_sequence(y, of_y, **options))[0]  # packed into the next
        _, last = self.c(between)
        return self.head(torch.cat([first.sum(1) / of_x[:, None], last[-1]], 1))


class PairAlone(Pair):
    def forward(self, x, y):
        return self.head(torch.cat([self.a(x)[0].mean(1), self.c(self.b(y)[0])[1][-1]], 1))


def test_several_packed_sequences_in_one_graph():
    packed, alone = Pair().double().eval(), nrm.Explainer(PairAlone().double().eval())
    y = torch.randn((3, 3, 2), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    of_y = torch.tensor([3, 1, 2])
    R = nrm.Explainer(packed)(X, LENGTHS, y, of_y, target=1)
    whole = nrm.Explainer(packed, batch_axis=None)(X, LENGTHS, y, of_y, target=(0, 1))
    for sample, (one, other) in enumerate(zip(LENGTHS.tolist(), of_y.tolist(), strict=True)):
        part = slice(sample, sample + 1)
        single = alone(X[part, :one], y[part, :other], target=1)
        for name, length in (("x", one), ("y", other)):
            expected = single.heatmap(at=name)[0]
            torch.testing.assert_close(R.heatmap(at=name)[sample, :length], expected)
            if sample == 0:
                torch.testing.assert_close(whole.heatmap(at=name)[0, :length], expected)


class FromList(Packed):
    """Sequences packed from a list, and their data changed while they are packed."""

    def forward(self, x):
        parts = [each[:length] for each, length in zip(x, LENGTHS.tolist(), strict=True)]
        output, _ = self.body(pack_sequence(parts, enforce_sorted=False))
        changed = PackedSequence(torch.relu(output.data), *output[1:])
        return self.head(pad_packed_sequence(changed, batch_first=True)[0].sum(1))


class FromListAlone(FromList):
    def forward(self, x):
        return self.head(torch.relu(self.body(x)[0]).sum(1))


def test_sequences_that_are_packed_from_a_list():
    packed, alone = (made(nn.GRU, False).double().eval() for made in (FromList, FromListAlone))
    R = nrm.Explainer(packed, batch_axis=None)(X, target=(0, 1))
    one = nrm.Explainer(alone)(X[:1, :2], target=1)
    torch.testing.assert_close(R.heatmap()[0, :2], one.heatmap()[0])
