"""Models and samples that evaluations are made of, and contributions by hooks."""

from __future__ import annotations

import itertools

import torch
from torch import nn


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp():
    torch.manual_seed(2)
    layers = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double().eval()


def conv_net():
    torch.manual_seed(5)
    return (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(80, 3),
        )
        .double()
        .eval()
    )


def vectors(count=4):
    return list(torch.rand(count, 1, 6, generator=generator(1), dtype=torch.float64))


def pictures(count=2):
    return list(torch.rand(count, 1, 2, 8, 8, generator=generator(1), dtype=torch.float64))


def output_without(model, x, target, places):
    """The output with entries of modules' outputs set to zero by hooks."""

    def zero(indices):
        def hook(module, inputs, output):
            output = output.clone()
            for index in indices:
                output[0, index] = 0
            return output

        return hook

    handles = [
        model.get_submodule(layer).register_forward_hook(zero(indices))
        for layer, indices in places.items()
    ]
    with torch.no_grad():
        found = model(x)[0, target]
    for handle in handles:
        handle.remove()
    return found


def contributions_by_hooks(model, x, target, layers, sizes):
    """Eq. 57 for channels, term by term."""
    found = torch.zeros(sizes, dtype=torch.float64)
    for chosen in itertools.product(*map(range, sizes)):
        for taken in itertools.product((False, True), repeat=len(layers)):
            parts = zip(layers, chosen, taken, strict=True)
            places = {layer: [index] for layer, index, removed in parts if removed}
            found[chosen] += (-1) ** sum(taken) * output_without(model, x, target, places)
    return found
