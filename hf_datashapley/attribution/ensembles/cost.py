"""What an ensemble costs: the time that training it took, and the room that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class Cost:
    """
    Attributes:
        members: how many members there are.
        models_trained: how many whole models had to be trained, and are kept.
        adapters_trained: how many adapters had to be.
        training_seconds: how long training them took; None: not known.
        model_bytes: of the models that are kept.
        member_bytes: what all members take beside these models.
    """

    members: int
    models_trained: int
    adapters_trained: int
    training_seconds: float | None
    model_bytes: int
    member_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + self.member_bytes

    def __str__(self) -> str:
        adapters = f" and {self.adapters_trained} adapters" if self.adapters_trained else ""
        time = "in a time that is not known" if self.training_seconds is None else f"in {self.training_seconds:.1f} s"
        return (
            f"{self.members} members; {self.models_trained} models{adapters} trained {time}; "
            f"{self.model_bytes / 2**20:.2f} MiB of models, {self.member_bytes / 2**20:.2f} MiB beside them"
        )


def model_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, a shared one counted once."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def weight_file_bytes(folder: Path) -> int:
    """Of a checkpoint's weights on disk, without its optimizer."""
    shards = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model.bin")]
    return sum(path.stat().st_size for path in shards)
