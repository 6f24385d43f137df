"""Steps of walks from component to component: where components lie, and the messages that count.

A walk from the output to a leaf visits some of the named components, one after the other. A *step*
goes from the component visited last (the receiver; first the output) to the next one further down
(the sender; at last the leaf where the walk ends). One message for each receiver: what starts at
its neurons travels down, and what comes to another component is counted there and goes no further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from nrm.engine import Absolute, Messages, travel
from nrm.errors import NeuronSetError, QueryError
from nrm.formulas import Formula, NeuronSet, as_set
from nrm.graph import Variable
from nrm.prepare import Pass
from nrm.sets import laid_out, variables_of

OUTPUT = "output"
"""The receiver that all walks begin at."""
BIASES = "biases"
"""The sender that all biases are together, but for those that are components."""

Named = Mapping[str, NeuronSet | str] | Sequence[NeuronSet | str]
"""Components: neuron sets (or layers) by name; a list is named by what they are."""


# -- where components lie.


class Parts:
    """Which neurons of one variable belong to which sender.

    Arguments:
        labels: `[1 or batch, *neurons]`, the number of a sender; -1: none.
        batch: how many samples there are.
    """

    def __init__(self, variable: Variable, labels: Tensor, batch: int) -> None:
        self.variable, self.batch = variable, batch
        known, index = torch.unique(labels, return_inverse=True)
        self.numbers: Tensor = known[known >= 0]
        self._labels = labels
        self._none = int(known[0] < 0)
        self._several = len(known) > 1
        # Sums go first over the axes along which all neurons have one label.
        alone = [
            axis
            for axis in range(1, labels.dim())
            if bool((labels == labels.narrow(axis, 0, 1)).all())
        ]
        for axis in alone:
            index = index.narrow(axis, 0, 1)
        self._alone = [axis + 1 for axis in alone]
        self._index = index.reshape(1, len(index), -1)
        self.outside = self._broadcast(labels < 0) if self._none else None

    def add_up(self, message: Tensor) -> Tensor:
        """`[K, *shape]` summed over the neurons of each sender here: `[K, batch, senders here]`."""
        view = self.variable.canonical(message)
        if self._alone:
            view = view.sum(self._alone, keepdim=True)
        rows, batch = view.shape[:2]
        view = view.reshape(rows, batch, -1)
        if self._several:
            index = self._index.expand(rows, batch, view.shape[2])
            sums = view.new_zeros(rows, batch, len(self.numbers) + self._none)
            view = sums.scatter_add_(2, index, view)
        return view[:, :, self._none :]

    def inside(self, numbers: Sequence[int]) -> Tensor:
        """Whether each neuron belongs to each of some senders; broadcasts to `[K, *shape]`."""
        chosen = torch.tensor(list(numbers), device=self._labels.device)
        masks = self._labels.unsqueeze(0) == chosen.view(-1, *[1] * self._labels.dim())
        return self.variable.restored(masks, self.batch)

    def chosen(self, allowed: Tensor) -> Tensor:
        """At each neuron what is said of its sender: `[K, senders]` as `[K, *shape]`."""
        padded = torch.cat([allowed, allowed.new_zeros(len(allowed), 1)], 1)
        return self.variable.restored(padded[:, self._labels], self.batch)

    def _broadcast(self, values: Tensor) -> Tensor:
        return self.variable.restored(values.unsqueeze(0), self.batch)


class Places:
    """Components and leaves on a forward pass.

    Attributes:
        names: of the components, as they were given.
        senders: the components, then the leaves.
        receivers: the output, then the components that lie not only at leaves: those that walks
            go on from.
        at: of each variable with a component or leaf, whose neurons are whose.
        rows: of the receivers, as messages number them: zero for the output, and one more than its
            number as a sender for a component.
        lies: where each component lies, from the output down.

    Raises:
        QueryError: there are none, two have one name, or one is called as the output is.
        NeuronSetError: two have a neuron in common, or one is empty.
        UnknownLayerError: a layer does not exist.
    """

    def __init__(self, forward: Pass, components: Named) -> None:
        self.forward = forward
        sets = named(components)
        self.names = tuple(sets)
        if not sets:
            raise QueryError("name at least one component.")
        if OUTPUT in sets:
            raise QueryError(
                f"a component cannot be called {OUTPUT!r}: that is where all walks begin."
            )
        labels: dict[Variable, Tensor] = {}
        self.lies: list[tuple[Variable, ...]] = []
        for number, (name, chosen) in enumerate(sets.items()):
            self.lies.append(self._label(labels, number, name, chosen))
        self.senders = [*self.names]
        for leaf in forward.graph.leaves:
            self._label_leaf(labels, leaf)
        on = [not all(v.is_leaf for v in lies) for lies in self.lies]
        self.rows = [0, *(number + 1 for number, goes_on in enumerate(on) if goes_on)]
        self.receivers = tuple((OUTPUT, *self.names)[row] for row in self.rows)
        self.at = {v: Parts(v, found, forward.batch) for v, found in labels.items()}

    def _label(
        self, labels: dict[Variable, Tensor], number: int, name: str, chosen: NeuronSet
    ) -> tuple[Variable, ...]:
        """Give a component's neurons its number."""
        forward, filled = self.forward, False
        for member in chosen.members:
            variable = forward.graph.variable(member.layer)
            shape = variable.neuron_shape(forward.shape(variable))
            mask = member.select(variable, shape)
            laid_out(mask, variable, forward)  # refused, if at all
            mask = mask.to(forward.output.device)
            mask = mask if mask.dim() > len(shape) else mask.unsqueeze(0)
            known = labels.get(variable)
            if known is None:
                known = torch.full((1, *shape), -1, device=mask.device)
            taken = mask & (known >= 0) & (known != number)
            if bool(taken.any()):
                other = self.names[int((known.expand(taken.shape))[taken][0])]
                raise NeuronSetError(
                    f"the components {other!r} and {name!r} have neurons of {variable.name!r} in "
                    "common: a walk there would be at both. Take them out of one, or ask for the "
                    "edges of each with the other left out."
                )
            labels[variable] = torch.where(mask, number, known)
            filled |= bool(mask.any())
        if not filled:
            raise NeuronSetError(f"the component {name!r} is empty: {chosen}.")
        lies = variables_of(chosen, forward.graph)
        return tuple(sorted(lies, key=lambda variable: -variable.index))

    def _label_leaf(self, labels: dict[Variable, Tensor], leaf: Variable) -> None:
        """Give the neurons of a leaf that are in no component the number of a sender."""
        known = labels.get(leaf)
        if known is not None and bool((known >= 0).all()):
            return
        name = BIASES if leaf.kind == "bias" else leaf.name
        if name in self.names:
            name = f"{name} (the rest)"
        if name not in self.senders:
            self.senders.append(name)
        if known is None:
            # The sizes of a leaf whose samples are mixed do not matter: it is counted otherwise.
            shape = leaf.neuron_shape(self.forward.shape(leaf))
            known = torch.full((1, *shape), -1, device=self.forward.output.device)
        labels[leaf] = torch.where(known < 0, self.senders.index(name), known)

    def only_below(self, variable: Variable, ends: bool) -> int | None:
        """The one sender that all walks on from a variable come to, if there is one.

        Columns sum to one: what comes to it is known without sending it there.

        Arguments:
            ends: whether walks are to end there.
        """
        below = self.below[variable]
        if (
            isinstance(self.forward, Absolute)
            or len(below) > 1
            or not variable.tells_samples(self.forward.batch)
        ):
            return None
        (sender,) = below
        lies = () if sender >= len(self.names) else self.lies[sender]
        # What comes down to several layers of a component is told apart there.
        stays = len(lies) > 1 or (ends and not all(v.is_leaf for v in lies))
        return None if stays else sender

    @cached_property
    def below(self) -> dict[Variable, frozenset[int]]:
        """The senders that walks on from a variable may meet, its own included."""
        found: dict[Variable, frozenset[int]] = {}
        for variable in self.forward.graph.variables:  # parents first
            here = self.at.get(variable)
            senders = set() if here is None else set(here.numbers.tolist())
            if variable.producer is not None and (here is None or here.outside is not None):
                for operand in variable.producer.operands:
                    senders |= found[operand]
            found[variable] = frozenset(senders)
        return found

    @cached_property
    def possible(self) -> Tensor:
        """`[receivers, senders]`: the steps that walks may take; some perhaps that none does."""
        output = self.forward.graph.output
        found = torch.zeros(len(self.rows), len(self.senders), dtype=torch.bool)
        for row, number in enumerate(self.rows):
            if number == 0:
                met = set(self.below[output])
            else:
                producers = (v.producer for v in self.lies[number - 1])
                operands = [v for p in producers if p is not None for v in p.operands]
                met = {sender for operand in operands for sender in self.below[operand]}
                met -= {number - 1}
            found[row, list(met)] = True
        return found

    @cached_property
    def ends(self) -> Tensor:
        """`[senders]`: whether walks may end there: it is a leaf, or lies at one."""
        lies = [any(v.is_leaf for v in lies) for lies in self.lies]
        return torch.tensor([*lies, *(True for _ in self.senders[len(lies) :])])

    @cached_property
    def _mixed(self) -> frozenset[int]:
        """The senders with neurons whose samples cannot be told apart."""
        batch = self.forward.batch
        return frozenset(
            number
            for variable, parts in self.at.items()
            if not variable.tells_samples(batch)
            for number in parts.numbers.tolist()
        )

    @cached_property
    def mixed(self) -> int | None:
        """The one sender with neurons whose samples cannot be told apart, if there is one.

        Raises:
            QueryError: there are several.
        """
        if len(self._mixed) > 1:
            names = ", ".join(repr(self.senders[number]) for number in sorted(self._mixed))
            raise QueryError(
                f"{names} mix the samples of the batch, so that their edges cannot be told by "
                "sample. Explain one sample at a time."
            )
        return next(iter(self._mixed), None)

    @cached_property
    def bundles(self) -> list[tuple[int, ...]]:
        """The receivers, those further up first; together, where one lies between parts of another.

        Walks may go to and fro between these.
        """
        output = self.forward.graph.output.index + 1
        ends = [(output, output), *((lies[0].index, lies[-1].index) for lies in self.lies)]
        order = sorted(self.rows, key=lambda number: -ends[number][0])
        found: list[list[int]] = []
        lowest = output + 1
        for number in order:
            top, bottom = ends[number]
            if found and top > lowest:
                found[-1].append(number)
                lowest = min(lowest, bottom)
            else:
                found.append([number])
                lowest = bottom
        return [tuple(bundle) for bundle in found]


