"""What a ledger looks like on disk, shared by writer and reader.

    ledger.json         the manifest: format, targets, unit, settings of the run
    values-*.parquet    step, the keys of a unit, tokens, one float32 column for each target; of a rank's own samples
    updates-*.parquet   step, skipped, clip, learning_rate, validation loss for each target; by the first rank
    audit-*.parquet     step, target, samples, carried, predicted, actual; by the first rank, where asked for: the
                        part of the updates says in its metadata ("audited") whether one belongs to it
    features-*.arrow    step, scale, feature, a row for each of the values part of the same name; where asked for

    KIND-<first update>-<last update>-<rank>-of-<ranks>.parquet (or .arrow)

Parts are cut between updates, written under a temporary name and renamed when they are complete; those of several
machines may be copied into one folder. Byte-stream-split floats under zstd take about half the room of the default
encoding (12 bytes a row with two targets) and write faster. Features cannot be compressed: they lie as they are read,
in Arrow's own format, which is mapped into memory. What a unit's projected gradient is, its `feature` times its
`scale`, and how it was projected, the manifest's "features" say (`ghost.sides`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


KINDS = ("values", "updates", "audit", "features")
SUFFIX = {"values": ".parquet", "updates": ".parquet", "audit": ".parquet", "features": ".arrow"}
MANIFEST = "ledger.json"
FORMAT = 1
# Key of the Parquet metadata of a part of the updates.
AUDITED = b"audited"
UNITS = ("sample", "document", "token")
KEY_TYPES = {"sample_id": pa.int64(), "document_id": pa.int64(), "position": pa.int32()}


def unit_keys(unit: str) -> list[str]:
    """The columns that tell one unit's rows from another's: of its own level, and those of the coarser ones."""
    return list(KEY_TYPES)[: UNITS.index(unit) + 1]


def value_columns(targets: list[str]) -> list[str]:
    return [f"value_{target}" if target else "value" for target in targets]


def loss_columns(targets: list[str]) -> list[str]:
    return [f"validation_loss_{target}" if target else "validation_loss" for target in targets]


def values_schema(targets: list[str], unit: str) -> pa.Schema:
    """With unit "token", the sum over a piece of a document whose tokens have no rows of their own has position -1."""
    keys = [(key, KEY_TYPES[key]) for key in unit_keys(unit)]
    floats = [(column, pa.float32()) for column in value_columns(targets)]
    return pa.schema([("step", pa.int32()), *keys, ("tokens", pa.int32()), *floats])


def updates_schema(targets: list[str]) -> pa.Schema:
    fixed = [("step", pa.int32()), ("skipped", pa.bool_()), ("clip", pa.float64()), ("learning_rate", pa.float64())]
    return pa.schema(fixed + [(column, pa.float64()) for column in loss_columns(targets)])


def audit_schema() -> pa.Schema:
    numbers = [(name, pa.float64()) for name in ("samples", "carried", "predicted", "actual")]
    return pa.schema([("step", pa.int32()), ("target", pa.string()), *numbers])


def features_schema(width: int, dtype: str) -> pa.Schema:
    number = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    feature = pa.list_(pa.field("item", number, nullable=False), width)
    return pa.schema([("step", pa.int32()), ("scale", pa.float32()), pa.field("feature", feature, nullable=False)])


@dataclass(frozen=True)
class Part:
    """A file of the ledger: what one of `world` ranks wrote of the updates `first` to `last`."""

    directory: Path
    kind: str
    first: int
    last: int
    rank: int
    world: int

    @classmethod
    def at(cls, path: Path) -> Part:
        kind, first, last, rank, _, world = path.stem.split("-")
        return cls(path.parent, kind, int(first), int(last), int(rank), int(world))

    @property
    def path(self) -> Path:
        name = f"{self.kind}-{self.first:09d}-{self.last:09d}-{self.rank:05d}-of-{self.world:05d}"
        return self.directory / f"{name}{SUFFIX[self.kind]}"


def parts(directory: Path, kind: str) -> list[Part]:
    found = [Part.at(path) for path in directory.glob(f"{kind}-*{SUFFIX[kind]}")]
    return sorted(found, key=lambda part: (part.first, part.world, part.rank))


@dataclass(frozen=True)
class Complete:
    """What all ranks have written: the updates from 1 to `last`.

    `values` are the parts that hold them; the last ones may hold more, which other ranks have not written yet (`ahead`
    is the last update that any has).
    """

    last: int
    ahead: int
    values: list[Part]

    def of_kind(self, kind: str) -> list[Part]:
        """Updates and audits are the first rank's; audits where its updates say that there are any."""
        if kind in ("values", "features"):
            return [replace(part, kind=kind) for part in self.values]
        updates = [replace(part, kind="updates") for part in self.values if part.rank == 0]
        return updates if kind == "updates" else [replace(part, kind=kind) for part in updates if is_audited(part)]


