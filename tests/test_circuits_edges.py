"""Direct edges and what circuits keep, against the enumeration of all walks; and the laws."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from support import steps
from support.networks import NETWORKS, RULES, make
from support.pairs import in_pairs
from torch import Tensor, nn

import nrm
from nrm.errors import NeuronSetError, QueryError, UnknownLayerError

pytestmark = pytest.mark.usefixtures("captured_once")

LAYOUTS = ["alone", "shared", "spanning", "returning"]


def drawn(rng, R, net, layout):
    """Random components: for nrm, and the component of every neuron for the oracle.

    Each has neurons of a variable of its own (`alone`), some share one (`shared`), each has neurons
    of several (`spanning`); or they have neurons of the same variables, so that walks go to and
    fro (`returning`).
    """
    names = [name for name in net.values if not name.endswith(".bias")]
    masks: dict[str, dict[str, np.ndarray]] = {}
    owner: dict[tuple[str, int], str] = {}
    count = {"alone": 3, "shared": 2, "spanning": 4, "returning": len(names)}[layout]
    variables = [str(name) for name in rng.permutation(names)[:count]]
    for place, variable in enumerate(variables):
        size = len(net.values[variable])
        who = {
            "alone": np.where(rng.random(size) < 0.7, place, -1),
            "shared": rng.integers(-1, 3, size) + 3 * place * (rng.random() < 0.5),
            "spanning": np.where(rng.random(size) < 0.7, place // 2, -1),
            "returning": rng.integers(-1, 2, size),
        }[layout]
        for neuron, number in enumerate(who):
            if number >= 0:
                owner[variable, neuron] = f"c{number}"
                mask = masks.setdefault(f"c{number}", {})
                mask.setdefault(variable, np.zeros(size, dtype=bool))[neuron] = True
    if not owner:
        return drawn(rng, R, net, layout)
    sets = {}
    for name, lies in masks.items():
        united = None
        for variable, mask in lies.items():
            shape = R.graph.variable(variable).shape[1:]
            one = nrm.mask(variable, torch.from_numpy(mask).view(shape))
            united = one if united is None else united | one
        sets[name] = united
    return sets, owner


def told(R, owner):
    """What the oracle needs to know of the graph: the order of variables, the names of leaves."""
    order = {v.name: v.index for v in R.graph.variables}
    components = set(owner.values())
    leaves = {}
    for v in R.graph.leaves:
        name = "biases" if v.kind == "bias" else v.name
        leaves[v.name] = f"{name} (the rest)" if name in components else name
    return order, owner, leaves


def near(found, expected, walks):
    size = max(1.0, sum(abs(r) for _, r in walks))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-10 * size, rtol=0)


@in_pairs("network, rule, bias, layout", NETWORKS, RULES, ["drop", "input"], LAYOUTS)
def test_edges_equal_the_steps_of_all_walks(network, rule, bias, layout):
    case = make(network, rule, bias == "input", seed=1)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=1)
    walks = [net.walks(1) for net in case.oracles]
    rng = np.random.default_rng([*network.encode(), *layout.encode()])
    for _ in range(4):
        sets, owner = drawn(rng, R, case.oracles[0], layout)
        edges = R.edges(sets, memory=int(rng.choice([1, 2**28])))
        known = told(R, owner)
        for sample in range(2):
            expected = steps.edges_of(walks[sample], *known)
            assert {s for s, _ in expected} <= set(edges.senders)
            table = np.array(
                [[expected.pop((s, r), 0.0) for s in edges.senders] for r in edges.receivers]
            )
            assert not expected
            near(edges.relevance[sample], table, walks[sample])
        # any set of edges keeps what it keeps
        chosen = torch.from_numpy(rng.random(edges.relevance.shape[1:]) < 0.7)
        allowed = {(edges.senders[j], edges.receivers[i]) for i, j in chosen.nonzero().tolist()}
        found = edges.walks.kept(chosen)
        for sample in range(2):
            near(found[sample], steps.kept(walks[sample], allowed, *known), walks[sample])
        near(edges.walks.kept(torch.ones_like(chosen)), np.ones(2), walks[0])


@pytest.mark.parametrize("network", NETWORKS)
def test_edges_are_the_formula_where_no_walk_comes_back(network):
    case = make(network, "gamma", True, seed=2)
    R = nrm.Explainer(case.model, case.composite, bias="input")(*case.inputs, target=0)
    rng = np.random.default_rng(3)
    sets, _ = drawn(rng, R, case.oracles[0], "alone")
    edges = R.edges(sets)
    for receiver in edges.receivers[1:]:
        for sender in sets:
            if sender == receiver:
                continue
            formula = sets[sender] & sets[receiver]
            for other in set(sets) - {sender, receiver}:
                if lies_between(R, sets, sender, other, receiver):
                    formula = formula & ~sets[other]
            (row,) = sets[receiver].layers
            (column,) = sets[sender].layers
            above = R.graph.variable(column) in R.graph.upstream(R.graph.variable(row))
            expected = R(formula) if above else torch.zeros(2, dtype=torch.float64)
            torch.testing.assert_close(edges(sender, receiver), expected, atol=1e-9, rtol=1e-9)


def lies_between(R, sets, low, middle, high):
    """Whether a set's layer is between those of two others."""
    low, middle, high = (R.graph.variable(*sets[name].layers) for name in (low, middle, high))
    return low in R.graph.upstream(middle) and middle in R.graph.upstream(high)


