"""Append updates to a ledger without making training wait.

Updates are kept on the device until someone looks (a log row, a full part, a checkpoint); then they are copied to the
host together, and a thread writes them. A part is complete or not there: it is written under a temporary name,
flushed to the disk and renamed. Each rank writes its own samples' values, and the first one what the update was like.
What cannot be written (a full disk) ends the run at the next update; what was complete stays so.
"""

from __future__ import annotations

import json
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers.utils import logging

from .. import whole_files
from ..ranks import Ranks
from ..values.features import Features
from ..values.update import UpdateValues
from .layout import (
    AUDITED,
    FORMAT,
    KINDS,
    MANIFEST,
    Part,
    audit_schema,
    complete_parts,
    features_schema,
    loss_columns,
    parts,
    read_manifest,
    unit_keys,
    updates_schema,
    value_columns,
    values_schema,
)


logger = logging.get_logger(__name__)

ROWS_PER_PART = 1_000_000
# Features of a part; as much again is on the host while it is written.
BYTES_PER_PART = 128 * 2**20
# Settings that may be others when a run goes on.
VERSIONS = ("hf_datashapley", "transformers", "torch")
SINGLE = Ranks()
# Updates that may wait on the device: a few small tensors each.
PENDING_UPDATES = 256
# Features that may.
PENDING_BYTES = 32 * 2**20


