"""Caches of keys and values that a model is called with, as inputs like any other.

A cache of transformers (`DynamicCache`) holds what earlier calls computed, and the model writes
into it. Here it is taken apart into its tensors, which are inputs of the call and carry relevance;
each run of the model gets a cache of its own, made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from nrm.errors import InputError


class GivenCache:
    """The keys and values of a cache, `[batch, heads, tokens, features]`, by layer.

    Arguments:
        kind: the type of the cache.
        layers: keys and values of each.
    """

    def __init__(self, kind: type[Any], layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.kind, self.layers = kind, tuple(layers)

    @classmethod
    def of(cls, cache: Any) -> GivenCache:
        """The tensors of a cache.

        Raises:
            InputError: it is one of another kind, or holds more than keys and values.
        """
        kind: type[Any] = type(cache)
        layers: list[Any] = list(getattr(cache, "layers", ()))
        plain = kind.__name__ == "DynamicCache" and hasattr(cache, "layers")
        if not plain or any(type(layer).__name__ != "DynamicLayer" for layer in layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            of_kinds = f" of {kinds}" if kinds else ""
            raise InputError(
                f"a {kind.__name__}{of_kinds} holds what earlier calls computed, and only caches "
                "of whole keys and values (DynamicCache) can be told apart into inputs. Leave the "
                "cache out (past_key_values=None, use_cache=False), and give all tokens."
            )
        filled = [layer for layer in layers if layer.keys is not None and layer.keys.numel()]
        if 0 < len(filled) < len(layers):
            raise InputError(
                f"{len(filled)} of the {len(layers)} layers of the {kind.__name__} are filled: "
                "give one that the whole model filled, or none."
            )
        return cls(kind, [(layer.keys, layer.values) for layer in filled])

    def cache(self) -> Any:
        """A cache that holds them, for the model to write into."""
        return self.kind(self.layers) if self.layers else self.kind()


def is_cache(given: Any) -> bool:
    """Whether an argument is a cache of transformers, of any kind."""
    return hasattr(given, "get_seq_length") and not isinstance(given, Tensor)


def opened(tree: Any) -> Any:
    """Arguments with the tensors of caches in their place.

    Raises:
        InputError: a cache is none that can be taken apart.
    """
    return pytree.tree_map(
        lambda leaf: GivenCache.of(leaf) if is_cache(leaf) else leaf, tree, is_leaf=is_cache
    )


def closed(tree: Any) -> Any:
    """Arguments with a new cache of the tensors in their place."""
    return pytree.tree_map(
        lambda leaf: leaf.cache() if isinstance(leaf, GivenCache) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, GivenCache),
    )


_PARTS = ("keys", "values")


def _flatten(given: GivenCache) -> tuple[list[Tensor], Any]:
    return [tensor for layer in given.layers for tensor in layer], (given.kind, len(given.layers))


def _flatten_with_keys(given: GivenCache) -> tuple[list[tuple[Any, Tensor]], Any]:
    tensors, context = _flatten(given)
    keys: list[Any] = [
        pytree.MappingKey(f"{layer}.{part}")
        for layer in range(len(given.layers))
        for part in _PARTS
    ]
    return list(zip(keys, tensors, strict=True)), context


def _unflatten(tensors: Any, context: Any) -> GivenCache:
    kind, _ = context
    tensors = list(tensors)
    return GivenCache(kind, list(zip(tensors[::2], tensors[1::2], strict=True)))


pytree.register_pytree_node(
    GivenCache,
    _flatten,
    _unflatten,
    serialized_type_name="nrm.capture.cache.GivenCache",
    flatten_with_keys_fn=_flatten_with_keys,  # type: ignore[arg-type]
)
