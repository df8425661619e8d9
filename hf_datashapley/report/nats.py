"""How a number of nats is written: a sign, a unit that fits, and as many decimals as its column needs.

Values span ten orders of magnitude between a run's total and one sample of it. A column of numbers gets one unit
and one number of decimals, so that its rows can be compared by eye; exact numbers stay in the page's `data-value`s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


_UNITS = ((0.1, 1.0, "nats"), (1e-4, 1e3, "mnat"), (1e-7, 1e6, "µnat"))  # from this size on, factor, name


@dataclass(frozen=True)
class NatScale:
    """The number shown is `factor` times nats, with `decimals`."""

    factor: float
    unit: str
    decimals: int | None  # None: too small for any unit, written as 1.2e-09

    @classmethod
    def fitting(cls, nats: npt.ArrayLike, digits: int = 3) -> NatScale:
        """So many digits for the largest of `nats`, and at least one decimal."""
        largest = float(np.abs(nats).max(initial=0.0))
        if largest == 0.0:
            return cls(1.0, "nats", 1)
        for smallest, factor, unit in _UNITS:
            if largest >= smallest:
                return cls(factor, unit, min(max(digits - 1 - math.floor(math.log10(largest * factor)), 1), digits))
        return cls(1.0, "nats", None)

    def signed(self, nats: float) -> str:
        """+1.23, −1.23 (a true minus), or 0.00 where nothing is left after rounding."""
        text = self.size(nats)
        if not text.strip("0."):
            return text
        return ("+" if nats > 0 else "\N{MINUS SIGN}") + text

    def size(self, nats: float) -> str:
        shown = abs(nats) * self.factor
        if self.decimals is None:
            return f"{shown:.1e}" if shown else "0"
        return f"{shown:,.{self.decimals}f}"