def named(components: Named) -> dict[str, NeuronSet]:
    """Components as neuron sets by name.

    Raises:
        QueryError: two have one name.
        NeuronSetError: one is no neuron set.
    """
    if isinstance(components, Mapping):
        return {str(name): as_set(chosen) for name, chosen in components.items()}
    if isinstance(components, str | Formula):
        raise QueryError(
            "components are a mapping from names to neuron sets, or a list of them: one alone is a "
            "list of one."
        )
    found: dict[str, NeuronSet] = {}
    for chosen in components:
        name = chosen if isinstance(chosen, str) else repr(chosen)
        if name in found:
            raise QueryError(f"the component {name!r} is named twice.")
        found[name] = as_set(chosen)
    return found


# -- the messages.

Group = tuple[int, ...]
"""Receivers that start at the same variables, by number: the rows of one message."""


class Steps:
    """One message for each receiver, of the walks that visited it last.

    The itinerary of `nrm.engine.travel`; a state is a group of receivers.

    Arguments:
        totals: the messages of all walks at the variables of components.
        allowed: `[rows, senders]`, the steps that walks may take; what takes another one is
            dropped, and components start with what has come to them. `None`: all.
    """

    def __init__(
        self, places: Places, start: Messages, totals: Messages, allowed: Tensor | None
    ) -> None:
        self.places, self.start, self.totals, self.allowed = places, start, totals, allowed
        forward = places.forward
        receivers, senders, batch = 1 + len(places.names), len(places.senders), forward.batch
        self.counted = forward.output.new_zeros(receivers, batch, senders)
        self.entered = forward.output.new_zeros(receivers, batch)
        self.stayed = forward.output.new_zeros(receivers, batch)
        self.ended = forward.output.new_zeros(batch)
        self._came: Messages = {}
        self._groups: dict[Variable, list[Group]] = {}

    def run(self, chosen: Sequence[int]) -> None:
        """Send the messages of some receivers.

        Of steps that are not all allowed, receivers further down come after those above, and
        those between which walks go to and fro together.
        """
        places, forward = self.places, self.places.forward
        travelling: dict[Variable, dict[Group, Tensor]] = {}
        groups: dict[tuple[Variable, ...], list[int]] = {}
        for number in chosen:
            if number:
                groups.setdefault(places.lies[number - 1], []).append(number)
            else:
                output = forward.graph.output
                travelling[output] = {(0,): self.start[output]}
                self.entered[0] += output.per_sample(self.start[output], forward.batch)[0]
        self._groups = {}
        for variables, numbers in groups.items():
            group = tuple(numbers)
            for variable in variables:
                self._groups.setdefault(variable, []).append(group)
                shape = (len(group), *forward.shape(variable))
                nothing = forward.output.new_zeros(()).expand(shape)  # takes no memory yet
                travelling.setdefault(variable, {})[group] = nothing
        with torch.inference_mode(False), torch.no_grad():
            travel(forward, travelling, self)

    # -- the itinerary ---------------------------------------------------------------------------

    def visit(self, variable: Variable, messages: dict[Group, Tensor]) -> dict[Group, Tensor]:
        parts = self.places.at.get(variable)
        if parts is None:
            sender = self.places.only_below(variable, self.allowed is not None)
            if sender is None:
                return messages
            self._end(variable, messages, sender)
            return {}
        if not variable.tells_samples(self.places.forward.batch):
            return {}  # counted by what is left
        for group, message in messages.items():
            self._count(parts, group, message)
        starting = self._groups.get(variable, ())
        left: dict[Group, Tensor] = {}
        for group, message in messages.items():
            begun = self._begun(parts, group, message) if group in starting else None
            if parts.outside is None:
                if begun is not None:
                    left[group] = begun
                continue
            onward = message * parts.outside
            left[group] = onward if begun is None else onward.add_(begun)
        return left

    def arrive(self, state: Group, variable: Variable) -> Group | None:
        return state

    def _count(self, parts: Parts, group: Group, message: Tensor) -> None:
        """Count what comes to other components or to leaves."""
        found, rows = parts.add_up(message), torch.tensor(group, device=message.device)
        self._add(rows, parts.numbers, found, parts.variable.is_leaf)
        if self.allowed is None:
            return
        allowed = self.allowed[rows].clone()
        is_component = rows > 0
        allowed[is_component, rows[is_component] - 1] = False  # who stays does not come anew
        gained = (message * parts.chosen(allowed.to(message.dtype))).sum(0, keepdim=True)
        before = self._came.get(parts.variable)
        self._came[parts.variable] = gained if before is None else before + gained

    def _add(self, rows: Tensor, senders: Tensor, found: Tensor, ends: bool) -> None:
        """Add what came from receivers to senders: `[rows, batch, senders]`."""
        own = (senders == rows.view(-1, 1) - 1).unsqueeze(1)
        self.counted[rows[:, None], :, senders] += found.masked_fill(own, 0.0).transpose(1, 2)
        if ends:
            self.stayed[rows] += found.masked_fill(~own, 0.0).sum(2)
            if self.allowed is not None:
                may = self.allowed[rows[:, None], senders].unsqueeze(1) | own
                if self.places.mixed is not None:  # known of all its leaves together, in the end
                    may = may & (senders != self.places.mixed)
                self.ended += found.masked_fill(~may, 0.0).sum((0, 2))

    def _begun(self, parts: Parts, group: Group, message: Tensor) -> Tensor:
        """What a group's messages are at its own neurons."""
        variable, batch = parts.variable, self.places.forward.batch
        inside = parts.inside([number - 1 for number in group])
        if self.allowed is None:
            total = self.totals[variable] * inside
            come = total - message * inside
        else:
            came = self._came.get(variable)
            come = message * 0 if came is None else came * inside
            total = come + message * inside
        self.entered[list(group)] += variable.per_sample(come, batch)
        return total

    def _end(self, variable: Variable, messages: dict[Group, Tensor], sender: int) -> None:
        """Count what can only come to one sender further down."""
        for group, message in messages.items():
            found = variable.per_sample(message, self.places.forward.batch).unsqueeze(2)
            rows = torch.tensor(group, device=message.device)
            self._add(rows, torch.tensor([sender], device=message.device), found, True)
