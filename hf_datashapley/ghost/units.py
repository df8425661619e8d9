"""What gets a score of its own: the rows of a micro-batch, or runs of positions that share rows.

A layer that treats positions alike does not see where a unit ends. So only the inner products do: they are taken unit
by unit, over the positions that are a unit's own, and whatever else the layer computes is left as it is.

Shapes: U units, R rows, T positions of a row, P positions of a unit, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Units(Protocol):
    """
    Attributes:
        count: U.
        shape: with which every tensor begins that a layer sees.
    """

    count: int
    shape: tuple[int, ...]

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """[R, ...] -> what is each unit's, views; of rows without position dimensions without one."""

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner product of each unit's entries: [R, ..., C] twice -> [U]."""

    def sum(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Over each unit's positions: [R, ..., C] -> [U, C]."""

    def of_positions(self, ids: Tensor) -> Tensor:
        """The unit of each position, [R, ...] -> [P], int64, on the device of `ids`."""


class Rows:
    """Each row is a unit, [U, ..., C]; a row without position dimensions has one position."""

    def __init__(self, count: int):
        self.count = count
        self.shape: tuple[int, ...] = (count,)

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        return x.unbind(0)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """A loop, because on CPU it takes a tenth of the time of one batched product.

        What is compiled is fused, and must not unroll it; summed up in two steps, which round less.
        """
        if torch.compiler.is_compiling():
            return (x * y).sum(-1).reshape(len(x), -1).sum(1)
        return torch.stack([torch.dot(x_i, y_i) for x_i, y_i in zip(x.flatten(1), y.flatten(1), strict=True)])

    def sum(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return positions(x).sum(1, dtype=dtype)

    def of_positions(self, ids: Tensor) -> Tensor:
        return torch.arange(self.count, device=ids.device).repeat_interleave(ids[0].numel())


class Runs:
    """Each run of positions is a unit, one after the other through the rows, [R, T, ..., C].

    `lengths` cover all positions. They are known on the host, so nothing waits for a device.
    """

    def __init__(self, lengths: Sequence[int], rows: int):
        total = sum(lengths)
        assert total % rows == 0, f"runs of {total} positions do not fill {rows} rows"
        self.count = len(lengths)
        self.lengths = list(lengths)
        self.shape: tuple[int, ...] = (rows, total // rows)

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        return x.flatten(0, 1).split(self.lengths)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack(
            [torch.dot(x_i.flatten(), y_i.flatten()) for x_i, y_i in zip(self.parts(x), self.parts(y), strict=True)]
        )

    def sum(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.stack([x_i.flatten(0, -2).sum(0, dtype=dtype) for x_i in self.parts(x)])

    def of_positions(self, ids: Tensor) -> Tensor:
        each = ids[0, 0].numel()
        lengths = torch.tensor([length * each for length in self.lengths])
        return torch.arange(self.count).repeat_interleave(lengths).to(ids.device)


class Places:
    """Each position belongs to one of `count` units, or to none. For scores of single positions, not for layers.

    `unit_RT`: which unit, int64 [R, T]; `count` for none.
    """

    def __init__(self, unit_RT: Tensor, count: int):
        self.count = count
        self.unit_RT = unit_RT

    def sum(self, x: Tensor) -> Tensor:
        """Over each unit's positions: [R, T, C] -> [U, C]."""
        sums = x.new_zeros(self.count + 1, x.shape[2])
        return sums.index_add_(0, self.unit_RT.flatten(), x.flatten(0, 1))[:-1]

    def any_of(self, x: Tensor) -> Tensor:
        """What all positions of a unit have alike: [R, T] -> [U]."""
        return x.new_zeros(self.count + 1).scatter_(0, self.unit_RT.flatten(), x.flatten())[:-1]


def positions(x: Tensor) -> Tensor:
    """[B, ..., C] -> [B, P, C]; a row without position dimensions has one position."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
