"""How rows are passed whose tokens are of several groups, so that every group's gradient is its own loss's.

A backward pass through a whole row of a loss that has one group's tokens alone gives that group's gradient, whatever
attends to whatever. So a row is passed once for each group in it, as copies that keep the labels of one group each.

A row may do with fewer. A *piece* is what no loss outside of it depends on: a document of a packed row, where the
model keeps documents apart; else the whole row. Copy k keeps of every piece the labels of its k-th group, and sums
over a piece's positions (`Runs`) are that group's. So a row is passed as often as the piece with the most groups has
them: once, where each document is of one group.

Shapes: R rows, C copies of them, T positions, U runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ghost.units import Rows, Runs, Units
from ..loss_tokens import IGNORED
from .collation import CorpusBatch


def piece_begins(inputs: dict[str, Any], predicted_RT: Tensor, apart: bool, shifted: bool) -> Tensor:
    """Where a piece begins, bool [R, T].

    Args:
        predicted_RT: where a label has a loss, bool.
        apart: whether the model keeps documents apart whose position_ids begin again at 0 (beside an attention_mask
            models of transformers never do; of positions that go on elsewhere not all of their kernels take notice).
        shifted: see `loss_tokens.shifts_labels`. The document before it predicts a document's first token, if that
            has a loss, and both are one piece.
    """
    begins_RT = torch.zeros_like(predicted_RT)
    places = inputs.get("position_ids")
    if apart and inputs.get("attention_mask") is None and places is not None and places.shape == begins_RT.shape:
        begins_RT = places == 0
        if shifted:
            begins_RT &= ~predicted_RT
    begins_RT[:, 0] = True
    return begins_RT


def longest_piece(inputs: dict[str, Any]) -> Tensor:
    """Tokens of a batch's first row between two places where position_ids begin again, [1, T]."""
    piece_T = (inputs["position_ids"][0] == 0).cumsum(0)
    tokens: Tensor = inputs["input_ids"][:1, piece_T == torch.bincount(piece_T).argmax()]
    return tokens


def group_passes(inputs: dict[str, Any], place_RT: Tensor, begins_RT: Tensor, most: int) -> Iterator[CorpusBatch]:
    """
    Args:
        inputs: of a batch.
        place_RT: which group a loss token is of, from 0 on, int64; -1 where there is no loss token, or one that is not
            asked for.
        begins_RT: where pieces begin.
        most: rows of a batch.
    """
    length = place_RT.shape[1]
    place = place_RT.flatten().numpy()
    at = np.flatnonzero(place >= 0)
    if not len(at):
        return
    place = place[at]
    everywhere = np.arange(place_RT.numel())
    begin = np.maximum.accumulate(np.where(begins_RT.flatten().numpy(), everywhere, 0))[at]
    copy, row_C = copies_of(at // length, begin, place)
    order = np.argsort(copy, kind="stable")
    at, place, begin, copy = at[order], place[order], begin[order], copy[order]
    for first in range(0, len(row_C), most):
        own = slice(*np.searchsorted(copy, [first, first + most]))
        rows = torch.from_numpy(row_C[first : first + most])
        units, starts_run = runs_of(copy[own] - first, place[own], begin[own] % length, len(rows), length)
        column, row = torch.from_numpy(at[own] % length), torch.from_numpy(copy[own] - first)
        made = repeated(inputs, rows)
        labels = torch.full_like(made["labels"], IGNORED)
        labels[row, column] = made["labels"][row, column]
        tokens = np.bincount(starts_run.cumsum() - 1)
        yield CorpusBatch(
            {**made, "labels": labels}, units, torch.from_numpy(place[own][starts_run]), torch.from_numpy(tokens)
        )


def copies_of(row: np.ndarray, begin: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each token the copy that keeps its label, numbered through; and for each copy its row, [C].

    `row`, `begin`, `place`: each token's row, piece and group.
    """
    width = int(place.max()) + 1
    pairs, pair = np.unique(begin * width + place, return_inverse=True)
    rank = ranks_within(pairs // width)[pair]
    width = int(rank.max()) + 1
    copies, copy = np.unique(row * width + rank, return_inverse=True)
    return copy, copies // width


def runs_of(
    copy: np.ndarray, place: np.ndarray, begin: np.ndarray, copies: int, length: int
) -> tuple[Units, np.ndarray]:
    """The runs of copies, one for pieces of one group that lie side by side; and at which tokens, of those that have a
    label, a run has its first.

    `copy`, `place`, `begin`: each such token's copy, group, and where in the row its piece begins, in order.
    """
    first = np.diff(copy, prepend=-1) != 0
    starts_run = first | (np.diff(place, prepend=-1) != 0)
    if starts_run.sum() == copies:
        return Rows(copies), starts_run
    starts = (copy * length + np.where(first, 0, begin))[starts_run]
    return Runs(np.diff([*starts, copies * length]).tolist(), copies), starts_run


def repeated(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of a batch, again and again if need be."""
    return {key: value[rows] if isinstance(value, Tensor) else value for key, value in inputs.items()}


def ranks_within(row: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... for the entries of each row; rows are in order."""
    begins = np.flatnonzero(np.diff(row, prepend=-1))
    return np.arange(len(row)) - np.repeat(begins, np.diff([*begins, len(row)]))
