"""Rank correlation of many columns at once, with each row counted as often as a bootstrap has drawn it.

A resample only repeats and drops rows: their order stays. So columns are sorted once, and a resample's ranks are
cumulative sums of the rows' multiplicities along that order; equal numbers, a row's own copies among them, share the
mean of the ranks that they take up, as in `fidelity.ranks`.

Shapes: S rows (subsets), Q columns (queries).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .one_update import Floats


Integers = NDArray[np.intp]


@dataclass(frozen=True)
class WeightedRanks:
    """The order of each of Q columns.

    Attributes:
        order_SQ: the rows from the least number to the greatest.
        first_SQ, last_SQ: of each row in its own place, where in that order its equals begin and end.
    """

    order_SQ: Integers
    first_SQ: Integers
    last_SQ: Integers

    @classmethod
    def of(cls, numbers_SQ: Floats) -> WeightedRanks:
        rows = len(numbers_SQ)
        order_SQ = np.argsort(numbers_SQ, axis=0, kind="stable")
        sorted_SQ = np.take_along_axis(numbers_SQ, order_SQ, 0)
        changes_SQ = sorted_SQ[1:] != sorted_SQ[:-1]
        edge = np.ones((1, numbers_SQ.shape[1]), bool)
        place_S = np.arange(rows)[:, None]
        begins_SQ = np.maximum.accumulate(np.where(np.concatenate([edge, changes_SQ]), place_S, 0), 0)
        ends_SQ = np.where(np.concatenate([changes_SQ, edge]), place_S, rows)
        ends_SQ = np.minimum.accumulate(ends_SQ[::-1], 0)[::-1]
        first_SQ, last_SQ = np.empty_like(order_SQ), np.empty_like(order_SQ)
        np.put_along_axis(first_SQ, order_SQ, begins_SQ, 0)
        np.put_along_axis(last_SQ, order_SQ, ends_SQ, 0)
        return cls(order_SQ, first_SQ, last_SQ)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.order_SQ.shape
        return rows, columns

    def ranks(self, drawn_S: Integers) -> Floats:
        """[S, Q], from 1; of rows that were drawn `drawn_S` times."""
        before_SQ = np.zeros((len(drawn_S) + 1, self.order_SQ.shape[1]))
        np.cumsum(drawn_S[self.order_SQ], axis=0, out=before_SQ[1:])
        before = np.take_along_axis(before_SQ, self.first_SQ, 0)
        through = np.take_along_axis(before_SQ, self.last_SQ + 1, 0)
        mean_rank: Floats = (before + through + 1) / 2
        return mean_rank

    def correlation(self, other: WeightedRanks, drawn_S: Integers | None = None) -> Floats:
        """Spearman's with the columns of `other`, [Q]; 0 where one side is the same for every row drawn."""
        weight_S = np.ones(self.shape[0], np.intp) if drawn_S is None else drawn_S
        share_S = weight_S / weight_S.sum()
        left_SQ, right_SQ = self.ranks(weight_S), other.ranks(weight_S)
        left_SQ = left_SQ - share_S @ left_SQ
        right_SQ = right_SQ - share_S @ right_SQ
        product_Q = share_S @ (left_SQ * right_SQ)
        square_Q = (share_S @ left_SQ**2) * (share_S @ right_SQ**2)
        # Two rows that differ make it 1e-3 at least; of ranks that are all equal, rounding leaves some 1e-30.
        varies_Q = square_Q > 1e-12
        found_Q = np.zeros(len(product_Q))
        np.divide(product_Q, np.sqrt(square_Q), out=found_Q, where=varies_Q)
        return found_Q
