"""Tensors that are none of dense numbers: refused by name, or read as what they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm.errors import InputError, NeuronSetError, QueryError, TargetError


class Scaled(nn.Module):
    """A linear layer, its output times a second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, options: Any = None) -> Tensor:
        if options is None:
            return self.linear(x)
        return self.linear(x) * torch.as_tensor(options["by"])


@pytest.fixture(scope="module")
def explainer() -> nrm.Explainer:
    torch.manual_seed(0)
    return nrm.Explainer(Scaled().double().eval(), nrm.rules.Flat())


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(2, 3, generator=torch.Generator().manual_seed(1)).double()


def nested(x: Tensor, layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        return torch.nested.nested_tensor([x, x[:1]], layout=layout)


def csr(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a beta, says torch
        return x.to_sparse_csr()


def quantised(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8)


KINDS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (Tensor.to_sparse, r"is sparse \(torch.sparse_coo\).*x.to_dense\(\)"),
    "sparse rows": (csr, r"is sparse \(torch.sparse_csr\)"),
    "nested": (lambda x: nested(x, torch.strided), "is nested.*to_padded_tensor"),
    "jagged": (lambda x: nested(x, torch.jagged), "is nested.*to_padded_tensor"),
    "mkldnn": (lambda x: x.float().to_mkldnn(), "MKL-DNN"),
    "quantised": (quantised, r"is quantised.*dequantize"),
    "meta": (lambda x: x.to("meta"), "on the meta device"),
    "array": (Tensor.numpy, r"array \(2, 3\).*as_tensor"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_dense_tensor_is_refused(kind: str, explainer: nrm.Explainer, x: Tensor) -> None:
    make, message = KINDS[kind]
    with pytest.raises(InputError, match=message):
        explainer(make(x), target=0)
    with pytest.raises(InputError, match=message) as told:
        explainer(x, {"by": make(x)}, target=0)  # where a constant would be taken for it
    assert kind == "array" or "'options.by'" in str(told.value)


def test_models_without_values_are_refused(x: Tensor) -> None:
    with pytest.raises(InputError, match="meta device"):
        nrm.Explainer(Scaled().to("meta").eval())(x.float().to("meta"), target=0)


class Named(Tensor):
    """A subclass, as torchvision's pictures are."""


def test_dense_tensors_of_any_kind_are_read(explainer: nrm.Explainer, x: Tensor) -> None:
    expected = explainer(x, target=0).heatmap()
    with torch.inference_mode():
        inferred = x.clone()
    conjugate = torch.complex(torch.zeros_like(x), -x).conj().imag  # with its negative bit set
    assert conjugate.is_neg()
    for same in (
        x.clone().requires_grad_(),
        nn.Parameter(x),
        inferred,
        conjugate,
        x.as_subclass(Named),
        x.t().contiguous().t(),
        torch.cat([x, x], 1)[:, :3],
    ):
        torch.testing.assert_close(explainer(same, target=0).heatmap(), expected)


def test_sparse_targets_and_relevances(explainer: nrm.Explainer, x: Tensor) -> None:
    for relevance in (torch.ones(2, 2).double().to_sparse(), torch.ones(2, 2, device="meta")):
        with pytest.raises(TargetError, match="dense"):
            explainer(x, output_relevance=relevance)
    sparse = torch.tensor([0, 1]).to_sparse()
    found = explainer(x, target=sparse).heatmap()
    torch.testing.assert_close(found, explainer(x, target=[0, 1]).heatmap())


@pytest.mark.parametrize("kind", ["sparse", "sparse rows", "nested", "meta"])
def test_sets_weights_and_rules_take_dense_tensors(
    kind: str, explainer: nrm.Explainer, x: Tensor
) -> None:
    R, (make, message) = explainer(x, target=0), KINDS[kind]
    with pytest.raises(NeuronSetError, match=f"mask of 'input'.* {message}"):
        nrm.mask("input", make(x > 0.5))
    with pytest.raises(NeuronSetError, match=message):
        nrm.channels("input", make(torch.ones(1, 1).long()))
    with pytest.raises(QueryError, match=message):
        R.weighted({"input": make(x)})
    with pytest.raises(InputError, match=f"baseline.* {message}"):
        nrm.composites.IntegratedGradients(make(x))
    with pytest.raises(InputError, match=f"low.* {message}"):
        nrm.rules.ZBox(make(x), 1.0)
    with pytest.raises(QueryError, match=message):
        nrm.evaluation.Interventions(explainer, x[:1], target=0, removal={"input": make(x)})


def test_numbers_in_lists_are_no_inputs(explainer: nrm.Explainer) -> None:
    for given in ([[1.0, 2.0, 3.0]], "text", None, 3.0, np.float64(3)):
        with pytest.raises(InputError, match="is or holds a tensor"):
            explainer(given, target=0)
