"""What a run's units say and what their tokens are worth: the ledger joined to the rows trained on, and decoded.

Which pieces a document has is what the ledger tells; the rows give the tokens of the few units that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from hf_datashapley.ledger import load_values
from hf_datashapley.ledger.layout import read_manifest
from hf_datashapley.report.aggregate import arrow_table, target_column
from hf_datashapley.report.decoding import decode, decode_spans
from hf_datashapley.report.rows import TrainingRows, tokens_of_pieces
from hf_datashapley.report.tokens import Piece, TokenTexts


SAMPLE, DOCUMENT = "sample_id", "document_id"


def text_reader(
    directory: Path, key: str, rows: TrainingRows, tokenizer: PreTrainedTokenizerBase
) -> Callable[[int], str]:
    """By a unit's id: the tokens of its pieces, decoded."""
    if key == SAMPLE:
        return lambda sample_id: decode(tokenizer, tokens_of_pieces(rows, [(sample_id, None)]))
    pieces = arrow_table(load_values(directory), [SAMPLE, DOCUMENT]).group_by([SAMPLE, DOCUMENT]).aggregate([])
    pieces = pieces.sort_by([(DOCUMENT, "ascending"), (SAMPLE, "ascending")])
    samples, documents = pieces[SAMPLE].to_numpy(), pieces[DOCUMENT].to_numpy()

    def read(document_id: int) -> str:
        first, end = np.searchsorted(documents, [document_id, document_id + 1])
        return decode(tokenizer, tokens_of_pieces(rows, [(int(s), document_id) for s in samples[first:end]]))

    return read


def token_texts_of(
    directory: Path, key: str, rows: TrainingRows, tokenizer: PreTrainedTokenizerBase
) -> TokenTexts | None:
    """None in a ledger without values of tokens."""
    manifest = read_manifest(directory)
    if manifest["unit"] != "token":
        return None
    columns = [target_column(target) for target in manifest["targets"] or [""]]
    table = arrow_table(load_values(directory), [SAMPLE, DOCUMENT, "position", *columns])
    table = table.filter(pc.field("position") >= 0).sort_by([(key, "ascending"), (SAMPLE, "ascending")])
    units = table[key].to_numpy()
    if not len(units):
        return None

    def read(unit_id: int) -> list[Piece]:
        first, end = np.searchsorted(units, [unit_id, unit_id + 1])
        return pieces_of(table.slice(first, end - first), rows, columns, unit_id if key == DOCUMENT else None)

    sums = table.group_by(key, use_threads=False).aggregate([(column, "sum") for column in columns])
    value_KC = np.stack([sums[f"{column}_sum"].to_numpy() for column in columns])
    return TokenTexts(sums[key].to_numpy(), value_KC, read, partial(decode_spans, tokenizer))


def pieces_of(table: pa.Table, rows: TrainingRows, columns: list[str], document_id: int | None) -> list[Piece]:
    """Of one unit's tokens, sorted by sample.

    Raises:
        ValueError: a token has a value where the rows have none of its document's.
    """
    samples, positions = table[SAMPLE].to_numpy(), table["position"].to_numpy()
    nats_KT = np.stack([table[column].to_numpy() for column in columns])
    pieces = []
    for sample_id in np.unique(samples):
        own = samples == sample_id
        place_T, token_T = rows.tokens(int(sample_id), document_id)
        found = np.searchsorted(place_T, positions[own]).clip(max=len(place_T) - 1)
        if (place_T[found] != positions[own]).any():
            raise ValueError(
                f"--dataset: sample {sample_id} has values at positions where its row has no token"
                + ("" if document_id is None else f" of document {document_id}")
                + ": give the rows that the run was trained on, in their order or with their ids"
            )
        value_KT = np.full((len(columns), len(place_T)), np.nan)
        value_KT[:, found] = nats_KT[:, own]
        pieces.append(Piece(int(sample_id), token_T, value_KT))
    return pieces
