"""Several threads, interruptions, silence: a capture leaves no trace of itself."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import warnings
from functools import cache
from typing import ClassVar

import pytest
import torch
from torch import nn

import nrm
from nrm import rules
from nrm.errors import CaptureError, InputError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.last.register_forward_hook(lambda m, a, o: o + self.first.bias.sum())

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


class Branching(Net):
    """Only an eager trace captures it."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else 2 * x).clone()


def make(kind=Net):
    torch.manual_seed(0)
    return kind().double().eval()


def look_of(model):
    """Everything that a capture might leave behind."""
    return [
        (
            path,
            type(module),
            sorted(vars(module)),
            [(n, id(p), type(p)) for n, p in module._parameters.items()],
            [(n, id(b), type(b)) for n, b in module._buffers.items()],
            [(n, id(m)) for n, m in module._modules.items()],
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            module.training,
        )
        for path, module in model.named_modules()
    ]


def everything_of_torch():
    return (
        nn.Module.__call__,
        nn.Module.__getattr__,
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        sys.stderr,
        tuple(warnings.filters),
    )


def run_together(*functions):
    """Run functions in threads that start together, and raise what they raise."""
    barrier, failures = threading.Barrier(len(functions)), []

    def body(function):
        try:
            barrier.wait()
            function()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=body, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


X = torch.tensor([[0.4, 0.9, 0.2]], dtype=torch.float64)


@cache
def alone(kind):
    """What a model of this kind gives where nothing else runs."""
    return nrm.Explainer(make(kind))(X, target=1).heatmap()


@pytest.mark.parametrize("race", range(8))
def test_threads_that_capture_at_once(race):
    kind = Branching if race % 4 == 3 else Net
    model, expected = make(kind), alone(kind)
    explainers = [nrm.Explainer(model), nrm.Explainer(model)] if race % 2 else []
    explainers = explainers or [nrm.Explainer(model)] * 2
    before, answers = look_of(model), {}

    def explain(place):
        with torch.set_grad_enabled(bool(place)):
            answers[place] = explainers[place](X, target=1).heatmap()

    run_together(lambda: explain(0), lambda: explain(1))
    assert look_of(model) == before
    for answer in answers.values():
        torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize("kind", [Net, Branching])
def test_the_model_can_be_run_while_it_is_captured(kind):
    model, x = make(kind), torch.rand(2, 3).double()[:1] + 0.1
    expected, before, done = model(x).detach(), look_of(model), threading.Event()

    def run():
        while not done.is_set():
            assert torch.equal(model(x).detach(), expected)
            assert all(type(p) is nn.Parameter for p in model.parameters())

    def explain():
        try:
            torch.testing.assert_close(nrm.Explainer(model)(x, target=0).output, expected)
        finally:
            done.set()

    run_together(run, explain)
    assert look_of(model) == before


class Interrupted(Net):
    """Is interrupted in its n-th call."""

    left: ClassVar = [0]

    def forward(self, x):
        self.left[0] -= 1
        if self.left[0] == 0:
            raise KeyboardInterrupt
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize("call", range(1, 7))
def test_an_interrupted_capture_leaves_the_model_as_it_was(call):
    model, x = make(Interrupted), torch.rand(1, 3).double()
    explainer = nrm.Explainer(model)
    before, around = look_of(model), everything_of_torch()
    Interrupted.left = [call]
    interrupted = False
    try:
        explainer(x, target=0)
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted or Interrupted.left[0] > 0
    assert look_of(model) == before
    assert everything_of_torch() == around
    Interrupted.left = [0]
    answers = []
    run_together(lambda: answers.append(explainer(x, target=0)))  # nothing is locked
    torch.testing.assert_close(answers[0].output, model(x).detach())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_hook_leaves_the_model_as_it_was(error):
    model, x, calls = make(), torch.rand(1, 3).double(), []

    def hook(module, arguments, output):
        calls.append(1)
        if len(calls) > 1:
            raise error

    model.first.register_forward_hook(hook)
    before, around = look_of(model), everything_of_torch()
    with pytest.raises((CaptureError, InputError, KeyboardInterrupt)):
        nrm.Explainer(model)(x, target=0)
    assert look_of(model) == before
    assert everything_of_torch() == around


# -- models whose modules know each other ----------------------------------------------------------


class Helper:
    def __init__(self, model):
        self.model = model

    def double(self, x):
        return self.model.first(x) * 2


