"""The tables that statistics are kept in, as Parquet files that need no nrm to be read.

Of a shard: `moments`, `histogram`, `top`, `joint`, `samples`, `skipped` (`SCHEMAS`). Of a whole
run: the same, but for `parts` and `classes` in place of `moments` (`MERGED`). docs/dataset.md says
what every column is. A change of either is a change of `SCHEMA`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nrm.dataset.shard import QUANTITIES, Known, Pair, Quantity, ShardResult
from nrm.dataset.sketch import BINS, OUTERMOST, quantiles
from nrm.dataset.statistics import NOBODY, Joint, Moments, Statistics, Top
from nrm.errors import InputError

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "nrm.dataset keeps results by pyarrow: pip install 'nrm[dataset]'", name="pyarrow"
    ) from error

SCHEMA = 1
"""The version of the files' form."""

QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95,
             "q99": 0.99}  # fmt: skip
"""The columns of `parts` that hold quantiles."""
ALL = -1
"""The class of what is of all classes together."""

_WORD = pa.dictionary(pa.int32(), pa.string())
_OF = [("layer", _WORD), ("quantity", _WORD)]
_SIZES = [(name, pa.float64()) for name in ("lowest", "highest")]
_PAIR = [("first", _WORD), ("second", _WORD), ("class", pa.int32())]
_PART = ("part", pa.int32())

SCHEMAS = {
    "moments": pa.schema(
        [*_OF, ("class", pa.int32()), _PART, ("count", pa.int64()), ("mean", pa.float64()),
         ("squares", pa.float64()), *_SIZES]
    ),
    "histogram": pa.schema([*_OF, _PART, ("bin", pa.int32()), ("count", pa.int64())]),
    "top": pa.schema(
        [*_OF, _PART, ("rank", pa.int32()), ("sample", pa.int64()), ("value", pa.float64())]
    ),
    "joint": pa.schema(
        [*_PAIR, ("first_part", pa.int32()), ("second_part", pa.int32()), ("count", pa.int64()),
         ("mean", pa.float64()), ("highest", pa.float64()), ("sample", pa.int64())]
    ),
    "samples": pa.schema(
        [("sample", pa.int64()), ("name", pa.string()), ("label", pa.int32()),
         ("explained", pa.int32()), ("output", pa.float64())]
    ),
    "skipped": pa.schema(
        [("sample", pa.int64()), ("name", pa.string()), ("reason", pa.string())]
    ),
}  # fmt: skip

_SUMMARY = [("count", pa.int64()), ("mean", pa.float64()), ("variance", pa.float64()), *_SIZES]
MERGED = {
    "parts": pa.schema(
        [*_OF, _PART, ("name", pa.string()), *_SUMMARY, *((q, pa.float64()) for q in QUANTILES)]
    ),
    "classes": pa.schema([*_OF, ("class", pa.int32()), _PART, *_SUMMARY]),
    **{name: schema for name, schema in SCHEMAS.items() if name != "moments"},
}
"""Of a whole run."""

Tables = dict[str, Any]
"""Tables of pyarrow by name."""


def of_shard(result: ShardResult) -> Tables:
    """The tables of one shard."""
    return {
        "moments": _moments(result.statistics),
        "histogram": _histogram(result.statistics),
        "top": _top(result.statistics),
        "joint": _joint(result.joint),
        "samples": _samples(result.known),
        "skipped": _rows("skipped", zip(*result.skipped, strict=True)),
    }


def of_run(
    statistics: Mapping[tuple[str, Quantity], Statistics],
    joint: Mapping[Pair, Joint],
    known: Mapping[int, Known],
    skipped: Iterable[tuple[int, str, str]],
    names: Mapping[str, list[str]],
) -> Tables:
    """The tables of a whole run.

    Arguments:
        names: of the parts of every layer.
    """
    together = {pair: (each.overall(), each) for pair, each in joint.items()}
    return {
        "parts": _parts(statistics, names),
        "classes": _classes(statistics),
        "histogram": _histogram(statistics),
        "top": _top(statistics),
        "joint": pa.concat_tables(
            [
                SCHEMAS["joint"].empty_table(),
                *(_joint({pair: one}) for pair, each in together.items() for one in each),
            ]
        ).unify_dictionaries(),
        "samples": _samples(known),
        "skipped": _rows("skipped", zip(*skipped, strict=True)),
    }


