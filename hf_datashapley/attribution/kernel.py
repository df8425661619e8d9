"""The damped kernel of units' features, and its inverse:

    K = sum_i phi_i phi_i^T + damping * (mean eigenvalue of the sum) * 1

in float64, from features that are read a shard at a time. Where there are more features than units, what is inverted
is the Gram matrix of the units (Woodbury): memory is the square of the smaller number.

Eigenvalues that are 0, for want of units or of features, do not count for the mean.

Shapes: N units, F features, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


# Units' features, [n, F], one shard after the other.
Shards = Callable[[], Iterable[Tensor]]


class Kernel(Protocol):
    def solve(self, x_QF: Tensor) -> Tensor:
        """K^-1 x, [Q, F], of x's type."""


def kernel_of(shards: Shards, units: int, width: int, damping: float) -> Kernel:
    """
    Args:
        shards: reads the features, again and again if need be.
        units, width: N and F.
        damping: over the mean eigenvalue; greater than 0.

    Raises:
        ValueError: the features are all 0, or not finite.
    """
    if units < width:
        return UnitGram(shards, units, damping)
    return FeatureGram(gram_of_features(shards), units, damping)


class FeatureGram:
    """Of K as it is: `gram_FF`, the sum of `units` features' outer products, is damped in place."""

    def __init__(self, gram_FF: Tensor, units: int, damping: float):
        self._factor, _ = factored(gram_FF, min(units, len(gram_FF)), damping)

    def solve(self, x_QF: Tensor) -> Tensor:
        return torch.cholesky_solve(x_QF.double().T, self._factor).T.to(x_QF.dtype)


class UnitGram:
    """Of the units' inner products."""

    def __init__(self, shards: Shards, units: int, damping: float):
        self._shards = shards
        rows = []
        for left in shards():
            rows.append(torch.cat([left.double() @ right.double().T for right in shards()], dim=1))
        self._factor, self._damping = factored(torch.cat(rows), units, damping)

    def solve(self, x_QF: Tensor) -> Tensor:
        x = x_QF.double()
        seen = torch.cat([features.double() @ x.T for features in self._shards()])  # [N, Q]
        weights = torch.cholesky_solve(seen, self._factor)
        start = 0
        for features in self._shards():
            x = x - weights[start : start + len(features)].T @ features.double()
            start += len(features)
        return (x / self._damping).to(x_QF.dtype)


def gram_of_features(shards: Shards) -> Tensor:
    gram: Tensor | None = None
    for features in shards():
        own = features.double()
        gram = own.T @ own if gram is None else gram.addmm_(own.T, own)
    assert gram is not None
    return gram


def check_damping(damping: Any) -> None:
    """Raises `ValueError` unless it is a number above 0."""
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < float("inf"):
        raise ValueError(
            f"damping={damping!r}: give a number above 0, by which mean eigenvalues are multiplied and added"
        )


def factored(gram: Tensor, rank: int, damping: float) -> tuple[Tensor, float]:
    """The Cholesky factor of what is damped, and by how much it is."""
    mean = float(gram.diagonal().sum()) / rank
    if not 0 < mean < float("inf"):
        raise ValueError(
            f"the mean eigenvalue of the features' kernel is {mean}: the gradients are 0 or not finite; look at "
            "the model and at the rows' labels"
        )
    gram.diagonal().add_(damping * mean)
    return torch.linalg.cholesky(gram), damping * mean
