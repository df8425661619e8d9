"""What tells one dataset from another: a hash of all its rows, in their order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from torch import Tensor
from tqdm.auto import tqdm

from ..random_state import random_state_kept


# Rows that are hashed together.
ROWS = 1000


def dataset_fingerprint(dataset: Any, label: str = "fingerprint", progress: bool = False) -> str:
    """Of every row of a map-style dataset. Costs reading it once: of a `datasets.Dataset` at some hundred MB a second;
    the rows of others are made one by one."""
    found = hashlib.sha256(str(len(dataset)).encode())
    blocks = tqdm(
        arrow_blocks(dataset) if isinstance(dataset, datasets.Dataset) else row_blocks(dataset),
        label,
        -(-len(dataset) // ROWS),
        disable=not progress,
        leave=False,
    )
    for block in blocks:
        found.update(block)
    return found.hexdigest()


def arrow_blocks(dataset: datasets.Dataset) -> Iterator[bytes]:
    """Rows as Arrow writes them, without what a schema says of how they came about."""
    table = dataset.with_format("arrow")
    for start in range(0, len(dataset), ROWS):
        found = table[start : start + ROWS].replace_schema_metadata(None)
        # Copied: a slice keeps some of what lies beside it, and would be written with that.
        rows = found.take(np.arange(len(found))).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        yield sink.getvalue().to_pybytes()


def row_blocks(dataset: Any) -> Iterator[bytes]:
    for start in range(0, len(dataset), ROWS):
        with random_state_kept():
            rows = [dataset[index] for index in range(start, min(start + ROWS, len(dataset)))]
        yield sha256_of(rows).encode()


def sha256_of(value: Any) -> str:
    """Of what rows and batches hold; the same in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=as_json).encode()).hexdigest()


def as_json(value: Any) -> Any:
    """What JSON has no form for."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else Hasher.hash(value)
