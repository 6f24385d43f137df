"""What an architecture of the zoo is, the list of them, and what several families need.

A new one is a function that builds a `Case`, under a name, in the file of its family. Its defaults
are what the benchmark explains; keywords make some of them smaller still, of the same operators.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import nrm
from nrm.capture.call import ModelCall
from nrm.graph import first_tokens
from nrm.torchvision_mismatch import import_torchvision


@dataclass(frozen=True)
class Case:
    """One model, what it is called with, and what is explained of it.

    Attributes:
        target: the explained output neuron, without the batch axis; `None` along one axis stands
            for the largest output there.
        options: further arguments of the explainer.
        leaves: the inputs whose relevance the timed pass asks for, one pass each; `None`: the
            tokens, or the first input.
        note: what to know about the row.
        refused: words of the reason for which it is refused; empty: it is explained.
        to_double: what else has to be done to a model for it to run in double precision.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: tuple[int | None, ...] = (None,)
    options: dict[str, Any] = field(default_factory=dict)
    leaves: tuple[str | None, ...] = (None,)
    note: str = ""
    refused: str = ""
    to_double: Callable[[Any], None] | None = None

    @property
    def index(self) -> tuple[int, ...]:
        """The explained output neuron, as `build` chose it."""
        assert None not in self.target
        return tuple(int(place or 0) for place in self.target)

    def double(self) -> Case:
        """The same in double precision."""
        args, kwargs = _double(self.args), _double(self.kwargs)
        model = copy.deepcopy(self.model).double()
        if self.to_double is not None:
            self.to_double(model)
        return replace(self, model=model, args=args, kwargs=kwargs)

    def explainer(self, composite: nrm.composites.Composite | None = None) -> nrm.Explainer:
        return nrm.Explainer(self.model, composite, **self.options)

    def explain(self, explainer: nrm.Explainer) -> nrm.Measure:
        return explainer(*self.args, target=self.index, **self.kwargs)

    def passes(self, R: nrm.Measure) -> dict[str, Tensor]:
        """The relevance of every input of `leaves`, by the name of its variable."""
        found = {}
        for at in self.leaves:
            name = at or first_leaf(R)
            is_words = R.graph.variable(name).kind == "embedding"
            found[name] = R.tokens(at=name) if is_words else R.heatmap(at=name)
        return found


def first_leaf(R: nrm.Measure) -> str:
    """The embeddings of the first integer input, or the first input."""
    try:
        return first_tokens(R.graph)
    except nrm.errors.QueryError:
        return R.graph.inputs[0].name


def _double(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, dict):
        return {name: _double(value) for name, value in values.items()}
    return tuple(_double(value) for value in values) if isinstance(values, tuple) else values


# -- the models ------------------------------------------------------------------------------------

CASES: dict[str, Callable[..., Case]] = {}
NEEDS: dict[str, str] = {}
"""The package that a case needs, beside torch."""


def case(name: str, needs: str = "") -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """List what builds a case under a name."""

    def listed(build: Callable[..., Case]) -> Callable[..., Case]:
        CASES[name] = build
        NEEDS[name] = needs
        return build

    return listed


def build(name: str, **smaller: Any) -> Case:
    """The case of this name, its weights the same at every call.

    Arguments:
        smaller: keywords of the function that builds it.
    """
    torch.manual_seed(0)
    built = CASES[name](**smaller)
    with torch.no_grad():
        stir(built.model)
    built.model.eval().requires_grad_(False)
    return replace(built, target=_largest(built))


def _largest(built: Case) -> tuple[int, ...]:
    """The explained output neuron: by a small one, relevance would be divided."""
    with torch.no_grad():
        call = ModelCall(built.model, built.args, built.kwargs, built.options.get("output"))
        output = call(*call.tensors)
    if output.dim() > len(built.target):
        output = output.select(built.options.get("batch_axis", 0), 0)
    along = output[tuple(slice(None) if place is None else place for place in built.target)]
    return tuple(int(along.argmax()) if place is None else place for place in built.target)


_ZERO_AT_FIRST = ("layer_scale", "class_token", "cls_token")


def stir(model: nn.Module) -> None:
    """Make biases, norms' scales and running statistics random: at zero and one they hide much."""
    for name, parameter in model.named_parameters():
        if parameter.dim() <= 1 or name.rpartition(".")[2] in _ZERO_AT_FIRST:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.1 * torch.randn_like(buffer))
        elif name.endswith("running_var"):
            buffer.mul_(0.5 + torch.rand_like(buffer))


# -- what several families need --------------------------------------------------------------------


def classifier(name: str) -> Case:
    """One of torchvision's classifiers, on a picture of 64 x 64."""
    return pictured(getattr(import_torchvision().models, name)(weights=None), 64)


def pictured(model: nn.Module, size: int, **options: Any) -> Case:
    """A network of pictures of three channels, on a square one."""
    return Case(model, (torch.randn(1, 3, size, size),), **options)


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    **IDS,
}
"""Sizes of transformers' small models; what a configuration does not know is kept unused."""


def transformers_package() -> Any:
    """transformers, without its advice, after torchvision, which it imports if it can."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with contextlib.suppress(ModuleNotFoundError):
        import_torchvision()
    return importlib.import_module("transformers")


def ids_of(length: int = 12, vocabulary: int = 100) -> Tensor:
    """Random words, none of them special."""
    return torch.randint(3, vocabulary, (1, length))


def words_apart(model: Any) -> None:
    """Multiply each word by a matrix of its own: that of its expert."""
    model.set_experts_implementation("batched_mm")
