"""Small models whose layers are all modules, and what is removed of them by hooks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm import NeuronSet
from nrm.evaluation import combinations, intervention

Removed = dict[str, Tensor]
"""By layer, a mask of its neurons."""


# -- models, every layer a module ----------------------------------------------------------------


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Cat(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], 1)


class Residual(nn.Module):
    """Convolutions beside a skip, two branches of a concat, pooling, batch norm in the tail."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
        self.add, self.cat = Add(), Cat()
        self.left = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU())
        self.mix = nn.Conv2d(4, 4, 1)
        self.pool = nn.AvgPool2d(2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 3)
        for tensor in (self.norm.running_mean, self.norm.weight, self.norm.bias):
            nn.init.normal_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.add(self.inner(h), h)
        h = self.cat(self.left(h), self.right(h))
        h = self.norm(self.pool(self.mix(h)))
        return self.head(h.view(h.shape[0], -1))


class TwoInputs(nn.Module):
    """Positions that share their axis with the samples, and rows found by number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.add = Add()
        self.mixed = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.gate = nn.Sigmoid()
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # [B, 5, 4] and [B, 5, 3]
        h = self.add(self.first(x), self.second(y))
        flat = self.mixed(h.reshape(-1, 3))
        h = flat.view(x.shape[0], 5, 4)
        rows = torch.arange(x.shape[0])
        h = h * self.gate(h)[rows, torch.zeros_like(rows)].unsqueeze(1)
        return self.last(h).unbind(1)[2] + h.mean((1, 2)).unsqueeze(1)


class Gated(nn.Module):
    """The last layer's slope depends on an earlier layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.value, self.gate = nn.Linear(4, 4), nn.Sigmoid()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(self.value(h) * self.gate(h))


class Branching(nn.Module):
    """Python code that only a trace of one sample captures."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = 2.0 if float(x.sum()) > -1e9 else 1.0
        return self.head(self.second(self.first(x) * scale))


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Flatten())
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "mlp": (mlp, ((6,),)),
    "residual": (Residual, ((2, 4, 4),)),
    "two inputs": (TwoInputs, ((5, 4), (5, 3))),
    "gated": (Gated, ((3,),)),
    "branching": (Branching, ((4,),)),
}


@functools.cache
def built(name: str) -> nn.Module:
    """The one model of a name, which no test changes."""
    torch.manual_seed(0)
    build, _ = MODELS[name]
    return build().double().eval()


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A model and a sample of which no layer is silent; what is drawn next is always the same."""
    model = built(name)
    torch.manual_seed(6)
    return model, [torch.randn(1, *shape).double() for shape in MODELS[name][1]]


@functools.cache
def explainer_of(model: nn.Module) -> nrm.Explainer:
    """The one explainer of a model that no test changes: capturing takes longest."""
    return nrm.Explainer(model, nrm.composites.AttnLRP())


def recorded(
    monkeypatch: pytest.MonkeyPatch, shortcuts: bool = True
) -> list[combinations.Combinations]:
    """The runs that are made from here on.

    Arguments:
        shortcuts: `False`: every combination is run, also where its result is known.
    """
    runs: list[combinations.Combinations] = []

    class Recorded(combinations.Combinations):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args[:6], shortcuts=shortcuts)
            runs.append(self)

    monkeypatch.setattr(intervention, "Combinations", Recorded)
    return runs


# -- the reference -------------------------------------------------------------------------------


def plain(model: nn.Module, inputs: Sequence[Tensor], removed: Removed, to: Removed) -> Tensor:
    """The model's outputs, with masked activations replaced by hooks."""
    inputs = list(inputs)
    names = ["input"] if len(inputs) == 1 else ["x", "y"]
    handles = []
    for layer, mask in removed.items():
        value = to.get(layer, torch.zeros(()).double())
        if layer in names:
            place = names.index(layer)
            inputs[place] = torch.where(mask, value, inputs[place])
            continue
        module = model.get_submodule(layer)
        handles.append(
            module.register_forward_hook(
                lambda _m, _i, out, mask=mask, value=value: torch.where(
                    mask.view(out.shape), value, out
                )
            )
        )
    with torch.no_grad():
        found: Tensor = model(*inputs)
    for handle in handles:
        handle.remove()
    return found[0]


def together(*sets: Removed) -> Removed:
    found: Removed = {}
    for one in sets:
        for layer, mask in one.items():
            found[layer] = found[layer] | mask if layer in found else mask
    return found


def expected_joint(
    model: nn.Module,
    inputs: Sequence[Tensor],
    target: int,
    families: Sequence[Sequence[Removed]],
    to: Removed,
) -> Tensor:
    """Eq. 34, written out."""
    found = torch.zeros([len(family) for family in families]).double()
    for index in itertools.product(*(range(len(family)) for family in families)):
        chosen = [family[i] for family, i in zip(families, index, strict=True)]
        for size in range(len(chosen) + 1):
            for subset in itertools.combinations(chosen, size):
                output = plain(model, inputs, together(*subset), to)[target]
                found[index] += (-1) ** size * output
    return found


def as_set(removed: Removed) -> NeuronSet:
    sets = [nrm.mask(layer, mask) for layer, mask in removed.items()]
    return NeuronSet(tuple(member for one in sets for member in one.members))


def random_sets(
    model: nn.Module, inputs: Sequence[Tensor], layers: Sequence[str], count: int
) -> list[Removed]:
    """Random sets over some layers; the last is a single neuron of each."""
    shapes: dict[str, torch.Size] = {"input": inputs[0].shape[1:]}
    shapes |= dict(zip(("x", "y"), (x.shape[1:] for x in inputs), strict=False))
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _m, _i, out, name=name: shapes.__setitem__(name, out.shape[1:])
        )
    with torch.no_grad():
        model(*inputs)
    for module in model.modules():
        module._forward_hooks.clear()
    if "mixed" in shapes:
        shapes["mixed"] = torch.Size((5, 4))  # one sample's
    found = [{layer: torch.rand(shapes[layer]) < 0.5 for layer in layers} for _ in range(count)]
    for layer in layers:
        mask = torch.zeros(shapes[layer], dtype=torch.bool)
        mask.view(-1)[int(torch.randint(mask.numel(), ()))] = True
        found[-1][layer] = mask
    found[0][layers[0]].view(-1)[0] = True  # none is empty
    for one in found:
        one[layers[0]].view(-1)[1] = True
    return found
