"""Scores from whole gradients: inner products of units' gradients with directions made of the queries' gradients.

    score_iq = mean over members of  <g_i, u_q>        u_q what the estimator makes of the gradient of query q

Nothing is stored of units, and nothing is projected: exact. A query costs a pass over the training set, in which as
many queries take part as their directions fit into memory.

Shapes: U units, u of a shard, Q queries, K of them in a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..free_memory import free_memory
from ..full_precision import full_dtype, in_full
from ..ghost.capture import Capture
from ..ranks import Ranks
from .corpus import Corpus
from .ensembles import Ensemble, in_turn
from .losses import Output, differentiated, token_losses
from .measures import mean_over_tokens, moved, over_units, scored
from .settings import Settings


# Of the memory that is free, for the directions of a pass over the training set. (Making them takes as much again.)
DIRECTION_SHARE = 0.25
# Units between two steps of the progress bar.
SHARD_UNITS = 512

Directions = dict[str, Tensor]


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

    def blocks(self, query_dataset: Any) -> Iterator[tuple[int, Tensor]]:
        total: Tensor | None = None
        with in_turn(self.ensemble) as models:
            for number, model in enumerate(models):
                queries = self.settings.query_corpus(query_dataset, model)
                with self.settings.captured(model) as capture:
                    parts = chunks(capture, queries.count)
                    own = torch.cat([self._pass(number, model, capture, queries, chunk) for chunk in parts], dim=1)
                total = own if total is None else total.add_(own)
        assert total is not None
        self.ranks.sum_([total])
        total /= len(self.ensemble)
        for start in range(0, len(total), SHARD_UNITS):
            yield start, self.method.finished(start, total[start : start + SHARD_UNITS])

    def _pass(self, member: int, model: nn.Module, capture: Capture, queries: Corpus, chunk: range) -> Tensor:
        """Scores of all units against some queries, [U, K]; 0 for units that other ranks score."""
        output = self.method.objective()
        gradients, _ = query_gradients(model, capture, queries, chunk, output)
        directions = self.method.whole_directions(member, gradients)
        measure = scored(model, capture, directions, self.train.reading.shifted, output)
        starts = range(0, self.train.count, SHARD_UNITS)[self.ranks.index :: self.ranks.count]
        found = torch.zeros(self.train.count, len(chunk))
        label = f"scores under member {member + 1} of {len(self.ensemble)}"
        quiet = not (self.settings.progress and self.ranks.is_local_main)
        for start in tqdm(starts, label, disable=quiet):
            stop = min(start + SHARD_UNITS, self.train.count)
            found[start:stop] = over_units(self.train, start, stop, measure, len(chunk), model).numbers.cpu()
        return found


def chunks(capture: Capture, queries: int) -> list[range]:
    """Queries whose directions are held together."""
    parameters = list(capture.parameters.values())
    each = sum(parameter.numel() * full_dtype(parameter.dtype).itemsize for parameter in parameters)
    most = max(1, int(DIRECTION_SHARE * free_memory(parameters[0].device)) // each)
    return [range(start, min(start + most, queries)) for start in range(0, queries, most)]


def query_gradients(
    model: nn.Module, capture: Capture, queries: Corpus, chunk: range, output: Output
) -> tuple[Directions, Tensor]:
    """Of the mean output over each query's tokens, [K, *shape] by parameter name, in full precision; and the queries'
    mean losses, [K]."""
    parameters = list(capture.parameters.values())
    found, mean_losses = [], []
    for query in chunk:
        (batch,) = queries.batches(query, query + 1)
        inputs = moved(batch.inputs, parameters[0].device)
        losses = token_losses(model, inputs, queries.reading.shifted)
        total = differentiated(losses, output)
        gradients = torch.autograd.grad(total, parameters, materialize_grads=True)
        tokens = batch.tokens.to(parameters[0].device)
        found.append([mean_over_tokens(in_full(own).view(1, -1), tokens, query).view(own.shape) for own in gradients])
        mean_losses.append(losses.detach().sum() / tokens[0])
    by_name = zip(capture.parameters, zip(*found, strict=True), strict=True)
    return {name: torch.stack(own) for name, own in by_name}, torch.stack(mean_losses)
