"""What a curvature is to an estimator: H^-1, damped, at a member's weights.

Over stored features, or over whole gradients; `influence` says which curvature is which.

Shapes: Q queries, F features, K directions.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..batched import Directions


class FeatureInverse(Protocol):
    def of_features(self, query_QF: Tensor) -> Tensor:
        """(H + damping)^-1 g_q / N, [Q, F], of features of the queries' gradients."""


class WholeInverse(Protocol):
    def of_whole(self, directions: Directions) -> Directions:
        """(H + damping)^-1 g_q / N, [K, *shape] by name, of the queries' gradients."""
