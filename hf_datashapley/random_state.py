"""What the package computes besides training must not shift what training draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class RandomState:
    """All global generators as they stand: torch's on the CPU and on the current CUDA device, Python's, NumPy's."""

    cpu: Tensor = field(default_factory=torch.get_rng_state)
    accelerator: Tensor | None = field(
        default_factory=lambda: torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    )
    python: object = field(default_factory=random.getstate)
    numpy: object = field(default_factory=np.random.get_state)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator)
        random.setstate(self.python)  # type: ignore[arg-type]
        np.random.set_state(self.numpy)  # type: ignore[arg-type]


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn within it leaves no trace."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()
