"""Scores as gradients: autograd functions whose backward also returns the samples' inner products.

Every scored layer takes one more input, the *tap*: a zero leaf of shape [units, directions] that the output does not
depend on. In the backward pass the layer returns its scores as the tap's "gradient", and autograd itself adds them up
over layers, repeated uses, tied parameters and recomputed segments. There is no hook, no side effect and no order of
layers to get right.

Two kernels (design trade-off: bits against time):

- "project" (`ScoreOutput`) leaves the layer's own computation alone and adds an identity after it; the training run
  stays bit for bit what it was, for one more matrix product per linear layer and direction.
- "fused" (`ScoredLinear`) forms the weight gradient, which training computes anyway, unit by unit (samples, or
  documents that share rows) and takes each one's inner product on the way; no further matrix product, a different
  order of summation.

Order "second" and "path" know their directions only when the backward pass is over. `KeptOutput` and `KeptLinear` are
the same two kernels without a score: they hand what a score needs to a `keep` function (see `kept`). `ProjectOutput`
does for features (see `projection`), beside either kernel, what "project" does for scores.

Shapes: U units, P positions of one, I inputs, O outputs, L and R the two sides of a weight gradient, K directions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .units import Rows, Units, positions


# Elements of a weight gradient that are formed at a time: 1 MiB in float32, which stays in cache between its matrix
# product and its inner products.
BLOCK = 262_144
# Units whose gradients are formed together, where each is no larger than a block.
GROUP = 8
# Units whose larger gradients are summed before the sum starts again from zero: a unit's inner product is the
# difference of two sums', so its rounding error grows with them (measured: by a factor of 2 to 3).
CHAIN = 4
# From so many directions on, gradients that are larger than a block are kept apart, not summed: one product with all
# directions then reads these once for a group of units. Measured on CPU, 8 and 16 rows, 1024 x 768 and 4096 x 128: it
# takes 1.1 to 1.4 times as long with 2 directions, 1.0 to 1.2 with 4, 0.8 to 1.1 with 8, 0.5 to 0.7 with 16.
MANY = 8


class ScoreOutput(Function):
    """Identity on a layer's output; its backward scores the layer from its input and output gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, tap: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.score = score
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (x,) = ctx.saved_tensors
        with autocast_off(b):
            return b, None, ctx.score(x, b), None


class ScoredLinear(Function):
    """Linear layer whose backward forms the weight gradient unit by unit.

    `weight` is [O, I], or [I, O] where `transposed` (Conv1D); its direction `weight_direction` is [K, *weight.shape],
    that of the bias, if it is scored, [K, O].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tap: Tensor,
        weight_direction: Tensor,
        bias_direction: Tensor | None,
        transposed: bool,
        units: Units,
    ) -> Tensor:
        x, ctx.input_dtype = cast_input(x)
        ctx.save_for_backward(x, weight, weight_direction, bias_direction)
        ctx.transposed, ctx.units = transposed, units
        return linear(x, weight, bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor, None, None, None, None]:
        x, weight, weight_direction, bias_direction = ctx.saved_tensors
        x_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = input_gradient(b, weight, ctx.transposed).to(ctx.input_dtype)
        left, right = (x, b) if ctx.transposed else (b, x)
        weight_gradient, scores_UK = weight_gradients(left, right, weight_direction, ctx.units)
        if ctx.needs_input_grad[2]:
            bias_gradient_UO = ctx.units.sum(b, dtype=weight_direction.dtype)
            bias_gradient = bias_gradient_UO.sum(0).to(weight.dtype)
            if bias_direction is not None:
                with autocast_off(b):
                    scores_UK += bias_gradient_UO @ bias_direction.T
        return x_gradient, weight_gradient.to(weight.dtype), bias_gradient, scores_UK, None, None, None, None


class KeptOutput(Function):
    """Identity on a layer's output; its backward hands the layer's input and output gradient to `keep`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, keep: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.keep = keep
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.keep(x, b)
        return b, None, None


