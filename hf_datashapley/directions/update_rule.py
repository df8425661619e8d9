"""What the optimizer makes of any gradient, its own state held as it stands before the step.

    D(x)    the parameter change that gradient x brings about; D(0): what momentum and weight decay do alone
    w(s)    w_t + D(0) + s (D(cG) - D(0)), the path from D(0)'s weights to those that the step is about to make
    S       (D(cG) - D(0)) / (cG), elementwise: the samples' share of the step per unit of gradient (the secant)

With x = cG, t the number of the step that is about to be made, and Adam's moments m, v as they stand:

    SGD      D(x) = -lr y,  y = x + wd w;  with momentum y enters the buffer as torch has it.     S is a number.
    AdamW    D(x) = -lr wd w - lr / (1-b1^t) * (b1 m + (1-b1) x) / (sqrt((b2 v + (1-b2) x^2) / (1-b2^t)) + eps)
    Adam     the same without decay, with y = x + wd w for x (coupled L2)

The difference D(x) - D(0) cancels where x is small, so S has a closed form of its own; with y0 = wd w (0 in AdamW),
y = y0 + x, n0 = b1 m + (1-b1) y0, r0 and r the roots for y0 and y, d0 = r0 + eps, d = r + eps:

    S = -lr/(1-b1^t) [ (1-b1)/d - n0 (1-b2) (2 y0 + x) / ((1-b2^t) (r0 + r) d d0) ]

with the second term 0 where r0 + r = 0. Everything is elementwise, in the parameters' own precision; the bias
corrections are 0-dimensional float64 tensors, so that nothing waits for a device.

Half precision: weights, gradients and state are read as they are, D and S are computed in float32. A model whose
weights are in half precision can only be put at such weights: there w(s) is rounded, once. The optimizer rounds its
own step too; where that is finer than the grid of the weights, they do not move. Values are of the step before
rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ..full_precision import full_dtype, in_full, inner_products
from .optimizers import Momentum, check_groups, check_optimizer_class, power_complement, row_blocks, taken_up


@dataclass
class LinearStep:
    """D(x) = offset + slope * x, with offset = weight_part * w + buffer_part * momentum buffer."""

    slope: float | Tensor
    weight_part: float | Tensor
    buffer_part: float | Tensor
    buffer: Tensor | None

    def change(self, x: Tensor, weight: Tensor, buffer: Tensor | None) -> Tensor:
        change = x * self.slope
        if self.buffer is not None:
            assert buffer is not None
            change.add_(buffer * self.buffer_part)
        return change.add_(weight * self.weight_part)


@dataclass
class AdamStep:
    """The constants of one parameter's Adam step, and its moments (None before the first)."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    decoupled_decay: float
    coupled_decay: float
    bias1: Tensor  # 1 - b1^t
    bias2: Tensor  # 1 - b2^t
    moments: tuple[Tensor, Tensor] | None


@dataclass
class Block:
    """Rows of one parameter: weight, clipped gradient, moments (zeros before the first step)."""

    weight: Tensor
    gradient: Tensor
    first_moment: Tensor
    second_moment: Tensor


def sgd_step(group: dict[str, Any], state: dict[str, Any]) -> LinearStep:
    """torch's SGD as it is about to step; `state` is the parameter's, before the step."""
    lr, mu = group["lr"], group["momentum"]
    buffer = state.get("momentum_buffer") if mu else None
    enters = taken_up(group, state) if mu else 1.0
    slope = 1 + mu * enters if group["nesterov"] else enters
    kept = (mu * mu if group["nesterov"] else mu) if buffer is not None else 0.0
    return LinearStep(-lr * slope, -lr * slope * group["weight_decay"], -lr * kept, buffer)


