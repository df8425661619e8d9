"""Members that lie on disk: checkpoints of one run or of several, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from torch import nn
from transformers import AutoModelForCausalLM

from .cost import Cost, weight_file_bytes
from .fingerprints import model_fingerprint
from .kept import evaluating


ADAPTER_CONFIG = "adapter_config.json"


class CheckpointEnsemble:
    """Folders that `save_pretrained` or `Trainer` wrote, in order; each is loaded when its turn comes.

    Of a PEFT adapter's folder the adapter trains, and its base does not.

    Args:
        paths: the folders.
        load_model: makes the model of a folder; None: `AutoModelForCausalLM.from_pretrained`, and for adapters
            `AutoPeftModelForCausalLM.from_pretrained`. (What these made is let go of before the next one is loaded; of
            models that you make yourself, two may be in memory.)
        device: where to load to; None: a GPU, if there is one.
        training_seconds: how long training all of them took, if it is known.

    Raises:
        ValueError: no folder is given, or one is not there.
    """

    forward_only = False

    def __init__(
        self,
        paths: Sequence[str | Path],
        load_model: Callable[[str], nn.Module] | None = None,
        device: str | torch.device | None = None,
        training_seconds: float | None = None,
    ):
        if isinstance(paths, str | Path):
            raise ValueError(f"paths={str(paths)!r} is one folder: give a list of folders")
        self.paths = [Path(path) for path in paths]
        missing = [str(path) for path in self.paths if not path.is_dir()]
        if not self.paths or missing:
            found = f"there is no folder {', '.join(missing)}" if missing else "paths is empty"
            raise ValueError(f"{found}: give folders that save_pretrained or Trainer has written")
        self.load_model = load_checkpoint if load_model is None else load_model
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.training_seconds = training_seconds

    @property
    def cost(self) -> Cost:
        count, size = len(self.paths), sum(weight_file_bytes(path) for path in self.paths)
        return Cost(count, count, 0, self.training_seconds, size, 0)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[nn.Module]:
        for path in self.paths:
            model = self.load_model(str(path)).to(self.device)
            with evaluating(model):
                yield model
            if self.load_model is load_checkpoint:
                model.to("meta")  # whoever still holds it: one checkpoint is in memory

    def outputs(self) -> Iterator[nn.Module]:
        return iter(self)

    def fingerprints(self) -> list[str]:
        """Loads every checkpoint once."""
        return [model_fingerprint(model) for model in self]


def load_checkpoint(folder: str) -> nn.Module:
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
    return AutoModelForCausalLM.from_pretrained(folder)
