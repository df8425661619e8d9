"""Rows cut out of documents laid one after the other; pure functions of arrays.

Shapes: D documents, T tokens, R rows of N tokens. A *piece* is what a row holds of one document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from ..loss_tokens import IGNORED
from .reading import TOKENS, lists


PADDING = -1  # the document id of padding
ROWS = Features(
    {
        "sample_id": Value("int64"),
        TOKENS: List(Value("int32")),
        "labels": List(Value("int32")),
        "position_ids": List(Value("int32")),
        "document_id": List(Value("int64")),
    }
)


@dataclass(frozen=True)
class Tokens:
    """Documents one after the other: token ids, the id of each token's document, and whether it is its first token."""

    ids_T: np.ndarray
    document_T: np.ndarray
    first_T: np.ndarray

    def __len__(self) -> int:
        return len(self.ids_T)

    def part(self, begin: int, end: int) -> Tokens:
        return Tokens(self.ids_T[begin:end], self.document_T[begin:end], self.first_T[begin:end])

    def then(self, other: Tokens) -> Tokens:
        return Tokens(
            np.concatenate([self.ids_T, other.ids_T]),
            np.concatenate([self.document_T, other.document_T]),
            np.concatenate([self.first_T, other.first_T]),
        )


NOTHING = Tokens(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, bool))


def tokens_of(documents: pa.Table) -> Tokens:
    """The tokens of a table of `reading.READ`."""
    tokens = [chunk.flatten().to_numpy() for chunk in documents[TOKENS].chunks]
    lengths_D = lengths_of(documents)
    first_T = np.zeros(lengths_D.sum(), bool)
    first_T[(lengths_D.cumsum() - lengths_D)[lengths_D > 0]] = True
    return Tokens(np.concatenate(tokens), np.repeat(documents["document_id"].to_numpy(), lengths_D), first_T)


def lengths_of(documents: pa.Table) -> np.ndarray:
    """Tokens of each document, int64 [D]."""
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in documents[TOKENS].chunks]).astype(np.int64)


def rows_of(tokens: Tokens, block_size: int, first_row: int, pad_token: int) -> pa.Table:
    """A table of `ROWS`, numbered from `first_row`. What a last row lacks is filled by a piece of padding."""
    lacking = -len(tokens) % block_size
    if lacking:
        padding = Tokens(np.full(lacking, pad_token, np.int32), np.full(lacking, PADDING), np.arange(lacking) == 0)
        tokens = tokens.then(padding)
    place_T = np.arange(len(tokens))
    begins_T = tokens.first_T | (place_T % block_size == 0)
    # The place where the piece of each token begins.
    begin_T = np.maximum.accumulate(np.where(begins_T, place_T, 0))
    labels_T = np.where(begins_T | (tokens.document_T == PADDING), IGNORED, tokens.ids_T)
    rows = len(tokens) // block_size
    lengths_R = np.full(rows, block_size)
    columns_T = [tokens.ids_T, labels_T.astype(np.int32), (place_T - begin_T).astype(np.int32), tokens.document_T]
    return pa.table(
        [first_row + np.arange(rows), *(lists(column_T, lengths_R) for column_T in columns_T)],
        schema=ROWS.arrow_schema,
    )
