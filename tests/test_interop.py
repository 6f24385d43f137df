"""nrm behind captum's and Quantus' interfaces, driven by those libraries themselves."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nrm
from nrm.composites import EpsilonPlus, LRPZero
from nrm.errors import InputError, QueryError, TargetError


class Chain(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(20, 3),
        )  # fmt: skip


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, 1)

    def forward(self, x, y, factor=1.0):
        return self.head(torch.relu(self.left(x) + factor * self.right(y)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Chain().eval()


@pytest.fixture(scope="module")
def x():
    return torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def test_a_missing_library_is_named(monkeypatch):
    pytest.importorskip("captum", reason="needs captum")
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.delitem(sys.modules, "nrm.interop.captum", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"nrm\[captum\]"):
        importlib.import_module("nrm.interop.captum")


# -- captum --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captum(torchvision_models):
    pytest.importorskip("captum", reason="needs captum")
    return importlib.import_module("nrm.interop.captum")


def test_captum_attributes_in_units_of_the_output(captum, model, x):
    R = nrm.Explainer(model, EpsilonPlus())(x, target=2)
    lrp = captum.LRP(model, EpsilonPlus())
    found, delta = lrp.attribute(x, target=2, return_convergence_delta=True)
    torch.testing.assert_close(found, R.heatmap() * R.scale.view(-1, 1, 1, 1))
    torch.testing.assert_close(found.sum((1, 2, 3)), model(x)[:, 2].detach())
    torch.testing.assert_close(delta, torch.zeros(4), atol=1e-5, rtol=0)
    shares = captum.LRP(model, EpsilonPlus(), scale="normalized").attribute(x, [2])
    torch.testing.assert_close(shares, R.heatmap())


def test_captum_takes_sets_and_conditions(captum, model, x):
    R = nrm.Explainer(model, EpsilonPlus())(x, target=2)
    a, b = nrm.channels("0", 1, 2), nrm.channels("2", 3)
    lrp = captum.LRP(model, EpsilonPlus(), scale="normalized")
    torch.testing.assert_close(lrp.attribute(x, 2, sets=[a, b]), R.heatmap(a, b))
    torch.testing.assert_close(lrp.attribute(x, 2, sets=a), R.heatmap(a))
    torch.testing.assert_close(lrp.attribute(x, 2, sets=a, given=b), R.heatmap(a, given=b))
    for layer in (model[2], "2"):
        one = captum.LayerLRP(model, layer, EpsilonPlus(), scale="normalized")
        torch.testing.assert_close(one.attribute(x, 2, sets=a), R.marginal("2", a))
    one = captum.LayerLRP(model, model[0], EpsilonPlus())
    wide = R.scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(one.attribute((x,), 2, given=b), R.marginal("0", given=b) * wide)
    with pytest.raises(QueryError, match="no module of Chain"):
        captum.LayerLRP(model, nn.Linear(1, 1))


def test_captum_targets(captum, model, x):
    lrp = captum.LRP(model, EpsilonPlus())
    each = [0, 2, 1, 1]
    expected = torch.cat([lrp.attribute(x[i : i + 1], k) for i, k in enumerate(each)])
    for target in (each, torch.tensor(each), [(k,) for k in each]):
        torch.testing.assert_close(lrp.attribute(x, target), expected)
    with pytest.raises(TargetError, match="target="):
        lrp.attribute(x)


def test_captum_reads_targets_as_captum_does(captum, model, x):
    """What nrm would take for one target of each sample is a place in the output there."""
    lrp = captum.LRP(model, EpsilonPlus())
    one = lrp.attribute(x, 1)
    for target in ((1,), torch.tensor(1), torch.tensor([1]), torch.tensor([[1]]), np.int64(1)):
        torch.testing.assert_close(lrp.attribute(x, target), one)
    for target in ((1, 2, 0, 1), [1, 2], torch.tensor([1, 2]), (1, 2), [(1, 2)] * 4, 3, -1):
        with pytest.raises(TargetError):
            lrp.attribute(x, target)
    wide = nn.Sequential(nn.Linear(2, 6), nn.Unflatten(1, (2, 3))).eval()
    two = torch.rand(2, 2, generator=torch.Generator().manual_seed(2))
    with pytest.raises(TargetError, match="a tuple of 2 ints"):
        captum.LRP(wide).attribute(two, [1, 2])  # not the neuron (1, 2)
    with pytest.raises(InputError, match="a tensor or a tuple of them"):
        captum.LRP(wide).attribute([two], (1, 2))
    from captum.attr import InputXGradient

    for target in ((1, 2), [(1, 2), (0, 1)]):
        expected = InputXGradient(wide).attribute(two.clone().requires_grad_(), target)
        found = captum.LRP(wide, LRPZero(), bias="input").attribute(two, target)
        torch.testing.assert_close(found, expected)


def test_captum_several_inputs_and_further_arguments(captum):
    torch.manual_seed(3)
    model = TwoInputs().double().eval()
    x, y = torch.rand(5, 3).double(), torch.rand(5, 2).double()
    lrp = captum.LRP(model, LRPZero(), bias="input")
    found, delta = lrp.attribute((x, y), None, 2.0, return_convergence_delta=True)
    R = nrm.Explainer(model, LRPZero(), bias="input")(x, y, 2.0)
    assert isinstance(found, tuple)
    torch.testing.assert_close(found[0], R.heatmap(at="x") * R.scale[:, None])
    torch.testing.assert_close(found[1], R.heatmap(at="y") * R.scale[:, None])
    torch.testing.assert_close(delta, sum(R.biases().values()) * R.scale)
    (alone,) = lrp.attribute((x,), additional_forward_args=(y, 2.0))
    torch.testing.assert_close(alone, found[0])
    tokens = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 1)).eval()
    with pytest.raises(InputError, match="integers"):
        captum.LRP(tokens).attribute(torch.tensor([[1, 2]]))


def test_captums_own_tools_work(captum, model, x):
    from captum.attr import NoiseTunnel
    from captum.metrics import infidelity, sensitivity_max

    lrp = captum.LRP(model, EpsilonPlus())
    plain, delta = NoiseTunnel(lrp).attribute(
        x, target=2, nt_samples=3, stdevs=0.0, return_convergence_delta=True
    )
    torch.testing.assert_close(plain, lrp.attribute(x, 2))
    assert delta.abs().max() < 1e-5
    smooth = NoiseTunnel(captum.LayerLRP(model, model[2], EpsilonPlus())).attribute(
        x, target=2, nt_samples=4, nt_samples_batch_size=2, stdevs=0.1
    )
    assert smooth.shape == (4, 5, 2, 2)
    torch.manual_seed(0)
    sensitivity = sensitivity_max(lrp.attribute, x, target=2, n_perturb_samples=2)
    assert sensitivity.shape == (4,)
    assert bool((sensitivity > 0).all())

    def one_pixel_off(inputs):
        step = torch.zeros_like(inputs)
        step[..., 0, 0] = inputs[..., 0, 0]
        return step, inputs - step

    # LRP-0 of a linear model is exactly the drop in its output.
    linear = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval()
    exact = captum.LRP(linear, LRPZero(), bias="input").attribute(x, 1)
    error = infidelity(linear, one_pixel_off, x, exact / x, target=1)
    torch.testing.assert_close(error, torch.zeros(4), atol=1e-9, rtol=0)


def test_the_pages_examples_run(captum):
    """The Python blocks of docs/methods.md, one after the other."""
    torch.manual_seed(0)
    names = {
        "model": nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(96, 4),
        ).eval(),
        "images": torch.rand(5, 3, 8, 8),
        "labels": np.array([0, 1, 2, 3, 1]),
    }  # fmt: skip
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    blocks = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    assert len(blocks) == 5
    for block in blocks:
        if "import quantus" not in block:
            exec(block, names)
    assert names["heatmaps"].shape == (3, 5, 3, 8, 8)
    assert names["indices"].shape == (3, 6)


# -- Quantus -------------------------------------------------------------------------------------


def test_quantus_explanations_are_arrays(model, x):
    from nrm.interop.quantus import Explain, explain_func

    y = np.array([0, 2, 1, 1])
    R = nrm.Explainer(model, EpsilonPlus())(x, target=torch.tensor(y))
    a = nrm.channels("2", 3)
    shares = {"composite": EpsilonPlus(), "scale": "normalized"}
    found = explain_func(model, x.double().numpy(), y, device="cpu", **shares)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, R.heatmap().numpy(), rtol=1e-4, atol=1e-6)
    explain = Explain(EpsilonPlus(), sets=[a])
    expected = (R.heatmap(a) * R.scale.view(-1, 1, 1, 1)).numpy()
    for _ in range(2):
        np.testing.assert_allclose(explain(model, x.numpy(), y), expected, rtol=1e-4, atol=1e-6)
    other = Chain().eval()
    again = explain(other, x.numpy(), y)
    np.testing.assert_allclose(again, Explain(EpsilonPlus(), sets=[a])(other, x, y))


def negative(seed=0):
    """A linear model whose logits are negative, its weights of both signs; and pictures."""
    torch.manual_seed(seed)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False)).eval()
    nn.init.uniform_(linear[1].weight, -2, 0.5)
    x = torch.rand(5, 1, 4, 4)
    assert bool((linear(x) < 0).all())
    return linear, x, np.array([0, 1, 0, 1, 1])


def test_quantus_explanations_are_in_units_of_the_output():
    """What speaks for a negative logit is positive: of a linear model, weight times input."""
    from nrm.interop.quantus import Explain, explain_func

    linear, x, y = negative()
    rows = linear[1].weight.detach()[torch.as_tensor(y)].view(5, 1, 4, 4)
    for found in (
        Explain(LRPZero())(linear, x.numpy(), y),
        explain_func(linear, x.numpy(), y.astype(float), composite=LRPZero()),
    ):
        np.testing.assert_allclose(found, (rows * x).numpy(), rtol=1e-5)
    shares = Explain(LRPZero(), scale="normalized")(linear, x.numpy(), y)
    np.testing.assert_allclose(shares.sum((1, 2, 3)), 1, rtol=1e-5)
    assert (np.sign(shares) == -np.sign((rows * x).numpy())).all()


@pytest.mark.parametrize("adapter", ["captum", "captum, of a layer", "quantus", "pyg"])
def test_every_adapter_speaks_in_units_of_the_output(adapter, request):
    linear, x, y = negative(3)
    logits = linear(x).detach()[torch.arange(5), torch.as_tensor(y)]
    if adapter.startswith("captum"):
        captum = request.getfixturevalue("captum")
        lrp = captum.LRP(linear) if adapter == "captum" else captum.LayerLRP(linear, "0")
        found = lrp.attribute(x, y.tolist()).flatten(1).sum(1)
    elif adapter == "quantus":
        from nrm.interop.quantus import Explain

        found = torch.as_tensor(Explain()(linear, x.numpy(), y)).flatten(1).sum(1)
    else:
        geometric = pytest.importorskip("torch_geometric", reason="needs torch_geometric")
        from nrm.interop.pyg import RelevanceExplainer

        class OfNodes(nn.Module):
            def forward(self, x, edge_index):
                return linear(x)

        explainer = geometric.explain.Explainer(
            OfNodes().eval(), RelevanceExplainer(), explanation_type="phenomenon",
            node_mask_type="attributes",
            model_config={
                "mode": "multiclass_classification", "task_level": "node", "return_type": "raw",
            },
        )  # fmt: skip
        edges = torch.zeros(2, 1, dtype=torch.long)
        mask = explainer(x.flatten(1), edges, target=torch.as_tensor(y)).node_mask
        found = mask.sum(1)
    torch.testing.assert_close(found, logits)


def test_quantus_finds_a_linear_model_faithful(torchvision_models):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantus = pytest.importorskip("quantus", reason="Quantus is not installed")
        from nrm.interop.quantus import Explain

        linear, x, y = negative()
        metric = quantus.FaithfulnessCorrelation(
            nr_runs=10, subset_size=4, perturb_baseline=0.0, disable_warnings=True,
            display_progressbar=False,
        )  # fmt: skip
        batch = {"model": linear, "x_batch": x.numpy(), "y_batch": y, "device": "cpu"}
        found = metric(**batch, explain_func=Explain(LRPZero()))
    np.testing.assert_allclose(found, 1, rtol=1e-4)


def test_quantus_metrics_run(torchvision_models, model, x):
    """Quantus needs packages of 300 MB that nothing else here does: run where it is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantus = pytest.importorskip("quantus", reason="Quantus is not installed")
        from nrm.interop.quantus import Explain, explain_func

        batch = {"model": model, "x_batch": x.numpy(), "y_batch": np.array([0, 2, 1, 1])}
        quiet = {"disable_warnings": True, "display_progressbar": False}
        options = {"composite": EpsilonPlus()}
        for metric in (quantus.Sparseness(**quiet), quantus.Complexity(**quiet)):
            scores = metric(
                **batch, explain_func=explain_func, explain_func_kwargs=options, device="cpu"
            )
            assert len(scores) == 4
            assert np.isfinite(scores).all()
        explain = Explain(EpsilonPlus())
        sensitive = quantus.MaxSensitivity(nr_samples=2, **quiet)(**batch, explain_func=explain)
        assert np.isfinite(sensitive).all()
        flipped = quantus.PixelFlipping(features_in_step=6, **quiet)(**batch, explain_func=explain)
        assert np.isfinite(flipped).all()
        randomised = quantus.MPRT(skip_layers=False, **quiet)(**batch, explain_func=explain)
        assert "2" in randomised
