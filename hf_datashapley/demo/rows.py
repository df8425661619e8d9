"""From documents to rows of tokens that know which document they are from.

A sample is a run of at most `row_tokens` tokens of one document; a longer document goes on in the next row. So values
of samples sum to values of documents, and no attention crosses documents. The price is short last rows: those below
`SHORTEST` tokens are dropped, unless the document has no other, and the rest is padded.

Rows carry no attention mask: padding stands at the end, where causal attention cannot see it, and has no label;
without a mask, attention takes its fastest path.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .corpus import Document


END = "<|endoftext|>"
LEAST_VOCABULARY = 257
SHORTEST = 32  # tokens
ROWS_OF_A_HELD_OUT_DOCUMENT = 4
ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class TokenisedDocument:
    document: Document
    rows: list[list[int]]
    dropped: int  # tokens of a last row that is too short


@dataclass(frozen=True)
class TrainingRows:
    """`dataset` has `sample_id` and `input_ids`; `units` says of each `sample_id` which document it is from."""

    dataset: Dataset
    units: Dataset


def train_tokenizer(texts: Sequence[str], vocabulary: int, row_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be written, no token is unknown. One special token starts each document.

    Raises:
        ValueError: the vocabulary has no room for the 256 bytes and that token.
    """
    if vocabulary < LEAST_VOCABULARY:
        raise ValueError(
            f"the model's folder has no tokenizer, and its vocabulary of {vocabulary} is too small to train one "
            f"({LEAST_VOCABULARY}): put the model's own tokenizer into its folder"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The trainer's own bar does not end its lines; ours follows the texts as it reads them.
    tokenizer.train_from_iterator(tqdm(texts, desc="tokenizer", unit="doc"), trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=row_tokens
    )


def tokenise(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, row_tokens: int
) -> Iterator[TokenisedDocument]:
    """Every document cut into rows."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for i in range(0, len(documents), ENCODED_AT_ONCE):
        batch = documents[i : i + ENCODED_AT_ONCE]
        encoded = tokenizer([document.text for document in batch], add_special_tokens=False, verbose=False)
        for document, tokens in zip(batch, encoded["input_ids"], strict=True):
            tokens = tokens if start is None or tokens[:1] == [start] else [start, *tokens]
            rows = [tokens[j : j + row_tokens] for j in range(0, len(tokens), row_tokens)]
            short = rows.pop() if len(rows) > 1 and len(rows[-1]) < SHORTEST else []
            yield TokenisedDocument(document, rows, len(short))


def draw(documents: Iterable[TokenisedDocument], rows: int, enough: int = 0) -> list[TokenisedDocument]:
    """Whole documents, in the order given, as long as they fit into `rows` rows; one that does not fit is passed over.
    It stops when no more than `enough` rows are free."""
    drawn = []
    for document in documents:
        if rows <= enough:
            break
        if 0 < len(document.rows) <= rows:
            drawn.append(document)
            rows -= len(document.rows)
    return drawn


def training_rows(documents: Sequence[TokenisedDocument], tokenizer: PreTrainedTokenizerBase) -> TrainingRows:
    rows: list[list[int]] = []
    units = []
    for document_id, tokenised in enumerate(documents):
        document = tokenised.document
        for tokens in tokenised.rows:
            units.append(
                {
                    "sample_id": len(rows),
                    "document_id": document_id,
                    "domain": document.domain,
                    "junk": document.junk,
                    "title": document.title,
                    "text": tokenizer.decode(tokens, skip_special_tokens=True),
                }
            )
            rows.append(tokens)
    unit_features = Features(
        {name: Value("int64") for name in ("sample_id", "document_id")}
        | {name: Value("string") for name in ("domain", "junk", "title", "text")}
    )
    return TrainingRows(_dataset(rows), Dataset.from_list(units, features=unit_features))


def validation_rows(documents: Sequence[TokenisedDocument], seed: int) -> Dataset:
    """At most four rows of each held-out document, spread over it, in an order drawn with the seed: the rows are used
    in turn, and those of an update should not be of one document."""
    chosen = []
    for document in documents:
        apart = max(1, len(document.rows) // ROWS_OF_A_HELD_OUT_DOCUMENT)
        chosen += document.rows[::apart][:ROWS_OF_A_HELD_OUT_DOCUMENT]
    random.Random(seed).shuffle(chosen)
    return _dataset(chosen)


def _dataset(rows: list[list[int]]) -> Dataset:
    features = Features({"sample_id": Value("int64"), "input_ids": ListOf(Value("int64"))})
    return Dataset.from_dict({"sample_id": range(len(rows)), "input_ids": rows}, features=features)


def pad_rows(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: `input_ids` and `labels`, [rows, longest row]; the padding's labels are -100."""
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0),
        "labels": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100),
    }
