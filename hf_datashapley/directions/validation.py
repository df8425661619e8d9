"""The gradient of the validation loss, on rows that are drawn in turn.

Each named target has rows of its own. Which rows an update uses is a function of the update's number alone (a
permutation of the target's rows for each pass over them, from a generator of its own), so that it can be asked for
afterwards, is the same on every rank, and needs no state to resume. Nothing of training is touched: no global random
state, no `.grad`, no train or eval flag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..full_precision import in_full
from ..loss_tokens import count_loss_tokens
from ..random_state import random_state_kept


Batch = Mapping[str, Any]
Collate = Callable[[list[Any]], Batch]


@dataclass
class ValidationTarget:
    """Rows whose mean token loss is to be explained; `usable` are the indices of those that have a loss token."""

    name: str
    rows: Sequence[Any]
    collate: Collate
    usable: np.ndarray

    @classmethod
    def of(cls, name: str, rows: Sequence[Any], collate: Collate, shifted: bool, progress: bool) -> ValidationTarget:
        """Finds the rows that have loss tokens.

        Raises:
            ValueError: none of the rows has a label.
        """
        usable: list[int] = []
        chunk = 64
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
    `interval` updates. `loss(model, batch)` gives the mean token loss of a batch on the model's device. Where backward
    passes run in float16, `loss_scale()` is what keeps their gradients in its range, 0-dimensional; else None.
    """

    targets: list[ValidationTarget]
    loss: Callable[[nn.Module, Batch], Tensor]
    shifted: bool
    size: int
    chunk: int
    interval: int
    seed: int
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
        """
        chosen = list(parameters.values())
        if differentiate is None:
            differentiate = partial(torch.autograd.grad, inputs=chosen, materialize_grads=True)
        rows = self.rows_of(update)
        scale = self.loss_scale()
        per_target = []
        losses = []
        with evaluating(model), random_state_kept():
            for target in self.targets:
                total_loss: Tensor | None = None
                total: list[Tensor] = []
                for loss in self._shares(model, target, rows[target.name]):
                    found = differentiate(loss if scale is None else loss * scale)
                    if total_loss is None:
                        total_loss, total = loss.detach(), [in_full(gradient) for gradient in found]
                    else:
                        total_loss = total_loss + loss.detach()
                        for sum_, gradient in zip(total, found, strict=True):
                            sum_ += gradient
                assert total_loss is not None
                losses.append(total_loss)
                per_target.append(total if scale is None else [gradient / scale for gradient in total])
        if len(per_target) == 1:
            stacked = [gradient.unsqueeze(0) for gradient in per_target[0]]
        else:
            stacked = [torch.stack(gradients) for gradients in zip(*per_target, strict=True)]
        return dict(zip(parameters, stacked, strict=True)), torch.stack(losses)

    @torch.no_grad()
    def losses(self, model: nn.Module, update: int) -> Tensor:
        """Every target's mean token loss on the rows of an update, [K]."""
        rows = self.rows_of(update)
        with evaluating(model), random_state_kept():
            return torch.stack([sum_of(self._shares(model, target, rows[target.name])) for target in self.targets])

    def _shares(self, model: nn.Module, target: ValidationTarget, rows: np.ndarray) -> Iterator[Tensor]:
        """Losses of chunks of the rows, each by its share of the tokens: they add up to the mean token loss."""
        chunks = [
            target.collate([target.rows[int(i)] for i in rows[start : start + self.chunk]])
            for start in range(0, len(rows), self.chunk)
        ]
        tokens = [int(count_loss_tokens(batch["labels"], self.shifted).sum()) for batch in chunks]
        for batch, count in zip(chunks, tokens, strict=True):
            if count == 0 and any(tokens):
                continue  # a collator that masks at random may leave a row without a label
            yield in_full(self.loss(model, batch)) * (count / max(sum(tokens), 1))


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    first, *others = tensors
    return sum(others, first)


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


def _of(name: str) -> str:
    return f"[{name!r}]" if name else ""