@in_pairs("network, layout", NETWORKS, LAYOUTS)
def test_what_enters_a_component_leaves_it(network, layout):
    case = make(network, "zero", True, seed=4)
    R = nrm.Explainer(case.model, case.composite, bias="input")(*case.inputs, target=0)
    sets, _ = drawn(np.random.default_rng(5), R, case.oracles[0], layout)
    edges = R.edges(sets)
    size = float(edges.relevance.abs().sum())
    assert torch.allclose(edges.entered[:, 0], torch.ones(2, dtype=torch.float64))
    for row, name in enumerate(edges.receivers[1:], 1):
        leaves = any(R.graph.variable(layer).is_leaf for layer in sets[name].layers)
        coming = edges.relevance[:, :, edges.senders.index(name)].sum(1)
        near_enough = {"atol": 1e-10 * max(1, size), "rtol": 0}
        torch.testing.assert_close(coming, edges.entered[:, row], **near_enough)
        if not leaves:
            into = edges.relevance[:, row].sum(1)
            torch.testing.assert_close(into, edges.entered[:, row], **near_enough)
        if layout in ("alone", "shared"):
            torch.testing.assert_close(edges.entered[:, row], R(sets[name]), **near_enough)


class Wide(nn.Module):
    """Convolutions with a skip, whose channels are components."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        h = torch.relu(h + self.block(h))
        return self.head(h.mean((2, 3)))


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    model, x = Wide().double().eval(), torch.rand(2, 1, 5, 5).double()
    return model, x


def test_channels_of_several_layers_are_components(wide):
    model, x = wide
    R = nrm.Explainer(model, nrm.composites.GammaFlat(0.25))(x, target=1)
    sets = {f"stem.{c}": nrm.channels("stem", c) for c in range(4)}
    sets |= {f"block.{c}": nrm.channels("block.2", c) for c in range(4)}
    edges = R.edges(sets)
    for b in range(4):
        for a in range(4):
            expected = R(sets[f"stem.{a}"], sets[f"block.{b}"])
            torch.testing.assert_close(edges(f"stem.{a}", f"block.{b}"), expected)
    past = sum(edges(f"stem.{c}", "output") for c in range(4))
    torch.testing.assert_close(past, R(~nrm.neurons("block.2")))
    torch.testing.assert_close(edges.relevance.sum(2), edges.entered)


def test_steps_of_a_recurrent_layer_are_components():
    torch.manual_seed(0)

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    model = Steps().double().eval()
    R = nrm.Explainer(model)(torch.randn(1, 4, 3).double(), target=0)
    hidden = [nrm.neurons(f"lstm.h_l0[{t}]") for t in range(4)]
    edges = R.edges({f"h{t}": one for t, one in enumerate(hidden)})
    expected = {
        ("h2", "h3"): hidden[2] & hidden[3],
        ("h1", "h3"): hidden[1] & hidden[3] & ~hidden[2],
        ("h0", "h3"): hidden[0] & hidden[3] & ~(hidden[1] | hidden[2]),
    }
    for edge, formula in expected.items():
        torch.testing.assert_close(edges(*edge), R(formula), atol=1e-9, rtol=1e-9)
    # hidden state and cell of a step together: a component of two layers, one above the other
    cells = [nrm.neurons(f"lstm.c_l0[{t}]") for t in range(4)]
    steps_ = [a | b for a, b in zip(hidden, cells, strict=True)]
    whole = R.edges({f"step{t}": one for t, one in enumerate(steps_)})
    torch.testing.assert_close(whole.entered[:, 1:], R.relevances(*steps_).T)
    torch.testing.assert_close(whole("step1", "step2"), R(steps_[1], steps_[2]))
    assert whole("step1", "step3") == 0  # walks go through every step between


def test_layers_of_a_graph_network_are_components():
    torch.manual_seed(0)

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            h = torch.relu(adjacency @ self.first(x))
            h = torch.relu(adjacency @ self.second(h))
            return self.head(h.sum(0, keepdim=True))

    adjacency = torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 1, 1]]).double()
    model = Convolution().double().eval()
    explainer = nrm.Explainer(model, batch_axis=None)
    R = explainer(torch.rand(3, 3).double(), adjacency, target=(0, 0))
    layers = {"low": ":relu", "high": ":relu@1"}
    sets = {
        f"{name}.{node}": nrm.channels(layer, node, axis=0)
        for name, layer in layers.items()
        for node in range(3)
    }
    edges = R.edges(sets)
    for a in range(3):
        for b in range(3):
            found = edges(f"low.{a}", f"high.{b}")
            expected = R(sets[f"low.{a}"], sets[f"high.{b}"])
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert edges("low.0", "high.2") == 0  # not neighbours


def test_messages_stop_where_nothing_of_interest_lies_below(wide, monkeypatch):
    model, x = wide
    R = nrm.Explainer(model, nrm.composites.GammaFlat(0.25))(x, target=1)
    edges = R.edges({"block": "block.2", "skip": ":relu"})
    visited = []
    propagations = R.forward_pass.propagations
    for operation, propagation in propagations.items():
        itself = propagation.send_on

        def send_on(message, *rest, itself=itself, name=operation.address):
            visited.append((name, len(message)))
            return itself(message, *rest)

        monkeypatch.setattr(propagation, "send_on", send_on)
    again = R.edges({"block": "block.2", "skip": ":relu"})
    torch.testing.assert_close(again.relevance, edges.relevance)
    assert "stem" not in dict(visited)  # below there is only the input


def test_what_are_no_components_is_refused(wide):
    model, x = wide
    R = nrm.Explainer(model, nrm.composites.GammaFlat(0.25))(x, target=1)
    with pytest.raises(NeuronSetError, match=r"'a' and 'b' have neurons of 'stem' in common"):
        R.edges({"a": nrm.channels("stem", 0, 1), "b": nrm.channels("stem", 1, 2)})
    with pytest.raises(QueryError, match="cannot be called 'output'"):
        R.edges({"output": "stem"})
    with pytest.raises(QueryError, match="at least one component"):
        R.edges({})
    with pytest.raises(QueryError, match="a list of one"):
        R.edges("stem")
    with pytest.raises(QueryError, match="named twice"):
        R.edges(["stem", "stem"])
    with pytest.raises(UnknownLayerError):
        R.edges(["stemm"])
    with pytest.raises(NeuronSetError, match="empty"):
        R.edges({"none": nrm.mask("stem", torch.zeros(4, 5, 5, dtype=torch.bool))})
    edges = R.edges(["stem", "block.2"])
    with pytest.raises(QueryError, match="no receiver 'input'"):
        edges("stem", "input")
    with pytest.raises(QueryError, match="no sender 'output'"):
        edges("output", "stem")


def test_edges_by_sample_are_those_of_each_sample_alone(wide):
    model, x = wide
    explainer = nrm.Explainer(model)
    both = explainer(x, target=1).edges(["stem", "block.2"])
    for sample in range(2):
        alone = explainer(x[sample : sample + 1], target=1).edges(["stem", "block.2"])
        torch.testing.assert_close(both.relevance[sample], alone.relevance[0])
    top = both.top(2)
    assert abs(top[0].relevance) >= abs(top[1].relevance)
    assert top[0].relevance == float(both(top[0].sender, top[0].receiver).mean())
    known = both.of()[both.of() != 0]
    assert both.top(3, order="smallest")[0].relevance == float(known.min())
    assert both.top(3, order="largest")[0].relevance == float(known.max())
    again = pickle.loads(pickle.dumps(both))
    torch.testing.assert_close(again.relevance, both.relevance)
    with pytest.raises(QueryError, match="anew"):
        again.circuit()
    assert "direct edges between 2 components, mean of 2 samples" in str(both)


def test_components_may_differ_from_sample_to_sample(wide):
    model, x = wide
    explainer = nrm.Explainer(model, nrm.composites.GammaFlat(0.25))
    masks = torch.rand(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    both = explainer(x, target=1).edges({"some": nrm.mask("stem", masks), "block": "block.2"})
    for sample in range(2):
        R = explainer(x[sample : sample + 1], target=1)
        alone = R.edges({"some": nrm.mask("stem", masks[sample]), "block": "block.2"})
        torch.testing.assert_close(both.relevance[sample], alone.relevance[0])
        every = torch.ones(alone.relevance.shape[1:], dtype=torch.bool)
        every[0, 0] = False
        found = both.walks.kept(every)[sample : sample + 1]
        torch.testing.assert_close(found, alone.walks.kept(every))


class Flattened(nn.Module):
    """Tokens of all samples in one axis, the samples not in front."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, features = x.shape
        flat = torch.relu(self.a(x.transpose(0, 1).reshape(-1, features)))
        h = flat.view(tokens, batch, features).transpose(0, 1)
        return self.b((h + x).mean(1))


