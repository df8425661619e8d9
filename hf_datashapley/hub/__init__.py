"""A run's values on the Hub: a dataset repo that people look at, load and join with the data they speak about."""

from .push import check_values_repo, push_values_to_hub
from .source import Source


__all__ = ["Source", "check_values_repo", "push_values_to_hub"]
