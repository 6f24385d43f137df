"""Names for the tensors of a captured graph, after the modules that compute them.

`features.28` is that module's output; a module called again gets `@1`, `@2`. What a module
computes on the way is `layer1.0:add`, and again `layer1.0:add@1`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from nrm.graph.model_call import ModelCall
from nrm.operators import picks

_ROOT = "L__self__"


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
            names[node].insert(0, f"{calls[-1][0]}.{label}" if calls else label)
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
