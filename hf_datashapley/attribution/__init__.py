"""Values for what was not known while training: other validation sets, other queries."""

from .late_values import LateValues


__all__ = ["LateValues"]
