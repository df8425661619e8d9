"""Every training row has an id, and keeps it on the way to the collator.

Columns that the model does not know are dropped before the collator. So the id does not travel in the row: the dataset
hands out (row, id) pairs, and the wrapped collator (`batches`) takes the ids off. The rows are those that `Trainer`
would have handed out.

A stream is not wrapped, so that its sharding among workers and processes, `set_epoch` and the like stay its own. Its
rows carry their ids in a column, and the wrapped collator, which comes before columns are dropped, takes them out.
Whether two rows of a stream have the same id cannot be seen: they would get one value.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from ..random_state import random_state_kept


LARGEST_ID = np.iinfo(np.int64).max
SHOWN = 5
STREAM_CURE = (
    "give each row an integer of its own where the rows are made: a column of the files, what your generator yields, "
    "or dataset.add_column({column!r}, range(len(dataset))) before to_iterable_dataset(); not by "
    "map(..., with_indices=True), which counts from 0 in every shard or worker and so gives several rows the same id"
)


class IdentifiedRow(NamedTuple):
    row: Any
    sample_id: int


class IdentifiedRows(torch.utils.data.Dataset[IdentifiedRow]):
    """A map-style dataset whose items are `IdentifiedRow`; `ids` None numbers the rows."""

    def __init__(self, rows: Any, ids: np.ndarray | None):
        self.rows = rows
        self.ids = ids

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> IdentifiedRow:
        return IdentifiedRow(self.rows[index], self._id(index))

    def __getitems__(self, indices: list[int]) -> list[IdentifiedRow]:
        """A batch at once, which `datasets.Dataset` reads much faster than row by row."""
        if isinstance(self.rows, datasets.Dataset):
            rows = self.rows.__getitems__(indices)
        else:
            rows = [self.rows[index] for index in indices]
        return [IdentifiedRow(row, self._id(index)) for row, index in zip(rows, indices, strict=True)]

    def _id(self, index: int) -> int:
        return int(index) if self.ids is None else int(self.ids[index])


def identified(items: list[Any], id_column: str) -> list[IdentifiedRow]:
    """What the loader hands out: pairs of `IdentifiedRows`, or rows of a stream."""
    if isinstance(items[0], IdentifiedRow):
        return items
    return [IdentifiedRow(row, stream_id(row, id_column)) for row in items]


def stream_id(row: Any, column: str) -> int:
    """The id that a row of a stream carries.

    Raises:
        ValueError: it has none, or one that is not an integer from 0 to 2**63 - 1.
    """
    cure = STREAM_CURE.format(column=column)
    if not isinstance(row, Mapping) or column not in row:
        raise ValueError(
            f"train_dataset is a stream, whose rows cannot be numbered, and one of them has no column {column!r} "
            f"(`sample_id_column`): {cure}"
        )
    value = row[column]
    try:
        sample_id = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:  # not an integer, also not one of NumPy or torch
        sample_id = -1
    if not 0 <= sample_id <= LARGEST_ID:
        raise ValueError(f"{column} of a row is {value!r}, not an integer from 0 to 2**63 - 1: {cure}")
    return sample_id


def is_stream(dataset: Any) -> bool:
    """`datasets.IterableDataset` is a subclass too."""
    return isinstance(dataset, torch.utils.data.IterableDataset)


def check_stream(dataset: Any, column: str) -> None:
    """Looks whether the rows of a stream carry ids, as far as that can be seen without using it up.

    A `datasets.IterableDataset` can be asked for its columns, or for its first row, which it yields again later; of
    another one the first batch tells.

    Raises:
        ValueError: they do not.
    """
    if not isinstance(dataset, datasets.IterableDataset):
        return
    features = dataset.features
    if features is not None and column in features and pa.types.is_integer(features.arrow_schema.field(column).type):
        return
    with random_state_kept():
        first = next(iter(dataset), None)
    if first is None:
        raise ValueError("train_dataset is empty: give it at least one row")
    stream_id(first, column)


def read_sample_ids(dataset: Any, column: str, progress: bool) -> np.ndarray | None:
    """The ids of a map-style dataset's rows, int64 [rows], or None where it has no such column, or is a stream.

    Raises:
        ValueError: an id is missing, not an integer, negative, or stands twice; the first offenders are shown.
    """
    if is_stream(dataset):
        check_stream(dataset, column)
        return None
    if len(dataset) == 0:
        raise ValueError("train_dataset is empty: give it at least one row")
    if isinstance(dataset, datasets.Dataset):
        if column not in dataset.column_names:
            return None
        found = dataset.with_format("arrow").select_columns([column])[:][column]
        if pa.types.is_integer(found.type) and not found.null_count:
            return checked_ids(found.to_numpy(), column)
        ids = found.to_pylist()
    else:
        # A list is looked through; a dataset that computes its rows has the column in its first one or not at all.
        with random_state_kept():
            looked_at = dataset if isinstance(dataset, list | tuple) else [dataset[0]]
            if not any(isinstance(row, Mapping) and column in row for row in looked_at):
                return None
            rows = tqdm(range(len(dataset)), f"reading {column}", disable=not progress, leave=False)
            ids = [dataset[i].get(column) for i in rows]
    refuse("is null", [value is None for value in ids], ids, column)
    refuse("is not an integer", [type(value) is bool or not isinstance(value, Integral) for value in ids], ids, column)
    return checked_ids(np.array([int(value) for value in ids], dtype=object), column)


def drawn_samples(dataset: Any, ids: np.ndarray | None, count: int, seed: int) -> frozenset[int]:
    """So many of a map-style dataset's samples, or all; no global random state is drawn from.

    Raises:
        ValueError: it is a stream, which has no end to draw from.
    """
    if is_stream(dataset):
        raise ValueError(
            "token_samples draws among the samples, and train_dataset is a stream: name the samples whose tokens are "
            "to have values of their own (token_sample_ids), or set token_samples=0"
        )
    rows = np.random.default_rng(seed).permutation(len(dataset))[:count]
    return frozenset((rows if ids is None else ids[rows]).tolist())


def check_chosen(chosen: frozenset[int], dataset: Any, ids: np.ndarray | None) -> None:
    """Raises `ValueError` for an id that no row of a map-style dataset has."""
    if is_stream(dataset):
        return
    known = frozenset(range(len(dataset)) if ids is None else ids.tolist())
    unknown = sorted(map(str, chosen - known))
    if unknown:
        raise ValueError(
            f"token_sample_ids: no sample of train_dataset has the id {', '.join(unknown[:SHOWN])}: give integers of "
            "its column of ids (`sample_id_column`), or numbers of its rows where it has none"
        )


def checked_ids(ids: np.ndarray, column: str) -> np.ndarray:
    """int64 ids from integers of any width, if none is out of range or stands twice."""
    refuse("is negative", ids < 0, ids, column)
    refuse("is above 2**63 - 1", ids > LARGEST_ID, ids, column)
    ids = ids.astype(np.int64)
    order = np.argsort(ids, kind="stable")
    again = np.zeros(len(ids), bool)
    again[order[1:]] = ids[order[1:]] == ids[order[:-1]]
    refuse("stands more than once", again, ids, column)
    return ids


def refuse(fault: str, wrong: Sequence[bool] | np.ndarray, ids: Sequence[Any] | np.ndarray, column: str) -> None:
    offenders = np.flatnonzero(np.asarray(wrong))
    if len(offenders):
        shown = ", ".join(f"row {i}: {ids[i]!s}" for i in offenders[:SHOWN])
        more = f" and {len(offenders) - SHOWN} more" if len(offenders) > SHOWN else ""
        raise ValueError(
            f"{column} {fault} ({shown}{more}): give each row an id of its own, an integer from 0 to 2**63 - 1, or "
            f"drop the column {column!r} to number the rows"
        )
