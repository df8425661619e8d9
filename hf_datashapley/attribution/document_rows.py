"""The documents of packed rows: which row holds a piece of which, and in what order they are units."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from ..trainer.boundaries import row_documents


def document_pieces(rows: Any, column: str | None, name: str, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Row and document id of each piece, int64, in the order in which they lie.

    Args:
        column: of the document of each token.
        name: of the argument that the rows came in, for the progress bar.

    Raises:
        ValueError: a row has no such column, or not integers in it.
    """
    scanned = rows
    if isinstance(rows, datasets.Dataset) and column in rows.column_names:
        scanned = rows.select_columns([column])
    found, documents = [], []
    for index in tqdm(range(len(rows)), f"{name}: documents", disable=not progress, leave=False):
        own = row_documents(scanned[index], column, "document")
        first = own[np.sort(np.unique(own, return_index=True)[1])]  # as they appear
        found.append(np.full(len(first), index))
        documents.append(first)
    return np.concatenate(found), np.concatenate(documents)


def in_order(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids that occur, ascending, and the unit that each is: units are numbered as they first appear."""
    known, first = np.unique(documents, return_index=True)
    return known, np.argsort(np.argsort(first))