class Ledger:
    """The ledger of a run that is being trained.

    Args:
        directory: where it lies; made when it is missing.
        targets: names of the validation targets, [""] for one without a name.
        settings: what the manifest says of the run, as JSON; with its "unit", and "features" where the updates have
            them.
        after: the update that the run goes on after; 0: it begins.
        ranks: the processes that write it; all of them make it, together.

    Raises:
        ValueError: the directory holds a ledger already; or, where the run goes on, that of another run, or not all
            updates up to then.
    """

    def __init__(
        self,
        directory: str | Path,
        targets: list[str],
        settings: dict[str, Any],
        after: int = 0,
        ranks: Ranks = SINGLE,
    ):
        self.directory = Path(directory)
        self.targets = targets
        self.unit = settings["unit"]
        stored = settings.get("features")
        self._features_schema = None if stored is None else features_schema(stored["width"], stored["dtype"])
        self.ranks = ranks
        self.after = after
        described = {"targets": [target for target in targets if target], **settings}
        if after:
            check_continues(self.directory, described, after)
        else:
            refuse_existing(self.directory)
            ranks.wait()  # until all have looked
            if ranks.is_local_main:  # whether or not machines share the folder
                self.directory.mkdir(parents=True, exist_ok=True)
                created = datetime.now(timezone.utc).isoformat(timespec="seconds")
                manifest = {"format": FORMAT, "created": created, "run": uuid.uuid4().hex, **described}
                write_whole(self.directory / MANIFEST, json.dumps(manifest, indent=2).encode())
        ranks.wait()
        self._pending: list[UpdateValues] = []
        self._rows: list[pa.Table] = []
        self._updates: list[pa.Table] = []
        self._audits: list[pa.Table] = []
        self._features: list[pa.Table] = []
        self._num_rows = self._num_bytes = self._pending_bytes = 0
        self._warned = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        self._writing: Future[None] | None = None
        self._failed = False

    @property
    def run(self) -> str:
        """By which a checkpoint knows its run."""
        return str(read_manifest(self.directory)["run"])

    def append(self, update: UpdateValues) -> None:
        """Takes an update over; returns at once unless a part is full.

        Raises:
            OSError: what came before could not be written.
        """
        if self._writing is not None and self._writing.done():
            self._wait()
        self._pending.append(update)
        self._num_rows += len(update.tokens)
        if update.features is not None:
            self._num_bytes += update.features.num_bytes
            self._pending_bytes += update.features.num_bytes
        if len(self._pending) >= PENDING_UPDATES or self._pending_bytes >= PENDING_BYTES:
            self.collect()
        if self._num_rows >= ROWS_PER_PART or self._num_bytes >= BYTES_PER_PART:
            self.collect()
            self._write()

    def collect(self) -> None:
        """Copies what is pending to the host, and warns of the first update that was not finite."""
        if not self._pending:
            return
        updates, self._pending, self._pending_bytes = self._pending, [], 0
        steps = np.array([update.step for update in updates], np.int32)
        sizes = [len(update.tokens) for update in updates]
        values = torch.cat([update.values for update in updates]).float().cpu().numpy()
        keys = unit_keys(self.unit)
        columns = {
            "step": np.repeat(steps, sizes),
            **{key: torch.cat([update.ids[key] for update in updates]).cpu().numpy() for key in keys},
            "tokens": torch.cat([update.tokens for update in updates]).cpu().numpy().astype(np.int32),
        }
        columns |= {name: values[:, k] for k, name in enumerate(value_columns(self.targets))}
        self._rows.append(pa.table(columns, schema=values_schema(self.targets, self.unit)))
        self._updates.append(self._table_of_updates(updates, steps))
        self._audits.append(self._table_of_audits(updates))
        if self._features_schema is not None:
            found = [update.features for update in updates if update.features is not None]
            assert len(found) == len(updates)
            self._features.append(table_of_features(np.repeat(steps, sizes), found, self._features_schema))

    def _table_of_updates(self, updates: list[UpdateValues], steps: np.ndarray) -> pa.Table:
        finite = torch.stack([update.finite for update in updates]).cpu().numpy()
        if not finite.all() and not self._warned and self.ranks.index == 0:
            self._warned = True
            logger.warning(
                f"Update {steps[~finite][0]}: the loss or a value was not finite. It is recorded as skipped and gives "
                "no values; so is any later one (`load_updates` lists them), without a further warning."
            )
        losses = torch.stack([update.validation_losses for update in updates]).double().cpu().numpy()
        columns: dict[str, Any] = {
            "step": steps,
            "skipped": torch.stack([update.skipped for update in updates]).cpu().numpy(),
            "clip": torch.stack([update.clip for update in updates]).double().cpu().numpy(),
            "learning_rate": np.array([update.learning_rate for update in updates]),
        }
        columns |= {name: losses[:, k] for k, name in enumerate(loss_columns(self.targets))}
        return pa.table(columns, schema=updates_schema(self.targets))

    def _table_of_audits(self, updates: list[UpdateValues]) -> pa.Table:
        rows = []
        for update in updates:
            if update.audit is None or bool(update.skipped):
                continue
            numbers = torch.stack([update.audit.samples, update.audit.carried, update.audit.actual], dim=1)
            for target, (samples, carried, actual) in zip(self.targets, numbers.double().tolist(), strict=True):
                row = {"step": update.step, "target": target or "validation", "samples": samples, "carried": carried}
                rows.append({**row, "predicted": samples + carried, "actual": actual})
        return pa.Table.from_pylist(rows, schema=audit_schema())

    def flush(self) -> None:
        """Everything appended so far is on the disk when this returns."""
        self.collect()
        self._write()
        self._wait()

    def close(self) -> None:
        """Flushes, unless writing has failed already.

        A run that made no update leaves no ledger, which would only be in the way of the next attempt.
        """
        try:
            if not self._failed:
                self.flush()
        finally:
            self._thread.shutdown()
        if self.ranks.is_local_main and not parts(self.directory, "values"):
            (self.directory / MANIFEST).unlink(missing_ok=True)

    def restart(self) -> None:
        """Forgets what was written after the update that the run goes on after: its training loop begins there."""
        self._pending, self._pending_bytes = [], 0
        self._take_tables()
        self._wait()
        self.ranks.wait()
        if self.ranks.is_local_main:
            # The values first: what they do not list is not read.
            for kind in KINDS:
                # The last first: a run that is killed in the midst of this leaves no gap.
                for part in reversed(parts(self.directory, kind)):
                    if part.first > self.after:
                        part.path.unlink(missing_ok=True)  # several machines may see the one folder
            for left in self.directory.glob("*.tmp"):
                left.unlink(missing_ok=True)
        self.ranks.wait()

    def _write(self) -> None:
        if not self._rows:
            return
        self._wait()
        floats = value_columns(self.targets)
        self._writing = self._thread.submit(write_parts, self.directory, self.ranks, self._take_tables(), floats)

    def _take_tables(self) -> dict[str, pa.Table]:
        """What is on the host, by kind; it is the caller's now."""
        found = {"values": self._rows, "updates": self._updates, "audit": self._audits, "features": self._features}
        self._rows, self._updates, self._audits, self._features = [], [], [], []
        self._num_rows = self._num_bytes = 0
        return {kind: pa.concat_tables(tables) for kind, tables in found.items() if tables}

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except OSError:
                self._failed = True
                raise


