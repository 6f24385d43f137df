"""Concepts in branches beside skip connections: CRP by hooks and by the measure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import nrm
from benchmarks.methods import hooks
from benchmarks.methods.chain import linear
from benchmarks.methods.table import Beside, Row, deviation
from nrm import methods
from nrm.composites import EpsilonPlus, LRPZero


class Blocks(nn.Module):
    """A stem and residual blocks whose sums are modules, as zennit needs them."""

    def __init__(self, stem: nn.Module, branches: Sequence[nn.Module], out: nn.Module) -> None:
        super().__init__()
        self.stem, self.out = stem, out
        self.branches = nn.ModuleList(branches)
        self.relus = nn.ModuleList(nn.ReLU() for _ in branches)
        self.sums = nn.ModuleList(hooks.summation() for _ in branches)

    def forward(self, x: Tensor) -> Tensor:
        """The skip connections pass by every branch and its ReLU."""
        h: Tensor = self.stem(x)
        for branch, relu, add in zip(self.branches, self.relus, self.sums, strict=True):
            h = add(torch.stack([h, relu(branch(h))], -1))
        logits: Tensor = self.out(h.flatten(1))
        return logits


class Added(nn.Module):
    """One such block whose sum is an operator in Python."""

    def __init__(self, branch: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.branches, self.out = nn.ModuleList([branch]), out

    def forward(self, x: Tensor) -> Tensor:
        """The skip connection passes by the branch and its ReLU."""
        logits: Tensor = self.out(x + torch.relu(self.branches[0](x)))
        return logits


def residual_rows() -> Iterator[Row]:
    """A concept in each of two residual branches, without biases, under z+ and LRP-0."""
    torch.manual_seed(0)
    model = Blocks(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()),
        [nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2)],
        nn.Linear(400, 3, bias=False),
    )
    model = model.double().eval()
    x, target = hooks.STRONG * torch.rand(1, 3, 12, 12, dtype=torch.float64), 1
    R = nrm.Explainer(model, EpsilonPlus(1e-12))(x, target=target)
    sets = [nrm.channels("branches.1", 2), nrm.channels("branches.0", 1)]
    condition = [{"branches.1": [2], "branches.0": [1], "y": [target]}]
    for beside, call, query, bypass in (
        ("", "crp(R, S, T)", "R.heatmap(S, T)", False),
        (" and the skips", "crp(R, S, T, bypass=True)", "R.heatmap(within=S | T)", True),
    ):
        found = methods.crp(R, *sets, bypass=bypass, scale="logit")
        expected = hooks.heatmaps(model, x, condition, exclude_parallel=not bypass)
        name = f"CRP, concepts in two residual branches{beside}"
        yield Row(name, call, query, "zennit-crp", deviation(found, expected))


def residual_example() -> Iterator[Beside]:
    """`out(x + relu(branch(x)))` with x = (1, 1), branch diag(2, 4), and an output that adds up."""
    branch, out = linear(torch.diag(torch.tensor([2.0, 4.0]))), linear(torch.ones(2, 1))
    x = torch.ones(1, 2)
    for add, model in (
        ("a module", Blocks(nn.Identity(), [branch], out).eval()),
        ("`+`", Added(branch, out).eval()),
    ):
        R = nrm.Explainer(model, LRPZero())(x, target=0)
        concept = nrm.neurons("branches.0", 0)
        for question, call, ours, condition, exclude_parallel in (
            ("what flows at all", "lrp(R)", methods.lrp(R, scale="logit"), {"y": [0]}, True),
            (
                "through the concept alone", "crp(R, S)",
                methods.crp(R, concept, scale="logit"),
                {"branches.0": [0], "y": [0]}, True,
            ),
            (
                "the concept and the skip", "crp(R, S, bypass=True)",
                methods.crp(R, concept, bypass=True, scale="logit"),
                {"branches.0": [0], "y": [0]}, False,
            ),
        ):  # fmt: skip
            theirs = hooks.heatmaps(model, x, [condition], exclude_parallel)[0]
            masked = f"exclude_parallel={exclude_parallel}" if len(condition) > 1 else "no mask"
            yield Beside(add, question, call, ours[0].tolist(), masked, theirs.tolist())
