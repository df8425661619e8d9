"""A bank of retrainings: what a model trained on a part of the units makes of each query, for many parts.

It is the ground truth that attributions are measured against (`lds`, `removal_curve`), and what they cost: S x R
trainings. Each is one file, written whole when its training is over, so that a run that was killed goes on where it
was; a folder that was begun with other settings is refused.

    bank.json              what the losses depend on: subsets, units, seeds, and the settings the caller names
    masks.npy              bool [S, U], the units of each subset
    labels.npy             int64 [rows], the unit of each row of the training data
    losses-SSSSS-RRR.npy   float64 [Q], of subset S with its R-th seed, both counted from 0

The seeds are the same for every subset: what an initialisation does to all subsets alike then drops out of their
order.

Shapes: S subsets, U units, R seeds, Q queries.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..whole_files import write_whole
from .one_update import Floats
from .workers import work_off


MANIFEST = "bank.json"
FORMAT = 1
# Said, but free to differ when a bank is gone on with.
VERSIONS = ("hf_datashapley", "torch", "transformers")
Masks = NDArray[np.bool_]
Indices = NDArray[np.int64]


class Retraining(Protocol):
    """Trains on these rows of the data with this seed and returns each query's loss, [Q]. It must pickle."""

    def __call__(self, rows: Indices, seed: int, /) -> Floats: ...


def random_masks(units: int, subsets: int = 100, fraction: float = 0.5, seed: int = 0) -> Masks:
    """`subsets` draws of this part of the units, without replacement and all of one size; bool [subsets, units].

    Raises:
        ValueError: the part is nothing or everything.
    """
    size = round(fraction * units)
    if not 0 < size < units:
        raise ValueError(f"fraction={fraction} of {units} units is {size} of them: give one in between, such as 0.5")
    generator = np.random.default_rng(seed)
    masks_SU = np.zeros((subsets, units), bool)
    for mask_U in masks_SU:
        mask_U[generator.choice(units, size, replace=False)] = True
    return masks_SU


