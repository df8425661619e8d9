"""Projections of the whole gradient: each feature is a sum over entries of all parameters.

    "sjlt"          one nonzero a column, see `cyclic_sketch`: O(1) for an entry, whatever the width
    "rademacher"    P of independent signs over sqrt(F): F products for an entry, and F bits drawn for it, in every
                    batch, since what is drawn is not kept. For small models, and to compare with

Either has a noise of at most |g| |u| sqrt(2 / F) in <P g, P u>, whatever the form of the gradients. Their price is
that every entry of every unit's gradient is formed, a block of left rows at a time, [U, block, R]: as many products as
the weight gradient itself would take. Of embeddings only the rows that were looked up are visited by "sjlt".

Shapes: U units, L and R the sides of a weight's gradient, N rows of it, K directions, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .bits import Bits
from .cyclic_sketch import CyclicSketch
from .kernels import BLOCK, gradients_of_units
from .projection import VERSION, bits_of, refuse_other_version, tap
from .units import Units


Whole = Literal["sjlt", "rademacher"]
# Entries of all units' gradients that are formed at a time: 8 MiB in float32, which an allocator hands out again
# without asking the system for it (measured: with 32 MiB a block takes three times as long).
ENTRIES = 8 * BLOCK
# Signs of a dense matrix that exist at a time, and entries of one unit's gradient.
SIGNS = 16 * BLOCK


def two_sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of a matrix; what is none has one row."""
    return (shape[0], shape[1]) if len(shape) == 2 else (1, math.prod(shape))


def blocks(left: int, rows: int) -> Iterator[slice]:
    for start in range(0, left, max(1, rows)):
        yield slice(start, min(left, start + max(1, rows)))


