"""Features of what is made of units' whole gradients, where that is not linear: P f(g_i).

A unit's gradient has to be whole first, from all its pieces; a few units' are at a time.

Shapes: U units, F features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..full_precision import full_dtype
from ..ghost.capture import Capture
from ..ghost.projection import Projection
from ..ghost.sides import PerParameter
from .corpus import Corpus
from .losses import Output
from .measures import Sums, over_units, projected


# Of units' whole gradients that are held together.
WHOLE_BYTES = 2**30

# Units' gradients [U, *shape] by parameter and their tokens [U] -> what is made of the gradients.
UnitMap = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]


def mapped_over_units(
    corpus: Corpus,
    unit_map: UnitMap,
    model: nn.Module,
    capture: Capture,
    projection: Projection,
    output: Output,
    start: int,
    stop: int,
) -> Sums:
    """As `measures.over_units`, of the units `start` to `stop` - 1."""
    some = next(model.parameters())
    entries = sum(parameter.numel() for parameter in capture.parameters.values())
    whole = PerParameter(capture.plan(entries), 0, some.device, full_dtype(some.dtype))
    measure = projected(model, capture, whole, corpus.reading.shifted, output)
    parts = []
    step = max(1, WHOLE_BYTES // (4 * whole.width))
    for begin in range(start, stop, step):
        sums = over_units(corpus, begin, min(begin + step, stop), measure, whole.width, model)
        gradients = {
            name: sums.numbers[:, block].view(-1, *capture.parameters[name].shape)
            for name, block in whole.blocks.items()
        }
        parts.append([projection.of_dense(unit_map(gradients, sums.tokens)), sums.loss, sums.miss, sums.tokens])
    return Sums(*(torch.cat(own) for own in zip(*parts, strict=True)))
