"""What a backward pass knows of a parameter's gradient, use by use, while no gradient is formed.

    a weight's gradient is a sum over positions p of l_p r_p^T      l_p [L] and r_p [R] its two sides

The layers' rules hand the sides to a `Record` where features are made elsewhere: the capture takes records for a
projection, and the taps, through which autograd is made to reach every layer, get zeros.

Shapes: U units, L and R the sides of a weight's gradient, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ghost.projection import tap
from ...ghost.units import Units


@dataclass(frozen=True)
class Outer:
    """Both sides of each position, [R, ..., L] and [R, ..., R]."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Looked:
    """The left side has a 1 at `ids`, [R, ...]."""

    ids: Tensor
    right: Tensor


@dataclass(frozen=True)
class Summed:
    """Of a vector: units' gradients, [U, C]."""

    sums: Tensor


Use = Outer | Looked | Summed


class Record:
    """The uses of one parameter in a backward pass."""

    width = 1

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.uses: list[Use] = []

    def of_sums(self, sums: Tensor) -> Tensor:
        return self._kept(Summed(self._own(sums).flatten(1)), len(sums))

    def of_outer(self, left: Tensor, right: Tensor, units: Units) -> Tensor:
        return self._kept(Outer(self._own(left), self._own(right)), units.count)

    def of_rows(self, ids: Tensor, right: Tensor, units: Units) -> Tensor:
        return self._kept(Looked(ids, self._own(right)), units.count)

    def of_dense(self, directions: Tensor) -> Tensor:
        raise AssertionError("a record projects nothing")

    def _own(self, x: Tensor) -> Tensor:
        # Detached, or an input would hold on to the whole graph before it.
        return x.detach().to(self.dtype)

    def _kept(self, use: Use, count: int) -> Tensor:
        self.uses.append(use)
        return torch.zeros(count, self.width, dtype=self.dtype, device=self.device)


class Records:
    """Of all parameters, by name: a `ghost.projection.Projection`."""

    width = 1

    def __init__(self, names: Mapping[str, Any], device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.parameters = {name: Record(device, dtype) for name in names}
        self.blocks = {"": slice(0, 1)}

    def taps(self, units: Units) -> dict[str, Tensor]:
        return dict.fromkeys(self.parameters, tap(units.count, self.width, self.device, self.dtype))

    def of_dense(self, directions: Mapping[str, Tensor]) -> Tensor:
        raise AssertionError("a record projects nothing")

    def described(self) -> dict[str, Any]:
        raise AssertionError("a record is never stored")
