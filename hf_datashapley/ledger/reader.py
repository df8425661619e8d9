"""Read a ledger back as `datasets.Dataset`, from its directory alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.table import InMemoryTable
from transformers.utils import logging

from .layout import audit_schema, complete_parts, damaged, read_manifest, updates_schema, value_columns, values_schema


logger = logging.get_logger(__name__)


def load_values(value_dir: str | Path) -> Dataset:
    """One row for each sample, by id; of the updates that every rank has written.

    Columns: `sample_id` int64; `updates` int32, how often the sample was trained on; `tokens` int64, its loss tokens
    over all visits; `value` float64 (or `value_<target>` for each named target), the nats of validation loss that it
    took away, summed over updates. Positive helped.

    Raises:
        FileNotFoundError: the directory holds no ledger.
    """
    return _summed(Path(value_dir), ["sample_id"])


def load_value_history(value_dir: str | Path) -> Dataset:
    """One row for each update and sample in it: the columns of `load_values` and `step` int32, from 1.

    A sample that an update visited twice has one row with `updates` 2.
    """
    return _summed(Path(value_dir), ["step", "sample_id"])


def load_updates(value_dir: str | Path) -> Dataset:
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
    return _as_dataset(_table(directory, "updates", updates_schema(targets)).sort_by("step"))


def load_audit(value_dir: str | Path) -> Dataset:
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
    return _as_dataset(_table(directory, "audit", audit_schema()).sort_by("step"))


def _summed(directory: Path, keys: list[str]) -> Dataset:
    columns = value_columns(read_manifest(directory)["targets"] or [""])
    table = _table(directory, "values", values_schema(read_manifest(directory)["targets"] or [""]))
    # One thread: the order of summation, and so the last bit, stays the same from reading to reading.
    grouped = table.group_by(keys, use_threads=False).aggregate(
        [([], "count_all"), ("tokens", "sum"), *[(column, "sum") for column in columns]]
    )
    grouped = grouped.sort_by([(key, "ascending") for key in keys])
    result = {key: grouped[key] for key in keys}
    result["updates"] = grouped["count_all"].cast(pa.int32())
    result["tokens"] = grouped["tokens_sum"].cast(pa.int64())
    result |= {column: grouped[f"{column}_sum"].cast(pa.float64()) for column in columns}
    order = ["sample_id", "updates", "tokens", *columns, *[key for key in keys if key != "sample_id"]]
    return _as_dataset(pa.table({name: result[name] for name in order}))


def _table(directory: Path, kind: str, schema: pa.Schema) -> pa.Table:
    tables = [schema.empty_table()]
    complete = complete_parts(directory)
    if complete.ahead > complete.last:
        logger.warning(
            f"{directory} holds updates up to {complete.ahead} of some ranks, and of all ranks those up to "
            f"{complete.last}, which is what is read. While the run goes on, the others will follow; if it was "
            "killed, resume it; if the ranks wrote to folders of their own, copy their parts into one"
        )
    for part in complete.of_kind(kind):
        try:
            table = pq.read_table(part.path, schema=schema)
        except (pa.ArrowException, OSError) as error:
            raise damaged(part, error) from error
        tables.append(table if part.last <= complete.last else table.filter(pc.field("step") <= complete.last))
    return pa.concat_tables(tables)


def _as_dataset(table: pa.Table) -> Dataset:
    return Dataset(InMemoryTable(table.combine_chunks()))
