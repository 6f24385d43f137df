"""What an explainer says of itself."""

import torch
from torch import nn

import nrm
from nrm import composites


def test_an_explainer_says_how_it_explains_and_how_often_it_captured() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    plain = nrm.Explainer(model)
    assert repr(plain) == "Explainer(Sequential, suggested composite; 0 captures)"
    chosen = composites.EpsilonPlus()
    explainer = nrm.Explainer(model, chosen, bias="input", head="keep", batch_axis=None)
    options = "bias='input', head='keep', batch_axis=None"
    assert repr(explainer) == f"Explainer(Sequential, {chosen!r}, {options}; 0 captures)"
    plain(torch.rand(2, 3), target=0)
    plain(torch.rand(1, 3), target=1)
    assert repr(plain).endswith("; 1 capture)")
