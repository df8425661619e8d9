"""The table of values on disk: append-only Parquet parts, readable without the trainer that wrote them."""

from .reader import load_audit, load_updates, load_value_history, load_values
from .writer import Ledger


__all__ = ["Ledger", "load_audit", "load_updates", "load_value_history", "load_values"]
