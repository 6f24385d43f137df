"""What is explained: the relevance of the output neurons (eqs. 13, 16, 18)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nrm.errors import PositiveSumError, QueryError, TargetError
from nrm.masks import per_sample
from nrm.prepare import Pass
from nrm.tensors import check_dense

_ONE = {0: "0, the only neuron", 1: "an int"}

Target = int | Sequence[int] | Sequence[tuple[int, ...]] | tuple[int, ...] | Tensor | None


@dataclass(frozen=True)
class Explained:
    """Output relevance, shaped like the output.

    Attributes:
        relevance: normalised: it sums to one over each sample (eq. 18).
        unnormalized: R~ (eq. 13): for a target, its output and zero elsewhere.
        target: `[batch]` (or `[batch, axes]`); `None` where output relevance was given.
    """

    relevance: Tensor
    unnormalized: Tensor
    target: Tensor | None


def explain_target(target: Target, forward: Pass, strict: bool) -> Explained:
    """One output neuron of each sample."""
    index = _index(target, forward)
    relevance = torch.zeros_like(forward.output)
    relevance[tuple(index)] = 1.0
    chosen_output = forward.output[tuple(index)]
    if not bool(torch.isfinite(chosen_output).all()):
        raise TargetError(
            f"of the {forward.graph.head or 'output'} the explained one is NaN or infinite for "
            "some sample."
        )
    if strict and bool((chosen_output <= 0).any()):
        raise PositiveSumError(
            "strict: the explained output is zero or negative for some sample (eq. 16). "
            "Explain another output, or drop strict: the relevance is normalised anyway."
        )
    axes = [a for place, a in enumerate(index) if place != forward.graph.output.batch_axis]
    chosen = torch.stack(axes, 1) if axes else torch.zeros(forward.batch, dtype=torch.long)
    if len(axes) == 1:
        chosen = chosen[:, 0]
    unnormalized = torch.zeros_like(forward.output)
    unnormalized[tuple(index)] = chosen_output  # others may be infinite
    return Explained(relevance, unnormalized, chosen)


def explain_relevance(relevance: Tensor, forward: Pass, strict: bool) -> Explained:
    """Output relevance as given, divided by its sum over each sample (eq. 18)."""
    output, variable = forward.returned, forward.graph.output
    if not isinstance(relevance, Tensor):
        raise TargetError(f"output_relevance is a tensor, not a {type(relevance).__name__}")
    check_dense(relevance, "output_relevance", TargetError)
    if relevance.shape != output.shape or relevance.dtype != output.dtype:
        raise TargetError(
            f"output_relevance has shape {tuple(relevance.shape)} and {relevance.dtype}, the "
            f"output {tuple(output.shape)} and {output.dtype}"
        )
    relevance = relevance.detach().to(forward.output.dtype, copy=True)  # callers reuse theirs
    if not bool(torch.isfinite(relevance).all()):
        raise TargetError("output_relevance holds NaN or infinite values")
    total = per_sample(relevance.unsqueeze(0), variable, forward.batch)[0]
    size = per_sample(relevance.abs().unsqueeze(0), variable, forward.batch)[0]
    if bool((total.abs() <= 1e-6 * size).any()) or bool((size == 0).any()):
        raise TargetError("output_relevance sums to zero for some sample: nothing to normalise by")
    if strict and bool((total <= 0).any()):
        raise PositiveSumError("strict: output_relevance sums to less than zero (eq. 16)")
    divisor = total
    if variable.batch_axis is not None:
        divisor = total.view((-1,) + (1,) * (relevance.dim() - 1 - variable.batch_axis))
    return Explained(relevance / divisor, relevance, None)


def _index(target: Target, forward: Pass) -> list[Tensor]:
    """The explained neurons as an index into the output, one per sample."""
    output, variable = forward.returned, forward.graph.output
    if variable.batch_axis is None and forward.batch > 1:
        raise TargetError(f"the output {tuple(output.shape)} does not keep the samples apart")
    # Masked logits are infinite: behind a head that is looked through, others may be explained.
    masked = forward.graph.head is not None and not bool(output.isnan().any())
    if not masked and not bool(torch.isfinite(output).all()):
        raise TargetError("the model's output holds NaN or infinite values")
    batch = forward.batch
    by_sample = output.movedim(variable.batch_axis, 0) if variable.batch_axis else output
    neurons = output.shape if variable.batch_axis is None else by_sample.shape[1:]
    if target is None:
        flat = _largest(by_sample, forward)
        if not neurons:
            return _with_rows([], forward)
        return _with_rows(list(torch.unravel_index(flat, neurons)), forward)
    try:
        wanted = torch.as_tensor(target, device=output.device).to_dense()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TargetError(f"a target is an int, or ints for each sample; got {target!r}") from None
    if wanted.is_floating_point() or wanted.is_complex() or wanted.dtype is torch.bool:
        raise TargetError(f"a target is an integer, got {wanted.dtype}")
    if len(neurons) == 0:
        wanted = wanted.reshape(-1)[:, None][:, :0] if bool((wanted == 0).all()) else wanted
    elif len(neurons) == 1 and wanted.dim() < 2:
        wanted = wanted.reshape(-1, 1)
    elif wanted.dim() == 1:
        wanted = wanted.reshape(1, -1)
    if wanted.dim() != 2 or wanted.shape[1] != len(neurons) or wanted.shape[0] not in (1, batch):
        raise TargetError(
            f"the output has neurons of shape {tuple(neurons)} and {batch} samples: a target is "
            f"{_ONE.get(len(neurons), f'a tuple of {len(neurons)} ints')}, or one for each "
            f"sample; got {target!r}."
        )
    for axis, size in enumerate(neurons):
        lowest = -size if len(neurons) > 1 else 0  # positions count from the end, classes do not
        bad = wanted[:, axis][(wanted[:, axis] < lowest) | (wanted[:, axis] >= size)]
        if bad.numel():
            raise TargetError(
                f"target {int(bad[0])} is out of range: the output has {size} neurons "
                f"(0 to {size - 1})" + (f" along axis {axis}." if len(neurons) > 1 else ".")
            )
    sizes = torch.tensor(list(neurons), device=output.device, dtype=wanted.dtype)
    wanted = torch.where(wanted < 0, wanted + sizes, wanted).expand(batch, -1)
    return _with_rows(list(wanted.unbind(1)), forward)


def _largest(by_sample: Tensor, forward: Pass) -> Tensor:
    """`[batch]`, the number of each sample's largest output."""
    outputs = by_sample.reshape(forward.batch, -1)
    if forward.graph.head is None:
        return outputs.argmax(1)
    # Of those that a sigmoid has rounded to one, the largest logit.
    axis = forward.graph.output.batch_axis
    behind = forward.output.movedim(axis, 0) if axis else forward.output
    behind = behind.reshape(forward.batch, -1)
    largest = outputs == outputs.amax(1, keepdim=True)
    return torch.where(largest, behind, -torch.inf).argmax(1)


