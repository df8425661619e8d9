"""Every training row keeps its id on the way to the training step.

Columns that the model does not know are dropped before the collator, and collators drop keys they do not know. So the
id does not travel in the row: the dataset hands out (row, id) pairs, and the collator is wrapped to take the ids off
before the user's collator sees the rows and to put them into the batch afterwards. The rows are those that `Trainer`
would have handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from ..random_state import random_state_kept


# A key of the batch that no model argument and no column is called.
BATCH_KEY = "_datashapley_sample_id"
SHOWN = 5


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


class WithoutColumn:
    """A collator whose rows lose one column first, if they have it."""

    def __init__(self, collate: Callable[[list[Any]], Any], column: str):
        self.collate = collate
        self.column = column

    def __call__(self, rows: list[Any]) -> Any:
        if isinstance(rows[0], Mapping) and self.column in rows[0]:
            rows = [{key: value for key, value in row.items() if key != self.column} for row in rows]
        return self.collate(rows)


class IdentifyingCollator:
    """Collates the rows of `IdentifiedRow`s with the user's collator and adds their ids, int64 [rows]."""

    def __init__(self, collate: Callable[[list[Any]], Any], id_column: str):
        self.collate = WithoutColumn(collate, id_column)

    def __call__(self, items: list[IdentifiedRow]) -> Any:
        batch = self.collate([item.row for item in items])
        for name in ("input_ids", "labels"):
            if name in batch and len(batch[name]) != len(items):
                raise ValueError(
                    f"the data collator made {len(batch[name])} rows of {name} from {len(items)} samples, which "
                    "cannot be told apart any more: use one that keeps a row for each sample "
                    "(DataCollatorForLanguageModeling(tokenizer, mlm=False))"
                )
        batch[BATCH_KEY] = torch.tensor([item.sample_id for item in items], dtype=torch.int64)
        return batch


def read_sample_ids(dataset: Any, column: str, progress: bool) -> np.ndarray | None:
    """The ids of a map-style dataset's rows, int64 [rows], or None where it has no such column.

    Raises:
        ValueError: an id is missing, not an integer, negative, or stands twice; the first offenders are shown.
    """
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


def checked_ids(ids: np.ndarray, column: str) -> np.ndarray:
    """int64 ids from integers of any width, if none is out of range or stands twice."""
    refuse("is negative", ids < 0, ids, column)
    refuse("is above 2**63 - 1", ids > np.iinfo(np.int64).max, ids, column)
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
