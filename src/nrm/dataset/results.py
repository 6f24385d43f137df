"""What a run found: its tables, and the samples of a channel with their heatmaps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nrm.capture.digest import of_weights
from nrm.dataset import tables
from nrm.dataset.samples import Read
from nrm.dataset.shard import QUANTITIES, Quantity
from nrm.dataset.sketch import BINS, OUTERMOST, Floats, quantiles
from nrm.dataset.sources import SHARD, Source, as_source
from nrm.dataset.storage import Counts, Folder
from nrm.display import Shown, Table
from nrm.errors import InputError, QueryError
from nrm.evaluation.store import digest
from nrm.explainer import Explainer
from nrm.formulas import NeuronSet
from nrm.methods import Scale, crp
from nrm.sets import channels


@dataclass(frozen=True)
class Reference:
    """A sample among those with the largest values of a part.

    Attributes:
        sample: its number in the data set.
        name: where it is from.
        value: the part's relevance, or activation.
        label: its true class, where that is known.
        explained: the output that was explained.
        output: that output itself.
    """

    sample: int
    name: str
    value: float
    label: int | None
    explained: int
    output: float


@dataclass(frozen=True)
class Flow:
    """A pair of parts of two layers, with their mean joint relevance.

    Attributes:
        parts: the numbers of both.
        mean: over the samples of the class.
        highest: the largest of one sample, which is `sample`.
    """

    layers: tuple[str, str]
    parts: tuple[int, int]
    mean: float
    highest: float
    sample: int


@dataclass(frozen=True)
class Heatmaps:
    """Samples of a part, with where in them the part's relevance lies.

    Attributes:
        references: the samples, the largest value first.
        inputs: `[samples, *input]`.
        heatmaps: shaped alike; the relevance jointly with the part, or conditional on it.
        scale: in which units: shares of the explained output, or its own.
    """

    references: list[Reference]
    inputs: Tensor
    heatmaps: Tensor
    scale: Scale = "normalized"


class Results(Shown):
    """The results of a run, finished or not.

    Attributes:
        path: the folder.
        manifest: what was asked of what.
        complete: whether all of the data set is in it.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.path, self.manifest = folder.path, folder.manifest
        finished = folder.finished()
        self._tables: tables.Tables = {}
        self._samples: dict[int, dict[str, Any]] | None = None
        self.complete = finished is not None
        if finished is None:
            shards = folder.committed()
            self._counts = sum(shards.values(), Counts(0, 0, False, {}))
            self._tables = folder.merged(shards)
        else:
            self._counts = Counts(**{n: v for n, v in finished.items() if n != "shards"})

    # -- what there is ---------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """How many samples were explained."""
        return self._counts.samples

    @property
    def cautions(self) -> dict[str, int]:
        """How many batches each kind of warning was given for (`nrm.errors.Cautions`)."""
        return dict(self._counts.cautions)

    @property
    def layers(self) -> dict[str, list[str]]:
        """The names of the parts of every layer."""
        return dict(self._folder.parts)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of layers with joint statistics."""
        return list(self._folder.pairs)

    def kept(self, name: str) -> Any:
        """A table of pyarrow (`to_pandas()` makes a data frame of it): `parts`, `classes`,
        `histogram`, `top`, `joint`, `samples` or `skipped` (docs/dataset.md).

        Raises:
            QueryError: there is none of the name.
        """
        if name not in tables.MERGED:
            raise QueryError(f"there is no table {name!r}; there is: {', '.join(tables.MERGED)}.")
        if name not in self._tables:
            self._tables[name] = self._folder.table(name)
        return self._tables[name]

    @property
    def skipped(self) -> list[tuple[int, str, str]]:
        """Number, name and reason of every sample that could not be read or explained."""
        rows = self.kept("skipped").to_pylist()
        return [(row["sample"], row["name"], row["reason"]) for row in rows]

    def statistics(
        self, layer: str, quantity: Quantity = "relevance", explained: int | None = None
    ) -> Any:
        """A row for each part of a layer: of all samples, or of those of a class.

        Arguments:
            quantity: `"relevance"`, or `"activation"` if the run kept it.
            explained: the class.

        Returns:
            a table of pyarrow, by the number of the part.

        Raises:
            QueryError: the run has no such layer or quantity.
        """
        self._layer(layer, quantity)
        words = {"layer": layer, "quantity": quantity}
        if explained is None:
            return tables.chosen(self.kept("parts"), words)
        return tables.chosen(self.kept("classes"), {**words, "class": explained})

    def quantile(self, layer: str, q: float, quantity: Quantity = "relevance") -> Floats:
        """`[parts]`: a quantile of each part over all samples, to a relative error of
        `sketch.ACCURACY`.

        Arguments:
            q: from 0 to 1; 0.5 is the median.
            quantity: as for `statistics`.
        """
        if not 0 <= q <= 1:
            raise QueryError(f"a quantile is from 0 to 1, not {q!r}")
        size = self._layer(layer, quantity)
        rows = tables.chosen(self.kept("histogram"), {"layer": layer, "quantity": quantity})
        counts = np.zeros((size, BINS), np.int64)
        counts[rows["part"].to_numpy(), rows["bin"].to_numpy() + OUTERMOST] = rows["count"]
        ends = self.statistics(layer, quantity)
        lowest, highest = (ends[name].to_numpy() for name in ("lowest", "highest"))
        found: Floats = quantiles(counts, (q,), lowest, highest)[0]
        return found

    def references(
        self,
        layer: str,
        part: int | str,
        quantity: Quantity = "relevance",
        k: int | None = None,
        *,
        explained: int | None = None,
    ) -> list[Reference]:
        """The samples in which a part has its largest values, the largest first.

        Arguments:
            part: its number, or its name.
            quantity: as for `statistics`.
            k: how many; by default as many as were kept.
            explained: a class: of those that were kept, the ones that were explained as it.
        """
        number = self.part(layer, part, quantity)
        words = {"layer": layer, "quantity": quantity, "part": number}
        rows = tables.chosen(self.kept("top"), words).sort_by("rank").to_pylist()
        known = self._known()
        found = [Reference(r["sample"], value=r["value"], **known[r["sample"]]) for r in rows]
        if explained is not None:
            found = [one for one in found if one.explained == explained]
        return found[:k]

    def flows(
        self,
        first: str,
        second: str,
        explained: int | None = None,
        k: int = 10,
        smallest: bool = False,
    ) -> list[Flow]:
        """The pairs of parts of two layers with the largest mean joint relevance.

        Arguments:
            first, second: the layers, as they were given to the run.
            explained: the class; by default all samples that there are joint statistics of, those
                of the run's `joint_classes`.
            k: how many.
            smallest: the most negative ones instead.
        """
        if (first, second) not in self._folder.pairs:
            raise QueryError(
                f"there are no joint statistics of {first!r} and {second!r}; of: {self.pairs}."
            )
        words = {"first": first, "second": second}
        words |= {"class": tables.ALL if explained is None else explained}  # type: ignore[dict-item]
        rows = tables.chosen(self.kept("joint"), words)
        order = "ascending" if smallest else "descending"
        by = [("mean", order), ("first_part", "ascending"), ("second_part", "ascending")]
        return [
            Flow(
                (first, second),
                (row["first_part"], row["second_part"]),
                row["mean"],
                row["highest"],
                row["sample"],
            )
            for row in rows.sort_by(by).slice(0, k).to_pylist()
        ]

    def about(self, sample: int) -> dict[str, Any]:
        """Name, label, explained output of a sample that is among the largest of anything."""
        try:
            return dict(self._known()[sample])
        except KeyError:
            raise QueryError(f"nothing is kept of sample {sample}") from None

    # -- anew ------------------------------------------------------------------------------------

    def heatmaps(
        self,
        explainer: Explainer,
        data: Any,
        layer: str,
        part: int | str,
        quantity: Quantity = "relevance",
        k: int | None = None,
        *,
        explained: int | None = None,
        concept: NeuronSet | None = None,
        conditional: bool = False,
        read: Read | None = None,
    ) -> Heatmaps:
        """The samples of a part with the relevance of every input element jointly with it (CRP).

        Computed now, sample by sample, from the data set, in the units of the run (`scale`): a
        heatmap adds up to the relevance of the part, but for what biases take.

        Arguments:
            explainer: that of the run.
            data, read: as for `relmax`.
            layer, part, quantity, k, explained: as for `references`.
            concept: the part's neurons, where parts were given as sets.
            conditional: divide by the part's own relevance (eq. 11), which leaves no units.

        Raises:
            InputError: model, explainer or data are not those of the run.
        """
        number = self.part(layer, part, quantity)
        self.require(explainer)
        source = self.source(data, read)
        neurons_of = concept or self._set_of(layer, number)
        references = self.references(layer, number, quantity, k, explained=explained)
        scale: Scale = "normalized" if conditional else self.manifest["scale"]
        inputs, found = [], []
        for one in references:
            sample = source.sample(one.sample)
            if sample.error is not None:
                raise InputError(f"sample {one.name} cannot be read any more: {sample.error}")
            R = explainer(*(x.unsqueeze(0) for x in sample.inputs), target=one.explained)
            found.append(crp(R, neurons_of, conditional=conditional, scale=scale)[0])
            inputs.append(sample.inputs[0])
        if not references:
            kept = "" if explained is None else f" among the {self.manifest['k']} that were kept"
            of = "" if explained is None else f" of class {explained}"
            raise QueryError(f"there are no samples{of} of {layer!r}, part {part!r}{kept}")
        return Heatmaps(references, torch.stack(inputs), torch.stack(found), scale)

    def require(self, explainer: Explainer) -> None:
        """Refuse another model than that of the run, or one that is explained otherwise.

        Raises:
            InputError: its weights, or the explainer's settings, are others.
        """
        if of_weights(explainer.model) != self.manifest["weights"]:
            raise InputError(f"{self.path} is of a model with other weights")
        if settings_digest(explainer) != self.manifest["explainer"]:
            raise InputError(
                f"{self.path} is of an explainer with other settings, whose relevances are others: "
                f"its rules were {self.manifest['composite']}. Give the same arguments to "
                "Explainer as for the run."
            )

    def source(self, data: Any, read: Read | None = None) -> Source:
        """The data set of the run, in its shards.

        Arguments: as for `relmax`.

        Raises:
            InputError: it is another.
        """
        size = self.manifest["data"].get("shard", SHARD)
        source = as_source(data, read, size)
        if json.loads(json.dumps(source.fingerprint())) != self.manifest["data"]:
            raise InputError(f"{self.path} is of another data set, or of what this one was before")
        return source

    def part(self, layer: str, part: int | str, quantity: Quantity = "relevance") -> int:
        """The number of a part of a layer, given by its number or its name.

        Raises:
            QueryError: there is none.
        """
        size = self._layer(layer, quantity)
        names = self.layers[layer]
        number = names.index(part) if isinstance(part, str) and part in names else part
        if not isinstance(number, int) or not 0 <= number < size:
            raise QueryError(f"{layer!r} has {size} parts and none called {part!r}")
        return number

    def _layer(self, layer: str, quantity: str) -> int:
        """How many parts a layer has."""
        if layer not in self.layers:
            raise QueryError(
                f"there are no statistics of {layer!r}; there are of: {', '.join(self.layers)}."
            )
        if quantity not in QUANTITIES:
            raise QueryError(f"the quantity is one of {QUANTITIES}, not {quantity!r}")
        return len(self.layers[layer])

    def _set_of(self, layer: str, number: int) -> NeuronSet:
        (of,) = (each for each in self.manifest["layers"] if each["name"] == layer)
        if of["sets"]:
            raise QueryError(f"the parts of {layer!r} were given as sets: give concept= the set")
        if of["by"] == "neuron":
            raise QueryError(f"the parts of {layer!r} are neurons: give concept= the neuron")
        return channels(layer, number, axis=None if of["by"] == "channel" else of["by"])

    def _known(self) -> dict[int, dict[str, Any]]:
        if self._samples is None:
            rows = self.kept("samples").to_pylist()
            self._samples = {row.pop("sample"): row for row in rows}
        return self._samples

    # -- shown -----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        state = "" if self.complete else ", not finished"
        layers = ", ".join(self.layers)
        return f"Results({str(self.path)!r}: {self.samples} samples, {layers}{state})"

    def table(self) -> Table:
        manifest = self.manifest
        rows = [
            ("folder", str(self.path)),
            ("samples", f"{self.samples} explained, {len(self.skipped)} skipped"),
            ("finished", "yes" if self.complete else "no: the same run goes on from here"),
            ("explained", f"target {manifest['target']} of {manifest['classes']}"),
            ("rules", manifest["composite"]),
            *(("layer", f"{layer}: {len(parts)} parts") for layer, parts in self.layers.items()),
            *(("joint", f"{first} and {second}") for first, second in self.pairs),
        ]
        warned = [f"{kind} in {count} batches" for kind, count in self.cautions.items()]
        notes = [f"Warnings (docs/dataset.md): {', '.join(warned)}."] if warned else []
        return Table("Relevance over a data set", (), rows, notes)


def settings_digest(explainer: Explainer) -> str:
    """What tells an explainer from others of the same model, the same in every process."""
    settings = explainer.__getstate__() | {"model": None, "check": None}
    return digest(settings)


def open_results(path: Path | str) -> Results:
    """The results in a folder that `nrm.dataset.relmax` or `nrm relmax` wrote, or is writing.

    Of a run that is not over, what its finished shards hold.

    Raises:
        InputError: there are none, they are damaged, or of another version.
    """
    return Results(Folder(Path(path)))
