"""Rewrites of a captured graph, never of the model: operators that relevance passes.

Graphs within the graph take their operators' places (`inline`); a module that a user gave a row of
its own becomes one operation (`collapse`), as does a linear map that goes through complex numbers
(`collapse_complex`); and what dropouts return is told from what they are given (`tell_apart`). What
scales and shifts a layer's channels by constants is taken into its weights (`fold`). What hides a
network is written out in `nrm.capture.expand`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import autocast_mode
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

from nrm.capture import nodes as addresses
from nrm.capture.nodes import dependents, is_complex, is_float_tensor
from nrm.errors import CaptureError
from nrm.operators import (
    COMPLEX_LINEAR,
    Block,
    Call,
    Operator,
    functional,
    has_row,
    lookup,
    picks,
    standard,
)
from nrm.operators.call import ALIAS, Rescaling
from nrm.operators.custom import DIFFERENTIABLE, is_linear
from nrm.operators.sums import scale_and_shift

aten = torch.ops.aten

# -- regions: parts of a model under `torch.autocast`, or with gradients switched on or off --------
#
# `torch.export` keeps each as one operator with a graph of its own; an eager trace marks where it
# begins and ends. Gradients change no value, and which precision is computed in is decided in
# `nrm.capture.call`.

_BODY = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}
"""The place of the graph among an operator's arguments; what the graph reads follows."""

_MARKS = (autocast_mode._enter_autocast, autocast_mode._exit_autocast)


def inline(graph: FxGraph) -> None:
    """Put every region's operators in its place.

    Raises:
        CaptureError: there are other graphs within the graph, as `torch.cond` has them.
    """
    for node in reversed(list(graph.nodes)):  # an end reads its beginning
        if node.target in _MARKS:
            graph.erase_node(node)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            place = _BODY.get(str(node.target))
            if place is not None:
                _replace_region(graph, node, place)
            elif any(map(_graph_of, node.all_input_nodes)):
                raise CaptureError(
                    f"no rule covers {node.target}, which decides within the graph what is "
                    "computed. Write it in plain Python (if, for): it is then followed for one "
                    "input at a time."
                )
        elif _graph_of(node) is not None and not node.users:
            graph.erase_node(node)
    graph.lint()


