"""The units that helped a target most and those that hurt it most: a few with their text, more as a list to look in.

Only these have their text read, whatever the corpus is like; a unit is a sample or a document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from hf_datashapley.report.aggregate import Corpus, Floats, Ints


ENDS = 6  # shown at either end, per target
LISTED = 200  # at either end, per target
EXCERPT = 80  # characters that stand for a title in the list
ROWS_READ = 100  # of a document, for its text
TEXT_LIMIT = 4000  # characters of a document that are embedded


@dataclass(frozen=True)
class Document:
    number: str  # "document 12" or "sample 7"
    title: str | None
    group: str
    value_K: Floats  # nats, for each target
    tokens: int
    text: str
    cut: bool  # whether there is more of it


@dataclass(frozen=True)
class Known:
    """What a page says of the units it names: `units` as `write_report` takes it, and a text where that has none."""

    corpus: Corpus
    units: Dataset | None
    read_text: Callable[[int], str] | None  # by a unit's id

    def place(self, unit_id: int) -> int:
        """Of a unit, among documents."""
        return int(self.corpus.document_N[np.searchsorted(self.corpus.id_N, unit_id)])

    def number(self, d: int) -> str:
        corpus = self.corpus
        if corpus.has_documents:
            assert self.units is not None
            return f"document {self._of_first_row(d, 'document_id')}"
        return f"{corpus.unit} {corpus.id_N[corpus.first_unit_D[d]]}"

    def title(self, d: int) -> str | None:
        if self.units is None or "title" not in self.units.column_names:
            return None
        title = self._of_first_row(d, "title")
        return None if title is None else str(title)

    def group(self, d: int) -> str:
        return self.corpus.groups[self.corpus.group_N[self.corpus.first_unit_D[d]]]

    def text(self, d: int) -> tuple[str, bool]:
        """And whether there is more of it."""
        if self.units is not None and "text" in self.units.column_names:
            rows = self._rows(d)
            text = "".join(part or "" for part in self.units.select(rows[:ROWS_READ].tolist())["text"])
            return text[:TEXT_LIMIT], len(text) > TEXT_LIMIT or len(rows) > ROWS_READ
        if self.read_text is None:
            return "", False
        text = self.read_text(int(self.corpus.id_N[self.corpus.first_unit_D[d]]))
        return text[:TEXT_LIMIT], len(text) > TEXT_LIMIT

    def document(self, d: int, value_KD: Floats, tokens_D: Floats) -> Document:
        text, cut = self.text(d)
        return Document(self.number(d), self.title(d), self.group(d), value_KD[:, d], int(tokens_D[d]), text, cut)

    def _rows(self, d: int) -> Ints:
        return self.corpus.unit_row_N[self.corpus.document_N == d]

    def _of_first_row(self, d: int, column: str) -> object:
        assert self.units is not None
        return self.units[int(self._rows(d)[0])][column]


def ends(known: Known) -> list[tuple[list[Document], list[Document]]]:
    """For each target the documents that helped it most, and those that hurt it most, worst first."""
    value_KD, tokens_D = known.corpus.value_KD, known.corpus.tokens_D
    found = []
    for value_D in value_KD:
        order = value_D.argsort(kind="stable")
        hurt = [known.document(d, value_KD, tokens_D) for d in order[:ENDS] if value_D[d] < 0]
        helped = [known.document(d, value_KD, tokens_D) for d in order[::-1][:ENDS] if value_D[d] > 0]
        found.append((helped, hurt))
    return found


def listed(known: Known) -> list[Document]:
    """Of each target those at either end, once each, the best for the first target first; an excerpt for a title where
    they have none, and no text."""
    value_KD, tokens_D = known.corpus.value_KD, known.corpus.tokens_D
    chosen: set[int] = set()
    for value_D in value_KD:
        order = value_D.argsort(kind="stable")
        chosen |= {*order[:LISTED].tolist(), *order[::-1][:LISTED].tolist()}
    found = []
    for d in sorted(chosen, key=lambda d: (-value_KD[0, d], d)):
        title = known.title(d) or " ".join(known.text(d)[0][: 4 * EXCERPT].split())[:EXCERPT] or None
        found.append(Document(known.number(d), title, known.group(d), value_KD[:, d], int(tokens_D[d]), "", False))
    return found
