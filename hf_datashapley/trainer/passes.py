"""How an update gets its scores: in its own backward passes, or when the step that it is about to make is known.

`OnePass` (order "first") knows its directions before the update and scores inside the backward pass. `TwoPass` (orders
"second" and "path") needs the whole batch's gradient first, and then the samples' inputs and output gradients again:

    stash     kept from the backward passes until the optimizer is about to step; memory for a whole update
    replay    every micro-batch runs once more, with the same random state

Both are asked in the same order: `begin` before the first micro-batch, `micro_batch` for each, `before_step` when the
optimizer is about to step, with the clipped gradient in `.grad` and the weights still old.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..directions.first_order import FirstOrder
from ..directions.owen import OwenOrder
from ..directions.path import PathOrder
from ..directions.second_order import SecondOrder
from ..directions.validation import Validation
from ..free_memory import free_memory
from ..full_precision import full_dtype
from ..ghost.capture import Capture
from ..ghost.kept import Kept
from ..ghost.projection import Projection, features_of
from ..ghost.units import Places
from ..random_state import RandomState
from ..ranks import Ranks
from ..values.update import Update
from .scorers import MicroBatch, Scorer


# Below "transformers", so that Trainer's `log_level` is ours too.
logger = logging.get_logger(f"transformers.{__name__}")

SecondPass = Literal["auto", "stash", "replay"]
# Of the memory that is free when the first update begins.
STASH_SHARE = 0.5


class Pass(Protocol):
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep."""

    def restore(self, state: dict[str, Tensor]) -> None: ...

    def begin(self, model: nn.Module, update: Update, step: int) -> None: ...

    def micro_batch(self, update: Update, micro_batch: MicroBatch) -> Tensor:
        """Runs it and gives its loss."""

    def before_step(self, model: nn.Module, update: Update, step: int) -> dict[str, Tensor]:
        """After it the update has all its scores; gives the directions, [K, *shape] by name."""


class OnePass:
    """Order "first"; with a projection, the units' features too."""

    def __init__(
        self,
        capture: Capture,
        scorer: Scorer,
        validation: Validation,
        order: FirstOrder,
        projection: Projection | None,
    ):
        self.capture = capture
        self.scorer = scorer
        self.validation = validation
        self.order = order
        self.projection = projection
        self._gradients: dict[str, Tensor] | None = None
        self._directions: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """A validation gradient that serves several updates, and its losses under a name that no parameter has."""
        return {} if self._gradients is None else {**self._gradients, "": self._losses}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._losses = state[""]
        # In the order in which they are summed up in a run that was not interrupted; files are sorted by name.
        self._gradients = {name: state[name] for name in self.capture.parameters}

    def begin(self, model: nn.Module, update: Update, step: int) -> None:
        if self._gradients is None or self.validation.fresh(step):
            self._gradients = None
            self._gradients, self._losses = self.validation.gradients(model, self.capture.parameters, step)
        self._directions = self.order.directions(self._gradients)
        update.validation_losses = self._losses
        if self.validation.interval == 1:
            self._gradients = None  # not needed again

    def micro_batch(self, update: Update, micro_batch: MicroBatch) -> Tensor:
        if self.projection is None:
            loss, scores = self.scorer.training(micro_batch, self._directions)
        else:
            assert not isinstance(micro_batch.units, Places)
            with self.capture.projecting(self.projection, micro_batch.units) as taps:
                loss, scores = self.scorer.training(micro_batch, self._directions)
            update.features.append(features_of(taps))
        update.scores.append(scores)
        return loss

    def before_step(self, model: nn.Module, update: Update, step: int) -> dict[str, Tensor]:
        return self._directions


class TwoPass:
    """Orders "second" and "path"."""

    def __init__(
        self,
        capture: Capture,
        scorer: Scorer,
        validation: Validation,
        order: SecondOrder | PathOrder | OwenOrder,
        second_pass: SecondPass,
    ):
        self.capture = capture
        self.scorer = scorer
        self.validation = validation
        self.order = order
        self.second_pass = second_pass
        self._kept: list[Kept] = []
        self._replays: list[tuple[MicroBatch, RandomState, Tensor]] = []
        self._squares: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        raise AssertionError("nothing was saved")

    def begin(self, model: nn.Module, update: Update, step: int) -> None:
        self._kept, self._replays = [], []
        if isinstance(self.order, OwenOrder):
            if not self._squares:
                self._squares = {
                    name: torch.empty_like(p.data, dtype=full_dtype(p.dtype))
                    for name, p in self.capture.parameters.items()
                }
            for squares in self._squares.values():
                squares.zero_()

    def micro_batch(self, update: Update, micro_batch: MicroBatch) -> Tensor:
        if self.second_pass == "auto":
            self.second_pass = self._choose(micro_batch, update.ranks)
        stash, squares = self.second_pass == "stash", isinstance(self.order, OwenOrder)
        state = RandomState()
        if stash or squares:
            assert not isinstance(micro_batch.units, Places)
            with self.capture.keeping(micro_batch.units) as kept:
                loss = micro_batch.run()
        else:
            loss = micro_batch.run()
        if squares:
            kept.add_squares(self._squares)
        if stash:
            self._kept.append(kept)
        else:
            self._replays.append((micro_batch, state, loss))
        return loss

    def before_step(self, model: nn.Module, update: Update, step: int) -> dict[str, Tensor]:
        order = self.order
        if isinstance(order, OwenOrder):
            update.ranks.sum_(self._squares.values())
            for squares in self._squares.values():
                squares.mul_(update.factor**2)
            players, tokens = update.players_and_tokens()
            directions, losses = order.directions(model, self.validation, step, self._squares, players)
        else:
            directions, losses = order.directions(model, self.validation, step)
        update.validation_losses = losses
        for kept in self._kept:
            update.scores.append(kept.scores(directions))
        for micro_batch, state, loss in self._replays:
            update.scores.append(self.scorer.replayed(micro_batch, directions, state, loss))
        self._kept, self._replays = [], []
        if isinstance(order, OwenOrder) and order.closes_gap:
            before, after = order.path_ends(model, self.validation, step)
            update.shared = (before - after - update.sum_of(update.own_values())) / tokens.clamp(min=1)
        return directions

    def _choose(self, micro_batch: MicroBatch, ranks: Ranks) -> Literal["stash", "replay"]:
        """ "stash" where it takes no more than a share of the memory that is free now, on every rank."""
        size = self.capture.kept_bytes(micro_batch.positions) * micro_batch.micro_batches
        device = next(iter(self.capture.parameters.values())).device
        free = free_memory(device)
        too_large = torch.tensor(float(size > STASH_SHARE * free), device=device)
        ranks.sum_([too_large])
        choice: Literal["stash", "replay"] = "replay" if bool(too_large) else "stash"
        logger.info(
            f"second_pass='auto': {choice!r}; keeping the inputs and output gradients of "
            f"{micro_batch.micro_batches} micro-batches takes about {size / 2**20:.0f} MiB, {free / 2**20:.0f} MiB "
            f"are free on {device}"
        )
        return choice
