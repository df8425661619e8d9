"""Projections of each parameter by itself: sides of a weight are narrowed before they meet, and the rest is sketched.

A weight's gradient g [L, R] is a sum of outer products over positions. With A [L, L'] and B [R, R'] of random signs

    P g = A^T g B           both sides, each to about the root of the width: "LoGra" (Choe et al., "What is Your Data
                            Worth to GPT?", arXiv 2405.13954). P is the Kronecker product of A^T and B^T
    P g = C (A^T g)         one side, the longer one, and a sketch of what comes of it
    P g = C g               a bias, or the weight of a norm

Both sides cost (L + R) sqrt(F) products for a position, and F for their meeting; one side L L' + L' R, several times
more. The noise of <P g, P u> is |g| |u| / sqrt(F) for the sketch and |g| |u| / sqrt(L') for a side, where g and u are
of low rank: with both sides so narrow |g| |u| / F^(1/4). "Both sides" is for what is done once to a whole corpus, "one
side" for training, where as many products are made anyway.

Where a parameter has as many features as entries, P leaves it as it is, and products are exact. No matrix of the size
of a parameter exists, unless the parameter is smaller than a side.

Shapes: U units, L and R the sides of a weight's gradient, K directions, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .bits import Bits
from .cyclic_sketch import CyclicSketch
from .kernels import gradients_of_units
from .plans import Plan
from .projection import VERSION, bits_of, refuse_other_version, tap
from .units import Units


class SidedMap:
    """P of one parameter."""

    def __init__(self, plan: Plan, bits: Bits, device: torch.device, dtype: torch.dtype):
        self.plan, self.width, self.dtype = plan, plan.width, dtype
        self._sides: list[Tensor | None] = [  # [N, N'], or None for the side itself
            None if count == n else (bits.signs(n, count) / math.sqrt(count)).to(device, dtype)
            for n, count in zip(plan.shape, plan.sides, strict=False)
        ]
        entries = math.prod(plan.sides or plan.shape)
        self._sketch = None if entries == plan.width else CyclicSketch(bits, (1, entries), plan.width, device)

    def of_sums(self, sums: Tensor) -> Tensor:
        return self._sketched(sums.to(self.dtype))

    def of_outer(self, left: Tensor, right: Tensor, units: Units) -> Tensor:
        return self._sketched(gradients_of_units(self._side(0, left), self._side(1, right), units))

    def of_rows(self, ids: Tensor, right: Tensor, units: Units) -> Tensor:
        table, right = self._sides[0], self._side(1, right)
        if table is not None:
            left = torch.nn.functional.embedding(ids, table)
            return self._sketched(gradients_of_units(left, right, units))
        count = self.plan.shape[0]
        sums = right.new_zeros(units.count * count, right.shape[-1])
        sums.index_add_(0, ids.flatten() + units.of_positions(ids) * count, right.flatten(0, -2))
        return self._sketched(sums.view(units.count, -1))

    def of_dense(self, directions: Tensor) -> Tensor:
        x = directions.to(self.dtype)
        if self.plan.sides:
            left, right = self._sides
            if right is not None:
                x = x @ right
            if left is not None:
                x = left.T @ x
        return self._sketched(x)

    def _side(self, number: int, x: Tensor) -> Tensor:
        side, x = self._sides[number], x.to(self.dtype)
        if side is None:
            return x
        # The narrow side first: on CPU, where it is of 8, the product takes a quarter of the time.
        narrow_NP = side.T @ x.flatten(0, -2).T
        return narrow_NP.T.unflatten(0, x.shape[:-1])

    def _sketched(self, x: Tensor) -> Tensor:
        return x.flatten(1) if self._sketch is None else self._sketch(x.flatten(1))


class PerParameter:
    """P of all parameters, one after the other.

    Args:
        plans: by parameter name, in order.
        seed: of the draw.
        device, dtype: of what is projected; float32 or float64.
    """

    def __init__(self, plans: dict[str, Plan], seed: int, device: torch.device, dtype: torch.dtype):
        self.plans, self.seed, self.device, self.dtype = plans, seed, device, dtype
        self.parameters = {name: SidedMap(plan, bits_of(seed, name), device, dtype) for name, plan in plans.items()}
        ends = list(accumulate(plan.width for plan in plans.values()))
        self.width = ends[-1]
        starts = [0, *ends[:-1]]
        self.blocks = dict(zip(plans, map(slice, starts, ends), strict=True))

    def taps(self, units: Units) -> dict[str, Tensor]:
        return {name: tap(units.count, plan.width, self.device, self.dtype) for name, plan in self.plans.items()}

    def of_dense(self, directions: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([own.of_dense(directions[name]) for name, own in self.parameters.items()], dim=1)

    def described(self) -> dict[str, Any]:
        return described_plans(self.plans, self.seed)


def described_plans(plans: Mapping[str, Plan], seed: int) -> dict[str, Any]:
    """What `described_sides` makes the projection of, as JSON."""
    return {
        "version": VERSION,
        "seed": seed,
        "parameters": {name: asdict(plan) for name, plan in plans.items()},
    }


def described_sides(description: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> PerParameter:
    """
    Raises:
        ValueError: it is of a version that drew otherwise.
    """
    refuse_other_version(description)
    plans = {
        name: Plan(tuple(plan["shape"]), tuple(plan["sides"]), plan["width"])
        for name, plan in description["parameters"].items()
    }
    return PerParameter(plans, description["seed"], device, dtype)