def write(folder: Path, tables: Tables) -> None:
    """Every table into a file of its name."""
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")


def read(folder: Path, name: str) -> Any:
    """A table.

    Raises:
        InputError: it is damaged.
    """
    file = folder / f"{name}.parquet"
    try:
        return pq.read_table(file, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{file} is missing or damaged. Delete the folder {folder}: the next run computes it "
            "again."
        ) from error


def is_whole(folder: Path) -> bool:
    """Whether all tables of a shard are there, to their ends."""
    for name, schema in SCHEMAS.items():
        try:
            if not pq.read_schema(folder / f"{name}.parquet").equals(schema):
                return False
        except (OSError, pa.ArrowException):
            return False
    return True


# -- statistics as tables --------------------------------------------------------------------------


def _moments(statistics: Mapping[tuple[str, Quantity], Statistics]) -> Any:
    blocks = []
    for key, one in statistics.items():
        moments = one.moments
        classes, parts = moments.mean.shape
        values = [moments.mean, moments.squares, moments.lowest, moments.highest]
        blocks.append(
            (key, [moments.classes.repeat(parts), _numbers(classes, parts),
                   moments.count.repeat(parts), *(value.ravel() for value in values)])
        )  # fmt: skip
    return _table(SCHEMAS["moments"], blocks)


def _histogram(statistics: Mapping[tuple[str, Quantity], Statistics]) -> Any:
    blocks = []
    for key, one in statistics.items():
        part, place = one.counts.nonzero()
        blocks.append((key, [part, place - OUTERMOST, one.counts[part, place]]))
    return _table(SCHEMAS["histogram"], blocks)


def _top(statistics: Mapping[tuple[str, Quantity], Statistics]) -> Any:
    blocks = []
    for key, one in statistics.items():
        part, rank = (one.top.samples != NOBODY).nonzero()
        found = one.top.samples[part, rank], one.top.values[part, rank]
        blocks.append((key, [part, rank, *found]))
    return _table(SCHEMAS["top"], blocks)


def _joint(joint: Mapping[Pair, Joint]) -> Any:
    blocks = []
    for pair, one in joint.items():
        classes, firsts, seconds = one.mean.shape
        blocks.append(
            (pair, [one.classes.repeat(firsts * seconds),
                    np.tile(np.arange(firsts).repeat(seconds), classes),
                    _numbers(classes * firsts, seconds),
                    one.count.repeat(firsts * seconds),
                    one.mean.ravel(), one.highest.ravel(), one.samples.ravel()])
        )  # fmt: skip
    return _table(SCHEMAS["joint"], blocks)


def _samples(known: Mapping[int, Known]) -> Any:
    rows = ((n, k.name, k.label, k.explained, k.output) for n, k in sorted(known.items()))
    return _rows("samples", zip(*rows, strict=True))


def _parts(
    statistics: Mapping[tuple[str, Quantity], Statistics], names: Mapping[str, list[str]]
) -> Any:
    blocks = []
    for key, one in statistics.items():
        overall = one.moments.overall()
        (lowest,), (highest,) = overall.lowest, overall.highest
        found = quantiles(one.counts, tuple(QUANTILES.values()), lowest, highest)
        parts = len(lowest)
        blocks.append((key, [np.arange(parts), names[key[0]], *_summary(overall), *found]))
    return _table(MERGED["parts"], blocks)


def _classes(statistics: Mapping[tuple[str, Quantity], Statistics]) -> Any:
    blocks = []
    for key, one in statistics.items():
        classes, parts = one.moments.mean.shape
        place = [one.moments.classes.repeat(parts), _numbers(classes, parts)]
        blocks.append((key, [*place, *_summary(one.moments)]))
    return _table(MERGED["classes"], blocks)


