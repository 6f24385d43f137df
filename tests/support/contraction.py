"""Pairs of channels by one contraction beside one message for each channel."""

from __future__ import annotations

import torch

from nrm import rules

SLOW = "backward"
"""The method that is always right."""

RULES = {
    "zero": rules.Zero(),
    "epsilon": rules.Epsilon(1e-3),
    "gamma": rules.Gamma(0.25),
    "plain gamma": rules.PlainGamma(0.5),
    "zplus": rules.ZPlus(),
    "alpha2beta1": rules.AlphaBeta(2.0, 1.0),
    "flat": rules.Flat(),
    "wsquare": rules.WSquare(),
    "zbox": rules.ZBox(-9.0, 9.0),
}


def agree(R, a, b, *sets, contracts=True):
    assert (R.joint_method(a, b) == "contraction") == contracts
    quick = R.joint(a, b, *sets)
    slow = R.joint(a, b, *sets, method=SLOW)
    scale = max(1.0, float(R.diagnostics().total_variation.max()))
    torch.testing.assert_close(quick, slow, atol=1e-10 * scale, rtol=0)
    torch.testing.assert_close(quick, R.joint(b, a, *sets).transpose(1, 2))
    return quick