class KeptLinear(Function):
    """Linear layer whose backward hands the units' own weight gradients, [U, *weight.shape], to `keep`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        units: Units,
        keep: Callable[[Tensor, Tensor | None], None],
    ) -> Tensor:
        x, ctx.input_dtype = cast_input(x)
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.units, ctx.keep = transposed, units, keep
        return linear(x, weight, bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        x_gradient = bias_gradient = bias_gradient_UO = None
        if ctx.needs_input_grad[0]:
            x_gradient = input_gradient(b, weight, ctx.transposed).to(ctx.input_dtype)
        left, right = (x, b) if ctx.transposed else (b, x)
        gradients_ULR = gradients_of_units(left, right, ctx.units)
        if ctx.needs_input_grad[2]:
            bias_gradient_UO = ctx.units.sum(b, dtype=weight.dtype)
            bias_gradient = bias_gradient_UO.sum(0)
        ctx.keep(gradients_ULR, bias_gradient_UO)
        return x_gradient, gradients_ULR.sum(0, dtype=weight.dtype), bias_gradient, None, None, None


class ProjectOutput(Function):
    """Identity on a layer's output; its backward gives each parameter's tap what `project` makes of the layer's input
    and output gradient, its units' features."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        project: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        *taps: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.project = project
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return b, None, None, *ctx.project(x, b)


def cast_input(x: Tensor) -> tuple[Tensor, torch.dtype]:
    """The input as autocast would have a linear layer see it, and its own type, which its gradient has to have."""
    kind = x.device.type
    return (x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x), x.dtype


def autocast_off(b: Tensor) -> AbstractContextManager[Any]:
    """For products in a backward pass that are not to be made in half precision.

    Compiled, it runs under its forward pass's autocast; otherwise under none, and nothing is spent on saying so.
    """
    return torch.autocast(b.device.type, enabled=False) if torch.compiler.is_compiling() else nullcontext()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    weight = weight.to(x.dtype)
    return F.linear(x, weight.t() if transposed else weight, None if bias is None else bias.to(x.dtype))


def input_gradient(b: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    weight = weight.to(b.dtype)
    return b @ (weight.t() if transposed else weight)


def pairs(left: Tensor, right: Tensor, units: Units) -> list[tuple[Tensor, Tensor]]:
    """Each unit's two sides of its gradient left^T right, [P, L] and [P, R]."""
    sides = zip(units.parts(left), units.parts(right), strict=True)
    return [(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])) for x, y in sides]


def gradients_of_units(left: Tensor, right: Tensor, units: Units) -> Tensor:
    """left^T right over each unit's positions, [U, L, R]."""
    if isinstance(units, Rows):
        return torch.bmm(positions(left).transpose(1, 2), positions(right))
    return torch.stack([left_PL.t() @ right_PR for left_PL, right_PR in pairs(left, right, units)])


def weight_gradients(left: Tensor, right: Tensor, direction_KLR: Tensor, units: Units) -> tuple[Tensor, Tensor]:
    """The batch's weight gradient [L, R], and each unit's inner product with each direction [U, K].

    A unit's gradient is left^T right over its positions. A few of them exist at a time where they fit into the cache,
    otherwise a block of rows of their sum. In half precision, products are formed in it, and summed up in the
    directions' type.
    """
    if torch.compiler.is_compiling():
        assert isinstance(units, Rows)
        return weight_gradients_operator(left, right, direction_KLR)
    if left.dtype != direction_KLR.dtype:
        return half_weight_gradients(pairs(left, right, units), direction_KLR)
    if isinstance(units, Rows) and left.shape[-1] * right.shape[-1] <= BLOCK:
        return small_weight_gradients(positions(left), positions(right), direction_KLR)
    if len(direction_KLR) >= MANY:
        return many_weight_gradients(pairs(left, right, units), direction_KLR)
    return large_weight_gradients(pairs(left, right, units), direction_KLR)


