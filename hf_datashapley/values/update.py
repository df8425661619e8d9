"""The values of one update of the optimizer, gathered over its micro-batches.

Everything stays on the device that trains: nothing here waits for a GPU.

Shapes: N samples of the update, B of a micro-batch, K targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class UpdateValues:
    """One finished update.

    Attributes:
        step: number of the update, from 1.
        sample_ids: int64 [N], as visited (a sample visited twice stands twice).
        tokens: int64 [N], loss tokens.
        values: [N, K], nats of validation loss; all 0 where `skipped`.
        validation_losses: [K], before the update, on the rows that were used.
        clip: 0-dimensional, the factor by which clipping scaled the gradient.
        learning_rate: of the first parameter group.
        skipped: 0-dimensional bool; the optimizer made no step, or the loss or a value was not finite.
        finite: 0-dimensional bool; losses and values were all finite.
    """

    step: int
    sample_ids: Tensor
    tokens: Tensor
    values: Tensor
    validation_losses: Tensor
    clip: Tensor
    learning_rate: float
    skipped: Tensor
    finite: Tensor


class Update:
    """An update in the making: micro-batches are added, then `finish` makes values of their scores."""

    def __init__(self, validation_losses: Tensor, learning_rate: float):
        self.validation_losses = validation_losses
        self.learning_rate = learning_rate
        self.clip = torch.ones_like(validation_losses[0])
        self._sample_ids: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._losses: list[Tensor] = [validation_losses.sum()]

    def add(self, sample_ids: Tensor, tokens: Tensor, scores: Tensor, loss: Tensor) -> None:
        """A micro-batch: int64 [B], int64 [B], <sample's share of the unclipped gradient, u> [B, K], training loss."""
        self._sample_ids.append(sample_ids)
        self._tokens.append(tokens)
        self._scores.append(scores)
        self._losses.append(loss.detach())

    def scores(self) -> Tensor:
        """What has been added so far, [N, K]."""
        return torch.cat(self._scores)

    def finish(self, step: int, optimizer_skipped: bool) -> UpdateValues:
        values = self.scores() * self.clip
        # As the ledger will hold them: a float64 run can have values beyond float32.
        finite = torch.stack([loss.isfinite() for loss in self._losses]).all() & values.float().isfinite().all()
        skipped = ~finite | optimizer_skipped
        return UpdateValues(
            step=step,
            sample_ids=torch.cat(self._sample_ids),
            tokens=torch.cat(self._tokens),
            values=values.masked_fill(skipped, 0.0),
            validation_losses=self.validation_losses,
            clip=self.clip,
            learning_rate=self.learning_rate,
            skipped=skipped,
            finite=finite,
        )
