"""Random projections P of gradients, a few numbers for each parameter, with which products can be taken later:

    E <P g, P u> = <g, u>       over the draws of P, for any g and u

A weight's gradient g [L, R] is a sum of outer products over positions, so a side is projected before the two meet, as
in "LoGra" (Choe et al., "What is Your Data Worth to GPT?", arXiv 2405.13954), and what comes of it is sketched:

    P g = C (A g)     A [L', L] of random signs (or g B, if the right side is the longer), C a count sketch to `width`
    P g = C g         a bias, or the weight of a norm

LoGra projects both sides to about the root of `width`, and sketches nothing. The noise of <P g, P u> is then that of
two sides so narrow, |g| |u| / width^(1/4) where g and u are of low rank. Here the noise is no more than that of one
wider side and, of the sketch, |g| |u| / sqrt(width); and leaving one side as it is takes fewer products, L L' + L' R
for a position, than projecting both.

Where a parameter has as many features as entries, P only turns its gradient around and products are exact. No matrix
of the size of a parameter exists, unless the parameter is smaller than a side.

Everything is drawn on the CPU from bits of a generator of its own, for each parameter from the seed and the name:
the same on every device, and for whatever else is projected beside it.

Shapes: U units, L and R the sides of a weight's gradient, N entries, K directions, F features.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kernels import gradients_of_units
from .units import Units


# Least and greatest width of a projected side; in between it grows with the features. Measured on a small GPT-2 with
# 8,192 features: the rank correlation of values with those of a run that knew the rows is 0.93 with sides of 64, 0.94
# with 128, 0.95 with sides that are not projected.
SIDES = (64, 128)
# How many times longer than a linear layer's gradient, for its size, those of embeddings (tied to the head or not) and
# of vectors are taken to be. Measured on a small GPT-2 under AdamW and SGD: with 2,048 features the rank correlation
# of values goes from 0.74 to 0.79 and from 0.81 to 0.88.
EMBEDDING, VECTOR = 4, 2


@dataclass(frozen=True)
class Plan:
    """How one parameter's gradient, of this shape, becomes `width` numbers: by `sides`; or, without, by the sketch."""

    shape: tuple[int, ...]
    sides: tuple[int, ...]
    width: int


def plan(
    shapes: Mapping[str, tuple[int, ...]], embeddings: set[str], matrices: set[str], width: int
) -> dict[str, Plan]:
    """Shares `width` features out among parameters; the gradients of `embeddings` and `matrices` have two sides.

    The variance of a whole product, the sum of |g|^2 |u|^2 / width over parameters, is smallest with width in
    proportion to |g| |u|. Before training it is taken to go by the root of a parameter's number of entries, times
    `EMBEDDING` or `VECTOR`. None gets more than it has entries, so that `width` is met exactly if the model is not
    smaller.

    Raises:
        ValueError: there are fewer features than parameters.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if width < len(sizes):
        raise ValueError(
            f"feature_dim={width} is less than one feature for each of {len(sizes)} scored parameters: set "
            f"feature_dim={len(sizes)} at least, or choose fewer modules with `value_modules`"
        )
    claims = {
        name: math.sqrt(size) * (EMBEDDING if name in embeddings else 1 if name in matrices else VECTOR)
        for name, size in sizes.items()
    }
    widths: dict[str, int] = {}
    left, claimed = width, sum(claims.values())
    # Those that are soonest satisfied first: what they cannot use is the others'.
    order = sorted(sizes, key=lambda name: sizes[name] / claims[name])
    for number, name in enumerate(order):
        others = len(order) - number - 1
        fair = round(left * claims[name] / claimed)
        widths[name] = min(sizes[name], max(1, min(fair, left - others)))
        left, claimed = left - widths[name], claimed - claims[name]
    two_sided = embeddings | matrices
    return {
        name: Plan(tuple(shape), sides_of(shape, widths[name]) if name in two_sided else (), widths[name])
        for name, shape in shapes.items()
    }


def sides_of(shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The longer side is projected, to no fewer entries than features; the other one is taken as it is."""
    left, right = shape
    if left < right:
        right, left = sides_of((right, left), width)
        return left, right
    narrowest, widest = SIDES
    side = min(widest, max(narrowest, round(4 * math.sqrt(width))))
    return min(left, max(side, math.ceil(width / right))), right


