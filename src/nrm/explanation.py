"""One batch of inputs explained: its forward pass, what is explained of it, and how it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from nrm.diagnostics import warn_of_output
from nrm.errors import QueryError
from nrm.graph import Graph
from nrm.prepare import Pass
from nrm.query import Starts
from nrm.tables import Shown, Table, numbers, sizes
from nrm.targets import Explained, Recipe, made


class Explanation(Shown):
    """What a measure is of: the base of `Measure`, which asks it.

    Attributes:
        explained: `"output"`; or what is explained instead, `"logits behind softmax"`, where the
            model's last function is looked through (`Explainer(head=...)`).
    """

    def __init__(
        self,
        forward: Pass,
        explained: Explained,
        check: Callable[[], None] = lambda: None,
        recipe: Recipe | None = None,
    ) -> None:
        self._forward_pass = forward
        self._check = check  # that the weights are still those of the forward pass
        self._recipe = recipe
        output = forward.graph.output
        self._starts: Starts = {
            True: {output: explained.relevance.unsqueeze(0)},
            False: {output: explained.unnormalized.unsqueeze(0)},
        }
        warn_of_output(forward, explained)
        self.explained = "output" if forward.graph.head is None else str(forward.graph.head)
        self._target = explained.target
        self._scale = output.per_sample(self._starts[False][output], self.batch)[0]

    @property
    def target(self) -> Tensor | None:
        """`[batch]`, the explained output of each sample; `None` where `output_relevance` was given
        instead."""
        return None if self._target is None else self._target.clone()

    @property
    def output(self) -> Tensor:
        """The model's output."""
        return self._forward_pass.returned.clone()

    @property
    def scale(self) -> Tensor:
        """`[batch]`, the sum of the unnormalised output relevance (eq. 13), for one target its
        logit: multiply a result by it to have it in the logit's units."""
        return self._scale.clone()

    @property
    def graph(self) -> Graph:
        """The graph that the measure lives on."""
        return self._forward_pass.graph

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self._forward_pass.batch

    def __repr__(self) -> str:
        explained = "output relevance" if self.target is None else f"target {self.target.tolist()}"
        if self.graph.head is not None:
            explained += f", {self.explained}"
        variables = len(self.graph.variables)
        return f"{type(self).__name__}({explained}, {variables} variables, batch {self.batch})"

    def table(self) -> Table:
        graph, scale = self.graph, self._scale.tolist()
        target = (
            "an output relevance" if self._target is None else f"target {self._target.tolist()}"
        )
        unit = "R.scale, the explained output" if self._target is not None else "R.scale"
        rows = [
            ("samples", str(self.batch)),
            ("explained", f"{self.explained}, {target}"),
            (unit, numbers(scale)),
            ("output", sizes(self._forward_pass.returned.shape)),
            *((f"input {v.name!r}", sizes(self._forward_pass.shape(v))) for v in graph.inputs),
            ("layers", f"{len(graph.variables)}, of which {len(graph.cuts)} are cuts"),
            ("biases", "are inputs" if graph.bias_is_input else "take no relevance"),
            ("rules", repr(graph.specification)),
        ]
        note = "Relevances are shares of the explained output: times R.scale they are in its units."
        return Table("Normalized relevance measure", (), rows, [note])

    @property
    def forward_pass(self) -> Pass:
        """The forward pass that messages travel back through.

        Raises:
            QueryError: the model has changed since; or `torch.autocast` is on, under which messages
                would be rounded.
        """
        self._check()
        device = self._forward_pass.output.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            raise QueryError(
                "a measure is not asked within torch.autocast, which would round its messages. Ask "
                "it outside, or within torch.autocast(..., enabled=False)."
            )
        return self._forward_pass

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickled, saved by torch and deep-copied as explainer, inputs and target.

        It is made anew where it is loaded. The model goes along, once for all measures in a file.

        Raises:
            QueryError: the model or the explainer has changed since, so that it would give other
                numbers.
        """
        if self._recipe is None:
            raise QueryError(
                "this measure was not made by an Explainer, so that it cannot be made again where "
                "it is loaded. Save its results, or call an Explainer."
            )
        self._check()
        return made, self._recipe.ingredients()

    def __copy__(self) -> Self:
        """Another one on the same forward pass."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied
