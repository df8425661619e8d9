"""A model at other weights than its own, for the time of a validation pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def weights_at(weights: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Within it the parameters hold the given weights, each [*parameter.shape].

    Afterwards, also after an exception, they hold the very memory that they held before, which nothing has written.
    """
    own = {parameter: parameter.data for parameter in weights}
    try:
        for parameter, other in weights.items():
            parameter.data = other
        yield
    finally:
        for parameter, memory in own.items():
            parameter.data = memory
