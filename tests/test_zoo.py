"""Architectures of `benchmarks.zoo`: columns, walks, and every cut, whatever the network.

A case there is a model with random weights and biases, its inputs, and what is explained of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, reduce
from operator import or_

import pytest
import torch
from support import dense

import nrm
from benchmarks import architectures, zoo
from nrm import composites
from nrm.capture.call import ModelCall
from nrm.capture.nodes import is_mask
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
    "Fourier neural operator, ReLU",
)
SMALLER = {
    "ResNet18": {"blocks": 1, "size": 32},
    "MobileNetV3-S": {"blocks": 5, "size": 32},  # with a block of every kind
    "RNN, stacked, bidirectional": {"steps": 2},
    "LSTM, sequence first": {"steps": 2},
    "GRU, stacked, bidirectional": {"steps": 3},
    "LSTMCell in a Python loop": {"steps": 2},
    "BERT": {"layers": 1},
    "GPT-2": {"layers": 2},
    "Llama, grouped queries": {"layers": 1},
    "T5": {"layers": 1},
    "CLIP": {"layers": 1},
    "OLMo": {"layers": 1},
    "DeBERTa V2": {"layers": 1},
    "Mamba": {"layers": 1},
    "nn.TransformerEncoder": {"layers": 1},
    "DiT, with a time and a class": {"layers": 1},
    "selective state space, by hand": {"steps": 2},
    "Fourier neural operator, ReLU": {"layers": 1, "size": 8},
}
"""The benchmark's models are repetitions of their layers, or of a step, which take longest."""
SINGLE = (
    "1-d convnet",
    "LSTM, sequence first",
    "BERT",
    "Llama, grouped queries",
    "GAT",
    "GroupNorm and InstanceNorm",
)
"""Single precision differs by rounding: one of each family is explained in it.

Llama computes its norms in single precision: only then do they take derivatives, not messages.
"""
OTHER_COMPOSITES = (
    ("BERT", composites.AttnLRP()),
    ("Llama, grouped queries", composites.AttnLRP()),
    ("GPT-2", composites.Everywhere(nrm.rules.Gamma(0.25))),
    ("GAT", composites.Everywhere(nrm.rules.Gamma(0.25))),
)

CUTS = (
    "DiT, with a time and a class",
    "selective state space, by hand",
    "OLMo",
    "DeBERTa V2",
    "Mamba",
)
"""Of operators that are in the others too, otherwise put together; or in single precision here and
there, as OLMo's norms and Mamba's states, whatever the model's type."""
PIECEWISE_LINEAR = (
    "1-d convnet",
    "siamese network",
    "Fourier neural operator, ReLU",
)

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def double(name: str) -> architectures.Case:
    """A case in double precision: the same object every time, so that it is captured once."""
    return architectures.build(name, **SMALLER.get(name, {})).double()


@cache
def single(name: str) -> architectures.Case:
    return architectures.build(name, **SMALLER.get(name, {}))


@pytest.fixture(autouse=True)
def installed(name: str, request: pytest.FixtureRequest) -> None:
    """Skip what needs a package that is not installed."""
    needs = architectures.NEEDS[name]
    if needs in ("torchvision", "transformers"):
        request.getfixturevalue("torchvision_models")  # transformers imports torchvision too
    if needs:
        pytest.importorskip(needs)


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_of_an_architecture_adds_up_to_one(name: str) -> None:
    case = double(name)
    check_values(case)
    check_cuts(case, None, 1e-10)


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_of_a_composed_architecture_adds_up_to_one(name: str) -> None:
    check_cuts(double(name), None, 1e-10)


@pytest.mark.parametrize("name", SINGLE)
def test_every_cut_adds_up_to_one_in_single_precision(name: str) -> None:
    check_cuts(single(name), None, 1e-5)


@pytest.mark.parametrize(("name", "composite"), OTHER_COMPOSITES)
def test_every_cut_adds_up_to_one_under_other_composites(
    name: str, composite: composites.Composite
) -> None:
    case = double(name)
    check_values(case, composite)
    check_cuts(case, composite, 1e-10)
    if name in SINGLE:
        check_cuts(single(name), composite, 1e-5)


