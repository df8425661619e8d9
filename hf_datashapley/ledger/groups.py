"""What samples or documents belong to: a source, a domain, an author; and sums over that.

Every unit of a table has to be in a group, so that nothing is lost and sums match at every level; a group may be null,
where the one who names the groups does not know. The price is a sort of the ids and a look-up of each: no Python loop
over units, but for that over a mapping or list that is given.

Sizes, as suffixes: U units in the table, I ids that have a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..grouping import SHOWN, Grouping


COUNTED = {"sample_id": "samples", "document_id": "documents"}


@dataclass(frozen=True)
class Groups:
    """The group of each id; ids in ascending order, each once."""

    name: str  # of the column that says which group
    id_I: npt.NDArray[np.int64]
    group_I: pa.Array

    @classmethod
    def of(cls, name: str, ids: npt.ArrayLike | None, groups: Any) -> Groups:
        """Of ids in any order, or None: groups are listed by id, from 0.

        Raises:
            ValueError: ids are not integers, one of them has two groups, or what groups are cannot be compared.
        """
        group_I = _as_array(name, groups)
        given = np.arange(len(group_I)) if ids is None else np.asarray(ids)
        if len(given) == 0:
            given = given.astype(np.int64)
        if given.dtype.kind not in "iu":
            raise ValueError(f"by: ids of the groups {name!r} are {given.dtype}, and those of a ledger integers")
        order = np.argsort(given, kind="stable")
        id_I, code_I = given[order].astype(np.int64), _codes(group_I)[0][order]
        again = np.flatnonzero(np.diff(id_I) == 0) + 1
        torn = np.unique(id_I[again[code_I[again] != code_I[again - 1]]])
        if len(torn):
            raise ValueError(
                f"by: {len(torn)} ids have more than one group in {name!r}, {_first(torn)} first: give each one group"
            )
        kept = np.delete(order, again)
        return cls(name, np.delete(id_I, again), group_I.take(pa.array(kept)))

    @classmethod
    def of_column(cls, dataset: Any, column: str, id_column: str) -> Groups:
        """Of a dataset's rows, known by their column of ids, or by their numbers if it has none.

        Raises:
            ValueError: it has no such column, or not one group and id in each row.
        """
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"by={column!r}: a {type(dataset).__name__} has no columns to look up: give a `datasets.Dataset`, or "
                "a mapping from ids to groups"
            )
        if column not in dataset.column_names:
            raise ValueError(
                f"by={column!r} is not a column of the dataset (it has {', '.join(dataset.column_names)}): name one "
                "of them, give the dataset that has it as `dataset`, or give a mapping from ids to groups"
            )
        has_ids = id_column in dataset.column_names
        table = dataset.select_columns(list({column, id_column} if has_ids else {column})).with_format("arrow")[:]
        ids = table[id_column] if has_ids else None
        if ids is not None and (ids.null_count or not pa.types.is_integer(ids.type)):
            raise ValueError(
                f"by={column!r}: the dataset's column {id_column!r} is not an integer in each row ({ids.type}, "
                f"{ids.null_count} null): give one that is, or a mapping from ids to groups"
            )
        return cls.of(column, None if ids is None else ids.to_numpy(), table[column])

    @classmethod
    def of_partition(cls, partition: Grouping, dataset: Any, key: str, id_column: str) -> Groups:
        """Of the dataset that was parted, see `parted_ids`; None: of samples that are known by their numbers.

        Groups are called by their names, or by their numbers where they have none.

        Raises:
            ValueError: it is another dataset, or none, and documents were parted; or ids are not such.
        """
        if dataset is None and key == "document_id":
            raise ValueError(
                "by is a partition, and groups of documents need `dataset`, which says whose label each is: give the "
                "rows or the documents that were parted, or key='sample_id' for a partition of samples"
            )
        ids = np.arange(len(partition.labels)) if dataset is None else parted_ids(dataset, id_column)
        if len(ids) != len(partition.labels):
            raise ValueError(
                f"by is a partition of {len(partition.labels)}, and the dataset has {len(ids)} {COUNTED[key]}: give "
                "the dataset that was parted, and `key` for what it holds, 'sample_id' or 'document_id'"
            )
        labels = pa.array(partition.labels)
        named = labels if partition.names is None else pa.array(partition.names).take(labels)
        return cls.of("group", ids, named)


def parted_ids(dataset: Any, id_column: str) -> npt.NDArray[np.int64]:
    """What the labels of a partition are of: the ids of rows, or their numbers without such a column; or, where it
    holds lists (packed rows with a document for each token, -1 for padding), of each document as it first appears.

    Raises:
        ValueError: the dataset has no columns, or ids are not integers.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"by is a partition, and a {type(dataset).__name__} has no columns to look up ids in: give a "
            "`datasets.Dataset`, or a mapping from ids to groups"
        )
    if id_column not in dataset.column_names:
        return np.arange(len(dataset))
    found = dataset.select_columns([id_column]).with_format("arrow")[:][id_column]
    packed = pa.types.is_list(found.type) or pa.types.is_large_list(found.type)
    if packed:
        found = pc.unique(pc.list_flatten(found))  # as they first appear
    if found.null_count or not pa.types.is_integer(found.type):
        raise ValueError(
            f"by is a partition, and the dataset's column {id_column!r} is not integers ({found.type}, "
            f"{found.null_count} null): name the one with ids (id_column), or give a mapping from ids to groups"
        )
    ids: npt.NDArray[np.int64] = found.to_numpy().astype(np.int64)
    return ids[ids >= 0] if packed else ids


