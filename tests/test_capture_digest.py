"""Whatever changes in a model after its first explanation is noticed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize

import nrm
from nrm.capture.digest import as_bytes, contents, of_bytes, on_device
from nrm.capture.export import capture
from nrm.errors import QueryError

X = torch.tensor([[0.3, -0.2, 0.9, 0.5]], dtype=torch.float64)


@dataclass
class Config:
    scale: float = 1.5
    names: tuple[str, ...] = ("a", "b")


class Slotted:
    __slots__ = ("__hidden", "gain")

    def __init__(self):
        self.__hidden, self.gain = 1.0, 1.0

    def hide(self, value):
        self.__hidden = value

    def product(self):
        return self.__hidden * self.gain


class Chain:
    """Objects within objects, and a long list at the end."""

    def __init__(self, length):
        self.next = Chain(length - 1) if length else None
        self.numbers = [1.0] * 1000

    def last(self):
        return self if self.next is None else self.next.last()


class Scaled(nn.Module):
    """Reads its attributes in every way that a forward can."""

    __slots__ = ("offset",)
    shift = 0.25  # of the class

    def __init__(self):
        super().__init__()
        self.config = Config()
        self.table = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        self.array = np.array([0.5, 0.25, 0.125, 1.0])
        self.extra = [torch.ones(4, dtype=torch.float64), {"deep": (1.0, [2.0])}]
        self.power = 1
        self.flag = False
        self.slotted, self.chain = Slotted(), Chain(5)
        type(self).offset.__set__(self, 0.5)

    def forward(self, x):
        factor = self.config.scale * self.extra[1]["deep"][1][0] * self.power
        factor = factor * self.slotted.product() * self.chain.last().numbers[500] * self.offset
        x = x * self.table + torch.from_numpy(self.array)
        return (x * self.extra[0] + self.shift) * (-factor if self.flag else factor)


def network():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    nn.init.uniform_(norm.weight, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return (
        nn.Sequential(
            nn.Linear(4, 4), norm, nn.LeakyReLU(0.1), Scaled(), nn.LayerNorm(4), nn.Linear(4, 3)
        )
        .double()
        .eval()
    )


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.1), nn.Linear(4, 3)).double().eval()


def set_(path, value):
    def change(model):
        *way, name = path.split(".")
        for step in way:
            model = model[int(step)] if step.isdigit() else getattr(model, step)
        setattr(model, name, value)

    return change


def through_data(index, name, write):
    def change(model):
        write(getattr(model[index], name).data)

    return change


def flip_signs_of_two(weights):
    weights[1, 1] *= -1
    weights[3, 3] *= -1


def swap(weights):
    weights[0, 0], weights[1, 2] = weights[1, 2].item(), weights[0, 0].item()


def next_number(weights):
    weights[2, 1] = math.nextafter(float(weights[2, 1]), math.inf)


def by_numpy(model):
    model[0].weight.detach().numpy()[1, 2] = 7.0


def hooked(*, pre=False, **options):
    def change(model):
        if pre:
            model[0].register_forward_pre_hook(lambda m, a: (a[0] * 2,), **options)
        else:
            model[0].register_forward_hook(lambda m, a, o: o + 1, **options)

    return change


def other_forward(model):
    old = model[2].forward
    model[2].forward = lambda x: old(x) * 3 + 1


def parametrized(model):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model[5], "weight", Double())
    model.eval()


def other_class(model):
    class Louder(type(model[2])):
        def forward(self, x):
            return super().forward(x) * 5

    model[2].__class__ = Louder


IN_PLACE = {
    "weights in place": through_data(0, "weight", lambda w: w.mul_(-1.5)),
    "flipped batch norm": through_data(1, "weight", lambda w: w.copy_(w.flip(0))),
    "all signs": through_data(0, "weight", torch.Tensor.neg_),
    "two signs": through_data(0, "weight", flip_signs_of_two),
    "two numbers swapped": through_data(0, "weight", swap),
    "zeroed row": through_data(0, "weight", lambda w: w[1].zero_()),
    "one number": through_data(5, "bias", lambda b: b[1].add_(1e-3)),
    "running mean": through_data(1, "running_mean", lambda b: b.add_(1)),
    "through NumPy": by_numpy,
}
CHANGES = IN_PLACE | {
    "a parameter replaced": lambda m: setattr(m[5], "bias", nn.Parameter(torch.ones(3).double())),
    "data replaced": lambda m: setattr(m[5].bias, "data", torch.zeros(3).double()),
    "slope": set_("2.negative_slope", 0.7),
    "eps": set_("4.eps", 3.0),
    "number": set_("3.power", -2),
    "kind of number": set_("3.power", 3.0),
    "flag": set_("3.flag", True),
    "config": set_("3.config.scale", -2.0),
    "config replaced": set_("3.config", Config(scale=4.0)),
    "plain tensor replaced": set_("3.table", torch.tensor([4.0, 3.0, 2.0, 1.0]).double()),
    "plain tensor written": lambda m: m[3].table.copy_(m[3].table.flip(0)),
    "slot": set_("3.slotted.gain", -3.0),
    "hidden slot": lambda m: m[3].slotted.hide(-2.0),
    "slot of a module": lambda m: Scaled.offset.__set__(m[3], -1.0),
    "deep in objects": lambda m: m[3].chain.last().numbers.__setitem__(500, -4.0),
    "array written": lambda m: m[3].array.__setitem__(2, 9.0),
    "tensor in a list": lambda m: m[3].extra[0].mul_(-2),
    "number deep in a list": lambda m: m[3].extra[1]["deep"][1].__setitem__(0, -5.0),
    "hook": hooked(),
    "hook with keywords": lambda m: m[0].register_forward_hook(
        lambda m, a, k, o: o - 2, with_kwargs=True
    ),
    "hook always called": hooked(always_call=True),
    "pre-hook": hooked(pre=True),
    "hook of the whole": lambda m: m.register_forward_hook(lambda m, a, o: o * 2),
    "class of a module": other_class,
    "forward": other_forward,
    "parametrization": parametrized,
    "module replaced": lambda m: m.__setitem__(2, nn.Tanh().eval()),
    "module added": lambda m: m.append(nn.Tanh().eval()),
}


@pytest.fixture(scope="module")
def explainer():
    """Of a model that the tests change one after another."""
    return nrm.Explainer(network())


@pytest.mark.parametrize("name", CHANGES)
def test_the_changed_model_is_explained(explainer, name, monkeypatch):
    """Captured as it is now, and nothing that rules made of the weights is left over.

    A measure made before refuses to answer where its own weights were written to.
    """
    model = explainer.model
    before = explainer(X, target=1)
    before.heatmap()
    CHANGES[name](model)
    if name in IN_PLACE:
        with pytest.raises(QueryError, match="changed after"):
            before.heatmap()
    R = explainer(X, target=1)
    torch.testing.assert_close(R.output, model(X).detach())
    assert not torch.allclose(before.output, R.output)
    monkeypatch.setattr("nrm.explainer.capture", lambda *a: R.graph.captured)
    fresh = nrm.Explainer(model)(X, target=1)
    torch.testing.assert_close(R.heatmap(), fresh.heatmap())


def test_the_last_digit_of_one_weight_is_seen():
    model = perceptron()
    explainer = nrm.Explainer(model)
    before = explainer.graph(X)
    assert explainer.graph(X) is before
    next_number(model[0].weight.data)
    assert explainer.graph(X) is not before


def test_a_large_tensor_is_the_same_whatever_the_number_of_threads():
    """Products of rows are rounded otherwise by three threads than by one."""
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(1500, 1000, generator=generator)
    digests = []
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            digests += contents([large])
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1] == digests[2]
    for change in (lambda w: w[7].copy_(w[7].nextafter(w[8])), flip_signs_of_two, swap):
        changed = large.clone()
        change(changed)
        assert contents([changed]) != digests[:1]


def test_a_removed_hook_is_noticed():
    model = perceptron()
    handles = [
        model[0].register_forward_hook(lambda m, a, o: o + 1),
        model[0].register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    ]
    explainer = nrm.Explainer(model)
    explainer(X, target=0)
    for handle in handles:
        handle.remove()
        torch.testing.assert_close(explainer(X, target=0).output, model(X).detach())


def test_a_hook_of_all_modules_is_noticed():
    model = perceptron()
    explainer = nrm.Explainer(model)
    plain = explainer(X, target=0).output
    for register, hook in (
        (register_module_forward_pre_hook, lambda m, a: (a[0] + 1,)),
        (register_module_forward_hook, lambda m, a, o: o + 1),
    ):
        handle = register(hook)
        try:
            expected = model(X).detach()
            torch.testing.assert_close(explainer(X, target=0).output, expected)
        finally:
            handle.remove()
        assert not torch.allclose(plain, expected)
        torch.testing.assert_close(explainer(X, target=0).output, plain)


def test_attributes_of_a_class_and_its_forward_are_noticed(monkeypatch):
    model = network()
    explainer = nrm.Explainer(model)
    explainer(X, target=0)
    monkeypatch.setattr(Scaled, "shift", -3.0)
    torch.testing.assert_close(explainer(X, target=0).output, model(X).detach())
    old = nn.LeakyReLU.forward
    monkeypatch.setattr(nn.LeakyReLU, "forward", lambda self, x: old(self, x) + 2)
    torch.testing.assert_close(explainer(X, target=0).output, model(X).detach())


def test_what_a_hook_encloses_is_noticed():
    model, amount = perceptron(), 1.0
    given = {"factor": 2.0}
    model[0].register_forward_hook(lambda m, a, o: o * given["factor"] + amount)
    explainer = nrm.Explainer(model)
    explainer(X, target=0)
    given["factor"] = 3.0
    torch.testing.assert_close(explainer(X, target=0).output, model(X).detach())
    amount = -1.0
    torch.testing.assert_close(explainer(X, target=0).output, model(X).detach())


def test_what_a_new_hook_at_an_old_place_in_memory_does():
    """Identities are held, so that a second function never passes for the first."""
    model = perceptron()
    explainer = nrm.Explainer(model)
    for amount in range(3):
        handle = model[0].register_forward_hook(eval(f"lambda m, a, o: o + {amount}"))
        torch.testing.assert_close(explainer(X, target=0).output, model(X).detach())
        handle.remove()


OUTSIDE = {"factor": 1.0}


class ReadsGlobals(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) * OUTSIDE["factor"]


def test_the_models_own_output_shows_what_lies_outside(monkeypatch):
    model = ReadsGlobals().double().eval()
    certain, trusting = (nrm.Explainer(model, check=check) for check in ("output", "none"))
    for explainer in (certain, trusting):
        explainer(X, target=0)
    monkeypatch.setitem(OUTSIDE, "factor", -2.0)
    torch.testing.assert_close(certain(X, target=0).output, model(X).detach())
    torch.testing.assert_close(trusting(X, target=0).output, -model(X).detach() / 2)
    trusting.refresh()
    torch.testing.assert_close(trusting(X, target=0).output, model(X).detach())


def test_unchecked_measures_answer_with_what_they_read():
    model = perceptron()
    R = nrm.Explainer(model, check="none")(X, target=0)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert R.heatmap().shape == X.shape
    with pytest.raises(ValueError, match="check"):
        nrm.Explainer(model, check="always")


# -- models that write into themselves ------------------------------------------------------------


def test_hooks_that_record_go_on_recording(monkeypatch):
    captures = []
    monkeypatch.setattr("nrm.explainer.capture", lambda *a: captures.append(1) or capture(*a))
    model, seen, last = perceptron(), [], None

    def hook(module, arguments, output):
        nonlocal last
        last = output
        seen.append(output)
        module.latest = output

    model[0].register_forward_hook(hook)
    explainer = nrm.Explainer(model)
    for k in range(1, 4):
        R = explainer(X * k, target=1)
        torch.testing.assert_close(R.output, model(X * k).detach())
        expected = model[0](X * k).detach()
        for recorded in (seen[-1], last, model[0].latest):
            assert type(recorded) is torch.Tensor
            torch.testing.assert_close(recorded.detach(), expected)
        R.heatmap()  # not stale
    assert all(type(recorded) is torch.Tensor for recorded in seen)
    assert len(captures) == 1


class Counting(nn.Module):
    """Another function from the tenth call on."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * (1 if self.calls < 10 else -3)


