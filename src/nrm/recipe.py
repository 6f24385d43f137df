"""How a measure was made, so that it can be made again: what is saved of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from nrm.errors import QueryError


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
