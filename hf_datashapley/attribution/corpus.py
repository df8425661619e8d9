"""A dataset as the units that are to be told apart: samples, documents, tokens, or groups of samples or documents.

A unit's pieces may lie in several rows (a document that goes on in the next row, a group). So what is computed at a
time is a *shard*, a run of units one after the other, from all rows that hold a piece of them: a shard's result stands
by itself, whichever process makes it, before or after which others.

Shapes: R rows of a batch, T positions, U units of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import set_seed

from ..ghost.units import Rows, Runs, Units
from ..loss_tokens import IGNORED, loss_positions
from ..random_state import random_state_kept
from ..trainer.batches import BatchUnits, IdColumns, IdentifyingCollator, UnitPlan, place_in_sample, take_units
from ..trainer.boundaries import begins
from ..trainer.samples import IdentifiedRow, is_stream, read_sample_ids
from .document_rows import document_pieces, in_order
from .fingerprint import dataset_fingerprint, sha256_of
from .grouping import Grouping


Unit = Literal["sample", "document", "token"]
# Rows of a dataset whose collation is part of its fingerprint.
COLLATED = 16


@dataclass(frozen=True)
class CorpusBatch:
    """What the model takes, on the CPU; the units in it; and for each its place among the units asked for, int64 [U],
    -1 where it is none of them."""

    inputs: dict[str, Any]
    units: Units
    place: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Reading:
    """How rows become batches.

    Attributes:
        collate: the user's collator, over rows without columns that the model does not take.
        unit: what is told apart.
        columns: where rows carry ids.
        packs: whether the collator makes one row of all that it is given.
        shifted: see `loss_tokens.shifts_labels`.
        batch_size: rows of a forward pass.
        progress: show a progress bar while ids are read.
    """

    collate: Callable[[list[Any]], Any]
    unit: Unit
    columns: IdColumns
    packs: bool
    shifted: bool
    batch_size: int
    progress: bool


class Corpus:
    """
    Args:
        dataset: map-style, of rows.
        reading: how its rows become batches.
        partition: of its samples, or of its documents in the order in which they first appear.
        name: of the argument that it came in.

    Attributes:
        count: of units.
        ids: what they are known by: `sample_id`, `document_id`, `sample_id` and `position`, or `group`.

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
        self.name, self.partition = name, partition
        samples = read_sample_ids(dataset, reading.columns.sample, reading.progress)
        self.samples = np.arange(len(dataset)) if samples is None else samples
        unit = "sample" if reading.unit == "token" else reading.unit
        plan = UnitPlan(unit, reading.columns, reading.packs, reading.shifted, forward=False)
        self._collate = IdentifyingCollator(reading.collate, plan)
        self._row, self._unit, self.ids = self._pieces()
        if partition is not None:
            self._unit, self.ids = self._grouped(partition)
        self._check_labels_kept()
        self._check_repeatable()
        self._order = np.argsort(self._unit, kind="stable")
        self._sorted = self._unit[self._order]
        self.count = len(next(iter(self.ids.values())))

    def _pieces(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Of each piece its row and its unit, int64; and the units' ids."""
        if self.reading.unit == "sample":
            rows = np.arange(len(self.rows))
            return rows, rows, {"sample_id": self.samples}
        if self.reading.unit == "document":
            rows, documents = document_pieces(
                self.rows, self.reading.columns.document, self.name, self.reading.progress
            )
            self._document_ids, self._document_units = in_order(documents)
            units = self._document_units[np.searchsorted(self._document_ids, documents)]
            return rows, units, {"document_id": self._document_ids[np.argsort(self._document_units)]}
        rows, positions = self._loss_positions()
        return rows, np.arange(len(rows)), {"sample_id": self.samples[rows], "position": positions.astype(np.int32)}

    def _loss_positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and position of each token that has a loss."""
        if self.reading.packs:
            raise ValueError(
                "unit='token' needs a row for each sample: use a collator that does not pack "
                "(DataCollatorForLanguageModeling(tokenizer, mlm=False)), or unit='sample'"
            )
        rows, positions = [], []
        size = self.reading.batch_size  # rows that can be collated together
        for start in self._progress(range(0, len(self.rows), size), "labels"):
            indices = np.arange(start, min(start + size, len(self.rows)))
            inputs, _ = self._batch(indices)
            row, column = self._token_positions(inputs).T
            rows.append(indices[row])
            # Padding on the left is not counted.
            starts_RT = begins(torch.arange(len(indices)).unsqueeze(1).expand(inputs["labels"].shape))
            positions.append(place_in_sample(inputs, starts_RT).numpy()[row, column])
        return np.concatenate(rows), np.concatenate(positions)

    def _token_positions(self, inputs: dict[str, Any]) -> np.ndarray:
        """[tokens, 2]: row of the batch and position of each loss token, in order."""
        labels = inputs["labels"]
        if labels.ndim != 2:
            raise ValueError(
                f"unit='token', and labels {list(labels.shape)} are not one for each token: unit='sample'"
            )
        return loss_positions(labels.clone(), self.reading.shifted).nonzero().numpy()

    def _grouped(self, partition: Grouping) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Units and ids where groups are units."""
        if self.reading.unit == "token":
            raise ValueError("unit='token' and a partition of samples: leave one of them out")
        count = len(next(iter(self.ids.values())))
        if len(partition.labels) != count:
            raise ValueError(
                f"partition has {len(partition.labels)} labels and {self.name} {count} {self.reading.unit}s: make it "
                "of the same dataset"
            )
        names = np.arange(partition.num_groups) if partition.names is None else np.array(partition.names, dtype=object)
        return partition.labels[self._unit], {"group": names}

    def _check_labels_kept(self) -> None:
        """Raises `ValueError` where the collator labels what a row leaves out: the prompt of a query, say."""
        for index in range(min(len(self.rows), self.reading.batch_size)):
            row = self.rows[index]
            own = np.asarray(row["labels"]) if isinstance(row, Mapping) and "labels" in row else np.zeros(())
            with random_state_kept():
                made = self._collated(np.array([index])).get("labels")
            if own.ndim != 1 or not isinstance(made, Tensor) or made.shape != (1, *own.shape):
                continue
            if (made[0].numpy() != IGNORED)[own == IGNORED].any():
                raise ValueError(
                    f"data_collator labels tokens that the rows of {self.name} leave out ({IGNORED}): use one that "
                    "keeps labels (DataCollatorForSeq2Seq(tokenizer) pads them), or drop the column `labels`"
                )

    def _check_repeatable(self) -> None:
        """Raises `ValueError` where the collator draws at random: rows would be others in each pass."""
        some = np.arange(min(len(self.rows), self.reading.batch_size))
        found = []
        for seed in (0, 1):
            with random_state_kept():
                set_seed(seed)
                found.append(sha256_of(self._collated(some)))
        if found[0] != found[1]:
            raise ValueError(
                f"data_collator draws at random, so {self.name} would be another one in each pass over it: mask once "
                "and for all (dataset.map), and use a collator that does not"
            )

    def fingerprints(self) -> dict[str, str]:
        """Of every row, of the units, and of what the collator makes of a few rows spread over the dataset. Reads the
        dataset once."""
        rows = dataset_fingerprint(self.rows, f"{self.name}: fingerprint", self.reading.progress)
        some = np.unique(np.linspace(0, len(self.rows) - 1, COLLATED).astype(int))
        collated = [self._batch(some[i : i + 1])[0] for i in range(len(some))]
        return {"dataset": sha256_of([rows, self._row, self._unit]), "collated": sha256_of(collated)}

    def batches(self, start: int, stop: int) -> Iterator[CorpusBatch]:
        """All rows that hold a piece of the units `start` to `stop` - 1."""
        first, last = np.searchsorted(self._sorted, [start, stop])
        rows = np.unique(self._row[self._order[first:last]])
        for begin in range(0, len(rows), self.reading.batch_size):
            indices = rows[begin : begin + self.reading.batch_size]
            inputs, found = self._batch(indices)
            if self.reading.unit == "token":
                yield from self._tokens(inputs, indices, start, stop)
                continue
            assert isinstance(found.units, Rows | Runs)
            unit = self._units_of(found)
            place = np.where((unit >= start) & (unit < stop), unit - start, -1)
            yield CorpusBatch(inputs, found.units, torch.from_numpy(place), found.tokens)

    def tokens(self, unit: int) -> Iterator[np.ndarray]:
        """A unit's own token ids, row by row; of unit "token" its one."""
        first, last = np.searchsorted(self._sorted, [unit, unit + 1])
        for piece in self._order[first:last]:
            row = self.rows[int(self._row[piece])]
            ids = np.asarray(row["input_ids"])
            if self.reading.unit == "document":
                ids = ids[np.asarray(row[self.reading.columns.document]) == self.ids["document_id"][unit]]
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
        unit = self._document_units[np.searchsorted(self._document_ids, found.ids["document_id"].numpy())]
        return unit if self.partition is None else self.partition.labels[unit]

    def _tokens(self, inputs: dict[str, Any], indices: np.ndarray, start: int, stop: int) -> Iterator[CorpusBatch]:
        """A row for each token of the units, in which it alone has a label."""
        found = self._token_positions(inputs)
        unit = np.searchsorted(self._row, indices[found[:, 0]]) + ranks_within(found[:, 0])
        wanted = (unit >= start) & (unit < stop)
        found, place = found[wanted], torch.from_numpy(unit[wanted] - start)
        for begin in range(0, len(found), self.reading.batch_size):
            row, position = torch.from_numpy(found[begin : begin + self.reading.batch_size]).T
            copies = {key: value[row] if isinstance(value, Tensor) else value for key, value in inputs.items()}
            labels = torch.full_like(copies["labels"], IGNORED)
            labels[torch.arange(len(row)), position] = copies["labels"][torch.arange(len(row)), position]
            own = place[begin : begin + len(row)]
            yield CorpusBatch({**copies, "labels": labels}, Rows(len(row)), own, torch.ones_like(own))

    def _batch(self, indices: np.ndarray) -> tuple[dict[str, Any], BatchUnits]:
        with random_state_kept():
            inputs = self._collated(indices)
        if "labels" not in inputs:
            raise ValueError(
                f"{self.name} has no labels after the data collator: give its rows `labels`, or use a collator that "
                "makes them (DataCollatorForLanguageModeling(tokenizer, mlm=False))"
            )
        if self.reading.shifted:
            inputs["labels"] = without_first_behind_padding(inputs)
        return inputs, take_units(inputs, self.reading.shifted)

    def _collated(self, indices: np.ndarray) -> dict[str, Any]:
        chosen = [int(index) for index in indices]
        rows = (
            self.rows.__getitems__(chosen)
            if isinstance(self.rows, datasets.Dataset)
            else [self.rows[index] for index in chosen]
        )
        # A row is known by its number here; what it is called does not matter before the end.
        items = [IdentifiedRow(row, index) for row, index in zip(rows, chosen, strict=True)]
        try:
            return dict(self._collate(items))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"data_collator made no batch of {len(items)} rows of {self.name} ({error}): rows are dicts with "
                "input_ids and labels, and those of different lengths need a collator that pads, such as "
                "DataCollatorForSeq2Seq(tokenizer)"
            ) from error

    def _progress(self, numbers: range, what: str) -> Any:
        return tqdm(numbers, f"{self.name}: {what}", disable=not self.reading.progress, leave=False)


def without_first_behind_padding(inputs: dict[str, Any]) -> Tensor:
    """Labels without that of each row's first token: padding on the left would be what predicts it, in rows that are
    shorter than the longest of their batch, so that scores would depend on the batch."""
    labels: Tensor = inputs["labels"]
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return labels
    return labels.masked_fill(mask.bool() & mask.bool().cumsum(1).eq(1), IGNORED)


def ranks_within(row: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... for the entries of each row; rows are in order."""
    begins = np.flatnonzero(np.diff(row, prepend=-1))
    return np.arange(len(row)) - np.repeat(begins, np.diff([*begins, len(row)]))
