"""What to train on next: rows kept by their values, drawn by them, and how much of each domain."""

from .mixture import mixture_weights
from .sampler import ValueSampler
from .selection import Selection, select


__all__ = ["Selection", "ValueSampler", "mixture_weights", "select"]
