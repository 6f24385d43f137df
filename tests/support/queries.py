"""What is asked of a network, at random, against all walks of an oracle."""

from __future__ import annotations

import numpy as np
import torch

import nrm
from support import oracle as o

Walks = list[tuple[frozenset[o.Neuron], float]]


def check(found, expected, walks: Walks) -> None:
    """Equal but for rounding, which is that of the walks added up."""
    size = max(1.0, sum(abs(r) for _, r in walks))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-10 * size, rtol=0)


def check_queries(explainer: nrm.Explainer, inputs, oracles: list[o.Oracle]) -> None:
    """Marginals, joint and conditional relevance of random sets, unnormalised relevance."""
    R = explainer(*inputs, target=1)
    rng = np.random.default_rng(0)
    net = oracles[0]
    names = [name for name in net.values if not name.endswith(".bias")]
    assert {v.name for v in R.graph.variables} == {*net.values, *net.leaves}
    chosen = []
    for _ in range(8):
        masks = {}
        for name in rng.choice(names, rng.integers(2, 4), replace=False):
            mask = rng.random(len(net.values[name])) < 0.6
            mask[rng.integers(len(mask))] = True
            masks[name] = mask
        chosen.append(masks)
    for sample, oracle in enumerate(oracles):
        walks, raw = oracle.walks(1), oracle.walks(1, normalized=False)
        for name in {*net.values, *net.leaves}:
            size = int(np.prod(R.graph.variable(name).shape[1:]))
            expected = o.marginal(walks, name, size)
            check(R.marginal(name)[sample].flatten(), expected, walks)
        check(sum(R(leaf)[sample] for leaf in net.leaves), 1.0, walks)
        for masks in chosen:
            sets = [
                nrm.mask(name, torch.from_numpy(mask).view(R.graph.variable(name).shape[1:]))
                for name, mask in masks.items()
            ]
            picked = [{(n, int(i)) for i in np.flatnonzero(mask)} for n, mask in masks.items()]
            joint = o.relevance(walks, *picked)
            check(R(*sets)[sample], joint, walks)
            check(R(*sets, normalized=False)[sample], o.relevance(raw, *picked), raw)
            known = o.relevance(walks, *picked[1:])
            if abs(known) > 1e-6:
                conditional = R(sets[0], given=sets[1:])[sample]
                check(conditional * known, joint, walks)
