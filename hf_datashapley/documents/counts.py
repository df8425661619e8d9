"""What became of the tokens: that nothing was lost can be read off."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Counts(NamedTuple):
    """Of documents that lie one after the other; counts of two stretches add up."""

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    appended: int = 0  # of the tokens, those that end a document and were not in it
    leading: int = 0  # documents whose first token begins a row

    def plus(self, other: Counts) -> Counts:
        return Counts(*(own + more for own, more in zip(self, other, strict=True)))

    def described(self, block_size: int) -> str:
        rows = -(-self.tokens // block_size)
        packed = self.documents - self.empty
        continued = rows - self.leading
        return (
            f"{self.documents:,} documents ({self.empty:,} empty) in {rows:,} rows of {block_size:,}: "
            f"{self.tokens - self.appended:,} tokens, {self.appended:,} ends of documents appended, "
            f"{rows * block_size - self.tokens:,} of padding; loss on {self.tokens - packed - continued:,} tokens, "
            f"not on the {packed:,} that begin a document nor the {continued:,} that begin a row in the midst of one"
        )


def count(lengths_D: np.ndarray, appended_D: np.ndarray, first_token: int, block_size: int) -> Counts:
    """Counts of documents of these lengths, of which the first begins at `first_token`."""
    begins_D = first_token + lengths_D.cumsum() - lengths_D
    filled_D = lengths_D > 0
    return Counts(
        documents=len(lengths_D),
        empty=int((~filled_D).sum()),
        tokens=int(lengths_D.sum()),
        appended=int(appended_D.sum()),
        leading=int((filled_D & (begins_D % block_size == 0)).sum()),
    )