By: TypeAlias = str | Mapping[int, Any] | Sequence[Any] | np.ndarray | pd.Series | pa.Array | Groups | Grouping


def read_groups(by: By, dataset: Any, key: str, id_column: str) -> Groups:
    """Groups in any of the forms that users give, see `load_values`.

    Raises:
        ValueError: it is none of these, or does not give each id one group.
    """
    if isinstance(by, Groups):
        return by
    if isinstance(by, str):
        return Groups.of_column(dataset, by, id_column)
    if isinstance(by, Grouping):
        return Groups.of_partition(by, dataset, key, id_column)
    if dataset is not None:
        raise ValueError(f"dataset is for a `by` that names one of its columns, and by is a {type(by).__name__}")
    if isinstance(by, Mapping):
        return Groups.of("group", list(by), list(by.values()))
    if isinstance(by, pd.Series):
        return Groups.of("group" if by.name is None else str(by.name), by.index.to_numpy(), by)
    if isinstance(by, (Sequence, np.ndarray, pa.Array, pa.ChunkedArray)):
        return Groups.of("group", None, by)
    raise ValueError(
        f"by is a {type(by).__name__}: give a column's name, a Partition, a mapping from ids to groups, a pandas "
        "Series with the ids as its index, or an array or list of groups by id"
    )


def sum_groups(units: pa.Table, groups: Groups, key: str, columns: list[str]) -> pa.Table:
    """Sums over the units of each group, by group, null last: `key` and what it counts as, updates, tokens, `columns`.

    Groups that no unit of the table belongs to have no row.

    Raises:
        ValueError: a unit has no group, or the groups are called as another column is.
    """
    counted = COUNTED[key]
    order = [groups.name, counted, "updates", "tokens", *columns]
    if groups.name in order[1:]:
        raise ValueError(f"by: the table has another column {groups.name!r}: give the groups another name")
    id_U = units[key].to_numpy()
    found_U = np.searchsorted(groups.id_I, id_U).clip(max=max(len(groups.id_I) - 1, 0))
    missing = id_U[groups.id_I[found_U] != id_U] if len(groups.id_I) else id_U
    if len(missing):
        raise ValueError(
            f"by: {len(missing)} of the {len(id_U)} {counted} with values have no group in {groups.name!r}, {key} "
            f"{_first(missing)} first: give them one, or None where it is not known"
        )
    code_I, named = _codes(groups.group_I)
    code_U = pa.array(code_I[found_U])
    sums = [(column, "sum") for column in ("updates", "tokens", *columns)]
    summed = (
        units.append_column("code", code_U).group_by("code", use_threads=False).aggregate([([], "count_all"), *sums])
    )
    result = {groups.name: named.take(summed["code"]), counted: summed["count_all"]}
    result |= {column: summed[f"{column}_sum"] for column, _ in sums}
    return pa.table({column: result[column] for column in order}).sort_by([(groups.name, "ascending")])


def _as_array(name: str, groups: Any) -> pa.Array:
    """A missing value of pandas or numpy is a null."""
    try:
        found = groups if isinstance(groups, (pa.Array, pa.ChunkedArray)) else pa.array(groups, from_pandas=True)
    except pa.ArrowException as error:
        raise ValueError(f"by: groups {name!r} are not of one type ({error}): give all as strings, say") from error
    if isinstance(found, pa.ChunkedArray):
        found = found.combine_chunks()
    if isinstance(found, pa.DictionaryArray):  # a categorical of pandas
        found = found.dictionary_decode()
    if pa.types.is_nested(found.type):
        raise ValueError(f"by: each id needs one group, and those in {name!r} are of type {found.type}")
    return found


def _codes(group_I: pa.Array) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """Each group's place in the array of distinct ones, whose last is null."""
    distinct = pc.unique(group_I.drop_null())
    code_I = pc.index_in(group_I, value_set=distinct).fill_null(len(distinct))
    return code_I.to_numpy().astype(np.int64), pa.concat_arrays([distinct, pa.nulls(1, distinct.type)])


def _first(ids: npt.NDArray[np.int64]) -> str:
    return ", ".join(map(str, ids[:SHOWN]))