class Bits:
    """Random numbers that stay the same from version to version, device to device."""

    def __init__(self, *key: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def signs(self, *shape: int) -> Tensor:
        """+1 and -1, int8."""
        count = math.prod(shape)
        raw = self._bits.random_raw(count // 64 + 1).astype("<u8").view(np.uint8)
        return torch.from_numpy(np.unpackbits(raw, count=count).astype(np.int8) * 2 - 1).view(shape)

    def permutation(self, count: int) -> Tensor:
        return torch.from_numpy(np.argsort(self._bits.random_raw(count), kind="stable"))


class Sketch:
    """Count sketch: each of N entries is added, with a random sign, to one of `width` numbers; these as evenly filled
    as they can be. Entries that have a number each are only shuffled, and products stay exact."""

    def __init__(self, bits: Bits, count: int, width: int, device: torch.device):
        self.width = width
        self.order_N = bits.permutation(count).to(device, torch.int32)
        self.signs_N = bits.signs(count).to(device)
        self.padding = -count % width

    def __call__(self, x: Tensor) -> Tensor:
        """[..., N] -> [..., width]"""
        x = x.index_select(-1, self.order_N) * self.signs_N
        if self.padding:
            x = torch.nn.functional.pad(x, (0, self.padding))
        return x.unflatten(-1, (-1, self.width)).sum(-2)


class ParameterProjection:
    """P of one parameter."""

    def __init__(self, plan: Plan, bits: Bits, device: torch.device, dtype: torch.dtype):
        self.plan = plan
        self.dtype = dtype
        self._sides: list[Tensor | None] = [  # [N, N'], or None for the side itself
            None if count == n else (bits.signs(n, count) / math.sqrt(count)).to(device, dtype)
            for n, count in zip(plan.shape, plan.sides, strict=False)
        ]
        self._sketch = Sketch(bits, math.prod(plan.sides or plan.shape), plan.width, device)

    def of_sums(self, sums: Tensor) -> Tensor:
        """Of units' gradients [U, *shape] as they are: [U, width]."""
        return self._sketch(sums.to(self.dtype).flatten(1))

    def of_outer(self, left: Tensor, right: Tensor, units: Units) -> Tensor:
        """Of the sums of outer products over each unit's positions, [R, ..., L] and [R, ..., R]: [U, width]."""
        return self._of_sides(self._side(0, left), self._side(1, right), units)

    def of_rows(self, ids: Tensor, right: Tensor, units: Units) -> Tensor:
        """The same where the left side has a 1 at `ids` [R, ...]."""
        table = self._sides[0]
        if table is None:
            left = torch.nn.functional.one_hot(ids, self.plan.shape[0]).to(self.dtype)
        else:
            left = torch.nn.functional.embedding(ids, table)
        return self._of_sides(left, self._side(1, right), units)

    def of_dense(self, directions: Tensor) -> Tensor:
        """Of directions [K, *shape]: [K, width]."""
        x = directions.to(self.dtype)
        if self.plan.sides:
            left, right = self._sides
            if right is not None:
                x = x @ right
            if left is not None:
                x = left.T @ x
        return self._sketch(x.flatten(1))

    def _side(self, number: int, x: Tensor) -> Tensor:
        side = self._sides[number]
        return x.to(self.dtype) if side is None else x.to(self.dtype) @ side

    def _of_sides(self, left: Tensor, right: Tensor, units: Units) -> Tensor:
        return self._sketch(gradients_of_units(left, right, units).flatten(1))


class Projection:
    """P of all parameters, one after the other.

    Args:
        plans: by parameter name, in order.
        seed: of the draw.
        device, dtype: of what is projected; float32 or float64.
    """

    def __init__(self, plans: dict[str, Plan], seed: int, device: torch.device, dtype: torch.dtype):
        self.plans = plans
        self.seed = seed
        self.parameters = {
            name: ParameterProjection(plan, Bits(seed, zlib.crc32(name.encode())), device, dtype)
            for name, plan in plans.items()
        }
        self.width = sum(plan.width for plan in plans.values())
        self.device, self.dtype = device, dtype

    def taps(self, units: Units) -> dict[str, Tensor]:
        """A zero leaf for each parameter's features, [U, width]."""
        return {
            name: torch.zeros(units.count, plan.width, dtype=self.dtype, device=self.device, requires_grad=True)
            for name, plan in self.plans.items()
        }

    def of_dense(self, directions: Mapping[str, Tensor]) -> Tensor:
        """Directions [K, *shape] by name: [K, F]."""
        return torch.cat([own.of_dense(directions[name]) for name, own in self.parameters.items()], dim=1)


def described_plans(plans: Mapping[str, Plan], seed: int) -> dict[str, Any]:
    """What `described_projection` makes the projection of, as JSON."""
    return {"seed": seed, "parameters": {name: asdict(plan) for name, plan in plans.items()}}


def described_projection(description: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Projection:
    plans = {
        name: Plan(tuple(plan["shape"]), tuple(plan["sides"]), plan["width"])
        for name, plan in description["parameters"].items()
    }
    return Projection(plans, description["seed"], device, dtype)


def features_of(taps: Mapping[str, Tensor]) -> Tensor:
    """What backward passes left on the taps, [U, F]."""
    # No gradient where the loss reaches no use of a parameter.
    return torch.cat([torch.zeros_like(tap) if tap.grad is None else tap.grad for tap in taps.values()], dim=1)
