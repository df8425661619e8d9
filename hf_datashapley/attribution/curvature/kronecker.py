"""K-FAC and EK-FAC: the Fisher matrix of each parameter by itself, its eigenbasis a Kronecker product.

A weight's gradient is sum_p l_p r_p^T over positions p. With labels drawn from the model's predictions, and N tokens:

    "kfac"    H = (sum_p l_p l_p^T) x (sum_p r_p r_p^T) / (M N)         M positions
    "ekfac"   the eigenbasis of that, and for eigenvalues those of sum_i vec(G_i) vec(G_i)^T / N in it, G_i the
              gradient of row i

(Martens, Grosse, arXiv 1503.05671; George et al., arXiv 1806.03884; for language models Grosse et al., "Studying
Large Language Model Generalization with Influence Functions", arXiv 2308.03296, of which are the eigenvalues of whole
sequences and the damping by 0.1 times their mean.) Of a vector, a bias or a norm's weight, H is exact but for
what labels are drawn: sum_i g_i g_i^T / N.

Assumes that parameters do not interact; "kfac" besides that both sides of a position's gradient, and different
positions of a row, are independent. A tied weight's uses are positions like others to "kfac": what they have in common
is lost, and their sides are averaged. "ekfac" squares the gradient of all uses together, in the averaged basis.

Cost: a forward and a backward pass over the training rows without weights' gradients, for "ekfac" two; beside them,
for each position and weight, products by the squares of both sides, and for "ekfac" each row's gradient (of a tied
table whole, in memory for one row at a time). Memory: the squares of both sides of every weight and a copy of the
parameters, for each member; while fitting, every layer's inputs and output gradients in a batch.

The matrix is of whole rows, also where units are documents, tokens or groups: it does not ask what is scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...full_precision import full_dtype
from ...ghost.capture import Capture
from ...ghost.projection import leaves
from ...ghost.rules import EmbeddingRule, LinearRule
from ...ghost.units import Units
from ...random_state import random_state_kept
from ...ranks import Ranks
from ..batched import Directions
from ..corpus import Corpus
from ..measures import moved
from .block import Block, eigen
from .moments import Moments, counted_positions
from .sampled_labels import row_key, sampled_loss
from .squares import add_squares
from .uses import Records, Use


# Rows between two steps of the progress bar.
SHARD_ROWS = 512

# What a pass does with the uses of each parameter in a batch, its units, and the positions that count.
Take = Callable[[str, list[Use], Units, Tensor], None]


@dataclass(frozen=True)
class Blocks:
    """H^-1 / N by parameter name, damped by `damping` times the mean eigenvalue of each block."""

    blocks: Mapping[str, Block]
    tokens: int
    damping: float

    def of_whole(self, directions: Directions) -> Directions:
        return {name: self.blocks[name].solve(own, self.damping) / self.tokens for name, own in directions.items()}


@dataclass(frozen=True)
class TrainingRows:
    """The training rows, and the processes that go over them together.

    `seed`: of labels.
    """

    corpus: Corpus
    ranks: Ranks
    seed: int
    progress: bool

    def visit(self, model: nn.Module, capture: Capture, what: str, take: Take) -> int:
        """Shows `take` the uses of all parameters in this process's rows; the number of their loss tokens."""
        corpus, some = self.corpus, next(model.parameters())
        starts = range(0, corpus.count, SHARD_ROWS)[self.ranks.index :: self.ranks.count]
        quiet = not (self.progress and self.ranks.is_local_main)
        tokens = 0
        for start in tqdm(starts, what, disable=quiet):
            for batch in corpus.batches(start, min(start + SHARD_ROWS, corpus.count)):
                records = Records(capture.parameters, some.device, full_dtype(some.dtype))
                inputs = moved(batch.inputs, some.device)
                keys = self._keys((batch.place + start).tolist())
                with capture.projecting(records, batch.units) as taps:
                    loss = sampled_loss(model, inputs, batch.units, keys, corpus.reading.shifted, self.seed)
                    torch.autograd.grad(loss, leaves(taps), allow_unused=True)
                counted = counted_positions(inputs, batch.units, corpus.reading.shifted)
                for name, record in records.parameters.items():
                    take(name, record.uses, batch.units, counted)
                tokens += int(batch.tokens.sum())
        return tokens

    def _keys(self, rows: list[int]) -> list[int]:
        with random_state_kept():
            return [row_key(self.corpus.reading.columns.without(self.corpus.rows[row])) for row in rows]


def fitted(model: nn.Module, capture: Capture, rows: TrainingRows, corrected: bool, damping: float) -> Blocks:
    """K-FAC of a model, or where `corrected` EK-FAC."""
    moments, tokens = moments_of(model, capture, rows)
    blocks = {name: factored(own, tokens) for name, own in moments.items()}
    if corrected:
        blocks = corrected_blocks(model, capture, rows, blocks, tokens)
    shapes = {name: tuple(parameter.shape) for name, parameter in capture.parameters.items()}
    assert all(math.prod(shapes[name]) == own.values.numel() for name, own in blocks.items())
    return Blocks(blocks, tokens, damping)


def moments_of(model: nn.Module, capture: Capture, rows: TrainingRows) -> tuple[dict[str, Moments], int]:
    """By parameter name, and the number of loss tokens; of all ranks."""
    tables, matrices = capture.weights_of(EmbeddingRule), capture.weights_of(LinearRule)
    some = next(model.parameters())
    moments = {
        name: Moments(
            parameter.shape if name in tables | matrices else [parameter.numel()],
            name in tables,
            some.device,
            full_dtype(some.dtype),
        )
        for name, parameter in capture.parameters.items()
    }

    def take(name: str, uses: list[Use], units: Units, counted: Tensor) -> None:
        moments[name].add(uses, counted)

    found = rows.visit(model, capture, "curvature: factors", take)
    rows.ranks.sum_([side for own in moments.values() for side in own.sides])
    tokens = torch.tensor(found, dtype=torch.float64, device=some.device)
    rows.ranks.sum_([tokens, *(own.positions for own in moments.values())])
    if not tokens:
        raise ValueError("train_dataset: no row has a labelled token, so there is no curvature: give labels")
    return moments, int(tokens)


def factored(moments: Moments, tokens: int) -> Block:
    """K-FAC's block; of a vector the exact one."""
    bases, values = zip(*map(eigen, moments.sides), strict=True)
    if len(values) == 1:
        return Block(list(bases), values[0] / tokens)
    count = moments.positions.clamp(min=1).to(values[0].dtype)
    return Block(list(bases), torch.outer(values[0] / count, values[1] / tokens))


def corrected_blocks(
    model: nn.Module, capture: Capture, rows: TrainingRows, blocks: dict[str, Block], tokens: int
) -> dict[str, Block]:
    """The same bases, with the eigenvalues of EK-FAC."""
    found = {name: torch.zeros_like(own.values) for name, own in blocks.items() if own.values.ndim == 2}

    def take(name: str, uses: list[Use], units: Units, counted: Tensor) -> None:
        if name in found:
            add_squares(found[name], uses, blocks[name].bases, units)

    rows.visit(model, capture, "curvature: eigenvalues", take)
    rows.ranks.sum_(found.values())
    own: dict[str, Tensor] = {name: values / tokens for name, values in found.items()}
    return {name: Block(block.bases, own.get(name, block.values)) for name, block in blocks.items()}