def refuse_existing(directory: Path) -> None:
    """Raises `ValueError` where a ledger, or a part of one, lies already."""
    if (directory / MANIFEST).exists() or any(parts(directory, kind) for kind in KINDS):
        raise ValueError(
            f"value_dir {directory} holds the ledger of another run, which is never overwritten: set `value_dir` (or "
            "`output_dir`) to a new folder, or move the old one away"
        )


def check_continues(directory: Path, described: dict[str, Any], after: int) -> None:
    """Raises `ValueError` unless the ledger is that of the run so described, cut at update `after`."""
    try:
        manifest = read_manifest(directory)
    except FileNotFoundError as error:
        raise ValueError(
            f"resume_from_checkpoint goes on after update {after}, but {directory} holds no ledger of the updates "
            "before: set `value_dir` to the folder of the run that wrote the checkpoint"
        ) from error
    settings, before = described["settings"], manifest["settings"]
    different = [name for name in settings if name not in VERSIONS and settings[name] != before.get(name)]
    different += [name for name in ("targets", "unit") if described[name] != manifest[name]]
    if different:
        raise ValueError(
            f"resume_from_checkpoint: {', '.join(different)} differ from those that {directory / MANIFEST} was begun "
            "with: resume with the same settings, or start a new run with a new `output_dir`"
        )
    complete = complete_parts(directory)
    if after > complete.last or any(part.first <= after < part.last for part in complete.values):
        ends = sorted({part.last for part in complete.values if part.last <= complete.last})
        raise ValueError(
            f"resume_from_checkpoint goes on after update {after}, where the ledger in {directory} is not cut (its "
            f"parts end at {', '.join(map(str, ends)) or 'none'}): take a checkpoint of the run that wrote it"
        )


def table_of_features(steps: np.ndarray, features: list[Features], schema: pa.Schema) -> pa.Table:
    """Rows of features [N, F], each with its update."""
    scale = torch.cat([found.scale for found in features]).cpu().numpy()
    codes = torch.cat([found.codes for found in features]).cpu().numpy()
    rows = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), type=schema.field("feature").type)
    return pa.table({"step": steps, "scale": scale, "feature": rows}, schema=schema)


def write_parts(directory: Path, ranks: Ranks, tables: dict[str, pa.Table], floats: list[str]) -> None:
    """One part of each kind, of audits if there are any. The values come last: they list the updates."""
    steps = tables["updates"]["step"]
    part = Part(directory, "values", steps[0].as_py(), steps[-1].as_py(), ranks.index, ranks.count)
    if ranks.index == 0:
        audits, updates = tables["audit"], tables["updates"]
        if audits.num_rows:
            write_table(replace(part, kind="audit").path, audits)
        audited = b"yes" if audits.num_rows else b"no"
        write_table(replace(part, kind="updates").path, updates.replace_schema_metadata({AUDITED: audited}))
    if "features" in tables:
        write_arrow(replace(part, kind="features").path, tables["features"])
    write_values(part, tables["values"], floats)


def write_values(part: Part, table: pa.Table, floats: list[str]) -> None:
    split = {column: "BYTE_STREAM_SPLIT" for column in floats}
    write_table(
        part.path,
        table,
        use_dictionary=["step", "tokens"],
        column_encoding={"sample_id": "PLAIN", **split},
        row_group_size=131_072,
    )


def write_table(path: Path, table: pa.Table, **encoding: Any) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **encoding)
    write_whole(path, sink.getvalue())


def write_arrow(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    write_whole(path, sink.getvalue())


def write_whole(path: Path, content: Any) -> None:
    """The file is complete or not there, also after a power cut.

    Raises:
        OSError: it could not be written.
    """
    try:
        whole_files.write_whole(path, content)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the ledger's {path} could not be written ({error.strerror}): make room there, then resume the run from "
            "its last checkpoint, or read what was written before with load_values",
        ) from error
