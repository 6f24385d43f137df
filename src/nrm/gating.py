"""What a set of an upper layer is worth, with sets of a lower layer and without.

The joint contribution of A, below, and B, above, is how much more A does while B is there; which is
as well how much more B does while A is there. Slopes between the runs with A and without count what
A changes *in* B. What A changes elsewhere, so that B matters more or less (a gate, a rectifier or a
maximum above that both decide), they credit to where it was changed. Here it is credited to B:

    f(x) R(A, B) = worth of B at x - worth of B without A,

the worth being the relevance at the upper layer of what the network has with it and not without
it (removed as a whole), by slopes between these two runs. Over all B of a cut it is what A does, as
it is by slopes: both readings divide the same sum. Over a layer that something bypasses it is the
joint contribution of A and the whole layer, and by slopes what A does by way of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nrm.ablation import Ablation, activations_removed, part_above, starts_of
from nrm.errors import QueryError
from nrm.explanation import Explanation
from nrm.joint import Division, Parts, partitions
from nrm.query import Query
from nrm.removal import Removal, by_variable


class Worth:
    """What the parts of a layer are worth, for the samples and without sets of a lower layer.

    Arguments:
        of: what is explained of the samples.
        ablation: of the lower layer.
        layer: the upper layer, by name, or sets of its neurons.
        removal: what removed activations become.

    Raises:
        QueryError: the layer is the explained output.
        UnsupportedOperatorError: an operator above the layer has no slope between two runs.
    """

    def __init__(
        self, of: Explanation, ablation: Ablation, layer: Parts, by: Division, removal: Removal
    ) -> None:
        forward = of.forward_pass
        self._of, self._ablation, self._by = of, ablation, by
        self._layer = layer if isinstance(layer, str) else list(layer)
        (parts,) = partitions(forward, [self._layer], by, 2**20)
        self._variable = parts.variable
        if self._variable is of.graph.output:
            raise QueryError(f"{parts.name!r} is what is explained: it is all that there is.")
        self._part, self._program = part_above(of.graph, self._variable, forward)
        chosen = by_variable("zero" if isinstance(removal, dict) else removal, of.graph)
        self._removed = activations_removed(of, self._variable, chosen)

    def with_all(self) -> Tensor:
        """`[1, batch, parts]`, as a share of what is explained."""
        forward = self._of.forward_pass
        known = forward.program.values(forward.inputs, self._part.starts)
        return self._found([known[node] for node in self._part.starts], 1)

    def without(self, chosen: Sequence[int]) -> Tensor:
        """`[chosen, batch, parts]`, without each of some sets of the lower layer."""
        return self._found(self._ablation.values(self._part.starts, chosen), len(chosen))

    def _found(self, values: list[Tensor], copies: int) -> Tensor:
        here, *others = values
        view = self._variable.canonical(self._removed.unsqueeze(0))
        view = view.repeat(1, copies, *[1] * (view.dim() - 2))
        gone = self._variable.restored(view, copies * self._of.batch)[0]
        forward = self._program.run([here, *others], lambda: None, [gone.to(here), *others])
        starts = starts_of(forward, self._of, copies)
        (parts,) = partitions(forward, [self._layer], self._by, 2**28)
        variable = parts.variable
        message = Query(forward, starts[True], [True]).marginals([variable])[variable]
        return parts.add_up(message)[0].view(copies, self._of.batch, parts.size)
