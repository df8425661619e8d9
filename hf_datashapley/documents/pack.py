"""From documents to rows: `pack_documents`, for tables and for streams.

A table is tokenised by one `map` and cut by another. Where each document begins among all tokens is known between the
two, so which tokens are row r's is known without the rows before it: any number of processes cuts the same rows, and
none is left partly filled at the end of a batch. A stream is read once, in order, by one reader, which carries what
does not fill a row over to the next batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..random_state import random_state_kept
from .counts import Counts, count
from .reading import READ, TOKENS, DocumentReader
from .rows import NOTHING, ROWS, lengths_of, rows_of, tokens_of


logger = logging.get_logger(f"transformers.{__name__}")

DOCUMENT_ID = "document_id"
# Documents may be long, and all of a batch are in memory at once.
READ_AT_ONCE = 100


def pack_documents(
    dataset: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    text_column: str = "text",
    document_id_column: str = DOCUMENT_ID,
    append_eos: bool | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Packs documents into rows of exactly `block_size` tokens, to train on and to value document by document.

    The documents' tokens are laid one after the other and cut every `block_size` tokens. A document that does not fit
    goes on in the next row under the same id. Nothing is dropped: the last row is filled up with padding.

    Each row has

    - `sample_id` (int64): its number, from 0;
    - `input_ids`: its tokens;
    - `labels`: the same, but -100 in padding and at the first token of each piece of a document: no other document
      predicts it, and where a document goes on in the next row, what would predict it stands in the row before;
    - `position_ids`: from 0 in each piece, and in padding; by them transformers makes attention block-diagonal;
    - `document_id` (int64): the document of each token; -1 in padding.

    There is no `attention_mask`: beside one, even of ones, or with `use_cache=True`, transformers takes no notice of
    where positions restart, without a word, and documents attend to those before them. Rows are of one length, so
    `default_data_collator` (`Trainer`'s own choice as long as it is given no `processing_class`) is right for them.
    Collators that pad with a tokenizer (`DataCollatorWithPadding`, which is `Trainer`'s choice with a
    `processing_class`) add an attention mask, and `DataCollatorForLanguageModeling` also puts labels in place of -100.
    The attention has to be one that is given such masks, "sdpa" or "eager": "flash_attention_2" takes notice of
    positions in batches of one row only.

    **Where a document came from** (source, url, author) is not repeated in the rows, which hold several documents:
    keep the dataset of documents. Without an id column, `dataset[document_id]` is the document; with one, join on it.

    Args:
        dataset: One document a row. A table (`datasets.Dataset`), of which this makes a table, kept where `map` keeps
            its results; or a stream (`datasets.IterableDataset`), of which this makes a stream. A stream is packed by
            one reader in the order of its rows, however many shards it has, since only so rows have ids of their own:
            the packed stream has one shard, more than one loader worker finds nothing to do, and each pass has the
            same rows in the same order (shuffle the packed stream, with a buffer).
        tokenizer: Its special tokens are added as it adds them by itself. Documents may be longer than its
            `model_max_length`.
        block_size: Tokens of a row, at least 2; at most the positions that the model has.
        text_column: The documents' text. If there is none, column `input_ids` has their tokens. Documents that are
            null or empty have no tokens and are in no row.
        document_id_column: Integers from 0. If there is no such column, a document's id is its index in `dataset`
            (in a stream: how many came before it). Rows with the same id are valued as one document, and still do not
            attend to each other.
        append_eos: Whether a document that does not end in the tokenizer's end-of-sequence token gets one, which is
            then part of it. None: if the tokenizer has one.
        num_proc: Processes that a table is packed by. The rows are the same for any number.

    What was packed is told in the `info.description` of a table, and at the end of each pass over a stream by
    transformers' logger (`transformers.logging.set_verbosity_info()`).

    Raises:
        ValueError: an argument, a column or a value cannot be what it is used for; the message says what to do. In a
            stream, values are looked at as they come.
    """
    is_table = isinstance(dataset, datasets.Dataset)
    if not is_table and not isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}: give a datasets.Dataset or datasets.IterableDataset, of a "
            "DatasetDict one split, dataset['train']"
        )
    if block_size < 2:
        raise ValueError(f"block_size={block_size}: give at least 2, or no token has one before it to predict it")
    eos = tokenizer.eos_token_id
    if append_eos and eos is None:
        raise ValueError("append_eos=True, but the tokenizer has no eos_token: set one, or leave append_eos out")
    schema = dataset.features.arrow_schema if is_table else stream_schema(dataset)
    reader = DocumentReader(
        tokenizer,
        content_column(schema.names, text_column),
        id_column(schema.names, document_id_column),
        eos if append_eos is None or append_eos else None,
    )
    reader.check_types(schema)
    pad_token = next((token for token in (tokenizer.pad_token_id, eos) if token is not None), 0)
    if is_table:
        return pack_table(dataset, reader, block_size, pad_token, num_proc)
    if num_proc is not None:
        raise ValueError(f"num_proc={num_proc}: a stream is packed by the process that reads it; leave num_proc out")
    packing = {"documents": dataset, "reader": reader, "block_size": block_size, "pad_token": pad_token}
    return datasets.IterableDataset.from_generator(rows_of_stream, features=ROWS, gen_kwargs=packing)


def content_column(columns: list[str], text_column: str) -> str:
    """
    Raises:
        ValueError: both text and tokens are there, or neither.
    """
    found = [column for column in dict.fromkeys((text_column, TOKENS)) if column in columns]
    if not found:
        raise ValueError(f"no column {text_column!r} (text_column) nor {TOKENS!r} among {columns}: set text_column")
    if len(found) == 2:
        raise ValueError(
            f"columns {text_column!r} and {TOKENS!r} both hold documents: dataset.remove_columns(...) one of them"
        )
    return found[0]


