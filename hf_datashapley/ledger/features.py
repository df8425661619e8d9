"""Read the features of a ledger back, a part at a time: what is not looked at stays on the disk.

Shapes: N rows, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from .layout import Part, damaged


@dataclass
class FeatureRows:
    """Rows of one update: the features `scale` [N] times `codes` [N, F], and where they stand in their part."""

    step: int
    start: int
    scale: np.ndarray
    codes: np.ndarray


def read_features(part: Part, steps: np.ndarray, most_bytes: int) -> Iterator[FeatureRows]:
    """The features of a part of the values, whose rows are of these updates; `most_bytes` of them at a time.

    Raises:
        ValueError: they are missing or damaged.
    """
    part = replace(part, kind="features")
    start = 0
    try:
        with pa.memory_map(str(part.path)) as file, pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                own = batch["step"].to_numpy()
                if not np.array_equal(own, steps[start : start + len(own)]):
                    raise pa.ArrowInvalid("its rows are not those of the values")
                width = batch.schema.field("feature").type.list_size
                codes = batch["feature"].flatten().to_numpy().reshape(-1, width)
                scale = batch["scale"].to_numpy()
                most = max(1, most_bytes // codes[:1].nbytes) if len(codes) else 1
                ends = np.flatnonzero(np.diff(own)) + 1
                for first, last in zip([0, *ends], [*ends, len(own)], strict=True):
                    for cut in range(first, last, most):
                        rows = slice(cut, min(cut + most, last))
                        yield FeatureRows(int(own[first]), start + cut, scale[rows].copy(), codes[rows].copy())
                start += len(own)
        if start != len(steps):
            raise pa.ArrowInvalid(f"it has {start} rows, the values {len(steps)}")
    except (pa.ArrowException, OSError) as error:
        raise damaged(part, error) from error
