"""The empirical Fisher matrix of all features together, H = sum_i g_i g_i^T / N, over the units that are scored,
or over the members of groups that are.

(H + damping)^-1 / N is the inverse of the features' damped kernel: what is N on one side is 1 on the other.
"""

from __future__ import annotations

from torch import Tensor

from ..kernel import Kernel


class Fisher:
    """Damped by `damping` times the mean of the eigenvalues that are not 0 for want of units.

    Cost: see `kernel`; F^2 numbers, or as many as the square of the units.
    """

    def __init__(self, kernel: Kernel):
        self._kernel = kernel

    def of_features(self, query_QF: Tensor) -> Tensor:
        return self._kernel.solve(query_QF)
