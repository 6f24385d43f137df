"""A model as a function from tensors to the one tensor that is explained.

Keyword arguments, nested inputs and nested outputs all end here: what is captured has tensors
alone on both sides. Half precision ends here as well: what is captured of it runs in single.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from nrm.capture.cache import closed, opened
from nrm.capture.digest import place_of
from nrm.errors import CaptureError, InputError
from nrm.operators.call import BITS, CAST
from nrm.tensors import full_precision

Output = str | int | Sequence[str | int] | Callable[[Any], Tensor] | None
"""Which of a model's outputs is explained: a name, an index, a path of them, or a function of the
output that returns a tensor; `None` where there is only one."""


_PLAIN = (int, float, str, bool, NoneType, torch.dtype, torch.device)


class ModelCall(nn.Module):
    """The model with everything but tensors fixed; its parameters and modules are the model's.

    Attributes:
        tensors: the tensors among the arguments.
        names: a name for each, after the model's parameters.
    """

    PREFIX = "model"

    def __init__(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Output
    ) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.training = False
        found, self._layout = pytree.tree_flatten_with_path(opened((tuple(args), dict(kwargs))))
        leaves = [leaf for _, leaf in found]
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [leaves[i] for i in self._places]
        self._fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.names = _names(model, [found[place][0] for place in self._places])

    @property
    def key(self) -> tuple[Any, ...]:
        """What else but the tensors decides the graph; unique where that cannot be told."""
        return (str(self._layout), *(x if isinstance(x, _PLAIN) else object() for x in self._fixed))

    def arguments(self, *tensors: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments, with tensors in their places."""
        leaves = list(self._fixed)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = closed(pytree.tree_unflatten(leaves, self._layout))
        return args, kwargs

    def forward(self, *tensors: Tensor) -> Tensor:
        args, kwargs = self.arguments(*tensors)
        return choose(self.model(*args, **kwargs), self.output, type(self.model).__name__)


def choose(result: Any, output: Output, model: str) -> Tensor:
    """The tensor to explain among what a model returned.

    Raises:
        CaptureError: there are several, or not the one asked for; lists those there are.
    """
    found = result
    if callable(output):
        found = output(result)
        if not isinstance(found, Tensor):
            raise CaptureError(
                f"the function given as output= returned a {type(found).__name__}, not a tensor."
            )
        return found
    if output is None:
        if isinstance(result, Tensor):
            return result
        tensors = _tensors(result)
        if len(tensors) == 1:
            return next(iter(tensors.values()))
        raise CaptureError(
            f"{model} returns a {type(result).__name__}, and one tensor is explained. Choose one "
            f"with Explainer(..., output=...): {_listed(tensors)}; or give a function of the "
            "output that returns a tensor."
        )
    path = [output] if isinstance(output, str | int) else list(output)
    for step in path:
        try:
            found = getattr(found, str(step)) if _has(found, step) else found[step]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise CaptureError(
                f"{model} has no output {output!r}. There are: {_listed(_tensors(result))}."
            ) from None
    if not isinstance(found, Tensor):
        raise CaptureError(
            f"output {output!r} of {model} is a {type(found).__name__}, not a tensor. "
            f"There are: {_listed(_tensors(result))}."
        )
    return found


def _has(found: Any, step: str | int) -> bool:
    return isinstance(step, str) and not isinstance(found, Mapping) and hasattr(found, step)


def _tensors(result: Any) -> dict[str, Tensor]:
    """Every tensor in a nested output, by its path."""
    if hasattr(result, "__dataclass_fields__") and not isinstance(result, Mapping):
        result = {
            name: getattr(result, name)
            for name in result.__dataclass_fields__
            if getattr(result, name, None) is not None
        }
    if isinstance(result, Mapping):
        items = [(str(key), value) for key, value in result.items()]
    elif isinstance(result, list | tuple):
        items = [(str(i), value) for i, value in enumerate(result)]
    elif isinstance(result, Tensor):
        return {"": result}
    else:
        return {}
    return {
        ".".join(part for part in (name, inner) if part): tensor
        for name, value in items
        for inner, tensor in _tensors(value).items()
    }


def _listed(tensors: Mapping[str, Tensor]) -> str:
    if not tensors:
        return "no tensors at all"
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())


def _names(model: nn.Module, paths: Sequence[pytree.KeyPath]) -> list[str]:
    """Names of arguments, after the parameters they are given for, and the keys within them.

    Arguments:
        paths: where each lies in `(args, kwargs)`.
    """
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except ValueError:  # of what is written in another language
        parameters = []
    found = []
    for side, place, *inner in paths:
        named = _key(side) == 1
        name = str(_key(place)) if named else _parameter(parameters, int(_key(place)))
        found.append(".".join([name, *(str(_key(key)) for key in inner)]))
    return found


