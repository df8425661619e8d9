"""A ledger's rows in order, a stretch of whole updates at a time: a run's history need not fit into memory.

Whatever is computed within updates can be computed stretch by stretch, and sums over updates can be added up. Each
part is read once; in memory are the rows of a stretch (`ROWS_AT_ONCE`, 28 bytes each with one target) and of the parts
that other ranks were writing at its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from .layout import Complete, Part, complete_parts, read_manifest, read_part, unit_keys, value_columns, values_schema


logger = logging.get_logger(__name__)

ROWS_AT_ONCE = 4_000_000


class Rows(Protocol):
    """Values by update and unit, wherever they lie.

    Attributes:
        targets: names of the validation targets, [""] for one without a name.
        keys: the columns that tell one unit's rows from another's.
    """

    @property
    def targets(self) -> list[str]: ...

    @property
    def keys(self) -> list[str]: ...

    def window(self, from_step: int | None, to_step: int | None) -> tuple[int, int]:
        """The first and the last update to read. Raises `ValueError` where these are not all there."""
        ...

    def stretches(self, first: int, last: int) -> Iterator[pa.Table]:
        """Tables of whole updates, in their order: `step`, the keys, `updates` (how often in this update the unit was
        trained on, in this row), `tokens`, and the values."""
        ...


@dataclass(frozen=True)
class LedgerRows:
    """The rows of a run's ledger, as far as all ranks had written them when it was opened."""

    directory: Path
    targets: list[str]
    unit: str
    complete: Complete

    @classmethod
    def open(cls, directory: Path) -> LedgerRows:
        """Raises: FileNotFoundError, there is no ledger."""
        manifest = read_manifest(directory)
        return cls(directory, manifest["targets"] or [""], manifest["unit"], held_parts(directory))

    @property
    def keys(self) -> list[str]:
        return unit_keys(self.unit)

    @property
    def columns(self) -> list[str]:
        return value_columns(self.targets)

    def window(self, from_step: int | None = None, to_step: int | None = None) -> tuple[int, int]:
        return window_of(str(self.directory), self.complete.last, from_step, to_step)

    def stretches(self, first: int, last: int) -> Iterator[pa.Table]:
        schema = values_schema(self.targets, self.unit)
        for rows in whole_updates(self.complete.of_kind("values"), schema, first, last):
            yield rows.append_column("updates", pa.repeat(pa.scalar(1, pa.int32()), rows.num_rows))


def held_parts(directory: Path) -> Complete:
    """What all ranks have written; with a warning where some have written more."""
    complete = complete_parts(directory)
    if complete.ahead > complete.last:
        logger.warning(
            f"{directory} holds updates up to {complete.ahead} of some ranks, and of all ranks those up to "
            f"{complete.last}, which is what is read. While the run goes on, the others will follow; if it was "
            "killed, resume it; if the ranks wrote to folders of their own, copy their parts into one"
        )
    return complete


def window_of(name: str, held: int, from_step: int | None, to_step: int | None) -> tuple[int, int]:
    """The updates to read, of `held` that there are: all of them, or those asked for."""
    if from_step is None and to_step is None:
        return 1, held
    first, last = 1 if from_step is None else from_step, held if to_step is None else to_step
    holds = f"{name} holds the updates 1 to {held}" if held else f"{name} holds no update yet"
    if not 1 <= first <= last <= held:
        raise ValueError(
            f"from_step={from_step}, to_step={to_step}: {holds}; name the first and the last of those to be read"
        )
    return first, last


def rows_within(part: Part, schema: pa.Schema, first: int, last: int) -> pa.Table:
    """A part's rows of the updates `first` to `last`."""
    table = read_part(part, schema)
    within = first <= part.first and part.last <= last
    return table if within else table.filter((pc.field("step") >= first) & (pc.field("step") <= last))


def whole_updates(parts: list[Part], schema: pa.Schema, first: int, last: int) -> Iterator[pa.Table]:
    """Rows by update, then by rank, however the ranks have cut their parts: so sums are the same to the last bit.

    Parts come by the update they begin with, so when one is reached all rows of earlier updates have been read.
    """
    held: list[pa.Table] = []
    for part in parts:
        if part.last < first or part.first > last:
            continue
        if sum(table.num_rows for table in held) >= ROWS_AT_ONCE:
            earlier = pc.field("step") < part.first
            yield by_update([table.filter(earlier) for table in held])
            held = [rest for table in held if (rest := table.filter(~earlier)).num_rows]
        held.append(rows_within(part, schema, first, last))
    if held:
        yield by_update(held)


def by_update(tables: list[pa.Table]) -> pa.Table:
    rows = pa.concat_tables(tables)
    in_order = (np.diff(rows["step"].to_numpy()) >= 0).all()
    return rows if in_order else rows.sort_by("step")  # which is stable
