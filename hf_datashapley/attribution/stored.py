"""Scores from stored features: every unit's P g_i is computed once, and queries are matched against them.

    score_iq = mean over members of  w_i <P g_i, d_q>        d_q what the estimator makes of the query's P g_q

Reads the training set once a member; a query costs a pass over the stored features, a shard of them in memory at a
time, however many units there are.

Shapes: u units of a shard, Q queries, F features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..full_precision import full_dtype
from ..ghost.capture import Capture
from ..ghost.projection import Projection
from ..ranks import Ranks
from .batched import Directions, Finish, batched_over_units
from .corpus import Corpus
from .ensembles import Ensemble, in_turn
from .losses import Output
from .mapped import UnitMap, mapped_over_units
from .measures import Sums, mean_over_tokens, over_units, projected
from .projection import projection_for
from .queries import Asked, EachRow, Queries
from .settings import Settings
from .store import FeatureStore, Stored
from .unit_kernel import KernelSum, Members, grouped_sums, kernel_bytes
from .whole import chunks


class FeatureMethod(Protocol):
    """What an estimator makes of features, see `estimator.Attribution`."""

    def objective(self) -> Output: ...
    def described(self) -> dict[str, Any]: ...
    def unit_map(self, member: int, capture: Capture) -> UnitMap | None: ...
    def whole_queries(self) -> bool: ...
    def whole_directions(self, member: int, directions: Directions) -> Directions: ...
    def feature_directions(self, member: int, query_QF: Tensor, loss_Q: Tensor | None) -> Tensor: ...
    def weights(self, stored: Stored) -> Tensor | None: ...
    def kernel_of_members(self) -> bool: ...
    def member_factors(self, unit_U: np.ndarray, sums: Sums) -> tuple[Tensor | None, Tensor | None]: ...
    def finished(self, start: int, block_uQ: Tensor) -> Tensor: ...


class StoredFeatures:
    """
    Attributes:
        train: the training set, once it is known.
        store: the features, once a member was fitted.
        kernel: of the member that was fitted last, where it is of the members of groups.
    """

    train: Corpus
    store: FeatureStore
    kernel: KernelSum | None

    def __init__(self, settings: Settings, method: FeatureMethod, ensemble: Ensemble, ranks: Ranks):
        self.settings, self.method, self.ensemble, self.ranks = settings, method, ensemble, ranks

    @cached_property
    def members(self) -> Members:
        return Members(self.train, self.store.shard_units)

    def fit_member(self, number: int, model: nn.Module, capture: Capture) -> None:
        projection = self.projection(number, model, capture)
        if number == 0:
            self.store = self._open(capture, projection)
        self.kernel = (
            KernelSum(self.store.folder, number, projection.width, self.ranks)
            if self.method.kernel_of_members()
            else None
        )
        make = self._features_of(number, model, capture, projection)
        self.store.fill(number, make, self.settings.progress and self.ranks.is_local_main, self.kernel)
        self.ranks.wait()

    def _features_of(
        self, member: int, model: nn.Module, capture: Capture, projection: Projection
    ) -> Callable[[int, int], Sums]:
        """Of the units from one to another."""
        unit_map, output, width = self.method.unit_map(member, capture), self.method.objective(), projection.width
        measure = projected(model, capture, projection, self.train.reading.shifted, output)
        grouped: Callable[[int, int], Sums] | None = None
        if self.kernel is not None:
            grouped = grouped_sums(self.members, measure, width, model, self.method.member_factors, self.kernel)
        if self.settings.route == "batched":
            finish = projected_whole(projection, unit_map)
            own = partial(batched_over_units, self.train, finish, width, model, capture, output)
            return own if grouped is None else partial(second_of, grouped, own)
        if grouped is not None:
            return grouped
        if unit_map is not None:
            return partial(mapped_over_units, self.train, unit_map, model, capture, projection, output)
        return lambda start, stop: over_units(self.train, start, stop, measure, width, model)

    def blocks(self, asked: Asked) -> Iterator[tuple[int, Tensor]]:
        directions = list(self._directions(asked))
        for start in self.store.starts():
            block: Tensor | None = None
            for member, direction_QF in enumerate(directions):
                stored = self.store.read(member, start)
                own = stored.features @ direction_QF.T
                weights = self.method.weights(stored)
                if weights is not None:
                    own *= weights.unsqueeze(1)
                block = own if block is None else block.add_(own)
            assert block is not None
            yield start, self.method.finished(start, block / len(directions))

    def _directions(self, asked: Asked) -> Iterator[Tensor]:
        with in_turn(self.ensemble) as models:
            for number, model in enumerate(models):
                queries = asked.of(partial(self.settings.query_corpus, model=model))
                with self.settings.captured(model) as capture:
                    projection = self.projection(number, model, capture)
                    if isinstance(queries, EachRow) and not self.method.whole_queries():
                        mean_QF, loss_Q = self._features(model, capture, projection, queries.rows)
                    else:
                        mean_QF, loss_Q = self._whole(number, model, capture, projection, queries)
                losses = None if loss_Q is None else loss_Q.float().cpu()
                yield self.method.feature_directions(number, mean_QF.float().cpu(), losses)

    def _features(
        self, model: nn.Module, capture: Capture, projection: Projection, queries: Corpus
    ) -> tuple[Tensor, Tensor | None]:
        """Of queries' mean outputs, [Q, F], and their losses [Q]."""
        measure = projected(model, capture, projection, queries.reading.shifted, self.method.objective())
        sums = over_units(queries, 0, queries.count, measure, projection.width, model)
        return mean_over_tokens(sums.numbers, sums.tokens), sums.loss / sums.tokens

    def _whole(
        self, member: int, model: nn.Module, capture: Capture, projection: Projection, queries: Queries
    ) -> tuple[Tensor, Tensor | None]:
        """The same of what the method makes of whole gradients."""
        features, losses = [], []
        for chunk in chunks(capture, queries.count):
            gradients, loss_K = queries.gradients(model, capture, chunk, self.method.objective())
            if self.method.whole_queries():
                gradients = self.method.whole_directions(member, gradients)
            features.append(projection.of_dense(gradients))
            losses += [] if loss_K is None else [loss_K]
        return torch.cat(features), torch.cat(losses) if losses else None

    def projection(self, member: int, model: nn.Module, capture: Capture) -> Projection:
        """A draw of its own for each member, as TRAK has it (Algorithm 1): the mean over members has less of its
        noise."""
        some, settings = next(model.parameters()), self.settings
        seed = (
            settings.seed if member == 0 else int(np.random.SeedSequence([settings.seed, member]).generate_state(1)[0])
        )
        return projection_for(
            capture, settings.projection, settings.projection_dim, seed, some.device, full_dtype(some.dtype)
        )

    def _open(self, capture: Capture, projection: Projection) -> FeatureStore:
        settings = self.settings
        description = {
            "fingerprints": self.ensemble.fingerprints(),
            "parameters": {name: list(parameter.shape) for name, parameter in capture.parameters.items()},
            "projection": projection.described(),
            "unit": settings.unit if settings.partition is None else f"groups of {settings.unit}s",
            **self.train.fingerprints(),
            "output": self.method.objective(),
            **self.method.described(),
        }
        return FeatureStore(
            self._folder(),
            description,
            units=self.train.count,
            width=projection.width,
            members=len(self.ensemble),
            dtype=settings.store_dtype,
            ranks=self.ranks,
            aloud=settings.progress and self.ranks.is_local_main,
            beside=self._kernels_bytes(projection.width),
        )

    def _kernels_bytes(self, width: int) -> int:
        if not self.method.kernel_of_members():
            return 0
        return kernel_bytes(width) * self.ranks.count * (len(self.ensemble) + 1)

    def _folder(self) -> Path:
        if self.settings.store_dir is not None:
            return Path(self.settings.store_dir)
        if self.ranks.count > 1:
            raise ValueError(
                "several processes write features together: name a folder that all of them see, store_dir"
            )
        self._temporary = tempfile.TemporaryDirectory(prefix="datashapley-features-")
        return Path(self._temporary.name)


def projected_whole(projection: Projection, unit_map: UnitMap | None) -> Finish:
    def finish(gradient: Directions, tokens: Tensor) -> Tensor:
        return projection.of_dense(gradient if unit_map is None else unit_map(gradient, tokens))

    return finish


def second_of(first: Callable[[int, int], Sums], second: Callable[[int, int], Sums], start: int, stop: int) -> Sums:
    first(start, stop)
    return second(start, stop)
