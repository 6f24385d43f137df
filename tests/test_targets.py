"""Contrasts, one against the rest, means of regions, and many targets in one run.

Under LRP-0 with biases as inputs, on piecewise linear networks, relevance times what is explained
is gradient times input of that quantity, whatever it is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm import composites, rules
from nrm.errors import PositiveSumError, QueryError, RelevanceWarning, TargetError


@pytest.fixture(scope="module")
def classes() -> tuple[nrm.Explainer, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5)).double().eval()
    explainer = nrm.Explainer(model, composites.LRPZero(), bias="input")
    return explainer, torch.randn(3, 4, dtype=torch.float64)


@pytest.fixture(scope="module")
def maps() -> tuple[nrm.Explainer, Tensor]:
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)]
    model = nn.Sequential(*layers).double().eval()
    explainer = nrm.Explainer(model, composites.LRPZero(), bias="input")
    return explainer, torch.randn(2, 2, 6, 6, dtype=torch.float64)


MASK = torch.zeros(3, 6, 6, dtype=torch.bool)
MASK[1, 2:4, :3] = True
QUANTITIES: dict[str, tuple[str, object, Callable[[Tensor], Tensor]]] = {
    "contrast": ("classes", nrm.Contrast(2, 0), lambda f: f[:, 2] - f[:, 0]),
    "against the rest": (
        "classes", nrm.AgainstRest(1), lambda f: f[:, 1] - f[:, [0, 2, 3, 4]].mean(1),
    ),
    "the largest against the rest": (
        "classes", nrm.AgainstRest(), lambda f: (f.amax(1) * 5 - f.sum(1)) / 4,
    ),
    "mean of all": ("classes", nrm.Average(), lambda f: f.mean(1)),
    "region": ("maps", nrm.Average(2, slice(1, 3), slice(-2, None)),
               lambda f: f[:, 2, 1:3, -2:].mean((1, 2))),
    "mask": ("maps", nrm.Average(MASK), lambda f: f[:, 1, 2:4, :3].mean((1, 2))),
    "pixel against other classes": (
        "maps", nrm.AgainstRest((1, 0, -1), axis=0),
        lambda f: f[:, 1, 0, -1] - (f[:, 0, 0, -1] + f[:, 2, 0, -1]) / 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTITIES)
def test_relevance_is_gradient_times_input_of_the_quantity(name, request) -> None:
    network, target, quantity = QUANTITIES[name]
    explainer, x = request.getfixturevalue(network)
    R = explainer(x, target=target)
    leaf = x.clone().requires_grad_()
    value = quantity(explainer.model(leaf))
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(R.scale, value.detach())
    found = R.heatmap() * R.graph.inputs[0].by_sample(R.scale)
    torch.testing.assert_close(found, x * gradient, atol=1e-10, rtol=0)
    assert R.target is None
    assert R.quantity == str(target)
    assert str(target) in repr(R)


def test_a_negative_quantity_is_said_and_refused_where_it_is_strict() -> None:
    layer = nn.Linear(2, 2, bias=False).eval()
    layer.weight.data = torch.eye(2)
    x = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    with pytest.warns(RelevanceWarning, match="output 0 minus output 1, is -2 for sample 1"):
        nrm.Explainer(layer)(x, target=nrm.Contrast(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nrm.Explainer(layer)(x[:1], target=nrm.Contrast(0, 1))
    with pytest.raises(PositiveSumError, match="negative for some sample"):
        nrm.Explainer(layer, strict=True)(x, target=nrm.Contrast(0, 1))
    with pytest.raises(TargetError, match="is zero for some sample"):
        nrm.Explainer(layer)(torch.ones(1, 2), target=nrm.Contrast(0, 1))


@pytest.mark.parametrize(
    ("network", "make", "message"),
    [
        ("classes", lambda: nrm.Contrast(1, 1), "of two outputs"),
        ("classes", lambda: nrm.Contrast(1, 5), "out of range"),
        ("classes", lambda: nrm.Contrast(-1, 0), "out of range"),
        ("classes", lambda: nrm.Contrast((1, 2), 0), "named by 1 ints"),
        ("classes", lambda: nrm.Contrast(True, 0), "named by 1 ints"),
        ("maps", lambda: nrm.Contrast(1, 0), "named by 3 ints"),
        ("maps", lambda: nrm.AgainstRest((0, 0, 0), axis=3), "has no axis 3"),
        ("maps", lambda: nrm.Average(5), "outside of the outputs"),
        ("maps", lambda: nrm.Average(slice(3, 3)), "takes no output"),
        ("maps", lambda: nrm.Average(0, 0, 0, 0), "more axes"),
        ("maps", lambda: nrm.Average("x"), "an int or slice for each axis"),
        ("maps", lambda: nrm.Average(MASK[0]), "mask is"),
        ("maps", lambda: nrm.Average(MASK.double()), "one boolean mask"),
    ],
)
def test_what_names_no_outputs_is_refused(network, make, message, request) -> None:
    explainer, x = request.getfixturevalue(network)
    with pytest.raises(TargetError, match=message):
        explainer(x, target=make())


def test_other_targets_on_the_same_forward_pass(classes) -> None:
    explainer, x = classes
    R = explainer(x, target=0)
    for target in (3, [1, 2, 0], nrm.Contrast(2, 0)):
        other, anew = R.of(target), explainer(x, target=target)
        torch.testing.assert_close(other.heatmap(), anew.heatmap(), atol=0, rtol=0)
        assert other.forward_pass is R.forward_pass
        again = copy.deepcopy(other)  # made anew, of its own target
        torch.testing.assert_close(again.heatmap(), anew.heatmap())
        assert again.quantity == other.quantity


def test_many_targets_in_one_run(classes, maps) -> None:
    explainer, x = classes
    gamma = nrm.Explainer(explainer.model, composites.Everywhere(rules.Gamma(0.25)), bias="input")
    R, a = gamma(x, target=0), nrm.neurons("1", 1, 4)
    told: list[int] = []
    found = R.by_target(memory=1000, progress=told.append)
    assert sum(told) == 5
    assert len(told) > 1
    for target in range(5):
        torch.testing.assert_close(found[target], R.of(target).heatmap())
    chosen = [4, nrm.Contrast(2, 0), [1, 2, 0]]
    for sets in ((a,), (~a,), (a, ~nrm.neurons("1", 0))):
        found = R.by_target(chosen, *sets)
        for row, target in zip(found, chosen, strict=True):
            torch.testing.assert_close(row, R.of(target).heatmap(*sets))
    original = R.by_target([1, 2], a, normalized="original")
    torch.testing.assert_close(original[1], R.of(2).heatmap(a, normalized="original"))
    explainer, x = maps
    found = explainer(x, target=(0, 0, 0)).by_target([(1, 2, 3), nrm.Average(1)], at="1")
    torch.testing.assert_close(found[1], explainer(x, target=nrm.Average(1)).marginal("1"))
    for more in ({"given": a}, {"within": a}, {"weights": {"1": torch.ones(7)}}):
        with pytest.raises(QueryError, match="sets and formulas alone"):
            R.by_target([1], nrm.Condition(a, **more))
