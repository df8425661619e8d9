"""Sums over updates, of units of any level; made from stretches of whole updates, one after the other.

Each stretch is added to the sums so far in the order of its rows, as if all had been summed at once: how a run's
updates are cut into stretches changes no bit. Stretches are collected until they have as many rows as there are sums,
so that these are not copied too often: 60 million rows of 2 million samples took 25 s and 1.3 GiB (of the process) on
one core, where all at once takes 19 s and 2.2 GiB, and goes on growing with the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .groups import COUNTED
from .layout import KEY_TYPES, value_columns
from .stretches import ROWS_AT_ONCE, Rows


def check_normalize(normalize: str | None) -> None:
    if normalize not in (None, "update"):
        raise ValueError(f"normalize={normalize!r} is not offered: choose 'update', or None")


def sum_values(rows: Rows, level: list[str], first: int, last: int, normalize: str | None = None) -> pa.Table:
    """One row for each unit of `level` (a list of keys) in the updates `first` to `last`, by its keys.

    Columns: as `load_values` says. Where a level is coarser than the rows', these are read twice.
    """
    columns = value_columns(rows.targets)
    stretches = rows.stretches(first, last)
    if normalize == "update":
        stretches = (normalized(stretch, rows.keys, columns) for stretch in stretches)
    units = summed(stretches, level, ["updates", "tokens"], columns)
    updates = units["updates"]
    if level[-1] != rows.keys[-1]:
        visited = (visits(stretch, rows.keys, level) for stretch in rows.stretches(first, last))
        updates = summed(visited, level, ["updates"], [])["updates"]
    return units.set_column(units.column_names.index("updates"), "updates", updates.cast(pa.int32()))


def history(rows: Rows, first: int, last: int) -> Iterator[pa.Table]:
    """One row for each update and unit in it, by update and keys; a stretch after the other, the first one empty."""
    keys, columns = ["step", *rows.keys], value_columns(rows.targets)
    for stretch in itertools.chain([None], rows.stretches(first, last)):
        found = summed([] if stretch is None else [stretch], keys, ["updates", "tokens"], columns)
        yield found.set_column(found.column_names.index("updates"), "updates", found["updates"].cast(pa.int32()))


def summed(rows: Iterable[pa.Table], keys: list[str], integers: list[str], floats: list[str]) -> pa.Table:
    """Sums of columns over the rows that have the same keys, by keys: int64 and float64."""
    types = {"step": pa.int32(), **KEY_TYPES}
    schema = pa.schema(
        [(key, types[key]) for key in keys]
        + [(name, pa.int64()) for name in integers]
        + [(name, pa.float64()) for name in floats]
    )
    sums = schema.empty_table()
    held: list[pa.Table] = []
    for table in rows:
        held.append(table.select(schema.names))
        if sum(table.num_rows for table in held) >= max(ROWS_AT_ONCE, 2 * sums.num_rows):
            sums, held = _added(sums, held, keys), []
    sums = _added(sums, held, keys)
    return sums.sort_by([(key, "ascending") for key in keys])


def _added(sums: pa.Table, held: list[pa.Table], keys: list[str]) -> pa.Table:
    """The sums come first: rows are added to them one by one."""
    rows = pa.concat_tables([sums, *(table.cast(sums.schema) for table in held)])
    added = [(name, "sum") for name in sums.column_names if name not in keys]
    # One thread: the order of summation, and so the last bit, stays the same from reading to reading.
    found = rows.group_by(keys, use_threads=False).aggregate(added)
    return pa.table([*(found[key] for key in keys), *(found[f"{name}_sum"] for name, _ in added)], schema=sums.schema)


def visits(rows: pa.Table, keys: list[str], level: list[str]) -> pa.Table:
    """How often each sample, or document, was trained on: `updates`, of whole updates.

    It has several rows for each visit: one for each document, or token. In one update each of these has as many rows
    as there were visits (more, where a sample's row holds a document's id twice), so the least of them counts.
    """
    several = rows.group_by(["step", *keys], use_threads=False).aggregate([("updates", "sum")])
    visited = ["step", *keys[: keys.index(level[-1]) + 1]]
    fewest = several.group_by(visited, use_threads=False).aggregate([("updates_sum", "min")])
    return pa.table({**{key: fewest[key] for key in level}, "updates": fewest["updates_sum_min"]})


def normalized(rows: pa.Table, keys: list[str], columns: list[str]) -> pa.Table:
    """Values as shares of their update's summed magnitude, float64; of whole updates.

    That of documents, not of tokens: which tokens have rows of their own is a choice that must not move the others'
    values. A unit that an update visited twice is one.
    """
    if rows.num_rows == 0:
        return rows
    units = ["step", *(key for key in keys if key in COUNTED)]
    summed = rows.group_by(units, use_threads=False).aggregate([(column, "sum") for column in columns])
    first = pc.min(rows["step"]).as_py()
    summed_update, row_update = summed["step"].to_numpy() - first, rows["step"].to_numpy() - first
    for column in columns:
        magnitude = np.bincount(summed_update, weights=np.abs(summed[f"{column}_sum"].to_numpy()))
        shares = rows[column].to_numpy() / np.where(magnitude > 0, magnitude, 1.0)[row_update]
        rows = rows.set_column(rows.column_names.index(column), column, pa.array(shares))
    return rows
