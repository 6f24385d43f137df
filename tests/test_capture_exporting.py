"""An export that is spared what nobody reads records what a plain one does, and leaves no trace."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support.torch_release import newer
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.sym_node import SymNode

from nrm.capture import shapes
from nrm.capture.shapes import exporting


class Sizes(nn.Module):
    """Computes with its sizes, in Python and in tensors of the same sizes from several places."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.words(ids)
        heads = self.inner(x).view(batch, length, 2, 4).transpose(1, 2)
        spread = heads[:, :, None].expand(batch, 2, 3, length, 4).reshape(batch, 6, length, 4)
        scores = spread @ spread.transpose(2, 3) / (length + 1)
        rolled = torch.cat([-x[..., 4:], x[..., :4]], -1)
        flat = rolled.reshape(batch * length, 8) * (2 * length - 1)
        both = torch.cat([flat, rolled.flatten(0, 1)]).view(2 * batch, length, 8)
        return scores.sum() + both[:batch].mean(1) + torch.arange(length).sum() * (length // 2)


def graph(spared: bool) -> list[Any]:
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (2, 5))
    sizes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    if spared:
        with exporting():
            program = torch.export.export(Sizes(), (ids,), dynamic_shapes=sizes)
    else:
        program = torch.export.export(Sizes(), (ids,), dynamic_shapes=sizes)
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        told = (str(tuple(value.shape)), value.stride()) if isinstance(value, Tensor) else value
        found.append((node.name, str(node.target), str(node.args), str(told)))
    guards = {
        str(node.meta["val"].shape) for node in program.graph.nodes if node.op == "placeholder"
    }
    return [*found, sorted(guards)]


def state() -> list[Any]:
    """What an export changes of torch and Python for a while."""
    return [
        *(vars(SymNode).get(name) for name in shapes._SIZES),
        proxy_tensor._extract_tensor_metadata,
        torch.fx._lazy_graph_module._use_lazy_graph_module_flag,
        getattr(torch.fx.config, "do_not_emit_stack_traces", None),
        gc.isenabled(),
    ]


@newer("cannot export a size of its own choice here")
def test_the_same_graph_is_recorded():
    assert graph(spared=True) == graph(spared=False)


def _fail() -> None:
    with exporting():
        raise KeyError


def test_nothing_stays():
    before = state()
    with exporting():
        assert not gc.isenabled()
        assert state() != before
    assert state() == before
    with pytest.raises(KeyError):
        _fail()
    assert state() == before


def test_collections_that_were_off_stay_off():
    gc.disable()
    try:
        with exporting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@newer("cannot export a size of its own choice here")
def test_sizes_are_computed_once(monkeypatch: pytest.MonkeyPatch):
    counts = {"plain": 0, "spared": 0}
    itself = SymNode.mul

    def counting(kind: str) -> None:
        def mul(one: Any, other: Any) -> Any:
            counts[kind] += 1
            return itself(one, other)

        monkeypatch.setattr(SymNode, "mul", mul)

    counting("plain")
    graph(spared=False)
    counting("spared")
    graph(spared=True)
    assert 0 < counts["spared"] < counts["plain"] / 3
