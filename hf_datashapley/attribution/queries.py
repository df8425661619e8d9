"""What is asked about: single queries, the mean over all of them, or property functions of the model.

    rows        for each row, its mean token loss
    mean        the mean of these, as one
    functions   any function of the model that gives a scalar, to become small like a loss

A property that is no row's loss has no output but itself: TRAK's log odds, say, are then not asked for.

Shapes: Q queries, K of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..full_precision import in_full
from ..ghost.capture import Capture
from .batched import Directions, add_gradients, zeros
from .corpus import Corpus
from .losses import Output, differentiated, token_losses
from .measures import mean_over_tokens, moved


Property = Callable[[nn.Module], Tensor]


class Queries(Protocol):
    """`count`: Q."""

    @property
    def count(self) -> int: ...

    def gradients(
        self, model: nn.Module, capture: Capture, chunk: range, output: Output
    ) -> tuple[Directions, Tensor | None]:
        """Of some of them; and their mean losses, [K], None where the gradients are of no output but themselves."""


@dataclass(frozen=True)
class EachRow:
    """`output` is meaned over a row's tokens."""

    rows: Corpus

    @property
    def count(self) -> int:
        return self.rows.count

    def gradients(
        self, model: nn.Module, capture: Capture, chunk: range, output: Output
    ) -> tuple[Directions, Tensor | None]:
        parameters = list(capture.parameters.values())
        found, mean_losses = [], []
        for query in chunk:
            (batch,) = self.rows.batches(query, query + 1)
            losses = token_losses(model, moved(batch.inputs, parameters[0].device), self.rows.reading.shifted)
            own = torch.autograd.grad(differentiated(losses, output), parameters, materialize_grads=True)
            tokens = batch.tokens.to(parameters[0].device)
            found.append([mean_over_tokens(in_full(g).view(1, -1), tokens, query).view(g.shape) for g in own])
            mean_losses.append(losses.detach().sum() / tokens[0])
        by_name = zip(capture.parameters, zip(*found, strict=True), strict=True)
        return {name: torch.stack(own) for name, own in by_name}, torch.stack(mean_losses)


@dataclass(frozen=True)
class MeanOfRows:
    """Every row counts alike, whatever its length."""

    rows: Corpus
    count: int = 1

    def gradients(
        self, model: nn.Module, capture: Capture, chunk: range, output: Output
    ) -> tuple[Directions, Tensor | None]:
        device = next(iter(capture.parameters.values())).device
        sums, first = zeros(capture), 0
        for batch in self.rows.batches(0, self.rows.count):
            losses = token_losses(model, moved(batch.inputs, device), self.rows.reading.shifted)
            sums_U1 = batch.units.sum(losses.unsqueeze(-1))
            means_U1 = mean_over_tokens(sums_U1, batch.tokens.to(device), first)
            add_gradients(sums, means_U1.sum() / self.rows.count, capture)
            first += batch.units.count
        return {name: own.unsqueeze(0) for name, own in sums.items()}, None


@dataclass(frozen=True)
class Properties:
    functions: Sequence[Property]

    @property
    def count(self) -> int:
        return len(self.functions)

    def gradients(
        self, model: nn.Module, capture: Capture, chunk: range, output: Output
    ) -> tuple[Directions, Tensor | None]:
        parameters = list(capture.parameters.values())
        found = []
        for number in chunk:
            value = self.functions[number](model)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"property function {number} gives {shown}: return one number that depends on the model's "
                    "parameters, with its graph (no torch.no_grad, no .item())"
                )
            own = torch.autograd.grad(value.sum(), parameters, materialize_grads=True)
            found.append([in_full(g) for g in own])
        by_name = zip(capture.parameters, zip(*found, strict=True), strict=True)
        return {name: torch.stack(own) for name, own in by_name}, None


@dataclass(frozen=True)
class Asked:
    """What was given to `score`: rows, one property function, or several; and whether the rows' mean is asked for.

    Raises:
        ValueError: the mean of functions is asked for.
    """

    given: Any
    mean: bool = False

    def __post_init__(self) -> None:
        if self.mean and self._functions() is not None:
            raise ValueError("mean=True is of rows: give a function that makes the mean itself")

    def of(self, rows: Callable[[Any], Corpus]) -> EachRow | MeanOfRows | Properties:
        """`rows` reads a dataset."""
        functions = self._functions()
        if functions is not None:
            return Properties(functions)
        return MeanOfRows(rows(self.given)) if self.mean else EachRow(rows(self.given))

    def _functions(self) -> Sequence[Property] | None:
        given = [self.given] if callable(self.given) else self.given
        return given if isinstance(given, list | tuple) and given and all(map(callable, given)) else None