def test_a_model_that_counts_its_calls_is_compared_every_time():
    model = Counting().double().eval()
    explainer = nrm.Explainer(model)
    with torch.no_grad():
        plain = model.layer(X)
    for _ in range(20):
        before = model.calls
        output = explainer(X, target=0).output
        factor = output[0, 0] / plain[0, 0]
        assert factor == pytest.approx(1) or factor == pytest.approx(-3)
        if before >= 10:
            assert factor == pytest.approx(-3)


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.ones(2).double() * 2
        return self.layer(x) * self.table


def test_a_cache_that_is_filled_once_costs_nothing_later(monkeypatch):
    model = Caching().double().eval()
    explainer = nrm.Explainer(model)
    graph = explainer.graph(X)
    calls = []
    monkeypatch.setattr("nrm.explainer.capture", lambda *a: calls.append(1))
    monkeypatch.setattr("nrm.explainer.reproduces", lambda *a: calls.append(1))
    assert explainer.graph(X) is graph
    assert not calls
    monkeypatch.undo()
    model.table = torch.ones(2).double() * 5
    torch.testing.assert_close(explainer(X, target=0).output, model(X).detach())


# -- digests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("size", [3, 1000, 600_011])
def test_digests_tell_contents_apart(dtype, size):
    torch.manual_seed(size)
    tensor = (torch.randn(size) * 100).to(dtype)
    known = contents([tensor])
    assert contents([tensor.clone()]) == known
    others = [tensor.flip(0), tensor.neg(), tensor.roll(1), tensor[:-1], tensor.to(torch.float16)]
    for places in ((0, 2), (1, size - 1)):
        flipped = tensor.clone()
        flipped[list(places)] *= -1
        swapped = tensor.clone()
        swapped[list(places)] = tensor[list(places)[::-1]]
        others += [flipped, swapped]
    for place in (0, size // 2, size - 1):
        bits = tensor.clone().view(torch.uint8)
        bits[place * tensor.element_size()] ^= 1  # the last digit
        others.append(bits.view(dtype))
    found = [contents([other]) for other in others]
    assert known not in found


def test_digests_of_odd_tensors():
    square = torch.arange(16.0).view(4, 4)
    tensors = [
        square.T,
        square[:, ::2],
        square.to_sparse(),
        torch.view_as_complex(torch.rand(3, 2)).conj(),
        torch.empty(0),
        torch.tensor(1.5),
        torch.empty(3, device="meta"),
        square.expand(2, 4, 4),
        torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.rand(9, dtype=torch.float32)[1:],
        torch.tensor([True, False]),
    ]
    assert contents(tensors) == contents(tensors)
    changed = square.clone()
    changed[3, 0] = -1
    assert contents([changed.T]) != contents([square.T])
    assert contents([changed.to_sparse()]) != contents([square.to_sparse()])


@pytest.mark.parametrize("size", [1, 8, 2047, 2049, 8 * 2**15, 8 * 2**15 + 13, 10**6])
def test_exact_digests_are_the_same_wherever_they_are_computed(size):
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8)
    assert [of_bytes(raw.numpy())] == on_device([raw])
    assert of_bytes(as_bytes(raw).numpy()) == of_bytes(raw.numpy())