def is_audited(updates: Part) -> bool:
    """Whether a part of the audits was written with this one of the updates, so that a lost one is missed."""
    try:
        metadata = pq.read_schema(updates.path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise damaged(updates, error) from error
    return metadata.get(AUDITED) == b"yes"


def read_part(part: Part, schema: pa.Schema) -> pa.Table:
    """A Parquet part. Raises `ValueError` where it is missing or damaged."""
    try:
        return pq.read_table(part.path, schema=schema)
    except (pa.ArrowException, OSError) as error:
        raise damaged(part, error) from error


def damaged(part: Part, error: Exception) -> ValueError:
    return ValueError(
        f"{part.path} is missing or damaged ({error}): put a copy of it back; without one, its updates have "
        "no values, and the run has to be resumed from a checkpoint before them"
    )


def complete_parts(directory: Path) -> Complete:
    """A part of the values lists its updates: it is written after the rank's other parts of them.

    Each rank cuts its parts where it likes, and all of them at a checkpoint; from there on there may be more or fewer
    ranks.

    Raises:
        ValueError: parts are missing, or overlap.
    """
    runs = runs_of(parts(directory, "values"))
    values: list[Part] = []
    last = ahead = 0
    while True:
        here = [run for run in runs if run[0].first == last + 1]
        ahead = max([ahead, *(run[-1].last for run in here)])
        whole = [world for world in {run[0].world for run in here} if sum(r[0].world == world for r in here) == world]
        if not whole:
            break
        found = [run for run in here if run[0].world == whole[0]]
        runs = [run for run in runs if run not in found]
        values += [part for run in found for part in run]
        last = min(run[-1].last for run in found)
    for run in runs:
        if run[0].first != last + 1:
            raise ValueError(
                f"{directory} has updates up to {last}, and a part of its {run[0].world} ranks begins with "
                f"{run[0].first} ({run[0].path.name}): put the missing part back, or take away what lies there twice"
            )
    return Complete(last, ahead, sorted(values, key=lambda part: (part.first, part.rank)))


def runs_of(values: list[Part]) -> list[list[Part]]:
    """Each rank's parts, where one begins right after the other has ended."""
    runs: list[list[Part]] = []
    for part in values:
        for run in runs:
            if (run[0].rank, run[0].world, run[-1].last + 1) == (part.rank, part.world, part.first):
                run.append(part)
                break
        else:
            runs.append([part])
    return runs


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


def find_ledger(run: str | Path) -> Path:
    """Of an output_dir or a value_dir. Raises `FileNotFoundError` where there is none."""
    for directory in (Path(run), Path(run) / "values"):
        if (directory / MANIFEST).is_file():
            return directory
    raise FileNotFoundError(
        f"{run} holds no ledger of values ({MANIFEST} is missing): name the output_dir or the value_dir of a run that "
        "ShapleyTrainer trained"
    )
