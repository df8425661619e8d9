"""Features of units as one array, whether they fit into memory or not.

Clustering looks at points again and again, in any order. What comes block by block is therefore laid down once, in a
temporary file of n x F x 4 bytes (in the folder that `tempfile` chooses: TMPDIR), and mapped into memory. After that
the two do not differ, bit for bit.

Shapes: N points, n of a block, F features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


Points: TypeAlias = NDArray[np.float32]
# An array [N, F]; or blocks of one, [n, F], each by itself or with the number of its first point.
Features: TypeAlias = np.ndarray | Tensor | Iterable[Any]
CHECKED = 2**22


@contextmanager
def points_of(features: Features) -> Iterator[Points]:
    """[N, F], finite.

    Raises:
        ValueError: they are not numbers of this shape, or not finite.
    """
    if isinstance(features, np.ndarray | Tensor):
        points_NF = np.ascontiguousarray(as_block(features, 0, None))
        if not points_NF.size:
            raise ValueError(f"features have shape {list(points_NF.shape)}: give a row for each point")
        yield points_NF
        return
    with tempfile.TemporaryFile(prefix="datashapley-points-") as file:
        count, width = 0, None
        for block in features:
            if isinstance(block, tuple):
                start, block = block
                if start != count:
                    raise ValueError(f"a block of features begins at {start} after {count} points: give all in order")
            block_nF = as_block(block, count, width)
            count, width = count + len(block_nF), block_nF.shape[1]
            file.write(np.ascontiguousarray(block_nF).data)
        file.flush()
        if not count or not width:
            raise ValueError("features have no points: give a row for each")
        yield np.memmap(file, np.float32, "r", shape=(count, width))


def as_block(features: Any, start: int, width: int | None) -> Points:
    """float32 [n, F], of points from the `start`-th on."""
    if isinstance(features, Tensor):
        features = features.detach().float().cpu().numpy()
    found = np.asarray(features)
    if found.ndim != 2 or found.dtype.kind not in "fiub":
        raise ValueError(
            f"features have shape {list(found.shape)} and type {found.dtype}: give an array [points, features] of "
            "numbers, or an iterator over blocks of one"
        )
    if width is not None and found.shape[1] != width:
        raise ValueError(f"features from point {start} on are {found.shape[1]} for each, and {width} before them")
    found_nF: Points = found.astype(np.float32, copy=False)
    step = max(1, CHECKED // max(1, found.shape[1]))
    for begin in range(0, len(found), step):
        wrong = ~np.isfinite(found_nF[begin : begin + step]).all(1)
        if wrong.any():
            raise ValueError(
                f"features of point {start + begin + int(wrong.argmax())} are not finite: leave it out, or look where "
                "its NaN or infinity comes from"
            )
    return found_nF
