"""A captured model: its graph, what is known of each node, and how the nodes are called.

A node's name comes from the module that computes it: `features.28` is that module's output; a
module called again gets `@1`, `@2`. What a module computes on the way is `layer1.0:add`, and again
`layer1.0:add@1`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import Node

from nrm.capture.call import ModelCall, is_mixed, is_rounded
from nrm.operators import carries_none, function_of, picks, reads_sizes

_ROOT = "L__self__"


@dataclass
class Captured:
    """A model as a flat graph, in single precision where the model's is half.

    Attributes:
        graph: operators only; parameters, buffers and inputs are placeholders.
        inputs: the placeholders of the tensors that the model is called with, in order.
        names: what the inputs are called.
        constants: the parameters, buffers and constants behind the other placeholders, by node.
        output: the node of the explained output.
        method: `"export"`, or `"eager"` for a trace that holds for one input only.
        batched: whether the graph holds for any batch size.
        batch_axis: where the batch lies in every input; `None`: all of it is one sample.
        whole: the model, where this is the part of it above a layer (`nrm.capture.above`). Then the
            first input is the layer; the others are the same in all runs and take no relevance.
    """

    graph: FxGraph
    inputs: list[Node]
    names: list[str]
    constants: dict[Node, Tensor]
    output: Node
    method: str
    batched: bool
    batch_axis: int | None
    whole: Captured | None = None

    @property
    def samples(self) -> int:
        """How many samples a graph for one size of the batch is for."""
        if self.whole is not None:
            return self.whole.samples
        if self.batched or self.batch_axis is None:
            return 1
        shape = self.inputs[0].meta["val"].shape
        return int(shape[self.batch_axis]) if len(shape) > self.batch_axis else 1

    @property
    def batch_sizes(self) -> set[Any]:
        """The symbols of the batch's size, of a graph for any."""
        of = self.whole or self
        return {node.meta["val"].shape[of.batch_axis].node.expr for node in of.inputs}

    def takes_relevance(self, node: Node, name: str) -> bool:
        """Whether an input does."""
        apart = self.whole is not None and node is not self.inputs[0]
        return not apart and is_float_tensor(node) and not is_mask(name)

    @property
    def reusable(self) -> bool:
        """Whether other inputs of the same shape may use the same graph."""
        return self.method == "export"

    @property
    def rounds(self) -> bool:
        """Whether the model computes anything in half precision."""
        return is_rounded(self.graph)

    @property
    def mixed(self) -> bool:
        """Whether the model computes in single precision what the graph computes in double."""
        return is_mixed(self.graph)


# -- what depends on what ------------------------------------------------------------------------


def read_by(node: Node) -> Sequence[Node]:
    """The nodes among a node's arguments."""
    return node.all_input_nodes


def ancestors(
    nodes: Iterable[Node], reads: Callable[[Node], Iterable[Node]] = read_by
) -> set[Node]:
    """The nodes that some are computed from, themselves included.

    Arguments:
        reads: what a node is computed from.
    """
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(reads(node))
    return found


def dependents(order: Iterable[Node], nodes: Collection[Node], sizes: bool = True) -> set[Node]:
    """The nodes that are computed from some, themselves included.

    Arguments:
        order: those to look at, in the order of computation.
        sizes: whether what reads nothing but a tensor's size depends on it, too.
    """
    found = set(nodes)
    for node in order:
        if not found.isdisjoint(node.all_input_nodes) and (sizes or not reads_no_values(node)):
            found.add(node)
    return found


def carrying(graph: FxGraph, inputs: Sequence[Node], names: Sequence[str]) -> set[Node]:
    """What is computed, of real or complex values, from real-valued inputs or embeddings of what
    inputs say; those too."""
    varying = dependents(graph.nodes, inputs)
    found = {
        node
        for node, name in zip(inputs, names, strict=True)
        if is_float_tensor(node) and not is_mask(name)
    }
    for node in graph.nodes:
        if node.op != "call_function" or node not in varying or unfollowed(node) == "steps":
            continue
        looked_up = function_of(node).role == "lookup" and is_float_tensor(node)
        if looked_up or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


# -- names ---------------------------------------------------------------------------------------


def scopes(node: Node) -> list[tuple[str, str]]:
    """The module calls that a node belongs to, outermost first, as (address, module type)."""
    found = []
    for key, (_, kind) in node.meta.get("nn_module_stack", {}).items():
        if "_empty_nn_module_stack" in key:
            continue
        address = _below_the_call(key[len(_ROOT) :] if key.startswith(_ROOT) else key)
        if address is None:
            continue
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        found.append((address, name))
    return found


