"""What identifies a model: a hash of every number that it computes with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def model_fingerprint(model: nn.Module) -> str:
    """Of names, shapes, types and bytes of parameters and buffers; reads all of them once."""
    return tensors_fingerprint([*model.named_parameters(), *model.named_buffers()])


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