def id_column(columns: list[str], document_id_column: str) -> str | None:
    """The column of the documents' ids, None where rows are counted.

    Raises:
        ValueError: a column was asked for, and is not there.
    """
    if document_id_column in columns:
        return document_id_column
    if document_id_column != DOCUMENT_ID:
        raise ValueError(
            f"no column {document_id_column!r} (document_id_column) among {columns}: name one of integers, or leave "
            "document_id_column out to take each document's index"
        )
    return None


def stream_schema(stream: datasets.IterableDataset) -> pa.Schema:
    """The columns of a stream, from its first row where it does not know them.

    Raises:
        ValueError: it is empty, or only one process's part of a stream.
    """
    if stream._distributed is not None:  # said nowhere else, and the parts would go unnoticed
        raise ValueError(
            "dataset is one process's part of a stream (split_dataset_by_node), and rows packed from different parts "
            "would have the same ids: pack the whole stream; Trainer divides the packed one among processes"
        )
    if stream.features is not None:
        return stream.features.arrow_schema
    with random_state_kept():
        first = next(stream.with_format(None).iter(1), None)
    if first is None:
        raise ValueError("dataset is empty: give it at least one document")
    return as_table(first, None).schema


def as_table(batch: dict[str, list[Any]], schema: pa.Schema | None) -> pa.Table:
    """What a stream yields; with its declared types or, where it declares none, those of the values.

    Not by its own Arrow format, which asks of a stream without declared types that every row shows them, also a null.

    Raises:
        ValueError: no type holds a column's values.
    """
    try:
        return pa.table(batch, schema=schema)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(
            f"documents have values that are not of one type ({error}): declare a type with dataset.cast_column, or "
            "leave such documents out"
        ) from error


def pack_table(
    dataset: datasets.Dataset, reader: DocumentReader, block_size: int, pad_token: int, num_proc: int | None
) -> datasets.Dataset:
    if not len(dataset):
        raise ValueError("dataset is empty: give it at least one document")
    mapping: dict[str, Any] = {"with_indices": True, "batched": True, "batch_size": READ_AT_ONCE, "num_proc": num_proc}
    documents = (
        dataset.select_columns(reader.columns)
        .with_format("arrow")
        .map(reader, remove_columns=reader.columns, features=READ, desc="Tokenising documents", **mapping)
    )
    lengths_D = lengths_of(documents.data)
    counts = count(lengths_D, documents.data["eos_appended"].to_numpy(), 0, block_size)
    if not counts.tokens:
        raise ValueError(
            f"none of the {counts.documents} documents has a token: is column {reader.column!r} the text?"
        )
    if reader.id_column is not None:
        repeated = counts.documents - len(np.unique(documents.data["document_id"].to_numpy()))
        if repeated:
            logger.warning(
                f"{repeated} documents have an id of {reader.id_column!r} that another one before them has: documents "
                "with the same id are valued as one"
            )
    cut = RowsBeginningIn(documents, np.concatenate([[0], lengths_D.cumsum()]), block_size, pad_token)
    packed = documents.map(cut, remove_columns=documents.column_names, features=ROWS, desc="Packing rows", **mapping)
    packed.info.description = "pack_documents: " + counts.described(block_size)
    logger.info(packed.info.description)
    return packed.with_format(None)


@dataclass(frozen=True)
class RowsBeginningIn:
    """Of a batch of documents, the rows whose first token is in it; they may reach into later documents.

    `begins` [D + 1] is where each document begins among all tokens, and where the last one ends.
    """

    documents: datasets.Dataset
    begins: np.ndarray
    block_size: int
    pad_token: int

    def __call__(self, _: pa.Table, indices: list[int]) -> pa.Table:
        first_row, last_row = -(-self.begins[[indices[0], indices[-1] + 1]] // self.block_size)
        begin, end = first_row * self.block_size, min(last_row * self.block_size, self.begins[-1])
        if begin >= end:
            return rows_of(NOTHING, self.block_size, first_row, self.pad_token)
        first, last = np.searchsorted(self.begins, begin, "right") - 1, np.searchsorted(self.begins, end, "left")
        tokens = tokens_of(self.documents[int(first) : int(last)])
        tokens = tokens.part(begin - self.begins[first], end - self.begins[first])
        return rows_of(tokens, self.block_size, first_row, self.pad_token)


def rows_of_stream(
    documents: datasets.IterableDataset, reader: DocumentReader, block_size: int, pad_token: int
) -> Iterator[dict[str, Any]]:
    """The packed rows of a whole stream.

    It is read by `iter(batch_size)`: plain iteration within a loader's worker would yield only that worker's shards,
    and the other workers, which have no part of the packed stream, would never read theirs.
    """
    counts, rows, rest = Counts(), 0, NOTHING
    chosen = documents.select_columns(reader.columns).with_format(None)
    schema = None if chosen.features is None else chosen.features.arrow_schema
    for batch in chosen.iter(READ_AT_ONCE):
        table = as_table(batch, schema)
        read = reader(table, range(counts.documents, counts.documents + len(table)))
        counts = counts.plus(count(lengths_of(read), read["eos_appended"].to_numpy(), counts.tokens, block_size))
        rest = rest.then(tokens_of(read))
        whole = len(rest) - len(rest) % block_size
        yield from rows_of(rest.part(0, whole), block_size, rows, pad_token).to_pylist()
        rows += whole // block_size
        rest = rest.part(whole, len(rest))
    yield from rows_of(rest, block_size, rows, pad_token).to_pylist()
    logger.info("pack_documents: " + counts.described(block_size))
