"""Which group each unit is credited with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


SHOWN = 5


@dataclass(frozen=True, eq=False, repr=False)
class Grouping:
    """
    Attributes:
        labels: of each sample (or document, in the order in which they first appear), int64 [n], from 0 to
            `num_groups` - 1.
        num_groups: how many there are; none is empty.
        names: what the groups are called, in the order of their labels; None: by their numbers.

    Raises:
        ValueError: the labels are not such, a group is empty, or the names are not one for each group.
    """

    labels: np.ndarray
    num_groups: int
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or not len(labels):
            raise ValueError(f"labels have shape {list(labels.shape)}: give one for each sample")
        if labels.dtype.kind not in "iu":
            raise ValueError(f"labels are {labels.dtype}, not numbers of groups: make them with Partition.from_labels")
        if labels.min() < 0 or labels.max() >= self.num_groups:
            raise ValueError(
                f"labels reach from {labels.min()} to {labels.max()}, and num_groups={self.num_groups}: give numbers "
                "from 0 to num_groups - 1, or any values to Partition.from_labels"
            )
        object.__setattr__(self, "labels", labels.astype(np.int64))
        empty = np.flatnonzero(self.sizes() == 0)
        if len(empty):
            raise ValueError(
                f"{len(empty)} of {self.num_groups} groups are empty, {', '.join(map(str, empty[:SHOWN]))} first: "
                "leave them out, as Partition.from_labels does"
            )
        if self.names is not None and len(self.names) != self.num_groups:
            raise ValueError(f"{len(self.names)} names for {self.num_groups} groups: give one for each, or None")
        if self.names is not None and len(set(self.names)) < len(self.names):
            raise ValueError("two groups have one name: give each its own, or None")

    def sizes(self) -> np.ndarray:
        """Samples (or documents) of each group, int64 [num_groups]."""
        return np.bincount(self.labels, minlength=self.num_groups)

    def __repr__(self) -> str:
        sizes = self.sizes()
        least, most = sizes.min(), sizes.max()
        each = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        groups = "1 group" if self.num_groups == 1 else f"{self.num_groups:,} groups"
        return f"{type(self).__name__}({len(self.labels):,} in {groups} of {each})"
