"""Training data in groups that are credited together, and ways to make them."""

from .partition import Partition


__all__ = ["Partition"]
