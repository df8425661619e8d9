"""Inner products, and cosines, of units' and queries' gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .estimator import Attribution
from .store import Stored


@dataclass(repr=False)
class GradDot(Attribution):
    """score_iq = <g_i, g_q>: by how much a small step of gradient descent on unit i lowers the loss of query q.

    (Charpiat, Girard, Felardos, Tarabalka, "Input Similarity from the Neural Network Perspective", arXiv 2102.05262;
    first order at the trained weights alone.) g_i is of the sum of the unit's token losses, g_q of the query's mean
    token loss: scores are in nats of the query's loss for each unit of step size, and add up over units.

    Assumes that what helped while training helps still at its end. Cost: without a projection, a pass over the
    training set for every few queries; with one, one pass in all, and `projection_dim` numbers a unit.
    """


@dataclass(repr=False)
class GradCos(Attribution):
    """score_iq = <g_i, g_q> / (|g_i| |g_q|): `GradDot` without what gradients' sizes say. Between -1 and 1.

    Not additive: the cosine of a group's gradient is not the sum, nor the mean, of its members'. With `partition` it
    is that of the group's own gradient. Without a projection units' whole gradients are formed and stored, which is
    for models of a few million parameters.
    """

    additive: ClassVar[bool] = False

    def _stores(self) -> bool:
        return True

    def feature_directions(self, member: int, query_QF: Tensor, loss_Q: Tensor | None) -> Tensor:
        return query_QF / norms(query_QF).unsqueeze(1)

    def weights(self, stored: Stored) -> Tensor | None:
        return 1 / norms(stored.features)


def norms(x: Tensor) -> Tensor:
    """Of rows, [n]; never 0."""
    return torch.linalg.vector_norm(x, dim=1).clamp(min=torch.finfo(x.dtype).tiny)
