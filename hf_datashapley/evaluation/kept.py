"""What an experiment has made, in a folder, so that one that was stopped goes on where it was."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..whole_files import write_whole


def kept_arrays(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """Arrays by name, from a file or newly made."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez(content, **make())
        write_whole(path, content.getvalue())
    with np.load(path) as found:
        return dict(found)


def check_begun(output_dir: str | Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings that results depend on, or holds them against those that a folder was begun with.

    Raises:
        ValueError: they differ.
    """
    path = Path(output_dir) / "settings.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dict(settings), indent=1).encode())
    before = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name in settings if before[name] != settings[name]]
    if different:
        raise ValueError(
            f"--output_dir {output_dir} was begun with other settings ({', '.join(different)}): use the same, or "
            "another folder"
        )