def _parameter(parameters: Sequence[inspect.Parameter], place: int) -> str:
    """The name of a positional argument: its parameter's, or a number of those that take any."""
    several = (i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_POSITIONAL)
    begin = next(several, len(parameters))
    if place < begin:
        return parameters[place].name
    name = parameters[begin].name if begin < len(parameters) else "input"
    return f"{name}_{place - begin}"


def _key(key: Any) -> Any:
    """The index, key or attribute that one step of a path takes."""
    return next(getattr(key, name) for name in ("idx", "key", "name") if hasattr(key, name))


def check_nested(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that hold tensors where they cannot be followed.

    Raises:
        InputError: names the type.
    """
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, Tensor | nn.Module):
            continue
        if isinstance(leaf, np.ndarray):  # it would count as a constant, which takes no relevance
            raise InputError(
                f"an argument is an array {leaf.shape}: give tensors, e.g. torch.as_tensor(x)."
            )
        held = vars(leaf).values() if hasattr(leaf, "__dict__") else ()
        if hasattr(leaf, "edge_index") or any(isinstance(value, Tensor) for value in held):
            raise InputError(
                f"tensors within a {type(leaf).__name__} cannot be followed: give them as "
                "arguments of their own (or in tuples and dicts), e.g. "
                "explainer(data.x, data.edge_index), with a module around the model if need be."
            )


# -- half precision --------------------------------------------------------------------------------
#
# Relevances are quotients of sums that cancel, which float16 and bfloat16 cannot carry. Every value
# of theirs is a float32 value too, so a graph with all of them widened is the network with the same
# weights after `model.float()`. A rewrite of the captured graph only, never of the model.

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
    """`torch.autocast` off, on the CPU and where the model is, and full precision: it would round
    what we compute."""
    devices = {"cpu", *(parameter.device.type for parameter in model.parameters())}
    with ExitStack() as stack:
        stack.enter_context(full_precision())
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


# -- single and double precision in one model ------------------------------------------------------
#
# A double model may compute a part in single precision (a norm, a rotation), a single one a part in
# double. Messages are of one type, the wider one: what carries relevance is computed in double.

_IN_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}

_SINGLE = "single"
"""Where a node's `meta` says that the model computes it in single precision, and we in double."""


def unify(graph: FxGraph, carrying: Collection[Node], read: Collection[Node]) -> None:
    """Give double precision to what carries relevance, where some of it has it, in place.

    Constants keep their type, and are cast where they are read.

    Arguments:
        carrying: the nodes of real values that are computed from real-valued inputs or embeddings,
            with those.
        read: the nodes that the output is computed from.
    """
    kinds = {_kind(node) for node in carrying if node in read}
    if kinds.isdisjoint(_IN_DOUBLE) or kinds.isdisjoint(_IN_DOUBLE.values()):
        return
    casts: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if node not in carrying:
            continue
        if node.op == "placeholder":
            if _kind(node) in _IN_DOUBLE:
                cast = _cast_after(node)
                node.replace_all_uses_with(cast, delete_user_cb=lambda user, c=cast: user is not c)
            continue
        for parent in node.all_input_nodes:
            if parent not in carrying and _kind(parent) in _IN_DOUBLE:
                if parent not in casts:
                    casts[parent] = _cast_after(parent)
                node.replace_input_with(parent, casts[parent])
        node.args, node.kwargs = pytree.tree_map_only(
            torch.dtype, lambda kind: _IN_DOUBLE.get(kind, kind), (node.args, node.kwargs)
        )
        if _kind(node) in _IN_DOUBLE:
            node.meta["val"] = pytree.tree_map(_in_double, node.meta["val"])
            node.meta[_SINGLE] = True


def is_mixed(graph: FxGraph) -> bool:
    """Whether the model computes in single precision what is computed in double here."""
    return any(_SINGLE in node.meta for node in graph.nodes)


def _kind(node: Node) -> torch.dtype | None:
    """The type of a node's value, of the first where there are several."""
    first = next(iter(pytree.tree_leaves(node.meta.get("val"))), None)
    return getattr(first, "dtype", None)


def _in_double(value: Any) -> Any:
    """What a node's `meta` says of its value, of double precision; it holds no values."""
    kind = _IN_DOUBLE.get(getattr(value, "dtype", None))  # type: ignore[arg-type]
    if kind is None:
        return value
    if isinstance(value, FakeTensor):
        return value.to(kind)
    with FakeTensorMode(allow_fallback_kernels=True):
        return torch.empty_strided(
            tuple(value.shape), value.stride(), dtype=kind, device=getattr(value, "device", "cpu")
        )


def _cast_after(node: Node) -> Node:
    value = node.meta["val"]
    with node.graph.inserting_after(node):
        cast = node.graph.call_function(CAST, (node, _IN_DOUBLE[value.dtype]))
    scopes = {k: v for k, v in node.meta.items() if k == "nn_module_stack"}
    cast.meta = scopes | {"val": _in_double(value), _SINGLE: True}
    return cast


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
