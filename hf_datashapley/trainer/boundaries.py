"""Where documents begin in the rows of a batch, and whether a batch keeps them apart as it should.

Shapes: R rows, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..loss_tokens import IGNORED


def row_documents(row: Any, column: str | None, unit: str) -> np.ndarray:
    """A row's document of each position, int64. Padding (-1) goes to a document beside it, to which it adds nothing.

    Raises:
        ValueError: there are none, or they are not integers from 0 on.
    """
    cure = "make the rows with `pack_documents`, set document_id_column, or set value_unit='sample'"
    if not isinstance(row, Mapping) or column not in row:
        raise ValueError(
            f"value_unit={unit!r}, and a row has no column {column!r} (`document_id_column`) with the document of "
            f"each of its tokens: {cure}"
        )
    ids = np.asarray(row[column])
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or (ids < -1).any() or not (ids >= 0).any():
        raise ValueError(
            f"{column} of a row is not a list of integers from 0 to 2**63 - 1, -1 for padding, one for each token: "
            f"{cure}"
        )
    known = np.flatnonzero(ids >= 0)
    nearest = np.searchsorted(known, np.arange(len(ids)), side="right") - 1
    return ids[known[nearest.clip(min=0)]].astype(np.int64)


def begins(*owners_RT: Tensor) -> Tensor:
    """Where a row begins, or another owner's position, bool [R, T]."""
    found = torch.zeros(owners_RT[0].shape, dtype=torch.bool)
    found[:, 0] = True
    for owner_RT in owners_RT:
        found[:, 1:] |= owner_RT[:, 1:] != owner_RT[:, :-1]
    return found


def check_token_labels(batch: Any, unit: str) -> None:
    """Raises `ValueError` unless each token of the batch has a label."""
    labels = batch.get("labels")
    if labels is None or labels.shape != batch["input_ids"].shape:
        raise ValueError(
            f"value_unit={unit!r}, and the batch has no label for each token: use a model of tokens, or set "
            "value_unit='sample'"
        )


def check_mask(batch: Any) -> None:
    """Raises `ValueError` where positions begin again within what an attention mask joins.

    Then models of transformers take the mask, and let documents attend to each other without a word.
    """
    places, mask = batch.get("position_ids"), batch.get("attention_mask")
    if places is None or mask is None or mask.shape != places.shape:
        return
    joined = mask[:, 1:].bool() & mask[:, :-1].bool()
    if ((places[:, 1:] != places[:, :-1] + 1) & joined).any():
        raise ValueError(
            "validation rows hold documents whose position_ids begin again at each, and an attention_mask beside "
            "which they attend to each other all the same: drop the column attention_mask, use "
            "transformers.default_data_collator, or give rows of one document each"
        )


def check_apart(batch: Any, begins_RT: Tensor, shifted: bool) -> None:
    """Raises `ValueError` where a document's loss takes in another one's tokens, by what the batch says."""
    inside = begins_RT.clone()
    inside[:, 0] = False
    cure = "make the rows with `pack_documents` and keep the column"
    if "attention_mask" in batch:
        raise ValueError(
            "value_unit='document', and the data collator adds an attention_mask, beside which models of transformers "
            "let documents attend to each other: use transformers.default_data_collator, or value_kernel='jvp' where "
            "they are meant to"
        )
    if shifted and batch["labels"][inside].ne(IGNORED).any():
        raise ValueError(
            "value_unit='document', and the first token of a document is labelled, so the document before it would "
            f"have to predict it: label it {IGNORED}; {cure} labels, and a collator that keeps them "
            "(transformers.default_data_collator)"
        )
    places = batch.get("position_ids")
    if places is None or (places[:, 1:] == places[:, :-1] + 1)[inside[:, 1:]].any():
        raise ValueError(
            "value_unit='document', and position_ids do not begin again at each document, so documents attend to each "
            f"other: {cure} position_ids; or set value_kernel='jvp' where they are meant to"
        )
