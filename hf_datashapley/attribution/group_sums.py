"""Scores of fitted units, added up over groups; and of which estimators they may be.

    score_Gq = sum over the units i of group G of  score_iq

A score is what a unit does to a query to first order, so it adds up where it is linear in the unit's gradient under
directions that are the same for all units: `GradDot`, `TracIn`, `Influence` (whatever its curvature), `Trak` (each
unit by its own Q). It does not where each unit's gradient is brought to length 1 (`GradCos`, `Less`): the cosine of a
group is no sum of its members' cosines, and is had by fitting with `partition`.

Beside a fit with `partition`:

    GradDot, TracIn, Influence "identity", "kfac", "ekfac"    the same numbers
    Influence "fisher", Trak                                  those of kernel="unit"; kernel="group" has another kernel
    Influence "datainf"                                       the curvature of units, and not of groups

and any number of partitions can be tried on one fit, which keeps what it keeps of every unit.

Memory: [groups, queries] in float64, and scores of a block of units; where nothing is stored of units (no projection),
of all.

Shapes: u units of a block, G groups, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..grouping import Grouping
from .corpus import Corpus


def check_sums(name: str, additive: bool, partition: Any, train: Corpus) -> None:
    """Raises `ValueError` unless scores of the estimator `name` add up, and the partition is of `train`'s units."""
    if not additive:
        raise ValueError(
            f"{name}'s scores do not add up over units: fit with partition=, which scores the gradient of each group"
        )
    if train.partition is not None:
        raise ValueError(
            "groups were fitted (partition=), and score() scores them: to add up over other groups, fit without"
        )
    if not isinstance(partition, Grouping):
        raise ValueError(
            f"partition is a {type(partition).__name__}: give a Partition, such as "
            "Partition.from_column(train_dataset, 'source')"
        )
    if len(partition.labels) != train.count:
        raise ValueError(
            f"partition has {len(partition.labels)} labels, and {train.count} {train.reading.unit}s were fitted: make "
            f"it of the same {train.name}"
        )


def summed_scores(blocks: Iterable[tuple[int, Tensor]], partition: Grouping) -> np.ndarray:
    """Of scores [u, Q] of one block of units after the other, each with the number of its first: float32 [G, Q]."""
    labels, sums_GQ = torch.from_numpy(partition.labels), None
    for start, block_uQ in blocks:
        if sums_GQ is None:
            sums_GQ = torch.zeros(partition.num_groups, block_uQ.shape[1], dtype=torch.float64)
        sums_GQ.index_add_(0, labels[start : start + len(block_uQ)], block_uQ.cpu().double())
    assert sums_GQ is not None
    return sums_GQ.float().numpy()
