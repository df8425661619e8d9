"""What a ledger looks like on disk, shared by writer and reader.

    ledger.json                               the manifest: format, targets, unit, settings of the run
    values-<first update>-<last update>.parquet    step, sample_id, tokens, one float32 column for each target
    updates-<first update>-<last update>.parquet   step, skipped, clip, learning_rate, validation loss for each target
    audit-<first update>-<last update>.parquet     step, target, samples, carried, predicted, actual; where asked for

Parts are cut between updates, written under a temporary name and renamed when they are complete. Byte-stream-split
floats under zstd take about half the room of the default encoding (12 bytes a row with two targets) and write faster.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa


KINDS = ("values", "updates", "audit")
MANIFEST = "ledger.json"
FORMAT = 1


def value_columns(targets: list[str]) -> list[str]:
    return [f"value_{target}" if target else "value" for target in targets]


def loss_columns(targets: list[str]) -> list[str]:
    return [f"validation_loss_{target}" if target else "validation_loss" for target in targets]


def values_schema(targets: list[str]) -> pa.Schema:
    ids = [("step", pa.int32()), ("sample_id", pa.int64()), ("tokens", pa.int32())]
    return pa.schema(ids + [(column, pa.float32()) for column in value_columns(targets)])


def updates_schema(targets: list[str]) -> pa.Schema:
    fixed = [("step", pa.int32()), ("skipped", pa.bool_()), ("clip", pa.float64()), ("learning_rate", pa.float64())]
    return pa.schema(fixed + [(column, pa.float64()) for column in loss_columns(targets)])


def audit_schema() -> pa.Schema:
    numbers = [(name, pa.float64()) for name in ("samples", "carried", "predicted", "actual")]
    return pa.schema([("step", pa.int32()), ("target", pa.string()), *numbers])


def part_name(kind: str, first: int, last: int) -> str:
    return f"{kind}-{first:09d}-{last:09d}.parquet"


def parts(directory: Path, kind: str) -> list[Path]:
    return sorted(directory.glob(f"{kind}-*.parquet"))


def updates_of(part: Path) -> tuple[int, int]:
    """The first and the last update that a part is cut at."""
    first, last = part.stem.split("-")[1:]
    return int(first), int(last)


def complete_parts(directory: Path, kind: str) -> list[Path]:
    """The parts of updates that are listed; what a killed run has written beyond them is not.

    Raises:
        ValueError: parts are missing, or overlap.
    """
    listed = [updates_of(part) for part in parts(directory, "updates")]
    for (_, last), (first, _) in zip([(0, 0), *listed], listed, strict=False):
        if first != last + 1:
            raise ValueError(
                f"{directory} has updates up to {last}, and the next part begins with {first}: put the missing part "
                "back, or take away what lies there twice"
            )
    return [part for part in parts(directory, kind) if updates_of(part) in listed]


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises `FileNotFoundError` where there is no ledger, `ValueError` for one of another format."""
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no ledger of values ({MANIFEST} is missing): name a run's value_dir"
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {manifest['format']}, this version of hf_datashapley reads {FORMAT}: install the "
            "version that wrote it"
        )
    return manifest
