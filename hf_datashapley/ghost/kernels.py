"""Scores as gradients: autograd functions whose backward also returns the samples' inner products.

Every scored layer takes one more input, the *tap*: a zero leaf of shape [samples, directions] that the output does not
depend on. In the backward pass the layer returns its scores as the tap's "gradient", and autograd itself adds them up
over layers, repeated uses, tied parameters and recomputed segments. There is no hook, no side effect and no order of
layers to get right.

Two kernels (design trade-off: bits against time):

- "project" (`ScoreOutput`) leaves the layer's own computation alone and adds an identity after it; the training run
  stays bit for bit what it was, for one more matrix product per linear layer and direction.
- "fused" (`ScoredLinear`) forms the weight gradient, which training computes anyway, sample by sample and takes each
  sample's inner product on the way; no further matrix product, a different order of summation.

Order "second" and "path" know their directions only when the backward pass is over. `KeptOutput` and `KeptLinear` are
the same two kernels without a score: they hand what a score needs to a `keep` function (see `kept`).

Shapes: B samples, P positions, I inputs, O outputs, L and R the two sides of a weight gradient, K directions.
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

from .rules import positions


# Elements of a weight gradient that are formed at a time: 1 MiB in float32, which stays in cache between its matrix
# product and its inner products.
BLOCK = 262_144
# Samples whose gradients are formed together, where each is no larger than a block.
GROUP = 8
# Samples whose larger gradients are summed before the sum starts again from zero: a sample's inner product is the
# difference of two sums', so its rounding error grows with them (measured: by a factor of 2 to 3).
CHAIN = 4


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
    """Linear layer whose backward forms the weight gradient sample by sample.

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
    ) -> Tensor:
        x, ctx.input_dtype = cast_input(x)
        ctx.save_for_backward(x, weight, weight_direction, bias_direction)
        ctx.transposed = transposed
        return linear(x, weight, bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor, None, None, None]:
        x, weight, weight_direction, bias_direction = ctx.saved_tensors
        x_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = input_gradient(b, weight, ctx.transposed).to(ctx.input_dtype)
        x_BPI, b_BPO = positions(x), positions(b)
        left, right = (x_BPI, b_BPO) if ctx.transposed else (b_BPO, x_BPI)
        weight_gradient, scores_BK = sample_weight_gradients(left, right, weight_direction)
        if ctx.needs_input_grad[2]:
            bias_gradient_BO = b_BPO.sum(1, dtype=weight_direction.dtype)
            bias_gradient = bias_gradient_BO.sum(0).to(weight.dtype)
            if bias_direction is not None:
                with autocast_off(b):
                    scores_BK += bias_gradient_BO @ bias_direction.T
        return x_gradient, weight_gradient.to(weight.dtype), bias_gradient, scores_BK, None, None, None


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
    """Linear layer whose backward hands the samples' own weight gradients, [B, *weight.shape], to `keep`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        keep: Callable[[Tensor, Tensor | None], None],
    ) -> Tensor:
        x, ctx.input_dtype = cast_input(x)
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.keep = transposed, keep
        return linear(x, weight, bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        x_gradient = bias_gradient = bias_gradient_BO = None
        if ctx.needs_input_grad[0]:
            x_gradient = input_gradient(b, weight, ctx.transposed).to(ctx.input_dtype)
        x_BPI, b_BPO = positions(x), positions(b)
        left, right = (x_BPI, b_BPO) if ctx.transposed else (b_BPO, x_BPI)
        gradients_BLR = torch.bmm(left.transpose(1, 2), right)
        if ctx.needs_input_grad[2]:
            bias_gradient_BO = b_BPO.sum(1, dtype=weight.dtype)
            bias_gradient = bias_gradient_BO.sum(0)
        ctx.keep(gradients_BLR, bias_gradient_BO)
        return x_gradient, gradients_BLR.sum(0, dtype=weight.dtype), bias_gradient, None, None


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


def sample_weight_gradients(left_BPL: Tensor, right_BPR: Tensor, direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    """The batch's weight gradient [L, R], and each sample's inner product with each direction [B, K].

    Sample i's gradient is left_i^T right_i. A few of them exist at a time where they fit into the cache, otherwise a
    block of rows of their sum. In half precision, products are formed in it, and summed up in the directions' type.
    """
    if torch.compiler.is_compiling():
        return weight_gradients_operator(left_BPL, right_BPR, direction_KLR)
    if left_BPL.dtype != direction_KLR.dtype:
        return half_weight_gradients(left_BPL, right_BPR, direction_KLR)
    if left_BPL.shape[2] * right_BPR.shape[2] <= BLOCK:
        return small_weight_gradients(left_BPL, right_BPR, direction_KLR)
    return large_weight_gradients(left_BPL, right_BPR, direction_KLR)


@torch.library.custom_op("hf_datashapley::sample_weight_gradients", mutates_args=())
def weight_gradients_operator(left_BPL: Tensor, right_BPR: Tensor, direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    """`sample_weight_gradients` as one node of a compiled graph, which runs as it does without.

    Traced, its loops over samples and blocks would be unrolled: thousands of nodes for a vocabulary's layer, and
    others for each batch size.
    """
    return sample_weight_gradients(left_BPL, right_BPR, direction_KLR)


@weight_gradients_operator.register_fake
def _(left_BPL: Tensor, right_BPR: Tensor, direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    num_directions, num_left, num_right = direction_KLR.shape
    return direction_KLR.new_empty(num_left, num_right), direction_KLR.new_empty(left_BPL.shape[0], num_directions)


def small_weight_gradients(left_BPL: Tensor, right_BPR: Tensor, direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    """One batched matrix product for `GROUP` samples at a time."""
    total_LR: Tensor | None = None
    scores = []
    direction_NK = direction_KLR.flatten(1).T
    for left, right in zip(left_BPL.split(GROUP), right_BPR.split(GROUP), strict=True):
        gradients = torch.bmm(left.transpose(1, 2), right)
        scores.append(gradients.flatten(1) @ direction_NK)
        total_LR = gradients.sum(0) if total_LR is None else total_LR.add_(gradients.sum(0))
    assert total_LR is not None
    return total_LR, torch.cat(scores)


def half_weight_gradients(left_BPL: Tensor, right_BPR: Tensor, direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    """One sample and block of rows at a time: a sum in half precision could not be taken apart again."""
    num_left, num_right = left_BPL.shape[2], right_BPR.shape[2]
    total_LR = direction_KLR.new_zeros(num_left, num_right)
    scores_BK = direction_KLR.new_zeros(len(left_BPL), len(direction_KLR))
    rows = min(num_left, max(1, BLOCK // num_right))
    for start in range(0, num_left, rows):
        block = slice(start, start + rows)
        direction_KN = direction_KLR[:, block].flatten(1)
        for i, (left, right) in enumerate(zip(left_BPL, right_BPR, strict=True)):
            gradient = (left[:, block].t() @ right).to(direction_KLR.dtype)
            scores_BK[i] += direction_KN @ gradient.flatten()
            total_LR[block] += gradient
    return total_LR, scores_BK


def large_weight_gradients(left_BPL: Tensor, right_BPR: Tensor, direction_KLR: Tensor) -> tuple[Tensor, Tensor]:
    """A sample's gradient is added to the sum by its matrix product; its score is how far that moved the sum's.

    A block of rows at a time, so that it is still in cache when it meets the direction.
    """
    batch, _, num_left = left_BPL.shape
    num_right, num_directions = right_BPR.shape[2], direction_KLR.shape[0]
    total_LR = left_BPL.new_empty(num_left, num_right)
    scores_BK = left_BPL.new_zeros(batch, num_directions)
    rows = min(num_left, max(1, BLOCK // num_right))
    # Only a batch longer than one chain needs a sum of its own beside the total.
    block = left_BPL.new_empty(rows, num_right) if batch > CHAIN else total_LR
    products_BK = left_BPL.new_empty(min(batch, CHAIN), num_directions)
    for start in range(0, num_left, rows):
        stop = min(start + rows, num_left)
        total = total_LR[start:stop]
        direction = direction_KLR[:, start:stop].flatten(1)
        for first in range(0, batch, CHAIN):
            chain = range(first, min(first + CHAIN, batch))
            gradient = block[: stop - start] if first else total
            for i in chain:
                left = left_BPL[i, :, start:stop].t()
                if i == first:
                    torch.mm(left, right_BPR[i], out=gradient)
                else:
                    gradient.addmm_(left, right_BPR[i])
                for k, u in enumerate(direction):
                    torch.dot(u, gradient.view(-1), out=products_BK[i - first, k])
            products = products_BK[: len(chain)]
            scores_BK[first : first + len(chain)] += products
            scores_BK[first + 1 : first + len(chain)] -= products[:-1]
            if first:
                total += gradient
    return total_LR, scores_BK
