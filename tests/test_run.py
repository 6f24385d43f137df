"""The interpreter: values at nodes, changes, copies, derivatives, and what it lets go."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from nrm.capture.call import ModelCall
from nrm.capture.export import capture
from nrm.capture.nodes import Captured, ancestors, dependents
from nrm.capture.run import Copies, Folding, Interpreter, Plan, evaluate, find_layouts, given
from nrm.capture.store import Shared


class Block(nn.Module):
    """A convolution with a norm, two branches that meet, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(3 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        h = self.left(h) + torch.tanh(self.right(h))
        return self.head(self.pool(h).flatten(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    block = Block().double()
    block.norm.running_mean.normal_()
    block.norm.running_var.uniform_(0.5, 2.0)
    return block.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def captured_of(model: nn.Module, x: Tensor) -> Captured:
    return capture(ModelCall(model, (x,), {}, None), 0)


def node_of(captured: Captured, name: str) -> Node:
    """The first node of a module's operator."""
    return next(n for n in captured.graph.nodes if n.op == "call_function" and name in n.name)


def all_values(captured: Captured, inputs: list[Tensor]) -> dict[Node, Any]:
    values: dict[Node, Any] = {}

    def keep(node: Node, value: Any) -> Any:
        values[node] = value
        return value

    evaluate(captured, inputs, change=keep)
    return values


def test_values_at_nodes_are_what_the_modules_compute(model: nn.Module, x: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    for name in ("left", "right", "pool", "head"):  # the norm is folded into the convolution
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, output.detach())
        )
    expected = model(x).detach()
    captured = captured_of(model, x)
    torch.testing.assert_close(evaluate(captured, [x]), expected)
    values = all_values(captured, [x])
    left, right = (n for n in values if "conv2d" in n.name and n is not node_of(captured, "conv2d"))
    found = {
        "left": left,
        "right": right,
        "pool": node_of(captured, "max_pool2d"),
        "head": node_of(captured, "linear"),
    }
    for name, node in found.items():
        torch.testing.assert_close(values[node], seen[name])
        torch.testing.assert_close(evaluate(captured, [x], node), seen[name])


def test_a_run_starts_from_any_nodes_that_are_given(model: nn.Module, x: Tensor) -> None:
    captured = captured_of(model, x)
    relu, output = node_of(captured, "relu"), captured.output
    changed = torch.rand_like(evaluate(captured, [x], relu))
    plan = Plan.of(captured.graph, [output], {relu, *captured.constants})
    assert relu in plan.given
    assert relu not in plan.nodes
    assert dependents(plan.nodes, [relu]) == {relu, *plan.nodes}  # nothing before it runs
    found = Interpreter(plan, captured.constants | {relu: changed}).compute()[output]
    assert isinstance(model, Block)
    h = model.left(changed) + torch.tanh(model.right(changed))
    torch.testing.assert_close(found, model.head(model.pool(h).flatten(1)).detach())


def test_what_takes_a_values_place_goes_on_from_there(model: nn.Module, x: Tensor) -> None:
    captured = captured_of(model, x)
    relu = node_of(captured, "relu")
    found = evaluate(captured, [x], change=lambda n, v: torch.zeros_like(v) if n is relu else v)
    assert isinstance(model, Block)
    zero = torch.zeros(1, 4, 6, 6).double()
    h = model.left(zero) + torch.tanh(model.right(zero))
    torch.testing.assert_close(found, model.head(model.pool(h).flatten(1)).detach())
    doubled = evaluate(captured, [x], change=lambda n, v: 2 * v if n in captured.inputs else v)
    torch.testing.assert_close(doubled, model(2 * x).detach())


def test_many_copies_are_what_each_is_alone(model: nn.Module, x: Tensor) -> None:
    captured = captured_of(model, x)
    values = all_values(captured, [x])
    wanted = [captured.output, *captured.inputs]
    copies = Copies(values, find_layouts(captured, wanted, [x], values))
    relu, pool = node_of(captured, "relu"), node_of(captured, "max_pool2d")
    assert copies.possible
    assert copies.axis(relu) == 0
    noise = torch.randn(3, 4 * 36, generator=torch.Generator().manual_seed(2)).double()
    rows = copies.rows(relu, copies.take(relu, values[relu], torch.zeros(3, dtype=torch.long)), 3)
    changed = copies.unrows(relu, rows + noise)
    torch.testing.assert_close(copies.rows(relu, changed, 3), values[relu].reshape(1, -1) + noise)
    plan = Plan.of(captured.graph, [captured.output, pool], {relu, *captured.constants})

    def run(value: Tensor) -> dict[Node, Any]:
        return Interpreter(plan, captured.constants | {relu: value}).compute()

    together = run(changed)
    for number in range(3):
        alone = run(copies.take(relu, changed, torch.tensor([number])))
        assert torch.equal(together[pool][number : number + 1], alone[pool])
        torch.testing.assert_close(
            together[captured.output][number : number + 1], alone[captured.output]
        )


def test_samples_that_mix_have_no_copies(x: Tensor) -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0, keepdim=True)).flatten(1).exp()

    captured = captured_of(Mixing().eval(), x)
    assert find_layouts(captured, [captured.output], [x], all_values(captured, [x])) == {}


