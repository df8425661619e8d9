"""Curvature 1: influence is the inner product of gradients, over the number of tokens."""

from __future__ import annotations

from torch import Tensor

from ..batched import Directions
from ..corpus import Corpus


class Identity:
    """H + damping = 1, in whatever unit: scores of `GradDot` / `tokens`."""

    def __init__(self, tokens: int):
        if not tokens:
            raise ValueError("train_dataset: no row has a labelled token, so none has influence: give labels")
        self.tokens = tokens

    def of_features(self, query_QF: Tensor) -> Tensor:
        return query_QF / self.tokens

    def of_whole(self, directions: Directions) -> Directions:
        return {name: own / self.tokens for name, own in directions.items()}


def loss_tokens(rows: Corpus) -> int:
    """Of all rows; reads them."""
    return sum(int(batch.tokens.sum()) for batch in rows.batches(0, rows.count))
