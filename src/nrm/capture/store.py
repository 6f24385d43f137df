"""What an explainer keeps of a model between calls: captures, and what they have in common."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

from nrm.capture.digest import Digest, contents, place_of
from nrm.capture.witness import Place, State
from nrm.rules import Rule, Weight

if TYPE_CHECKING:
    from nrm.capture.nodes import Captured

LIMIT = 64
"""How many captures an explainer keeps; of more, the least recently used goes."""

_KEEPING = threading.Lock()  # of all explainers, so that each can be copied and pickled


@dataclass
class Entry:
    """A capture in use.

    Attributes:
        program: the graph with its rules.
        own: constants that are no tensors of the model; nothing else looks at them.
        looked: what those held.
        sizes: the batch sizes at which the graph is known to be the model.
        apart: whether samples of a batch are known not to depend on each other.
    """

    program: Any
    own: list[Tensor]
    looked: list[Digest]
    sizes: set[int] = field(default_factory=set)
    apart: bool = False

    def is_unchanged(self) -> bool:
        return contents(self.own) == self.looked


class Captures:
    """The captures of one model, as long as it stays as it is."""

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return Captures, ()  # elsewhere, the model is captured again

    def forget(self) -> None:
        """Start again."""
        self.state: State | None = None
        self.written: set[Place] = set()
        self.shared = Shared()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._refused: OrderedDict[Hashable, None] = OrderedDict()

    def meet(self, state: State | None) -> None:
        """Forget everything if the model changed since, but by what it writes into itself."""
        with _KEEPING:
            if state is None or self.state is None:
                self.state = self.state or state
            elif not self.state.changes(state) <= self.written:
                self.forget()
                self.state = state

    def note(self, state: State, written: set[Place]) -> None:
        """The model as it is after a capture, and what it wrote into itself."""
        with _KEEPING:
            self.state = state
            self.written |= written

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Hashable) -> Entry | None:
        with _KEEPING:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def keep(self, key: Hashable, entry: Entry) -> None:
        with _KEEPING:
            self._entries[key] = entry
            while len(self._entries) > LIMIT:
                self._entries.popitem(last=False)

    def drop(self, key: Hashable) -> None:
        with _KEEPING:
            self._entries.pop(key, None)

    def refuse(self, key: Hashable) -> None:
        """Remember that torch.export does not take a model called like this."""
        with _KEEPING:
            self._refused[key] = None
            while len(self._refused) > 8 * LIMIT:
                self._refused.popitem(last=False)

    def is_refused(self, key: Hashable) -> bool:
        with _KEEPING:
            return key in self._refused


class Shared:
    """What several captures of one model use: constants, and what rules make of them.

    Of those nothing is kept here: what no capture uses any more is gone.

    Attributes:
        widened: copies of weights in half precision (`nrm.capture.call.widen`).
        of_any_length: graphs of sequences of any length, not rewritten yet, by what calls of them
            have in common (`nrm.capture.lengths`).
    """

    def __init__(self) -> None:
        self.of_any_length: dict[Hashable, Captured] = {}
        self.widened: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()
        self._tensors: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()
        self._weights: WeakValueDictionary[Hashable, Weight] = WeakValueDictionary()
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._computed: dict[Hashable, int] = {}
        self._count = 0

    def constant(self, tensor: Tensor) -> Tensor:
        """The same memory, as the one tensor that all captures have for it."""
        if tensor.layout is not torch.strided:
            return tensor
        place = place_of(tensor)
        known = self._tensors.get(place)
        if known is None:
            known = self._tensors[place] = tensor
        self._number(known)
        return known

    def computed(self, by: Any, arguments: Any, compute: Callable[[], Any]) -> Any:
        """What a function gives for constants, computed once."""
        leaves, layout = tree_flatten(arguments)
        key = (by, str(layout), *map(self._name, leaves))
        known = self._tensors.get(key)
        if known is None:
            known = compute()
            if isinstance(known, Tensor):
                self._tensors[key] = known
                if known not in self._numbers:  # the same number as when it was computed before
                    self._numbers[known] = self._computed.setdefault(key, self._next())
        return known

    def weight(self, value: Tensor, rule: Rule) -> Weight:
        """A constant weight with what a rule made of it; the caller keeps it."""
        if value not in self._numbers:
            return Weight(value)
        try:
            key = (self._numbers[value], rule)
            known = self._weights.get(key)
            if known is None:
                known = self._weights[key] = Weight(value)
        except (TypeError, RuntimeError, ValueError):  # a rule that cannot be compared
            return Weight(value)
        return known

    def _name(self, leaf: Any) -> Hashable:
        if isinstance(leaf, Tensor):
            return self._number(leaf)
        return (type(leaf), repr(leaf))

    def _number(self, tensor: Tensor) -> int:
        """A number that no tensor with other contents has, nor ever had."""
        if tensor not in self._numbers:
            self._numbers[tensor] = self._next()
        number: int = self._numbers[tensor]
        return number

    def _next(self) -> int:
        self._count += 1
        return self._count


def perturbed(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Other inputs that a model should take, too."""
    return [
        x * 0.5 if x.is_floating_point() else x.flip(-1) if x.dim() else x.clone() for x in tensors
    ]
