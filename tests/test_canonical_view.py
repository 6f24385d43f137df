"""Where samples, channels and neurons lie in a variable's tensors, against indices by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import nrm
from nrm.engine import push_between, send_between
from nrm.errors import NeuronSetError, QueryError
from nrm.graph import Variable
from nrm.joint import partition
from nrm.sets import laid_out, resolve

NEURONS = {"none": (), "one axis": (3,), "channels first": (4, 2, 3), "channels last": (2, 3, 4)}
CHANNELS = {"none": None, "one axis": -1, "channels first": -3, "channels last": -1}
BATCHES = [0, 1, "last", None]
BATCH = 2


def variable(neurons, batch):
    """A variable with its neurons' axes and its batch axis, and its tensors' shape."""
    sizes = NEURONS[neurons]
    axis = len(sizes) if batch == "last" else batch
    if axis is not None and axis > len(sizes):
        pytest.skip("no such axis")
    shape = list(sizes)
    declared: list[int | None] = list(sizes)
    if axis is not None:
        shape.insert(axis, BATCH)
        declared.insert(axis, None)
    found = Variable(0, "x", "input", tuple(declared), axis, CHANNELS[neurons])
    return found, torch.Size(shape)


def place(index, axis):
    """The sample, and the place among its neurons."""
    if axis is None:
        return 0, index
    return index[axis], index[:axis] + index[axis + 1 :]


every = pytest.mark.parametrize(
    ("neurons", "batch"), [(n, b) for n in NEURONS for b in BATCHES], ids=str
)


@every
@pytest.mark.parametrize("messages", [1, 3])
def test_the_canonical_view_and_the_way_back(neurons, batch, messages):
    x, shape = variable(neurons, batch)
    message = torch.randn(messages, *shape)
    view = x.canonical(message)
    samples = 1 if x.batch_axis is None else BATCH
    assert view.shape == (messages, samples, *NEURONS[neurons])
    for k in range(messages):
        for index in itertools.product(*map(range, shape)):
            sample, neuron = place(index, x.batch_axis)
            assert view[(k, sample, *neuron)] == message[(k, *index)]
    assert torch.equal(x.restored(view, samples), message)
    view[:] = 7.0  # a view: nothing is copied
    assert bool((message == 7.0).all())


@pytest.mark.parametrize("shared", itertools.product((1, 2, 3), (1, 4)))
@pytest.mark.parametrize("axis", [0, 1])
def test_a_batch_that_shares_its_axis_with_neurons(axis, shared):
    """`[.., before * batch * after, ..]`: these have axes of their own in the view."""
    before, after = shared
    batch, rest = 3, [5, 2]
    shape = list(rest)
    shape.insert(axis, before * batch * after)
    declared: list[int | None] = list(rest)
    declared.insert(axis, None)
    x = Variable(0, "x", "input", tuple(declared), axis, shared=shared)
    assert x.batch_size(torch.Size(shape)) == batch
    message = torch.randn(2, *shape)
    view = x.canonical(message)
    own = [size for size in shared if size != 1]
    assert view.shape == (2, batch, *rest[:axis], *own, *rest[axis:])
    assert view.shape[2:] == x.neuron_shape(torch.Size(shape)) == x.neuron_sizes
    assert torch.equal(x.restored(view, batch), message)
    values = torch.randn(batch)
    spread = values.repeat_interleave(after).repeat(before)
    spread = spread.view([-1 if k == axis else 1 for k in range(3)])
    torch.testing.assert_close(message * x.by_sample(values), message * spread)
    for sample in range(batch):
        chosen = (torch.arange(batch) == sample).repeat_interleave(after).repeat(before)
        kept = message * chosen.view([-1 if k == axis else 1 for k in range(3)])
        torch.testing.assert_close(x.only_sample(message, sample), kept)
        torch.testing.assert_close(x.per_sample(message, batch)[:, sample], kept.flatten(1).sum(1))
    view[:] = 7.0  # a view: nothing is copied
    assert bool((message == 7.0).all())


@every
def test_shapes_and_axes_of_neurons(neurons, batch):
    x, shape = variable(neurons, batch)
    assert x.neuron_shape(shape) == x.neuron_sizes == NEURONS[neurons]
    if not NEURONS[neurons]:
        with pytest.raises(NeuronSetError, match="no channels"):
            x.channel_axis_of(x.neuron_shape(shape))
        return
    along = x.channel_axis_of(x.neuron_shape(shape))
    assert along == x.axis_of(x.neuron_sizes, None)
    assert along == {"one axis": 0, "channels first": 0, "channels last": 2}[neurons]
    assert x.axis_of(x.neuron_sizes, -1) == len(NEURONS[neurons]) - 1
    with pytest.raises(QueryError, match="has no axis 5"):
        x.axis_of(x.neuron_sizes, 5)


def test_a_variable_whose_channels_are_unknown_has_them_first():
    assert Variable(0, "x", "input", (None, 5, 6), 0).channel_axis_of((5, 6)) == 0


@every
def test_sums_over_each_sample_and_values_for_each(neurons, batch):
    x, shape = variable(neurons, batch)
    message = torch.randn(3, *shape).double()
    if x.batch_axis is None:
        for ask in (
            lambda: x.per_sample(message, BATCH),
            lambda: x.by_sample(torch.ones(BATCH)),
            lambda: x.require_samples_apart(BATCH),
        ):
            with pytest.raises(QueryError, match="cannot be told apart by sample"):
                ask()
    samples = 1 if x.batch_axis is None else BATCH
    assert x.tells_samples(samples)
    assert x.tells_samples(BATCH) == (x.batch_axis is not None)
    expected = torch.zeros(3, samples).double()
    factors = torch.arange(2.0, 2.0 + samples).double()
    multiplied = torch.zeros(3, *shape).double()
    for index in itertools.product(*map(range, shape)):
        sample, _ = place(index, x.batch_axis)
        expected[:, sample] += message[(slice(None), *index)]
        multiplied[(slice(None), *index)] = message[(slice(None), *index)] * factors[sample]
    torch.testing.assert_close(x.per_sample(message, samples), expected)
    torch.testing.assert_close(message * x.by_sample(factors), multiplied)


# -- On models: the batch first, in the middle, or none; channels first or last. -------------------


class Between(nn.Module):
    """Its hidden layers lie as the batch axis of its input says, channels last but in `turned`."""

    def __init__(self, axis, length):
        super().__init__()
        self.axis, self.length = axis, length
        self.up, self.down = nn.Linear(2, 3), nn.Linear(3 * length, 2)

    def forward(self, x):
        h = torch.relu(self.up(x))
        if self.axis is None:
            return self.down(h.reshape(-1))
        h = h.movedim(self.axis, 0)
        return self.down(h.flatten(1))


def measured(axis):
    torch.manual_seed(0)
    shape = [4, 2]
    if axis is not None:
        shape.insert(axis, BATCH)
    model = Between(axis, 4).double().eval()
    explainer = nrm.Explainer(model, nrm.rules.Gamma(0.25), batch_axis=axis, bias="input")
    return explainer(torch.randn(*shape).double(), target=1 if axis is not None else None)


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("by", ["neuron", "channel", 0, -1])
def test_parts_of_a_layer(axis, by):
    R = measured(axis)
    layer = R.graph.variable("up")
    forward = R.forward_pass
    shape = forward.shape(layer)
    assert layer.batch_axis == axis
    parts = partition("up", by, forward)
    assert parts.size == {"neuron": 12, "channel": 3, 0: 4, -1: 3}[by]

    def part_of(neuron):
        position, channel = neuron
        return {"neuron": position * 3 + channel, 0: position}.get(by, channel)

    chosen = [parts.size - 1, 0]
    message = torch.randn(1, *shape).double()
    split, kept = parts.split(message, chosen), parts.keep(message, chosen)
    assert split.shape == (2, *shape)
    added = torch.zeros(1, R.batch, parts.size).double()
    for index in itertools.product(*map(range, shape)):
        sample, neuron = place(index, axis)
        value, part = message[(0, *index)], part_of(neuron)
        added[0, sample, part] += value
        for row, wanted in enumerate(chosen):
            assert split[(row, *index)] == (value if part == wanted else 0)
        assert kept[(0, *index)] == (value if part in chosen else 0)
    torch.testing.assert_close(parts.add_up(message), added)
    (mask,) = resolve(parts.set_of(chosen[0]), forward).values()
    torch.testing.assert_close(message * mask, split[:1])


@pytest.mark.parametrize("axis", [0, 1, None])
def test_values_of_neurons_are_laid_out(axis):
    R = measured(axis)
    layer, forward = R.graph.variable("up"), R.forward_pass
    shape = forward.shape(layer)
    same, own = torch.randn(4, 3).double(), torch.randn(R.batch, 4, 3).double()
    for values in (same, own):
        spread = laid_out(values, layer, forward).expand(1, *shape)
        for index in itertools.product(*map(range, shape)):
            sample, neuron = place(index, axis)
            expected = values[neuron] if values is same else values[(sample, *neuron)]
            assert spread[(0, *index)] == expected
    with pytest.raises(NeuronSetError, match="have 5 samples"):
        laid_out(torch.zeros(5, 4, 3), layer, forward)
    with pytest.raises(NeuronSetError, match="have shape"):
        laid_out(torch.zeros(3, 4), layer, forward)


# -- From one variable to another. -----------------------------------------------------------------


class Beside(nn.Module):
    """Two branches that meet: no walk passes both."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.relu(self.a(x)) + torch.tanh(self.b(x)))


@pytest.mark.parametrize("rule", [nrm.rules.Zero(), nrm.rules.Gamma(0.25)], ids=repr)
def test_zero_arrives_where_no_walk_comes(rule):
    torch.manual_seed(0)
    R = nrm.Explainer(Beside().double().eval(), rule)(torch.randn(2, 3).double(), target=0)
    forward, (a, b) = R.forward_pass, map(R.graph.variable, "ab")
    message = torch.randn(5, 2, 4).double()
    for upper, lower in ((a, b), (b, a), (a, R.graph.output)):
        arrived = send_between(forward, message, upper, lower)
        assert arrived.shape == (5, *forward.shape(lower))
        assert not bool(arrived.any())
    pushed = push_between(forward, message, a, b)
    assert pushed.shape == (5, 2, 4)
    assert not bool(pushed.any())
    # And something where one does: each the transpose of the other.
    x = R.graph.inputs[0]
    arrived = send_between(forward, message, a, x)
    mass = torch.randn(5, 2, 3).double()
    up = push_between(forward, mass, x, a)
    torch.testing.assert_close((arrived * mass).sum((1, 2)), (message * up).sum((1, 2)))
    assert float(arrived.abs().sum()) > 0.1
