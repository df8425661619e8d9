"""How a micro-batch gets its scores, where the directions are known.

`BackwardScorer` takes them from the backward pass, under capture: of rows, or of runs of positions that attend to
themselves only. `ForwardScorer` leaves training alone and differentiates every token's own loss forward, for tokens,
and for documents that attend to each other (`ghost.forward_mode`).

Shapes: U units of a micro-batch, K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..ghost.capture import Capture
from ..ghost.units import Places, Units
from ..random_state import RandomState, random_state_kept


Directions = dict[str, Tensor]


@dataclass
class MicroBatch:
    """What is known of a micro-batch.

    `run` makes Trainer's own forward and backward pass of it; `run_again` the same, without a word to other ranks.
    `token_derivatives(directions)` gives every token's own loss and its derivatives, see `ghost.forward_mode`.
    """

    units: Units | Places
    positions: int  # of all its rows
    micro_batches: int  # in the whole update
    run: Callable[[], Tensor]
    run_again: Callable[[], Tensor]
    token_derivatives: Callable[[Directions], tuple[Tensor, Tensor]]


class Scorer(Protocol):
    """Scores are <what a backward pass gives as the unit's gradient, direction>, [U, K]; directions [K, *shape]."""

    def training(self, micro_batch: MicroBatch, directions: Directions) -> tuple[Tensor, Tensor]:
        """Runs the micro-batch; its loss and scores."""

    def replayed(self, micro_batch: MicroBatch, directions: Directions, state: RandomState, loss: Tensor) -> Tensor:
        """The scores of a micro-batch that ran from this random state and had this loss. Random states are kept."""


class BackwardScorer:
    def __init__(self, capture: Capture, model: nn.Module):
        self.capture = capture
        self.model = model

    def training(self, micro_batch: MicroBatch, directions: Directions) -> tuple[Tensor, Tensor]:
        return self._scored(micro_batch, directions, micro_batch.run)

    def replayed(self, micro_batch: MicroBatch, directions: Directions, state: RandomState, loss: Tensor) -> Tensor:
        with random_state_kept(), gradients_aside(self.model):
            state.restore()
            return self._scored(micro_batch, directions, micro_batch.run_again)[1]

    def _scored(
        self, micro_batch: MicroBatch, directions: Directions, run: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        assert not isinstance(micro_batch.units, Places)
        with self.capture.scoring(directions, micro_batch.units) as tap:
            loss = run()
        # No gradient where the loss reaches none of the scored layers.
        return loss, torch.zeros_like(tap) if tap.grad is None else tap.grad


class ForwardScorer:
    def training(self, micro_batch: MicroBatch, directions: Directions) -> tuple[Tensor, Tensor]:
        state = RandomState()
        loss = micro_batch.run()
        return loss, self.replayed(micro_batch, directions, state, loss)

    def replayed(self, micro_batch: MicroBatch, directions: Directions, state: RandomState, loss: Tensor) -> Tensor:
        assert isinstance(micro_batch.units, Places)
        with random_state_kept():
            state.restore()
            losses_RT, derivatives_RTK = micro_batch.token_derivatives(directions)
        # What training scales the sum of its tokens' losses by; nothing where there are none.
        total = losses_RT.sum()
        factor = torch.where(total == 0, 0.0, loss / total)
        return micro_batch.units.sum(derivatives_RTK) * factor


@contextmanager
def gradients_aside(model: nn.Module) -> Iterator[None]:
    """Backward passes within it leave `.grad` as it was."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        for parameter in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
