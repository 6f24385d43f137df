"""Small things worked out by hand, which only a value can tell from what is nearly right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import oracle as o
from support.networks import NETWORKS, make
from torch import Tensor, nn

import nrm
from nrm import rules
from nrm.composites import Everywhere
from nrm.errors import InputError, UnsupportedOperatorError


class Function(nn.Module):
    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


# -- a constant that is taken from something -------------------------------------------------------


@pytest.mark.parametrize("rule", ["zero", "messages", "flat"])
@pytest.mark.parametrize("swapped", [False, True])
def test_what_is_subtracted_counts_with_its_sign(swapped: bool, rule: str) -> None:
    """`x - c` and `c - x` with c = 2, where c is a leaf like any other bias: 5 / 3 and -2 / 3."""
    c = torch.tensor([2.0, 2.0, 2.0]).double()
    model = Function(lambda x: c - x if swapped else x - c).eval()
    chosen = {"zero": rules.Zero(), "messages": rules.Epsilon(1e-30), "flat": rules.Flat()}[rule]
    x = torch.tensor([[1.0, 5.0, -1.0]]).double()
    R = nrm.Explainer(model, Everywhere(chosen), bias="input")(x, target=1)
    (share,) = R.biases().values()
    taken, left = (0.5, 0.5) if rule == "flat" else (5 / 3, -2 / 3)
    torch.testing.assert_close(R.heatmap(), torch.tensor([[0.0, taken, 0.0]]).double())
    torch.testing.assert_close(share, torch.tensor([left]).double())
    if rule != "flat":
        raw = R.heatmap(normalized=False)[0, 1] / R.scale
        torch.testing.assert_close(raw, torch.tensor([-5.0 if swapped else 5.0]).double())


# -- occlusion through a padding that is wider on one side -----------------------------------------


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(2, 2, 2, padding="same"), (2, 4)),
        (lambda: nn.Conv1d(2, 4, 4, padding="same", groups=2), (2, 5)),
        (lambda: nn.Conv2d(1, 2, (2, 3), padding="same", dilation=(1, 2)), (1, 3, 5)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
def test_occlusion_through_an_even_kernel_with_same_padding(layer, shape, bias) -> None:  # type: ignore[no-untyped-def]
    """`phi(z_j) - phi(z_j - z_ij)` of every connection, which derivatives find."""
    torch.manual_seed(0)
    conv = layer().double()
    model = nn.Sequential(conv, nn.Softplus()).eval()
    x = torch.randn(1, *shape).double()
    z = conv(x).detach()
    weights = torch.autograd.functional.jacobian(conv, x).reshape(z.numel(), x.numel())
    contributions = weights * x.flatten()
    lost = F.softplus(z.flatten())[:, None] - F.softplus(z.flatten()[:, None] - contributions)
    explainer = nrm.Explainer(model, Everywhere(rules.Occlusion()), bias=bias, head="keep")
    added = conv.bias.detach().repeat_interleave(z[0, 0].numel())
    lost_bias = F.softplus(z.flatten()) - F.softplus(z.flatten() - added)
    for j in range(z.numel()):
        target = tuple(int(i) for i in torch.unravel_index(torch.tensor(j), z.shape[1:]))
        R = explainer(x, target=target)
        total = lost[j].sum() + (lost_bias[j] if bias == "input" else 0)
        torch.testing.assert_close(R.heatmap().flatten(), lost[j] / total)


# -- sums over indices onto something --------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_scattering_onto_a_base_that_depends_on_the_input(reduce: str) -> None:
    """With itself, the base is a parent; over it, what no index reaches would be: refused."""
    index = torch.tensor([[0, 2, 2, 0]])

    def onto(x: Tensor, include: bool) -> Tensor:
        base, added = x[:, :4], x[:, 4:]
        at = index.expand(len(x), -1)
        return base.scatter_reduce(1, at, added, reduce, include_self=include)

    x = torch.tensor([[3.0, 5.0, 7.0, 9.0, 1.0, 2.0, 4.0, 8.0]]).double()
    explainer = nrm.Explainer(Function(lambda x: onto(x, True)).eval(), rules.Zero())
    for j in range(4):
        here = torch.zeros(8).double()
        here[j] = x[0, j]
        here[4:][index[0] == j] = x[0, 4:][index[0] == j]
        R = explainer(x, target=j)
        torch.testing.assert_close(R.output, onto(x, True))
        torch.testing.assert_close(R.heatmap()[0], here / here.sum())
    with pytest.raises(UnsupportedOperatorError, match="writes over"):
        nrm.Explainer(Function(lambda x: onto(x, False)).eval(), rules.Zero())(x, target=0)


@pytest.mark.parametrize("bias", ["drop", "input"])
def test_scattering_onto_constants(bias: str) -> None:
    """A constant base that does not count is no bias of what is written over it."""
    index, base = torch.tensor([[0, 2, 2, 0]]), torch.tensor([[3.0, 5.0, 7.0]]).double()
    for include in (False, True):

        def function(x: Tensor, include: bool = include) -> Tensor:
            size = len(x), -1
            return base.expand(size).scatter_reduce(
                1, index.expand(size), x, "mean", include_self=include
            )

        x = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).double()
        R = nrm.Explainer(Function(function).eval(), rules.Zero(), bias=bias)(x, target=2)
        whole = 6.0 + (7.0 if include and bias == "input" else 0.0)
        expected = torch.tensor([[0.0, 2.0, 4.0, 0.0]]).double() / whole
        torch.testing.assert_close(R.heatmap(), expected)


# -- what is called a mask -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mask", "masks", "Masks", "key_mask", "masked", "masks_of", "unmask"]
)
def test_inputs_called_masks_take_no_relevance(name: str) -> None:
    """`mask`, `masks` and what ends in `_mask`; anything else is an input like others."""
    given: dict[str, type] = {}
    exec(  # an argument of that name
        f"class Net(nn.Module):\n    def forward(self, x, {name}):\n        return x + {name}",
        {"nn": nn},
        given,
    )
    x, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    R = nrm.Explainer(given["Net"]().eval(), rules.Zero())(x, other, target=0)
    is_mask = name in ("mask", "masks", "Masks", "key_mask")
    assert [v.name for v in R.graph.inputs] == (["x"] if is_mask else ["x", name])
    assert float(R("x")) == pytest.approx(1.0 if is_mask else 0.25)


# -- thresholds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_inputs_may_leave_a_box_by_what_rounding_does(size: float) -> None:
    """By a ten-thousandth of its width, on either side; what is outside counts as on the edge."""
    model = nn.Linear(2, 1, bias=False).eval()
    model.weight.data = torch.tensor([[1.0, -2.0]])
    explainer = nrm.Explainer(model, rules.ZBox(-size, size))
    for off, fits in ((0.5e-4, True), (1.9e-4, True), (2.1e-4, False), (1e-2, False)):
        for x in ([1 + off, 0.5], [0.5, -1 - off]):
            x = torch.tensor([x]) * size
            if not fits:
                with pytest.raises(InputError, match="ZBox"):
                    explainer(x, target=0).heatmap()
                continue
            # a w - low w+ - high w-, and no less than zero for a beyond its bound
            inside = x.clamp(-size, size)
            made = torch.stack([inside[0, 0] + size, 2 * (size - inside[0, 1])])
            found = explainer(x, target=0).heatmap()[0]
            torch.testing.assert_close(found, made / made.sum(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_epsilon_splits_what_lies_within_it_evenly(sign: int) -> None:
    model = nn.Linear(2, 1, bias=False).double().eval()
    for excess, vanishes in ((0.09, True), (0.1, True), (0.11, False)):
        model.weight.data = torch.tensor([[1.0, -1.0]]).double()
        x = sign * torch.tensor([[1.0 + excess, 1.0]]).double()
        if excess == 0.1:
            x = sign * torch.tensor([[1.125, 1.0]]).double()  # 1 / 8 exactly
        epsilon = 0.125 if excess == 0.1 else 0.1
        R = nrm.Explainer(model, rules.Epsilon(epsilon))(x, target=0)
        total = float(x[0, 0] - x[0, 1])
        expected = [0.5, 0.5] if vanishes else [float(x[0, 0]) / total, -float(x[0, 1]) / total]
        assert R.heatmap()[0].tolist() == pytest.approx(expected)


def test_columns_that_are_negative_are_counted_without_those_that_vanish() -> None:
    """Of what a message meets: columns of sum -3, of sum 2, and one whose contributions cancel."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 3, bias=True), nn.Linear(3, 1, bias=False)
            self.a.weight.data = torch.tensor([[1.0, -4.0], [3.0, -1.0], [1.0, -1.0]])
            self.a.bias.data = torch.tensor([4.0, 1.0, 5.0])  # outputs 1, 3, 5
            self.b.weight.data = torch.tensor([[5.0, 5.0, -2.0]])  # 5 + 15 - 10 = 10

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    R = nrm.Explainer(Net().double().eval(), rules.Zero(), bias="drop")(
        torch.ones(1, 2).double(), target=0
    )
    torch.testing.assert_close(R.marginal("a"), torch.tensor([[0.5, 1.5, -1.0]]).double())
    (met,) = [c for c in R.diagnostics().columns if c.address == "a"]
    assert met.negative == pytest.approx(0.5)
    assert met.nearly_zero == pytest.approx(1.0)  # the one that cancels, by its absolute size
    assert met.vanished == 0  # its contributions cancel, they do not vanish
    assert met.smallest == 0
    expected = 0.5 * torch.tensor([1, -4]) / -3 + 1.5 * torch.tensor([3, -1]) / 2 - 0.5
    torch.testing.assert_close(R.heatmap()[0], expected.double())


