"""Outputs without the activations of some neurons, and joint contributions (eqs. 34, 57).

Neurons are removed at their variable of the captured graph, when it has been computed: what lies
above then follows. Removing sets of several layers is one run in which each is removed in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nrm.capture.call import ModelCall, without_autocast
from nrm.display import Progress, counted
from nrm.engine import checked
from nrm.errors import InputError, NeuronSetError, QueryError
from nrm.evaluation.combinations import Combinations
from nrm.evaluation.rerun import Family, Picked, Rerun
from nrm.explainer import Explainer
from nrm.explanation import Target
from nrm.formulas import NeuronSet
from nrm.graph import Graph, Variable
from nrm.removal import Removal, by_variable, replacement


@dataclass(frozen=True, eq=False)
class Effects:
    """What `Combinations.effects` found.

    Attributes:
        families: in the order in which they are computed.
        values: of all combinations of a set or none of each.
        affine: those of the last family are losses, and have no place for none.
    """

    families: tuple[Family, ...]
    values: Tensor
    affine: bool


class Interventions:
    """What an output becomes without the activations of some neurons, for one sample.

    Of a model as it is now; of one that only an eager trace captures, along the branches that
    its Python code took for the sample. Batch norms are part of the layer before them where
    nothing else reads that: remove its neurons after the norm.

    Arguments:
        explainer: of the model; its rules decide only what is a layer: gates that take no
            relevance are none.
        inputs, named: the model's arguments, one sample.
        target: the output neuron, as for a measure; `None`: the largest.
        removal: what removed activations become. `"zero"`, as in the paper; `"mean"`: the mean
            of the sample's activations over the positions of the neuron's channel, or over the
            layer where channels have one neuron each; a number; or for each layer, by name, a
            number, `"mean"` or a tensor shaped like its neurons (layers not named: zero).
        memory: bytes that the copies of the sample may take while they are computed; results
            come on top, and the outputs of the combinations that were asked for last, which are
            kept.

    Attributes:
        output: `f_y(x)`, a scalar: the logit, where a last softmax or sigmoid is looked through.
        target: as for a measure.
        removal: as it was given.

    Raises:
        InputError: there are several samples.
        TargetError: there is no such output.
        QueryError: the removal makes no sense; later, the model has changed since.
    """

    def __init__(
        self,
        explainer: Explainer,
        *inputs: Any,
        target: Target,
        removal: Removal = "zero",
        memory: int = 2**28,
        **named: Any,
    ) -> None:
        samples = explainer.samples(*inputs, **named)
        if samples != 1:
            raise InputError(
                f"neurons are removed from one sample at a time, not from {samples}: call it for "
                "each, e.g. with x[:1]."
            )
        chosen = explainer(*inputs, target=target, **named)
        assert chosen.target is not None
        self.target, self.graph, self.memory = chosen.target, chosen.graph, checked(memory)
        self._model, self._measure = explainer.model, chosen
        self._shortcuts = True  # tests switch them off
        call = ModelCall(explainer.model, inputs, named, explainer.output)
        with torch.inference_mode(False), without_autocast(self._model):
            self.rerun = Rerun(self.graph, [x.detach().clone() for x in call.tensors])
        output = self.rerun.values[self.graph.explained]
        self._flat_target = _flat(self.target, self.graph.output.neuron_shape(output.shape))
        self.output: Tensor = output.reshape(-1)[self._flat_target]
        self.removal, self._removal = removal, by_variable(removal, self.graph)
        self._removed: dict[Variable, Tensor] = {}
        self._last: Effects | None = None
        for variable in self._removal if isinstance(self._removal, dict) else ():
            self._removed_at(variable)  # refused now, if at all

    def without(self, removed: Sequence[Sequence[NeuronSet]], progress: Progress = False) -> Tensor:
        """The output without the sets of each entry, which are removed together.

        Arguments:
            removed: `()` removes nothing.
            progress: show a bar, or a function to call with how many entries were done.

        Returns:
            `[entries]`.

        Raises:
            QueryError: neurons cannot be removed, or an output is not finite then.
        """
        united = [NeuronSet(tuple(m for s in _sets(entry) for m in s.members)) for entry in removed]
        groups: dict[tuple[Variable, ...], list[int]] = {}
        for number, chosen in enumerate(united):
            if chosen.members:
                variables = {self._variable(layer): None for layer in chosen.layers}
                groups.setdefault(tuple(variables), []).append(number)
        with counted(progress, "interventions", len(removed)) as advance, _plainly(self._model):
            _ = self._measure.forward_pass  # refused where the model has changed since
            found = self.output.repeat(len(removed))
            advance(sum(not chosen.members for chosen in united))
            for numbers in groups.values():
                family = self._family([united[number] for number in numbers])
                run = self._combinations([family])
                lost = run.effects(advance)
                found[numbers] = self.output - lost if run.affine else lost[1:]
        return _finite(found)

    def joint(self, *families: Sequence[NeuronSet], progress: Progress = False) -> Tensor:
        """See `joint_contributions`."""
        order, effects = self._effects(families, progress)
        found = effects.values
        for axis in range(len(families) - effects.affine):
            # f without less: eq. 57, one layer after the other
            found = found.narrow(axis, 0, 1) - found.narrow(axis, 1, found.shape[axis] - 1)
        return _finite(_as_given(found, order))

    def united(self, *families: Sequence[NeuronSet], progress: Progress = False) -> Tensor:
        """What is lost without a set of each family: `f(x) - f(x without all of them)`.

        From the same runs as their joint contributions: after `joint` of the same families nothing
        is run again, but where the output is affine in the highest of them, what is lost without
        sets of the lower ones.

        Arguments, result and errors: those of `joint_contributions`.
        """
        order, effects = self._effects(families, progress)
        inner = [slice(1, None)] * (len(families) - effects.affine)
        if not effects.affine:
            return _finite(_as_given(self.output - effects.values[tuple(inner)], order))
        found = effects.values[tuple(inner)]
        if len(families) > 1:
            kept = self._last
            found = found + self.united(*(families[i] for i in order[:-1])).unsqueeze(-1)
            self._last = kept
        return _finite(_as_given(found, order))

    def _effects(
        self, families: Sequence[Sequence[NeuronSet]], progress: Progress
    ) -> tuple[list[int], Effects]:
        """The order in which families are computed, and the effects of removing sets of them.

        The last are kept: contributions and losses are told from the same.
        """
        if not families:
            raise QueryError("give at least one family of neuron sets.")
        sets = [_sets(family) for family in families]
        if not all(sets):
            raise QueryError("a family is empty: give each one neuron set or more.")
        with _plainly(self._model):
            _ = self._measure.forward_pass  # refused where the model has changed since
            compiled = [self._family(family) for family in sets]
            order = sorted(range(len(families)), key=lambda i: self._place(compiled[i]))
            asked = tuple(compiled[i] for i in order)
            known = self._last
            if known is None or known.families != asked:
                known = self._last = None  # they may be large
                run = self._combinations(asked)
                with counted(progress, "interventions", run.total) as advance:
                    known = self._last = Effects(asked, run.effects(advance), run.affine)
        return order, known

    # -- what is removed -------------------------------------------------------------------------

    def _variable(self, layer: str) -> Variable:
        variable = self.graph.variable(layer)
        if variable.node is None:
            raise QueryError(f"{layer!r} enters late and is computed nowhere: nothing to remove.")
        return variable

    def _place(self, family: Family) -> int:
        """Where in the order of computation a family begins."""
        return min(self.rerun.place[node] for node in family.picked)

    def _family(self, sets: Sequence[NeuronSet]) -> Family:
        """Which neurons each set is, kept for further samples."""
        known = _FAMILIES.setdefault(self.graph, {})
        key = tuple(sets)
        if key not in known:
            if len(known) >= _KEPT:
                known.clear()
            known[key] = self._compiled(sets)
        return known[key]

    def _compiled(self, sets: Sequence[NeuronSet]) -> Family:
        indices: dict[Variable, list[Tensor]] = {}
        for number, chosen in enumerate(sets):
            masks: dict[Variable, Tensor] = {}
            for member in chosen.members:
                variable = self._variable(member.layer)
                assert variable.node is not None
                shape = variable.neuron_shape(self.rerun.values[variable.node].shape)
                mask = member.select(variable, shape).cpu()
                if mask.numel() != shape.numel():
                    raise NeuronSetError(f"{member.text} is a mask for several samples.")
                mask = mask.reshape(-1)
                masks[variable] = masks[variable] | mask if variable in masks else mask
            if not any(bool(mask.any()) for mask in masks.values()):
                raise NeuronSetError(f"the neuron set {chosen} is empty.")
            for variable, mask in masks.items():
                known = indices.setdefault(variable, [])
                known += [mask.new_zeros(0, dtype=torch.long)] * (number - len(known))
                known.append(mask.nonzero()[:, 0])
        device = self.output.device
        for known in indices.values():
            known += [known[0].new_zeros(0)] * (len(sets) - len(known))
        return Family(
            len(sets), {v.node: Picked.of(known, device) for v, known in indices.items() if v.node}
        )

    def _removed_at(self, variable: Variable) -> Tensor:
        """`[neurons]`, what activations become when they are removed."""
        if variable not in self._removed:
            assert variable.node is not None
            value = self.rerun.values[variable.node]
            self._removed[variable] = replacement(self._removal, variable, value)
        return self._removed[variable]

    def _combinations(self, families: Sequence[Family]) -> Combinations:
        nodes = {node for family in families for node in family.picked}
        return Combinations(
            self.rerun,
            families,
            {node: self._removed_at(self.graph.by_node[node]) for node in nodes},
            self.output,
            self._flat_target,
            self.memory,
            self._shortcuts,
        )


def joint_contributions(
    interventions: Interventions, *families: Sequence[NeuronSet], progress: Progress = False
) -> Tensor:
    """What is lost only where a set of each family is removed: eqs. 34 and 57.

    `sum over subsets A of the families of (-1)^|A| f_y(x without the chosen sets of A)`. Families
    may be of any layers, and sets of several families have neurons in common.

    Arguments:
        families: neuron sets.
        progress: show a bar, or a function to call with how many runs were done.

    Returns:
        `[sets of the first family, of the second, ...]`.

    Raises:
        QueryError: a family is empty, neurons cannot be removed, or an output is not finite then.
    """
    return interventions.joint(*families, progress=progress)


_KEPT = 64
_FAMILIES: WeakKeyDictionary[Graph, dict[tuple[NeuronSet, ...], Family]] = WeakKeyDictionary()
"""Families of every graph: samples differ, their neurons do not. Sets stay alive with them, as
masks are told apart by their identity."""


@contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Without gradients and autocast, also within `torch.inference_mode`."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast(model):
        yield


def _sets(entry: Sequence[NeuronSet]) -> list[NeuronSet]:
    """The sets of a family or entry.

    Raises:
        QueryError: there is something else.
    """
    sets: list[object] = [entry] if isinstance(entry, str | NeuronSet) else list(entry)
    found = [chosen for chosen in sets if isinstance(chosen, NeuronSet)]
    if isinstance(entry, NeuronSet) or len(found) < len(sets):
        raise QueryError(
            "give neuron sets in lists, such as [nrm.channels('features.3', 5)], not "
            f"{entry!r}. nrm.neurons(layer) is all of a layer."
        )
    return found


def _flat(target: Tensor, shape: torch.Size) -> int:
    """The number of the explained output among all of a sample."""
    index = target[0].reshape(-1).tolist() if shape else []
    flat = 0
    for place, size in zip(index, shape, strict=True):
        flat = flat * size + place
    return flat


def _as_given(found: Tensor, order: Sequence[int]) -> Tensor:
    """With the axes of families in the order given, not that of computation."""
    return found.permute([order.index(i) for i in range(len(order))]).contiguous()


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values.sum(dtype=torch.float64))):
        raise QueryError(
            "without some of the sets the output is NaN or infinite: the model does not bear "
            "this removal there. Choose another, such as removal='mean'."
        )
    return values