class Entangled(nn.Module):
    """Reaches its modules by attributes, lists, methods, closures and a helper."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.helper, self.listed, self.method = Helper(self), [self.last], self.more
        old, first = self.last.forward, self.first
        self.last.forward = lambda x: old(x) + first.bias[:2]

    def more(self, x):
        return self.first(x) + 1

    def forward(self, x):
        return self.listed[0](torch.relu(self.helper.double(x)) + self.method(x))


def test_a_model_that_reaches_its_modules_in_many_ways():
    model = make(Entangled)
    before, x = look_of(model), torch.rand(2, 3).double()
    R = nrm.Explainer(model, rules.Zero(), bias="input")(x, target=0)
    assert look_of(model) == before
    assert R.graph.captured.method == "export"
    torch.testing.assert_close(R.output, model(x).detach())
    parameters = [v.name for v in R.graph.variables if "first" in v.name]
    assert parameters  # they are addressed as modules, not as constants
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(R.heatmap(), x * gradient / R.output[:, :1])


class Unrepeatable(nn.Module):
    """There can be no second module of this class beside the first."""

    __slots__ = ("_hidden",)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        object.__setattr__(self, "_hidden", 2.0)

    def forward(self, x):
        return self.layer(x) * self._hidden


def test_a_model_that_bears_no_second_is_captured_itself_and_given_back():
    model, x = make(Unrepeatable), torch.rand(2, 3).double()
    before = look_of(model)
    torch.testing.assert_close(nrm.Explainer(model)(x, target=0).output, model(x).detach())
    assert look_of(model) == before


# -- silence -------------------------------------------------------------------------------------


def test_failing_exports_are_silent_and_not_tried_again(capfd, monkeypatch):

    module = sys.modules["nrm.capture.export"]
    tried = []
    export = module.export
    monkeypatch.setattr(module, "export", lambda *a, **k: tried.append(1) or export(*a, **k))
    model, x = make(Branching), torch.rand(1, 3).double()
    explainer = nrm.Explainer(model)
    for k in range(1, 4):
        R = explainer(x * k, target=0)
        assert R.graph.captured.method == "eager"
        torch.testing.assert_close(R.output, model(x * k).detach())
        if k == 1:
            first = len(tried)
    assert len(tried) == first
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_others_may_write_to_stderr_meanwhile(capfd):
    model, x, done = make(Branching), torch.rand(1, 3).double(), threading.Event()

    def write():
        while not done.is_set():
            sys.stderr.write("still here\n")

    def explain():
        try:
            nrm.Explainer(model)(x, target=0)
        finally:
            done.set()

    run_together(write, explain)
    lines = capfd.readouterr().err.splitlines()
    assert lines
    assert set(lines) == {"still here"}


# -- memory --------------------------------------------------------------------------------------


def floats_alive():
    """Bytes of all storages that Python knows of."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            if storage.device.type == "cpu":
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def convolutions(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).to(dtype).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(rules.AlphaBeta(2, 1), torch.float32), (rules.Gamma(0.25), torch.bfloat16)],
    ids=str,
)
def test_shapes_share_weights_and_what_rules_make_of_them(rule, dtype):
    model = convolutions(dtype)
    explainer = nrm.Explainer(model, rule)
    weights = sum(p.numel() * 4 for p in model.parameters())

    def explain(size):
        explainer(torch.rand(1, 1, size, size).to(dtype), target=0).heatmap()

    explain(4)
    before = floats_alive()
    for size in (5, 6):  # any copy that one of them kept would be of all weights
        explain(size)
    assert floats_alive() - before < weights / 4


def test_memory_is_flat_over_many_shapes(monkeypatch):
    monkeypatch.setattr("nrm.capture.store.LIMIT", 2)
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    explainer = nrm.Explainer(model.double().eval())
    alive = []
    for length in (4, 5, 6, 7, 4, 7):
        R = explainer(torch.ones(1, 1, length).double(), target=0)
        torch.testing.assert_close(R.heatmap().sum(), torch.tensor(1.0).double())
        del R
        alive.append(len(_graphs()))
    assert max(alive[2:]) <= alive[1] + 1


def _graphs():
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is nrm.graph.Graph]


def test_a_used_explainer_travels():
    model, x = nn.Sequential(nn.Linear(3, 2)).eval(), torch.rand(1, 3)
    explainer = nrm.Explainer(model)
    expected = explainer(x, target=0).heatmap()
    for other in (copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))):
        torch.testing.assert_close(other(x, target=0).heatmap(), expected)