@torch.library.custom_op("hf_datashapley::weight_gradients", mutates_args=())
def weight_gradients_operator(left: Tensor, right: Tensor, direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    """`weight_gradients` of rows as one node of a compiled graph, which runs as it does without.

    Traced, its loops over rows and blocks would be unrolled: thousands of nodes for a vocabulary's layer, and others
    for each batch size.
    """
    return weight_gradients(left, right, direction_KLR, Rows(len(left)))


@weight_gradients_operator.register_fake
def _(left: Tensor, right: Tensor, direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    num_directions, num_left, num_right = direction_KLR.shape
    return direction_KLR.new_empty(num_left, num_right), direction_KLR.new_empty(left.shape[0], num_directions)


def small_weight_gradients(left_UPL: Tensor, right_UPR: Tensor, direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    """One batched matrix product for `GROUP` units at a time, which are of one length."""
    total_LR: Tensor | None = None
    scores = []
    direction_NK = direction_KLR.flatten(1).T
    for left, right in zip(left_UPL.split(GROUP), right_UPR.split(GROUP), strict=True):
        gradients = torch.bmm(left.transpose(1, 2), right)
        scores.append(gradients.flatten(1) @ direction_NK)
        total_LR = gradients.sum(0) if total_LR is None else total_LR.add_(gradients.sum(0))
    assert total_LR is not None
    return total_LR, torch.cat(scores)


def half_weight_gradients(sides: list[tuple[Tensor, Tensor]], direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    """One unit and block of rows at a time: a sum in half precision could not be taken apart again."""
    num_directions, num_left, num_right = direction_KLR.shape
    total_LR = direction_KLR.new_zeros(num_left, num_right)
    scores_UK = direction_KLR.new_zeros(len(sides), num_directions)
    rows = min(num_left, max(1, BLOCK // num_right))
    for start in range(0, num_left, rows):
        block = slice(start, start + rows)
        direction_KN = direction_KLR[:, block].flatten(1)
        for i, (left_PL, right_PR) in enumerate(sides):
            gradient = (left_PL[:, block].t() @ right_PR).to(direction_KLR.dtype)
            scores_UK[i] += direction_KN @ gradient.flatten()
            total_LR[block] += gradient
    return total_LR, scores_UK


def many_weight_gradients(sides: list[tuple[Tensor, Tensor]], direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    """A block of rows at a time of a few units' gradients, which meet all directions in one matrix product."""
    num_directions, num_left, num_right = direction_KLR.shape
    total_LR = direction_KLR.new_zeros(num_left, num_right)
    scores_UK = direction_KLR.new_zeros(len(sides), num_directions)
    group = min(len(sides), 2 * GROUP)
    rows = min(num_left, max(1, 4 * BLOCK // (group * num_right)))
    for start in range(0, num_left, rows):
        block = slice(start, start + rows)
        total = total_LR[block]
        direction_NK = direction_KLR[:, block].flatten(1).T
        gradients = direction_KLR.new_empty(group, len(total), num_right)
        for first in range(0, len(sides), group):
            some = sides[first : first + group]
            for gradient, (left_PL, right_PR) in zip(gradients, some, strict=False):
                torch.mm(left_PL[:, block].t(), right_PR, out=gradient)
            scores_UK[first : first + len(some)] += gradients[: len(some)].flatten(1) @ direction_NK
            total += gradients[: len(some)].sum(0)
    return total_LR, scores_UK


def large_weight_gradients(sides: list[tuple[Tensor, Tensor]], direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    """A unit's gradient is added to the sum by its matrix product; its score is how far that moved the sum's.

    A block of rows at a time, so that it is still in cache when it meets the direction.
    """
    count, (num_directions, num_left, num_right) = len(sides), direction_KLR.shape
    total_LR = direction_KLR.new_empty(num_left, num_right)
    scores_UK = direction_KLR.new_zeros(count, num_directions)
    rows = min(num_left, max(1, BLOCK // num_right))
    # Only more units than one chain need a sum of its own beside the total.
    block = direction_KLR.new_empty(rows, num_right) if count > CHAIN else total_LR
    products_UK = direction_KLR.new_empty(min(count, CHAIN), num_directions)
    for start in range(0, num_left, rows):
        stop = min(start + rows, num_left)
        total = total_LR[start:stop]
        direction = direction_KLR[:, start:stop].flatten(1)
        for first in range(0, count, CHAIN):
            chain = range(first, min(first + CHAIN, count))
            gradient = block[: stop - start] if first else total
            for i in chain:
                left_PL, right_PR = sides[i]
                left = left_PL[:, start:stop].t()
                if i == first:
                    torch.mm(left, right_PR, out=gradient)
                else:
                    gradient.addmm_(left, right_PR)
                for k, u in enumerate(direction):
                    torch.dot(u, gradient.view(-1), out=products_UK[i - first, k])
            products = products_UK[: len(chain)]
            scores_UK[first : first + len(chain)] += products
            scores_UK[first + 1 : first + len(chain)] -= products[:-1]
            if first:
                total += gradient
    return total_LR, scores_UK
