"""What a checkpoint holds of the run that wrote it: its learning rates, and its optimizer's moments.

    A g    = g / (sqrt(v_hat) + eps)                    what Adam makes of a gradient's directions, elementwise
    Gamma  = m'_hat / (sqrt(v'_hat) + eps)              the update that a unit with gradient g would bring about:
             m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2

with m and v as saved after t updates, v_hat = v / (1 - b2^t), m'_hat = m' / (1 - b1^(t+1)), v'_hat = v' / (1 -
b2^(t+1)). A is 0 where v is 0: that coordinate has never moved.

Shapes: K directions, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_parameter_names

from ..directions.first_order import scale_by_adam
from ..directions.optimizers import power_complement
from ..trainer.checkpoints import OPTIMIZER_NAMES, load_optimizer_names
from .late_directions import SavedOptimizer


# Names of parameters that `Trainer` does not decay, beside those of `nn.LayerNorm`.
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]

Directions = dict[str, Tensor]


def checkpoint_rates(folders: Sequence[Path]) -> list[float]:
    """For each checkpoint the mean learning rate of the updates since the one before it (of the same run: of those
    given that lie in the same folder), or since the run's beginning.

    `Trainer` logs the learning rate of the update just made every `logging_steps`; between them it is interpolated.
    (That in `optimizer.pt` is the next update's, 0 at the end of most schedules.)

    Raises:
        ValueError: a checkpoint tells none.
    """
    steps = []
    for folder in folders:
        if not (folder / TRAINER_STATE_NAME).is_file():
            raise ValueError(f"{folder} lacks {TRAINER_STATE_NAME}: give learning_rates, one for each member")
        steps.append(TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)))
    found = []
    for folder, state in zip(folders, steps, strict=True):
        begun = [
            other.global_step
            for place, other in zip(folders, steps, strict=True)
            if place.resolve().parent == folder.resolve().parent and other.global_step < state.global_step
        ]
        logged = [(entry["step"], entry["learning_rate"]) for entry in state.log_history if "learning_rate" in entry]
        if not logged:
            raise ValueError(
                f"{folder} logged no learning rate (logging_steps): give learning_rates, one for each member"
            )
        updates = np.arange(max(begun, default=0) + 1, state.global_step + 1)
        at, rates = zip(*logged, strict=True)
        found.append(float(np.interp(updates, at, rates).mean()))
    return found


def optimizer_description(folder: Path, model: nn.Module) -> dict[str, Any]:
    """The optimizer's groups, by names of parameters: as a run with features wrote them down, or else as `Trainer`
    groups those of `model` that require grad."""
    if (folder / OPTIMIZER_NAMES).is_file():
        return load_optimizer_names(folder)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    groups = [[name for name in trained if name in decayed], [name for name in trained if name not in decayed]]
    return {"optimizer": "AdamW", "groups": groups}


class SavedAdam:
    """
    Args:
        folder: a checkpoint.
        description: of its optimizer, see `optimizer_description`.
        shapes: of the parameters that count, by name.
        device: where to load the moments to.

    Raises:
        ValueError: there is no optimizer, it is none of torch's Adam or AdamW, or it is of other parameters.
    """

    def __init__(self, folder: Path, description: dict[str, Any], shapes: dict[str, torch.Size], device: torch.device):
        saved = self.saved = SavedOptimizer.described(folder, description, device)
        if saved.kind not in ("Adam", "AdamW") or not all("betas" in group for group in saved.groups):
            raise ValueError(f"{folder}: its optimizer is not torch's Adam or AdamW, whose moments are needed")
        if any(group.get("amsgrad") or group.get("maximize") for group in saved.groups):
            raise ValueError(f"{folder}: its optimizer has amsgrad or maximize set, whose step is another one")
        for name, shape in shapes.items():
            if name in saved.state and saved.state[name]["exp_avg_sq"].shape != shape:
                raise ValueError(
                    f"{folder}: the optimizer's moments of {name} are of another shape: take a checkpoint whose "
                    "optimizer `Trainer` made, and a model of which the same parameters train (load_model)"
                )

    def scaled(self, directions: Directions) -> Directions:
        """A g, times the learning rate of the parameter's group over that of the first; 0 for what does not train."""
        found = {}
        for name, gradient in directions.items():
            made = torch.zeros_like(gradient)
            if name in self.saved.group_of:
                number = self.saved.group_of[name]
                group = {**self.saved.groups[number], "lr": self.saved.rates[number]}
                scale_by_adam(made, gradient, group, self.saved.state.get(name, {}), "unrolled")
            found[name] = made
        return found

    def updates(self, gradients: Directions) -> Directions:
        """Gamma of units' gradients [U, *shape], times the same; 0 for what does not train."""
        found = {}
        for name, gradient in gradients.items():
            state = self.saved.state.get(name)
            if state is None:
                found[name] = torch.zeros_like(gradient)
                continue
            number = self.saved.group_of[name]
            group, t = self.saved.groups[number], state["step"].double() + 1
            beta1, beta2 = group["betas"]
            mean = (beta1 * state["exp_avg"].to(gradient.dtype) + (1 - beta1) * gradient) / power_complement(beta1, t)
            square = beta2 * state["exp_avg_sq"].to(gradient.dtype) + (1 - beta2) * gradient.square()
            root = (square / power_complement(beta2, t)).sqrt()
            found[name] = self.saved.rates[number] * mean / (root + group["eps"])
        return found
