"""What one unit of gradient moves: the factor S_0 of order "first", for the optimizers whose step is elementwise.

To first order sample i changes the weights by S_0 * c g_i, so its value on a target with mean token loss l_v is

    value_i = < c g_i , u >        u = - S_0 * grad l_v(w_t)

(Wang et al., "Data Shapley in One Training Run", arXiv 2406.11011, Theorem 3, where the optimizer is plain SGD and
S_0 = -lr.) S_0 is taken as far as it is known before the step:

    SGD           lr;  lr (1 - dampening) with momentum;  lr (1 + mu) with Nesterov momentum;  at a parameter's first
                  momentum step torch stores the undampened gradient
    Adam, AdamW   lr share / (sqrt(v_hat) + eps), v_hat = v / (1 - b2^(t-1)) from the second moment v before the step;
                  0 where v = 0: a coordinate never touched before has no first-order value

(all with a minus sign). `momentum="immediate"` counts what acts in this very step, share = (1 - b1) / (1 - b1^t);
"unrolled" counts the weight the gradient will have had once momentum has played out, if learning rate and second
moment stay: share = 1, and lr / (1 - mu) under SGD with momentum, Nesterov or not (times 1 - dampening after the first
step).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ..full_precision import in_full
from .optimizers import Momentum, check_groups, check_optimizer_class, power_complement, row_blocks, taken_up


class FirstOrder:
    """Turns validation gradients into first-order directions for the optimizer as it stands.

    Args:
        optimizer: the torch optimizer that trains.
        parameters: the scored parameters by name. One that the optimizer does not train gets direction 0.
        proxy: "auto" for the optimizer that runs, "sgd" for the paper's S_0 = -lr whatever runs.
        momentum: "unrolled" or "immediate", see above.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: dict[str, nn.Parameter],
        proxy: Literal["auto", "sgd"],
        momentum: Momentum,
    ):
        if proxy == "auto":
            check_optimizer_class(type(optimizer))
            check_groups(optimizer)
        self.optimizer = optimizer
        self.parameters = parameters
        self.proxy = proxy
        self.momentum: Momentum = momentum
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._directions: dict[str, Tensor] = {}

    def directions(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """The directions u of gradients of l_v, both [K, *parameter.shape] by name.

        They lie in memory of their own, which the next call writes again: directions live through a whole update, and
        memory that is taken and given back at every update costs page faults.
        """
        if not self._directions:
            self._directions = {name: torch.empty_like(gradient) for name, gradient in gradients.items()}
        for name, gradient in gradients.items():
            self._fill(self._directions[name], gradient, self.parameters[name])
        return self._directions

    def _fill(self, direction: Tensor, gradient: Tensor, parameter: nn.Parameter) -> None:
        group = self._groups.get(parameter)
        if group is None:
            direction.zero_()
        elif self.proxy == "sgd":
            torch.mul(gradient, group["lr"], out=direction)
        elif isinstance(self.optimizer, SGD):
            torch.mul(gradient, sgd_factor(group, self.optimizer.state[parameter], self.momentum), out=direction)
        else:
            scale_by_adam(direction, gradient, group, self.optimizer.state[parameter], self.momentum)


def sgd_factor(group: dict[str, Any], state: dict[str, Any], momentum: Momentum) -> float | Tensor:
    """-S_0 of torch's SGD; `state` is the parameter's, before the step."""
    lr, mu = group["lr"], group["momentum"]
    if mu == 0:
        return lr
    if momentum == "unrolled":
        return lr * taken_up(group, state) / (1 - mu)
    return lr * (1 + mu) if group["nesterov"] else lr * taken_up(group, state)


def late_factor(kind: str, group: dict[str, Any], number: int, momentum: Momentum) -> float:
    """What is left of -S_0 / lr at the number-th step of an optimizer (from 1), when it is known later.

    For "SGD" it is -S_0 / lr, a number; for "Adam" and "AdamW" it is without 1 / (sqrt(v_hat) + eps), and 0 at the
    first step, where nothing has a second moment yet.
    """
    if kind == "SGD":
        buffer = {} if number == 1 else {"momentum_buffer": True}
        return float(sgd_factor({**group, "lr": 1.0}, buffer, momentum))
    if number == 1:
        return 0.0
    beta1, _ = group["betas"]
    return 1.0 if momentum == "unrolled" else (1 - beta1) / (1 - beta1**number)


def scale_by_adam(
    direction: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any], momentum: Momentum
) -> None:
    """Writes -S_0 of torch's Adam and AdamW times `gradient` into `direction`, both [K, *shape].

    `state` is the parameter's, before the step.

    The bias corrections are 0-dimensional float64 tensors: 1 - 0.999^1 in float32 would be off by 3e-5, and reading
    the step counter on the host would stall a GPU. With r = sqrt(1 - b2^(t-1)) the factor is

        lr share / (sqrt(v) / r + eps)  =  r lr share / (sqrt(v) + r eps)

    and is made a block of rows at a time, which stays in cache from one elementwise operation to the next. A second
    moment in half precision is read in float32.
    """
    if "step" not in state:
        direction.zero_()
        return
    beta1, beta2 = group["betas"]
    steps = state["step"].double()
    share = (1 - beta1) / power_complement(beta1, steps + 1) if momentum == "immediate" else 1.0
    correction = power_complement(beta2, steps).sqrt()
    factor = correction * group["lr"] * share
    offset = group["eps"] * correction
    second_moment = state["exp_avg_sq"]
    blocks = zip(row_blocks(second_moment, 0), row_blocks(gradient, 1), row_blocks(direction, 1), strict=True)
    for v, g, u in blocks:
        # Where v is 0 the denominator is infinite: no first-order value there (a mask would cost twice the time).
        denominator = F.threshold(in_full(v).sqrt(), 0.0, math.inf, inplace=True).add_(offset)
        torch.mul(g, factor, out=u).div_(denominator)