def _replace_region(graph: FxGraph, region: Node, place: int) -> None:
    holder = region.args[place]
    assert isinstance(holder, Node)
    body = _graph_of(holder)
    assert body is not None
    inline(body)
    within = dict(zip(body.find_nodes(op="placeholder"), region.args[place + 1 :], strict=True))
    with graph.inserting_before(region):
        for node in body.nodes:
            if node.op not in ("placeholder", "output"):
                within[node] = graph.node_copy(node, within.__getitem__)
    results = body.output_node().args[0]
    assert isinstance(results, list | tuple)
    for user in list(region.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(within[results[user.args[1]]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(region)


def _graph_of(node: Node) -> FxGraph | None:
    """The graph that a node stands for, if it does."""
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    assert isinstance(node.target, str)
    found = getattr(node.graph.owning_module, node.target, None)
    return found.graph if isinstance(found, GraphModule) else None


# -- what an eager trace writes in place -----------------------------------------------------------
#
# Export has no writing in place; an eager trace has what the model does. What is written into a
# part of a tensor, or with `out=`, is a new tensor here, which is read in its place from there on.
# That nothing else saw the memory is checked by values.

_PARTS: dict[object, Callable[..., tuple[object, tuple[object, ...]]]] = {
    aten.narrow.default: lambda dim, start, length: (
        aten.slice_scatter.default,
        (dim, start, start + length),
    ),
    aten.slice.Tensor: lambda dim=0, start=None, end=None, step=1: (
        aten.slice_scatter.default,
        (dim, start, end, step),
    ),
    aten.select.int: lambda dim, index: (aten.select_scatter.default, (dim, index)),
}
"""Of operators that take a part: what writes it back, and its arguments after the part."""


def write_through(graph: FxGraph) -> None:
    """Make what is written in place a tensor of its own."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        source, value = _written(graph, node)
        if source is None:
            continue
        while source.op == "call_function" and source.target in _PARTS:
            whole = source.args[0]
            assert isinstance(whole, Node)
            target, arguments = _PARTS[source.target](*source.args[1:], **source.kwargs)
            with graph.inserting_after(value):
                back = graph.call_function(target, (whole, value, *arguments))  # type: ignore[arg-type]
            back.meta = dict(whole.meta)
            _read_after(node, source, value, place)
            source, value = whole, back
        _read_after(node, source, value, place)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.lint()


def _written(graph: FxGraph, node: Node) -> tuple[Node | None, Node]:
    """What a node writes into, and the node of what it writes."""
    into = node.kwargs.get("out")
    if into is None:
        first = node.args[0] if node.args else None
        in_place = str(node.target).split(".")[1].endswith("_")
        return (first if in_place and isinstance(first, Node) else None), node
    plain = functional(node.target)  # type: ignore[arg-type]
    if not isinstance(into, Node) or plain is node.target:
        return None, node
    with graph.inserting_before(node):
        value = graph.call_function(
            plain, node.args, {name: given for name, given in node.kwargs.items() if name != "out"}
        )
    value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    return into, value


def _read_after(writing: Node, source: Node, value: Node, place: dict[Node, int]) -> None:
    """Whoever reads something after it was written reads what was written."""
    late = {user for user in source.users if place.get(user, -1) > place[writing]}
    source.replace_all_uses_with(value, delete_user_cb=late.__contains__)


# -- modules that a user gave a row of their own -------------------------------------------------


def collapse(graph: FxGraph) -> None:
    """Make one node of every call of a module whose class has a row."""
    calls: dict[str, list[Node]] = {}
    kinds: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for address, kind in addresses.scopes(node):
            if has_row(kind):
                calls.setdefault(address, []).append(node)
                kinds[address] = kind
                break  # the outermost
    for address, nodes in calls.items():
        _collapse(graph, address, kinds[address], nodes)
    graph.lint()


def _collapse(graph: FxGraph, address: str, kind: str, nodes: list[Node]) -> None:
    inside = set(nodes)
    results = [n for n in nodes if any(user not in inside for user in n.users)]
    if len(results) != 1:
        raise CaptureError(
            f"module {address!r} ({kind}) has a rule of its own, but returns {len(results)} "
            "tensors. Give the rule to a module that returns one."
        )
    result = results[0]
    given = list(dict.fromkeys(p for n in nodes for p in n.all_input_nodes if p not in inside))
    names = _names(given, address)
    body = FxGraph()
    within = {node: body.placeholder(f"argument_{i}") for i, node in enumerate(given)}
    for node in nodes:
        within[node] = body.node_copy(node, within.__getitem__)
    body.output(within[result])
    block = Block.of(kind, GraphModule(torch.nn.Module(), body), list(names.values()))
    with graph.inserting_before(result):
        call = graph.call_function(block, tuple(given))
    call.meta = dict(result.meta)
    result.replace_all_uses_with(call)
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)


def _names(given: list[Node], address: str) -> dict[Node, str]:
    """`input`, `input_1`, ... and parameters by their names within the module."""
    names: dict[Node, str] = {}
    count = 0
    for node in given:
        parameter = node.meta.get("parameter")
        if parameter is not None:
            names[node] = parameter.removeprefix(address.partition("@")[0] + ".")
        else:
            names[node] = "input" + (f"_{count}" if count else "")
            count += 1
    return names


# -- dropout in evaluation: who reads its result, and who its operand, which are one tensor --------
#
# A capture may take the two for one (an export with torch 2.14 does): what reads the operand
# afterwards seems to read the result, and the relevance of the dropout would be that of all that
# flows beside it. So while a model is captured the result is a view of its own, and after that the
# views tell who reads which.


class ResultsApart(TorchFunctionMode):
    """Makes a view of what a dropout returns, where that is its operand."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if "dropout" in name and not name.endswith("_"):
            given = args[0] if args else (kwargs or {}).get("input")
            if isinstance(result, Tensor) and result is given:
                return ALIAS(result)
        return result


def tell_apart(graph: FxGraph) -> None:
    """Give what reads an operand its operand back, and take the views away."""
    for view in list(graph.nodes):
        if view.target is not ALIAS:
            continue
        dropout, others = view.args[0], set(graph.nodes) - {view}
        if not isinstance(dropout, Node) or not _is_dropout(dropout):
            continue
        assert isinstance(dropout.args[0], Node)
        dropout.replace_all_uses_with(dropout.args[0], delete_user_cb=others.__contains__)
        view.replace_all_uses_with(dropout)
        graph.erase_node(view)


def _is_dropout(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    row = standard(Call.of(node))
    return row is not None and row.function.role == "dropout"


# -- linear maps by way of complex numbers (Fourier transforms, rotations) -------------------------
#
# Relevance is not followed through complex numbers. Where all that happens to them is linear, what
# comes out is a linear map of what went in, whose derivatives say everything. What is not linear
# stays, and is refused by name if a walk gets there.


def collapse_complex(graph: FxGraph, inputs: Sequence[Node]) -> None:
    """Make one node of every linear map that goes through complex numbers.

    Arguments:
        inputs: the placeholders of the model's inputs.
    """
    varying = dependents(graph.nodes, inputs, sizes=False)
    hidden = {node for node in varying if node.op == "call_function" and is_complex(node)}
    for node in list(graph.nodes):
        comes_back = node in varying and is_float_tensor(node)
        if comes_back and not hidden.isdisjoint(node.all_input_nodes):
            part = _part(node, hidden)
            if all(_is_linear(inner, varying) for inner in part):
                _replace_part(graph, node, part)
    graph.lint()


def _part(result: Node, hidden: set[Node]) -> list[Node]:
    """The complex nodes behind a real one, and itself, in order."""
    found = {result}
    waiting = [result]
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent in hidden and parent not in found:
                found.add(parent)
                waiting.append(parent)
    return [node for node in result.graph.nodes if node in found]


def _is_linear(node: Node, varying: set[Node]) -> bool:
    """Whether a node is linear in what depends on the input, of which all is real or complex."""
    if picks(node):
        return True
    moving = [parent for parent in node.all_input_nodes if parent in varying]
    if not all(is_float_tensor(parent) or is_complex(parent) for parent in moving):
        return False  # an index or a number that depends on the input
    if any(parent.op == "placeholder" and is_complex(parent) for parent in moving):
        return False  # a complex input
    return is_linear(node, moving)


def _replace_part(graph: FxGraph, result: Node, part: Sequence[Node]) -> None:
    inside = set(part)
    given = list(dict.fromkeys(p for n in part for p in n.all_input_nodes if p not in inside))
    body = FxGraph()
    within = {node: body.placeholder(f"argument_{i}") for i, node in enumerate(given)}
    for node in part:
        within[node] = body.node_copy(node, within.__getitem__)
        within[node].target = DIFFERENTIABLE.get(node.target, node.target)
    body.output(within[result])
    names = [f"argument_{i}" for i in range(len(given))]
    block = Block.of(COMPLEX_LINEAR, GraphModule(torch.nn.Module(), body), names)
    with graph.inserting_after(result):
        call = graph.call_function(block, tuple(given))
    call.meta = {**result.meta, "spelled": result.target}
    result.replace_all_uses_with(call)


# -- what scales and shifts channels, taken into the weights ---------------------------------------
#
# Batch norm in evaluation mode, and the same written out: a rewrite of the captured graph, never of
# the model. The layer then computes what the last of them gave, and they become identities, so that
# rules act on the weights that all have together, however they are spelled.

Step = tuple[Any, ...]
"""A scale and shift (`Rescaling.step`), as an argument of a node."""


def fold_constants(graph: FxGraph, inputs: Sequence[Node]) -> None:
    """Fold what scales or shifts the channels of a layer that nothing else reads.

    Arguments:
        inputs: the placeholders of the model's inputs.
    """
    depending = dependents(graph.nodes, inputs)  # also on their sizes
    for layer in list(graph.nodes):
        row = _row(layer)
        if row is None or not row.is_layer:
            continue
        call = Call.of(layer)
        if call["weight"] in depending or call["bias"] in depending:
            continue
        links = _links(layer, call, depending)
        while links and not links[-1].rescaling.matters:
            del links[-1]
        if links:
            _fold(graph, layer, call, links)
    graph.lint()


def folded_weight(weight: Tensor, bias: Tensor | None, steps: Sequence[Step]) -> Tensor:
    """The layer's weight with the scales of all steps."""
    for step in steps:
        scale, _ = _affine(*step)
        weight = weight * scale.view((-1,) + (1,) * (weight.dim() - 1))
    return weight


def folded_bias(weight: Tensor, bias: Tensor | None, steps: Sequence[Step]) -> Tensor:
    """The layer's bias after all steps."""
    for step in steps:
        scale, shift = _affine(*step)
        bias = shift if bias is None else bias * scale + shift
    assert bias is not None
    # One number for all channels is a bias of each.
    return bias.expand(weight.shape[0]) if bias.numel() == 1 else bias


def _affine(kind: str, *given: Any) -> tuple[Tensor, Tensor]:
    """`[channels]` or `[1]` each: what is multiplied by, and what is added then."""
    if kind == "norm":
        return scale_and_shift(*given)
    constant, *signs = given
    value = torch.as_tensor(constant).reshape(-1)
    nothing, one = torch.zeros_like(value), torch.ones_like(value)
    if kind == "times":
        return value, nothing
    if kind == "over":
        return 1 / value, nothing
    scale, factor = signs
    return scale * one, factor * value


@dataclass(frozen=True)
class _Link:
    """One operator after a layer."""

    node: Node
    rescaling: Rescaling


def _links(layer: Node, call: Call, depending: set[Node]) -> list[_Link]:
    """The operators after a layer, each the only reader of the one before, that can be folded."""
    found: list[_Link] = []
    source = layer
    while len(source.users) == 1:
        (node,) = source.users
        rescaling = _rescaling(node, source, call)
        if rescaling is None or any(n in depending for n in _nodes(rescaling.given)):
            break
        found.append(_Link(node, rescaling))
        source = node
    return found


def _rescaling(node: Node, source: Node, layer: Call) -> Rescaling | None:
    """What a node does to the channels of a layer, if it scales and shifts them by constants."""
    row = _row(node)
    if row is None:
        return None
    call = Call.of(node)
    names = [name for name, operand in call.nodes() if operand is source]
    found = row.rescaling(call, names[0]) if len(names) == 1 else None
    if found is None:
        return None
    if found.kind == "norm":  # its channels may be another axis than the layer's
        fits = source.meta["val"].dim() - _channels_from_end(layer) == 1
    else:
        fits = all(_by_channel(other, node, source, layer) for other in _nodes(found.given))
    return found if fits else None


def _by_channel(constant: Node, node: Node, source: Node, layer: Call) -> bool:
    """Whether a tensor has one entry, or one for each of the layer's channels."""
    value, weight = constant.meta.get("val"), layer["weight"].meta["val"]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if value.dim() > source.meta["val"].dim() or node.meta["val"].dtype != weight.dtype:
        return False
    axis = _channels_from_end(layer)
    return all(
        isinstance(size, int) and (size == 1 or (place == axis and size == weight.shape[0]))
        for place, size in enumerate(reversed(value.shape), start=1)
    )


def _row(node: Node) -> Operator | None:
    return lookup(node.target) if isinstance(node.target, torch._ops.OpOverload) else None


def _channels_from_end(layer: Call) -> int:
    return max(int(layer["weight"].meta["val"].dim()) - 1, 1)


def _fold(graph: FxGraph, layer: Node, call: Call, links: Sequence[_Link]) -> None:
    steps = tuple(link.rescaling.step for link in links)
    _bring_forward(graph, layer, _nodes(steps))
    has_bias = call["bias"] is not None or any(link.rescaling.shifts for link in links)
    given = (call["weight"], call["bias"], steps)
    with graph.inserting_before(layer):
        weight = graph.call_function(folded_weight, given)
        bias = graph.call_function(folded_bias, given) if has_bias else None
    weight.meta["val"] = call["weight"].meta["val"]
    if bias is not None:
        bias.meta["val"] = weight.meta["val"].new_empty(weight.meta["val"].shape[0])
    arguments = call.arguments | {"weight": weight, "bias": bias}
    layer.args, layer.kwargs = tuple(arguments.values()), {}
    source = layer
    for link in links:
        link.node.meta.setdefault("spelled", link.node.target)  # its name stays
        link.node.target = ALIAS
        link.node.args, link.node.kwargs = (source,), {}
        source = link.node


def _bring_forward(graph: FxGraph, layer: Node, constants: Iterable[Node]) -> None:
    """Compute constants before a layer, where the model does after it."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    late: set[Node] = set()
    waiting = list(constants)
    while waiting:
        node = waiting.pop()
        if place[node] > place[layer] and node not in late:
            late.add(node)
            waiting.extend(node.all_input_nodes)
    for node in sorted(late, key=place.__getitem__):
        layer.prepend(node)


def _nodes(given: Sequence[Any]) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(given, found.append)
    return found
