"""Checkpoints of a run: which one it goes on from, and what late values take from them.

A run may have been killed in the midst of writing one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# Beside the optimizer's state, which numbers its parameters.
OPTIMIZER_NAMES = "shapley_optimizer.json"


def last_checkpoint(output_dir: str) -> str | None:
    """The newest one that is complete.

    `Trainer` takes the newest folder; it writes the folder's state file last.
    """
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name[11:].isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name[11:]), reverse=True):
        try:
            updates_of(str(folder))
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


def updates_of(checkpoint: str) -> int:
    """How many updates had been made when it was written."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step


def chosen_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """The folder that `Trainer.train`'s argument means; None: to begin.

    Raises:
        ValueError: it means the newest, and there is none.
    """
    if not resume_from_checkpoint:
        return None
    if isinstance(resume_from_checkpoint, str):
        return resume_from_checkpoint
    found = last_checkpoint(output_dir)
    if found is None:
        raise ValueError(
            f"resume_from_checkpoint=True, but output_dir {output_dir} holds no checkpoint: name one, or start "
            "without it"
        )
    return found


def check_whole(checkpoint: str) -> None:
    """`Trainer` begins anew, without a word, with whatever of its state it does not find.

    Raises:
        ValueError: something of it is not there.
    """
    for pattern in (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state*.pth"):
        if not any(Path(checkpoint).glob(pattern)):
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} lacks {pattern}, so what came next would not be what the run "
                "would have done: resume from a checkpoint that is whole (save_only_model=False), or start a new run "
                "from its weights with a new `output_dir`"
            )


def save_optimizer_names(folder: str, optimizer: Optimizer, model: nn.Module, run: str) -> None:
    """Which run's optimizer it is, of which kind, and the names of each group's parameters in its own order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    described = {"run": run, "optimizer": type(optimizer).__name__, "groups": groups}
    (Path(folder) / OPTIMIZER_NAMES).write_text(json.dumps(described), encoding="utf-8")


def load_optimizer_names(folder: str | Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: the folder lacks them.
    """
    path = Path(folder) / OPTIMIZER_NAMES
    if not path.is_file():
        raise ValueError(
            f"{folder} lacks {OPTIMIZER_NAMES}: take a checkpoint, with its optimizer (save_only_model=False), that a "
            "run with feature_dim > 0 has written"
        )
    return json.loads(path.read_text(encoding="utf-8"))
