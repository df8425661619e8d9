"""The direction of order "first" at a checkpoint, projected; and at any update, from the checkpoints around it.

    u = - S_0 * grad l_v(w)         S_0 = - lr A       A = share / (sqrt(v_hat) + eps) under Adam, a number under SGD

S_0 is elementwise, so it is applied before the projection: <P g, P u> estimates <g, u>. The learning rate and the
share of momentum are known of every update; weights and second moments, only where there is a checkpoint. In between
P (grad l_v / (sqrt(v_hat) + eps)) is taken to change in proportion; before the first and after the last checkpoint not
to change at all.

Shapes: K targets, F features, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..directions.first_order import late_factor, scale_by_adam
from ..directions.optimizers import Momentum
from ..directions.validation import Validation
from ..ghost.sides import PerParameter
from ..trainer.checkpoints import load_optimizer_names


@dataclass
class SavedOptimizer:
    """What a checkpoint holds of its optimizer.

    Attributes:
        kind: its class's name.
        groups: their settings.
        rates: each group's learning rate over that of the first, which is the one that the ledger has.
        group_of: the group of each parameter, by name.
        state: of each parameter, by name.
    """

    kind: str
    groups: list[dict[str, Any]]
    rates: list[float]
    group_of: dict[str, int]
    state: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> SavedOptimizer:
        """
        Raises:
            ValueError: it is not all there.
        """
        return cls.described(folder, load_optimizer_names(folder), device)

    @classmethod
    def described(cls, folder: Path, described: dict[str, Any], device: torch.device) -> SavedOptimizer:
        """From names that are known otherwise; `described`: its class's name, "optimizer", and the names of each
        group's parameters, "groups".

        Raises:
            ValueError: it is not all there, or has other groups.
        """
        path = folder / "optimizer.pt"
        if not path.is_file():
            raise ValueError(f"{folder} lacks optimizer.pt: take a checkpoint with it (save_only_model=False)")
        saved = torch.load(path, map_location=device, weights_only=True)
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        if sizes != [len(own) for own in described["groups"]]:
            raise ValueError(
                f"{folder}: the optimizer has groups of {sizes} parameters, and the model would have "
                f"{[len(own) for own in described['groups']]}: take a checkpoint whose optimizer `Trainer` made, and "
                "a model of which the same parameters train"
            )
        names = {
            number: name
            for group, own in zip(saved["param_groups"], described["groups"], strict=True)
            for number, name in zip(group["params"], own, strict=True)
        }
        groups = [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]
        return cls(
            kind=described["optimizer"],
            groups=groups,
            rates=relative_rates(groups),
            group_of={name: number for number, own in enumerate(described["groups"]) for name in own},
            state={names[number]: state for number, state in saved["state"].items()},
        )


def relative_rates(groups: list[dict[str, Any]]) -> list[float]:
    """Learning rates over that of the first group, which schedules of transformers leave as they are.

    Raises:
        ValueError: they have changed, or the first group's is 0.
    """
    rates = [float(group["lr"]) for group in groups]
    begun = [float(group.get("initial_lr", group["lr"])) for group in groups]
    if begun[0] == 0 and any(begun):
        raise ValueError(
            "the optimizer's first parameter group has learning rate 0, and the ledger holds no other: give a group "
            "that is to train as the first"
        )
    relative = [rate / begun[0] if begun[0] else 1.0 for rate in begun]
    if not np.allclose(rates, np.array(relative) * rates[0], rtol=1e-6, atol=0):
        raise ValueError(
            "the learning rates of the optimizer's parameter groups do not keep their proportions, and the ledger "
            "holds only the first one's: use one schedule for all of them"
        )
    return relative


@dataclass
class CheckpointDirections:
    """P (grad l_v / (sqrt(v_hat) + eps)), or P grad l_v, at a checkpoint, [K, F], and l_v, [K]."""

    updates: int
    projected: Tensor
    losses: Tensor


def checkpoint_directions(
    updates: int,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    validation: Validation,
    optimizer: SavedOptimizer | None,
    projection: PerParameter,
) -> CheckpointDirections:
    """`updates`: how many had been made. `optimizer`: whose second moments count; None: of SGD, which has none."""
    gradients, losses = validation.gradients(model, dict(parameters), update=1)
    if optimizer is not None:
        for name, gradient in gradients.items():
            if name in optimizer.group_of:
                group = {**optimizer.groups[optimizer.group_of[name]], "lr": 1.0}
                scale_by_adam(gradient, gradient.clone(), group, optimizer.state.get(name, {}), "unrolled")
    return CheckpointDirections(updates, projection.of_dense(gradients), losses)


class LateDirections:
    """P u of every update, without its learning rate.

    Args:
        checkpoints: in the order of their updates.
        optimizer: whose groups, and kind, are the run's.
        projection: of the run's features.
        momentum: of the run's values.
        proxy: the paper's S_0 = -lr, whatever ran.
    """

    def __init__(
        self,
        checkpoints: list[CheckpointDirections],
        optimizer: SavedOptimizer,
        projection: PerParameter,
        momentum: Momentum,
        proxy: bool,
    ):
        self.checkpoints = checkpoints
        self.optimizer = optimizer
        self.momentum: Momentum = momentum
        self.proxy = proxy
        self._updates = np.array([checkpoint.updates for checkpoint in checkpoints], float)
        self._projected_CKF = torch.stack([checkpoint.projected for checkpoint in checkpoints])
        # A parameter that no group has does not train: it belongs to one that stands still.
        nowhere = len(optimizer.groups)
        self._group_F = torch.cat(
            [
                torch.full((plan.width,), optimizer.group_of.get(name, nowhere), device=projection.device)
                for name, plan in projection.plans.items()
            ]
        )

    def at(self, step: int, number: int) -> Tensor:
        """-P S_0 / lr grad l_v, [K, F], of the update `step`, the optimizer's step `number` (both from 1); lr is the
        first group's."""
        place = float(np.interp(step - 1, self._updates, np.arange(len(self._updates))))
        before = int(place)
        projected = self._projected_CKF[before]
        if place > before:
            projected = torch.lerp(projected, self._projected_CKF[before + 1], place - before)
        groups = zip(self.optimizer.groups, self.optimizer.rates, strict=True)
        factors = [
            rate * (1.0 if self.proxy else late_factor(self.optimizer.kind, group, number, self.momentum))
            for group, rate in groups
        ]
        return projected * projected.new_tensor([*factors, 0.0])[self._group_F]
