"""Files that are complete or not there, also after a kill or a power cut."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: Any) -> None:
    """Writes bytes, or what holds some, under a temporary name, flushes them to the disk and renames.

    Raises:
        OSError: it could not be written; what was there before is as it was.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is durable without it
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
