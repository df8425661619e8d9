"""Late values as a ledger of their own: the rows of the run's, with other values.

A part of the run's features is read at a time, and what is read becomes a part of the late ledger. Everything that
reads a run's ledger reads it.

Shapes: K targets, F features.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm.auto import tqdm

from ..directions.validation import ValidationTarget
from ..ledger import load_updates
from ..ledger.features import read_features
from ..ledger.layout import (
    MANIFEST,
    Part,
    complete_parts,
    loss_columns,
    read_manifest,
    read_part,
    unit_keys,
    updates_schema,
    value_columns,
    values_schema,
)
from ..ledger.writer import write_table, write_values, write_whole
from .late_directions import CheckpointDirections, LateDirections


# Features that are looked at together.
BATCH_BYTES = 16 * 2**20


def write_late_ledger(
    value_dir: Path, late_dir: Path, targets: list[ValidationTarget], directions: LateDirections, progress: bool
) -> None:
    """Writes the ledger of the values that the run in `value_dir` has on `targets`; whole, or not at all.

    Its updates have a validation loss where there was a checkpoint right before them, else NaN.

    Raises:
        ValueError: the run's ledger, or its features, are not whole.
    """
    # Under another name until it is complete: nothing tells a piece of a ledger from that of a shorter run.
    unfinished = late_dir.with_name(f"{late_dir.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    manifest, complete = read_manifest(value_dir), complete_parts(value_dir)
    table = load_updates(value_dir).with_format("arrow")[:]
    updates = {name: table[name].to_numpy() for name in table.column_names}
    names = [target.name for target in targets]
    for part in tqdm(complete.values, "reading features", disable=not progress):
        rows = late_rows(part, manifest, names, updates, directions)
        write_values(replace(part, directory=unfinished), rows, value_columns(names))
    for part in complete.of_kind("updates"):
        own = late_updates(part, names, updates, directions.checkpoints)
        write_table(replace(part, directory=unfinished).path, own)
    write_whole(unfinished / MANIFEST, json.dumps(described(manifest, targets, directions), indent=2).encode())
    os.replace(unfinished, late_dir)


def described(
    manifest: Mapping[str, Any], targets: list[ValidationTarget], directions: LateDirections
) -> dict[str, Any]:
    """The run's manifest, and what is other of its late values."""
    rows = {target.name or "validation": len(target.usable) for target in targets}
    return {
        **manifest,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "targets": [target.name for target in targets if target.name],
        "features": None,
        "late": {"checkpoints": [checkpoint.updates for checkpoint in directions.checkpoints]},
        "settings": {**manifest["settings"], "validation_rows": rows},
    }


def late_rows(
    part: Part,
    manifest: Mapping[str, Any],
    names: list[str],
    updates: Mapping[str, np.ndarray],
    directions: LateDirections,
) -> pa.Table:
    """A part's rows, of `updates`, with late values."""
    keys, last = unit_keys(manifest["unit"]), len(updates["step"])
    rows = read_part(part, values_schema(manifest["targets"] or [""], manifest["unit"]))
    made = ~updates["skipped"]
    numbers = made.cumsum()
    factors = np.where(made, updates["clip"] * updates["learning_rate"], 0.0)
    steps = rows["step"].to_numpy()
    values = np.zeros((len(steps), len(names)), np.float32)
    step, u_KF = 0, torch.empty(0)
    for found in read_features(part, steps, BATCH_BYTES):
        if found.step > last:  # some ranks have not written it yet
            break
        if found.step != step:
            step = found.step
            u_KF = directions.at(step, int(numbers[step - 1])) * float(factors[step - 1])
        codes = torch.from_numpy(found.codes).to(u_KF.device, u_KF.dtype)
        scale = torch.from_numpy(found.scale).to(u_KF.device, u_KF.dtype)
        own = (codes @ u_KF.T) * scale.unsqueeze(1)
        values[found.start : found.start + len(codes)] = own.float().cpu().numpy()
    columns = {name: rows[name] for name in ("step", *keys, "tokens")}
    columns |= {name: values[:, k] for k, name in enumerate(value_columns(names))}
    return pa.table(columns, schema=values_schema(names, manifest["unit"])).filter(pc.field("step") <= last)


def late_updates(
    part: Part, names: list[str], updates: Mapping[str, np.ndarray], checkpoints: list[CheckpointDirections]
) -> pa.Table:
    """As they were, with the losses on the new rows where they are known."""
    within = slice(part.first - 1, min(part.last, len(updates["step"])))
    columns = {name: updates[name][within] for name in ("step", "skipped", "clip", "learning_rate")}
    losses = np.full((len(columns["step"]), len(names)), np.nan)
    for checkpoint in checkpoints:
        if checkpoint.updates + 1 in columns["step"]:
            losses[checkpoint.updates + 1 - part.first] = checkpoint.losses.double().cpu().numpy()
    columns |= {name: losses[:, k] for k, name in enumerate(loss_columns(names))}
    return pa.table(columns, schema=updates_schema(names))
