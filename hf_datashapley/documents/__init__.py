"""Documents packed into rows of equal length, each token knowing which document it is of."""

from .pack import pack_documents


__all__ = ["pack_documents"]
