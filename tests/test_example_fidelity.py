"""The example runs from end to end in small, and its tables say what its README reads out of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "examples" / "fidelity" / "fidelity.py"
SMALL = [
    *("--families", "pythia"),
    *("--layers", "1", "--width", "32", "--vocabulary", "300", "--length", "32", "--samples", "4"),
    *("--updates", "20", "--batches", "1", "--sgd_rates", "0.01", "--adamw_rates", "0.001"),
    *("--first_updates", "2", "--run_updates", "8", "--seeds", "2", "--draws", "2"),
]


def cells(text: str, heading: str) -> dict[str, str]:
    """Column -> cell of the first row of the first table after a heading."""
    lines = [line for line in text.split(heading, 1)[1].splitlines() if line.startswith("|")]
    header, first = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], lines[2]))
    return dict(zip(header, first, strict=True))


@pytest.mark.slow
def test_small_run(tmp_path):
    command = [sys.executable, str(SCRIPT), *SMALL, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "fidelity.md").read_text()
    assert all(line in done.stdout for line in text.splitlines())
    assert 0 < (tmp_path / "fidelity.png").stat().st_size < 150_000
    for optimizer in ("SGD", "AdamW"):
        found = cells(text, f"### pythia, {optimizer}")
        errors = {order: float(cell.split()[0]) for order, cell in found.items()}
        assert errors["path, 3 nodes"] < 0.05, (optimizer, found)
    assert errors["path, 3 nodes"] < errors["SGD proxy"]
    start = cells(text, "## pythia: the first updates")
    assert float(start["path, 3 nodes, owen"].split()[0]) < 0.5 < float(start["SGD proxy"].split()[0])
    assert "Rank correlation" in text
