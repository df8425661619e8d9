"""Values that were pushed to the Hub, or a local copy of that repo: what `datasets.load_dataset` makes of it.

The history is downloaded where it is needed: for a window of updates, for updates that all weigh the same, and for
samples where documents have the values. Everything else is made from the much smaller table of units. Both stay on
the disk, memory-mapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..ledger import stretches
from ..ledger.layout import KEY_TYPES, value_columns
from ..ledger.stretches import window_of


@dataclass(frozen=True)
class PublishedRows:
    """The rows of a repo's config "history"; and the sums over them in its config "values"."""

    repo: str
    revision: str | None
    units: Dataset

    @classmethod
    def open(cls, repo: str, revision: str | None) -> PublishedRows:
        """Raises: ValueError, there is no such repo, or it holds something else."""
        found = cls(repo, revision, load_config(repo, "values", revision))
        if not found.keys or not {"updates", "tokens", *value_columns(found.targets)} <= set(found.units.column_names):
            raise ValueError(
                f"{repo}: the config 'values' has the columns {', '.join(found.units.column_names)}, which are not "
                "those of values: name a repo that push_values_to_hub wrote"
            )
        return found

    @property
    def keys(self) -> list[str]:
        return [key for key in KEY_TYPES if key in self.units.column_names]

    @property
    def targets(self) -> list[str]:
        named = [name for name in self.units.column_names if name.startswith("value_")]
        return [name.removeprefix("value_") for name in named] or [""]

    @cached_property
    def history(self) -> Dataset:
        return load_config(self.repo, "history", self.revision)

    @cached_property
    def steps(self) -> np.ndarray:
        """Of each row of the history, int32, ascending."""
        steps: np.ndarray = self.history.select_columns(["step"]).with_format("arrow")[:]["step"].to_numpy()
        if (np.diff(steps) < 0).any():
            raise ValueError(f"{self.repo}: the config 'history' is not ordered by step: push the values again")
        return steps

    def window(self, from_step: int | None, to_step: int | None) -> tuple[int, int]:
        return window_of(self.repo, int(self.steps[-1]) if len(self.steps) else 0, from_step, to_step)

    def stretches(self, first: int, last: int) -> Iterator[pa.Table]:
        rows = self.history.select_columns(["step", *self.keys, "updates", "tokens", *value_columns(self.targets)])
        rows = rows.with_format("arrow")
        begin, end = np.searchsorted(self.steps, [first, last + 1])
        while begin < end:
            # The update after the one in which the stretch is full.
            full = min(begin + stretches.ROWS_AT_ONCE, end) - 1
            stop = int(np.searchsorted(self.steps, self.steps[full], side="right"))
            yield rows[begin:stop]
            begin = stop

    def summed(self) -> Iterator[pa.Table]:
        """One row for each unit, of all updates: without the history."""
        yield self.units.with_format("arrow")[:]


def load_config(repo: str, config: str, revision: str | None) -> Dataset:
    """The one split of a config.

    Of a local copy the files are read: `load_dataset` knows those of a folder by its name and its card only, and gives
    what it has cached of another one that is called the same.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        if Path(repo).is_dir():
            return Dataset.from_parquet([str(path) for path in sorted(Path(repo, config).glob("train-*.parquet"))])
        (split,) = datasets.load_dataset(repo, config, revision=revision).values()
        return split
    except (
        datasets.exceptions.DatasetsError,
        FileNotFoundError,
        ConnectionError,
        HfHubHTTPError,
        HFValidationError,
        ValueError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{repo}: its config {config!r} cannot be loaded ({reason}): name the output_dir or the value_dir of a "
            "run, or a dataset repo that push_values_to_hub wrote (log in for a private one)"
        ) from error
