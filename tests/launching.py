"""Start workers as people do, several processes that train together on this machine's CPU."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(
    script: str | Path, *arguments: str, processes: int = 2, timeout: int = 300
) -> subprocess.CompletedProcess:
    """Output and exit status of a launch of `script`, one thread a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, python_path()))}
    return subprocess.run(
        [*command, str(script), *arguments], capture_output=True, text=True, timeout=timeout, env=environment
    )


def python_path() -> list[Path]:
    """This folder, and the package that is being tested."""
    here = Path(__file__).parent
    return [here, here.parent]
