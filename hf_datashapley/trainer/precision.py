"""In what precision a run computes, which decides what its values can be held against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..full_precision import HALF


class Precision:
    """
    Attributes:
        half_weights: whether any of the model's weights is, also one that does not train: losses are rounded then.
            (A quantised base has embeddings and norms in the type that it computes in.)
        half_products: whether products are made in it, because of that or by autocast.
    """

    def __init__(self, accelerator: Accelerator, weights: Iterable[Tensor]):
        self.half_weights = any(weight.dtype in HALF for weight in weights)
        self.half_products = self.half_weights or accelerator.mixed_precision != "no"
        self._scaler: Any = accelerator.scaler
        self._device = accelerator.device

    def loss_scale(self) -> Tensor | None:
        """What fp16 multiplies the loss by before its backward pass, 0-dimensional; None: nothing does.

        The same throughout an update, and less after one that overflowed. Does not wait for the device.
        """
        return None if self._scaler is None else self._scaler.scale(torch.ones((), device=self._device))