def adam_step(group: dict[str, Any], state: dict[str, Any]) -> AdamStep:
    """torch's Adam or AdamW as it is about to step."""
    beta1, beta2 = group["betas"]
    steps = state["step"].double() + 1 if "step" in state else torch.ones((), dtype=torch.float64)
    decoupled = group["decoupled_weight_decay"]
    return AdamStep(
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        decoupled_decay=group["weight_decay"] if decoupled else 0.0,
        coupled_decay=0.0 if decoupled else group["weight_decay"],
        bias1=power_complement(beta1, steps),
        bias2=power_complement(beta2, steps),
        moments=(state["exp_avg"], state["exp_avg_sq"]) if "exp_avg" in state else None,
    )


def adam_change(step: AdamStep, x: Tensor, block: Block) -> Tensor:
    """D(x) of Adam and AdamW, for any x of the block's shape."""
    y = torch.add(x, block.weight, alpha=step.coupled_decay) if step.coupled_decay else x
    denominator = torch.addcmul(block.second_moment * step.beta2, y, y, value=1 - step.beta2)
    denominator.div_(step.bias2).sqrt_().add_(step.eps)
    numerator = torch.add(block.first_moment * step.beta1, y, alpha=1 - step.beta1)
    change = numerator.mul_(-step.lr / step.bias1).div_(denominator)
    if step.decoupled_decay:
        change.add_(block.weight * (-step.lr * step.decoupled_decay))
    return change


def adam_secant(step: AdamStep, block: Block) -> Tensor:
    """S of Adam and AdamW."""
    x = block.gradient
    y0 = block.weight * step.coupled_decay if step.coupled_decay else torch.zeros_like(x)
    y = y0 + x
    kept = block.second_moment * step.beta2
    r0 = torch.addcmul(kept, y0, y0, value=1 - step.beta2).div_(step.bias2).sqrt_()
    r = torch.addcmul(kept, y, y, value=1 - step.beta2).div_(step.bias2).sqrt_()
    n0 = torch.add(block.first_moment * step.beta1, y0, alpha=1 - step.beta1)
    d0, d = r0 + step.eps, r + step.eps
    bend = n0.mul_(y0.add_(y)).mul_((1 - step.beta2) / step.bias2).div_(r0.add_(r)).div_(d0)
    # 0 / 0 where neither the past nor this batch has moved a coordinate.
    bend.masked_fill_(r0 == 0, 0.0)
    return bend.neg_().add_(1 - step.beta1).div_(d).mul_(-step.lr / step.bias1)


