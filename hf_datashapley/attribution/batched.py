"""Units' gradients by plain backward passes, a unit's own batches at a time, added up until the unit is whole.

    g = sum over the unit's batches of  grad (sum of the batch's token losses)

No layer is looked into, and nothing is computed of any member of a group: what generalized group attribution calls
batched (Ley et al., arXiv 2410.09940, section 4). Other units' tokens in the unit's rows have no label. Weights'
gradients are formed as in training, once a batch, and what is asked of a unit is asked of its whole gradient, once:
it pays where groups are large and what is asked costs much, and of units of one row it is the loop over single rows.

Shapes: U units, W numbers of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..full_precision import full_dtype, in_full, inner_products
from ..ghost.capture import Capture
from ..loss_tokens import IGNORED
from .collation import CorpusBatch
from .corpus import Corpus
from .losses import Output, differentiated, misses, token_losses
from .measures import Sums, moved


# By parameter name, [K, *shape], in full precision.
Directions = dict[str, Tensor]
# A unit's gradient [1, *shape] by parameter and its tokens [1] -> [1, W].
Finish = Callable[[Directions, Tensor], Tensor]


def batched_over_units(
    corpus: Corpus,
    finish: Finish,
    width: int,
    model: nn.Module,
    capture: Capture,
    output: Output,
    start: int,
    stop: int,
    label: str | None = None,
) -> Sums:
    """As `measures.over_units`, of the units `start` to `stop` - 1; with a progress bar where it has a label."""
    some = next(model.parameters())
    dtype, device = full_dtype(some.dtype), some.device
    numbers = torch.zeros(stop - start, width, dtype=dtype, device=device)
    terms = torch.zeros(stop - start, 2, dtype=dtype, device=device)
    tokens = torch.zeros(stop - start, dtype=torch.int64, device=device)
    for unit in tqdm(range(start, stop), label, disable=label is None):
        own, sums = unit - start, zeros(capture)
        for batch in corpus.batches(unit, unit + 1):
            losses = token_losses(model, moved(own_labels(batch), device), corpus.reading.shifted)
            add_gradients(sums, differentiated(losses, output), capture)
            terms[own, 0] += losses.detach().sum()
            terms[own, 1] += misses(losses).sum()
            tokens[own] += int(batch.tokens[batch.place == 0].sum())
        numbers[own] = finish({name: g.unsqueeze(0) for name, g in sums.items()}, tokens[own : own + 1])[0]
    return Sums(numbers, terms[:, 0], terms[:, 1], tokens)


def own_labels(batch: CorpusBatch) -> dict[str, Any]:
    """The batch of one unit (place 0) without the labels of others that share its rows."""
    if bool((batch.place == 0).all()):
        return batch.inputs
    labels = batch.inputs["labels"]
    own = (batch.place == 0)[batch.units.of_positions(labels)].view(labels.shape)
    return {**batch.inputs, "labels": labels.masked_fill(~own, IGNORED)}


def zeros(capture: Capture) -> Directions:
    return {name: torch.zeros_like(in_full(own.detach())) for name, own in capture.parameters.items()}


def add_gradients(sums: Directions, output: Tensor, capture: Capture) -> None:
    """Of a scalar, to [*shape] of each parameter by name."""
    found = torch.autograd.grad(output, list(capture.parameters.values()), materialize_grads=True)
    for own, gradient in zip(sums.values(), found, strict=True):
        own += gradient


def inner_products_of(directions: Directions) -> Finish:
    """With each of [K, *shape]."""

    def finish(gradient: Directions, tokens: Tensor) -> Tensor:
        return torch.stack([inner_products(own, gradient[name][0]) for name, own in directions.items()]).sum(0)[None]

    return finish
