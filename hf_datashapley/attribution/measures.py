"""What is measured of every unit of a shard, from one backward pass a batch:

    projected    P g_i, its features
    scored       <g_i, u_k>, for directions u_k of the shape of the parameters

with g_i the gradient of the unit's output (see `losses`), and beside it the unit's loss, in nats, and how surely the
model missed its tokens. All of it is linear in the unit's tokens: pieces of a unit in several rows are added up.

Projecting computes no weight's gradient. Scoring forms units' own, one after the other, for their inner products.

Shapes: U units, W numbers of each, N units of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..full_precision import full_dtype
from ..ghost.capture import Capture
from ..ghost.projection import Projection, features_of, leaves
from ..ghost.units import Units
from .corpus import Corpus
from .losses import Output, differentiated, misses, token_losses


@dataclass(frozen=True)
class Sums:
    """Over the tokens of each unit.

    Attributes:
        numbers: what was measured, [N, W].
        loss: in nats, [N].
        miss: of 1 - p, [N], p a token's probability.
        tokens: that have a loss, int64 [N].
    """

    numbers: Tensor
    loss: Tensor
    miss: Tensor
    tokens: Tensor


# A batch on the model's device and its units -> [U, W], and the losses of its tokens [R, T].
Measure = Callable[[Mapping[str, Any], Units], tuple[Tensor, Tensor]]


def projected(model: nn.Module, capture: Capture, projection: Projection, shifted: bool, output: Output) -> Measure:
    def measure(inputs: Mapping[str, Any], units: Units) -> tuple[Tensor, Tensor]:
        with capture.projecting(projection, units) as taps:
            losses = token_losses(model, inputs, shifted)
            found = torch.autograd.grad(differentiated(losses, output), leaves(taps), allow_unused=True)
        return features_of(taps, found), losses

    return measure


def scored(
    model: nn.Module, capture: Capture, directions: dict[str, Tensor], shifted: bool, output: Output
) -> Measure:
    def measure(inputs: Mapping[str, Any], units: Units) -> tuple[Tensor, Tensor]:
        with capture.scoring(directions, units) as tap:
            losses = token_losses(model, inputs, shifted)
            (found,) = torch.autograd.grad(differentiated(losses, output), [tap])
        return found, losses

    return measure


def forwarded(model: nn.Module, shifted: bool) -> Measure:
    """Nothing but the losses."""

    def measure(inputs: Mapping[str, Any], units: Units) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            losses = token_losses(model, inputs, shifted)
        return losses.new_zeros(units.count, 0), losses

    return measure


def over_units(
    corpus: Corpus, start: int, stop: int, measure: Measure, width: int, model: nn.Module, label: str | None = None
) -> Sums:
    """Of the units `start` to `stop` - 1, on the model's device; with a progress bar where it has a label."""
    some = next(model.parameters())
    dtype, device = full_dtype(some.dtype), some.device
    count = stop - start
    numbers = torch.zeros(count, width, dtype=dtype, device=device)
    terms = torch.zeros(count, 2, dtype=dtype, device=device)
    tokens = torch.zeros(count, dtype=torch.int64)
    for batch in tqdm(corpus.batches(start, stop), label, corpus.batch_count(start, stop), disable=label is None):
        inputs = moved(batch.inputs, device)
        found, losses = measure(inputs, batch.units)
        both = torch.stack([losses.detach(), misses(losses)], dim=-1)
        wanted = batch.place >= 0
        place = batch.place[wanted]
        tokens.index_add_(0, place, batch.tokens[wanted])
        place, wanted = place.to(device), wanted.to(device)
        numbers.index_add_(0, place, found[wanted].to(dtype))
        terms.index_add_(0, place, batch.units.sum(both)[wanted].to(dtype))
    return Sums(numbers, terms[:, 0], terms[:, 1], tokens.to(device))


def moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on the device; what is no tensor stays."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def mean_over_tokens(numbers_QW: Tensor, tokens_Q: Tensor, first: int = 0) -> Tensor:
    """Of queries' sums; `first` is the number of the first query.

    Raises:
        ValueError: a query has no loss token.
    """
    none = (first + tokens_Q.eq(0).nonzero().flatten()).tolist()
    if none:
        raise ValueError(
            f"query_dataset: rows {none[:5]} have no labelled token, so no loss to explain: leave them out"
        )
    return numbers_QW / tokens_Q.unsqueeze(1)