def _with_rows(index: list[Tensor], forward: Pass) -> list[Tensor]:
    """An index of neurons with that of the samples put in, where the output has them."""
    axis = forward.graph.output.batch_axis
    if axis is not None:
        index.insert(axis, torch.arange(forward.batch, device=forward.output.device))
    return index


# -- How a measure was made, so that it can be made again: what is saved of it.


class Explains(Protocol):
    """What makes measures: an `Explainer`."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The measure of some inputs."""

    def __getstate__(self) -> dict[str, Any]:
        """The settings."""


class Recipe:
    """An explainer and what it was called with.

    Arguments:
        inputs, named: the model's arguments, as they were: nobody else may change them.
        target, output_relevance: what was explained; one of them is `None`.
    """

    def __init__(
        self,
        explainer: Explains,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        target: Tensor | None,
        output_relevance: Tensor | None,
    ) -> None:
        self.explainer = explainer
        self.call = (tuple(inputs), dict(named), target, output_relevance)
        self._settings = explainer.__getstate__()

    def ingredients(self) -> tuple[Any, ...]:
        """The arguments of `made`.

        Raises:
            QueryError: the explainer has other settings by now.
        """
        now = self.explainer.__getstate__()
        for name in now.keys() | self._settings.keys():
            if now.get(name) is not self._settings.get(name):
                raise QueryError(
                    f"the explainer's {name} changed after this measure was made, so that it "
                    "cannot be saved or copied: it would give other numbers. Call the explainer "
                    "again."
                )
        return (self.explainer, *self.call)


def made(
    explainer: Explains,
    inputs: Sequence[Any],
    named: Mapping[str, Any],
    target: Tensor | None,
    output_relevance: Tensor | None,
) -> Any:
    """The measure that was saved, made anew: the model runs forward once."""
    return explainer(*inputs, target=target, output_relevance=output_relevance, **named)
