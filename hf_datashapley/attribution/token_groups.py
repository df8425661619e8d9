"""Groups of tokens: the group of each token of a row, and where it stands in the batch that a collator makes.

Shapes: L tokens of a row as the dataset has it, R rows of a batch, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm


NO_GROUP = -1
LARGEST_ID = np.iinfo(np.int64).max


def row_groups(row: Any, column: str | None) -> np.ndarray:
    """The group of each of a row's tokens, int64 [L]; negative where it has none.

    Raises:
        ValueError: the row has none, not one for each token, or not integers.
    """
    if not isinstance(row, Mapping) or column not in row:
        raise ValueError(
            f"unit='group', and a row has no column {column!r} (`group_id_column`): give each row a list with the "
            "group of each of its tokens (integers; negative for a token of no group), or name the column that has it"
        )
    if "input_ids" not in row:
        raise ValueError(
            f"unit='group', and a row has no input_ids beside {column!r}: tokenise the rows before (dataset.map), so "
            "that each token has its group"
        )
    ids = np.asarray(row[column])
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (len(ids) and int(ids.max()) > LARGEST_ID):
        raise ValueError(
            f"unit='group', and {column!r} (`group_id_column`) of a row is not a list of integers: number the groups "
            "(pandas.factorize), with a negative number for a token of no group"
        )
    if len(ids) != len(row["input_ids"]):
        raise ValueError(
            f"unit='group', and {column!r} (`group_id_column`) of a row has {len(ids)} entries for "
            f"{len(row['input_ids'])} input_ids: give one for each token"
        )
    return ids.astype(np.int64)


def group_pieces(rows: Any, column: str | None, name: str, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Row and group id of each piece, int64, in the order in which they first appear: what a row holds of one group.

    Args:
        column: of the group of each token.
        name: of the argument that the rows came in.

    Raises:
        ValueError: see `row_groups`; or no token has a group.
    """
    scanned = rows
    if isinstance(rows, datasets.Dataset) and {column, "input_ids"} <= set(rows.column_names):
        scanned = rows.select_columns([column, "input_ids"])
    found, groups = [], []
    for index in tqdm(range(len(rows)), f"{name}: groups", disable=not progress, leave=False):
        own = row_groups(scanned[index], column)
        own = own[own >= 0]
        first = own[np.sort(np.unique(own, return_index=True)[1])]  # as they appear
        found.append(np.full(len(first), index))
        groups.append(first)
    if not any(map(len, groups)):
        raise ValueError(
            f"unit='group', and no token of {name} has a group: {column!r} (`group_id_column`) is negative throughout"
        )
    return np.concatenate(found), np.concatenate(groups)


def group_positions(rows: list[Any], batch: Mapping[str, Any], column: str | None) -> Tensor:
    """The group of each position of a batch, int64 [R, T]; `NO_GROUP` where it has none, as padding.

    Collators do not pad columns that they do not know, so a row's tokens are looked for: at the beginning of its row
    in the batch, or at the end.

    Raises:
        ValueError: they are not there.
    """
    tokens_RT, mask_RT = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(tokens_RT, Tensor):
        raise ValueError(
            "unit='group', and data_collator makes no input_ids, so it cannot be seen where tokens went: use one that "
            "does (transformers.default_data_collator), or unit='sample'"
        )
    if not isinstance(mask_RT, Tensor) or mask_RT.shape != tokens_RT.shape:
        mask_RT = torch.zeros_like(tokens_RT)
    groups_RT = torch.full(tokens_RT.shape, NO_GROUP)
    for row, tokens_T, mask_T, groups_T in zip(rows, tokens_RT, mask_RT, groups_RT, strict=True):
        own_L = row_groups(row, column)
        begin = begin_of(np.asarray(row["input_ids"]), tokens_T.numpy(), mask_T.numpy())
        if begin is None:
            raise ValueError(
                f"unit='group', and data_collator makes other tokens of a row than its {len(own_L)} input_ids, so "
                f"{column!r} does not say whose they are: use one that does no more than pad "
                "(DataCollatorForSeq2Seq(tokenizer), or transformers.default_data_collator)"
            )
        groups_T[begin : begin + len(own_L)] = torch.from_numpy(own_L).clamp(min=NO_GROUP)
    return groups_RT


def begin_of(tokens_L: np.ndarray, tokens_T: np.ndarray, mask_T: np.ndarray) -> int | None:
    """Where a row begins among what it was padded to: with padding behind it, or before it; None: nowhere.

    `mask_T`: not 0 where there is surely no padding.
    """
    spare = len(tokens_T) - len(tokens_L)
    for begin in (0, spare):
        end = begin + len(tokens_L)
        if np.array_equal(tokens_T[begin:end], tokens_L) and not mask_T[:begin].any() and not mask_T[end:].any():
            return begin
    return None
