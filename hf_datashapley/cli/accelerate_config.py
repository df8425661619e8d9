"""`datashapley accelerate_config NAME`: where a packaged configuration of `accelerate launch` lies.

It prints the path and nothing else, so that a shell can put it into a command.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path


FOLDER = Path(__file__).parents[1] / "accelerate_configs"
# Name of the file, what it is for.
CONFIGS = {
    "single_gpu": "one process on one GPU",
    "multi_gpu": "DistributedDataParallel, a process for each GPU of a machine: with --num_processes",
    "cpu_processes": "DistributedDataParallel, two processes on the CPU, to try out: with --use_cpu True",
}
DESCRIPTION = "\n".join(
    [
        "Prints the path of a configuration for `accelerate launch`.",
        "",
        *(f"  {name:<15} {what}" for name, what in CONFIGS.items()),
    ]
)
EPILOG = """\
examples:
  accelerate launch --config_file "$(datashapley accelerate_config single_gpu)" train.py
  accelerate launch --config_file "$(datashapley accelerate_config multi_gpu)" --num_processes 4 train.py
  accelerate launch --config_file "$(datashapley accelerate_config cpu_processes)" train.py --use_cpu True

Options of `accelerate launch` stand above the file's settings; copy the file to keep settings of your own."""


def run(arguments: Sequence[str]) -> None:
    """Prints the path.

    Raises:
        SystemExit: `--help`, or an argument that argparse refuses.
        ValueError: there is no such configuration.
    """
    parser = argparse.ArgumentParser(
        prog="datashapley accelerate_config",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="one of the above")
    name = parser.parse_args(arguments).name
    if name not in CONFIGS:
        near = difflib.get_close_matches(name, CONFIGS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(CONFIGS)}"
        raise ValueError(f"there is no configuration {name!r}; {hint}")
    print(FOLDER / f"{name}.yaml")
