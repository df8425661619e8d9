"""Scores from whole gradients: inner products of units' gradients with directions made of the queries' gradients.

    score_iq = mean over members of  <g_i, u_q>        u_q what the estimator makes of the gradient of query q

Nothing is stored of units, and nothing is projected: exact. A query costs a pass over the training set, in which as
many queries take part as their directions fit into memory. On the route "summed" units' gradients meet the directions
in the backward pass, layer by layer; on "batched" each one's whole gradient does, see `batched`.

Shapes: U units, u of a shard, Q queries, K of them in a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ..free_memory import free_memory
from ..full_precision import full_dtype
from ..ghost.capture import Capture
from ..ranks import Ranks
from .batched import Directions, batched_over_units, inner_products_of
from .corpus import Corpus
from .ensembles import Ensemble, in_turn
from .losses import Output
from .measures import Sums, over_units, scored
from .queries import Asked, Queries
from .settings import Settings


# Of the memory that is free, for the directions of a pass over the training set. (Making them takes as much again.)
DIRECTION_SHARE = 0.25
# Of a block of scores.
BLOCK_UNITS = 512


class GradientMethod(Protocol):
    """What an estimator makes of whole gradients, see `estimator.Attribution`."""

    def objective(self) -> Output: ...
    def whole_directions(self, member: int, directions: Directions) -> Directions: ...
    def finished(self, start: int, block_uQ: Tensor) -> Tensor: ...


class WholeGradients:
    """`train`: the training set, once it is known."""

    train: Corpus

    def __init__(self, settings: Settings, method: GradientMethod, ensemble: Ensemble, ranks: Ranks):
        self.settings, self.method, self.ensemble, self.ranks = settings, method, ensemble, ranks

    def fit_member(self, number: int, model: nn.Module, capture: Capture) -> None:
        """Nothing has to be known but the training set."""

    def blocks(self, asked: Asked) -> Iterator[tuple[int, Tensor]]:
        total: Tensor | None = None
        with in_turn(self.ensemble) as models:
            for number, model in enumerate(models):
                queries = asked.of(partial(self.settings.query_corpus, model=model))
                with self.settings.captured(model) as capture:
                    parts = chunks(capture, queries.count)
                    own = torch.cat([self._pass(number, model, capture, queries, chunk) for chunk in parts], dim=1)
                total = own if total is None else total.add_(own)
        assert total is not None
        self.ranks.sum_([total])
        total /= len(self.ensemble)
        for start in range(0, len(total), BLOCK_UNITS):
            yield start, self.method.finished(start, total[start : start + BLOCK_UNITS])

    def _pass(self, member: int, model: nn.Module, capture: Capture, queries: Queries, chunk: range) -> Tensor:
        """Scores of all units against some queries, [U, K]; 0 for units that other ranks score."""
        output = self.method.objective()
        gradients, _ = queries.gradients(model, capture, chunk, output)
        directions = self.method.whole_directions(member, gradients)
        show = self.settings.progress and self.ranks.is_local_main
        label = f"scores under member {member + 1} of {len(self.ensemble)}" if show else None
        make = self._scores(model, capture, directions, output, label)
        # At once, so that a row that many units have pieces of is passed once.
        start, stop = (self.train.count * n // self.ranks.count for n in (self.ranks.index, self.ranks.index + 1))
        found = torch.zeros(self.train.count, len(chunk))
        found[start:stop] = make(start, stop).numbers.cpu()
        return found

    def _scores(
        self, model: nn.Module, capture: Capture, directions: Directions, output: Output, label: str | None
    ) -> Callable[[int, int], Sums]:
        """Of the units from one to another, [u, K]."""
        width = len(next(iter(directions.values())))
        if self.settings.route == "batched":
            finish = inner_products_of(directions)
            return partial(batched_over_units, self.train, finish, width, model, capture, output, label=label)
        measure = scored(model, capture, directions, self.train.reading.shifted, output)
        return lambda start, stop: over_units(self.train, start, stop, measure, width, model, label)


def chunks(capture: Capture, queries: int) -> list[range]:
    """Queries whose directions are held together."""
    parameters = list(capture.parameters.values())
    each = sum(parameter.numel() * full_dtype(parameter.dtype).itemsize for parameter in parameters)
    most = max(1, int(DIRECTION_SHARE * free_memory(parameters[0].device)) // each)
    return [range(start, min(start + most, queries)) for start in range(0, queries, most)]
