"""Which checkpoint a run goes on from. It may have been killed in the midst of writing one."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


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
