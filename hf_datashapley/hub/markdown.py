"""Markdown of strings from anywhere: what stands in a table or in code is shown as it is, and does nothing."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from huggingface_hub import constants


def cell(text: str) -> str:
    """Of a table, whatever it says: no markup, no end of the cell or of the line."""
    plain = html.escape(" ".join(text.split()), quote=False)
    for mark in "\\`*_[]|$~":
        plain = plain.replace(mark, f"&#{ord(mark)};")
    return plain


def code(names: Iterable[str]) -> str:
    """Names of columns, exactly."""
    return ", ".join(f"`{name}`" if re.fullmatch(r"[\w ]+", name) else f"<code>{cell(name)}</code>" for name in names)


def link(repo_id: str, folder: str) -> str:
    return f"[{repo_id}]({constants.ENDPOINT}{folder}{repo_id})"


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(map(line, rows))
