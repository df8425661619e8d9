"""DataInf: the inverse of a mean of damped rank-one matrices, taken for the mean of their inverses.

    H_l = 1/n sum_i h_i h_i^T         h_i unit i's gradient in block l, so scaled that H is of the mean token loss
    (H_l + d_l)^-1  ~  1/n sum_i (h_i h_i^T + d_l)^-1  =  1 / (n d_l) sum_i (1 - h_i h_i^T / (d_l + |h_i|^2))

(Kwon, Wu, Wu, Zou, "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models", arXiv
2310.00902.) A block is a parameter (of an adapter: each of its two matrices). The paper damps a block by 0.1 times the
mean square of an entry of its gradients; that is the mean eigenvalue of H_l, so `damping` means here what it means
for other curvatures, and 0.1 is the paper's. Labels are those given, and units those that are scored.

Assumes that the order of mean and inverse does not matter; the error grows with the square of a block's size, so this
is for adapters. Cost: nothing is inverted and nothing kept but two passes over the features, one more per `score`.

Shapes: U units of a shard, Q queries, F features, of a block Fb.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.utils import logging

from ..kernel import Shards


logger = logging.get_logger(__name__)

# Entries of trainable parameters from which on it is said aloud that they are many.
MANY = 10_000_000


class DataInf:
    """
    Args:
        shards: reads the units' features, again and again.
        blocks: where each parameter's lie.
        units, tokens: n, and N loss tokens.
        damping: over each block's mean eigenvalue.
    """

    def __init__(self, shards: Shards, blocks: Mapping[str, slice], units: int, tokens: int, damping: float):
        if not tokens:
            raise ValueError("train_dataset: no row has a labelled token, so none has influence: give labels")
        assert "" not in blocks, "features of all parameters together have no blocks"
        self._shards, self._blocks = shards, list(blocks.values())
        self._units, self._tokens = units, tokens
        self._scale = math.sqrt(units / tokens)
        means = torch.zeros(len(self._blocks), dtype=torch.float64)
        for features in shards():
            squares_F = (features.double() * self._scale).square_().sum(0)
            means += torch.stack([squares_F[own].mean() for own in self._blocks]) / units
        self._dampings = (damping * means).tolist()

    def of_features(self, query_QF: Tensor) -> Tensor:
        query = query_QF.double()
        found = query * self._units
        for features in self._shards():
            h_UF = features.double() * self._scale
            for own, damping in zip(self._blocks, self._dampings, strict=True):
                if damping > 0:
                    h = h_UF[:, own]
                    weights_UQ = h @ query[:, own].T / (damping + h.square().sum(1, keepdim=True))
                    found[:, own] -= weights_UQ.T @ h
        for own, damping in zip(self._blocks, self._dampings, strict=True):
            # A block without gradients scores nothing.
            found[:, own] *= 1 / (self._units * damping * self._tokens) if damping > 0 else 0.0
        return found.to(query_QF.dtype)


def warn_of_many(entries: int) -> None:
    if entries > MANY:
        logger.warning(
            f"curvature='datainf' is an approximation for adapters, whose error grows with their size, and "
            f"{entries:,} parameter entries count here: choose fewer with `modules`, or curvature='ekfac'"
        )
