"""Which candidates a rule keeps. A candidate is a unit (a document or a sample), or a whole group of these.

Shapes: C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Rule:
    """One of the three is set.

    Attributes:
        drop_negative: keeps what has a score of 0 or more.
        keep_fraction: keeps this fraction of the candidates that have a score, those with the highest; the nearest
            whole number of them (halves go to the even one), and of equal ones those that come first.
        min_value: keeps what has at least this score.

    Raises:
        ValueError: none is set, or several; or the fraction is none.
    """

    drop_negative: bool = False
    keep_fraction: float | None = None
    min_value: float | None = None

    def __post_init__(self) -> None:
        given = [self.drop_negative, self.keep_fraction is not None, self.min_value is not None]
        if sum(given) != 1:
            raise ValueError(
                f"{'none' if not any(given) else 'several'} of drop_negative, keep_fraction and min_value: give one, "
                "which says what is kept"
            )
        if self.keep_fraction is not None and not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction={self.keep_fraction}: give a number above 0 and not above 1")
        if self.min_value is not None and not np.isfinite(self.min_value):
            raise ValueError(f"min_value={self.min_value}: give a number")

    def keeps(self, score_C: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Of candidates that all have a score."""
        if self.keep_fraction is None:
            kept_C: npt.NDArray[np.bool_] = score_C >= (0.0 if self.min_value is None else self.min_value)
            return kept_C
        kept_C = np.zeros(len(score_C), bool)
        kept_C[np.argsort(-score_C, kind="stable")[: round(self.keep_fraction * len(score_C))]] = True
        return kept_C