def test_derivatives_are_those_of_the_model(model: nn.Module, x: Tensor) -> None:
    captured = captured_of(model, x)
    plan = Plan.of(captured.graph, [captured.output])
    leaf = x.clone().requires_grad_()
    plain = Interpreter(plan, given(captured, [leaf])).compute()[captured.output]
    assert not plain.requires_grad
    run = Interpreter(plan, given(captured, [leaf]), derivatives=True)
    (found,) = torch.autograd.grad(run.compute()[captured.output][0, 3], leaf)
    (expected,) = torch.autograd.grad(model(leaf)[0, 3], leaf)
    torch.testing.assert_close(found, expected)


def test_values_go_when_nothing_reads_them_any_more() -> None:
    chain = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(12))).eval()
    x = torch.randn(2, 6)
    captured = captured_of(chain, x)
    living: weakref.WeakSet[Any] = weakref.WeakSet()
    peak, count = 0, 0

    def watch(node: Node, value: Any) -> Any:
        nonlocal peak, count
        if node.op == "call_function":
            living.add(value)
            count, peak = count + 1, max(peak, len(living))
        return value

    evaluate(captured, [x], change=watch)
    assert count == 24
    assert peak <= 2  # an operator's operand and its result


def test_a_value_read_late_stays_until_then() -> None:
    class Skip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = x.exp()
            h = first
            for _ in range(5):
                h = h.tanh()
            return h + first

    x = torch.randn(2, 3)
    captured = captured_of(Skip().eval(), x)
    first, last = node_of(captured, "exp"), captured.output
    plan = Plan.of(captured.graph, [last])
    assert [node for node, dead in plan.release.items() if first in dead] == [last]
    assert set(plan.nodes) == ancestors([last])
    wanted = Plan.of(captured.graph, [first, last])
    assert all(first not in dead for dead in wanted.release.values())
    torch.testing.assert_close(Interpreter(wanted, given(captured, [x])).compute()[first], x.exp())


def test_what_no_input_changes_is_computed_once_for_all_captures(model: nn.Module) -> None:
    shared, folded = Shared(), []
    for size in (6, 6):
        captured = captured_of(model, torch.randn(1, 2, size, size).double())
        varying = dependents(captured.graph.nodes, captured.inputs)
        constant = ancestors([captured.output]) - varying
        folded.append(Folding(captured, constant, shared).compute())
    weights = [next(v for n, v in values.items() if "folded_weight" in n.name) for values in folded]
    assert weights[0] is weights[1]
    assert isinstance(model, Block)
    norm = model.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(weights[0], (model.conv.weight * scale.view(-1, 1, 1, 1)).detach())
