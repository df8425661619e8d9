"""Features of all units under all members, on disk.

    features.json                        the manifest: what the features are of, and how they were made
    member-<m>/<first>-<stop>.safetensors  a shard: what was measured of the units <first> to <stop> - 1

A shard is written under a temporary name and renamed when it is whole, so a run that is killed goes on with the shards
that are missing, and ends with the same bytes; several processes each write the shards that are theirs. Shards are
mapped into memory when they are read: what is not looked at stays on the disk.

Codes are float32, or float16 with a power of two for each unit (`values.features`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..ranks import Ranks
from ..values.features import DTYPES, encoded
from ..whole_files import write_whole
from .measures import Sums
from .unit_kernel import KernelSum


logger = logging.get_logger(__name__)

MANIFEST = "features.json"
FORMAT = 3
# Of a shard's features.
SHARD_BYTES = 64 * 2**20
# And of its units: what a kill may cost.
SHARD_UNITS = 1024
# From where on the room that features take is said aloud.
LARGE = 2**30


@dataclass(frozen=True)
class Stored:
    """A shard as it is read: features [n, F] in float32, and sums over each unit's tokens, as in `Sums`."""

    start: int
    features: Tensor
    loss: Tensor
    miss: Tensor
    tokens: Tensor


class FeatureStore:
    """
    Args:
        folder: where it lies; made if it is not there.
        description: what the features depend on, as JSON.
        units, width, members: how many of each.
        dtype: of the codes, "float32" or "float16".
        ranks: the processes that write it together.
        aloud: say how much room the features take also where it is little.
        beside: bytes that are going to lie beside the features.

    Raises:
        ValueError: the folder holds features of something else, or the disk is too small for them.
    """

    def __init__(
        self,
        folder: Path,
        description: dict[str, Any],
        units: int,
        width: int,
        members: int,
        dtype: str,
        ranks: Ranks,
        aloud: bool = False,
        beside: int = 0,
    ):
        self.folder, self.ranks = folder, ranks
        self.units, self.width, self.members, self.dtype = units, width, members, dtype
        unit_bytes = max(1, width * DTYPES[dtype].itemsize)
        self.shard_units = max(1, min(SHARD_UNITS, SHARD_BYTES // unit_bytes))
        described = {
            "format": FORMAT,
            "units": units,
            "width": width,
            "members": members,
            "dtype": dtype,
            "shard_units": self.shard_units,
            **description,
        }
        self._open(json.loads(json.dumps(described)))
        self._check_room(units * members * unit_bytes, beside, aloud)

    def _open(self, described: dict[str, Any]) -> None:
        path = self.folder / MANIFEST
        if self.ranks.index == 0 and not path.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise ValueError(f"store_dir {self.folder} holds something else: name an empty or a new folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(described, indent=1).encode())
        if self.ranks.index == 0:
            for left in self.folder.glob("**/*.tmp"):  # by a process that was killed while it wrote
                left.unlink()
        self.ranks.wait()
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in found.keys() | described.keys() if found.get(key) != described.get(key))
        if differing:
            shown = "; ".join(f"{key} {short(found.get(key))}, now {short(described.get(key))}" for key in differing)
            raise ValueError(
                f"store_dir {self.folder} holds features that were made otherwise ({shown}): name another folder, or "
                "set these as they were"
            )

    def _check_room(self, own: int, beside: int, aloud: bool) -> None:
        have = sum(path.stat().st_size for path in self.folder.glob("**/*.safetensors"))
        free, total = shutil.disk_usage(self.folder).free, own + beside
        more = f"{beside / 2**30:.2f} GiB beside them, " if beside else ""
        logger.log(
            logging.WARNING if aloud or total >= LARGE else logging.INFO,
            f"features of {self.units:,} units under {self.members} members: {self.width:,} numbers each, "
            f"{own / 2**30:.2f} GiB, {more}of which {have / 2**30:.2f} GiB are there; {free / 2**30:.2f} GiB are free "
            f"in {self.folder}",
        )
        if total - have > free:
            raise ValueError(
                f"features would take {(total - have) / 2**30:.2f} GiB and {self.folder} has {free / 2**30:.2f}: set "
                "a smaller projection_dim, store_dtype='float16', or a store_dir with more room"
            )

    def starts(self) -> range:
        return range(0, self.units, self.shard_units)

    def stop(self, start: int) -> int:
        return min(start + self.shard_units, self.units)

    def missing(self, member: int) -> list[int]:
        """Where shards of this rank begin that are yet to be written."""
        return [start for start in self._own_starts() if not self._path(member, start).is_file()]

    def _own_starts(self) -> range:
        """Of the shards that this rank makes."""
        return self.starts()[self.ranks.index :: self.ranks.count]

    def write(self, member: int, start: int, sums: Sums) -> None:
        found = encoded(sums.numbers, DTYPES[self.dtype])
        tensors = {"scale": found.scale, "codes": found.codes, "loss": sums.loss, "miss": sums.miss}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in (tensors | {"tokens": sums.tokens}).items()}
        path = self._path(member, start)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, save(tensors))

    def fill(
        self, member: int, make: Callable[[int, int], Sums], progress: bool, kernel: KernelSum | None = None
    ) -> None:
        """Writes what is missing of a member, made of its first unit and the one after its last; with a `kernel`,
        also what this does not hold yet."""
        missing = self.missing(member)
        if kernel is not None:
            missing = sorted({*missing, *(set(self._own_starts()) - kernel.done())})
        label = f"features of member {member + 1} of {self.members}"
        bar = tqdm(total=sum(self.stop(s) - s for s in missing), desc=label, unit="unit", disable=not progress)
        with bar:
            for start in missing:
                if kernel is not None:
                    kernel.begin(start)
                self.write(member, start, make(start, self.stop(start)))
                if kernel is not None:
                    kernel.finish()
                bar.update(self.stop(start) - start)

    def read(self, member: int, start: int) -> Stored:
        """
        Raises:
            ValueError: the shard is missing or damaged.
        """
        path = self._path(member, start)
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}): delete it, and fit again") from error
        features = found["codes"].float() * found["scale"].unsqueeze(1)
        return Stored(start, features, found["loss"], found["miss"], found["tokens"])

    def terms(self, member: int) -> Sums:
        """Of all units, without their features."""
        found = []
        for start in self.starts():
            with safe_open(self._path(member, start), "pt") as file:
                found.append([file.get_tensor(name) for name in ("loss", "miss", "tokens")])
        loss, miss, tokens = (torch.cat(own) for own in zip(*found, strict=True))
        return Sums(loss.new_empty(len(loss), 0), loss, miss, tokens)

    def shards(self, member: int) -> Iterator[Stored]:
        for start in self.starts():
            yield self.read(member, start)

    def _path(self, member: int, start: int) -> Path:
        return self.folder / f"member-{member}" / f"{start:010d}-{self.stop(start):010d}.safetensors"


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
