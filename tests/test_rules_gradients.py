"""Walks by gradients (section 3.5.3) against all walks, and written out."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from support import dense
from support.gradients import CURVED, Gradients
from support.networks import make
from support.pairs import in_pairs
from support.queries import check_queries
from torch import Tensor, nn

import nrm
from nrm import composites, rules
from nrm.errors import InputError, PositiveSumError, QueryError
from nrm.operators import LocalLinear, Propagation

pytestmark = pytest.mark.usefixtures("captured_once")

BIAS = ["drop", "input"]


GRADIENTS: dict[str, tuple[rules.Rule, float, int]] = {
    "local": (rules.LocalLinear(), 0.0, 0),
    "path": (rules.PathIntegrated(0.3, 3), 0.3, 3),
    "one step": (rules.PathIntegrated(steps=1), 0.0, 1),
}


@cache
def gradient_model(network: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(3)
    model = CURVED[network]().double().eval()
    return model, [torch.randn(2, *shape).double() for shape in model.inputs]


def gradient_case(network: str, bias_is_input: bool, start: float, steps: int):
    model, inputs = gradient_model(network)
    oracles = []
    for sample in range(2):
        net = Gradients(bias_is_input, start=start, steps=steps)
        model.describe([x[sample].numpy() for x in inputs], net)
        oracles.append(net)
    with torch.no_grad():
        expected = model(*inputs).numpy()
    found = np.stack([net.values[net.output] for net in oracles])
    np.testing.assert_allclose(found, expected, atol=1e-12)  # the description is right
    return model, inputs, oracles


@in_pairs("network, rule, bias", CURVED, GRADIENTS, BIAS)
def test_gradient_walks_equal_the_sum_over_walks(network, rule, bias):
    chosen, start, steps = GRADIENTS[rule]
    model, inputs, oracles = gradient_case(network, bias == "input", start, steps)
    check_queries(nrm.Explainer(model, chosen, bias=bias, head="keep"), inputs, oracles)


@pytest.mark.parametrize("network", CURVED)
def test_contributions_along_a_path_add_up_to_the_change(network):
    """Completeness: column sums converge to `y(x) - y(x')`, as the square of the step."""
    model, inputs, _ = gradient_case(network, False, 0.0, 0)
    moved = nrm.Explainer(model, rules.LocalLinear())(*inputs, target=0).graph
    operators = {op.address for op in moved.operations if isinstance(op.operator, LocalLinear)}
    errors: dict[str, list[float]] = {address: [] for address in operators}
    with torch.no_grad():
        values = [_values(model, moved, x) for x in (inputs[0], torch.zeros_like(inputs[0]))]
    for steps in (16, 32, 64):
        composite = composites.IntegratedGradients(steps=steps)
        R = nrm.Explainer(model, composite)(*inputs, target=0)
        for address in operators:
            operation = R.graph.variable(address).producer
            sums = R.forward_pass.propagations[operation].sums
            change = values[0][address] - values[1][address]
            errors[address].append(float((sums - change).abs().max()))
    for coarse, finer, finest in errors.values():
        assert finest <= max(0.3 * finer, 1e-12)
        assert finer <= max(0.3 * coarse, 1e-12)
    linear = [op for op in R.graph.operations if op.kind in ("linear", "conv")]
    for operation in linear:
        sums = dense.column_sums(R, operation)
        change = values[0][operation.address] - values[1][operation.address]
        torch.testing.assert_close(sums, change)


def _values(model: nn.Module, graph, x: Tensor) -> dict[str, Tensor]:
    """The values of all operations."""
    captured = graph.captured
    values = dict(captured.constants) | {captured.inputs[0]: x}
    for node in captured.graph.nodes:
        if node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return {v.name: values[v.node] for v in graph.variables if v.producer is not None}


def test_rectified_networks_along_a_path_are_lrp_on_differences():
    """`R(i|j) = w_ij (a_i - a'_i) / (z_j - z'_j)`, whatever the steps."""
    case = make("Residual", "zero", False, seed=5)
    (x,) = case.inputs
    baseline = torch.randn(3).double()
    found = [
        nrm.Explainer(case.model, composites.IntegratedGradients(baseline, steps))(x, target=1)
        for steps in (1, 5)
    ]
    torch.testing.assert_close(found[0].heatmap(), found[1].heatmap())
    from_zero = nrm.Explainer(case.model, composites.IntegratedGradients())(x, target=1)
    assert not torch.allclose(from_zero.heatmap(), found[0].heatmap())
    net, w = case.model, case.model.last.weight.detach()
    with torch.no_grad():
        h, start = ({}, {})
        for values, at in ((h, x), (start, baseline.expand_as(x))):
            handle = net.last.register_forward_hook(
                lambda m, i, out, v=values: v.update(a=i[0], z=out)
            )
            net(at)
            handle.remove()
    expected = w[1] * (h["a"] - start["a"]) / (h["z"] - start["z"])[:, 1:]
    torch.testing.assert_close(found[0].marginal(":add@1"), expected)


def test_local_linear_is_lrp_zero_where_there_are_only_sums_and_activations():
    case = make("Conv", "zero", True, seed=1)
    found, expected = (
        nrm.Explainer(case.model, composite)(*case.inputs, target=0)
        for composite in (composites.LocalLinear(), composites.CPLRP())
    )
    torch.testing.assert_close(found.heatmap(), expected.heatmap())
    torch.testing.assert_close(found.heatmap("b"), expected.heatmap("b"))


def test_everywhere_a_gradient_is_the_composite_of_that_name():
    model, inputs, _ = gradient_case("Attend", True, 0.0, 0)
    one = nrm.Explainer(model, rules.LocalLinear(), bias="input")(*inputs, target=0)
    other = nrm.Explainer(model, composites.LocalLinear())(*inputs, target=0)
    torch.testing.assert_close(one.heatmap(), other.heatmap())
    assert {"q", "k"} <= {v.name for v in one.graph.variables}  # no gate is left out


def test_operators_without_a_row_go_along_the_path_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(torch.lgamma(self.lin(x) + 4))

    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.rand(1, 2).double()
    explainer = nrm.Explainer(
        model, composites.IntegratedGradients(steps=200), fallback=LocalLinear()
    )
    R = explainer(x, target=0)
    operation = R.graph.variable(":lgamma").producer
    with torch.no_grad():
        change = torch.lgamma(model.lin(x) + 4) - torch.lgamma(model.lin(0 * x) + 4)
    torch.testing.assert_close(
        R.forward_pass.propagations[operation].sums, change, atol=1e-6, rtol=1e-6
    )


def test_baselines():
    case = make("TwoInputs", "zero", False, seed=1)
    x, y = case.inputs
    same = [
        composites.IntegratedGradients(b)
        for b in (
            0.5,
            np.float32(0.5),
            np.full(1, 0.5),
            {"y": 0.5, "x": torch.tensor(0.5)},
            {"x": torch.full((2,), 0.5), "y": np.full((2, 3), 0.5)[::-1]},
        )
    ]
    heat = [nrm.Explainer(case.model, c)(x, y, target=0).heatmap(at="y") for c in same]
    for other in heat[1:]:
        torch.testing.assert_close(heat[0], other)
    with pytest.raises(InputError, match=r"\(5,\) does not broadcast to 'x'"):
        nrm.Explainer(case.model, composites.IntegratedGradients(torch.ones(5)))(
            x, y, target=0
        ).heatmap(at="x")
    for wrong in ({"x": 0}, {"x": 0, "y": 0, "z": 0}, {"x": 0, "last": 0}, {}):
        given = ", ".join(map(repr, wrong)) or "none"
        with pytest.raises(InputError, match=f"given for {given}, and the inputs are 'x', 'y'"):
            nrm.Explainer(case.model, composites.IntegratedGradients(wrong))(x, y, target=0)
    for values in (float("nan"), np.array([0, np.inf]), {"x": 0, "y": torch.tensor(-np.inf)}):
        with pytest.raises(InputError, match="NaN or infinite"):
            rules.PathIntegrated(values)
    for values in ([0.0, 0.0], "x", None, {"x": {"y": 0}}):
        with pytest.raises(TypeError, match="a mapping from the names"):
            rules.PathIntegrated(values)
    with pytest.raises(ValueError, match="steps"):
        rules.PathIntegrated(steps=0)
    two = composites.Composite(
        [(composites.path("last"), rules.PathIntegrated(1.0))], rules.PathIntegrated()
    )
    with pytest.raises(QueryError, match="2 different paths"):
        nrm.Explainer(case.model, two)(x, y, target=0)
    at_baseline = nrm.Explainer(case.model, composites.IntegratedGradients({"y": y, "x": x}))(
        x, y, target=0
    )
    torch.testing.assert_close(at_baseline("x") + at_baseline("y"), torch.ones(2).double())


def test_equal_paths_are_one():
    def path(size: int = 3, steps: int = 4) -> rules.PathIntegrated:
        return rules.PathIntegrated({"x": 0, "y": np.zeros(size)}, steps)

    assert path() == path()
    assert len({path(), path(), path(4), path(steps=5), rules.PathIntegrated(0.0, 4)}) == 4
    assert rules.PathIntegrated(0, 4) == rules.PathIntegrated(np.float32(0), 4)
    assert rules.PathIntegrated(torch.zeros(2)) == rules.PathIntegrated(torch.zeros(2))
    assert rules.PathIntegrated(torch.zeros(2)) != rules.PathIntegrated(torch.ones(2))
    assert rules.PathIntegrated(torch.zeros(2)) != rules.PathIntegrated(0.0)
    case = make("TwoInputs", "zero", False, seed=1)
    twice = composites.Composite(
        [(composites.path("last"), rules.PathIntegrated(0.5, 4))], rules.PathIntegrated(0.5, 4)
    )
    one = composites.IntegratedGradients(0.5, 4)
    found, expected = (
        nrm.Explainer(case.model, c)(*case.inputs, target=0).heatmap(at="x") for c in (twice, one)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_baselines_by_name_reach_their_inputs(by_keyword):
    """Whatever the order: of the signature, of keywords, with embeddings and ignored inputs."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, ids, ignored, a, b):
            return self.head(self.words(ids).sum(1) + a + 2 * b)

    torch.manual_seed(0)
    model, ids = Net().double().eval(), torch.tensor([[1, 4, 4], [0, 2, 3]])
    ignored, a, b = (torch.randn(2, 3).double() for _ in range(3))
    starts = {"b": 0.3, "words": torch.randn(3).double(), "ignored": 0.0, "a": np.full(3, -0.2)}
    explainer = nrm.Explainer(model, composites.IntegratedGradients(starts))
    R = (
        explainer(ids, b=b, a=a, ignored=ignored, target=1)
        if by_keyword
        else explainer(ids, ignored, a, b, target=1)
    )
    with torch.no_grad():
        w = model.head.weight[1]
        parts = {
            "words": ((model.words(ids) - starts["words"]) * w).sum((1, 2)),
            "a": ((a + 0.2) * w).sum(1),
            "b": 2 * ((b - 0.3) * w).sum(1),
        }
    for name, part in parts.items():
        torch.testing.assert_close(R(name), part / sum(parts.values()))
    del starts["words"]
    with pytest.raises(InputError, match="Give one for each"):
        nrm.Explainer(model, composites.IntegratedGradients(starts))(ids, ignored, a, b)


