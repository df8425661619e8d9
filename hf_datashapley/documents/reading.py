"""From a batch of raw documents, of text or of token ids, to token ids with a document's id beside them.

Tokens are kept in int32 on the way, and as one array for many documents: a corpus has many more tokens than documents,
and Python would spend most of its time and memory on single integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase


TOKENS = "input_ids"
LARGEST_TOKEN = np.iinfo(np.int32).max
LARGEST_ID = np.iinfo(np.int64).max
READ = Features({"document_id": Value("int64"), TOKENS: List(Value("int32")), "eos_appended": Value("bool")})
ID_CURE = (
    "number the documents, dataset.add_column({column!r}, range(len(dataset))), and keep names in another column; or "
    "remove this column, and each document's id is its index"
)


@dataclass(frozen=True)
class DocumentReader:
    """Turns batches of documents, Arrow tables, into tables of `READ`, one row for each document.

    `column` is that of the text, or `TOKENS`; `id_column` None gives each document its index; `eos` None appends
    nothing. A document without text or tokens (empty, or null) has no tokens in the end either.
    """

    tokenizer: PreTrainedTokenizerBase
    column: str
    id_column: str | None
    eos: int | None

    @property
    def columns(self) -> list[str]:
        return [self.column] if self.id_column is None else [self.column, self.id_column]

    def __call__(self, batch: pa.Table, indices: Sequence[int]) -> pa.Table:
        """
        Raises:
            ValueError: a column is of another type than its use asks for, or has a value that cannot be.
        """
        self.check_types(batch.schema)
        ids = np.asarray(indices, np.int64) if self.id_column is None else document_ids(batch, self.id_column)
        tokens_T, lengths_D = given_tokens(batch[TOKENS]) if self.column == TOKENS else self._tokenise(batch)
        appended_D = np.zeros(len(lengths_D), bool)
        if self.eos is not None:
            ends_D = lengths_D.cumsum()
            filled_D = lengths_D > 0
            appended_D[filled_D] = tokens_T[ends_D[filled_D] - 1] != self.eos
            tokens_T = np.insert(tokens_T, ends_D[appended_D], self.eos)
            lengths_D = lengths_D + appended_D
        return pa.table([ids, lists(tokens_T, lengths_D), appended_D], schema=READ.arrow_schema)

    def check_types(self, schema: pa.Schema) -> None:
        """
        Raises:
            ValueError: a column's type does not suit its use. One of nulls only suits text and tokens.
        """
        found = schema.field(self.column).type
        wanted = "token ids" if self.column == TOKENS else "text"
        suits = is_token_list(found) if self.column == TOKENS else is_text(found)
        if not (suits or pa.types.is_null(found)):
            raise ValueError(
                f"column {self.column!r} holds {found}, not {wanted}: give documents as text or token ids"
            )
        if self.id_column is not None and not pa.types.is_integer(schema.field(self.id_column).type):
            raise ValueError(
                f"document ids in column {self.id_column!r} are of type {schema.field(self.id_column).type}, not "
                f"integers: {ID_CURE.format(column=self.id_column)}"
            )

    def _tokenise(self, batch: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        texts = batch[self.column].to_pylist()
        filled = [text for text in texts if text]
        lengths_D = np.zeros(len(texts), np.int64)
        if not filled:
            return np.zeros(0, np.int32), lengths_D
        # verbose=False: that a document is longer than the model's context is no fault here.
        encoded = self.tokenizer(filled, verbose=False, return_attention_mask=False, return_token_type_ids=False)
        tokens = [np.asarray(own, np.int32) for own in encoded[TOKENS]]
        lengths_D[[bool(text) for text in texts]] = [len(own) for own in tokens]
        return np.concatenate(tokens), lengths_D


def is_text(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)


def is_token_list(found: pa.DataType) -> bool:
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
    # Empty lists alone have no type of their own.
    return is_list and (pa.types.is_integer(found.value_type) or pa.types.is_null(found.value_type))


def lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """`values` cut into lists of these lengths, one after the other."""
    return pa.ListArray.from_arrays(np.concatenate([[0], lengths.cumsum()]).astype(np.int32), pa.array(values))


def given_tokens(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids that were there already, int32 [T], and how many each document has, int64 [D].

    Raises:
        ValueError: one is null, negative or beyond int32.
    """
    if pa.types.is_null(column.type):
        return np.zeros(0, np.int32), np.zeros(len(column), np.int64)
    lengths_D = np.asarray(pc.fill_null(pc.list_value_length(column), 0), np.int64)
    tokens = pc.list_flatten(column)
    if tokens.null_count:
        raise ValueError(f"column {TOKENS!r} has token ids that are null: leave them out")
    tokens_T = np.asarray(tokens)
    outside = tokens_T[(tokens_T < 0) | (tokens_T > LARGEST_TOKEN)]
    if len(outside):
        raise ValueError(f"column {TOKENS!r} has {outside[0]}, which is no token id: leave out padding and masks")
    return tokens_T.astype(np.int32), lengths_D


def document_ids(batch: pa.Table, column: str) -> np.ndarray:
    """The ids that the documents bring along, int64 [D].

    Raises:
        ValueError: one is null, negative or beyond int64.
    """
    found = batch[column]
    cure = ID_CURE.format(column=column)
    if found.null_count:
        raise ValueError(f"{found.null_count} documents have no id in column {column!r}: {cure}")
    ids = np.asarray(found)
    outside = ids[(ids < 0) | (ids > LARGEST_ID)]
    if len(outside):
        raise ValueError(f"column {column!r} has {outside[0]}, not an integer from 0 to 2**63 - 1: {cure}")
    return ids.astype(np.int64)
