"""The network in layers (appendix A), against the cuts and queries of the measure."""

import pytest
import torch
from support import networks

import nrm


@pytest.mark.parametrize("network", list(networks.NETWORKS))
@pytest.mark.parametrize("bias", ["drop", "input"])
def test_every_layer_sums_to_one(network, bias):
    case = networks.make(network, "gamma", bias == "input", seed=1)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=0)
    form = R.proper_form()
    for layer in form:
        torch.testing.assert_close(layer.total, torch.ones(2, dtype=torch.float64))
        for part in layer.neurons:
            if part.copy is None:  # the variable itself: all that flows through it
                torch.testing.assert_close(part.relevance, R(part.name))
    assert [part.name for part in form[-1].neurons] == [R.graph.output.name]
    assert {part.name for part in form[0].neurons} == {v.name for v in R.graph.leaves}


def test_copies_of_a_skip_and_of_late_inputs():
    case = networks.make("Residual", "gamma", True, seed=0)
    R = nrm.Explainer(case.model, case.composite, bias="input")(*case.inputs, target=0)
    form = R.proper_form()
    kinds = {(part.name, part.copy) for layer in form for part in layer.neurons if part.copy}
    assert (":relu", "skip") in kinds  # around the layer with batch norm
    assert ("input", "late input") in kinds  # subtracted after it
    assert ("last.bias", "late input") in kinds
    # What bypasses the inner layer and what passes it are all of the first sum's relevance.
    layer = next(x for x in form if any(p.name == "inner" and p.copy is None for p in x.neurons))
    skip = next(p for p in layer.neurons if p.name == ":relu")
    torch.testing.assert_close(skip.relevance + R("inner"), R(":add"))
    assert "(copy: skip)" in str(form)
    assert str(form).startswith("layer 9: total 1.000000")
