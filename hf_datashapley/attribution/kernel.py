"""The damped kernel of units' features, and its inverse:

    K = sum_i phi_i phi_i^T + damping * (mean eigenvalue of the sum) * 1

in float64, from features that are read a shard at a time. Where there are more features than units, what is inverted
is the Gram matrix of the units (Woodbury): memory is the square of the smaller number.

Eigenvalues that are 0, for want of units or of features, do not count for the mean.

Shapes: N units, F features, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


# Units' features, [n, F], one shard after the other.
Shards = Callable[[], Iterable[Tensor]]


class Kernel:
    """
    Args:
        shards: reads the features, again and again if need be.
        units, width: N and F.
        damping: over the mean eigenvalue; greater than 0.

    Raises:
        ValueError: the features are all 0, or not finite, or `damping` is not positive.
    """

    def __init__(self, shards: Shards, units: int, width: int, damping: float):
        if not damping > 0:
            raise ValueError(
                f"damping={damping}: give a number above 0, by which the kernel's mean eigenvalue is raised"
            )
        self._shards, self._dual = shards, units < width
        gram = self._of_units(units) if self._dual else self._of_features(width)
        mean = float(gram.diagonal().sum()) / min(units, width)
        if not 0 < mean < float("inf"):
            raise ValueError(
                f"the mean eigenvalue of the features' kernel is {mean}: the gradients are 0 or not finite; look at "
                "the model and at the rows' labels"
            )
        self.damping = damping * mean
        gram.diagonal().add_(self.damping)
        self._factor = torch.linalg.cholesky(gram)

    def _of_features(self, width: int) -> Tensor:
        gram: Tensor | None = None
        for features in self._shards():
            own = features.double()
            gram = own.T @ own if gram is None else gram.addmm_(own.T, own)
        assert gram is not None and len(gram) == width
        return gram

    def _of_units(self, units: int) -> Tensor:
        rows = []
        for left in self._shards():
            rows.append(torch.cat([left.double() @ right.double().T for right in self._shards()], dim=1))
        gram = torch.cat(rows)
        assert len(gram) == units
        return gram

    def solve(self, x_QF: Tensor) -> Tensor:
        """K^-1 x, [Q, F], of x's type."""
        x = x_QF.double()
        if not self._dual:
            return torch.cholesky_solve(x.T, self._factor).T.to(x_QF.dtype)
        seen = torch.cat([features.double() @ x.T for features in self._shards()])  # [N, Q]
        weights = torch.cholesky_solve(seen, self._factor)
        start = 0
        for features in self._shards():
            x = x - weights[start : start + len(features)].T @ features.double()
            start += len(features)
        return (x / self.damping).to(x_QF.dtype)
