"""Partitions as files: labels as a tensor, and what else there is to know as JSON, in one file of safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ...whole_files import write_whole


KEY = "datashapley_partition"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """As in `Partition`."""

    labels: np.ndarray
    num_groups: int
    names: tuple[str, ...] | None
    fingerprint: str | None


def write(path: str | Path, saved: Saved) -> None:
    described = {
        "format": FORMAT,
        "num_groups": int(saved.num_groups),
        "names": saved.names,
        "fingerprint": saved.fingerprint,
    }
    write_whole(Path(path), save({"labels": saved.labels}, {KEY: json.dumps(described)}))


def read(path: str | Path) -> Saved:
    """
    Raises:
        FileNotFoundError: it is not there.
        ValueError: it holds something else, or of a format of a later version.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            labels = file.get_tensor("labels") if KEY in metadata else None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no partition ({error}): make it again") from error
    if labels is None:
        raise ValueError(f"{path} is no partition: give a file that Partition.save has written")
    described = json.loads(metadata[KEY])
    if described["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {described['format']}, and this version reads {FORMAT}: update, or save again"
        )
    names = described["names"]
    return Saved(labels, described["num_groups"], None if names is None else tuple(names), described["fingerprint"])
