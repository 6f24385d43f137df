"""nrm as an explanation function of Quantus: arrays in, arrays out.

Heatmaps are in units of the explained output, as those of the methods that Quantus compares: its
metrics read a positive value as speaking for the output. Shares of an output below zero, which
`scale="normalized"` gives, have the opposite signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import nn

from nrm.composites import Composite
from nrm.condition import Given, Sets, listed
from nrm.explainer import Explainer
from nrm.methods import Scale, in_units, reading
from nrm.rules import Rule

Array = NDArray[Any]
Device = torch.device | str


class Explain:
    """An explanation function that captures a model once, for metrics that explain it often.

    Arguments:
        composite: which rule applies where (`nrm.composites`); by default what suits the model.
        bias: `"drop"` or `"input"`; by default what the composite assumes.
        sets: neuron sets, formulas or layers: only walks that pass them count (CRP, eq. 37).
        given: the same, and divide by their relevance (eq. 11).
        scale: `"logit"`: in units of the explained output; `"normalized"`: shares of it, whose
            signs are turned round where it is negative; `"original"`: LRP with each rule's own
            denominator (docs/peers.md).

    Example:
        >>> explain = Explain(nrm.composites.EpsilonPlusFlat())
        >>> quantus.MaxSensitivity()(model, x_batch=x, y_batch=y, explain_func=explain)
    """

    def __init__(
        self,
        composite: Composite | Rule | None = None,
        *,
        bias: Literal["drop", "input"] | None = None,
        sets: Sets | Sequence[Sets] = (),
        given: Given = None,
        scale: Scale = "logit",
    ) -> None:
        self.composite, self.bias = composite, bias
        self.sets, self.given, self.scale = listed(sets), given, scale
        self._explainer: Explainer | None = None

    def __call__(
        self, model: nn.Module, inputs: Array, targets: Array, device: Device | None = None
    ) -> Array:
        """The heatmaps of a batch.

        Arguments:
            model: in evaluation mode.
            inputs: a batch, as the model takes it.
            targets: the explained output of each sample.
            device: where the model is; found from its parameters if not said.

        Returns:
            shaped like `inputs`.
        """
        if self._explainer is None or self._explainer.model is not model:
            self._explainer = Explainer(model, self.composite, bias=self.bias)
        like = next(model.parameters(), torch.empty(0))
        x = torch.as_tensor(inputs).to(device or like.device)
        if not any(isinstance(module, nn.Embedding) for module in model.modules()):
            x = x.to(like.dtype)
        chosen = torch.as_tensor(targets)
        if chosen.is_floating_point() and bool((chosen == chosen.round()).all()):
            chosen = chosen.long()  # labels often come as floats
        R = self._explainer(x, target=chosen)
        heatmap = R.heatmap(*self.sets, given=self.given, normalized=reading(self.scale))
        found: Array = in_units(R, heatmap, self.scale).cpu().numpy()
        return found


def explain_func(
    model: nn.Module, inputs: Array, targets: Array, device: Device | None = None, **options: Any
) -> Array:
    """The heatmaps of a batch, as Quantus asks for them: `explain_func_kwargs` are `options`.

    Captures the model at every call; an `Explain` does so once.

    Arguments: as for `Explain` and its call.

    Example:
        >>> quantus.Sparseness()(model, x_batch=x, y_batch=y, explain_func=explain_func)
    """
    return Explain(**options)(model, inputs, targets, device)
