"""`select`: a corpus without what hurt, judged document by document, or source by source.

Shapes: R rows of the dataset, U units with values, C candidates (what is judged: ids, or groups).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from ..ledger.groups import COUNTED, By
from ..query import Values
from ..query.joining import row_ids, rows_of_units, with_columns
from ..query.targets import column_of
from .rows import RowGroups
from .rule import Rule
from .summary import Summary
from .writing import write_rows


UNVISITED = ("keep", "drop")
# The usual names of what rows come from, for the summary where nothing else is said.
USUAL_GROUPS = ("source", "domain")


@dataclass(frozen=True)
class Selection:
    """
    Attributes:
        rows: all rows that there were, with all their columns and that of their values.
        kept: whether each of them is kept: bool [R].
        summary: what went and what stayed, by group; print it.
    """

    rows: Dataset
    kept: npt.NDArray[np.bool_]
    summary: Summary

    @property
    def dataset(self) -> Dataset:
        """The rows that are kept, in their order; a view, of which nothing is copied."""
        return self.rows.select(np.flatnonzero(self.kept))

    def write(self, path: str | Path) -> None:
        """The rows that are kept, on the disk: a Parquet file where the name ends in .parquet, else a folder, as
        `Dataset.save_to_disk` writes it. Nothing is overwritten.

        Raises:
            ValueError: something is there already.
            OSError: it could not be written; nothing is left of it.
        """
        write_rows(self.rows, self.kept, Path(path))


def select(
    values: Values | str | Path,
    dataset: Dataset,
    *,
    drop_negative: bool = False,
    keep_fraction: float | None = None,
    min_value: float | None = None,
    target: str | None = None,
    per_token: bool = False,
    by: By | None = None,
    unvisited: str = "keep",
    key: str | None = None,
    id_column: str | None = None,
    value_column: str = "value",
    group_column: str | None = None,
) -> Selection:
    """The rows of a dataset that are worth training on, by what they did in a run.

    One of `drop_negative`, `keep_fraction` and `min_value` says what is kept; it judges the documents (or samples) by
    their scores, or with `by` whole groups by theirs. A score is the value, in nats of the target's loss over the
    whole run, or with `per_token` the value per loss token: a long document, and one that was visited more often, has
    a value of greater size at the same quality, which matters where scores are ranked or compared with a number, and
    not where only their signs count. A group's score is the sum of its members' values, or that over their tokens.

    Nothing is drawn at random: of equal scores those with the smaller ids (or of groups the smaller names) are kept.
    Rows that share an id are one unit, kept or dropped together. The dataset is not altered; its rows stay on the disk
    (see `with_columns`), and in memory are some 100 bytes for each of them.

    ```python
    selection = select("out", corpus, keep_fraction=0.84, target="code")
    print(selection.summary)
    selection.write("corpus-code.parquet")
    ```

    Args:
        values: the run, as `Values.open` takes it; or what that returned, for the updates of a window.
        dataset: the documents, or samples, that were trained on; or part of them, if it has their ids. Where documents
            have the values this is the corpus, not the rows into which it was packed (or these, with key="sample_id").
        drop_negative: keep what has a score of 0 or more.
        keep_fraction: keep this fraction of what has a score (of the ids, or the groups, not of tokens): the best; the
            nearest whole number of them.
        min_value: keep what has at least this score.
        target: whose loss; None: the only one.
        per_token: judge by value per loss token that was trained on; 0 where there was none.
        by: judge groups: a column of the dataset, or groups by id in any form that `load_values` takes. Rows with a
            null are a group, too. Rows without a value go with their group.
        unvisited: what becomes of rows (or groups) that were never trained on, and so have no value: "keep" or "drop".
            Fractions are of the others.
        key, id_column: as `Values.join` takes them.
        value_column: what the added column is called: float64, in nats, of the row's own unit; null where it has none.
        group_column: what the summary is by. None: as `by`, or else the first of source and domain that there is.

    Raises:
        ValueError: no rule or several; several targets and none is named; the dataset is not that of the run, or has
            the column already; or nothing would be left.
    """
    rule = Rule(drop_negative, keep_fraction, min_value)
    if unvisited not in UNVISITED:
        raise ValueError(f"unvisited={unvisited!r} is not offered: choose 'keep' or 'drop'")
    if not isinstance(values, Values):
        values = Values.open(values)
    column = column_of(target, values.targets)
    key = key or values.key
    units, unit_R = values.match(dataset, key, id_column)
    value_U, token_U = units[column].to_numpy(), units["tokens"].to_numpy()
    id_R = row_ids(dataset, key, id_column)
    judged = RowGroups.of_ids(id_R, key) if by is None else RowGroups.of(by, dataset, id_R, key, id_column)

    # A unit counts once, whatever rows it has.
    row_U = rows_of_units(unit_R, len(units))
    own_U = row_U >= 0
    valued = np.flatnonzero(unit_R >= 0)
    torn = id_R[valued][judged.code_R[valued] != judged.code_R[row_U[unit_R[valued]]]]
    if len(torn):
        raise ValueError(f"by: {key} {torn[0]} has rows in more than one group of {judged.name!r}: give each id one")
    candidate_U, count = judged.code_R[row_U[own_U]], len(judged.label_G)
    value_C = np.bincount(candidate_U, value_U[own_U], count).astype(np.float64)
    token_C = np.bincount(candidate_U, token_U[own_U], count)
    visited_C = np.bincount(candidate_U, minlength=count) > 0
    score_C = value_C / token_C.clip(min=1) if per_token else value_C
    kept_C = np.full(count, unvisited == "keep")
    kept_C[visited_C] = rule.keeps(score_C[visited_C])
    kept_R = kept_C[judged.code_R]
    if not kept_R.any():
        raise ValueError(f"nothing is left of the {len(dataset):,} rows: ask for less, or look at the values first")

    value_R = pa.array(value_U).take(pa.array(unit_R, mask=unit_R < 0))
    first_U = row_U[own_U]
    token_R, first_value_R = np.zeros(len(id_R), np.int64), np.zeros(len(id_R))
    token_R[first_U], first_value_R[first_U] = token_U[own_U], value_U[own_U]
    groups = judged if by is not None and group_column is None else usual_groups(dataset, group_column)
    summary = Summary.of(
        groups,
        kept_R=kept_R,
        visited_R=unit_R >= 0,
        token_R=token_R,
        value_R=first_value_R,
        column=column,
        absent=int((~own_U).sum()),
        counted=COUNTED[key],
    )
    joined = with_columns(dataset, pa.table({value_column: value_R}))
    return Selection(joined, kept_R, summary)


def usual_groups(dataset: Dataset, group_column: str | None) -> RowGroups | None:
    """What the summary is by where nothing was judged by groups."""
    if group_column is not None:
        return RowGroups.of_column(dataset, group_column, "group_column")
    usual = [name for name in USUAL_GROUPS if name in dataset.column_names]
    return RowGroups.of_column(dataset, usual[0], "group_column") if usual else None
