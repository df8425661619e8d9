"""The gradient of the validation loss, on rows that are drawn in turn.

Each named target has rows of its own. Which rows an update uses is a function of the update's number alone (a
permutation of the target's rows for each pass over them, from a generator of its own), so that it can be asked for
afterwards, is the same on every rank, and needs no state to resume. Nothing of training is touched: no global random
state, no `.grad`, no train or eval flag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..full_precision import full_dtype, in_full
from ..loss_tokens import count_loss_tokens
from ..random_state import random_state_kept
from ..ranks import Ranks


Batch = Mapping[str, Any]
Collate = Callable[[list[Any]], Batch]

# By which the loss is scaled less when its gradient has left float16's range, once and again.
SMALLER_SCALES = (1.0, 2.0**-8, 2.0**-16, 2.0**-24)


@dataclass
class ValidationTarget:
    """Rows whose mean token loss is to be explained; `usable` are the indices of those that have a loss token."""

    name: str
    rows: Sequence[Any]
    collate: Collate
    usable: np.ndarray

    @classmethod
    def of(
        cls, name: str, rows: Sequence[Any], collate: Collate, shifted: bool, packs: bool, progress: bool
    ) -> ValidationTarget:
        """Finds the rows that have loss tokens. `packs`: `collate` makes one row of all that it is given.

        Raises:
            ValueError: none of the rows has a label.
        """
        usable: list[int] = []
        chunk = 1 if packs else 64
        starts = tqdm(range(0, len(rows), chunk), f"validation labels{_of(name)}", disable=not progress, leave=False)
        for start in starts:
            indices = range(start, min(start + chunk, len(rows)))
            with random_state_kept():
                batch = collate([rows[i] for i in indices])
            if "labels" not in batch:
                raise ValueError(
                    f"validation_dataset{_of(name)} has no labels after the data collator: give its rows `labels`, or "
                    "use a collator that makes them (DataCollatorForLanguageModeling(tokenizer, mlm=False))"
                )
            counts = count_loss_tokens(batch["labels"], shifted)
            usable.extend(i for i, count in zip(indices, counts.tolist(), strict=True) if count)
        if not usable:
            raise ValueError(
                f"validation_dataset{_of(name)}: every label of every row is -100, so there is no loss to explain; "
                "label the tokens that should count"
            )
        return cls(name, rows, collate, np.array(usable))

    def draw(self, turn: int, size: int, seed: int) -> np.ndarray:
        """Row indices of the turn-th draw (from 0) of `size` rows; every row is drawn once before any is again."""
        count = len(self.usable)
        size = min(size, count)
        stream = np.arange(turn * size, (turn + 1) * size)
        passes = {p: np.random.default_rng([seed, p]).permutation(self.usable) for p in np.unique(stream // count)}
        return np.array([passes[position // count][position % count] for position in stream])


@dataclass
class Validation:
    """All targets, and how to compute their losses and gradients.

    `size` rows of each target are used at an update, in forward passes of at most `chunk` rows; a draw serves
    `interval` updates. `loss(model, batch)` gives the mean token loss of a batch on the model's device. Of several
    ranks each takes a part of the rows, and all get the same gradients and losses. Where backward passes run in
    float16, `loss_scale()` is what keeps their gradients in its range, 0-dimensional; else None.
    """

    targets: list[ValidationTarget]
    loss: Callable[[nn.Module, Batch], Tensor]
    shifted: bool
    size: int
    chunk: int
    interval: int
    seed: int
    ranks: Ranks = Ranks()
    loss_scale: Callable[[], Tensor | None] = lambda: None

    def rows_of(self, update: int) -> dict[str, np.ndarray]:
        """Indices of the rows that update number `update` (from 1) is scored against, by target."""
        turn = (update - 1) // self.interval
        return {target.name: target.draw(turn, self.size, self.seed) for target in self.targets}

    def fresh(self, update: int) -> bool:
        """Whether this update takes a new draw."""
        return (update - 1) % self.interval == 0

    def gradients(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        update: int,
        differentiate: Callable[[Tensor], Sequence[Tensor]] | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of every target's mean token loss, [K, *shape] by parameter name, and the losses, [K].

        Both are summed up, and returned, in full precision.

        `differentiate` makes something else of a loss, linear in it and of the shapes of `parameters`.

        With a loss scale, the pass is made again with a smaller one where a gradient has overflowed: training's own
        may be in range, and step. To see that, the host waits for the device, as the scaler does at every step. The
        scale is looked for afresh each time, so that a run that is resumed makes the same passes.
        """
        if differentiate is None:
            chosen = list(parameters.values())
            differentiate = partial(torch.autograd.grad, inputs=chosen, materialize_grads=True)
        scale = self.loss_scale()
        if scale is None:
            return self._gradients(model, parameters, update, differentiate, None)
        for smaller in SMALLER_SCALES:
            found, losses = self._gradients(model, parameters, update, differentiate, scale * smaller)
            # All ranks hold the same bits, so all see the same. No scale mends a loss that is not finite.
            if not overflowed(found, losses):
                break
        return found, losses

    def _gradients(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        update: int,
        differentiate: Callable[[Tensor], Sequence[Tensor]],
        scale: Tensor | None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        chosen = list(parameters.values())
        per_target = []
        losses = []
        with evaluating(model), random_state_kept():
            tokens, targets = self._shares(model, update)
            for shares in targets:
                total_loss, total = no_loss(model), None
                for loss in shares:
                    found = differentiate(loss if scale is None else loss * scale)
                    total_loss += loss.detach()
                    if total is None:
                        total = [in_full(gradient) for gradient in found]
                    else:
                        for sum_, gradient in zip(total, found, strict=True):
                            sum_ += gradient
                losses.append(total_loss)
                if total is None:  # no row is this rank's
                    total = [torch.zeros_like(p, dtype=full_dtype(p.dtype), requires_grad=False) for p in chosen]
                per_target.append(total if scale is None else [gradient / scale for gradient in total])
        if len(per_target) == 1:
            stacked = [gradient.unsqueeze(0) for gradient in per_target[0]]
        else:
            stacked = [torch.stack(gradients) for gradients in zip(*per_target, strict=True)]
        summed = torch.stack(losses)
        self.ranks.sum_([*stacked, summed])
        return dict(zip(parameters, stacked, strict=True)), defined(summed, tokens)

    @torch.no_grad()
    def losses(self, model: nn.Module, update: int) -> Tensor:
        """Every target's mean token loss on the rows of an update, [K].

        Not under autocast: these losses are for differences between the two ends of a step, which in half precision
        are smaller than the rounding of either.
        """
        with evaluating(model), without_autocast(model), random_state_kept():
            tokens, targets = self._shares(model, update)
            summed = torch.stack([sum(shares, no_loss(model)) for shares in targets])
        self.ranks.sum_([summed])
        return defined(summed, tokens)

    def _shares(self, model: nn.Module, update: int) -> tuple[Tensor, Iterator[Iterator[Tensor]]]:
        """The targets' loss tokens on all ranks, [K]; and for each the losses of chunks of this rank's rows.

        Each loss is weighted by its share of the tokens: over chunks and ranks they add up to the mean token loss.
        """
        rows = self.rows_of(update)
        batches = [self._own_batches(target, rows[target.name]) for target in self.targets]
        tokens = no_loss(model).new_tensor([sum(count for _, count in found) for found in batches])
        self.ranks.sum_([tokens])
        return tokens, (self._weighted(model, found, total) for found, total in zip(batches, tokens, strict=True))

    def _own_batches(self, target: ValidationTarget, rows: np.ndarray) -> list[tuple[Batch, int]]:
        """Chunks of the rows that are this rank's, and their loss tokens."""
        own = rows[self.ranks.index :: self.ranks.count]
        starts = range(0, len(own), self.chunk)
        batches = [target.collate([target.rows[int(i)] for i in own[start : start + self.chunk]]) for start in starts]
        return [(batch, int(count_loss_tokens(batch["labels"], self.shifted).sum())) for batch in batches]

    def _weighted(self, model: nn.Module, batches: list[tuple[Batch, int]], total: Tensor) -> Iterator[Tensor]:
        for batch, count in batches:
            if count:  # a collator that masks at random may leave a row without a label
                yield in_full(self.loss(model, batch)) * (count / total)


def overflowed(gradients: dict[str, Tensor], losses: Tensor) -> bool:
    """Whether a target's loss is finite and its gradient is not; waits for the device."""
    finite = torch.stack([gradient.flatten(1).isfinite().all(1) for gradient in gradients.values()]).all(0)
    return bool((losses.isfinite() & ~finite).any())


def defined(losses: Tensor, tokens: Tensor) -> Tensor:
    """Mean token losses [K]; NaN where no token has one."""
    return losses / tokens.gt(0)


def no_loss(model: nn.Module) -> Tensor:
    some = next(model.parameters())
    return some.new_zeros((), dtype=full_dtype(some.dtype))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off; every module's own train or eval flag comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Within it the model runs in the precision of its weights, unless its attention cannot.

    accelerate's mixed precision is a `forward` on the instance, which an autocast around it would not switch off.
    """
    own = vars(model)
    if "_original_forward" not in own or needs_half_precision(model):
        yield
        return
    mixed = own["forward"]
    own["forward"] = own["_original_forward"]
    try:
        yield
    finally:
        own["forward"] = mixed


def needs_half_precision(model: nn.Module) -> bool:
    """Whether a kernel of flash attention, which takes nothing else, is part of the model."""
    return any(
        "flash" in (module.config._attn_implementation or "")
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    )


def _of(name: str) -> str:
    return f"[{name!r}]" if name else ""