class UpdateRule:
    """D, w(s) and S of every parameter that an optimizer trains; to be asked before it steps, with cG in `.grad`.

    Args:
        optimizer: the torch optimizer that trains.
        proxy: "auto" for its own step; "sgd" for that of plain SGD with its learning rates, whatever it is.

    Raises:
        ValueError: "auto", and the optimizer or one of its settings is not known.
    """

    def __init__(self, optimizer: Optimizer, proxy: Literal["auto", "sgd"] = "auto"):
        if proxy == "auto":
            check_optimizer_class(type(optimizer))
            check_groups(optimizer)
        self.optimizer = optimizer
        self.proxy = proxy
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that the optimizer trains."""
        return list(self._groups)

    @property
    def is_linear(self) -> bool:
        """Whether D is linear in the gradient, so that S is the same for every coalition of samples."""
        return self.proxy == "sgd" or isinstance(self.optimizer, SGD)

    @property
    def moving(self) -> list[nn.Parameter]:
        """The parameters that the next step changes: torch passes over those without a gradient."""
        return [p for p in self._groups if p.grad is not None]

    def step_of(self, parameter: nn.Parameter) -> LinearStep | AdamStep:
        group, state = self._groups[parameter], self.optimizer.state.get(parameter, {})
        if self.proxy == "sgd":
            return LinearStep(-group["lr"], 0.0, 0.0, None)
        if isinstance(self.optimizer, SGD):
            return sgd_step(group, state)
        return adam_step(group, state)

    def unrolled_over_immediate(self, parameter: nn.Parameter) -> float | Tensor:
        """The whole weight of a gradient once momentum has played out, over what acts in the next step."""
        group = self._groups[parameter]
        if self.proxy == "sgd":
            return 1.0
        if isinstance(self.optimizer, SGD):
            mu = group["momentum"]
            if not mu:
                return 1.0
            enters = taken_up(group, self.optimizer.state.get(parameter, {}))
            return enters / (1 - mu) / (1 + mu * enters if group["nesterov"] else enters)
        beta1 = group["betas"][0]
        step = adam_step(group, self.optimizer.state.get(parameter, {}))
        return step.bias1 / (1 - beta1)

    @torch.no_grad()
    def path_change(self, parameter: nn.Parameter, s: float, out: Tensor) -> None:
        """Writes w(s) - w_t of a moving parameter into `out`, of its shape and in full precision."""
        assert parameter.grad is not None
        step = self.step_of(parameter)
        if isinstance(step, LinearStep):
            buffer = None if step.buffer is None else in_full(step.buffer)
            out.copy_(step.change(in_full(parameter.grad) * s, in_full(parameter.detach()), buffer))
            return
        for block, change in zip(blocks_of(step, parameter), row_blocks(out, 0), strict=True):
            torch.mul(adam_change(step, block.gradient, block), s, out=change)
            if s != 1:
                change.add_(adam_change(step, torch.zeros_like(block.gradient), block), alpha=1 - s)

    def path_weights(self, s: float, out: dict[nn.Parameter, Tensor]) -> None:
        """Writes w(s) of all moving parameters into `out`, rounded once to each one's precision."""
        for parameter in self.moving:
            weights = out[parameter]
            full = full_dtype(weights.dtype)
            change = weights if weights.dtype == full else torch.empty_like(weights, dtype=full)
            self.path_change(parameter, s, change)
            torch.add(change, parameter.detach(), out=weights)

    @torch.no_grad()
    def scale_by_secant(self, parameter: nn.Parameter, directions: Tensor, momentum: Momentum) -> None:
        """Multiplies `directions` [K, *shape] by -S; by 0 where the optimizer does not move the parameter."""
        if parameter not in self._groups or parameter.grad is None:
            directions.zero_()
            return
        step = self.step_of(parameter)
        unrolled = self.unrolled_over_immediate(parameter) if momentum == "unrolled" else 1.0
        if isinstance(step, LinearStep):
            directions.mul_(-step.slope * unrolled)
            return
        for block, u in zip(blocks_of(step, parameter), row_blocks(directions, 1), strict=True):
            u.mul_(adam_secant(step, block).mul_(-unrolled))

    @torch.no_grad()
    def immediate_sum(
        self, directions: dict[str, Tensor], parameters: dict[str, nn.Parameter], momentum: Momentum
    ) -> Tensor:
        """What the values of all samples of the update add up to, [K], counted as "immediate" in any case.

        `directions` [K, *shape] by name are of the kind `momentum`.
        """
        some = next(iter(directions.values()))
        total = some.new_zeros(some.shape[0])
        for name, direction in directions.items():
            parameter = parameters[name]
            if parameter in self._groups and parameter.grad is not None:
                ratio = self.unrolled_over_immediate(parameter) if momentum == "unrolled" else 1.0
                total += inner_products(direction, parameter.grad) / ratio
        return total


def blocks_of(step: AdamStep, parameter: nn.Parameter) -> Iterator[Block]:
    """The parameter, its gradient and moments in blocks of rows, see `row_blocks`, and in full precision."""
    weight, gradient = parameter.detach(), parameter.grad
    assert gradient is not None
    first, second = step.moments or (torch.zeros_like(weight), torch.zeros_like(weight))
    for rows in zip(*(row_blocks(tensor, 0) for tensor in (weight, gradient, first, second)), strict=True):
        yield Block(*map(in_full, rows))
