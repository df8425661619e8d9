"""A dataset as the units that are to be told apart: samples, documents, tokens, groups of tokens, or groups of those.

A unit's pieces may lie in several rows (a document that goes on in the next row, a group). So what is computed at a
time is a *shard*, a run of units one after the other, from all rows that hold a piece of them: a shard's result stands
by itself, whichever process makes it, before or after which others.

Shapes: R rows of a batch, T positions, U units of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..ghost.units import Rows, Runs
from ..grouping import Grouping
from ..loss_tokens import loss_positions
from ..trainer.batches import BatchUnits, place_in_sample
from ..trainer.boundaries import begins
from ..trainer.samples import is_stream, read_sample_ids
from .collation import GROUPS_KEY, Collation, CorpusBatch, Reading
from .document_rows import document_pieces, in_order
from .fingerprint import dataset_fingerprint, sha256_of
from .group_passes import group_passes, piece_begins, ranks_within
from .token_groups import group_pieces


# Rows of a dataset whose collation is part of its fingerprint.
COLLATED = 16


class Corpus:
    """
    Args:
        dataset: map-style, of rows.
        reading: how its rows become batches.
        partition: of its samples, or of its documents or groups of tokens in the order in which they first appear.
        name: of the argument that it came in.

    Attributes:
        count: of units.
        ids: what they are known by: `sample_id`, `document_id`, `group_id`, `sample_id` and `position`, or `group`.
        apart: whether the model keeps documents of a row apart whose position_ids begin again, so that rows of groups
            of tokens are passed less often; whoever knows the model says so.

    Raises:
        ValueError: it is a stream or empty, lacks ids that the unit takes, or the partition is of another one.
    """

    def __init__(self, dataset: Any, reading: Reading, partition: Grouping | None, name: str):
        if is_stream(dataset):
            raise ValueError(
                f"{name} is a stream, and attribution reads its rows again for each member: give a map-style dataset "
                "(datasets.Dataset.from_list(list(stream.take(n))))"
            )
        if isinstance(dataset, str | Mapping) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{name} is a {type(dataset).__name__}: give a datasets.Dataset or a list of rows, dicts with "
                "input_ids and labels"
            )
        if len(dataset) == 0:
            raise ValueError(f"{name} is empty: give it at least one row")
        self.rows, self.reading = dataset, reading
        self.name = name
        samples = read_sample_ids(dataset, reading.columns.sample, reading.progress)
        self.samples = np.arange(len(dataset)) if samples is None else samples
        self.apart = False
        self._collation = Collation(dataset, reading, name)
        self._row, self._single, self._single_ids = self._pieces()
        self._part(partition)
        self._collation.check()

    def parted(self, partition: Grouping | None) -> Corpus:
        """The same rows, with other groups as units; None: what there is of the reading's unit."""
        other = copy(self)
        other._part(partition)
        return other

    def _part(self, partition: Grouping | None) -> None:
        self.partition = partition
        self._unit, self.ids = (self._single, self._single_ids) if partition is None else self._grouped(partition)
        self._order = np.argsort(self._unit, kind="stable")
        self._sorted = self._unit[self._order]
        self.count = len(next(iter(self.ids.values())))

    def _pieces(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Of each piece its row and its unit, int64; and the units' ids."""
        if self.reading.unit == "sample":
            rows = np.arange(len(self.rows))
            return rows, rows, {"sample_id": self.samples}
        self._check_not_packing()
        if self.reading.unit in ("document", "group"):
            read = document_pieces if self.reading.unit == "document" else group_pieces
            rows, found = read(self.rows, self.reading.column, self.name, self.reading.progress)
            self._known, self._known_units = in_order(found)
            units = self._known_units[np.searchsorted(self._known, found)]
            return rows, units, {f"{self.reading.unit}_id": self._known[np.argsort(self._known_units)]}
        rows, positions = self._loss_positions()
        return rows, np.arange(len(rows)), {"sample_id": self.samples[rows], "position": positions.astype(np.int32)}

    def _check_not_packing(self) -> None:
        if self.reading.packs and self.reading.unit != "document":
            raise ValueError(
                f"unit={self.reading.unit!r} needs a row for each sample: use a collator that does not pack "
                "(DataCollatorForLanguageModeling(tokenizer, mlm=False)), or unit='sample'"
            )

    def _loss_positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and position of each token that has a loss."""
        rows, positions = [], []
        size = self.reading.batch_size  # rows that can be collated together
        for start in self._progress(range(0, len(self.rows), size), "labels"):
            indices = np.arange(start, min(start + size, len(self.rows)))
            inputs, _ = self._collation.batch(indices)
            row, column = self._predicted(inputs).nonzero().numpy().T
            rows.append(indices[row])
            # Padding on the left is not counted.
            starts_RT = begins(torch.arange(len(indices)).unsqueeze(1).expand(inputs["labels"].shape))
            positions.append(place_in_sample(inputs, starts_RT).numpy()[row, column])
        return np.concatenate(rows), np.concatenate(positions)

    def _predicted(self, inputs: dict[str, Any]) -> Tensor:
        """Which labels have a loss, bool [R, T]."""
        labels, groups = inputs["labels"], inputs.get(GROUPS_KEY)
        if labels.ndim != 2 or (groups is not None and groups.shape != labels.shape):
            raise ValueError(
                f"unit={self.reading.unit!r}, and labels {list(labels.shape)} are not one for each token: "
                "unit='sample'"
            )
        return loss_positions(labels, self.reading.shifted)

    def _grouped(self, partition: Grouping) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Units and ids where groups are units."""
        if self.reading.unit == "token":
            raise ValueError("unit='token' and a partition of samples: leave one of them out")
        count = len(next(iter(self._single_ids.values())))
        if len(partition.labels) != count:
            raise ValueError(
                f"partition has {len(partition.labels)} labels and {self.name} {count} {self.reading.unit}s: make it "
                "of the same dataset"
            )
        names = np.arange(partition.num_groups) if partition.names is None else np.array(partition.names, dtype=object)
        return partition.labels[self._single], {"group": names}

    def fingerprints(self) -> dict[str, str]:
        """Of every row, of the units, and of what the collator makes of a few rows spread over the dataset. Reads the
        dataset once."""
        rows = dataset_fingerprint(self.rows, f"{self.name}: fingerprint", self.reading.progress)
        some = np.unique(np.linspace(0, len(self.rows) - 1, COLLATED).astype(int))
        collated = [self._collation.batch(some[i : i + 1])[0] for i in range(len(some))]
        units = [self._row, self._unit]
        if self.reading.unit == "group":  # rows may have other columns of the same pieces
            units.append(np.array(self.reading.columns.group))
        return {"dataset": rows, "pieces": sha256_of(units), "collated": sha256_of(collated)}

    def batches(self, start: int, stop: int) -> Iterator[CorpusBatch]:
        """All rows that hold a piece of the units `start` to `stop` - 1."""
        rows = self._rows_of(start, stop)
        for begin in range(0, len(rows), self.reading.batch_size):
            indices = rows[begin : begin + self.reading.batch_size]
            inputs, found = self._collation.batch(indices)
            if self.reading.unit in ("token", "group"):
                yield from self._passes(inputs, indices, start, stop)
                continue
            assert isinstance(found.units, Rows | Runs)
            unit = self._units_of(found)
            place = np.where((unit >= start) & (unit < stop), unit - start, -1)
            yield CorpusBatch(inputs, found.units, torch.from_numpy(place), found.tokens)

    def collated(self, indices: np.ndarray) -> tuple[dict[str, Any], BatchUnits]:
        """Rows as one batch; whose they are."""
        inputs, found = self._collation.batch(indices)
        inputs.pop(GROUPS_KEY, None)
        return inputs, found

    def batch_count(self, start: int, stop: int) -> int:
        """Of `batches`, but for rows that are passed more than once."""
        return -(-len(self._rows_of(start, stop)) // self.reading.batch_size)

    def _rows_of(self, start: int, stop: int) -> np.ndarray:
        first, last = np.searchsorted(self._sorted, [start, stop])
        return np.unique(self._row[self._order[first:last]])

    def tokens(self, unit: int) -> Iterator[np.ndarray]:
        """A unit's own token ids, row by row; of unit "token" its one."""
        first, last = np.searchsorted(self._sorted, [unit, unit + 1])
        for piece in self._order[first:last]:
            row = self.rows[int(self._row[piece])]
            ids = np.asarray(row["input_ids"])
            if self.reading.unit in ("document", "group"):
                ids = ids[np.asarray(row[self.reading.column]) == self.ids[f"{self.reading.unit}_id"][unit]]
            elif self.reading.unit == "token":
                mask = np.asarray(row.get("attention_mask", []))
                # Positions do not count a row's own padding on the left.
                own = ids[mask.astype(bool)] if mask.shape == ids.shape else ids
                ids = own[self.ids["position"][unit]][None]
            yield ids

    def _units_of(self, found: BatchUnits) -> np.ndarray:
        """The units of a batch's rows, or of its runs."""
        if self.reading.unit == "sample":
            return self._unit[found.ids["sample_id"].numpy()]
        return self._units_known_by(found.ids["document_id"].numpy())

    def _units_known_by(self, ids: np.ndarray) -> np.ndarray:
        """Of documents or groups of tokens, by ids that occur."""
        unit = self._known_units[np.searchsorted(self._known, ids)]
        return unit if self.partition is None else self.partition.labels[unit]

    def _passes(self, inputs: dict[str, Any], indices: np.ndarray, start: int, stop: int) -> Iterator[CorpusBatch]:
        """Where a row's tokens are of several units."""
        predicted_RT = self._predicted(inputs)
        if self.reading.unit == "token":
            found = predicted_RT.nonzero().numpy()
            unit = np.searchsorted(self._row, indices[found[:, 0]]) + ranks_within(found[:, 0])
            begins_RT = piece_begins(inputs, predicted_RT, False, self.reading.shifted)
        else:
            group_RT = inputs.pop(GROUPS_KEY)
            predicted_RT &= group_RT >= 0
            unit = self._units_known_by(group_RT[predicted_RT].numpy())
            begins_RT = piece_begins(inputs, predicted_RT, self.apart, self.reading.shifted)
        place = np.where((unit >= start) & (unit < stop), unit - start, -1)
        place_RT = torch.full(predicted_RT.shape, -1)
        place_RT[predicted_RT] = torch.from_numpy(place)
        yield from group_passes(inputs, place_RT, begins_RT, self.reading.batch_size)

    def _progress(self, numbers: range, what: str) -> Any:
        return tqdm(numbers, f"{self.name}: {what}", disable=not self.reading.progress, leave=False)
