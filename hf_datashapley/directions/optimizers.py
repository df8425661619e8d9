"""The optimizers whose step is known here, and what is asked of their settings."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer


Momentum = Literal["unrolled", "immediate"]
KNOWN = (SGD, Adam, AdamW)
BLOCK = 262_144


def check_optimizer_class(optimizer_class: type) -> None:
    """Raises `ValueError` for an optimizer whose step is not known here."""
    if optimizer_class not in KNOWN:
        raise ValueError(
            f"value_optimizer='auto' knows torch's SGD, Adam and AdamW, not {optimizer_class.__name__}; choose one of "
            "them with `optim`, or value_optimizer='sgd' (without audit_steps) to value the run as if plain SGD had "
            "trained it"
        )


def check_groups(optimizer: Optimizer) -> None:
    """Raises `ValueError` for settings of a known optimizer under which its step is another one."""
    for group in optimizer.param_groups:
        for setting in ("maximize", "amsgrad"):
            if group.get(setting, False):
                raise ValueError(
                    f"{type(optimizer).__name__}({setting}=True) is not supported by value_optimizer='auto': "
                    f"set {setting}=False, or value_optimizer='sgd'"
                )
        if group.get("momentum", 0) >= 1:
            raise ValueError("SGD with momentum >= 1 never forgets a gradient: set momentum < 1")


def taken_up(group: dict[str, Any], state: dict[str, Any]) -> float:
    """The part of a gradient that SGD's momentum buffer takes up: all of it at a parameter's first step."""
    return 1.0 if state.get("momentum_buffer") is None else 1 - group["dampening"]


def power_complement(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^steps, without cancellation."""
    return -torch.expm1(steps * math.log(beta)) if beta > 0 else torch.ones_like(steps)


def row_blocks(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Views of a tensor, cut along a dimension into pieces of about `BLOCK` elements of what follows.

    Elementwise work on one piece after the other stays in cache from one operation to the next.
    """
    if x.ndim == dim:
        return (x,)
    return x.split(max(1, BLOCK // max(1, x[(0,) * (dim + 1)].numel())), dim)
