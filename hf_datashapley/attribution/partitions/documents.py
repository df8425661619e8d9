"""Groups of the documents that are packed into rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...grouping import SHOWN, Grouping


def packed_groups(unit_ids_U: np.ndarray, groups: Grouping, ids: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """The group of each document that is packed, int64 [U].

    Args:
        unit_ids_U: their ids, in the order in which they first appear.
        groups: of the corpus that was packed, a label for each of its documents.
        ids: of these, where they are not known by their number. One may stand twice, in the same group.

    Raises:
        ValueError: a document has no group, or two.
    """
    known = np.arange(len(groups.labels)) if ids is None else np.asarray(ids)
    if known.shape != groups.labels.shape or known.dtype.kind not in "iu":
        raise ValueError(
            f"ids have shape {list(known.shape)} and type {known.dtype}, and there are groups of {len(groups.labels)} "
            "documents: give an integer for each"
        )
    order = np.argsort(known, kind="stable")
    known, label = known[order], groups.labels[order]
    torn = np.unique(known[1:][(np.diff(known) == 0) & (np.diff(label) != 0)])
    if len(torn):
        raise ValueError(
            f"{len(torn)} document ids have more than one group, {first(torn)} first: documents of one id are one"
        )
    place_U = np.searchsorted(known, unit_ids_U).clip(max=len(known) - 1)
    missing = unit_ids_U[known[place_U] != unit_ids_U]
    if len(missing):
        raise ValueError(
            f"{len(missing)} of {len(unit_ids_U)} packed documents have no group, id {first(missing)} first: give "
            "groups of all documents that were packed, and their ids where they had a column of them"
        )
    return label[place_U]


def first(ids: np.ndarray) -> str:
    return ", ".join(map(str, ids[:SHOWN]))
