"""LRP as it was first written (appendix E): each rule with its own denominator.

Against the rules written out neuron by neuron, and against what other libraries print: captum and
zennit run here, iNNvestigate's presets and the LSTM reference by their formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm import composites, rules
from nrm.composites import Everywhere
from nrm.errors import QueryError

STABILIZER = 1e-3  # large, so that it shows


def stabilized(z: np.ndarray, by: float = STABILIZER) -> np.ndarray:
    return z + by * np.where(z < 0, -1.0, 1.0)


# -- the rules, written out: T~ over its denominator, `[parents and bias, neurons]` ----------------


def by_sum(terms: np.ndarray, by: float = STABILIZER) -> np.ndarray:
    return terms / stabilized(terms.sum(0), by)


def gamma_by_sign(z: np.ndarray) -> np.ndarray:
    sign = np.where(z.sum(0) < 0, -1.0, 1.0)
    return by_sum(sign * z + 0.25 * np.maximum(sign * z, 0))


def alpha_beta(z: np.ndarray) -> np.ndarray:
    return 2 * by_sum(np.maximum(z, 0)) - by_sum(np.minimum(z, 0))


def without_bias(terms: np.ndarray) -> np.ndarray:
    return by_sum(np.concatenate([terms[:-1], 0 * terms[-1:]]))


WRITTEN_OUT: dict[rules.Rule, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    rules.Zero(): lambda a, w: by_sum(a * w),
    rules.Epsilon(0.1): lambda a, w: by_sum(a * w, 0.1),
    rules.PlainGamma(0.5): lambda a, w: by_sum(a * (w + 0.5 * np.maximum(w, 0))),
    rules.Gamma(0.25): lambda a, w: gamma_by_sign(a * w),
    rules.ZPlus(): lambda a, w: by_sum(np.maximum(a * w, 0)),
    rules.AlphaBeta(2, 1): lambda a, w: alpha_beta(a * w),
    rules.Flat(): lambda a, w: without_bias(np.ones_like(w)),
    rules.WSquare(): lambda a, w: by_sum(w**2),
}


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double().eval()


def relevance(network: nn.Sequential, x: Tensor, share, target: int) -> dict[str, np.ndarray]:
    """What arrives at every layer of one sample, and at the biases: by the formula of a rule."""
    values = [x.numpy()]
    for layer in network:
        values.append(layer(torch.from_numpy(values[-1])).detach().numpy())
    R = np.zeros(3)
    R[target] = values[-1][target]
    arrived = {}
    for place in (4, 2, 0):
        layer = network[place]
        weights = layer.weight.detach().numpy().T
        with_bias = np.concatenate([weights, layer.bias.detach().numpy()[None]])
        a = np.append(values[place], 1.0)[:, None]
        parts = share(a, with_bias) @ R
        R, arrived[f"{place}.bias"] = parts[:-1], parts[-1]
        arrived["input" if place == 0 else str(place - 1)] = R
    return arrived


@pytest.mark.parametrize("rule", WRITTEN_OUT, ids=str)
def test_every_rule_divides_by_its_own_denominator(network, rule):
    x = torch.randn(2, 4, dtype=torch.float64)
    R = nrm.Explainer(network, Everywhere(rule), bias="input")(x, target=2)
    original = rules.Original(STABILIZER)
    for sample in range(2):
        wanted = relevance(network, x[sample], WRITTEN_OUT[rule], 2)
        for layer in ("input", "1", "3"):
            found = R.marginal(layer, normalized=original)[sample].numpy()
            np.testing.assert_allclose(found, wanted[layer], atol=1e-12, err_msg=layer)
        for bias in ("0.bias", "2.bias", "4.bias"):
            found = float(R(bias, normalized=original)[sample])
            assert found == pytest.approx(wanted[bias], abs=1e-12)


def test_dropped_biases_are_in_no_denominator(network):
    bare = copy.deepcopy(network[:1])
    nn.init.zeros_(bare[0].bias)
    x = torch.randn(1, 4, dtype=torch.float64)
    found = []
    for model in (network[:1].eval(), bare.eval()):  # one layer, from the same activations
        R = nrm.Explainer(model, Everywhere(rules.Epsilon(0.1)), bias="drop")(x, target=2)
        found.append(R.heatmap(normalized="original") / R.scale)
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)


def test_epsilon_absorbs_and_alpha_beta_keeps_its_sums():
    layer = nn.Linear(2, 1, bias=False).double().eval()
    layer.weight.data = torch.tensor([[1.0, 2.0]]).double()
    x = torch.ones(1, 2).double()
    R = nrm.Explainer(layer, Everywhere(rules.Epsilon(1.0)))(x)
    found = R.heatmap(normalized="original")
    torch.testing.assert_close(found, 3 * torch.tensor([[0.25, 0.5]]).double())
    R = nrm.Explainer(layer, Everywhere(rules.AlphaBeta(2, 1)))(x)  # nothing negative: twice
    found = R.heatmap(normalized=rules.Original(0))
    torch.testing.assert_close(found, torch.tensor([[2.0, 4.0]]).double(), atol=1e-12, rtol=0)


# -- queries ---------------------------------------------------------------------------------------


def test_sets_are_what_arrives_at_the_last_of_them(network):
    x = torch.randn(2, 4, dtype=torch.float64)
    R = nrm.Explainer(network, Everywhere(rules.Epsilon(0.1)), bias="input")(x, target=2)
    a, b = nrm.neurons("3", 1, 4), nrm.neurons("1", 0, 2, 3)
    arriving = R.marginal("1", a, normalized="original")
    torch.testing.assert_close(R(a, b, normalized="original"), arriving[:, [0, 2, 3]].sum(1))
    together = R.relevances(a, b, normalized="original")
    torch.testing.assert_close(together[0], R(a, normalized="original"))
    given = R(b, given=a, normalized="original")
    torch.testing.assert_close(given, R(a, b, normalized="original") / R(a, normalized="original"))
    # A heatmap knows of every formula: all is decided at the input.
    whole = R.heatmap(normalized="original")
    parts = (R.heatmap(f, normalized="original") for f in (a & b, a & ~b, ~a & b, ~a & ~b))
    torch.testing.assert_close(sum(parts), whole)
    masked = R.heatmap(within=a, normalized="original")
    torch.testing.assert_close(masked, R.heatmap(a, normalized="original"))
    condition = nrm.Condition(a, normalized=rules.Original(1e-6))
    torch.testing.assert_close(R(condition), R(a, normalized="original"))
    torch.testing.assert_close(R.heatmaps([a, condition], normalized="original")[0],
                               R.heatmap(a, normalized="original"))  # fmt: skip


def test_what_only_lossless_walks_have_is_refused(network):
    R = nrm.Explainer(network, bias="input")(torch.randn(1, 4, dtype=torch.float64))
    a = nrm.neurons("1", 0)
    asked: list[Callable[[], object]] = [
        lambda: R(~a, normalized="original"),
        lambda: R(within=a, normalized="original"),
        lambda: R.marginal("3", a, normalized="original"),
        lambda: R.outcomes(a, normalized="original"),
        lambda: R.plan(a, normalized="original"),
        lambda: R.conditionals(a, normalized="original"),
        lambda: R.additive(a, normalized="original"),
    ]
    for ask in asked:
        with pytest.raises(QueryError, match="under the original LRP"):
            ask()
    with pytest.raises(QueryError, match="normalized is True, False, 'original'"):
        R.heatmap(normalized="eq. 43")
    with pytest.raises(QueryError, match="say it once"):
        nrm.Condition(nrm.Condition(a, normalized="original"), normalized=False)
    with pytest.raises(ValueError, match="stabilizer"):
        rules.Original(-1.0)


# -- LSTM: the reference's formula, eps = 0.001 ----------------------------------------------------


class Cell(nn.Module):
    """An LSTM from its last state to two classes, as the reference has it: no output bias."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.out = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


