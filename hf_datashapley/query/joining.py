"""Rows of a dataset and the units that have values, by their ids.

Shapes: R rows of the dataset, U units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from ..ledger.groups import COUNTED


Ints = npt.NDArray[np.int64]


def row_ids(dataset: Any, key: str, id_column: str | None = None) -> Ints:
    """The id of each row, int64 [R]: of `id_column`; None: of the column called `key`, or the rows' numbers without.

    Raises:
        ValueError: it is no `datasets.Dataset`, lacks the column, or the column has no integer in each row.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}: give the `datasets.Dataset` of the {COUNTED[key]} that were "
            "trained on (of a stream, one that was made of it)"
        )
    column = key if id_column is None else id_column
    if column not in dataset.column_names:
        if id_column is not None:
            raise ValueError(
                f"id_column={id_column!r} is no column of the dataset (it has {', '.join(dataset.column_names)}): "
                "name the one with the ids, or leave id_column out to number the rows"
            )
        return np.arange(len(dataset))
    ids = dataset.select_columns([column]).with_format("arrow")[:][column]
    if pa.types.is_nested(ids.type):
        raise ValueError(
            f"the dataset's column {column!r} holds lists, as packed rows do that know each token's document: give "
            "the corpus, a row for each document, or ask for the rows themselves by key='sample_id'"
        )
    if not pa.types.is_integer(ids.type) or ids.null_count:
        raise ValueError(
            f"the dataset's column {column!r} is not an integer in each row ({ids.type}, {ids.null_count} null): name "
            "the one with the ids as id_column"
        )
    found: Ints = ids.to_numpy().astype(np.int64)
    return found


def unit_of_rows(id_R: Ints, id_U: Ints, key: str, numbered: bool) -> Ints:
    """The unit of each row, from 0, or -1 where it has no values; ids of units are ascending.

    Raises:
        ValueError: the dataset cannot be the one that the values are of.
    """
    if len(id_U) == 0:
        return np.full(len(id_R), -1)
    place_R = np.searchsorted(id_U, id_R).clip(max=len(id_U) - 1)
    unit_R = np.where(id_U[place_R] == id_R, place_R, -1)
    lacking = len(id_U) - len(np.unique(unit_R[unit_R >= 0]))
    if lacking and (numbered or lacking == len(id_U)):
        known = "are known by their numbers" if numbered else "have other ids"
        raise ValueError(
            f"{lacking:,} of the {len(id_U):,} {COUNTED[key]} with values have no row in the dataset, whose "
            f"{len(id_R):,} rows {known}: give the dataset that was trained on, with its ids (id_column)"
        )
    return unit_R


def rows_of_units(unit_R: Ints, count: int) -> Ints:
    """The first row of each of `count` units, or -1."""
    row_U = np.full(count, -1)
    known = np.flatnonzero(unit_R >= 0)[::-1]
    row_U[unit_R[known]] = known
    return row_U


def with_columns(dataset: Dataset, columns: pa.Table) -> Dataset:
    """The dataset and more columns beside it; it is not altered, and not copied.

    (Unless it holds rows of another in an order of its own, as `select` and `shuffle` leave them: `datasets` writes
    these to its cache first.)

    Raises:
        ValueError: it has a column of that name.
    """
    for name in columns.column_names:
        if name in dataset.column_names:
            raise ValueError(
                f"the dataset has a column {name!r} already: rename it (dataset.rename_column), or take it out "
                "(remove_columns)"
            )
        dataset = dataset.add_column(name, columns[name])
    return dataset
