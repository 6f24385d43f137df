"""Circuits: sets of direct edges that keep a share of the relevance, found, saved and loaded.

What a set of edges keeps is the relevance of the walks all of whose steps are in it: from the
output through components to a leaf. That is no function of the edges' relevances alone (what comes
to a component by one edge may go on otherwise than what comes by another), so it is worked out by
messages (`Walks.kept`), for any set exactly. It *keeps the share s* if that differs from one, the
relevance of all walks, by at most 1 - s: relevance is signed, so that too much may be kept as well.

The smallest set is looked for greedily; then all smaller ones are tried, as far as that goes, those
of fewest edges first. How far the result may be from the smallest of all is said by what was tried,
and by a bound: the last steps of walks, to leaves, have to carry the share, and who takes them has
to be handed relevance, whatever comes between.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nrm.display import Shown, Table
from nrm.errors import InputError, QueryError
from nrm.io import write_text

Layout = Literal["nrm", "eap"]
_VERSION = 1
_COMBINATIONS = 2**14
"""Of edges that are gone through for one size of sets."""

Kept = Callable[[Tensor], float]
"""The share that a set of edges keeps: `[receivers, senders]`, boolean."""


def place_of(name: str, names: Sequence[str], role: str) -> int:
    """Which of the senders or receivers it is.

    Arguments:
        role: `"sender"` or `"receiver"`.

    Raises:
        QueryError: it is none.
    """
    if name not in names:
        raise QueryError(f"there is no {role} {name!r}; there is: {', '.join(names[:40])}.")
    return names.index(name)


@dataclass(frozen=True, repr=False)
class Circuit(Shown):
    """A set of direct edges.

    Attributes:
        receivers, senders: names, as in `Edges`.
        scores: `[receivers, senders]`, the relevance of every edge, in the set or not.
        chosen: `[receivers, senders]`, boolean: the set.
        kept: the relevance of the walks all of whose steps are in the set, worked out by messages.
        share: what was asked to be kept.
        fewest: no set of fewer edges keeps the share; `None`: not known.
        runs: how many sets were tried.
    """

    receivers: tuple[str, ...]
    senders: tuple[str, ...]
    scores: Tensor
    chosen: Tensor
    kept: float
    share: float
    fewest: int | None
    runs: int = 0

    @property
    def edges(self) -> list[tuple[str, str]]:
        """Sender and receiver of each edge, those with the largest absolute relevance first."""
        places = self.chosen.flatten().nonzero()[:, 0]
        order = self.scores.flatten()[places].abs().argsort(descending=True, stable=True)
        return [self._names(place) for place in places[order].tolist()]

    @property
    def nodes(self) -> list[str]:
        """The components, leaves and output that an edge of the set touches: output first."""
        rows = self.chosen.any(1).tolist()
        found = [name for name, there in zip(self.receivers, rows, strict=True) if there]
        columns = self.chosen.any(0).tolist()
        senders = [name for name, there in zip(self.senders, columns, strict=True) if there]
        return list(dict.fromkeys(found + senders))

    @property
    def gap(self) -> int | None:
        """How many edges fewer the smallest set might have; `None`: not known."""
        return None if self.fewest is None else len(self) - self.fewest

    def __len__(self) -> int:
        return int(self.chosen.sum())

    def __contains__(self, edge: object) -> bool:
        return edge in self.edges

    def score(self, sender: str, receiver: str) -> float:
        """The relevance of an edge, in the set or not.

        Raises:
            QueryError: there is no such sender or receiver.
        """
        row = place_of(receiver, self.receivers, "receiver")
        return float(self.scores[row, place_of(sender, self.senders, "sender")])

    def table(self) -> Table:
        rows = [(a, b, f"{self.score(a, b):+.4f}") for a, b in self.edges]
        bound = "" if self.fewest is None else f"; none of fewer than {self.fewest} could"
        title = f"{len(self)} edges between {len(self.nodes)} nodes keep {self.kept:.3f}{bound}"
        return Table(title, ("from", "to", "relevance"), rows)

    def _names(self, place: int) -> tuple[str, str]:
        row, column = divmod(place, len(self.senders))
        return self.senders[column], self.receivers[row]

    # -- files -----------------------------------------------------------------------------------

    def save(self, file: str | Path, layout: Layout = "nrm") -> None:
        """Write a circuit as JSON; the file is there as a whole or not at all.

        Arguments:
            layout: `"nrm"`: what `load` reads. `"eap"`: what EAP-IG and the circuit track of MIB
                read, nodes `input`, `a3.h5`, `m4`, `logits`, and edges with scores between
                them. All embeddings and biases are its `input`. An edge into a head is one
                into its queries, keys and values alike, and an edge into a head's pattern one
                into its queries and keys; edges into `a3.h5.q`, `.k` and `.v` are told apart.

        Raises:
            QueryError: `"eap"`, and a component has a name that the layout does not know.
        """
        if layout not in get_args(Layout):
            raise QueryError(f"the layout is one of {get_args(Layout)}, not {layout!r}")
        text = json.dumps(self._as_eap() if layout == "eap" else self._as_nrm(), indent=1)
        write_text(Path(file), text + "\n")

    def _as_nrm(self) -> dict[str, Any]:
        places = (self.scores != 0).logical_or(self.chosen).nonzero().tolist()
        edges = [
            [self.senders[j], self.receivers[i], float(self.scores[i, j]), bool(self.chosen[i, j])]
            for i, j in places
        ]
        return {
            "format": "nrm circuit",
            "version": _VERSION,
            "kept": self.kept,
            "share": self.share,
            "fewest": self.fewest,
            "runs": self.runs,
            "dtype": str(self.scores.dtype).removeprefix("torch."),
            "receivers": list(self.receivers),
            "senders": list(self.senders),
            "edges": edges,
        }

    @classmethod
    def load(cls, file: str | Path) -> Circuit:
        """Read what `save` wrote.

        Raises:
            InputError: it is no such file.
        """
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
            if found["format"] != "nrm circuit" or found["version"] != _VERSION:
                raise ValueError("another format or version")
            receivers, senders = tuple(found["receivers"]), tuple(found["senders"])
            dtype = getattr(torch, found["dtype"])
            scores = torch.zeros(len(receivers), len(senders), dtype=dtype)
            chosen = torch.zeros(len(receivers), len(senders), dtype=torch.bool)
            rows = {name: place for place, name in enumerate(receivers)}
            columns = {name: place for place, name in enumerate(senders)}
            for sender, receiver, score, there in found["edges"]:
                scores[rows[receiver], columns[sender]] = score
                chosen[rows[receiver], columns[sender]] = there
            return cls(
                receivers,
                senders,
                scores,
                chosen,
                found["kept"],
                found["share"],
                found["fewest"],
                found["runs"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: no circuit that nrm saved ({error})") from error

    def _as_eap(self) -> dict[str, Any]:
        """Nodes and edges as EAP-IG names them."""
        known = [_Node.of(name) for name in (*self.receivers, *self.senders)]
        heads = [node.place for node in known if node.kind == "head"]
        layers = 1 + max(
            (node.place[0] for node in known if node.kind in ("head", "mlp")), default=0
        )
        nodes: dict[str, dict[str, Any]] = {"input": {"in_graph": False}}
        per_layer = 1 + max((head for _, head in heads), default=0)
        for layer in range(layers):
            nodes |= {f"a{layer}.h{head}": {"in_graph": False} for head in range(per_layer)}
            nodes[f"m{layer}"] = {"in_graph": False}
        nodes["logits"] = {"in_graph": False}
        edges: dict[str, dict[str, Any]] = {}
        for place in (self.scores != 0).logical_or(self.chosen).flatten().nonzero()[:, 0].tolist():
            sender, receiver = map(_Node.of, self._names(place))
            if sender.name == receiver.name:
                continue  # within a head: from its queries to its pattern, from that to the head
            row, column = divmod(place, len(self.senders))
            there = bool(self.chosen[row, column])
            for slot in receiver.slots:
                name = f"{sender.name}->{receiver.name}{slot}"
                edge = edges.setdefault(name, {"score": 0.0, "in_graph": False})
                edge["score"] += float(self.scores[row, column])
                edge["in_graph"] |= there
            nodes[sender.name]["in_graph"] |= there
            nodes[receiver.name]["in_graph"] |= there
        cfg = {"n_layers": layers, "n_heads": per_layer, "parallel_attn_mlp": False}
        return {"cfg": cfg, "nodes": nodes, "edges": edges}


_SLOTS = {None: ("<q>", "<k>", "<v>"), ".pattern": ("<q>", "<k>")}
"""What edges into a head, or into its pattern, are into."""


@dataclass(frozen=True)
class _Node:
    """A component as EAP-IG names it.

    Attributes:
        slots: what edges into it are into: queries, keys, values.
    """

    name: str
    kind: str
    place: tuple[int, int] = (0, 0)
    slots: tuple[str, ...] = ("",)

    @classmethod
    def of(cls, name: str) -> _Node:
        if name == "output":
            return cls("logits", "output")
        if head := re.fullmatch(r"a(\d+)\.h(\d+)(\.pattern|\.[qkv])?", name):
            place = int(head[1]), int(head[2])
            slots = _SLOTS.get(head[3]) or (f"<{head[3][1]}>",)
            return cls(f"a{place[0]}.h{place[1]}", "head", place, slots)
        if mlp := re.fullmatch(r"m(\d+)", name):
            return cls(name, "mlp", (int(mlp[1]), 0))
        if re.fullmatch(r"(a|m)\d+\.\w+(\.pattern|\.[qkv])?(@\d+)?|(m\d+|embed[\w.]*)@\d+", name):
            raise QueryError(
                f"the layout 'eap' has whole heads and MLPs, and not {name!r}: save with "
                "layout='nrm'. (What one head reads alone, 'a0.h0.k', it has.)"
            )
        return cls("input", "input")


# -- the search.


def find_circuit(
    scores: Tensor,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    kept: Kept,
    share: float,
    ends: Tensor,
    work: int,
    last: Tensor | None = None,
    possible: Tensor | None = None,
) -> Circuit:
    """A small set of edges that keeps a share of the relevance.

    The edges with the largest absolute relevance, as few as are needed (found by halving); less
    those that no kept walk can take; then less any others that can be done without, from the
    smallest up; then all smaller sets, those of fewest edges first, as long as sets may be tried.

    Arguments:
        scores: `[receivers, senders]`, the relevance of every edge.
        names: of receivers and senders.
        kept: what a set keeps.
        share: of the relevance of all walks, above 0 and at most 1; it may not be exceeded by more
            than is missing at most.
        ends: `[senders]`, whether walks may end there.
        work: how many sets may be tried.
        last: `[receivers, leaves]`, what walks that end by each last step are worth at most;
            `None`: it is not known.
        possible: `[receivers, senders]`, the edges that walks may take; `None`: those of which the
            relevance is not zero.

    Raises:
        QueryError: the share is none, or no set of the edges tried keeps it.
    """
    if not 0 < share <= 1:
        raise QueryError(f"a share is above 0 and at most 1, not {share!r}")
    if not isinstance(work, int) or work < 1:
        raise QueryError(f"work is a positive number of sets to try, not {work!r}")
    search = _Search(scores, names, kept, share, ends.cpu(), work)
    chosen, found = search.smallest()
    bound = 1 if last is None else _fewest(last, search.wanted, int(chosen.sum()))
    able = scores != 0 if possible is None else possible.to(scores.device) | (scores != 0)
    smaller, tried = search.smaller(int(chosen.sum()), bound, able)
    if smaller is not None:
        chosen, found = smaller
    fewest = None if last is None and tried == 1 < int(chosen.sum()) else tried
    return Circuit(*names, scores, chosen, found, share, fewest, search.runs)


@dataclass
class _Search:
    """Sets of edges that are tried.

    Attributes:
        runs: how many have been.
        others: as for `find_circuit`.
    """

    scores: Tensor
    names: tuple[tuple[str, ...], tuple[str, ...]]
    measured: Kept
    share: float
    ends: Tensor
    work: int
    runs: int = 0

    def __post_init__(self) -> None:
        self.wanted = self.share - 64 * torch.finfo(self.scores.dtype).eps  # but for rounding
        receivers, senders = self.names
        self._row = [receivers.index(s) if s in receivers else -1 for s in senders]
        ranks = self.scores.abs().flatten().argsort(descending=True, stable=True)
        self.ranks = ranks[self.scores.flatten()[ranks] != 0]

    def smallest(self) -> tuple[Tensor, float]:
        low, high = 0, len(self.ranks)
        best, found = self._tried(high)
        if not self.enough(found):
            raise QueryError(
                f"all edges together keep {found:.6g} by this arithmetic, and not the share asked "
                "for: ask for less."
            )
        while high - low > 1 and self.runs < self.work:
            middle = (low + high) // 2
            chosen, kept = self._tried(middle)
            if self.enough(kept):
                high, best, found = middle, chosen, kept
            else:
                low = middle
        return self._without_more(best, found)

    def _tried(self, count: int) -> tuple[Tensor, float]:
        """The set of the most relevant edges, less what no kept walk takes, and what it keeps."""
        chosen = torch.zeros_like(self.scores, dtype=torch.bool)
        chosen.view(-1)[self.ranks[:count]] = True
        chosen = self.connected(chosen)
        return chosen, self.kept(chosen)

    def kept(self, chosen: Tensor) -> float:
        self.runs += 1
        return self.measured(chosen)

    def enough(self, kept: float) -> bool:
        return abs(1 - kept) <= 1 - self.wanted

    def _without_more(self, chosen: Tensor, found: float) -> tuple[Tensor, float]:
        """Leave out edges that can be done without: many at a time, then fewer."""
        size = max(1, int(chosen.sum()) // 8)
        while self.runs < self.work:
            places = [p for p in self.ranks.flip(0).tolist() if bool(chosen.view(-1)[p])]
            left_out = False
            for begin in range(0, len(places), size):
                if self.runs >= self.work:
                    break
                fewer = chosen.clone()
                fewer.view(-1)[places[begin : begin + size]] = False
                fewer = self.connected(fewer)
                if not bool(fewer.any()):
                    continue
                kept = self.kept(fewer)
                if self.enough(kept):
                    chosen, found, left_out = fewer, kept, True
            if size == 1 and not left_out:
                break
            size = max(1, size // 2)
        return chosen, found

    def smaller(
        self, most: int, least: int, able: Tensor
    ) -> tuple[tuple[Tensor, float] | None, int]:
        """A smallest set of fewer edges than some that keeps enough, if there is one.

        Arguments:
            most: fewer than these.
            least: no set of fewer than these does.
            able: the edges that sets are made of.

        Returns:
            the set and what it keeps; and a number of edges than which no set of fewer does.
        """
        places = able.flatten().nonzero()[:, 0]
        for size in range(least, most):
            if math.comb(len(places), size) > _COMBINATIONS:
                return None, size
            for some in itertools.combinations(places.tolist(), size):
                chosen = torch.zeros_like(able)
                chosen.view(-1)[list(some)] = True
                if not torch.equal(self.connected(chosen), chosen):
                    continue  # it keeps what a smaller set keeps
                if self.runs >= self.work:
                    return None, size
                found = self.kept(chosen)
                if self.enough(found):
                    return (chosen, found), size
        return None, most

    def connected(self, chosen: Tensor) -> Tensor:
        """The edges on a way from the output to a leaf, or to where walks may end."""
        rows = torch.tensor(self._row)
        inner = rows >= 0
        chosen = chosen.clone()
        while True:
            reached = torch.zeros(len(chosen), dtype=torch.bool)
            reached[0] = True
            reached[rows[inner]] = chosen[:, inner].any(0).cpu()
            onward = torch.ones(len(rows), dtype=torch.bool)
            onward[inner] = chosen.any(1).cpu()[rows[inner]] | self.ends[inner]
            fewer = chosen & (reached.view(-1, 1) & onward).to(chosen.device)
            if torch.equal(fewer, chosen):
                return fewer
            chosen = fewer


def _fewest(last: Tensor, wanted: float, most: int) -> int:
    """How many edges there have to be, that the last steps of walks among them carry enough.

    Who takes a last step, other than the output, has to be handed relevance by a further edge.

    Arguments:
        last: `[receivers, leaves]`, what last steps carry at most; the output first.
        most: as many are enough.
    """
    carried = last.clamp(min=0).double().cpu().sort(1, descending=True).values.cumsum(1)
    best = torch.full((most + 1,), -torch.inf, dtype=torch.float64)  # by as many edges
    best[0] = 0.0
    for row, sums in enumerate(carried):
        with_more = best.clone()
        for count, total in enumerate(sums.tolist(), 1):
            cost = count + (row > 0)
            if cost > most:
                break
            with_more[cost:] = torch.maximum(with_more[cost:], best[: most + 1 - cost] + total)
        best = with_more
    enough = (best >= wanted).nonzero()[:, 0].tolist()
    return max(1, enough[0]) if enough else most
