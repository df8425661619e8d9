"""How far values are from true ones: in size, in order, and in sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .one_update import Floats


@dataclass(frozen=True)
class Fidelity:
    """Of N values against their truth; in the values' unit (nats) where not a ratio.

    Attributes:
        relative_error: |values - truth| / |truth|, Euclidean norms over the samples; 1 is what values of 0 have.
        pearson: correlation; NaN where either side is the same for every sample.
        spearman: correlation of the ranks, ties given their mean rank; NaN likewise.
        rmse: root of the mean squared difference.
        sum: of the values.
        actual: what the sum should be.
    """

    relative_error: float
    pearson: float
    spearman: float
    rmse: float
    sum: float
    actual: float


def fidelity(values: Any, truth: Any, actual: float | None = None) -> Fidelity:
    """Compares the values of N samples on one target with true ones, such as those of `exact_shapley`.

    Args:
        values, truth: N numbers each, in any form that numpy takes; [N] or [N, 1].
        actual: what the values should add up to, in nats; None: the sum of `truth`.

    Raises:
        ValueError: they are not of one target, or not of the same samples.
    """
    values_N, truth_N = column(values, "values"), column(truth, "truth")
    if len(values_N) != len(truth_N):
        raise ValueError(f"values has {len(values_N)} samples and truth {len(truth_N)}: give both for the same ones")
    difference, scale = float(np.linalg.norm(values_N - truth_N)), float(np.linalg.norm(truth_N))
    if scale == 0:
        relative_error = math.inf if difference else 0.0
    else:
        relative_error = difference / scale
    return Fidelity(
        relative_error=relative_error,
        pearson=correlation(values_N, truth_N),
        spearman=correlation(ranks(values_N), ranks(truth_N)),
        rmse=difference / math.sqrt(len(truth_N)),
        sum=float(values_N.sum()),
        actual=float(truth_N.sum()) if actual is None else float(actual),
    )


def column(numbers: Any, name: str) -> Floats:
    """[N]"""
    array = np.asarray(numbers, dtype=np.float64)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} has shape {array.shape}: give one number for each sample, a target at a time")
    return array


def correlation(left: Floats, right: Floats) -> float:
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return math.nan
    left, right = left - left.mean(), right - right.mean()
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


def ranks(numbers: Floats) -> Floats:
    """From 1; equal numbers share the mean of the ranks that they take up."""
    _, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: Floats = last - (counts - 1) / 2
    return mean_rank[place]
