"""Half precision is for weights and for products; what is summed, or comes of an optimizer's state, is in float32.

In half precision a sum forgets terms that are small beside it, and the difference of two numbers may be all rounding.
float32 stays float32 and float64 stays float64, without a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


HALF = (torch.bfloat16, torch.float16)


def full_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the type itself."""
    return torch.promote_types(dtype, torch.float32)


def in_full(x: Tensor) -> Tensor:
    """The tensor in at least float32; itself where it is."""
    return x.to(full_dtype(x.dtype))


def inner_products(left_K: Tensor, right: Tensor) -> Tensor:
    """Of each of `left_K` [K, *shape] with `right` [*shape]: [K].

    Not by a matrix product, which may add all terms up in one number, and terms that are small beside it are lost: of
    an embedding of 50,000 tokens a hundredth was. `sum` adds in a tree.
    """
    return torch.stack([(left * in_full(right)).sum() for left in left_K])
