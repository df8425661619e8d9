"""What a user knows of samples or documents, read from disk and joined to those that have values.

Files stay memory-mapped, and of a corpus only ids and the names of groups are read as a whole; texts one by one, where
a page shows them.
"""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset

from hf_datashapley.ledger.groups import COUNTED
from hf_datashapley.report.aggregate import Ints


GROUP = "domain"  # the column of `write_report`, and what is taken if no column is asked for


def read_dataset(path: str, option: str) -> Dataset:
    """A folder that `Dataset.save_to_disk` wrote, a Parquet file, or a JSONL file.

    Raises:
        ValueError: it is none of these.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"{option} {path}: there is no such file or folder")
    kind = place.suffix.lower()
    try:
        if place.is_dir():
            found = datasets.load_from_disk(path)
        elif kind == ".parquet":
            found = Dataset.from_parquet(path)
        elif kind in (".jsonl", ".ndjson", ".json"):
            found = Dataset.from_json(path)
        else:
            raise ValueError(
                f"{option} {path}: give a folder that Dataset.save_to_disk wrote, or a file that ends in .parquet or "
                ".jsonl"
            )
    except (datasets.exceptions.DatasetsError, pa.ArrowException, FileNotFoundError) as error:
        raise ValueError(
            f"{option} {path} cannot be read ({str(error).splitlines()[0]}): give a folder that Dataset.save_to_disk "
            "wrote, or a whole Parquet or JSONL file"
        ) from error
    if not isinstance(found, Dataset):
        raise ValueError(f"{option} {path} holds several datasets: name the folder of one, {path}/{next(iter(found))}")
    return found.with_format(None)


def with_ids(dataset: Dataset, column: str, asked_for: bool, name: str, option: str) -> Dataset:
    """With column `name`: the integers of `column`, or the rows' numbers where there is none and none is asked for.

    Raises:
        ValueError: the column is missing, or not an integer in each row.
    """
    if column not in dataset.column_names:
        if asked_for:
            raise ValueError(
                f"{option} has no column {column!r} (it has {', '.join(dataset.column_names)}): name the one with the "
                f"ids by --{name}_column, or leave it out to number the rows"
            )
        others = dataset.remove_columns(name) if name in dataset.column_names else dataset
        return others.add_column(name, np.arange(len(dataset)))
    ids = dataset.data[column]
    if not pa.types.is_integer(ids.type) or ids.null_count:
        raise ValueError(
            f"{option}: its column {column!r} is not an integer in each row ({ids.type}, {ids.null_count} null): "
            f"name the one with the ids by --{name}_column"
        )
    if column == name:
        return dataset
    others = dataset.remove_columns(name) if name in dataset.column_names else dataset
    return others.rename_column(column, name)


def described(dataset: Dataset, key: str, group_column: str | None, valued: Ints, option: str) -> Dataset:
    """`units` as `write_report` takes it, with the groups of a column.

    Raises:
        ValueError: there is no such column, or a unit with a value has no row, or two.
    """
    group = group_column or GROUP
    if group_column is not None and group_column not in dataset.column_names:
        raise ValueError(
            f"--group_column {group_column}: {option} has no such column but {', '.join(dataset.column_names)}"
        )
    ids, counts = np.unique(dataset.data[key].to_numpy(), return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{option} has {int((counts > 1).sum())} ids in more than one row, {key} {ids[counts > 1][0]} first: give "
            f"one row for each of the {COUNTED[key]}"
        )
    missing = np.setdiff1d(valued, ids)
    if len(missing):
        raise ValueError(
            f"{option} lacks {len(missing)} of the {len(valued)} {COUNTED[key]} with values, {key} {missing[0]} "
            f"first: give the {COUNTED[key]} that the run was trained on, with their ids"
        )
    kept = [name for name in ("title", "text") if name in dataset.column_names and name != group]
    units = dataset.select_columns([key, *kept, *([group] if group in dataset.column_names else [])])
    return units.rename_column(group, GROUP) if group in units.column_names and group != GROUP else units
