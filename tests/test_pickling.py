"""What can be kept: pickled, copied, saved by torch, sent to other processes."""

import copy
import inspect
import io
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

import nrm
from nrm import composites, graph_networks, operators, rules
from nrm.errors import NeuronSetError, NrmError, QueryError, UnknownLayerError
from nrm.explanation import explain_target


class Net(nn.Module):
    """A skip beside two convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(12, 3)

    def forward(self, x, shift=None):
        h = torch.relu(self.a(x if shift is None else x + shift["by"]))
        h = nn.functional.avg_pool2d(h + torch.relu(self.b(h)), 2)
        return self.head(h.flatten(1))


def network(seed=0):
    torch.manual_seed(seed)
    return Net().double().eval()


def batch(seed=1, size=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 2, 4, 4, generator=generator, dtype=torch.float64)


def same(one, two):
    """Computed twice: equal but for the last digits."""
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def by_torch(kept):
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {f"pickle {n}": lambda kept, n=n: pickle.loads(pickle.dumps(kept, n)) for n in range(2, 6)}
WAYS |= {"copy": copy.copy, "deepcopy": copy.deepcopy, "torch": by_torch}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture(scope="module")
def explainer():
    return nrm.Explainer(network())


@pytest.fixture(scope="module")
def model():
    """To explain by several rules, captured once; nothing is written to it."""
    return network()


@pytest.fixture(scope="module")
def R(explainer):
    return explainer(batch(), target=1)


# -- sets and formulas -----------------------------------------------------------------------------

FEW, OTHERS = torch.arange(48).view(3, 4, 4) % 5 == 0, torch.arange(48).view(3, 4, 4) % 5 == 1
A, B = nrm.channels("a", 0, 2), nrm.patch("b", slice(0, 2), [1, 3])
SETS = [
    A,
    B,
    nrm.channels("a", 1, axis=-1),
    nrm.channels("a", *torch.tensor([0, 1])),
    nrm.neurons("b", (0, 1, slice(None)), (2, [0, 3], 1)),
    nrm.neurons("b"),
    nrm.mask("b", FEW),
    nrm.mask("a", torch.stack([FEW, OTHERS])),
    A | nrm.mask("b", FEW),
]
FORMULAS = [~A, A & B, A | ~B, A ^ B, A >> B, ~(A & ("b" ^ SETS[6])) | SETS[8]]


@ways
@pytest.mark.parametrize("formula", SETS + FORMULAS, ids=str)
def test_sets_and_formulas(R, way, formula):
    again = way(formula)
    assert again == formula
    assert hash(again) == hash(formula)
    assert str(again) == str(formula)
    assert R.plan(again, formula).events == R.plan(formula).events  # one and the same
    same(R(again), R(formula))


def test_masks_are_equal_where_they_hold_the_same():
    kept = pickle.loads(pickle.dumps(nrm.mask("b", FEW)))
    assert kept == nrm.mask("b", FEW.clone()) != nrm.mask("b", OTHERS)
    assert kept != nrm.mask("b", FEW[None])  # of one sample
    long, same = torch.arange(3000), torch.arange(3000)
    other = long.clone()
    other[1500] = 0  # shown alike
    assert nrm.channels("a", long) == nrm.channels("a", same) != nrm.channels("a", other)


def test_a_mask_and_its_copy_do_not_share_what_the_caller_changes(R):
    given = FEW.clone()
    kept = copy.deepcopy(nrm.mask("b", given))
    before = R(kept)
    given.fill_(True)
    same(R(kept), before)


# -- rules and composites --------------------------------------------------------------------------

SELECTORS = {
    "kind('conv', 'linear')": composites.kind("conv", "linear"),
    "path('*b')": composites.path("*b"),
    "module('Conv2d')": composites.module("Conv2d"),
}
COMPOSITES = [
    composites.GammaFlat(),
    composites.EpsilonPlus(),
    composites.EpsilonPlusFlat(),
    composites.EpsilonGammaFlat(),
    composites.EpsilonGammaBox(torch.zeros(2, 4, 4).double(), 1.0),
    composites.EpsilonAlpha2Beta1Flat(),
    composites.LRPZero(),
    composites.CPLRP(),
    composites.AttnLRP(),
    composites.LRPAll(),
    composites.Occlusion(),
    composites.LocalLinear(),
    composites.IntegratedGradients(torch.zeros(2, 4, 4).double(), steps=3),
    composites.Everywhere(rules.WSquare()),
    composites.Composite(
        [
            (composites.module(nn.Linear), rules.Epsilon(1e-3)),
            (composites.path("b"), rules.Gamma(0.1)),
            (composites.kind("sum"), rules.Uniform()),
        ],
        rules.ZPlus(),
        alpha_default=rules.Shares(0.7, 0.3),
    ),
]


@ways
@pytest.mark.parametrize("text", SELECTORS)
def test_selectors(way, text):
    assert way(SELECTORS[text]) == SELECTORS[text]
    assert str(SELECTORS[text]) == text


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("way", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("composite", COMPOSITES, ids=str)
def test_composites_give_the_same(model, way, composite):
    again = way(composite)
    again = pickle.loads(again) if isinstance(again, bytes) else again
    x = batch()
    one = nrm.Explainer(model, composite)(x, target=1)
    two = nrm.Explainer(model, again)(x, target=1)
    assert str(again) == str(composite)
    same(one.heatmap(A), two.heatmap(A))


# -- explainers ------------------------------------------------------------------------------------


def settings(explainer):
    names = set(inspect.signature(nrm.Explainer).parameters)
    return {name: getattr(explainer, name) for name in names - {"model"}}


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(
    ("name", "used"),
    [(name, True) for name in WAYS] + [(name, False) for name in ("pickle 5", "copy", "deepcopy")],
)
def test_explainers(model, name, used):
    way = WAYS[name]
    explainer = nrm.Explainer(model, composites.EpsilonPlus(), bias="input")
    x = batch()
    if used:
        explainer(x, target=1).joint("a", "b")
        explainer(x[:1], target=1).heatmap(A)
    again = way(explainer)
    R, other = explainer(x, target=1), again(x, target=1)
    same(R.heatmap(A), other.heatmap(A))
    same(R.heatmap(A), explainer(x, target=1).heatmap(A))  # which still works
    assert (again.model is explainer.model) == (way is copy.copy)


def test_every_setting_of_an_explainer_is_kept():
    explainer = nrm.Explainer(
        network(),
        rules.Gamma(0.3),
        bias="input",
        strict=True,
        output=("logits", -1),
        batch_axis=1,
        fallback=operators.LocalLinear(),
    )
    again = settings(pickle.loads(pickle.dumps(explainer)))
    known = settings(explainer)
    assert type(again.pop("fallback")) is type(known.pop("fallback"))
    assert str(again.pop("composite")) == str(known.pop("composite"))
    assert again == known


def test_a_deep_copy_has_a_model_of_its_own_and_a_copy_shares_it():
    explainer = nrm.Explainer(network())
    x = batch()
    before = explainer(x, target=1).heatmap()
    deep, shallow = copy.deepcopy(explainer), copy.copy(explainer)
    with torch.no_grad():
        explainer.model.a.weight.copy_(explainer.model.a.weight.flip(1))
    same(deep(x, target=1).heatmap(), before)
    with pytest.raises(AssertionError):
        same(explainer(x, target=1).heatmap(), before)
    same(shallow(x, target=1).heatmap(), explainer(x, target=1).heatmap())


def test_a_pickled_explainer_holds_no_capture():
    explainer = nrm.Explainer(network())
    fresh = len(pickle.dumps(explainer))
    for size in (1, 2, 3):
        explainer(batch(size=size), target=0).heatmap(A)
    assert len(pickle.dumps(explainer)) < 1.1 * fresh


def test_subclasses_keep_what_they_add():
    again = pickle.loads(pickle.dumps(Named(network(), "mine")))
    assert type(again) is Named
    assert again.title == "mine"
    assert again(batch(), target=1).heatmap().shape == (2, 2, 4, 4)


class Named(nrm.Explainer):
    def __init__(self, model, title):
        super().__init__(model, composites.EpsilonPlus())
        self.title = title


# -- measures --------------------------------------------------------------------------------------

CALLS = {
    "one target": lambda x: ((x,), {"target": 1}),
    "largest": lambda x: ((x,), {}),
    "targets": lambda x: ((x,), {"target": torch.tensor([2, 0])}),
    "named and nested": lambda x: ((), {"x": x, "shift": {"by": x / 2}, "target": 0}),
    "output relevance": lambda x: (
        (x,),
        {"output_relevance": torch.tensor([[1.0, 0.0, -0.5], [0.0, 2.0, 1.0]]).double()},
    ),
}


@pytest.mark.parametrize(
    ("name", "call"),
    [(name, call) for name in ("pickle 5", "copy", "deepcopy") for call in CALLS]
    + [(name, "named and nested") for name in ("pickle 2", "pickle 3", "pickle 4", "torch")],
)
def test_measures(explainer, name, call):
    way = WAYS[name]
    args, named = CALLS[call](batch())
    R = explainer(*args, **named)
    again = way(R)
    same(again.output, R.output)
    same(again.scale, R.scale)
    assert (again.target is None) == (R.target is None)
    if R.target is not None:
        same(again.target, R.target)
    at = R.graph.inputs[0].name
    same(again.heatmap(A, at=at), R.heatmap(A, at=at))
    same(again(A & ~B, normalized=False), R(A & ~B, normalized=False))


def test_measures_of_one_number_and_of_many_axes():
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh()).double().eval()
    x = batch().flatten(2)[:, :1]
    for chosen in ((1, 3), [(0, 2), (1, -1)], None):
        R = nrm.Explainer(model)(x, target=chosen)
        same(pickle.loads(pickle.dumps(R)).heatmap(), R.heatmap())
    R = nrm.Explainer(nn.Sequential(nn.Flatten(), nn.Linear(32, 1)).double().eval())(batch())
    same(pickle.loads(pickle.dumps(R)).heatmap(), R.heatmap())


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_graph_is_kept_with_its_measure(explainer, way):
    R = explainer(batch())
    with pytest.raises(QueryError, match="Pickle its measure"):
        way(R.graph)
    assert [v.name for v in pickle.loads(pickle.dumps(R)).graph.cuts] == [
        v.name for v in R.graph.cuts
    ]


def test_half_precision_measures():
    model = network().bfloat16()
    R = nrm.Explainer(model)(batch().bfloat16(), target=1)
    again = pickle.loads(pickle.dumps(R))
    same(again.heatmap(A), R.heatmap(A))


def test_a_saved_measure_is_of_the_inputs_as_they_were(explainer):
    x, relevance = batch(), torch.rand(2, 3, generator=torch.Generator().manual_seed(0)).double()
    target = torch.tensor([0, 2])
    one, two = explainer(x, target=target), explainer(x, output_relevance=relevance)
    before = [one.heatmap(), two.heatmap(), two.heatmap(normalized=False)]
    for given in (x, relevance, target):
        given.zero_()
    one, two = pickle.loads(pickle.dumps((one, two)))
    after = [one.heatmap(), two.heatmap(), two.heatmap(normalized=False)]
    for one, two in zip(after, before, strict=True):
        same(one, two)


def test_measures_of_one_explainer_are_saved_with_one_model():
    explainer = nrm.Explainer(network())
    measures = [explainer(batch(seed), target=1) for seed in range(4)]
    kept = pickle.dumps(measures)
    assert len(kept) < 2 * len(pickle.dumps(measures[0]))
    for again, R in zip(pickle.loads(kept), measures, strict=True):
        same(again.heatmap(A), R.heatmap(A))


@pytest.mark.parametrize("way", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_measure_that_would_be_another_is_not_saved(way):
    explainer = nrm.Explainer(network())
    R = explainer(batch(), target=1)
    explainer.composite = composites.LRPZero()
    with pytest.raises(QueryError, match="the explainer's composite changed"):
        way(R)
    explainer.composite = None
    way(R)
    with torch.no_grad():
        explainer.model.a.weight.mul_(2)
    with pytest.raises(QueryError, match="changed after this measure was made"):
        way(R)


def test_a_measure_made_by_hand_says_that_it_cannot_be_saved(R):
    by_hand = nrm.Measure(R.forward_pass, explain_target(1, R.forward_pass, False))
    same(by_hand.heatmap(), R.heatmap())
    with pytest.raises(QueryError, match="not made by an Explainer"):
        pickle.dumps(by_hand)


def test_a_copy_of_a_measure_shares_its_forward_pass(R):
    assert copy.copy(R).forward_pass is R.forward_pass


# -- results ---------------------------------------------------------------------------------------

RESULTS = {
    "flows": lambda R, explainer: R.top("a", "b", k=3),
    "plan": lambda R, explainer: R.plan(A & ~B),
    "diagnostics": lambda R, explainer: R.diagnostics(),
    "proper form": lambda R, explainer: R.proper_form(),
    "clusters": lambda R, explainer: nrm.clusters(R, "a", 3),
    "listing": lambda R, explainer: explainer.layers(batch()),
}


@ways
@pytest.mark.parametrize("result", RESULTS)
def test_results(R, explainer, way, result):
    found = RESULTS[result](R, explainer)
    again = way(found)
    assert type(again) is type(found)
    assert str(again) == str(found)
    if result == "flows":
        assert again == found
        assert [float(R(*flow.sets)[0]) for flow in again] == pytest.approx(
            [flow.relevance for flow in found]
        )
    if result == "clusters":
        same(R(again[0]), R(found[0]))
        assert again.sets == found.sets
    if result == "listing":
        assert again["a"] == found["a"]


def test_walks_of_nodes():
    walks = graph_networks.NodeWalks(
        ("a",), torch.tensor([[0], [2]]), torch.tensor([0.5, 0.25]), True
    )
    again = pickle.loads(pickle.dumps(walks))
    assert again.top(1) == walks.top(1)


@pytest.mark.parametrize(
    "error",
    [
        UnknownLayerError("conv7", ["conv1", "conv2"]),
        NeuronSetError("empty"),
        QueryError("no"),
        NrmError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


# -- other processes -------------------------------------------------------------------------------


def _answer(explainer, R, chosen, x):
    torch.set_num_threads(1)
    table = {chosen: "known"}
    fresh = nrm.channels("a", 0, 2) & ~nrm.mask("b", FEW)
    return (
        explainer(x, target=1).heatmap(chosen),
        R.heatmap(chosen),
        R.top("a", "b", k=2),
        table.get(fresh),
        chosen,
    )


def _fail(R):
    return R("nowhere")


def test_a_worker_process_gives_the_same(explainer):
    x = batch()
    R = explainer(x, target=1)
    chosen = A & ~nrm.mask("b", FEW)
    expected, flows = R.heatmap(chosen), R.top("a", "b", k=2)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        one, two, found, known, back = pool.apply(_answer, (explainer, R, chosen, x))
        with pytest.raises(UnknownLayerError, match="nowhere"):
            pool.apply(_fail, (R,))
    same(one, expected)
    same(two, expected)
    assert [flow.parts for flow in found] == [flow.parts for flow in flows]
    assert known == "known"
    assert back == chosen
    same(R.heatmap(chosen), expected)  # though its weights lie in shared memory now
    same(explainer(x, target=1).heatmap(chosen), expected)
