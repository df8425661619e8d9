"""A sparse Johnson-Lindenstrauss transform with one nonzero a column: each entry of a matrix [L, R] is added, with a
random sign, to one of `width` buckets.

Which one is not drawn entry by entry. The matrix is cut into pieces of `width` entries at most, whole rows together
where they are shorter than that, and a piece is laid over the buckets as it is, begun at a random one:

    bucket(e) = (offset of e's piece + place of e in it) mod width

So two entries of a piece never meet, two of different pieces meet with probability 1 / width, and signs are
independent. Inner products are therefore unbiased, and with p_ij, the probability that i and j meet,

    Var <P g, P u> = sum_{i<j} p_ij (g_i u_j + g_j u_i)^2

is at most that of a dense matrix of signs, whose p_ij is 1 / width for all pairs. Exact where there is but one piece.

What is kept is a bit for each entry and a number for each piece; places are counted, not stored.

Shapes: U units, L and R the sides of the matrix, N rows of it, P positions, F buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import Bits


class CyclicSketch:
    """
    Args:
        bits: of which offsets and signs are drawn.
        shape: [L, R].
        width: F.
    """

    def __init__(self, bits: Bits, shape: tuple[int, int], width: int, device: torch.device):
        left, self.right = shape
        self.width = width
        self.height = width // self.right  # rows in a piece; 0 where a row has several pieces
        self.per_row = -(-self.right // width)
        pieces = -(-left // self.height) if self.height else left * self.per_row
        self.offsets = bits.below(width, pieces).to(device)
        self.packed = bits.bytes(left, -(-self.right // 8)).to(device)
        # A bit's place in its byte.
        self._eight = torch.arange(8, dtype=torch.uint8, device=device)

    def buckets(self, rows_N: Tensor) -> Tensor:
        """[N, R], below 2 F: modulo F it is that entry's."""
        place_R = torch.arange(self.right, device=rows_N.device)
        if self.height:
            start_N = self.offsets[rows_N // self.height] + rows_N % self.height * self.right
            return start_N.unsqueeze(1) + place_R
        pieces_NQ = rows_N.unsqueeze(1) * self.per_row + torch.arange(self.per_row, device=rows_N.device)
        start_NR = self.offsets[pieces_NQ].repeat_interleave(self.width, 1)[:, : self.right]
        return start_NR + place_R % self.width

    def signs(self, rows_N: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, R]"""
        bits = (self.packed[rows_N].unsqueeze(2) >> self._eight) & 1
        return bits.flatten(1)[:, : self.right].to(dtype).mul_(2).sub_(1)

    def begun(self, count: int, dtype: torch.dtype) -> Tensor:
        """Nothing yet, for so many units: [U, 2 F]."""
        return torch.zeros(count, 2 * self.width, dtype=dtype, device=self.offsets.device)

    def add(self, sums: Tensor, x_UNR: Tensor, rows_N: Tensor) -> None:
        """Adds rows of the units' matrices."""
        signed = x_UNR * self.signs(rows_N, sums.dtype)
        sums.index_add_(1, self.buckets(rows_N).flatten(), signed.flatten(1))

    def add_rows(self, sums: Tensor, x_PR: Tensor, rows_P: Tensor, units_P: Tensor) -> None:
        """Adds one row of one unit's matrix for each position."""
        index_PR = self.buckets(rows_P) + (units_P * sums.shape[1]).unsqueeze(1)
        sums.view(-1).index_add_(0, index_PR.flatten(), (x_PR * self.signs(rows_P, sums.dtype)).flatten())

    def ended(self, sums: Tensor) -> Tensor:
        """The buckets, [U, F]."""
        return sums[:, : self.width] + sums[:, self.width :]

    def __call__(self, x_UN: Tensor) -> Tensor:
        """Of matrices of one row: [U, F]."""
        sums = self.begun(len(x_UN), x_UN.dtype)
        self.add(sums, x_UN.unsqueeze(1), torch.zeros(1, dtype=torch.int64, device=x_UN.device))
        return self.ended(sums)