# -- sets within sets, and unnormalised walks, at layers in the middle -----------------------------


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_marginals_of_layers_in_the_middle(network: str, normalized: bool) -> None:
    """`within=` and `normalized=False` where nothing sums to one, at every layer."""
    case = make(network, "gamma", True, seed=11)
    R = nrm.Explainer(case.model, case.composite, bias="input")(*case.inputs, target=1)
    net, rng = case.oracles[0], np.random.default_rng(3)
    walks = net.walks(1, normalized)
    size = max(1.0, sum(abs(r) for _, r in walks))
    names = [name for name in net.values if not name.endswith(".bias")]

    def drawn(name: str) -> tuple[nrm.formulas.NeuronSet, set[o.Neuron]]:
        count = len(net.values[name])
        chosen = rng.choice(count, rng.integers(1, count + 1), replace=False)
        mask = torch.zeros(count, dtype=torch.bool)
        mask[chosen] = True
        shape = R.forward_pass.shape(R.graph.variable(name))[1:]
        return nrm.mask(name, mask.view(shape)), {(name, int(i)) for i in chosen}

    for layer in names:
        (a, in_a), (b, in_b) = (drawn(str(rng.choice(names))) for _ in range(2))
        (only,) = {name for name, _ in in_b}
        closed = {(only, i) for i in range(len(net.values[only]))} - in_b
        found = R.marginal(layer, a, within=b, normalized=normalized)[0].flatten()
        allowed = [(visited, r) for visited, r in walks if not visited & closed]
        expected = o.marginal(allowed, layer, len(net.values[layer]), in_a)
        np.testing.assert_allclose(found, expected, atol=1e-10 * size, rtol=0, err_msg=layer)
        found = R.marginal(layer, a, normalized=normalized)[0].flatten()
        expected = o.marginal(walks, layer, len(net.values[layer]), in_a)
        np.testing.assert_allclose(found, expected, atol=1e-10 * size, rtol=0, err_msg=layer)
