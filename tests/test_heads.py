"""A last softmax or sigmoid is looked through: the logit behind it is explained."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nrm
from nrm import composites, methods, rules
from nrm.errors import TargetError

pytestmark = pytest.mark.usefixtures("captured_once")

LOGITS = torch.tensor([1.5, -1.5, 0.6, 3.0], dtype=torch.float64)
WEIGHT = torch.tensor(
    [[2.0, -1.0, 0.5], [-1.0, -1.0, 0.5], [0.1, 0.2, 0.3], [1.0, 1.0, 1.0]], dtype=torch.float64
)
"""Of ones, class 0 is made of (2, -1, .5), and so on: no biases."""


class Headed(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.logits = nn.Linear(3, 4, bias=False).double()
        self.logits.weight.data = WEIGHT.clone()
        self.function = function

    def forward(self, x):
        return self.function(self.logits(x))


def ones(samples=1):
    return torch.ones(samples, 3, dtype=torch.float64)


def in_units(R):
    return methods.lrp(R, scale="logit")


SAME_CLASSES = {
    "softmax": lambda z: z.softmax(-1),
    "log_softmax": lambda z: z.log_softmax(-1),
    "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
    "softmax by hand": lambda z: z.exp() / z.exp().sum(-1, keepdim=True),
    "stable softmax by hand": lambda z: (
        (z - z.amax(-1, keepdim=True)).exp()
        / (z - z.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
    ),
    "sigmoid by hand": lambda z: 1 / (1 + torch.exp(-z)),
    "logarithm of a softmax": lambda z: torch.log(z.softmax(-1) + 1e-9),
    "clamped": lambda z: torch.sigmoid(z).clamp(1e-6, 1 - 1e-6),
    "per cent": lambda z: 100 * z.softmax(-1),
    "reshaped": lambda z: z.softmax(-1).unsqueeze(1).flatten(1).clone(),
    "softmax of a log_softmax": lambda z: z.log_softmax(-1).softmax(-1),
    "class weights": lambda z: z.softmax(-1) * torch.tensor([1.0, 2.0, 0.5, 3.0]).double(),
    "two heads": lambda z: torch.cat([z[:, :2].softmax(-1), torch.sigmoid(z[:, 2:])], 1),
    "softplus": F.softplus,
    "beside values": lambda z: torch.cat([z[:, :1], z[:, 1:].softmax(-1)], 1),
    "written into values": lambda z: torch.cat([written(z[:, :3]), z[:, 3:]], 1),
    "classes blanked": lambda z: z.softmax(-1).masked_fill(LOGITS > 2, 0.0),
    "classes chosen": lambda z: torch.where(LOGITS > 2, 0.0, F.pad(z.softmax(-1), (0, 1))[:, :4]),
    "normalised twice": lambda z: F.normalize(torch.sigmoid(z), p=1, dim=-1),
    "log_softmax by hand": lambda z: z - z.exp().sum(-1, keepdim=True).log(),
    "at the nearest": lambda z: F.interpolate(z.softmax(-1)[:, None], 8)[:, 0, ::2],
    "squared": lambda z: z.softmax(-1) ** 2,
}


def written(z):
    """As detectors do, in place: scores beside coordinates."""
    result = z.clone()
    result[:, 1:] = result[:, 1:].sigmoid()
    return result


@pytest.mark.parametrize("name", SAME_CLASSES)
def test_contributions_are_those_to_the_logit(name):
    function = SAME_CLASSES[name]
    model = Headed(function).eval()
    R = nrm.Explainer(model)(ones(2), target=torch.tensor([0, 1]))
    torch.testing.assert_close(R.scale, LOGITS[:2])
    torch.testing.assert_close(R.output, model(ones(2)))
    assert "behind" in R.explained
    assert R.explained in repr(R)
    R = nrm.Explainer(model, rules.Zero())(ones(2), target=torch.tensor([0, 1]))
    torch.testing.assert_close(in_units(R), WEIGHT[:2])


@pytest.mark.parametrize(
    ("function", "signs"),
    [
        (lambda z: -z.log_softmax(-1), [-1, -1, -1, -1]),
        (lambda z: 1 - torch.sigmoid(z), [-1, -1, -1, -1]),
        (lambda z: torch.rsub(z.softmax(-1), 1.0), [-1, -1, -1, -1]),
        (lambda z: z.softmax(-1) / -2.0, [-1, -1, -1, -1]),
        (
            lambda z: z.softmax(-1) * torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=z.dtype),
            [1, -1, 1, -1],
        ),
    ],
)
def test_what_falls_with_the_logit_is_explained_by_its_negative(function, signs):
    explainer = nrm.Explainer(Headed(function).eval(), rules.Zero())
    for target, sign in enumerate(signs):
        R = explainer(ones(), target=target)
        torch.testing.assert_close(R.scale, sign * LOGITS[[target]])
        torch.testing.assert_close(in_units(R)[0], sign * WEIGHT[target])


def test_of_a_binary_head_each_class_is_a_sign_of_the_logit():
    def both(z):
        p = torch.sigmoid(z[:, :1])
        return torch.cat([1 - p, p], 1)

    explainer = nrm.Explainer(Headed(both).eval(), rules.Zero())
    assert explainer(ones()).target.tolist() == [1]
    torch.testing.assert_close(in_units(explainer(ones(), target=0))[0], -WEIGHT[0])
    torch.testing.assert_close(in_units(explainer(ones(), target=1))[0], WEIGHT[0])


def test_targets_follow_what_is_done_after_the_softmax():
    turned = Headed(lambda z: z.softmax(-1).flip(-1)[:, 1:].unsqueeze(-1).transpose(1, 2))
    R = nrm.Explainer(turned.eval(), rules.Zero())(ones(), target=(0, 2))
    torch.testing.assert_close(R.scale, LOGITS[:1])
    one = Headed(lambda z: torch.sigmoid(z[:, 1]))
    R = nrm.Explainer(one.eval(), rules.Zero())(ones(2))
    assert R.target.tolist() == [0, 0]
    torch.testing.assert_close(R.scale, LOGITS[[1, 1]])
    torch.testing.assert_close(in_units(R)[0], WEIGHT[1])


@pytest.mark.parametrize(
    ("function", "place"),
    [
        (lambda z: torch.topk(z.softmax(1), 2, 1).values[:, 1:], 0),
        (lambda z: z.softmax(1).max(1).values, 3),
        (lambda z: (1 - torch.sigmoid(z)).min(1, keepdim=True).values, 3),
        (lambda z: z.log_softmax(1).sort(1).values[:, :1], 1),
        # of probabilities that are no order of the logits: weighted
        (lambda z: (z.softmax(1) * torch.tensor([9.0, 1, 1, 1]).double()).amax(1), None),
        (lambda z: (z.softmax(1) * torch.tensor([9.0, 1, 1, 1]).double()).max(1).values, 0),
    ],
)
def test_of_what_is_chosen_the_logit_is_explained(function, place):
    R = nrm.Explainer(Headed(function).eval(), rules.Zero())(ones(2))
    if place is None:
        assert R.explained == "output"
        return
    sign = -1 if "behind sigmoid" in R.explained else 1
    torch.testing.assert_close(R.scale, sign * LOGITS[place].expand(2))
    torch.testing.assert_close(in_units(R), sign * WEIGHT[place].expand(2, 3))


def test_the_largest_output_is_the_models_own():
    """The softmax over positions: the largest logit is not the most probable one."""
    model = Headed(lambda z: z.view(-1, 2, 2).softmax(1))  # columns (1.5, .6) and (-1.5, 3)
    R = nrm.Explainer(model.eval())(ones())
    assert R.target.tolist() == [[1, 1]]
    falls = nrm.Explainer(Headed(lambda z: -z.softmax(-1)).eval())(ones())
    assert falls.target.tolist() == [1]


def test_among_probabilities_rounded_to_one_the_largest_logit():
    model = Headed(torch.sigmoid).eval()
    R = nrm.Explainer(model)(100 * ones())
    assert model(100 * ones())[0].tolist() == [1.0, pytest.approx(0), 1.0, 1.0]
    assert R.target.tolist() == [3]


def test_masked_classes_do_not_matter_to_the_others():
    closed = torch.tensor([False, True, False, False])
    model = Headed(lambda z: z.masked_fill(closed, -torch.inf).softmax(-1)).eval()
    R = nrm.Explainer(model, rules.Zero())(ones())
    assert R.target.tolist() == [3]
    torch.testing.assert_close(in_units(R)[0], WEIGHT[3])
    with pytest.raises(TargetError, match=r"logits behind softmax the explained one is .*infinite"):
        nrm.Explainer(model)(ones(), target=1)


def test_output_relevance_is_put_on_the_logits_one_to_one():
    model = Headed(lambda z: z.softmax(-1)).eval()
    given = model(ones()).detach()
    R = nrm.Explainer(model, rules.Zero())(ones(), output_relevance=given)
    torch.testing.assert_close(R.marginal("output"), given)
    torch.testing.assert_close(R.scale, ones(1)[:, 0])
    expected = (given[0, :, None] * WEIGHT / LOGITS[:, None]).sum(0)
    torch.testing.assert_close(R.heatmap()[0], expected)


def test_the_head_is_another_name_of_the_logits():
    model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Flatten()).double().eval()
    explainer = nrm.Explainer(model)
    R = explainer(ones(), target=2)
    for name in ("0", "1", "output"):
        assert R.graph.variable(name) is R.graph.output or name != "output"
        torch.testing.assert_close(R(name), ones()[:, 0])
        torch.testing.assert_close(R(nrm.neurons(name, 2)), ones()[:, 0])
    assert {"1"} <= set(explainer.layers(ones())["0"].aliases)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.softmax(-1).sum(-1, keepdim=True),  # no longer one of the logits
        lambda z: z.softmax(-1) * z,
        lambda z: z.softmax(-1) @ WEIGHT,
        lambda z: torch.cat([z, z.softmax(-1)], 1) - 0.5 + 0.5,  # nor is all of it
        lambda z: torch.relu(z),
        lambda z: torch.tanh(z),
    ],
)
def test_what_ends_in_no_head_is_explained_as_it_is(function):
    model = Headed(function).eval()
    R = nrm.Explainer(model)(ones(), target=0)
    assert R.explained == "output"
    torch.testing.assert_close(R.scale, model(ones())[:, 0])


@pytest.mark.parametrize("head", ["logits", "keep"])
def test_attention_within_is_no_head(head):
    model = Headed(lambda z: (z.softmax(-1)[:, :3] * z[:, 1:]).log_softmax(-1)).eval()
    R = nrm.Explainer(model, head=head)(ones(), target=0)
    assert ":softmax" in R.graph.silent | {v.name for v in R.graph.variables}
    assert ("behind" in R.explained) == (head == "logits")


@pytest.mark.parametrize(("rule", "exact"), [(rules.Zero(), True), (rules.Gamma(0.25), False)])
def test_a_kept_log_softmax_is_its_logit_less_one_number(rule, exact):
    model = Headed(lambda z: z.log_softmax(-1)).eval()
    explainer = nrm.Explainer(model, rule, bias="input", head="keep")
    R = explainer(ones(), target=0)
    value = LOGITS.log_softmax(0)[0]
    assert R.explained == "output"
    torch.testing.assert_close(R.scale[0], value)
    total = R.heatmap().sum() + sum(R.biases().values())
    torch.testing.assert_close(total, ones()[0, :1])
    if exact:
        torch.testing.assert_close(in_units(R)[0], WEIGHT[0])
        left = R.biases()[":log_softmax.bias"] * R.scale
        torch.testing.assert_close(left[0], -LOGITS.logsumexp(0))
    dropped = nrm.Explainer(model, rule, bias="drop", head="keep")(ones(), target=0)
    assert dropped.biases() == {}
    torch.testing.assert_close(dropped.heatmap().sum(), ones()[0, 0])


def test_a_log_softmax_within_telescopes_and_messages_say_the_same():
    class Within(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.b(self.a(x).log_softmax(-1))

    torch.manual_seed(0)
    model, x = Within().eval(), torch.rand(2, 3, dtype=torch.float64)
    found = [
        nrm.Explainer(model, rule, bias="input")(x, target=1)
        for rule in (rules.Zero(), rules.Epsilon(1e-30))
    ]
    for v in found[1].graph.variables:
        torch.testing.assert_close(found[0].marginal(v.name), found[1].marginal(v.name))
    a, b = model.a, model.b
    own = torch.einsum("o,oi->oi", b.weight[1], a.weight)  # the number takes none further on
    torch.testing.assert_close(in_units(found[0]), x * own.sum(0).detach())


def test_gradients_start_at_the_logit_too():
    model = Headed(lambda z: z.softmax(-1)).eval()
    for composite in (composites.LocalLinear(), composites.IntegratedGradients(steps=4)):
        R = nrm.Explainer(model, composite)(ones(), target=0)
        torch.testing.assert_close(in_units(R)[0], WEIGHT[0])


def test_interventions_measure_the_same_logit():
    model = Headed(lambda z: z.log_softmax(-1)).eval()
    asked = nrm.evaluation.Interventions(nrm.Explainer(model), ones(), target=0)
    torch.testing.assert_close(asked.output, LOGITS[0])
    lost = asked.output - asked.without([[nrm.neurons("input", i)] for i in range(3)])
    torch.testing.assert_close(lost, WEIGHT[0])


def test_a_head_changes_no_share():
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    x = torch.rand(2, 5, dtype=torch.float64)
    heads = (nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid(), nn.LogSigmoid())
    headed = [nn.Sequential(*body, last).eval() for last in heads]
    for rule, bias in itertools.product(
        (rules.Zero(), rules.Gamma(0.25), rules.ZPlus()), ("drop", "input")
    ):
        plain = nrm.Explainer(body, rule, bias=bias)(x, target=1)
        for model in headed:
            R = nrm.Explainer(model, rule, bias=bias)(x, target=1)
            torch.testing.assert_close(R.scale, plain.scale)
            torch.testing.assert_close(R.heatmap(), plain.heatmap())
            assert list(R.biases()) == list(plain.biases())
            assert len(R.proper_form().layers) == len(plain.proper_form().layers)


def test_only_two_ways_with_a_head():
    with pytest.raises(ValueError, match="head is 'logits' or 'keep', not 'drop'"):
        nrm.Explainer(nn.Linear(2, 2), head="drop")
