"""One parameter's block of the curvature, by its eigenvalues in a basis that is a Kronecker product:

    H = (Q_L x Q_R) diag(lambda) (Q_L x Q_R)^T

Shapes: K directions, L and R the sides of a weight's gradient (one side for a vector).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """
    Attributes:
        bases: of each side, its eigenvectors as columns; None: the coordinates.
        values: eigenvalues, [L, R] or [C].
    """

    bases: list[Tensor | None]
    values: Tensor

    def solve(self, directions: Tensor, damping: float) -> Tensor:
        """(H + damping * (mean eigenvalue of H))^-1 u, of directions [K, *shape].

        A block of zeros is that of a parameter without gradient, and gives 0.
        """
        mean = self.values.mean()
        raised = self.values + damping * mean
        x = rotated(directions.to(raised.dtype).reshape(-1, *raised.shape), self.bases)
        x = torch.where(mean > 0, x / raised, 0.0)
        return rotated(x, [None if q is None else q.T for q in self.bases]).reshape(directions.shape)


def rotated(x: Tensor, bases: list[Tensor | None]) -> Tensor:
    """Q_L^T x Q_R of matrices [K, L, R], or Q^T x of vectors [K, C]."""
    *left, right = bases
    if right is not None:
        x = x @ right
    return x if not left or left[0] is None else left[0].T @ x


def eigen(moment: Tensor) -> tuple[Tensor | None, Tensor]:
    """Basis, and eigenvalues [n], of a side; of one that is kept as its diagonal these are it. In float64: errors of
    eigenvectors go with the inverse of eigenvalues' distances."""
    if moment.ndim == 1:
        return None, moment
    values, basis = torch.linalg.eigh(moment.double())
    return basis.to(moment.dtype), values.clamp(min=0).to(moment.dtype)
