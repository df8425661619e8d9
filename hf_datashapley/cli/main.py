"""`datashapley COMMAND ...`: finds the command, and says errors of the user's in one line.

Commands import what they need when they run, so that `datashapley --help` answers at once.
Exit codes: 0 done, 2 something asked for cannot be done (the line on stderr says what would help), 130 interrupted.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module


# Name, what it does; the module of the same name has `run(arguments)`.
COMMANDS = {
    "demo": "train a small language model on text this Python holds, and value every document of it",
    "report": "show a finished run on one HTML page: who helped, who hurt, token by token",
    "push": "share a run's values on the Hub: tables, a card, a licence",
    "select": "write the training data again without what hurt",
    "accelerate_config": "print the path of a configuration for `accelerate launch`",
}
USAGE = "\n".join(
    [
        "usage: datashapley COMMAND [OPTIONS]",
        "",
        "The value of training data, measured while Hugging Face Trainer trains.",
        "",
        "commands:",
        *(f"  {name:<18} {what}" for name, what in COMMANDS.items()),
        "",
        "`datashapley COMMAND --help` shows what a command can be told.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. `arguments`: without the program's name; None: those of the process."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        if command:
            hint = f"; did you mean {near[0]}?" if near else ""
            print(f"datashapley: there is no command {command!r}{hint}\n", file=sys.stderr)
        print(USAGE, file=sys.stderr)
        return 2
    debug = "--debug" in rest
    try:
        import_module(f".{command}", __package__).run([argument for argument in rest if argument != "--debug"])
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"datashapley {command}: {error}\n(--debug shows where)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"\ndatashapley {command}: interrupted", file=sys.stderr)
        return 130
    return 0
