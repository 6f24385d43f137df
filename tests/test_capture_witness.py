"""A capture is the model at the batch size it is used for, whatever its shapes depend on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nrm
from nrm import rules
from nrm.errors import InputError


class Net(nn.Module):
    """A linear layer before and after a function that may look at the batch size."""

    def __init__(self, function, *, features=3, hidden=4, head=None):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(features, hidden)
        self.last = nn.Identity() if head is None else nn.Linear(head, 2)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def make(function, **settings):
    return Net(function, **settings).double().eval()


def x_of(samples, features=3):
    torch.manual_seed(samples)
    return torch.rand(samples, features).double()


def gradient_times_input(model, x, neuron):
    """LRP-0 with the biases as leaves, of a network that is linear here: `x_i dy/dx_i / y`."""
    leaf = x.clone().requires_grad_()
    output = model(leaf)[neuron]
    (gradient,) = torch.autograd.grad(output, leaf)
    return leaf.detach() * gradient / output.detach()


def exact(model, **settings):
    return nrm.Explainer(model, rules.Zero(), bias="input", **settings)


WITHOUT_BATCH = {
    "squeeze": lambda h: h.squeeze(),
    "squeeze(0)": lambda h: torch.squeeze(h, 0),
    "view(-1)": lambda h: h.view(-1),
    "flatten": lambda h: h.flatten(),
    "first": lambda h: h[0],
    "mean": lambda h: h.mean(0),
    "branch": lambda h: h[0] * 2 if h.shape[0] == 1 else h,
    "branch on numel": lambda h: h.reshape(4) if h.numel() == 4 else h,
    "len": lambda h: h[0] if len(h) < 2 else h,
}


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("function", WITHOUT_BATCH.values(), ids=WITHOUT_BATCH)
def test_one_sample_whose_output_has_no_batch_axis(function):
    model, x = make(function), x_of(1)
    R = exact(model)(x, target=2)
    assert R.batch == 1
    assert R.output.shape == model(x).shape == (4,)
    assert R.target.tolist() == [2]
    torch.testing.assert_close(R.output, model(x).detach())
    torch.testing.assert_close(R.heatmap(), gradient_times_input(model, x, 2))
    torch.testing.assert_close(R("input") + sum(R.biases().values()), torch.ones(1).double())
    normal = nrm.Explainer(model, rules.Flat())(x, target=2)
    torch.testing.assert_close(normal.heatmap().sum(), torch.tensor(1.0).double())
    assert nrm.Explainer(model)(x).target.item() == int(model(x).argmax())


def test_a_head_that_is_squeezed_away_has_one_output():
    model = make(lambda h: h.squeeze(), hidden=1)
    R = exact(model)(x_of(1))
    assert R.batch == 1
    assert R.output.shape == ()
    torch.testing.assert_close(R.heatmap(), gradient_times_input(model, x_of(1), ...))


@pytest.mark.parametrize("order", [(1, 3, 1), (4, 1, 4, 2, 1)])
def test_every_batch_size_has_its_own_shapes(order):
    model = make(lambda h: h.squeeze())
    explainer = exact(model)
    for samples in order:
        x = x_of(samples)
        R = explainer(x, target=2)
        assert R.batch == samples
        assert R.output.shape == model(x).shape
        alone = [gradient_times_input(make(lambda h: h), x, (i, 2))[i] for i in range(samples)]
        torch.testing.assert_close(R.heatmap(), torch.stack(alone))


def test_as_many_classes_as_samples():
    model = make(lambda h: h)
    x = x_of(4)
    R = exact(model)(x, target=[3, 2, 1, 0])
    for sample, target in enumerate([3, 2, 1, 0]):
        expected = gradient_times_input(model, x, (sample, target))[sample]
        torch.testing.assert_close(R.heatmap()[sample], expected)


def test_an_output_with_the_samples_in_its_last_axis():
    model = make(lambda h: h.T)
    for samples in (1, 4, 2):
        x = x_of(samples)
        R = exact(model)(x, target=1)
        assert R.batch == samples
        for sample in range(samples):
            expected = gradient_times_input(model, x, (1, sample))[sample]
            torch.testing.assert_close(R.heatmap()[sample], expected)


def squeezed_inside(h):
    return torch.relu(h.squeeze()).reshape(-1, 4)


def halves(h):
    return torch.cat([part * 2 for part in h.chunk(h.shape[0])])


def bare_when_alone(h):
    return torch.relu(h) if h.shape[0] == 1 else h


@pytest.mark.parametrize("function", [squeezed_inside, halves, bare_when_alone])
@pytest.mark.parametrize("order", [(3, 1), (1, 3)])
def test_hidden_shapes_that_depend_on_the_batch_size(function, order):
    model = make(function, head=4)
    explainer = exact(model)
    for samples in order:
        x = x_of(samples)
        R = explainer(x, target=0)
        assert R.batch == samples
        torch.testing.assert_close(R.output, model(x).detach())
        for sample in range(samples):
            expected = gradient_times_input(model, x, (sample, 0))[sample]
            torch.testing.assert_close(R.heatmap()[sample], expected)


def test_a_branch_that_this_input_does_not_show():
    """Alone, the ReLU changes nothing for the first input, and does for the second."""
    model = make(bare_when_alone, head=4)
    with torch.no_grad():
        model.first.weight.abs_()
        model.first.bias.abs_()
    explainer = exact(model)
    explainer(x_of(3), target=0)
    for x in (x_of(1), -30 * x_of(1)):
        R = explainer(x, target=0)
        torch.testing.assert_close(R.output, model(x).detach())
        torch.testing.assert_close(R.heatmap(), gradient_times_input(model, x, (0, 0)))


def test_a_branch_on_larger_batches():
    def many(h):
        return h * 3 if h.shape[0] > 3 else torch.relu(h)

    model = make(many, head=4)
    with torch.no_grad():
        model.first.weight.abs_()
        model.first.bias.abs_()
    explainer = exact(model)
    for samples, sign in ((2, 1), (4, 1), (1, -30), (5, -30), (3, -30), (4, -30)):
        x = x_of(samples) * sign
        R = explainer(x, target=0)
        torch.testing.assert_close(R.output, model(x).detach())
        for sample in range(samples):
            expected = gradient_times_input(model, x, (sample, 0))[sample]
            torch.testing.assert_close(R.heatmap()[sample], expected)


def test_rows_of_a_reshape_are_no_samples():
    model, x = make(lambda h: h.reshape(2, -1)), x_of(1)
    R = exact(model)(x, target=(1, 0))
    assert R.batch == 1
    torch.testing.assert_close(R.heatmap(), gradient_times_input(model, x, (1, 0)))


def test_a_picture_without_a_batch_axis():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten(0), nn.Linear(8, 4))
    model, x = model.double().eval(), torch.rand(3, 3, 3).double()
    R = exact(model, batch_axis=None)(x, target=2)
    assert R.batch == 1
    torch.testing.assert_close(R.heatmap(), gradient_times_input(model, x, 2))
    with pytest.raises(InputError, match="batch_axis=None"):
        nrm.Explainer(model)(x, target=2)


@pytest.mark.parametrize("first", [1, 2])
def test_samples_that_depend_on_each_other_are_refused_whatever_came_first(first):
    model = make(lambda h: h - h.mean(0), head=4)
    explainer = nrm.Explainer(model)
    if first == 1:
        explainer(x_of(1), target=0)
    with pytest.raises(InputError, match="depend on each other"):
        explainer(x_of(2), target=0)
