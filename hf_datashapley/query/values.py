"""`Values`: a run's values, opened where they lie, and the questions that are asked of them most."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers.utils import logging

from ..ledger.groups import COUNTED, By, Groups, sum_groups
from ..ledger.layout import find_ledger, value_columns
from ..ledger.reader import as_dataset, read_level
from ..ledger.stretches import LedgerRows, Rows
from ..ledger.sums import check_normalize, sum_values, summed
from .joining import Ints, row_ids, rows_of_units, unit_of_rows, with_columns
from .published import PublishedRows
from .targets import column_of


logger = logging.get_logger(__name__)

REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Values:
    """The values of a run, in nats of validation loss: positive helped.

    ```python
    values = Values.open("out")                                  # or "me/corpus-values", a dataset repo on the Hub
    values.total()                                               # {"documents": 21000, ..., "value_code": 1.93}
    values.by_group("source", dataset=corpus)                    # a row for each source
    values.over_time(20, by="source", dataset=corpus)            # and each 20th of the run
    values.top(10, "code", dataset=corpus)["text"]               # what helped most with code
    values.bottom(10, "code", per_token=True, dataset=corpus)    # what hurt most for its length
    values.join(corpus)                                          # the corpus, and what each document did
    ```

    What has a value is a document where the run's values know documents, else a sample (`key` says which, and
    key="sample_id" asks for samples all the same). Values, tokens and updates are summed over visits and, of
    documents, over all the rows that these are in. `value` is what a unit did in all: long documents, and those that
    were visited more often, did more; `per_token` orders by value per loss token instead.

    Price: the first question reads the ledger once, a stretch of updates at a time, whatever its length; the sums of
    the units (28 bytes each with one target) stay in memory for the next one. `over_time` reads it again. 20 million
    rows of 10 million samples took 19 s on a core that other jobs shared, and 1.9 GiB more at the peak. From the Hub,
    the table of units is downloaded, and the history only where a question needs it (`published`).
    """

    def __init__(self, rows: Rows, from_step: int | None, to_step: int | None, normalize: str | None):
        check_normalize(normalize)
        self._rows = rows
        self._asked = from_step, to_step
        self._normalize = normalize
        self._held: dict[str, pa.Table] = {}

    @classmethod
    def open(
        cls,
        run: str | Path,
        *,
        from_step: int | None = None,
        to_step: int | None = None,
        normalize: str | None = None,
        revision: str | None = None,
    ) -> Values:
        """
        Args:
            run: an output_dir or a value_dir; or a dataset repo that `push_values_to_hub` wrote, on the Hub
                ("me/corpus-values") or a local copy of it.
            from_step, to_step, normalize: what is summed, as in `load_values`.
            revision: of the repo.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the repo cannot be loaded, or does not hold values.
        """
        return cls(open_rows(run, revision), from_step, to_step, normalize)

    @property
    def targets(self) -> list[str]:
        """Names of the validation targets, [""] for one without a name."""
        return list(self._rows.targets)

    @property
    def columns(self) -> list[str]:
        """`value`, or `value_<target>` for each named target."""
        return value_columns(self._rows.targets)

    @cached_property
    def key(self) -> str:
        """What has a value: "document_id", or "sample_id" where no documents are known."""
        if "document_id" not in self._rows.keys:
            return "sample_id"
        ids = self._summed("document_id")["document_id"]
        return "document_id" if len(ids) == 0 or pc.max(ids).as_py() >= 0 else "sample_id"

    def units(self, key: str | None = None) -> Dataset:
        """One row for each document, or sample, by id: its key, `updates`, `tokens` and values."""
        return as_dataset(self._units(key))

    def total(self, key: str | None = None) -> dict[str, Any]:
        """Sums over all units: how many there are (`documents` or `samples`), `updates`, `tokens` and values."""
        key = key or self.key
        found: dict[str, Any] = in_all(self._units(key), key, self.columns).to_pylist()[0]
        return found

    def by_group(
        self, by: By, dataset: Dataset | None = None, *, key: str | None = None, id_column: str | None = None
    ) -> Dataset:
        """One row for each group, as `load_values` gives it: `by` is a column of `dataset`, or says the groups."""
        level, groups = self._level(by, dataset, key, id_column)
        units = self._units(level)
        return as_dataset(units if groups is None else sum_groups(units, groups, level, self.columns))

    def over_time(
        self,
        windows: int = 20,
        by: By | None = None,
        dataset: Dataset | None = None,
        *,
        key: str | None = None,
        id_column: str | None = None,
    ) -> Dataset:
        """One row for each window of updates, and each group in it: `from_step`, `to_step`, then as `by_group` gives
        it, or the units in the window, its updates, tokens and values.

        Windows have the same number of updates, to within one; no more of them than there are updates.

        Raises:
            ValueError: `windows` is not positive, or the groups do not fit.
        """
        if windows < 1:
            raise ValueError(f"windows={windows}: ask for one or more")
        level, groups = self._level(by, dataset, key, id_column)
        first, last = self._rows.window(*self._asked)
        if last < first:
            raise ValueError("there are no values yet: ask when an update has been made")
        windows = min(windows, last - first + 1)
        ends = [first - 1 + (last - first + 1) * n // windows for n in range(windows + 1)]
        tables = []
        for before, end in zip(ends, ends[1:], strict=False):
            units = known(sum_values(self._rows, [level], before + 1, end, self._normalize), level)
            if by is None:
                units = in_all(units, level, self.columns)
            elif groups is not None:
                units = sum_groups(units, groups, level, self.columns)
            steps = {"from_step": before + 1, "to_step": end}
            columns = {name: pa.repeat(pa.scalar(step, pa.int32()), len(units)) for name, step in steps.items()}
            tables.append(pa.table(columns | {name: units[name] for name in units.column_names}))
        return as_dataset(pa.concat_tables(tables))

    def top(
        self,
        n: int = 10,
        target: str | None = None,
        *,
        per_token: bool = False,
        dataset: Dataset | None = None,
        key: str | None = None,
        id_column: str | None = None,
    ) -> Dataset:
        """The units that helped a target most, the best first: as `units` gives them, or as rows of the dataset.

        Args:
            n: how many.
            target: which one; None: the only one.
            per_token: order by value per loss token, among units that have any.
            dataset: what is known of the units: its rows (the first one of each unit), with the columns of `units`.
            key, id_column: as `join` takes them.

        Of equal ones, those with the smaller ids come first.
        """
        return self._end(n, target, per_token, dataset, key, id_column, best=True)

    def bottom(
        self,
        n: int = 10,
        target: str | None = None,
        *,
        per_token: bool = False,
        dataset: Dataset | None = None,
        key: str | None = None,
        id_column: str | None = None,
    ) -> Dataset:
        """The units that hurt a target most, the worst first: otherwise as `top`."""
        return self._end(n, target, per_token, dataset, key, id_column, best=False)

    def join(self, dataset: Dataset, *, key: str | None = None, id_column: str | None = None) -> Dataset:
        """The dataset with the columns `updates`, `tokens` and values; null in rows that were never trained on.

        Rows that share an id are one unit, whose value stands in each of them.

        Args:
            dataset: of the documents, or samples, that were trained on; or part of them, if it has their ids.
            key: "document_id" or "sample_id": what its rows are. None: what has values, see `key`.
            id_column: the column of ids. None: the one called as `key` is; without it, rows are known by their
                numbers.

        Raises:
            ValueError: it has no such column, or columns of these names already, or lacks what has values.
        """
        units, unit_R = self.match(dataset, key, id_column)
        absent = int((rows_of_units(unit_R, len(units)) < 0).sum())
        if absent:
            counted = COUNTED[key or self.key]
            logger.warning(f"{absent:,} of the {len(units):,} {counted} with values have no row in the dataset")
        # Null where there is no unit.
        rows = pa.array(unit_R, mask=unit_R < 0)
        return with_columns(dataset, units.select(["updates", "tokens", *self.columns]).take(rows))

    def match(self, dataset: Dataset, key: str | None = None, id_column: str | None = None) -> tuple[pa.Table, Ints]:
        """The units, and for each row of the dataset the number of its unit, or -1."""
        level = key or self.key
        units = self._units(level)
        id_R = row_ids(dataset, level, id_column)
        numbered = (id_column or level) not in dataset.column_names
        return units, unit_of_rows(id_R, units[level].to_numpy(), level, numbered)

    def _end(
        self,
        n: int,
        target: str | None,
        per_token: bool,
        dataset: Dataset | None,
        key: str | None,
        id_column: str | None,
        best: bool,
    ) -> Dataset:
        if n < 1:
            raise ValueError(f"n={n}: ask for one or more")
        column = column_of(target, self.targets)
        if dataset is None:
            units = self._units(key)
            row_U = np.arange(len(units))
        else:
            units, unit_R = self.match(dataset, key, id_column)
            row_U = rows_of_units(unit_R, len(units))
        value_U = units[column].to_numpy()
        candidates = np.flatnonzero(row_U >= 0)
        if per_token:
            token_U = units["tokens"].to_numpy()
            candidates = candidates[token_U[candidates] > 0]
            value_U = value_U / token_U.clip(min=1)
        order = np.argsort((-value_U if best else value_U)[candidates], kind="stable")
        chosen = candidates[order[:n]]
        found = units.take(pa.array(chosen))
        if dataset is None:
            return as_dataset(found)
        rows = dataset.select(row_U[chosen]).flatten_indices(keep_in_memory=True)
        return with_columns(rows, found.select(["updates", "tokens", *self.columns]))

    def _level(
        self, by: By | None, dataset: Dataset | None, key: str | None, id_column: str | None
    ) -> tuple[str, Groups | None]:
        """What is put into groups, and these."""
        if by is None:
            return key or self.key, None
        of_each = isinstance(by, str) and dataset is None
        level, groups = read_level(by, dataset, key if of_each else key or self.key, id_column, self._rows.keys)
        return level[0], groups

    def _units(self, key: str | None) -> pa.Table:
        key = key or self.key
        if key not in COUNTED or key not in self._rows.keys:
            known_by = ", ".join(name for name in self._rows.keys if name in COUNTED)
            raise ValueError(f"key={key!r}: these values are known by {known_by}: choose one of these")
        return known(self._summed(key), key)

    def _summed(self, key: str) -> pa.Table:
        """Sums over all visits, read once."""
        if key not in self._held:
            self._held[key] = self._read(key)
        return self._held[key]

    def _read(self, key: str) -> pa.Table:
        everything = self._asked == (None, None) and self._normalize is None
        # How often samples were visited is not known from sums over their documents' visits.
        if isinstance(self._rows, PublishedRows) and everything and key == self._rows.keys[-1]:
            return summed(self._rows.summed(), [key], ["updates", "tokens"], self.columns)
        return sum_values(self._rows, [key], *self._rows.window(*self._asked), self._normalize)


def open_rows(run: str | Path, revision: str | None = None) -> Rows:
    """Of a ledger, or of a repo on the Hub or a copy of one."""
    if not Path(run).exists() and REPO.fullmatch(str(run)):
        return PublishedRows.open(str(run), revision)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for a repo on the Hub, and {run} is a folder: leave it out")
    if any(Path(run).glob("values/train-*.parquet")):
        return PublishedRows.open(str(run), None)
    return LedgerRows.open(find_ledger(run))


def known(units: pa.Table, key: str) -> pa.Table:
    """Without padding, whose document is -1."""
    if key != "document_id":
        return units
    return units.filter((pc.field(key) >= 0) | (pc.field("tokens") > 0))


def in_all(units: pa.Table, key: str, columns: list[str]) -> pa.Table:
    """One row, for all units."""
    sums = {name: [units[name].to_numpy().sum()] for name in ("updates", "tokens", *columns)}
    return pa.table({COUNTED[key]: [units.num_rows], **sums})
