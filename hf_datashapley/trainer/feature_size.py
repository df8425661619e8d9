"""How much room features are going to take, said before a run fills the disk with them."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.utils import logging

from ..ghost.capture import Capture
from ..values.features import DTYPES
from .config import ShapleyConfig


# Below "transformers", so that Trainer's `log_level` is ours too.
logger = logging.get_logger(f"transformers.{__name__}")


def announce_size(args: ShapleyConfig, capture: Capture, value_dir: str, rows: int, units_of_a_row: float) -> None:
    """Says how much room features of so many visits of rows take; at a level that is seen, for it may be a lot."""
    plans = capture.plan(args.feature_dim)
    width = sum(plan.width for plan in plans.values())
    unit_bytes = width * DTYPES[args.feature_dtype].itemsize
    free = shutil.disk_usage(existing(Path(value_dir))).free
    total = unit_bytes * rows * units_of_a_row
    per_row = "" if args.value_unit == "sample" else f" (if they hold {units_of_a_row:.1f} {args.value_unit}s each)"
    cure = ": set a smaller feature_dim, or a value_dir with more room" if total > free else ""
    logger.warning(
        f"feature_dim={args.feature_dim}: {unit_bytes:,} bytes for each visit of a {args.value_unit}, "
        f"{total / 2**30:.2f} GiB for the {rows:,} rows of this run{per_row}; {free / 2**30:.2f} GiB are free in "
        f"{value_dir}{cure}"
    )


def existing(path: Path) -> Path:
    """The folder, or the first above it that there is."""
    return next(folder for folder in [path, *path.absolute().parents] if folder.exists())
