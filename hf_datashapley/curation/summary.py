"""What a selection has kept and dropped: rows, tokens and value, in all and by group.

Shapes: R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from ..ledger.reader import as_dataset
from ..query.joining import Ints
from .rows import RowGroups


GROUPS_SHOWN = 30  # the largest


@dataclass(frozen=True)
class Summary:
    """`str(summary)` is what a person reads.

    Attributes:
        total: `rows`, `kept_rows`, `unvisited` (rows without a value), `kept_unvisited`, `tokens`, `kept_tokens` (loss
            tokens over all visits), and in nats `value`, `kept_value`.
        by_group: the same, one row for each group, by name; None: nothing says groups.
        column: the values that were judged.
        absent: documents, or samples, that have a value and no row.
        counted: which of the two.
    """

    total: dict[str, int | float]
    by_group: Dataset | None
    column: str
    absent: int
    counted: str

    @classmethod
    def of(
        cls,
        groups: RowGroups | None,
        *,
        kept_R: npt.NDArray[np.bool_],
        visited_R: npt.NDArray[np.bool_],
        token_R: Ints,
        value_R: npt.NDArray[np.float64],
        column: str,
        absent: int,
        counted: str,
    ) -> Summary:
        numbers = {
            "rows": np.ones(len(kept_R), np.int64),
            "unvisited": (~visited_R).astype(np.int64),
            "tokens": token_R,
            "value": value_R,
        }
        columns = {}
        for name, number_R in numbers.items():
            columns[name], columns[f"kept_{name}"] = number_R, np.where(kept_R, number_R, 0)
        total = {name: number_R.sum().item() for name, number_R in columns.items()}
        if groups is None:
            return cls(total, None, column, absent, counted)
        count = len(groups.label_G)
        sums = {
            name: np.bincount(groups.code_R, number_R, count).astype(number_R.dtype)
            for name, number_R in columns.items()
        }
        # A group may be called as one of the numbers is.
        label = groups.name if groups.name not in sums else f"{groups.name} (group)"
        return cls(total, as_dataset(pa.table({label: groups.label_G, **sums})), column, absent, counted)

    def __str__(self) -> str:
        total = self.total
        lines = [
            f"kept {total['kept_rows']:,} of {total['rows']:,} rows ({share(total, 'rows')}), with "
            f"{total['kept_tokens']:,} of the {total['tokens']:,} loss tokens that were trained on "
            f"({share(total, 'tokens')}, each visit counted)",
            f"{self.column}, in nats: {total['kept_value']:+.4g} kept, "
            f"{total['value'] - total['kept_value']:+.4g} dropped",
        ]
        if total["unvisited"]:
            kept = total["kept_unvisited"]
            lines.append(
                f"{total['unvisited']:,} rows were never trained on and have no value; {kept:,} of them are kept"
            )
        if self.absent:
            lines.append(f"{self.absent:,} {self.counted} that have a value are not among the rows")
        if self.by_group is not None:
            lines += ["", *self._table(self.by_group)]
        return "\n".join(lines)

    def _table(self, by_group: Dataset) -> list[str]:
        name = by_group.column_names[0]
        rows = by_group.to_list()
        shown = sorted(rows, key=lambda row: -row["rows"])[:GROUPS_SHOWN]
        head = [name, "rows", "kept", "", "tokens", "kept", "", "nats kept", "nats dropped"]
        cells = [
            [
                "(unknown)" if row[name] is None else " ".join(str(row[name]).split())[:40],
                f"{row['rows']:,}",
                f"{row['kept_rows']:,}",
                share(row, "rows"),
                f"{row['tokens']:,}",
                f"{row['kept_tokens']:,}",
                share(row, "tokens"),
                f"{row['kept_value']:+.4g}",
                f"{row['value'] - row['kept_value']:+.4g}",
            ]
            for row in shown
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in [head, *cells])
        ]
        more = len(rows) - len(shown)
        return [line.rstrip() for line in lines] + ([f"and {more:,} smaller ones"] if more else [])


def share(row: dict[str, int | float], name: str) -> str:
    return f"{row[f'kept_{name}'] / row[name]:.1%}" if row[name] else "-"