@pytest.mark.parametrize("name", ["ResNet18", "LSTM, sequence first", "BERT", "CLIP", "GAT"])
def test_inputs_and_other_leaves_together_have_relevance_one(name: str) -> None:
    case = double(name)
    R = case.explain(case.explainer())
    everywhere = reduce(or_, (as_set(leaf.name) for leaf in R.graph.leaves))
    size = max(1.0, float(R.diagnostics().total_variation))
    assert abs(float(R(everywhere)) - 1) <= 1e-10 * size


@pytest.mark.parametrize(
    "name",
    ["ResNet18", "LSTM, sequence first", "GRU, stacked, bidirectional", "BERT", "T5", "GAT",
     "Llama, grouped queries", "GroupNorm and InstanceNorm"],
)  # fmt: skip
def test_differences_from_a_reference_add_up_to_that_of_the_outputs(name: str) -> None:
    case, explainer = double(name), double(name).explainer()
    call = ModelCall(case.model, case.args, case.kwargs, explainer.output)
    torch.manual_seed(0)
    reference = {}
    for at, x in zip(call.names, call.tensors, strict=True):
        if x.is_floating_point() and not is_mask(at):
            reference[at] = 0.6 * x + 0.3 * torch.randn_like(x)
        elif at in ("input_ids", "decoder_input_ids"):
            reference[at] = x.flip(-1)
    R = explainer(*case.args, target=case.index, reference=reference, **case.kwargs)
    other = call(*(reference.get(at, x) for at, x in zip(call.names, call.tensors, strict=True)))
    place = (0, *case.index) if other.dim() > len(case.index) else case.index
    if explainer.batch_axis == 1:
        place = (case.index[0], 0, *case.index[1:])
    change = (call(*call.tensors) - other)[place]
    aim = 1e-6 if R.graph.captured.mixed else 1e-10  # norms in single precision
    assert abs(float(R.scale - change)) <= aim * max(1.0, float(change.abs()))
    inputs = reduce(or_, (as_set(leaf.name) for leaf in R.graph.inputs))
    health = R.diagnostics()
    size = max(1.0, float(health.total_variation))
    assert abs(float(R(inputs)) - 1) <= 1e-10 * size
    assert health.worst_cut_deviation <= 1e-10


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_lrp_0_of_a_piecewise_linear_architecture_is_gradient_times_input(name: str) -> None:
    case = double(name)
    deviation = zoo.gradient_times_input(case, case.explainer())
    assert deviation is not None
    assert deviation <= 1e-10


@pytest.mark.parametrize("name", ["highway network"])
def test_a_smooth_architecture_is_not_compared_with_gradient_times_input(name: str) -> None:
    case = double(name)
    assert zoo.gradient_times_input(case, case.explainer()) is None


@pytest.mark.parametrize("name", ["data-dependent control flow"])
def test_what_python_decides_on_values_is_captured_by_an_eager_trace(name: str) -> None:
    case = double(name)
    explainer = case.explainer()
    assert explainer.graph(*case.args).captured.method == "eager"
    (x,) = case.args
    nearby = explainer(x, target=case.index, reference=0.9 * x)
    assert abs(float(nearby.heatmap().sum()) - 1) <= 1e-10
    with pytest.raises(nrm.errors.InputError, match="branches on values"):
        explainer(x, target=case.index, reference=0.01 * x)


def check_values(case: architectures.Case, composite: composites.Composite | None = None) -> None:
    """Random columns against the rules' formulas, random sets against sums over all paths."""
    R = case.explain(case.explainer(composite))
    checked = dense.check_columns(R, operations=24)
    assert sum(checked.values()) >= 6, checked
    dense.check_walks(R, queries=1)


def check_cuts(
    case: architectures.Case, composite: composites.Composite | None, aim: float
) -> None:
    """Every cut has relevance one, so have the leaves together, and the timed pass agrees."""
    health, agreement = zoo.examine(case, case.explainer(composite))
    assert agreement <= aim
    assert len(health.cuts) > 2
    for cut in health.cuts:
        assert cut.deviation <= aim, cut.name
    size = max(1.0, float(health.total_variation))
    assert abs(float(sum(health.leaf_share.values())) - 1) <= aim * size
