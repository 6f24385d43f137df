"""An eager trace with real tensors, for models that torch.export refuses.

Python control flow is followed with the values of the one input given, so the trace holds for
that input only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx


@dataclass
class Traced:
    """The flat graph of one eager run; tensors that are not inputs are placeholders too."""

    graph: FxGraph
    inputs: list[Node]
    constants: dict[Node, Tensor]


def trace(model: nn.Module, inputs: Sequence[Tensor]) -> Traced:
    """Run `model` on `inputs` and record every operator, with the module each ran in."""
    scopes = _Scopes(model)
    # Hooks of all modules are for the user's, of which this is none.
    everywhere: bool = torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    run = model.forward if everywhere else model
    with scopes, torch.no_grad():
        traced = make_fx(
            lambda *arguments: run(*arguments),
            tracing_mode="real",
            pre_dispatch=True,
            _error_on_data_dependent_ops=False,
        )(*inputs)
    names = {
        id(tensor): name
        for source in (model.named_parameters(), model.named_buffers())
        for name, tensor in source
    }
    graph = traced.graph
    constants: dict[Node, Tensor] = {}
    first_call = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "get_attr":
            if node is not first_call:
                first_call.prepend(node)  # constants first, as export has them
            tensor = getattr(traced, node.target)
            node.meta["val"] = tensor
            node.meta["parameter"] = names.get(id(tensor), node.name).removeprefix("model.")
            if isinstance(tensor, nn.Parameter):
                node.meta["trained"] = True
            constants[node] = tensor.detach()
        elif node.op == "call_function":
            node.meta["nn_module_stack"] = scopes.stack_of(node.name)
            if "val" not in node.meta and "tensor_meta" in node.meta:
                node.meta["val"] = node.meta["tensor_meta"]
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    for node, value in zip(arguments, inputs, strict=True):
        node.meta["val"] = value
    return Traced(graph, arguments, constants)


class _Scopes:
    """Notes, by hooks that are gone afterwards, in which module call each node was recorded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: dict[str, int] = {}
        self.open: list[tuple[str, tuple[str, str]]] = []
        self.stacks: dict[str, dict[str, tuple[str, str]]] = {}
        self.seen = 0

    def __enter__(self) -> _Scopes:
        self.hooks = ExitStack()
        for path, module in self.model.named_modules():
            before = module.register_forward_pre_hook(self._entering(path, module))
            after = module.register_forward_hook(self._leaving)
            self.hooks.callback(before.remove)
            self.hooks.callback(after.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self.hooks.close()

    def stack_of(self, node: str) -> dict[str, tuple[str, str]]:
        return self.stacks.get(node, {})

    def _entering(self, path: str, module: nn.Module) -> Any:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"

        def hook(module: nn.Module, arguments: Any) -> None:
            self._note()
            call = self.calls[path] = self.calls.get(path, -1) + 1
            key = path + (f"@{call}" if call else "")
            self.open.append((key, (path, kind)))

        return hook

    def _leaving(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._note()
        self.open.pop()

    def _note(self) -> None:
        """Everything recorded since the last note belongs to the modules open now."""
        mode = get_proxy_mode()
        if mode is None:
            return
        nodes = list(mode.tracer.graph.nodes)
        for node in nodes[self.seen :]:
            self.stacks[node.name] = dict(self.open)
        self.seen = len(nodes)