def test_tokens_come_from_a_baseline_as_embeddings():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, ids):
            h = self.words(ids)
            return self.head((h * h).sum(1))

    torch.manual_seed(0)
    model, ids = Net().double().eval(), torch.tensor([[1, 4, 4], [0, 2, 3]])
    R = nrm.Explainer(model, composites.IntegratedGradients(0.25))(ids, target=1)
    with torch.no_grad():
        parts = (model.words(ids) ** 2 - 0.25**2) * model.head.weight[1]
    torch.testing.assert_close(R.tokens(), parts.sum(-1) / parts.sum((1, 2))[:, None])


@pytest.mark.parametrize("network", CURVED)
@pytest.mark.parametrize("rule", GRADIENTS)
def test_forward_messages_are_the_transpose(network, rule):
    model, inputs, _ = gradient_case(network, False, 0.0, 0)
    R = nrm.Explainer(model, GRADIENTS[rule][0], bias="input")(*inputs, target=0)
    for operation in R.graph.operations:
        propagation = R.forward_pass.propagations[operation]
        shapes = [R.forward_pass.shape(operand) for operand in operation.operands]
        masses = [torch.randn(1, *shape).double() for shape in shapes]
        message = torch.randn(1, *R.forward_pass.shape(operation.output)).double()
        pulled = propagation.pull(message.clone(), [True] * len(masses))
        pushed = propagation.push(masses, message.shape[1:])
        total = sum((p * m).sum() for p, m in zip(pulled, masses, strict=True))
        torch.testing.assert_close((pushed * message).sum(), total)


