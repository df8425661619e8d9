"""Questions to a run's values, in its ledger or on the Hub: the total, by group, over time, at either end."""

from .values import Values


__all__ = ["Values"]
