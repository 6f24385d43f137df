"""Pairs in one contraction, whatever lies between and beside: matrices, pooling, skips."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support.contraction import RULES, agree
from support.pairs import in_pairs
from torch import nn

import nrm
from nrm import rules
from nrm.composites import Composite, Everywhere, kind
from nrm.operators import MatrixProduct

pytestmark = pytest.mark.usefixtures("captured_once")


class OnTheRight(nn.Module):
    """Linear layers as products with matrices of their own, as GPT-2 has them."""

    def __init__(self, product):
        super().__init__()
        self.product = product
        self.weights = nn.ParameterList([torch.randn(4, 6), torch.randn(6, 5), torch.randn(5, 3)])
        self.biases = nn.ParameterList([torch.randn(6), torch.randn(5), torch.randn(3)])

    def forward(self, x):
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = self.product(torch.tanh(x), weight, bias)
        return x.flatten(1)


PRODUCTS = {
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "scaled": lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=-2),
    "mm": lambda x, w, b: x.mm(w),
    "matmul": lambda x, w, b: x @ w + b,
    "addmm of one row for each token": lambda x, w, b: torch.addmm(
        b, x.view(-1, x.shape[-1]), w
    ).view(*x.shape[:-1], w.shape[1]),
}


@cache
def on_the_right(name):
    torch.manual_seed(0)
    model = OnTheRight(PRODUCTS[name]).double().eval()
    shape = {"matmul": (2, 7, 4), "addmm of one row for each token": (1, 7, 4)}.get(name, (2, 4))
    return model, torch.randn(shape).double()


@in_pairs("name, rule, bias", PRODUCTS, RULES, ["drop", "input"])
def test_pairs_of_products_with_a_matrix(name, rule, bias):
    model, x = on_the_right(name)
    R = nrm.Explainer(model, Everywhere(RULES[rule]), bias=bias)(x, target=1)
    products = [op for op in R.graph.operations if isinstance(op.operator, MatrixProduct)]
    first, second, third = (product.output.name for product in products)
    agree(R, first, second)
    agree(R, second, third)
    if x.dim() == 2:
        agree(R, "input", first)


def test_a_matrix_on_the_left_mixes_positions():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.w = nn.Linear(3, 4), nn.Linear(20, 2), torch.randn(5, 6)

        def forward(self, x):
            return self.b(torch.relu(self.w @ self.a(x)).flatten(1))

    torch.manual_seed(0)
    model = Mixed()
    model.w = model.w.double()
    R = nrm.Explainer(model.double().eval(), rules.Gamma(0.25))(
        torch.randn(2, 6, 3).double(), target=0
    )
    agree(R, "a", ":matmul", contracts=False)


@cache
def pooled_linear(size):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(size),
        nn.Flatten(),
        nn.LazyLinear(6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )
    x = torch.rand(2, 2, 6, 6)
    model(x)
    return model.double().eval(), x.double()


@in_pairs("rule, size, bias", RULES, [1, (2, 3)], ["drop", "input"])
def test_pairs_across_a_pooling_and_a_linear_layer(rule, size, bias):
    model, x = pooled_linear(size)
    R = nrm.Explainer(model, Everywhere(RULES[rule]), bias=bias)(x, target=0)
    for lower in ("0", "1", "2"):
        agree(R, lower, "4")
        agree(R, lower, "5")
    agree(R, "2", "0", contracts=False)  # nothing between that joins channels
    agree(R, "3", "input", contracts=size == 1)


class Residual(nn.Module):
    """A branch beside a skip connection between two convolutions, and a gate."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.gate, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 2)
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        h = torch.relu(self.b(x) + x)
        h = self.c(h * torch.sigmoid(self.gate(x)))
        return self.head(F.avg_pool2d(h, 2).flatten(1))


@cache
def residual():
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 2, 6, 6)
    model(x)
    return model.double().eval(), x.double()


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize("rule", RULES)
def test_what_flows_past_a_skip_connection_is_left_out(rule, bias):
    model, x = residual()
    composite = Composite([(kind("product"), rules.Uniform())], RULES[rule])
    R = nrm.Explainer(model, composite, bias=bias)(x, target=0)
    agree(R, "b", "c")
    agree(R, "gate", "c")
    agree(R, ":mul", ":avg_pool2d")
    agree(R, "a", "c", contracts=False)  # over the branch and beside it