class RetrainingBank:
    """The bank in a folder: begun there, or gone on with.

    Args:
        folder: where it lies; made when it is missing.
        masks: bool [S, U], from `random_masks`, say.
        labels: the unit of each row of the training data, [rows], from 0 to U - 1: documents, sources, groups. None:
            each row is a unit.
        seeds: of how many retrainings of each subset, and which: 2 means 0 and 1. Two or more give `lds` its ceiling.
        settings: what else the losses depend on, as JSON (`LanguageModelRetraining.settings`), so that a bank is not
            gone on with under others.

    Raises:
        ValueError: masks and labels do not fit, or the folder holds a bank that was begun with others; the message
            names what differs.
    """

    def __init__(
        self,
        folder: str | Path,
        masks: Any,
        labels: Any = None,
        seeds: int | Sequence[int] = 1,
        settings: Mapping[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        self.masks: Masks = np.array(masks, dtype=bool)
        if self.masks.ndim != 2 or not self.masks.any(1).all():
            raise ValueError(f"masks has shape {self.masks.shape}, or a subset of no unit: give bool [subsets, units]")
        units = self.masks.shape[1]
        self.labels: Indices = np.arange(units) if labels is None else np.array(labels, dtype=np.int64)
        if self.labels.ndim != 1 or not np.isin(self.labels, np.arange(units)).all():
            raise ValueError(
                f"labels must name the unit of each row, from 0 to {units - 1} with these masks: give one for each row"
            )
        self.seeds = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={seeds}: give one at least, and none twice")
        described = {
            "format": FORMAT,
            "masks": fingerprint(self.masks),
            "labels": fingerprint(self.labels),
            "seeds": self.seeds,
            # As it comes back from the file: tuples are lists there.
            "settings": json.loads(json.dumps(dict(settings or {}))),
        }
        path = self.folder / MANIFEST
        if path.is_file():
            begun = json.loads(path.read_text(encoding="utf-8"))
            different = differing(begun, {**described, "versions": begun["versions"]})
            if different:
                raise ValueError(
                    f"{path}: {', '.join(different)} differ from those that the bank was begun with: use the same, or "
                    "another folder"
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            save(self.folder / "masks.npy", self.masks)
            save(self.folder / "labels.npy", self.labels)
            described["versions"] = {name: version(name) for name in VERSIONS}
            write_whole(path, json.dumps(described, indent=2).encode())

    @classmethod
    def at(cls, folder: str | Path) -> RetrainingBank:
        """A bank that lies there already, to read from or to go on with.

        Raises:
            FileNotFoundError: there is none.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no bank of retrainings ({MANIFEST} is missing)")
        begun = json.loads(path.read_text(encoding="utf-8"))
        masks, labels = (np.load(path.with_name(f"{name}.npy")) for name in ("masks", "labels"))
        return cls(folder, masks, labels, begun["seeds"], begun["settings"])

    def run(self, train: Retraining, workers: int = 2, progress: bool = True) -> RetrainingBank:
        """Trains what is missing, in `workers` processes of one thread each; returns itself.

        The processes are spawned: `train` is pickled once for each, so it is a function of a module (or an object of
        such a class), and a script that calls this does so under `if __name__ == "__main__":`. They end with the
        process that started them, however that ends. With `workers=0` training runs here instead, with this process's
        threads and random state: on a GPU, or where `train` does not pickle.

        Raises:
            ValueError: a training gave losses that are not [Q] or not finite.
            Exception: whatever else a training raised; what was complete stays.
        """
        tasks = [Task(self, s, r) for s, r in self.missing()]
        work_off(train, tasks, workers, "retrainings", progress)
        return self

    def missing(self) -> list[tuple[int, int]]:
        """Subset and seed, both by their place, of the retrainings that are still to be made."""
        every = [(s, r) for s in range(len(self.masks)) for r in range(len(self.seeds))]
        return [(s, r) for s, r in every if not self.path(s, r).is_file()]

    @property
    def outputs(self) -> Floats:
        """Losses, [S, R, Q].

        Raises:
            ValueError: some are missing.
        """
        missing = self.missing()
        if missing:
            count = len(self.masks) * len(self.seeds)
            raise ValueError(f"{self.folder}: {len(missing)} of {count} retrainings are missing: call run() first")
        return np.array([[np.load(self.path(s, r)) for r in range(len(self.seeds))] for s in range(len(self.masks))])

    def rows(self, subset: int) -> Indices:
        """Of the training data, in the subset."""
        return np.flatnonzero(self.masks[subset][self.labels])

    def path(self, subset: int, repetition: int) -> Path:
        return self.folder / f"losses-{subset:05d}-{repetition:03d}.npy"


class Task:
    """One retraining; what a worker process gets to know of it."""

    def __init__(self, bank: RetrainingBank, subset: int, repetition: int):
        self.rows = bank.rows(subset)
        self.seed = bank.seeds[repetition]
        self.path = bank.path(subset, repetition)

    def __call__(self, train: Retraining) -> None:
        losses_Q = np.asarray(train(self.rows, self.seed), dtype=np.float64)
        if losses_Q.ndim != 1 or not np.isfinite(losses_Q).all():
            raise ValueError(
                f"the retraining of {self.path.name} gave losses of shape {losses_Q.shape}, "
                f"{np.count_nonzero(~np.isfinite(losses_Q))} of them not finite: it must return a number for each "
                "query, every query must have a label, and training must not diverge"
            )
        save(self.path, losses_Q)


def save(path: Path, array: NDArray[Any]) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_whole(path, content.getvalue())


def fingerprint(array: NDArray[Any]) -> str:
    return hashlib.sha256(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def differing(before: Any, now: Any, name: str = "") -> list[str]:
    """The settings that differ, as "settings.args.learning_rate"."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [name]
    found = []
    for key in sorted(before.keys() | now.keys()):
        found += differing(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    return found
