"""A run's values as one page that a person reads: tables, pictures, and the documents that helped and hurt most."""

from hf_datashapley.report.report import write_report


__all__ = ["write_report"]
