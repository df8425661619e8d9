"""The group of each row, as numbers: in the order of the groups' names, null last.

Shapes: R rows, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..grouping import SHOWN, Grouping
from ..ledger.groups import COUNTED, By, read_groups
from ..query.joining import Ints


@dataclass(frozen=True)
class RowGroups:
    """
    Attributes:
        name: of the column that says which group.
        code_R: each row's group, from 0.
        label_G: what the groups are called; one may be null, the last.
    """

    name: str
    code_R: Ints
    label_G: pa.Array

    @classmethod
    def of_ids(cls, id_R: Ints, key: str) -> RowGroups:
        """Rows that share an id are one."""
        label_G, code_R = np.unique(id_R, return_inverse=True)
        return cls(key, code_R, pa.array(label_G))

    @classmethod
    def of_labels(cls, name: str, label_R: pa.Array | pa.ChunkedArray) -> RowGroups:
        """Raises: ValueError, they cannot be compared."""
        if pa.types.is_nested(label_R.type):
            raise ValueError(f"each row needs one group, and those in {name!r} are of type {label_R.type}")
        label_G = pc.unique(label_R)
        label_G = label_G.take(pc.sort_indices(label_G))
        return cls(name, pc.index_in(label_R, value_set=label_G).to_numpy().astype(np.int64), label_G)

    @classmethod
    def of_column(cls, dataset: Dataset, column: str, setting: str) -> RowGroups:
        """Raises: ValueError, there is no such column."""
        if column not in dataset.column_names:
            raise ValueError(
                f"{setting}={column!r} is not a column of the dataset (it has {', '.join(dataset.column_names)}): "
                "name one of them"
            )
        return cls.of_labels(column, dataset.select_columns([column]).with_format("arrow")[:][column])

    @classmethod
    def of(cls, by: By, dataset: Dataset, id_R: Ints, key: str, id_column: str | None) -> RowGroups:
        """Of a column, which rows have whatever their ids; or of groups by id, see `load_values`.

        Raises:
            ValueError: a row has no group.
        """
        if isinstance(by, str):
            return cls.of_column(dataset, by, "by")
        groups = read_groups(by, dataset if isinstance(by, Grouping) else None, key, id_column or key)
        place_R = np.searchsorted(groups.id_I, id_R).clip(max=max(len(groups.id_I) - 1, 0))
        lacking = id_R[groups.id_I[place_R] != id_R] if len(groups.id_I) else id_R
        if len(lacking):
            raise ValueError(
                f"by: {len(lacking):,} of the dataset's {len(id_R):,} {COUNTED[key]} have no group, {key} "
                f"{', '.join(map(str, lacking[:SHOWN]))} first: give them one, or None where it is not known"
            )
        return cls.of_labels(groups.name, groups.group_I.take(pa.array(place_R)))
