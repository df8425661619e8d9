"""What a dataset says of its rows: a column's values as labels, or its texts as vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ...random_state import random_state_kept


# Texts -> their vectors [texts, width], as SentenceTransformer's `encode` does it.
Encode = Callable[[list[str]], Any]
# That an encoder is given at a time.
TEXTS = 1024


def column_of(dataset: Any, column: str) -> pa.ChunkedArray:
    """
    Raises:
        ValueError: there is no such column.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"a {type(dataset).__name__} has no columns: give a datasets.Dataset")
    if column not in dataset.column_names:
        raise ValueError(f"the dataset has no column {column!r}: choose one of {', '.join(dataset.column_names)}")
    return dataset.with_format("arrow").select_columns([column])[:][column]


def column_labels(dataset: Any, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels [rows] by the order of the sorted values, and these.

    Raises:
        ValueError: there is no such column, it has gaps, or lists.
    """
    found = column_of(dataset, column)
    if pa.types.is_nested(found.type):
        raise ValueError(f"column {column!r} holds {found.type}: choose one with a single value for each sample")
    missing = found.is_null(nan_is_null=True) if pa.types.is_floating(found.type) else found.is_null()
    count = pc.sum(missing).as_py() or 0
    if count:
        raise ValueError(f"column {column!r} is null for {count} samples: fill it in, or drop them")
    distinct = pc.unique(found)
    distinct = distinct.take(pc.sort_indices(distinct))
    labels = pc.index_in(found, value_set=distinct).to_numpy().astype(np.int64)
    return labels, tuple(str(value) for value in distinct.to_pylist())


def encoded_texts(encode: Encode, dataset: Any, column: str, progress: bool) -> Iterator[Any]:
    """Vectors of the texts, block by block.

    Raises:
        ValueError: there is no such column, it has gaps or no texts, or `encode` does not give a vector for each.
    """
    texts = column_of(dataset, column)
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise ValueError(f"column {column!r} holds {texts.type}, not text: set text_column")
    if texts.null_count:
        raise ValueError(f"column {column!r} is null for {texts.null_count} samples: fill it in, or drop them")
    for start in tqdm(range(0, len(texts), TEXTS), "texts", disable=not progress, leave=False):
        own = texts.slice(start, TEXTS).to_pylist()
        with random_state_kept():
            found = encode(own)
        if len(found) != len(own):
            raise ValueError(f"encode made {len(found)} vectors of {len(own)} texts: it has to make one of each")
        yield found