class SparseMap:
    """P of one parameter in "sjlt"."""

    def __init__(self, shape: tuple[int, ...], width: int, bits: Bits, device: torch.device, dtype: torch.dtype):
        self.left, self.right = two_sides(shape)
        self.width, self.dtype, self.device = width, dtype, device
        self._sketch = CyclicSketch(bits, (self.left, self.right), width, device)

    def of_sums(self, sums: Tensor) -> Tensor:
        x_ULR = sums.to(self.dtype).reshape(-1, self.left, self.right)
        buckets = self._sketch.begun(len(x_ULR), self.dtype)
        for rows in self._blocks(len(x_ULR)):
            self._sketch.add(buckets, x_ULR[:, rows], self._numbers(rows))
        return self._sketch.ended(buckets)

    def of_outer(self, left: Tensor, right: Tensor, units: Units) -> Tensor:
        left, right = left.to(self.dtype), right.to(self.dtype)
        buckets = self._sketch.begun(units.count, self.dtype)
        for rows in self._blocks(units.count):
            self._sketch.add(buckets, gradients_of_units(left[..., rows], right, units), self._numbers(rows))
        return self._sketch.ended(buckets)

    def of_rows(self, ids: Tensor, right: Tensor, units: Units) -> Tensor:
        right_PR, ids_P = right.to(self.dtype).flatten(0, -2), ids.flatten()
        units_P = units.of_positions(ids)
        buckets = self._sketch.begun(units.count, self.dtype)
        for own in blocks(len(ids_P), ENTRIES // self.right):
            self._sketch.add_rows(buckets, right_PR[own], ids_P[own], units_P[own])
        return self._sketch.ended(buckets)

    def of_dense(self, directions: Tensor) -> Tensor:
        return self.of_sums(directions)

    def _blocks(self, count: int) -> Iterator[slice]:
        return blocks(self.left, ENTRIES // (count * self.right))

    def _numbers(self, rows: slice) -> Tensor:
        return torch.arange(rows.start, rows.stop, device=self.device)


class DenseMap:
    """P of one parameter in "rademacher"; its signs are drawn anew each time, a block of them after the other."""

    def __init__(
        self, name: str, shape: tuple[int, ...], width: int, seed: int, device: torch.device, dtype: torch.dtype
    ):
        self.left, self.right = two_sides(shape)
        self.name, self.width, self.seed = name, width, seed
        self.device, self.dtype = device, dtype

    def of_sums(self, sums: Tensor) -> Tensor:
        x_ULR = sums.to(self.dtype).reshape(-1, self.left, self.right)
        features = self._begun(len(x_ULR))
        for rows in self._blocks():
            self._add(features, x_ULR[:, rows], rows)
        return features

    def of_outer(self, left: Tensor, right: Tensor, units: Units) -> Tensor:
        left, right = left.to(self.dtype), right.to(self.dtype)
        features = self._begun(units.count)
        for rows in self._blocks():
            self._add(features, gradients_of_units(left[..., rows], right, units), rows)
        return features

    def of_rows(self, ids: Tensor, right: Tensor, units: Units) -> Tensor:
        right_PR, ids_P = right.to(self.dtype).flatten(0, -2), ids.flatten()
        units_P = units.of_positions(ids)
        features = self._begun(units.count)
        for rows in self._blocks():
            # Rows of other blocks go into one that is not looked at.
            count = rows.stop - rows.start
            within_P = torch.where((ids_P >= rows.start) & (ids_P < rows.stop), ids_P - rows.start, count)
            x_UNR = right_PR.new_zeros(units.count, count + 1, self.right)
            x_UNR.view(-1, self.right).index_add_(0, within_P + units_P * (count + 1), right_PR)
            self._add(features, x_UNR[:, :count], rows)
        return features

    def of_dense(self, directions: Tensor) -> Tensor:
        return self.of_sums(directions)

    def _begun(self, count: int) -> Tensor:
        return torch.zeros(count, self.width, dtype=self.dtype, device=self.device)

    def _blocks(self) -> Iterator[slice]:
        # By nothing that changes from batch to batch.
        return blocks(self.left, SIGNS // (self.width * self.right))

    def _add(self, features_UF: Tensor, x_UNR: Tensor, rows: slice) -> None:
        bits = bits_of(self.seed, self.name, rows.start)
        for part in x_UNR.flatten(1).split(max(1, SIGNS // self.width), dim=1):
            signs = bits.signs(part.shape[1], self.width).to(self.device, self.dtype)
            features_UF.addmm_(part, signs, alpha=1 / math.sqrt(self.width))


class WholeProjection:
    """P of the gradient of all parameters, which share one tap.

    Args:
        kind: "sjlt" or "rademacher".
        shapes: by parameter name, in order.
        width: F.
        seed: of the draw.
        device, dtype: of what is projected; float32 or float64.
    """

    def __init__(
        self,
        kind: Whole,
        shapes: Mapping[str, tuple[int, ...]],
        width: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.kind, self.shapes, self.width, self.seed = kind, dict(shapes), width, seed
        self.device, self.dtype = device, dtype
        self.parameters: dict[str, SparseMap | DenseMap] = {
            name: SparseMap(shape, width, bits_of(seed, name), device, dtype)
            if kind == "sjlt"
            else DenseMap(name, shape, width, seed, device, dtype)
            for name, shape in shapes.items()
        }
        self.blocks = {"": slice(0, width)}

    def taps(self, units: Units) -> dict[str, Tensor]:
        return dict.fromkeys(self.shapes, tap(units.count, self.width, self.device, self.dtype))

    def of_dense(self, directions: Mapping[str, Tensor]) -> Tensor:
        some = next(iter(directions.values()))
        features = torch.zeros(len(some), self.width, dtype=self.dtype, device=self.device)
        for name, own in self.parameters.items():
            features += own.of_dense(directions[name])
        return features

    def described(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "kind": self.kind,
            "seed": self.seed,
            "width": self.width,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }


def described_whole(description: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> WholeProjection:
    """
    Raises:
        ValueError: it is of a version that drew otherwise.
    """
    refuse_other_version(description)
    shapes = {name: tuple(shape) for name, shape in description["shapes"].items()}
    return WholeProjection(description["kind"], shapes, description["width"], description["seed"], device, dtype)
