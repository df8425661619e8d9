"""The values of one update of the optimizer, gathered over its micro-batches.

Everything stays on the device that trains: nothing here waits for a GPU. Of several ranks each gathers its own
units; what is said of the update as a whole is the same on all of them.

Shapes: N units (samples, documents) of the update on this rank, U of a micro-batch, K targets, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..full_precision import in_full
from ..ranks import Ranks
from .features import Features, encoded


@dataclass
class UpdateAudit:
    """What values account for at one update, against what happened, in nats of the targets' losses; each [K].

    Attributes:
        samples: sum of the samples' values, of "immediate" momentum.
        carried: l_v(w_t) - l_v(w(0)), what momentum and weight decay did alone.
        actual: l_v(w_t) - l_v(w_{t+1}).
    """

    samples: Tensor
    carried: Tensor
    actual: Tensor


@dataclass
class UpdateValues:
    """One finished update.

    Attributes:
        step: number of the update, from 1.
        ids: by name, int64 [N], as visited (a sample visited twice stands twice).
        tokens: int64 [N], loss tokens.
        values: [N, K], nats of validation loss; all 0 where `skipped`.
        validation_losses: [K], before the update (order "path": mean along its path), on the rows that were used;
            NaN where they were not needed, because no step was made.
        clip: 0-dimensional, the factor by which clipping scaled the gradient.
        learning_rate: of the first parameter group.
        skipped: 0-dimensional bool; the optimizer made no step, or the loss or a value was not finite on any rank.
        finite: 0-dimensional bool; losses and, if a step was made, values were all finite.
        totals: float64 [4, K], over the units of all ranks: their number, sum of values, sum of squares, number of
            negative values; all 0 where `skipped`.
        audit: of an audited update; it means nothing where `skipped`.
        features: of the units' shares of the gradient as training averages it, not clipped; where they are asked for.
            All 0 where `skipped`.
    """

    step: int
    ids: dict[str, Tensor]
    tokens: Tensor
    values: Tensor
    validation_losses: Tensor
    clip: Tensor
    learning_rate: float
    skipped: Tensor
    finite: Tensor
    totals: Tensor
    audit: UpdateAudit | None = None
    features: Features | None = None


class Update:
    """An update in the making: micro-batches and scores are added, then `finish` makes values of them.

    Scores, <what a backward pass gives as the unit's gradient, u>, are [U, K] for each micro-batch, in order; an
    update that ends without them has value 0. The unit's share of the unclipped gradient is one rank's part of that
    (ranks average their gradients), without the scale of the loss. Features of the same gradients, where they are
    wanted, are [U, F] for each micro-batch, to be stored in `feature_dtype`.
    """

    def __init__(self, targets: int, learning_rate: float, ranks: Ranks, feature_dtype: torch.dtype = torch.float16):
        self.targets = targets
        self.learning_rate = learning_rate
        self.ranks = ranks
        self.validation_losses: Tensor | None = None
        self.clip: Tensor | None = None
        # What the loss is multiplied by before its backward passes (float16), and so the scores are.
        self.loss_scale: Tensor | None = None
        # Nats that a unit gets for each of its loss tokens, [K] (order "path", smoothed slope).
        self.shared: Tensor | None = None
        self._ids: list[dict[str, Tensor]] = []
        self._tokens: list[Tensor] = []
        self._losses: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.features: list[Tensor] = []
        self.feature_dtype = feature_dtype

    def add(self, ids: dict[str, Tensor], tokens: Tensor, loss: Tensor) -> None:
        """A micro-batch: ids by name, int64 [U], int64 [U], its training loss."""
        self._ids.append(ids)
        self._tokens.append(tokens)
        self._losses.append(in_full(loss.detach()))

    def players_and_tokens(self) -> tuple[Tensor, Tensor]:
        """Units that have a loss token, and loss tokens, on all ranks; 0-dimensional."""
        tokens = torch.cat(self._tokens)
        counts = torch.stack([tokens.gt(0).sum(), tokens.sum()])
        self.ranks.sum_([counts])
        players, total = counts.unbind()
        return players, total

    @property
    def factor(self) -> float | Tensor:
        """What makes c g_i of a gradient that a backward pass gives for unit i."""
        return self.share if self.clip is None else self.share * self.clip

    @property
    def share(self) -> float | Tensor:
        """What makes g_i of it."""
        return 1 / self.ranks.count if self.loss_scale is None else 1 / self.ranks.count / self.loss_scale

    def own_values(self) -> Tensor:
        """<c g_i, u>, [N, K]."""
        if not self.scores:
            return self._losses[0].new_zeros(sum(map(len, self._tokens)), self.targets)
        return torch.cat(self.scores) * self.factor

    def values(self) -> Tensor:
        """With what the units share, [N, K]."""
        values = self.own_values()
        if self.shared is not None:
            tokens = torch.cat(self._tokens).to(values.dtype)
            values = values + tokens.unsqueeze(1) * self.shared
        return values

    def sum_of(self, values: Tensor) -> Tensor:
        """The sum over the units of all ranks, [K]."""
        total = values.sum(0)
        self.ranks.sum_([total])
        return total

    def stored_features(self, skipped: Tensor) -> Features | None:
        if not self.features:
            return None
        return encoded((torch.cat(self.features) * self.share).masked_fill(skipped, 0.0), self.feature_dtype)

    def finish(self, step: int, optimizer_skipped: bool | Tensor, audit: UpdateAudit | None = None) -> UpdateValues:
        values = self.values()
        losses = self.validation_losses
        # As the ledger will hold them: a float64 run can have values beyond float32.
        valued = values.float().isfinite().all()
        if losses is not None:
            valued &= losses.isfinite().all()
        # A gradient that overflowed, and what was computed from it, is why the optimizer skipped, and no news.
        finite = torch.stack([loss.isfinite() for loss in self._losses]).all() & (valued | optimizer_skipped)
        exact = values.double()
        sums = [torch.ones_like(exact), exact, exact.square(), exact.lt(0).double()]
        summed = torch.stack([*(x.sum(0) for x in sums), finite.logical_not().double().expand(self.targets)])
        self.ranks.sum_([summed])
        finite = summed[-1].eq(0).all()
        skipped = ~finite | optimizer_skipped
        return UpdateValues(
            step=step,
            ids={name: torch.cat([ids[name] for ids in self._ids]) for name in self._ids[0]},
            tokens=torch.cat(self._tokens),
            values=values.masked_fill(skipped, 0.0),
            validation_losses=values.new_full((self.targets,), torch.nan) if losses is None else losses,
            clip=torch.ones_like(self._losses[0]) if self.clip is None else self.clip,
            learning_rate=self.learning_rate,
            skipped=skipped,
            finite=finite,
            totals=summed[:-1].masked_fill(skipped, 0.0),
            audit=audit,
            features=self.stored_features(skipped),
        )
