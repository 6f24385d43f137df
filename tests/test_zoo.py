"""Architectures of `benchmarks.zoo`: columns, walks, and every cut, whatever the network.

A case there is a model with random weights and biases, its inputs, and what is explained of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_

import pytest
import torch
from support import dense

import nrm
from benchmarks import architectures, zoo
from nrm import composites
from nrm.formulas import as_set

# The others are left to the benchmark: they are larger, or like one of these.
NAMES = (
    "ResNet18",
    "MobileNetV3-S",
    "U-Net, transposed convolutions",
    "U-Net, bilinear interpolation",
    "1-d convnet",
    "3-d convnet",
    "RNN, stacked, bidirectional",
    "LSTM, sequence first",
    "GRU, stacked, bidirectional",
    "LSTMCell in a Python loop",
    "BERT",
    "GPT-2",
    "Llama, grouped queries",
    "T5",
    "CLIP",
    "GCN",
    "GIN",
    "GraphSAGE",
    "GAT",
    "nn.TransformerEncoder",
    "EmbeddingBag",
    "GroupNorm and InstanceNorm",
    "einsum attention and GLU",
    "data-dependent control flow",
)
OTHER_COMPOSITES = (
    ("BERT", composites.AttnLRP()),
    ("Llama, grouped queries", composites.AttnLRP()),
    ("GPT-2", composites.Everywhere(nrm.rules.Gamma(0.25))),
    ("GAT", composites.Everywhere(nrm.rules.Gamma(0.25))),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def built(name: str, request: pytest.FixtureRequest) -> architectures.Case:
    """The case of a name, where its package is installed."""
    needs = architectures.NEEDS[name]
    if needs in ("torchvision", "transformers"):
        request.getfixturevalue("torchvision_models")  # transformers imports torchvision too
    if needs:
        pytest.importorskip(needs)
    return architectures.build(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_of_an_architecture_adds_up_to_one(built: architectures.Case) -> None:
    double = built.double()
    check_values(double)
    health, agreement = zoo.examine(double, double.explainer())
    assert agreement <= 1e-10
    check(health, 1e-10)
    health, agreement = zoo.examine(built, built.explainer())
    assert agreement <= 1e-5
    check(health, 1e-5)


@pytest.mark.parametrize(("name", "composite"), OTHER_COMPOSITES)
def test_every_cut_adds_up_to_one_under_other_composites(
    built: architectures.Case, composite: composites.Composite
) -> None:
    double = built.double()
    check_values(double, composite)
    health, agreement = zoo.examine(double, double.explainer(composite))
    assert agreement <= 1e-10
    check(health, 1e-10)
    check(zoo.examine(built, built.explainer(composite))[0], 1e-5)


@pytest.mark.parametrize("name", ["ResNet18", "LSTM, sequence first", "BERT", "CLIP", "GAT"])
def test_inputs_and_other_leaves_together_have_relevance_one(built: architectures.Case) -> None:
    double = built.double()
    R = double.explain(double.explainer())
    everywhere = reduce(or_, (as_set(leaf.name) for leaf in R.graph.leaves))
    size = max(1.0, float(R.diagnostics().total_variation))
    assert abs(float(R(everywhere)) - 1) <= 1e-10 * size


def test_what_python_decides_on_values_is_captured_by_an_eager_trace() -> None:
    case = architectures.build("data-dependent control flow")
    graph = case.explainer().graph(*case.args)
    assert graph.captured.method == "eager"


def check_values(double: architectures.Case, composite: composites.Composite | None = None) -> None:
    """Random columns against the rules' formulas, random sets against sums over all paths."""
    R = double.explain(double.explainer(composite))
    checked = dense.check_columns(R, operations=24)
    assert sum(checked.values()) >= 6, checked
    dense.check_walks(R, queries=1)


def check(health: nrm.diagnostics.Diagnostics, aim: float) -> None:
    """Every cut has relevance one, and so have the leaves together."""
    assert len(health.cuts) > 2
    for cut in health.cuts:
        assert cut.deviation <= aim, cut.name
    size = max(1.0, float(health.total_variation))
    assert abs(float(sum(health.leaf_share.values())) - 1) <= aim * size
