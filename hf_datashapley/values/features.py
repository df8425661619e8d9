"""Units' projected gradients as they are stored: numbers of a small type, and what to multiply a unit's by.

Shapes: N units, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


DTYPES = {"float16": torch.float16, "float32": torch.float32}
# Of a unit's largest feature in float16: its 11 bits are kept down to features 2^29 times smaller.
TOP = 15
# Powers of two beyond which float32 has no numbers left.
LOWEST = -100


@dataclass
class Features:
    """scale [N], float32, times codes [N, F]."""

    scale: Tensor
    codes: Tensor

    @property
    def num_bytes(self) -> int:
        return self.codes.numel() * self.codes.element_size()


def encoded(features: Tensor, dtype: torch.dtype) -> Features:
    """Features [N, F] in `dtype`. Gradients may be far below the range of float16, so each unit has a scale, a power
    of two: what is lost is rounding to 11 bits."""
    features = features.float()
    if dtype == torch.float32:
        return Features(features.new_ones(len(features)), features)
    _, exponent = torch.frexp(features.abs().amax(1))
    exponent = exponent.clamp(min=LOWEST) - TOP
    one = torch.ones_like(features[:, 0])
    return Features(torch.ldexp(one, exponent), torch.ldexp(features, -exponent.unsqueeze(1)).to(dtype))
