"""Junk among the rows: is it what groups are worth least?

Some rows of training are replaced by junk, and the model is trained anew. Each row is judged by its group's value per
token, so that a group of both kinds cannot tell them apart. The measure is the AUC, the chance that a junk row's value
is below that of a row that is none, equal ones counted half.

What is asked about are clean rows of all domains: a row of a domain that is not asked about is worth as little as
junk. (For comparison, the queries of the other measurements are asked about, too.)

Shapes: N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from group_setting import Floats, GroupAttribution, Text, TrainedOn, token_losses
from group_values import Cell, Run, ValueBook


ALL_DOMAINS, TARGETS_ALONE = "clean rows of all domains", "the queries"


@dataclass(frozen=True)
class JunkFinding:
    """`books`: values for the mean loss of clean rows of all domains, and of the queries."""

    books: dict[str, ValueBook]
    is_junk_N: NDArray[np.bool_]

    @classmethod
    def planted(cls, config: GroupAttribution, text: Text, base: dict[str, Tensor]) -> JunkFinding:
        rows, is_junk_N = text.with_junk(config.junk_share, config.seed)
        run = Run.of(TrainedOn(config, base, rows, text.queries), len(rows))
        asked = {ALL_DOMAINS: text.clean, TARGETS_ALONE: text.tabled}
        books = {name: ValueBook(config, f"junk, {name}", run, rows, queries) for name, queries in asked.items()}
        return cls(books, is_junk_N)

    def auc(self, cell: Cell, asked: str = ALL_DOMAINS) -> float:
        return auc(self.books[asked].of(cell).values_N, self.is_junk_N)

    @property
    def by_loss(self) -> float:
        """By the rows' own loss, the greatest first: what costs a forward pass."""
        with torch.no_grad():
            book = self.books[ALL_DOMAINS]
            losses_N = token_losses(book.run.model, book.train).mean(1).double().numpy()
        return auc(-losses_N, self.is_junk_N)

    @property
    def remark(self) -> str:
        return (
            f"{int(self.is_junk_N.sum())} of {len(self.is_junk_N)} rows are junk. By the rows' own loss, the greatest "
            f"first, the AUC is {self.by_loss:.3f}."
        )


def auc(values_N: Floats, is_junk_N: NDArray[np.bool_]) -> float:
    _, place_N, count = np.unique(values_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(count) - (count - 1) / 2)[place_N]
    junk, others = int(is_junk_N.sum()), int((~is_junk_N).sum())
    return float((rank_N[~is_junk_N].sum() - others * (others + 1) / 2) / (junk * others))
