"""Squared gradients of units in given bases: the eigenvalues of EK-FAC.

    lambda = sum_i (Q_L^T G_i Q_R)^2        elementwise, G_i [L, R] the gradient of unit i over all uses

(George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", arXiv 1806.03884.)
A unit's gradient is formed in the basis at once, from its rotated sides, a block of rows at a time.

Shapes: U units, L and R the sides of a weight's gradient, N rows of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ghost.kernels import BLOCK, gradients_of_units
from ...ghost.units import Units
from .uses import Outer, Summed, Use


# Entries of all units' gradients that are formed at a time, see `ghost.whole`.
ENTRIES = 8 * BLOCK


def add_squares(values: Tensor, uses: Sequence[Use], bases: list[Tensor | None], units: Units) -> None:
    """Adds those of a batch to `values`, [L, R]; a tied parameter's gradient is that of all uses. (Vectors' blocks are
    exact, and have none.)"""
    outer: list[tuple[Tensor, Tensor]] = []
    looked: list[tuple[Tensor, Tensor]] = []
    for use in uses:
        assert not isinstance(use, Summed)
        right = use.right if bases[1] is None else use.right @ bases[1]
        if isinstance(use, Outer):
            outer.append((use.left if bases[0] is None else use.left @ bases[0], right))
        else:
            looked.append((use.ids, right))
    if not looked:
        add_outer(values, outer, units)
    elif outer or len(looked) > 1:
        add_tied(values, outer, looked, units)
    else:
        add_looked(values, *looked[0], units)


def add_outer(values: Tensor, sides: list[tuple[Tensor, Tensor]], units: Units) -> None:
    rows = max(1, ENTRIES // (units.count * values.shape[1]))
    for start in range(0, len(values), rows):
        own = slice(start, start + rows)
        total_UNR: Tensor | None = None
        for left, right in sides:
            found = gradients_of_units(left[..., own], right, units)
            total_UNR = found if total_UNR is None else total_UNR.add_(found)
        if total_UNR is not None:
            values[own] += total_UNR.square_().sum(0)


def add_looked(values: Tensor, ids: Tensor, right: Tensor, units: Units) -> None:
    """Only rows that were looked up have a gradient."""
    for own_ids, own in zip(units.parts(ids), units.parts(right), strict=True):
        rows, place = own_ids.flatten().unique(return_inverse=True)
        sums = own.new_zeros(len(rows), own.shape[-1]).index_add_(0, place, own.reshape(-1, own.shape[-1]))
        values.index_add_(0, rows, sums.square_())


def add_tied(
    values: Tensor, outer: list[tuple[Tensor, Tensor]], looked: list[tuple[Tensor, Tensor]], units: Units
) -> None:
    """A unit after the other, for its gradient has the size of the table."""
    gradient = torch.empty_like(values)
    parts = [(units.parts(left), units.parts(right)) for left, right in outer]
    tables = [(units.parts(ids), units.parts(right)) for ids, right in looked]
    for i in range(units.count):
        gradient.zero_()
        for left, right in parts:
            gradient.addmm_(left[i].reshape(-1, left[i].shape[-1]).T, right[i].reshape(-1, right[i].shape[-1]))
        for ids, right in tables:
            gradient.index_add_(0, ids[i].flatten(), right[i].reshape(-1, right[i].shape[-1]))
        values.addcmul_(gradient, gradient)
