"""Fixed dropout masks: a subnetwork of a model, for as long as they are on.

A mask is over channels, the last dimension, and is the same for every row and position: so a unit meets the same
subnetwork whatever batch it is in. Masks are forward hooks, which run around a layer's `forward` whether or not that
is captured.

Shapes: D channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


# Dropout of attention's probabilities, by the end of a module's name.
ATTENTION = ("attn_dropout", "attention_dropout")


def dropouts(model: nn.Module) -> dict[str, nn.Dropout]:
    """All modules that may drop channels, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and name.rpartition(".")[2] not in ATTENTION
    }


def branches(model: nn.Module) -> dict[str, nn.Module]:
    """What each decoder layer adds to the residual stream: its children that hold matrices (attention, MLP).

    Raises:
        ValueError: the model has no decoder layers that can be told.
    """
    for inner in model.modules():
        if not isinstance(inner, PreTrainedModel):
            continue
        if inner.config.is_encoder_decoder:
            break
        layers = inner.config.get_text_config().num_hidden_layers
        for list_name, listed in model.named_modules():
            if not isinstance(listed, nn.ModuleList) or len(listed) != layers:
                continue
            found = {
                f"{list_name}.{number}.{name}": child
                for number, layer in enumerate(listed)
                for name, child in layer.named_children()
                if any(parameter.ndim > 1 for parameter in child.parameters())
            }
            plain = [name for name, child in found.items() if not list(child.children())]
            if found and not plain:
                return found
            if plain:
                raise ValueError(
                    f"dropout cannot be put into {type(inner).__name__}: {plain[0]} is not a whole attention or MLP "
                    "block; give the model nn.Dropout modules"
                )
    raise ValueError(
        f"dropout cannot be put into {type(model).__name__}: it is no decoder with a list of layers; give the model "
        "nn.Dropout modules"
    )


def channel_mask(width: int, p: float, key: str) -> Tensor:
    """0 with probability p, else 1 / (1 - p), [D], float64, drawn by the key on the CPU."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn >= p).double() / (1 - p)


class Mask:
    """The forward hook of one module."""

    def __init__(self, name: str, p: float, key: str):
        self.name, self.p, self.key = name, p, f"{key} {name}"
        self.mask_D: Tensor | None = None
        self.met = False  # an activation of another shape, which it left alone

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.masked(output[0]), *output[1:])
        return self.masked(output)

    def masked(self, x: Tensor) -> Tensor:
        if x.ndim > 3:  # probabilities [rows, heads, positions, positions] have no channels
            self.met = True
            return x
        mask_D = self.mask_D
        if mask_D is None or len(mask_D) != x.shape[-1] or mask_D.device != x.device or mask_D.dtype != x.dtype:
            mask_D = self.mask_D = channel_mask(x.shape[-1], self.p, self.key).to(x.device, x.dtype)
        return x * mask_D


@contextmanager
def masked(places: dict[str, nn.Module], chances: dict[str, float], key: str) -> Iterator[list[Mask]]:
    """Within it the outputs of `places` are masked, with probability `chances` each; yields the masks."""
    masks = [Mask(name, chances[name], key) for name in places]
    handles = [module.register_forward_hook(mask) for module, mask in zip(places.values(), masks, strict=True)]
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()
