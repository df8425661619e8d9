"""Random projections P of gradients, a few numbers for a unit, with which products can be taken later:

    E <P g, P u> = <g, u>       over the draws of P, for any g and u

A layer's rule hands what it has of a parameter's gradient to the parameter's `ParameterMap`, in the backward pass, and
no gradient need ever be whole. Where the features of all parameters go is the matter of a `Projection`:

- `sides.PerParameter`: each parameter has features of its own, and they lie one after the other;
- `whole.Whole`: each feature is a sum over all parameters. They share one tap, and autograd adds up what they give it.

Everything is drawn on the CPU from bits of a generator of its own, for each parameter from the seed and the name: the
same on every device, in every batch, and for whatever else is projected beside it.

Shapes: U units, L and R the sides of a weight's gradient, K directions, F features.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .bits import Bits
from .units import Units


# Of what is drawn and how it is laid out; other versions' features are not comparable.
VERSION = 2


class ParameterMap(Protocol):
    """P of one parameter, [U, width]; linear, and so it may be taken use by use and summed.

    Attributes:
        width: features of its tap.
        dtype: in which they are summed, float32 or float64.
    """

    width: int
    dtype: torch.dtype

    def of_sums(self, sums: Tensor) -> Tensor:
        """Of units' gradients [U, *shape] as they are."""

    def of_outer(self, left: Tensor, right: Tensor, units: Units) -> Tensor:
        """Of the sums of outer products over each unit's positions, [R, ..., L] and [R, ..., R]."""

    def of_rows(self, ids: Tensor, right: Tensor, units: Units) -> Tensor:
        """The same where the left side has a 1 at `ids` [R, ...]."""

    def of_dense(self, directions: Tensor) -> Tensor:
        """Of directions [K, *shape]: [K, width]."""


class Projection(Protocol):
    """P of all parameters.

    Attributes:
        parameters: by name, in the model's order.
        width: F.
        blocks: of the features, those that are of the same parameters: which, by the parameter's name, or by "" where
            all parameters share them.
    """

    @property
    def parameters(self) -> Mapping[str, ParameterMap]: ...
    @property
    def width(self) -> int: ...
    @property
    def blocks(self) -> Mapping[str, slice]: ...

    def taps(self, units: Units) -> dict[str, Tensor]:
        """By parameter, a zero leaf for its features, [U, width]; parameters may have the same one."""

    def of_dense(self, directions: Mapping[str, Tensor]) -> Tensor:
        """Directions [K, *shape] by name: [K, F]."""

    def described(self) -> dict[str, Any]:
        """As JSON, of which `attribution.projection.described_projection` makes it anew."""


def bits_of(seed: int, name: str, *key: int) -> Bits:
    """Those of a parameter."""
    return Bits(seed, zlib.crc32(name.encode()), *key)


def tap(count: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(count, width, dtype=dtype, device=device, requires_grad=True)


def leaves(taps: Mapping[str, Tensor]) -> list[Tensor]:
    """Each tap once: what `torch.autograd.grad(loss, leaves(taps), allow_unused=True)` is asked for."""
    return list(dict.fromkeys(taps.values()))


def features_of(taps: Mapping[str, Tensor], gradients: Sequence[Tensor | None] | None = None) -> Tensor:
    """The units' features [U, F] from `gradients` of `leaves(taps)`, or from what backward passes left on them."""
    own = leaves(taps)
    found = [leaf.grad for leaf in own] if gradients is None else gradients
    # No gradient where the loss reaches no use of a parameter.
    parts = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(own, found, strict=True)]
    return torch.cat([part.detach() for part in parts], dim=1)


def refuse_other_version(description: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: the description is of features that this version would draw otherwise.
    """
    version = description.get("version", 1)
    if version != VERSION:
        raise ValueError(
            f"features of projection version {version} cannot be compared with those of version {VERSION}, which this "
            "hf_datashapley draws: read them with the version that wrote them, or make them anew"
        )
