"""Second moments of the sides of a parameter's gradient: K-FAC's factors.

    L = sum_p l_p l_p^T     R = sum_p r_p r_p^T     M positions

(Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", arXiv 1503.05671.) Of a
vector (a bias, the weight of a norm) there is one side, and it is the units' own gradients: that block of the Fisher
matrix is exact, [C, C].

Positions count that a row's loss may depend on, by what the row is and not by whether a gradient comes out as 0, which
is a matter of rounding (of a query that attends to nothing but itself): none of padding, and in a model that predicts
the next token none behind the last prediction. A layer that sees no such positions counts all that it sees.

A side is kept as its diagonal alone if it is longer than `WIDEST`, or if it is the rows of a table that is looked up
by ids: there it has no more than a diagonal. A tied head's outputs have, but they share it.

Shapes: U units, B rows of T positions, P positions, L and R the sides of a weight's gradient, C channels of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ghost.units import Units
from ...loss_tokens import IGNORED, loss_positions
from .uses import Outer, Summed, Use


# 256 MiB in float32, and minutes for its eigenvectors on a CPU.
WIDEST = 8192


class Moments:
    """Of one parameter, summed over what is added.

    Args:
        sides: how long they are; one for a vector.
        table: whether it is looked up by ids.
    """

    def __init__(self, sides: Sequence[int], table: bool, device: torch.device, dtype: torch.dtype):
        self.sides = [
            torch.zeros((n,) if n > WIDEST or (table and i == 0) else (n, n), device=device, dtype=dtype)
            for i, n in enumerate(sides)
        ]
        self.positions = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, uses: Sequence[Use], counted: Tensor) -> None:
        """All uses in a batch. Those of a vector are one gradient; those of a weight are taken for other positions."""
        vectors = [use.sums for use in uses if isinstance(use, Summed)]
        if vectors:
            add_moment(self.sides[0], torch.stack(vectors).sum(0))
        for use in uses:
            if isinstance(use, Summed):
                continue
            own = counted if counted.shape == use.right.shape[:-1] else torch.ones_like(use.right[..., 0])
            weight_P1 = own.to(use.right.dtype).flatten().unsqueeze(1)
            if isinstance(use, Outer):
                add_moment(self.sides[0], use.left.flatten(0, -2) * weight_P1)
            else:
                self.sides[0].index_add_(0, use.ids.flatten(), weight_P1.flatten())
            add_moment(self.sides[1], use.right.flatten(0, -2) * weight_P1)
            self.positions += weight_P1.sum()


def counted_positions(inputs: Mapping[str, Any], units: Units, shifted: bool) -> Tensor:
    """Bool, [B, T]; [B] where the rows are not known to have positions.

    `shifted`: as in `losses.token_losses`.
    """
    labels = inputs["labels"]
    if shifted:
        parts = [part.long() for part in units.parts(loss_positions(labels.clone(), shifted))]
        behind = [part.flip(0).cumsum(0).flip(0) - part for part in parts]
        counted = torch.cat(behind).view(labels.shape).gt(0)
    else:
        counted = labels.ne(IGNORED).view(len(labels), -1).any(1)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.bool() & (counted if shifted else counted.unsqueeze(1))
    return counted if shifted or labels.ndim == 1 else counted.unsqueeze(1).expand(labels.shape)


def add_moment(moment: Tensor, x_PN: Tensor) -> None:
    """Adds sum_p x_p x_p^T, or its diagonal."""
    if moment.ndim == 1:
        moment += x_PN.square().sum(0)
    else:
        moment.addmm_(x_PN.T, x_PN)
