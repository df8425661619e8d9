"""A run's tables as sharded Parquet, a folder for each, as `datasets.load_dataset` and the Hub's viewer read them.

    values/     one row for each unit          (`load_values`)
    history/    for each update and unit in it (`load_value_history`)
    audit/      for each audited update and target (`load_audit`), where there are any
    groups/     for each group of units, where groups were given

The history is the large one: it is read and written a window of updates at a time. Windows are powers of two, so that
shards which were written before stay as they are when the run has gone on, and are not sent again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..ledger import load_audit, load_updates, load_value_history, load_values
from ..ledger.groups import By
from ..ledger.layout import complete_parts, read_manifest, value_columns


ROWS_PER_SHARD = 2_000_000


@dataclass(frozen=True)
class GroupsOf:
    """What values are summed over, as `load_values` takes it."""

    by: By
    dataset: Dataset | None = None
    key: str | None = None
    id_column: str | None = None


@dataclass(frozen=True)
class Tables:
    """What was read, and lies in the folder."""

    manifest: dict[str, Any]
    values: Dataset
    updates: Dataset
    audit: Dataset
    groups: Dataset | None
    step_totals: npt.NDArray[np.float64]  # [targets, updates]: summed over the units of each update

    @property
    def targets(self) -> list[str]:
        """Names; [""] for one without."""
        return self.manifest["targets"] or [""]

    @property
    def value_columns(self) -> list[str]:
        return value_columns(self.targets)

    @property
    def configs(self) -> list[str]:
        """Those that have rows."""
        held = {"audit": len(self.audit) > 0, "groups": self.groups is not None}
        return ["values", "history", *(name for name in held if held[name])]


def write_tables(directory: Path, folder: Path, groups: GroupsOf | None, to_step: int | None) -> Tables:
    """Of the updates up to `to_step`; None: of all, which all ranks must have written.

    Raises:
        FileNotFoundError: the directory holds no ledger.
        ValueError: there are no values yet, or not those of all ranks; or the groups do not fit.
    """
    manifest = read_manifest(directory)
    complete = complete_parts(directory)
    if to_step is None and complete.ahead > complete.last:
        raise ValueError(
            f"{directory} is not finished: it holds updates up to {complete.ahead} of some ranks, and of all ranks "
            f"those up to {complete.last}: wait until the run is over, resume it if it was killed, or copy the parts "
            "of all machines into one folder"
        )
    last = complete.last if to_step is None else to_step
    if not last:
        raise ValueError(f"{directory} holds no update yet: push when values have been written")
    values = load_values(directory, 1, last)
    if not len(values):
        raise ValueError(f"{directory} holds no values: no unit of its {last} updates had a loss token")
    write_slices(folder / "values", values)
    totals = write_history(directory, folder / "history", last, manifest["targets"] or [""])
    audit = load_audit(directory, 1, last)
    if len(audit):
        write_slices(folder / "audit", audit)
    found = None
    if groups is not None:
        found = load_values(directory, 1, last, None, groups.by, groups.dataset, groups.key, groups.id_column)
        write_slices(folder / "groups", found)
    return Tables(manifest, values, load_updates(directory, 1, last), audit, found, totals)


def write_slices(folder: Path, table: Dataset) -> None:
    starts = range(0, len(table), ROWS_PER_SHARD)
    slices = (table.select(range(start, min(start + ROWS_PER_SHARD, len(table)))) for start in starts)
    write_shards(folder, slices, len(starts))


def write_history(directory: Path, folder: Path, last: int, targets: list[str]) -> npt.NDArray[np.float64]:
    """Writes the shards, and gives the sums over the units of each update: float64 [targets, updates]."""
    totals = np.zeros((len(targets), last))
    width = updates_per_shard(directory, last)
    starts = range(1, last + 1, width)

    def windows() -> Iterator[Dataset]:
        for start in starts:
            window = load_value_history(directory, start, min(start + width - 1, last))
            rows = arrow(window)
            step = rows["step"].to_numpy() - 1
            for k, column in enumerate(value_columns(targets)):
                totals[k] += np.bincount(step, weights=rows[column].to_numpy(), minlength=last)
            yield window

    write_shards(folder, windows(), len(starts))
    return totals


def updates_per_shard(directory: Path, last: int) -> int:
    """The largest power of two whose updates have no more rows than a shard should, by the mean of all."""
    parts = complete_parts(directory).values
    rows = sum(pq.read_metadata(part.path).num_rows for part in parts if part.first <= last)
    held = max(part.last for part in parts if part.first <= last)
    fitting = max(1, ROWS_PER_SHARD * held // max(rows, 1))
    return 1 << (fitting.bit_length() - 1)


def write_shards(folder: Path, shards: Iterator[Dataset], count: int) -> None:
    folder.mkdir(parents=True)
    for number, shard in enumerate(shards):
        # The types that `datasets` made of the ledger's, so that it makes the same of them again.
        table = arrow(shard).replace_schema_metadata(shard.features.arrow_schema.metadata)
        path = folder / f"train-{number:05d}-of-{count:05d}.parquet"
        pq.write_table(table, path, compression="zstd", row_group_size=131_072, write_page_index=True)


def arrow(table: Dataset) -> pa.Table:
    return table.with_format("arrow")[:]
