"""Random numbers that stay the same from version to version and device to device, drawn on the CPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class Bits:
    """A stream of them for each key; no global random state is drawn from."""

    def __init__(self, *key: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def bytes(self, *shape: int) -> Tensor:
        """uint8"""
        count = math.prod(shape)
        raw = self._bits.random_raw(count // 8 + 1).astype("<u8").view(np.uint8)
        return torch.from_numpy(raw[:count].copy()).view(shape)

    def signs(self, *shape: int) -> Tensor:
        """+1 and -1, int8."""
        count = math.prod(shape)
        raw = self._bits.random_raw(count // 64 + 1).astype("<u8").view(np.uint8)
        return torch.from_numpy(np.unpackbits(raw, count=count).astype(np.int8) * 2 - 1).view(shape)

    def below(self, bound: int, count: int) -> Tensor:
        """Of 0 to bound - 1, int64 [count]."""
        return torch.from_numpy((self._bits.random_raw(count) % bound).astype(np.int64))
