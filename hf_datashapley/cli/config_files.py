"""Settings from a file: `--config FILE`, in YAML or JSON, the options of the command by their names.

What the file says is read as if it stood before the command line: the same types are wanted of it, and options that
are given on the command line stand above it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def add_common_options(parser: HfArgumentParser) -> None:
    """Those that every command has."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="A YAML or JSON file with options by name; those on the command line stand above it.",
    )
    parser.add_argument("--debug", action="store_true", help="Show where in the program an error came up.")


def parse(parser: HfArgumentParser, config: type, arguments: Sequence[str]) -> dict[str, Any]:
    """The settings by name: the fields of a dataclass, and the parser's positional arguments.

    Raises:
        SystemExit: `--help`, or an argument that argparse refuses.
        ValueError: the file cannot be read, or has what is no option.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    file = first.parse_known_args(list(arguments))[0].config
    if file is not None:
        # After a list of the file's, the option ends it.
        arguments = [*options_of(file, config), "--config", file, *arguments]
    settings = vars(parser.parse_args(list(arguments)))
    # `main` has seen to the one, and the other is read.
    return {name: value for name, value in settings.items() if name not in ("debug", "config")}


def options_of(file: str, config: type) -> Iterator[str]:
    """As they would stand on the command line."""
    names = [field.name for field in dataclasses.fields(config)]
    for key, value in read_mapping(file).items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(names)}"
            raise ValueError(f"--config {file} has {key!r}, which is no option of this command; {hint}")
        if isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        elif value is not None:
            yield f"--{name}={json.dumps(value) if isinstance(value, (bool, dict)) else value}"


def read_mapping(file: str) -> dict[Any, Any]:
    """Raises: ValueError, it is no YAML or JSON file, or says something else than options."""
    path = Path(file)
    kind = path.suffix.lower()
    if kind not in (".yaml", ".yml", ".json"):
        raise ValueError(f"--config {file}: give a file that ends in .yaml, .yml or .json")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if kind == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {file} is no {'JSON' if kind == '.json' else 'YAML'}: {reason}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"--config {file} is a {type(found).__name__}: give options by their names, as `name: value`")
    return found