def test_samples_in_an_axis_with_others_have_edges_of_their_own():
    torch.manual_seed(0)
    model, x = Flattened().double().eval(), torch.randn(2, 3, 4).double()
    explainer = nrm.Explainer(model, bias="input")
    sets = {"low": nrm.channels("a", 0, 2), "high": nrm.channels(":add", 0, 1)}
    both = explainer(x, target=0).edges(sets)
    chosen = torch.rand(both.relevance.shape[1:], generator=torch.Generator().manual_seed(1)) < 0.8
    for sample in range(2):
        alone = explainer(x[sample : sample + 1], target=0).edges(sets)
        torch.testing.assert_close(both.relevance[sample], alone.relevance[0])
        kept = both.walks.kept(chosen)[sample : sample + 1]
        torch.testing.assert_close(kept, alone.walks.kept(chosen))


def test_a_model_that_changed_is_refused(wide):
    torch.manual_seed(0)
    model, (_, x) = Wide().double().eval(), wide
    edges = nrm.Explainer(model)(x, target=1).edges(["stem", "block.2"])
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(QueryError, match="changed"):
        edges.circuit(0.5)


def test_masks_that_are_a_whole_layer_in_one_sample_and_nothing_in_another():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    R = nrm.Explainer(model, bias="input")(torch.randn(2, 3).double() + 1, target=0)
    first = torch.tensor([[True, True], [False, False]])
    named = {"A": nrm.mask("1", first), "C": nrm.mask("1", ~first)}
    edges = R.edges(named)
    for name, chosen in named.items():
        torch.testing.assert_close(edges(name, "output"), R(chosen))
    alone = R.edges({"A": named["A"]})
    torch.testing.assert_close(alone("A", "output"), R(named["A"]))
    for found in (edges, alone):
        into = found.relevance[:, found.receivers.index("output")].sum(-1)
        torch.testing.assert_close(into, torch.ones(2).double())
