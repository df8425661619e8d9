"""Running mean, spread and share of negative values between two rows of the training log, kept on the device.

Over the samples of all ranks, so that the log does not depend on who writes it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .update import UpdateValues


class LogStatistics:
    """Sums over the updates since the last `drain`. Skipped updates do not count.

    Sums of values and squares are float64 [K], so that the spread does not cancel away.
    """

    def __init__(self, targets: list[str]):
        self.targets = targets
        self._sums: Tensor | None = None
        self._audits: list[Tensor] = []

    def add(self, update: UpdateValues) -> None:
        losses = update.validation_losses.double()
        whole = torch.stack([torch.ones_like(losses), losses]).masked_fill(update.skipped, 0.0)
        sums = torch.cat([update.totals, whole])
        self._sums = sums if self._sums is None else self._sums + sums
        if update.audit is not None:
            audit = torch.stack([update.audit.samples, update.audit.carried, update.audit.actual]).double()
            self._audits.append(audit.masked_fill(update.skipped, torch.nan))

    def drain(self) -> dict[str, float]:
        """The log's scalars, `shapley/mean` or `shapley/<target>/mean` and so on; waits for the device.

        Those of the audit are means over the updates that were audited."""
        if self._sums is None:
            return {}
        count, total, squares, negative, updates, losses = self._sums.tolist()
        self._sums = None
        audits = torch.stack(self._audits).nanmean(0).tolist() if self._audits else []
        self._audits = []
        scalars = {}
        for k, target in enumerate(self.targets):
            if not count[k]:
                continue
            prefix = f"shapley/{target}/" if target else "shapley/"
            mean = total[k] / count[k]
            scalars[f"{prefix}mean"] = mean
            scalars[f"{prefix}std"] = max(squares[k] / count[k] - mean**2, 0.0) ** 0.5
            scalars[f"{prefix}negative_share"] = negative[k] / count[k]
            scalars[f"{prefix}validation_loss"] = losses[k] / updates[k]
            if audits and not math.isnan(audits[0][k]):  # all of them skipped
                samples, carried, actual = (row[k] for row in audits)
                scalars[f"{prefix}audit_samples"] = samples
                scalars[f"{prefix}audit_carried"] = carried
                scalars[f"{prefix}audit_predicted"] = samples + carried
                scalars[f"{prefix}audit_actual"] = actual
        return scalars
