"""Samples that share a row: the way from the row to a row for each sample, and back.

A packing collator joins the samples of a micro-batch to one row. A layer that treats positions alike computes the same
of a packed row as of its samples, one a row and padded; so its rule and kernel are given the latter. Both ways copy
entries and nothing else, padding is zeros whose output gradient is zero, and what the layer's neighbours see is the
packed row. The price is computing on padding, up to the longest sample, in layers of the "fused" kernel; "project"
leaves the layer's own computation as it is and pads only for the score.

Shapes: B samples, P positions of the longest, T positions of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor


Result = TypeVar("Result")


def real_places(lengths: list[int]) -> Tensor:
    """Which places of the samples' padded rows hold a position, bool [B, P]."""
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


class Packing:
    """Where the samples of a packed row lie: one after the other, in the order of the places that are `real_BP`.

    Sizes are known from shapes alone (`positions` is T), so nothing here waits for a device.
    """

    def __init__(self, real_BP: Tensor, positions: int):
        self.samples, self.width = real_BP.shape
        # With which every tensor of the packed row begins.
        self.shape = (1, positions)
        self._places_T = real_BP.flatten().byte().argsort(descending=True, stable=True)[:positions]

    def apart(self, row: Tensor, padding: int = 0) -> Tensor:
        """[1, T, ...] -> [B, P, ...]."""
        padded = row.new_full((self.samples * self.width, *row.shape[2:]), padding)
        return padded.index_copy(0, self._places_T, row[0]).unflatten(0, (self.samples, self.width))

    def together(self, rows: Tensor) -> Tensor:
        """[B, P, ...] -> [1, T, ...]."""
        return rows.flatten(0, 1).index_select(0, self._places_T).unsqueeze(0)

    def each_apart(self, function: Callable[[Tensor, Tensor], Result]) -> Callable[[Tensor, Tensor], Result]:
        """A function of a layer's input and output gradient, one sample a row, as one of packed rows."""
        return lambda x, b: function(self.apart(x), self.apart(b))
