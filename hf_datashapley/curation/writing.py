"""A selection on the disk: whole or not there, and never over something else."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.table import embed_table_storage


# Which `datasets` would take for the names of folders.
OTHER_FILES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".arrow", ".feather")
ROWS_AT_ONCE = 50_000


def check_output(path: Path) -> None:
    """Raises: ValueError, something is there already, or it would be another kind of file."""
    if path.suffix.lower() in OTHER_FILES:
        raise ValueError(f"{path}: give a name that ends in .parquet, or that of a folder for Dataset.save_to_disk")
    if path.exists():
        raise ValueError(f"{path} is there already, and nothing is overwritten: give another name, or take it away")


def write_rows(rows: Dataset, kept_R: npt.NDArray[np.bool_], path: Path) -> None:
    """The rows that are kept: a Parquet file where the name ends in .parquet, else a folder of `save_to_disk`.

    Raises:
        ValueError: see `check_output`.
        OSError: it could not be written; nothing is left of it.
    """
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        if path.suffix.lower() == ".parquet":
            write_parquet(rows, kept_R, temporary)
        else:
            rows.select(np.flatnonzero(kept_R)).save_to_disk(temporary)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def write_parquet(rows: Dataset, kept_R: npt.NDArray[np.bool_], path: Path) -> None:
    """By filtering whole blocks: `Dataset.to_parquet` picks rows one by one, a million and more of them at a time."""
    blocks = rows.with_format("arrow")
    with pq.ParquetWriter(path, rows.features.arrow_schema, compression="zstd") as writer:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            block = blocks[start : start + ROWS_AT_ONCE].filter(pa.array(kept_R[start : start + ROWS_AT_ONCE]))
            if block.num_rows:
                writer.write_table(embed_table_storage(block.cast(rows.features.arrow_schema)))
