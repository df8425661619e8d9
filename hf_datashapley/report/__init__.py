"""A run's values as one page that a person reads: tables, pictures, and the documents that helped and hurt most.

`write_report` is imported when it is first used: it needs the extra "report", and reading a user's files (`sources`)
does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hf_datashapley.report.report import write_report


__all__ = ["write_report"]


def __getattr__(name: str) -> object:
    if name != "write_report":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hf_datashapley.report.report import write_report

    return write_report
