"""The example runs as its README says, under `accelerate launch`, and differs by a few lines from a plain script."""

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

from hf_datashapley import load_values


FOLDER = Path(__file__).parents[1] / "examples" / "swap_trainer"


LAUNCHER = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]


def run(script: str, output_dir: Path, launcher: list[str]) -> list[float]:
    """Runs a script and gives its logged losses."""
    command = [sys.executable, *launcher, str(FOLDER / script), "--output_dir", str(output_dir)]
    command += ["--use_cpu", "True", "--report_to", "none"]
    command += ["--max_steps", "4", "--logging_steps", "1", "--save_steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    state = json.loads((output_dir / "checkpoint-4" / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def test_both_scripts_train_alike_and_one_leaves_values(tmp_path):
    """The plain one, of which nothing is ours, without the launcher: the same in one process."""
    plain = run("train.py", tmp_path / "plain", [])
    valued = run("train_with_values.py", tmp_path / "valued", LAUNCHER)
    assert len(plain) == 4
    assert all(abs(a - b) <= 1e-5 * a for a, b in zip(plain, valued, strict=True))
    values = load_values(tmp_path / "valued" / "values")
    assert len(values) == 4 * 8
    assert any(values["value"])


def test_the_swap_takes_few_lines():
    plain, valued = ((FOLDER / name).read_text().splitlines()[1:] for name in ("train.py", "train_with_values.py"))
    changed = [line for line in difflib.ndiff(plain, valued) if line[0] in "+-"]
    assert len(changed) <= 10, changed
