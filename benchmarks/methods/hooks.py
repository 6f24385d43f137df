"""ConRel, CRP and RelMax by zennit-crp; needs its environment."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from nrm.torchvision_mismatch import import_torchvision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_torchvision()  # which zennit needs to import
    from crp.attribution import CondAttribution
    from crp.concepts import ChannelConcept
    from crp.helper import load_maximization
    from crp.visualization import FeatureVisualization
    from zennit.composites import LayerMapComposite
    from zennit.layer import Sum
    from zennit.rules import Epsilon, Norm, Pass, ZPlus
    from zennit.types import Activation, Convolution, Linear

Conditions = Sequence[Mapping[str, Sequence[int]]]

STRONG = 1e6
"""How strong inputs are: this zennit adds 1e-6 to denominators, which is nothing beside them."""


class _Elements(CondAttribution):  # type: ignore[misc] # untyped
    """Heatmaps of input elements, not summed over colours."""

    def heatmap_modifier(self, data: Tensor, on_device: str | None = None) -> Tensor:
        gradient = data.grad
        assert gradient is not None
        return gradient.detach().clone()


def composite() -> LayerMapComposite:
    """z+ for convolutions, LRP-0 for linear layers, sums in proportion to their terms."""
    return LayerMapComposite(
        [
            (Activation, Pass()),
            (Sum, Norm()),
            (Convolution, ZPlus()),
            (Linear, Epsilon(epsilon=1e-12)),
        ]
    )


def summation() -> nn.Module:
    """A sum over the last axis as zennit knows it: what it is not told of, it sees as a copy."""
    module: nn.Module = Sum()
    return module


def heatmaps(
    model: nn.Module, x: Tensor, conditions: Conditions, exclude_parallel: bool = True
) -> Tensor:
    """One sample's conditional heatmaps: `[conditions, *input]`."""
    attribution = _Elements(model)
    asked = [{layer: list(c) for layer, c in condition.items()} for condition in conditions]
    found: Tensor = attribution(
        x.clone().requires_grad_(), asked, composite(), exclude_parallel=exclude_parallel
    ).heatmap
    return found


def channel_relevance(model: nn.Module, x: Tensor, layer: str, target: int) -> Tensor:
    """The relevance of every channel of a layer, of every sample: `[batch, channels]`."""
    attribution = CondAttribution(model)
    conditions = [{"y": [target]}] * len(x)
    found = attribution(
        x.clone().requires_grad_(), conditions, composite(), record_layer=[layer]
    ).relevances[layer]
    relevance: Tensor = ChannelConcept().attribute(found, abs_norm=False)
    return relevance


def reference_samples(
    model: nn.Module, x: Tensor, layer: str, target: int, k: int
) -> tuple[Tensor, Tensor]:
    """The samples with the most relevance of each channel, and their relevance: `[k, channels]`."""
    samples = [(one, target) for one in x]
    with tempfile.TemporaryDirectory() as folder, _silence():
        found = FeatureVisualization(
            CondAttribution(model), samples, {layer: ChannelConcept()}, abs_norm=False, path=folder
        )
        found.run(composite(), 0, len(samples), batch_size=4)
        indices, relevance, _ = load_maximization(found.RelMax.PATH, layer)
    return torch.as_tensor(indices[:k]), torch.as_tensor(relevance[:k])


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