def module_type(node: Node) -> str:
    """The type of the innermost module, e.g. `torch.nn.modules.conv.Conv2d`."""
    found = scopes(node)
    return found[-1][1] if found else ""


def assign(nodes: Iterable[Node]) -> dict[Node, list[str]]:
    """All names of every node, the one to show first."""
    nodes = list(nodes)
    outputs: dict[str, Node] = {}
    for node in nodes:
        for address, _ in scopes(node):
            if address and _leaves(node, address):
                outputs[address] = node
    names: dict[Node, list[str]] = {}
    taken: dict[str, int] = {}
    for node in nodes:
        inside = [address for address, _ in scopes(node) if outputs.get(address) is node]
        if inside:
            names[node] = inside[::-1]
            continue
        calls = scopes(node)
        plain = f"{calls[-1][0] if calls else ''}:{operator_name(node)}"
        again = taken[plain] = taken.get(plain, -1) + 1
        names[node] = [plain + (f"@{again}" if again else "")]
        label = node.meta.get("label")  # a hidden state of a recurrent layer
        if label is not None:
            within = calls[-1][0] if calls else ""
            names[node].insert(0, f"{within}.{label}" if within else label)
    return names


def _below_the_call(path: str) -> str | None:
    """A module's path in the user's model; `None` for the call around it."""
    prefix = ModelCall.PREFIX
    if path == prefix:
        return ""
    if path.startswith(f"{prefix}@"):
        return ""
    return path.removeprefix(f"{prefix}.") if path.startswith(f"{prefix}.") else None


def _leaves(node: Node, address: str) -> bool:
    """Whether something outside the module call reads the node: then it is the call's output."""
    return any(
        user.op == "output" or address not in {scope for scope, _ in scopes(user)}
        for user in node.users
    )


def operator_name(node: Node) -> str:
    """`add` for `aten.add.Tensor`."""
    if picks(node) and isinstance(node.args[0], Node):
        return f"{operator_name(node.args[0])}.{node.args[1]}"
    name = str(node.meta.get("spelled", node.target))
    return name.split(".")[1] if "." in name else getattr(node.target, "__name__", name)


# -- what a node is ------------------------------------------------------------------------------

Follows = Literal["steps", "lost"]
"""What becomes of relevance where no real values are: see `unfollowed`."""


def is_symbolic(size: int | torch.SymInt) -> TypeGuard[torch.SymInt]:
    """Whether a size is free: export leaves those that Python fixed as symbols for a number."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def is_float_tensor(node: Node) -> bool:
    """Whether a node may carry relevance."""
    value: Any = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def is_complex(node: Node) -> bool:
    """Whether a node holds complex numbers."""
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(part, Tensor) and part.is_complex() for part in parts)


def reads_no_values(node: Node) -> bool:
    """Whether a node reads nothing of a tensor but how it looks: its sizes, or zeros like it."""
    if reads_sizes(node.target):
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or not carries_none(node.target):
        return False
    # A value to fill with may depend on the input.
    return all(parent is node.args[0] for parent in node.all_input_nodes)


def unfollowed(node: Node) -> Follows | None:
    """What becomes of relevance at a node that depends on an input; `None`: real values.

    Comparisons, indices, whole numbers and what rounds are constant but for steps, and pass none
    on. Complex or quantised numbers, and numbers taken out of tensors, are not constant.
    """
    if node.op == "call_function" and function_of(node).steps:
        return "steps"
    value: Any = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else [value]
    found: set[Follows | None] = set()
    for part in parts:
        if isinstance(part, Tensor):
            whole = part.dtype is torch.bool or not (
                part.is_floating_point() or part.is_complex() or part.dtype in _QUANTISED
            )
            found.add(None if part.is_floating_point() else "steps" if whole else "lost")
        elif isinstance(part, float | torch.SymFloat | complex):
            found.add("lost")
        else:
            found.add("steps")
    for kind in (None, "lost", "steps"):
        if kind in found:
            return kind  # type: ignore[return-value]
    return "steps"


_QUANTISED = (torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4)


def is_mask(name: str) -> bool:
    """Whether an input of this name says what counts, and carries no relevance itself."""
    return name.rpartition(".")[2].lower() in ("mask", "masks") or name.lower().endswith("_mask")
