"""Neuron sets by clustering activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nrm
from nrm.errors import NeuronSetError, QueryError


@pytest.fixture(scope="module")
def R():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip
    halves = torch.zeros(2, 1, 6, 6).double()
    halves[0, :, :, 3:] = 1  # left and right
    halves[1, :, 4:] = 1  # above and below
    return nrm.Explainer(model.double().eval())(halves, target=[0, 1])


def test_clusters_are_what_is_alike(R):
    found = nrm.clusters(R, "input", 2)
    assert found.labels.shape == (2, 6, 6)
    assert found.labels.tolist() == R.activations("input")[:, 0].long().tolist()
    inside = R.heatmap() * (found.labels == 1).unsqueeze(1)
    torch.testing.assert_close(R(found[1]), inside.flatten(1).sum(1))


def test_clusters_are_disjoint_and_together_the_layer(R):
    found = nrm.clusters(R, "1", 3, seed=1)
    assert len(found) == 3
    torch.testing.assert_close(sum(R(s) for s in found), torch.ones(2).double())
    torch.testing.assert_close(R(found[0] | found[1] | found[2]), torch.ones(2).double())
    assert R(found[0], found[1]).abs().max() == 0
    sizes = torch.bincount(found.labels.flatten()).tolist()
    assert sizes == sorted(sizes, reverse=True)


def test_clusters_follow_the_seed(R):
    first, again = (nrm.clusters(R, "3", 4, seed=5) for _ in range(2))
    assert torch.equal(first.labels, again.labels)


def test_clusters_of_tokens():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 2))
    R = nrm.Explainer(model.eval())(torch.rand(3, 5, 4), target=0)
    found = nrm.clusters(R, "1", 2)
    assert found.labels.shape == (3, 5)
    torch.testing.assert_close(sum(R(s) for s in found), torch.ones(3))


def test_clusters_that_cannot_be_are_refused(R):
    with pytest.raises(NeuronSetError, match="no positions"):
        nrm.clusters(R, "5", 2)
    with pytest.raises(NeuronSetError, match="2 different positions"):
        nrm.clusters(R, "input", 3)
    with pytest.raises(NeuronSetError, match="not 0"):
        nrm.clusters(R, "1", 0)


def test_activations_are_the_models_own(R):
    assert R.activations("1").min() == 0
    torch.testing.assert_close(R.activations("output"), R.output)


def test_late_leaves_have_no_activation():
    model = nn.Linear(2, 2).eval()
    R = nrm.Explainer(model, bias="input")(torch.rand(1, 2), target=0)
    with pytest.raises(QueryError, match="enters late"):
        R.activations(f"{R.graph.output.name}.bias")