class OfTwo(nn.Module):
    """A function with a row or without one."""

    def __init__(self, without_row: bool):
        super().__init__()
        self.without_row = without_row

    def forward(self, x, y):
        return torch.lgamma(x + y + 1) if self.without_row else x * y


@pytest.mark.parametrize("along_path", [False, True])
@pytest.mark.parametrize("without_row", [False, True])
def test_strict_holds_for_derivatives(along_path, without_row):
    """Columns below zero: `x y` with factors of opposite sign, and lgamma where it falls."""
    model = OfTwo(without_row).double().eval()
    rule = rules.PathIntegrated(0.0, 4) if along_path else rules.LocalLinear()
    fallback = LocalLinear() if without_row else None
    good = [torch.full((1, 2), v).double() for v in (1.0, 3.0)]
    bad = [torch.full((1, 2), v).double() for v in ((0.1, 0.2) if without_row else (-1.0, 3.0))]
    for given, fails in ((good, False), (bad, True)):
        relevance = torch.ones(1, 2).double()
        explainer = nrm.Explainer(model, rule, strict=True, fallback=fallback)
        R = explainer(*given, output_relevance=relevance)
        if fails:
            with pytest.raises(PositiveSumError, match="2 neurons whose contributions by its"):
                R.heatmap(at="x")
        else:
            torch.testing.assert_close(R("x") + R("y"), torch.ones(1).double())
        loose = nrm.Explainer(model, rule, fallback=fallback)
        loose(*given, output_relevance=relevance).heatmap(at="x")
        operation = R.graph.output.producer
        shapes = [R.forward_pass.shape(operand) for operand in operation.operands]
        propagation = R.forward_pass.propagations[operation]
        propagation.push([torch.ones(1, *s).double() for s in shapes], relevance.shape)


def test_forward_messages_by_derivatives_look_at_columns_once(monkeypatch):
    """However many there are; where an operation pushes by itself, it finds the same."""
    case = make("Residual", "zero", False, seed=5)
    R = nrm.Explainer(case.model, rules.Zero())(*case.inputs, target=1)
    operation = R.graph.variable("last").producer
    propagation = R.forward_pass.propagations[operation]
    calls, pull = [], propagation.pull
    monkeypatch.setattr(propagation, "pull", lambda *a: calls.append(1) or pull(*a))
    shape = R.forward_pass.shape(operation.output)
    masses = [torch.randn(4, *R.forward_pass.shape(v)).double() for v in operation.operands]
    pushed = Propagation.push(propagation, masses, shape)
    assert len(calls) == 1
    rows = [Propagation.push(propagation, [m[k : k + 1] for m in masses], shape) for k in range(4)]
    torch.testing.assert_close(pushed, torch.cat(rows))
    torch.testing.assert_close(pushed, propagation.push(masses, shape))
    assert len(calls) == 5
