"""What each group is worth for the mean loss of the queries, by each estimator; and of rows their group's value.

Values are per row: all rows have as many tokens, so per token, too.

Shapes: N rows, K groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from group_setting import FIRST_SEED, GROUPINGS, Floats, GroupAttribution, TrainedOn, make_partition, rows_of
from hf_datashapley import Influence, TracIn, Trak
from hf_datashapley.attribution.estimator import Attribution
from hf_datashapley.attribution.partitions import Partition
from hf_datashapley.evaluation.kept import kept_arrays


BATCH = 64  # rows of a pass of attribution
# "IF" with the best curvature, TracIn, TRAK; with the Fisher matrix or kernel of groups (the paper's) or of rows.
METHODS = ("IF, EK-FAC", "TracIn", "TRAK")
OF_GROUPS = ("TRAK", "IF, Fisher")  # have a kernel, of groups
OF_ROWS = {name: f"{name}, kernel of rows" for name in OF_GROUPS}
ADDITIVE = ("IF, EK-FAC", "TracIn")  # groups have the sums of their rows' scores, exactly
ALL_METHODS = ("IF, EK-FAC", "TracIn", *OF_GROUPS, *OF_ROWS.values())


@dataclass(frozen=True)
class Run:
    """A training, seen from where it ended and from its checkpoints."""

    models: list[nn.Module]
    rates: list[float]

    @classmethod
    def of(cls, training: TrainedOn, rows: int) -> Run:
        return cls(*training.checkpoints(np.arange(rows), FIRST_SEED, training.config.checkpoints))

    @property
    def model(self) -> nn.Module:
        return self.models[-1]


def estimator(config: GroupAttribution, method: str, run: Run, **settings: Any) -> Attribution:
    """By its name in the tables."""
    settings = {"batch_size": BATCH, "seed": config.seed, "progress": False} | settings
    if method == "IF, EK-FAC":
        return Influence(run.model, curvature="ekfac", **settings)
    settings["projection_dim"] = config.projection_dim
    if method == "TracIn":
        return TracIn(run.models, learning_rates=run.rates, **settings)
    kind = {"TRAK": Trak, "IF, Fisher": Influence}[method_of_groups(method)]
    return kind(run.model, kernel="unit" if method in OF_ROWS.values() else "group", **settings)


def method_of_groups(method: str) -> str:
    """The same with the kernel of groups. Of rows by themselves the two are one."""
    return method.removesuffix(", kernel of rows")


@dataclass(frozen=True)
class Cell:
    """A place in the tables; with groups of 1 there is no grouping."""

    method: str
    grouping: str
    size: int

    @property
    def is_rows(self) -> bool:
        return self.size == 1


def cells(methods: tuple[str, ...], sizes: list[int]) -> Iterator[Cell]:
    """Rows by themselves first."""
    for method in methods:
        if method not in OF_ROWS.values():  # of rows by themselves it is the other
            yield Cell(method, "rows", 1)
        for grouping in GROUPINGS:
            for size in sizes:
                yield Cell(method, grouping, size)


@dataclass(frozen=True)
class Values:
    """Of each row its group's value over the group's rows, [N], and its group."""

    values_N: Floats
    labels_N: NDArray[np.int64]


class ValueBook:
    """Values of all cells for one training set, each made once."""

    def __init__(self, config: GroupAttribution, name: str, run: Run, train: Tensor, queries: Tensor):
        self.config, self.run, self.train = config, run, train
        self.folder = Path(config.output_dir) / f"values-{name}"
        self.train_rows, self.query_rows = rows_of(train), rows_of(queries)

    def labels(self, grouping: str, size: int) -> dict[str, NDArray[Any]]:
        def make() -> dict[str, Any]:
            partition = make_partition(self.config, grouping, size, self.run.model, self.train)
            return {"labels": np.arange(len(self.train)) if partition is None else partition.labels}

        return kept_arrays(self.folder / f"groups-{grouping}-{size}.npz", make)

    def of(self, cell: Cell) -> Values:
        groups = self.labels(cell.grouping, cell.size)
        labels_N = groups["labels"]
        if cell.method in ADDITIVE and not cell.is_rows:
            scores_K = self.sums(cell)  # what `group_scores` does, with the rows' scores as they are kept
        else:
            scores_K = self.scored(cell)["scores"]
        return Values((scores_K / np.bincount(labels_N))[labels_N], labels_N)

    def scored(self, cell: Cell) -> dict[str, NDArray[Any]]:
        """Scores of groups by an estimator that was fitted to groups, [K]."""

        def make() -> dict[str, Any]:
            labels_N = self.labels(cell.grouping, cell.size)["labels"]
            partition = None if cell.is_rows else Partition(labels_N, int(labels_N.max()) + 1)
            made = estimator(self.config, cell.method, self.run, partition=partition)
            return {"scores": made.fit(self.train_rows).score(self.query_rows, mean=True)[:, 0]}

        return kept_arrays(self.folder / f"{cell.method}-{cell.grouping}-{cell.size}.npz", make)

    def sums(self, cell: Cell) -> Floats:
        """Of the scores of each group's rows, [K]."""
        labels_N = self.labels(cell.grouping, cell.size)["labels"]
        scores_N = self.scored(Cell(method_of_groups(cell.method), "rows", 1))["scores"]
        sums_K: Floats = np.bincount(labels_N, scores_N.astype(np.float64)).astype(np.float64)
        return sums_K

    def agreement(self, cell: Cell) -> float:
        """Correlation of groups' scores with the sums of their rows'."""
        return float(np.corrcoef(self.scored(cell)["scores"], self.sums(cell))[0, 1])

    def deviation(self, cell: Cell) -> float:
        """Of groups' scores from the sums of their rows' scores, the largest over the largest score."""
        scores_K, sums_K = self.scored(cell)["scores"], self.sums(cell)
        return float(np.abs(scores_K - sums_K).max() / np.abs(sums_K).max())
