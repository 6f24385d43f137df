"""Patching of components and of direct edges, against forward passes written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm.errors import InputError, QueryError
from nrm.evaluation import Interventions, Patching

pytestmark = pytest.mark.usefixtures("captured_once")


class Stream(nn.Module):
    """Three branches on a residual stream: `x + a(x)`, `+ b(.)`, `+ c(.)`, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_hand(x, {})[0]

    def by_hand(self, x: Tensor, put: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and what each branch wrote, some branches writing something else.

        `"a>b"`: what b reads in the place of what a wrote.
        """
        wrote: dict[str, Tensor] = {"x": x}

        def read(who: str) -> Tensor:
            stream = torch.zeros_like(x)
            for name, value in wrote.items():
                stream = stream + put.get(f"{name}>{who}", value)
            return stream

        for name in "abc":
            value = torch.tanh(getattr(self, name)(read(name)))
            wrote[name] = put.get(name, value)
        return self.head(read("output")), wrote


@pytest.fixture(scope="module")
def stream() -> tuple[Stream, Tensor, Tensor]:
    torch.manual_seed(0)
    return Stream().double().eval(), torch.randn(1, 5).double(), torch.randn(1, 5).double()


COMPONENTS = {"a": ":tanh", "b": ":tanh@1", "c": ":tanh@2"}


@pytest.mark.parametrize("memory", [1, 2**28])
@pytest.mark.parametrize("instead", ["zero", "reference"])
def test_components_and_edges_equal_passes_by_hand(stream, instead, memory):
    model, x, other = stream
    referred = other if instead == "reference" else None
    patching = Patching(
        nrm.Explainer(model), x, target=1, components=COMPONENTS, reference=referred, memory=memory
    )
    _, there = model.by_hand(other, {})
    put = {n: there[n] if referred is not None else torch.zeros_like(x) for n in "abc"}
    torch.testing.assert_close(patching.output, model(x)[0, 1])
    expected = [model.by_hand(x, {name: put[name]})[0][0, 1] for name in "abc"]
    torch.testing.assert_close(patching.components(), torch.stack(expected))
    edges = patching.edges()
    for row, receiver in enumerate(patching.receivers):
        for column, sender in enumerate("abc"):
            if receiver != "output" and receiver <= sender:
                assert edges[row, column] == patching.output
                continue
            by_hand, _ = model.by_hand(x, {f"{sender}>{receiver}": put[sender]})
            torch.testing.assert_close(edges[row, column], by_hand[0, 1])


def test_a_component_patched_to_zero_is_one_removed(stream):
    model, x, _ = stream
    explainer = nrm.Explainer(model)
    patching = Patching(explainer, x, target=nrm.Contrast(0, 2), components=COMPONENTS)
    outputs = []
    for target in (0, 2):
        removal = Interventions(explainer, x, target=target)
        outputs.append(removal.without([[nrm.neurons(layer)] for layer in COMPONENTS.values()]))
    torch.testing.assert_close(patching.components(), outputs[0] - outputs[1])
    mean = Patching(explainer, x, target=0, components=COMPONENTS, instead="mean")
    removal = Interventions(explainer, x, target=0, removal="mean")
    expected = removal.without([[nrm.neurons(layer)] for layer in COMPONENTS.values()])
    torch.testing.assert_close(mean.components(), expected)


def test_in_a_linear_model_edges_are_what_patching_says(stream):
    class Linear(Stream):
        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.a, self.b, self.c):
                x = x + layer(x)
            return self.head(x)

    torch.manual_seed(1)
    model, x = Linear().double().eval(), stream[1]
    for layer in (model.a, model.b, model.c, model.head):
        nn.init.zeros_(layer.bias)
    sets = {name: name for name in "abc"}
    explainer = nrm.Explainer(model, nrm.composites.LRPZero())
    R = explainer(x, target=0)
    edges, patching = R.edges(sets), Patching(explainer, x, target=0, components=sets)
    lost = patching.output - patching.edges()
    found = edges.relevance[0] * R.scale
    columns = [edges.senders.index(name) for name in "abc"]
    torch.testing.assert_close(found[:, columns], lost)


def test_what_cannot_be_patched_is_refused(stream):
    model, x, _ = stream
    explainer = nrm.Explainer(model)
    with pytest.raises(InputError, match="one sample"):
        Patching(explainer, torch.cat([x, x]), target=0, components=COMPONENTS)
    with pytest.raises(InputError, match="reference is shaped"):
        Patching(explainer, x, target=0, components=COMPONENTS, reference=torch.cat([x, x]))
    both = {"ab": nrm.neurons(":tanh") | nrm.neurons(":tanh@1")}
    with pytest.raises(QueryError, match="one layer is computed from another"):
        Patching(explainer, x, target=0, components=both)
    with pytest.raises(QueryError, match="enters late"):
        Patching(nrm.Explainer(model, bias="input"), x, target=0, components=["a.bias"])


def test_heads_of_a_transformer_are_patched_one_by_one():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval()
    x, other = torch.randn(2, 1, 4, 8).double()
    explainer = nrm.Explainer(model)
    sets = nrm.components(explainer(x, target=(0, 0))).without("embed")
    patching = Patching(explainer, x, target=(0, 0), components=sets, reference=other)

    attention = model.layers[0].self_attn

    def values(y: Tensor) -> Tensor:  # what each head adds up, [heads, tokens, features]
        q, k, v = (attention.in_proj_weight @ y[0].T).T.add(attention.in_proj_bias).chunk(3, -1)
        q, k, v = (t.view(4, 2, 4).transpose(0, 1) for t in (q, k, v))
        return torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v

    def output(y: Tensor, z: Tensor) -> Tensor:
        first = model.layers[0]
        h = first.norm1(y + attention.out_proj(z.transpose(0, 1).reshape(1, 4, 8)))
        return first.norm2(h + first.linear2(torch.relu(first.linear1(h))))

    own, instead = values(x), values(other)
    torch.testing.assert_close(output(x, own), model(x))
    found = patching.components()
    for head in range(2):
        z = own.clone()
        z[head] = instead[head]
        torch.testing.assert_close(found[head], output(x, z)[0, 0, 0])
