"""Slopes between two points: every row's adds up to what its operator changes, exactly."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
import torch
from support.operator_calls import EXAMPLES
from support.torch_release import UNDERIVED, skip_underived
from torch import Tensor

from nrm.errors import InputError, UnsupportedOperatorError
from nrm.operators import Call, Slot, fill, registered
from nrm.operators.propagation import Before, Setting
from nrm.operators.secants import change, chord, difference
from nrm.rules import Zero
from nrm.testing.prepared import Case, prepare

aten = torch.ops.aten

WITHOUT = {
    "aten.prod",
    "aten.cumprod",
    "aten.quantile",
    "aten.nanquantile",
    "aten.scatter.src",
    "aten.index_copy",
    "aten.index_put",
    "aten.masked_scatter",
}
"""Rows that say none: the last four have one parent for each neuron, and need none."""
BY_RANK = ("sort", "topk", "cummax", "cummin", "msort", "median", "kthvalue", "mode", "aminmax")


def adds_up_to(rise: Tensor, moves: list[Tensor]) -> Tensor:
    """`sum_i S_ji move_i`, by two transposed products."""
    probe = torch.ones_like(rise, requires_grad=True)
    slopes = torch.autograd.grad(rise, moves, probe, create_graph=True, materialize_grads=True)
    total = torch.stack([(s * m.detach()).sum() for s, m in zip(slopes, moves, strict=True)]).sum()
    if not total.requires_grad:
        return torch.zeros_like(rise)
    return torch.autograd.grad(total, probe, materialize_grads=True, allow_unused=True)[0]


def between(case: Case, before: list[Tensor], alphas: tuple[float, ...] = ()) -> Tensor:
    """How much `sum_i S_ji (a_i - a'_i)` and `y_j - y'_j` differ, at most."""
    outputs = [case.run(values) for values in (before, case.values)]
    low, high = (y[0] if isinstance(y, tuple | list) else y for y in outputs)
    setting = replace(case.setting, before=Before(before, low), alphas=alphas)
    moves = [change(x, y).requires_grad_() for x, y in zip(before, case.values, strict=True)]
    rise = change(low, high)
    found = difference(case.row, case.call, case.values, moves, setting).expand(rise.shape)
    return (adds_up_to(found, moves) - rise).abs().amax()


CALLS = [
    (name, example)
    for name, examples in EXAMPLES.items()
    if name.startswith("aten.") and name not in WITHOUT
    for example in examples
]


@pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:at..frobenius_norm")
@pytest.mark.parametrize(("name", "example"), CALLS, ids=lambda given: str(given)[:60])
def test_slopes_add_up_to_what_changes(name: str, example) -> None:
    skip_underived(name, *UNDERIVED)
    case = prepare(
        registered()[name], example.target, example.args, Zero(), False, name,
        options=example.options, carries=example.carries,
    )  # fmt: skip
    assert case.row.has_secant
    torch.manual_seed(zlib.crc32(str(example).encode()))
    for flipped in (0.0, 0.3):
        # Within the domains of roots and logarithms, and of either sign beside them.
        before = [v * (0.7 + 0.6 * torch.rand_like(v)) for v in case.values]
        before = [torch.where(torch.rand_like(v) < flipped, -v, v) for v in before]
        result = case.run(before)
        result = result[0] if isinstance(result, tuple | list) else result
        if not bool(result.isfinite().all()):
            continue
        try:
            off = between(case, before)
        except UnsupportedOperatorError:
            ordered = any(word in name for word in BY_RANK)
            assert ordered or "norm" in name  # of an order that is not two
            continue
        assert off <= 1e-9


def test_rows_without_slopes_are_those_that_are_known() -> None:
    assert {name for name, row in registered().items() if name in EXAMPLES and not (
        getattr(row, "choices", None) or row.has_secant
    )} <= WITHOUT  # fmt: skip


@pytest.mark.parametrize("alphas", [(0.5, 0.5), (0.9, 0.1), (0.0, 1.0)])
def test_factors_share_what_both_bring_about(alphas: tuple[float, float]) -> None:
    a, b = torch.randn(2, 3, 4).double(), torch.randn(2, 4, 5).double()
    row = registered()["aten.matmul"]
    case = prepare(row, aten.matmul.default, (a, b), Zero(), False, "matmul")
    before = [torch.randn_like(a), torch.randn_like(b)]
    assert between(case, before, alphas) <= 1e-12
    setting = replace(case.setting, before=Before(before, before[0] @ before[1]), alphas=alphas)
    moves = [change(x, y).requires_grad_() for x, y in zip(before, (a, b), strict=True)]
    rise = change(before[0] @ before[1], a @ b)
    found = difference(case.row, case.call, [a, b], moves, setting).expand(rise.shape)
    slopes = torch.autograd.grad(found.sum(), moves)
    taken = [(s * m.detach()).sum() for s, m in zip(slopes, moves, strict=True)]
    da, db = a - before[0], b - before[1]
    assert torch.isclose(taken[0], (da @ before[1] + alphas[0] * da @ db).sum())
    assert torch.isclose(taken[1], (before[0] @ db + alphas[1] * da @ db).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [aten.gelu, aten.tanh, aten.relu, aten.exp, aten.silu])
@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 0.1])
def test_a_chord_between_close_points_is_the_derivative(function, distance, dtype) -> None:
    point = torch.tensor([-3.0, -0.4, 0.3, 2.0], dtype=torch.float64)
    arguments = {a.name: a.default_value for a in function.default._schema.arguments}
    call = Call(function.default, arguments | {"self": Slot(0)})
    before, after = point.to(dtype), (point + distance).to(dtype)
    move = (after - before).requires_grad_()
    (found,) = torch.autograd.grad(chord(call, before, after, move).sum(), move)
    middle = ((before.double() + after.double()) / 2).requires_grad_()
    (slope,) = torch.autograd.grad(fill(call, [middle])().sum(), middle)
    tolerance = 20 * torch.finfo(dtype).eps ** (2 / 3) + distance**2
    assert torch.allclose(found.double(), slope, rtol=0, atol=tolerance * 30)


@pytest.mark.parametrize(
    "factor", [torch.tensor([True, False, True]), torch.tensor([2, 0, -3]), 3, 0.5], ids=str
)
def test_constant_factors_of_any_type(factor) -> None:
    x = torch.tensor([1.0, 2.0, 3.0]).double()
    for name, target in (("mul", aten.mul), ("div", aten.div)):
        if name == "div" and isinstance(factor, Tensor):
            continue  # by zero
        overload = target.Tensor if isinstance(factor, Tensor) else target.Scalar
        case = prepare(registered()[f"aten.{name}"], overload, (x, factor), Zero(), False, name)
        assert between(case, [x - torch.tensor([0.5, 1.0, -2.0])]) <= 1e-12


def test_a_kink_between_close_points_is_seen() -> None:
    before, after = torch.tensor([-1e-8]).double(), torch.tensor([3e-8]).double()
    relu = prepare(registered()["aten.relu"], aten.relu.default, (after,), Zero(), False, "relu")
    assert between(relu, [before]) <= 1e-20


def test_a_softmax_that_is_saturated_at_both_ends() -> None:
    row = registered()["aten.softmax"]
    low = torch.tensor([[200.0, 0.0, -torch.inf, 1.0]]).double()
    high = torch.tensor([[0.0, 200.0, -torch.inf, 1.0]]).double()
    call = Call(aten._softmax.default, {"self": Slot(0), "dim": -1, "half_to_float": False})
    setting = Setting("checked", Zero(), False, 2, before=Before([low], fill(call, [low])()))
    move = change(low, high).requires_grad_()
    rise = change(fill(call, [low])(), fill(call, [high])())
    found = difference(row, call, [high], [move], setting).expand(rise.shape)
    assert torch.allclose(adds_up_to(found, [move]), rise, atol=1e-12)
    assert torch.equal(move.detach()[0, 2:], torch.zeros(2).double())


def test_what_is_masked_at_one_point_alone_is_refused() -> None:
    with pytest.raises(InputError, match="mask"):
        change(torch.tensor([-torch.inf]), torch.tensor([1.0]))
