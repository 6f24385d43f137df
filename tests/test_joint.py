"""Joint relevance of many parts: from above, from below, of several layers, in little memory."""

from __future__ import annotations

import itertools
import weakref
from functools import cache

import pytest
import torch
from support.networks import NETWORKS, make
from support.pairs import in_pairs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nrm
from nrm import composites, rules
from nrm.composites import Everywhere
from nrm.engine import in_chunks, message_size
from nrm.errors import QueryError

pytestmark = pytest.mark.usefixtures("captured_once")

RULES = ["zero", "gamma", "plain-gamma", "zplus", "alpha2beta1", "flat", "occlusion"]


@in_pairs("network, rule, bias", NETWORKS, RULES, ["drop", "input"])
def test_messages_from_below_find_what_those_from_above_do(network, rule, bias):
    case = make(network, rule, bias == "input", seed=4)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=1)
    names = [v for v in R.graph.variables if not v.name.endswith("bias")]
    pairs = [(a, b) for a, b in itertools.combinations(names, 2) if a in R.graph.upstream(b)]
    size = max(1.0, float(R.diagnostics().total_variation.max()))
    for lower, upper in pairs[:: max(1, len(pairs) // 6)]:
        down, up = (
            R.joint(upper.name, lower.name, by="neuron", method=way)
            for way in ("backward", "forward")
        )
        torch.testing.assert_close(down, up, atol=1e-10 * size, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("network", NETWORKS)
def test_absolute_sizes_are_bounds(network, rule):
    """`|R(i|j)|` of every connection lies below what the absolute propagation says."""
    case = make(network, rule, True, seed=5)
    R = nrm.Explainer(case.model, case.composite, bias="input")(*case.inputs, target=1)
    forward = R.forward_pass
    for operation in R.graph.operations:
        propagation = forward.propagations[operation]
        sizes = propagation.absolute()
        if sizes is None:
            assert rule == "occlusion"
            continue
        shape = forward.shape(operation.output)
        basis = torch.eye(shape.numel()).double().view(-1, *shape)
        wanted = [True] * len(operation.operands)
        own = propagation.pull(basis.clone(), wanted)
        for found, bound in zip(own, sizes.pull(basis.clone(), wanted), strict=True):
            assert bool((found.abs() <= bound * (1 + 1e-9) + 1e-12).all())
        # The transpose, too.
        masses = [torch.rand(3, *forward.shape(v)).double() for v in operation.operands]
        pushed = sizes.push(masses, shape)
        pulled = sizes.pull(basis.clone(), wanted)
        expected = sum(
            torch.einsum("ki,ji->kj", mass.flatten(1), part.flatten(1))
            for mass, part in zip(masses, pulled, strict=True)
        )
        torch.testing.assert_close(pushed.flatten(1), expected)


@cache
def small_tower():
    torch.manual_seed(0)
    sizes = [(2, 6), (6, 5), (5, 7), (7, 4)]
    layers = [layer for a, b in sizes for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return model.double().eval(), torch.randn(2, 2, 6, 6).double()


def tower(composite):
    model, x = small_tower()
    return nrm.Explainer(model, composite)(x, target=1)


def test_distant_layers_go_by_messages_from_the_side_with_fewer_parts():
    R = tower(Everywhere(rules.Gamma(0.25)))
    assert R.joint_method("0", "2") == "contraction"
    assert R.joint_method("2", "6") == "backward"  # 5 below, 4 above
    assert R.joint_method("0", "4") == "forward"  # 6 below, 7 above
    for a, b in (("2", "6"), ("0", "4")):
        found = R.joint(a, b)
        for way in ("backward", "forward"):
            torch.testing.assert_close(found, R.joint(a, b, method=way))
            torch.testing.assert_close(found, R.joint(a, b, method=way, memory=1))
        with pytest.raises(QueryError, match="not just one"):
            R.joint(a, b, method="contraction")
    with pytest.raises(QueryError, match="method is one of"):
        R.joint("0", "2", method="messages")


@pytest.mark.parametrize("rule", [rules.Zero(), rules.Gamma(0.25), rules.AlphaBeta(2, 1)], ids=repr)
def test_three_layers_and_more(rule):
    R = tower(Everywhere(rule))
    layers = ["4", "0", "2"]  # in any order
    table = R.joint(*layers)
    assert table.shape == (2, 7, 6, 5)
    for chosen in ((0, 0, 0), (3, 2, 4), (6, 5, 1)):
        sets = [nrm.channels(layer, c) for layer, c in zip(layers, chosen, strict=True)]
        torch.testing.assert_close(table[(slice(None), *chosen)], R(*sets))
    torch.testing.assert_close(table.sum(3), R.joint("4", "0"))
    torch.testing.assert_close(table.sum((2, 3)), R.channels("4"))
    torch.testing.assert_close(table, R.joint(*layers, method="backward", memory=1))
    condition = nrm.channels("6", 1, 3)
    four = R.joint("6", *layers)
    torch.testing.assert_close(R.joint(*layers, condition), four[:, 1] + four[:, 3])
    strong = [[flow.sets[0] for flow in R.top(layer, k=2)] for layer in layers]
    some = R.joint(*strong)
    assert some.shape == (2, 2, 2, 2)
    torch.testing.assert_close(some[0, 1, 0, 1], R(strong[0][1], strong[1][0], strong[2][1])[0])
    with pytest.raises(QueryError, match="different layers"):
        R.joint("0", "2", "0")


# -- memory ----------------------------------------------------------------------------------------


SIDE = 32
"""Of the pictures whose layers' messages are to fit into a budget."""


class Peak(TorchDispatchMode):
    """The most bytes of tensors that are there at once and were made under it."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key, size):
        self.known.discard(key)
        self.now -= size


@cache
def large_tower():
    torch.manual_seed(0)
    sizes = [(3, 16), (16, 32), (32, 32), (32, 16)]
    layers = [layer for a, b in sizes for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    layers.insert(4, nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    return model.eval(), torch.rand(1, 3, SIDE, SIDE)


def big(composite):
    model, x = large_tower()
    return nrm.Explainer(model, composite)(x, target=1)


QUERIES = {
    "from above": lambda R, memory: R.joint("0", "7", method="backward", memory=memory),
    "from below": lambda R, memory: R.joint("0", "7", method="forward", memory=memory),
    "heatmaps": lambda R, memory: R.heatmaps(
        [nrm.channels("5", c) for c in range(32)], memory=memory
    ),
}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize(
    "composite",
    [Everywhere(rules.Gamma(0.25)), composites.EpsilonPlus(), composites.EpsilonAlpha2Beta1Flat()],
    ids=lambda c: type(c).__name__,
)
def test_a_memory_budget_is_kept(composite, query):
    """Within 20 %, beside what is prepared once for all messages and the result."""
    R = big(composite)
    ask = QUERIES[query]
    result = ask(R, 1)  # prepares
    each = message_size(R.forward_pass, R.graph.variable("7"), R.graph.variable("0"))
    for budget in (5 * each, 15 * each):
        with Peak() as peak:
            again = ask(R, budget)
        torch.testing.assert_close(again, result, atol=1e-6, rtol=1e-3)
        used = peak.most - result.nbytes
        assert 0.4 * budget <= used <= 1.2 * budget


def overlapping(layer, shape, count):
    generator = torch.Generator().manual_seed(1)
    return [nrm.mask(layer, torch.rand(shape, generator=generator) < 0.5) for _ in range(count)]


UPPER = overlapping("2", (32, SIDE, SIDE), 60)
LOWER = overlapping("0", (16, SIDE, SIDE), 60)
MANY = {
    "masks": lambda R, memory: R.heatmaps(LOWER, memory=memory),
    "masks of two layers": lambda R, memory: R.heatmaps(
        [[nrm.channels("7", k % 16), chosen] for k, chosen in enumerate(UPPER)], memory=memory
    ),
    "the same above": lambda R, memory: R.heatmaps(
        [[nrm.channels("7", 1), chosen] for chosen in UPPER], at="0", memory=memory
    ),
    "sets above": lambda R, memory: R.joint(UPPER, "0", method="backward", memory=memory),
    "sets below": lambda R, memory: R.joint("7", LOWER, method="forward", memory=memory),
    "triples": lambda R, memory: R.joint("6", "2", "0", method="backward", memory=memory),
    "search": lambda R, memory: R.top(UPPER, "0", memory=memory),
}


@pytest.mark.parametrize("query", MANY)
def test_many_sets_are_not_held_at_once(query):
    """Masks are as large as their layers: those of sets that wait are not there yet."""
    R = big(composites.EpsilonPlus())
    ask = MANY[query]
    result = ask(R, 1)  # prepares
    budget = 10 * message_size(R.forward_pass, R.graph.variable("7"), R.graph.variable("input"))
    with Peak() as peak:
        again = ask(R, budget)
    used = peak.most
    if isinstance(again, torch.Tensor):
        torch.testing.assert_close(again, result, atol=1e-6, rtol=1e-3)
        used -= result.nbytes
    else:
        assert [flow.parts for flow in again] == [flow.parts for flow in result]
    assert used <= 1.2 * budget


def test_one_message_at_least():
    R = big(composites.EpsilonPlus())
    each = message_size(R.forward_pass, R.graph.output)
    assert each == 5 * 32 * SIDE * SIDE * 4  # of 32 channels to 32 channels
    assert R.heatmaps([nrm.channels("5", 0), nrm.channels("5", 1)], memory=1).shape[0] == 2


def test_chunks_become_smaller_where_memory_runs_out():
    done, tried = [], []

    def work(chosen):
        tried.append(len(chosen))
        if len(chosen) > 3:
            raise torch.OutOfMemoryError("no memory left")
        done.extend(chosen)

    in_chunks(range(20), 10, 1, work)
    assert done == list(range(20))
    assert tried[:3] == [10, 5, 2]
    assert all(size == 2 for size in tried[2:])
    with pytest.raises(torch.OutOfMemoryError):
        in_chunks([1], 1, 1, lambda chosen: work([0] * 4))


@pytest.mark.parametrize("memory", [0, -5, float("nan"), float("inf"), True, None, "1GB"])
def test_budgets_that_are_none(memory):
    R = tower(Everywhere(rules.ZPlus()))
    for ask in (
        lambda: R.joint("2", "6", memory=memory),
        lambda: R.top("2", "6", "0", memory=memory),
        lambda: R.heatmaps([nrm.channels("2", 0)], memory=memory),
    ):
        with pytest.raises(QueryError, match="positive number of bytes"):
            ask()
    torch.testing.assert_close(R.joint("2", "6", memory=1e5), R.joint("2", "6"))


def test_forward_messages_take_no_more_memory_through_many_layers():
    peaks = []
    for depth in (4, 24):
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        R = nrm.Explainer(model.eval(), rules.ZPlus())(torch.rand(1, 8, 24, 24), target=0)
        ends = (str(2 * depth - 2), "0")
        R.joint(*ends, method="forward")  # prepares
        with Peak() as peak:
            R.joint(*ends, method="forward", memory=2**20)
        peaks.append(peak.most)
    assert peaks[1] < 1.1 * peaks[0]


def test_winners_that_tie_share_and_keep_their_channel():
    """Saturated at all six positions: each has a sixth, and the sum is no whole number."""

    class Saturated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(nn.functional.relu6(self.conv(x)).amax((2, 3)))

    torch.manual_seed(0)
    model = Saturated().eval()
    with torch.no_grad():
        model.conv.weight.abs_()
        model.conv.weight[5] *= 1e3
    for height, width in ((2, 3), (5, 7), (7, 7), (6, 11)):
        x = torch.rand(1, 3, height, width) + 0.1
        R = nrm.Explainer(model, rules.ZPlus())(x, target=0)
        pairs = R.joint(":amax", "input")
        torch.testing.assert_close(pairs, R.joint(":amax", "input", method="backward"))
        expected = R(nrm.channels(":amax", 5), nrm.channels("input", 2))
        torch.testing.assert_close(pairs[:, 5, 2], expected)


def test_neurons_without_parents_end_in_their_own_leaf():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, padding=1), nn.Flatten(), nn.Linear(18, 2))
    R = nrm.Explainer(model.double().eval(), rules.Flat(), bias="drop")(
        torch.rand(1, 1, 1, 1).double(), target=0
    )
    down, up = (R.joint("0", "0.padding", method=way) for way in ("backward", "forward"))
    torch.testing.assert_close(down, up)
    torch.testing.assert_close(down[0], torch.eye(2).double() * 4 / 9)


def test_a_measure_is_not_asked_under_autocast():
    R = tower(Everywhere(rules.ZPlus()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(QueryError, match=r"within torch\.autocast"):
            R.heatmap()
        with torch.autocast("cpu", enabled=False):
            R.heatmap()