def reference(model: Cell, x: np.ndarray, target: int, eps: float) -> np.ndarray:
    """`[steps, inputs]`: relevance passes the cell and the candidate alone, gates take none."""
    lstm, size = model.lstm, 4
    w, u = lstm.weight_ih_l0.detach().numpy(), lstm.weight_hh_l0.detach().numpy()
    bias = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach().numpy()
    h, c = [np.zeros(size)], [np.zeros(size)]
    steps = []
    for value in x:
        i, f, g, o = np.split(w @ value + u @ h[-1] + bias, 4)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        steps.append((i, f, g))
        c.append(f * c[-1] + i * np.tanh(g))
        h.append(o * np.tanh(c[-1]))
    out = model.out.weight.detach().numpy()[target]
    score = out @ h[-1]
    R_h, R_c = out * h[-1] / stabilized(score, eps) * score, np.zeros(size)
    found = np.zeros_like(x)
    W, U = w[2 * size : 3 * size], u[2 * size : 3 * size]
    for t in reversed(range(len(x))):
        i, f, g = steps[t]
        R_c = R_c + R_h
        share = R_c / stabilized(c[t + 1], eps)
        candidate = i * np.tanh(g) * share / stabilized(g, eps)
        R_c = f * c[t] * share
        found[t] = x[t] * (W.T @ candidate)
        R_h = h[t] * (U.T @ candidate)
    return found


def test_lstm_reference():
    """The stabiliser acts on what is added up, and not once more within each summand."""
    torch.manual_seed(0)
    model, eps = Cell().double().eval(), 1e-3
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    sums, out = composites.kind("sum"), composites.path("out")
    epsilon = rules.Epsilon(eps)
    composite = composites.Composite(((sums, epsilon), (out, epsilon)), default=rules.Zero())
    R = nrm.Explainer(model, composite, bias="input")(x, target=1)
    found = R.heatmap(normalized=rules.Original(0)).numpy()
    for sample in range(2):
        wanted = reference(model, x[sample].numpy(), 1, eps)
        np.testing.assert_allclose(found[sample], wanted, atol=1e-6 * np.abs(wanted).max())
