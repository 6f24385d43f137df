"""Half precision: a captured graph of it runs in single precision.

Relevances are quotients of sums that cancel, which float16 and bfloat16 cannot carry. Every value
of theirs is a float32 value too, so a graph with all of them widened is the network with the same
weights after `model.float()`. A rewrite of the captured graph only, never of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from nrm.capture.digest import place_of
from nrm.errors import CaptureError
from nrm.operators.functions import BITS, CAST

_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}

_ROUNDED = "rounded_to"
"""Where a node's `meta` keeps the type that the model computes it in."""


def widen(
    graph: FxGraph,
    constants: dict[Node, Tensor],
    copies: MutableMapping[Any, Tensor] | None = None,
) -> None:
    """Give what is of half precision in a graph single precision, in place.

    Double precision and integers stay as they are. Constants of half precision are replaced by
    copies, of twice the memory that the model's own take; one that several nodes share is copied
    once, and nothing here holds the model's.

    Arguments:
        copies: those that other captures of the same model made.

    Raises:
        CaptureError: something reads the bits of such numbers.
    """
    for node in list(graph.nodes):
        value = node.meta.get("val")
        narrow = getattr(value, "dtype", None)
        if narrow in _WIDER:
            node.meta[_ROUNDED] = narrow
        _refuse_bits(node)
        if node.op == "call_function":
            # Casts, factories, softmax, asserted types: whatever names a type, anywhere.
            node.args, node.kwargs = pytree.tree_map_only(
                torch.dtype, lambda kind: _WIDER.get(kind, kind), (node.args, node.kwargs)
            )
            if narrow in _WIDER and narrow is torch.get_default_dtype():
                _widen_default(node, _WIDER[narrow])
        if isinstance(value, FakeTensor) or (value is not None and node not in constants):
            node.meta["val"] = _described(value)
    copies = {} if copies is None else copies
    for node, tensor in constants.items():
        if tensor.dtype not in _WIDER:
            continue
        place = place_of(tensor)
        copy = copies.get(place)
        if copy is None:
            copy = copies[place] = wide(tensor)
        constants[node] = copy
        if not isinstance(node.meta.get("val"), FakeTensor):  # an eager trace has the tensor
            node.meta["val"] = constants[node]


def wide(tensor: Tensor) -> Tensor:
    """A tensor of half precision in single precision; any other as it is."""
    return tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))


def is_rounded(graph: FxGraph) -> bool:
    """Whether the model computes anything of a widened graph in half precision."""
    return any(_ROUNDED in node.meta for node in graph.nodes)


def is_copy(node: Node) -> bool:
    """Whether a constant is a copy that `widen` made: nobody else can write to it."""
    return _ROUNDED in node.meta


def as_rounded(node: Node, value: Any) -> Any:
    """A value of a widened graph as the model rounds it, to compare the two."""
    narrow = node.meta.get(_ROUNDED)
    if narrow is None or node.op != "call_function" or not isinstance(value, Tensor):
        return value
    return value.to(narrow).to(value.dtype)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """`torch.autocast` off, on the CPU and where the model is: it would round what we compute."""
    devices = {"cpu", *(parameter.device.type for parameter in model.parameters())}
    with ExitStack() as stack:
        for device in devices:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _described(value: Any) -> Any:
    """What a node's `meta` says of its value, of single precision."""
    if isinstance(value, Tensor):
        return wide(value)
    if isinstance(value, TensorMetadata):
        return value._replace(dtype=_WIDER.get(value.dtype, value.dtype))
    if isinstance(value, list | tuple):
        return type(value)(map(_described, value))
    return value


def _widen_default(node: Node, kind: torch.dtype) -> None:
    """Cast a value whose type is torch's default, `torch.arange(4) / 4`, after it is computed."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    of_another = any(_ROUNDED in parent.meta for parent in node.all_input_nodes)
    if of_another or any(isinstance(leaf, torch.dtype) for leaf in leaves):
        return
    with node.graph.inserting_after(node):
        cast = node.graph.call_function(CAST, (node, kind))
    cast.meta = node.meta | {"val": _described(node.meta["val"])}
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)


def _refuse_bits(node: Node) -> None:
    if node.target is not BITS:
        return
    kinds = {n.meta.get(_ROUNDED) for n in (node, *node.all_input_nodes)}
    if len(kinds) > 1:
        raise CaptureError(
            f"the model reads the bits of half-precision numbers as {node.args[1]} "
            "(Tensor.view(dtype)), and it is explained in float32, where they are others. "
            "Convert the numbers with Tensor.to(dtype), or explain the model in float32."
        )
