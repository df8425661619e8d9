"""Read a ledger back as `datasets.Dataset`, from its directory alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from .groups import COUNTED, By, Groups, read_groups, sum_groups
from .layout import audit_schema, read_manifest, updates_schema
from .stretches import LedgerRows, held_parts, rows_within, window_of
from .sums import check_normalize, history, sum_values


def load_values(
    value_dir: str | Path,
    from_step: int | None = None,
    to_step: int | None = None,
    normalize: str | None = None,
    by: By | None = None,
    dataset: Dataset | None = None,
    key: str | None = None,
    id_column: str | None = None,
) -> Dataset:
    """One row for each unit that was valued, or each group of them; of the updates that all ranks have written.

    Columns: the unit's keys, `sample_id` int64, `document_id` int64 (units "document" and "token"; a document that
    goes on in another sample has a row for each), `position` int32 (unit "token": of the label in its row, or -1 for
    the sum over a document's tokens in samples that have no row for each); `updates` int32, how often it was trained
    on; `tokens` int64, its loss tokens over all visits; `value` float64 (or `value_<target>` for each named target),
    the nats of validation loss that it took away, summed over updates. Positive helped.

    Of groups: the group, null last; `samples` or `documents` int64, how many it has; `updates` int64, how often these
    were trained on, all told; `tokens` and values. Groups without values have no row.

    Args:
        value_dir: the run's ledger.
        from_step, to_step: the first and the last update to be summed, from 1. None: from the first, to the last.
        normalize: "update" divides the values of each update by their summed magnitude, sum over units of |value|,
            for each target by itself, so that all updates weigh the same; those whose values are all 0 stay so. What
            counts is the magnitude of samples, or of documents with units "document" and "token" (whatever tokens have
            rows), whether or not they are in the table.
        by: what to sum over: "sample_id" or "document_id", where the ledger has it, gives one row for each; or the
            name of a column of `dataset`; or a `Partition`; or the groups themselves, as a mapping {id: group}, a
            pandas Series with ids as its index, or an array or list of groups by id. A group may be None, where it is
            not known.
        dataset: the `datasets.Dataset` of samples or documents whose column `by` names; or that a `Partition` is of,
            its rows, or the documents that lie in packed ones. A partition of samples that are known by their numbers
            needs none.
        key: "sample_id" or "document_id", what `by` puts into groups. None: documents, where the ledger has them.
        id_column: the column of `dataset` with the ids of its rows. None: the one called as `key` is; without it, rows
            are known by their numbers.

    Raises:
        FileNotFoundError: the directory holds no ledger.
        ValueError: the ledger lacks updates of the window; or `by` does not give each unit with values one group.
    """
    rows = LedgerRows.open(Path(value_dir))
    check_normalize(normalize)
    level, groups = read_level(by, dataset, key, id_column, rows.keys)
    units = sum_values(rows, level, *rows.window(from_step, to_step), normalize)
    return as_dataset(units if groups is None else sum_groups(units, groups, level[0], rows.columns))


def load_value_history(value_dir: str | Path, from_step: int | None = None, to_step: int | None = None) -> Dataset:
    """One row for each update and unit in it: the columns of `load_values` and `step` int32, from 1.

    A sample that an update visited twice has one row with `updates` 2.
    """
    rows = LedgerRows.open(Path(value_dir))
    names = [*rows.keys, "updates", "tokens", *rows.columns, "step"]
    return as_dataset(pa.concat_tables(history(rows, *rows.window(from_step, to_step))).select(names))


def load_updates(value_dir: str | Path, from_step: int | None = None, to_step: int | None = None) -> Dataset:
    """One row for each update, by `step`.

    Columns: `step` int32; `skipped` bool (the values are 0, because no step was made, or because one was and the loss
    or a value was not finite, of which a warning was given; a validation gradient that leaves fp16's range is not such
    a case, it is computed again with a smaller scale); `clip` float64, by which clipping scaled the gradient;
    `learning_rate` float64 of the first parameter group;
    `validation_loss` float64 (or `validation_loss_<target>`), the mean token loss on the rows that it was scored
    against, before the update; with order "path", the mean along the update's path.
    """
    directory = Path(value_dir)
    targets = read_manifest(directory)["targets"] or [""]
    return as_dataset(_table(directory, "updates", updates_schema(targets), from_step, to_step).sort_by("step"))


def load_audit(value_dir: str | Path, from_step: int | None = None, to_step: int | None = None) -> Dataset:
    """One row for each audited update and target, by `step`; what values say an update did, against what it did.

    Columns: `step` int32; `target` string ("validation" where it has no name); in nats of the target's loss on the
    rows that the update was scored against, positive where it fell: `samples`, the sum of the samples' values (of
    "immediate" momentum); `carried`, what momentum and weight decay did alone; `predicted`, their sum; `actual`.
    With `value_modules`, what the other modules did is in `actual` only. Updates that were skipped have no rows.

    Raises:
        FileNotFoundError: the directory holds no ledger.
    """
    directory = Path(value_dir)
    read_manifest(directory)
    return as_dataset(_table(directory, "audit", audit_schema(), from_step, to_step).sort_by("step"))


def read_level(
    by: By | None, dataset: Dataset | None, key: str | None, id_column: str | None, keys: list[str]
) -> tuple[list[str], Groups | None]:
    """The keys of the rows that are summed first, and the groups of these."""
    ids = [name for name in keys if name in COUNTED]
    if id_column is not None and (dataset is None or id_column not in dataset.column_names):
        raise ValueError(f"id_column={id_column!r} is no column of `dataset`: name the one with the ids of its rows")
    if by is None:
        if dataset is not None or key is not None:
            raise ValueError("dataset and key are for groups: give `by` too, as a column's name or as the groups")
        return keys, None
    if isinstance(by, str) and dataset is None:
        if by not in ids:
            raise ValueError(
                f"by={by!r}: this ledger's rows are known by {', '.join(ids)}: name one of these, give the dataset "
                f"that has a column {by!r} as `dataset`, or give a mapping from ids to groups"
            )
        if key is not None:
            raise ValueError(f"by={by!r} gives a row for each, key={key!r} is for groups: leave it out")
        return [by], None
    if key is not None and key not in ids:
        raise ValueError(f"key={key!r}: this ledger's rows are known by {', '.join(ids)}: choose one of these")
    key = key or ids[-1]
    return [key], read_groups(by, dataset, key, id_column or key)


def _table(
    directory: Path, kind: str, schema: pa.Schema, from_step: int | None = None, to_step: int | None = None
) -> pa.Table:
    """The rows of a window of updates; parts that lie outside it are not opened."""
    complete = held_parts(directory)
    first, last = window_of(str(directory), complete.last, from_step, to_step)
    parts = [part for part in complete.of_kind(kind) if part.last >= first and part.first <= last]
    return pa.concat_tables([schema.empty_table(), *(rows_within(part, schema, first, last) for part in parts)])


def as_dataset(table: pa.Table) -> Dataset:
    return Dataset(InMemoryTable(table.combine_chunks()))
