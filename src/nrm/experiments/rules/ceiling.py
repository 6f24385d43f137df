"""How much of joint contributions any measure on walks can express: what bounds the correlation.

Two layers bound nothing: a measure may have any joint relevances of their neurons. Over three, it
is a product, as relevance is passed on by one neuron alone (eq. 12):

    R(p, i, j) = R(p | i) R(i, j)

so that for each neuron i of the middle layer the relevances `[p, j]` are of rank one. Biases that
are inputs take any rest, so that nothing else binds the two factors. Of all such products the one
nearest to the contributions is what the largest singular vectors of each `[p, j]` give, and its
cosine with them the largest there is. Joint relevances and contributions of many neurons have
means of nearly zero, so that it is the largest correlation as well, but for what their means make.

Each of these is a score that has seen the contributions: a bound, and no way to explain anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nrm.evaluation.faithfulness import Families
from nrm.evaluation.intervention import Interventions, joint_contributions
from nrm.experiments.walks import JointRelevance


@dataclass(frozen=True)
class Ceiling:
    """The measure nearest to the contributions.

    Arguments:
        active: neurons of the last layer without an activation have no relevance, as under any
            rule for the layer above whose contributions are multiples of activations.
    """

    active: bool = False

    def __call__(self, families: Families, interventions: Interventions) -> Tensor:
        """`[n1, n2]` or `[n1, n2, n3]`: its joint relevances, times `f(x)`."""
        contribution = joint_contributions(interventions, *families.sets)
        if self.active:
            contribution = contribution * (families.activations()[-1] > 0)
        return contribution if contribution.dim() == 2 else nearest_product(contribution)


@dataclass(frozen=True, eq=False)
class HalfGiven:
    """The measure nearest to the contributions that has one factor of given walks.

    Arguments:
        relevance: of pairs of neurons of two of the three layers, by the given walks.
        lower: whether these are the two lower ones, so that `R(p | i)` is given; or `R(i, j)`.
    """

    relevance: JointRelevance
    lower: bool

    def __call__(self, families: Families, interventions: Interventions) -> Tensor:
        """`[n1, n2, n3]`: its joint relevances, times `f(x)`."""
        contribution = joint_contributions(interventions, *families.sets)
        pairs = self.relevance(families, interventions)
        if self.lower:
            return with_lower(contribution, pairs)
        return with_lower(contribution.permute(2, 1, 0), pairs.T).permute(2, 1, 0).contiguous()


def nearest_product(values: Tensor) -> Tensor:
    """`[p, i, j]`, for each i of rank one, as near to the given as any."""
    slices = values.permute(1, 0, 2)
    if values.shape[0] < values.shape[2]:
        return nearest_product(values.permute(2, 1, 0)).permute(2, 1, 0).contiguous()
    products = torch.bmm(slices.transpose(1, 2), slices)  # [i, j, j], the smaller of the two
    largest = torch.linalg.eigh(products.double()).eigenvectors[..., -1:].to(values)
    found = torch.bmm(torch.bmm(slices, largest), largest.transpose(1, 2))
    return found.permute(1, 0, 2).contiguous()


def with_lower(values: Tensor, pairs: Tensor) -> Tensor:
    """`[p, i, j]`, multiples of `pairs` `[p, i]`, as near to the given as any."""
    sizes = pairs.square().sum(0)
    met = torch.einsum("pij,pi->ij", values, pairs)
    factors = torch.where(sizes[:, None] > 0, met / sizes[:, None], 0.0)
    return pairs[:, :, None] * factors
