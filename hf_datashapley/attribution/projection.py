"""Which projection turns gradients into features.

| kind | features | noise of <P g, P u> over abs(g) abs(u) | cost, beside forward and backward |
|---|---|---|---|
| "logra" | of each parameter | 1 / F^(1/4) of its own F for gradients of low rank | products with two narrow sides |
| "sjlt" | of all parameters | (2 / F)^(1/2) | products of the weights' gradients, unit by unit |
| "rademacher" | of all parameters | (2 / F)^(1/2) | F products and F random bits for each entry: slow |
| no dimension | the gradient itself | none | its size |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..ghost.capture import Capture
from ..ghost.projection import Projection
from ..ghost.sides import PerParameter, described_sides
from ..ghost.whole import WholeProjection, described_whole


ProjectionKind = Literal["auto", "logra", "sjlt", "rademacher"]
# Scored entries up to which "auto" projects the whole gradient. Its noise is lower, and the same for gradients of any
# form, but it forms every entry of every unit's gradient: measured on one thread, with rows of 64 tokens and a model
# of 1 million, forward and backward pass take 1.9 times as long as without features; with "logra" 1.3 times. The
# bound is a choice and no measured crossing: above it the time is taken to count for more than the noise.
WHOLE_ENTRIES = 10_000_000


def projection_for(
    capture: Capture,
    kind: ProjectionKind,
    dim: int | None,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Projection:
    """P for the gradients of the capture's parameters.

    Args:
        kind: "auto" is "sjlt" up to `WHOLE_ENTRIES` scored entries, and "logra" beyond.
        dim: the number of features. "logra" has a few fewer, for each of its weights has a product of two sides, and
            no parameter has more features than entries. None: the flattened gradients one after the other, whatever
            `kind` says.
        device, dtype: of what is projected; float32 or float64.

    Raises:
        ValueError: `dim` is too small.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in capture.parameters.items()}
    entries = sum(parameter.numel() for parameter in capture.parameters.values())
    if dim is None:
        return PerParameter(capture.plan(entries), seed, device, dtype)
    if dim < 1:
        raise ValueError(f"projection_dim={dim}: give the number of features, or None for the gradients themselves")
    if kind == "auto":
        kind = "sjlt" if entries <= WHOLE_ENTRIES else "logra"
    if kind == "logra":
        plans = capture.plan(dim, both_sides=True, setting="projection_dim")
        return PerParameter(plans, seed, device, dtype)
    if kind not in ("sjlt", "rademacher"):
        raise ValueError(f'projection={kind!r}: choose "auto", "logra", "sjlt" or "rademacher"')
    return WholeProjection(kind, shapes, dim, seed, device, dtype)


def described_projection(description: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Projection:
    """The projection whose `described()` it is.

    Raises:
        ValueError: it is of a version that drew otherwise.
    """
    if "shapes" in description:
        return described_whole(description, device, dtype)
    return described_sides(description, device, dtype)
