"""The rows that a run was trained on: which tokens are a sample's, or a document's in a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset

from hf_datashapley.report.aggregate import Ints


OPTION = "--dataset"


@dataclass(frozen=True)
class TrainingRows:
    """Rows with `sample_id`, `input_ids` and, of packed documents, `document_id` for each token."""

    dataset: Dataset
    order: Ints  # rows by rising id
    id_N: Ints  # rising
    has_documents: bool

    @classmethod
    def of(cls, dataset: Dataset) -> TrainingRows:
        """Raises: ValueError, it has no tokens, or a sample has several rows."""
        if "input_ids" not in dataset.column_names:
            raise ValueError(
                f"{OPTION} has no column input_ids (it has {', '.join(dataset.column_names)}), so there are no tokens "
                "to decode: give the rows that the run was trained on, tokenised, or leave --tokenizer out"
            )
        ids = dataset.data["sample_id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        if (np.diff(ids[order]) == 0).any():
            raise ValueError(f"{OPTION} has two rows with the same sample_id: give each sample one")
        has_documents = "document_id" in dataset.column_names and _is_list(dataset.data["document_id"].type)
        return cls(dataset, order, ids[order], has_documents)

    def tokens(self, sample_id: int, document_id: int | None) -> tuple[Ints, Ints]:
        """Places in the row, and the tokens there; of the whole row where `document_id` is None.

        Raises:
            ValueError: the row is not that of the run.
        """
        place = int(np.searchsorted(self.id_N, sample_id))
        if place == len(self.id_N) or self.id_N[place] != sample_id:
            raise ValueError(
                f"{OPTION} has no row for sample {sample_id}, which has a value: give the rows that the run was "
                "trained on, with their ids"
            )
        row = self.dataset[int(self.order[place])]
        token_T = np.array(row["input_ids"], np.int64)
        if "attention_mask" in row:
            # Positions of a ledger are places in the sample, padding not counted.
            token_T = token_T[np.array(row["attention_mask"], bool)]
        if document_id is None:
            return np.arange(len(token_T)), token_T
        if not self.has_documents:
            raise ValueError(
                f"{OPTION} has no list of ids, one for each token, in its column document_id, so documents cannot be "
                "told apart: give the packed rows that the run was trained on (name the column by "
                "--document_id_column), or leave --tokenizer out"
            )
        place_T = np.flatnonzero(np.array(row["document_id"]) == document_id)
        if not len(place_T):
            raise ValueError(
                f"{OPTION}: document {document_id} has a value in sample {sample_id}, and that row has no token of "
                "it: give the rows that the run was trained on, in their order or with their ids"
            )
        return place_T, token_T[place_T]


def _is_list(column: pa.DataType) -> bool:
    return pa.types.is_list(column) or pa.types.is_large_list(column) or pa.types.is_fixed_size_list(column)


def tokens_of_pieces(rows: TrainingRows, pieces: Sequence[tuple[int, int | None]]) -> list[int]:
    return [int(token) for piece in pieces for token in rows.tokens(*piece)[1]]
