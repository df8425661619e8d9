"""Labels drawn from the model's own predictions, which make of squared gradients the true Fisher matrix.

Of the labels as they are given, squared gradients are the "empirical" Fisher matrix, which is no approximation of the
Hessian where the model does not fit (Kunstner, Balles, Hennig, arXiv 1905.12558). Labels are drawn where there is
one, by inverting the distribution function at numbers that depend on the seed and on the row's tokens alone: batch by
batch or row by row, in whatever order, they are the same, but where rounding moves the function past a number. Rows of
the same tokens draw alike.

Shapes: N loss tokens, V classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...full_precision import in_full
from ...ghost.units import Units
from ...loss_tokens import IGNORED, loss_positions
from ..fingerprint import sha256_of


# Entries of a distribution function that exist at a time: 64 MiB.
ENTRIES = 2**23


def sampled_loss(
    model: nn.Module, inputs: Mapping[str, Any], units: Units, keys: Sequence[int], shifted: bool, seed: int
) -> Tensor:
    """Summed over all tokens that have a label, in nats, with labels drawn for the given.

    Args:
        inputs: what the model takes, with labels; of them only where they stand counts.
        units: the rows, or samples that were packed into one.
        keys: of the rows, by which numbers are drawn.
        shifted: as in `losses.token_losses`.
    """
    labels = inputs["labels"]
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    if labels.ndim == 1:
        where = labels.ne(IGNORED)
        counts = where.long()
    else:
        where = loss_positions(labels.clone(), shifted)
        counts = torch.stack([part.sum() for part in units.parts(where)])
    predictions_NV = in_full(logits[:, :-1][where[:, 1:]] if shifted else logits[where])
    drawn_N = np.concatenate([uniforms(seed, key, n) for key, n in zip(keys, counts.tolist(), strict=True)])
    return F.cross_entropy(predictions_NV, picked(predictions_NV.detach(), torch.from_numpy(drawn_N)), reduction="sum")


def row_key(row: Any) -> int:
    """Of a row's tokens, whatever other columns there are and however it is collated; of all of it, if it has none."""
    known = row["input_ids"] if isinstance(row, Mapping) and "input_ids" in row else row
    return int(sha256_of(known)[:16], 16)


def uniforms(seed: int, key: int, count: int) -> np.ndarray:
    """Of a row's loss tokens, in order; between 0 and 1, float64."""
    return np.random.default_rng([seed, key]).random(count)


def picked(predictions_NV: Tensor, drawn_N: Tensor) -> Tensor:
    """The first class at which the distribution function exceeds the number, int64 [N]."""
    rows = max(1, ENTRIES // predictions_NV.shape[1])
    drawn_N = drawn_N.to(predictions_NV.device)
    found = []
    for own_NV, own_N in zip(predictions_NV.split(rows), drawn_N.split(rows), strict=True):
        below_NV = own_NV.double().softmax(1).cumsum(1)
        found.append(torch.searchsorted(below_NV, own_N.unsqueeze(1), right=True).squeeze(1))
    # Rounding may leave the last value below 1.
    return torch.cat(found).clamp(max=predictions_NV.shape[1] - 1)