def _summary(moments: Moments) -> list[npt.NDArray[Any]]:
    """Count, mean, variance (of the samples, divided by their number), extremes."""
    parts = moments.mean.shape[1]
    values = (
        moments.mean, moments.squares / moments.count[:, None], moments.lowest, moments.highest
    )  # fmt: skip
    return [moments.count.repeat(parts), *(value.ravel() for value in values)]


def _numbers(times: int, parts: int) -> npt.NDArray[np.int64]:
    return np.tile(np.arange(parts), times)


def _table(schema: Any, blocks: Iterable[tuple[tuple[str, str], list[Any]]]) -> Any:
    """Blocks of rows below each other, each of one layer and quantity or of one pair of layers."""
    tables = [schema.empty_table()]
    for words, columns in blocks:
        rows = len(columns[0])
        named = [pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [word]) for word in words]
        arrays = [
            pa.array(column, field.type)
            for column, field in zip(columns, list(schema)[2:], strict=True)
        ]
        tables.append(pa.table([*named, *arrays], schema=schema))
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def _rows(name: str, columns: Iterable[Iterable[Any]]) -> Any:
    schema = SCHEMAS[name]
    each = [list(column) for column in columns] or [[] for _ in schema]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(each, schema, strict=True)],
        schema=schema,
    )


# -- and back --------------------------------------------------------------------------------------


def statistics_in(
    folder: Path, parts: Mapping[str, int], k: int
) -> dict[tuple[str, Quantity], Statistics]:
    """What is in the tables of a shard.

    Arguments:
        parts: how many each layer has.
        k: how many samples are kept of each.
    """
    tables = {name: read(folder, name) for name in ("moments", "histogram", "top")}
    found: dict[tuple[str, Quantity], Statistics] = {}
    for layer, size in parts.items():
        for quantity in QUANTITIES:
            words = {"layer": layer, "quantity": quantity}
            moments, counts, top = (_columns(table, words) for table in tables.values())
            if not len(moments["part"]):
                continue
            by_class = {name: column.reshape(-1, size) for name, column in moments.items()}
            histogram = np.zeros((size, BINS), np.int64)
            histogram[counts["part"], counts["bin"] + OUTERMOST] = counts["count"]
            values, samples = np.full((size, k), -np.inf), np.full((size, k), NOBODY)
            values[top["part"], top["rank"]] = top["value"]
            samples[top["part"], top["rank"]] = top["sample"]
            found[layer, quantity] = Statistics(
                Moments(
                    by_class["class"][:, 0].astype(np.int64),
                    by_class["count"][:, 0],
                    *(by_class[name] for name in ("mean", "squares", "lowest", "highest")),
                ),
                histogram,
                Top(values, samples),
            )
    return found


def joint_in(folder: Path, pairs: Mapping[Pair, tuple[int, int]]) -> dict[Pair, Joint]:
    """The joint relevances in the tables of a shard.

    Arguments:
        pairs: how many parts the layers of each have.
    """
    found: dict[Pair, Joint] = {}
    table = read(folder, "joint") if pairs else None
    for pair, sizes in pairs.items():
        columns = _columns(table, {"first": pair[0], "second": pair[1]})
        if not len(columns["class"]):
            continue
        each = {name: column.reshape(-1, *sizes) for name, column in columns.items()}
        found[pair] = Joint(
            each["class"][:, 0, 0].astype(np.int64),
            each["count"][:, 0, 0],
            each["mean"],
            each["highest"],
            each["sample"],
        )
    return found


def known_in(folder: Path) -> dict[int, Known]:
    """What is known of samples in the tables of a shard."""
    rows = read(folder, "samples").to_pylist()
    return {
        row["sample"]: Known(row["name"], row["label"], row["explained"], row["output"])
        for row in rows
    }


def chosen(table: Any, words: Mapping[str, Any]) -> Any:
    """The rows of a table in which some columns have some values."""
    for name, value in words.items():
        table = table.filter(pc.equal(table[name], value))
    return table


def _columns(table: Any, words: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    rows = chosen(table, words).drop_columns(list(words))
    return {name: rows[name].to_numpy() for name in rows.column_names}
