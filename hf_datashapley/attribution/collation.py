"""Rows of a dataset as batches: what its collator makes of them, and what a collator must not do.

Shapes: R rows of a batch, T positions, U units of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
from torch import Tensor
from transformers import set_seed

from ..ghost.units import Units
from ..loss_tokens import IGNORED
from ..random_state import random_state_kept
from ..trainer.batches import BatchUnits, IdColumns, IdentifyingCollator, UnitPlan, take_units
from ..trainer.samples import IdentifiedRow
from .fingerprint import sha256_of
from .token_groups import group_positions


Unit = Literal["sample", "document", "token", "group"]
# Key of a batch under which each position's group lies.
GROUPS_KEY = "_datashapley_group_id"


@dataclass(frozen=True)
class CorpusBatch:
    """What the model takes, on the CPU; the units in it; and for each its place among the units asked for, int64 [U],
    -1 where it is none of them, and its number of loss tokens, int64 [U]."""

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

    @property
    def column(self) -> str | None:
        """That has the document, or the group, of each token."""
        return self.columns.group if self.unit == "group" else self.columns.document


class Collation:
    """
    Args:
        rows: map-style.
        reading: how they become batches.
        name: of the argument that they came in.
    """

    def __init__(self, rows: Any, reading: Reading, name: str):
        self.rows, self.reading, self.name = rows, reading, name
        unit = reading.unit if reading.unit == "document" else "sample"
        plan = UnitPlan(unit, reading.columns, reading.packs, reading.shifted, forward=False)
        self._collate = IdentifyingCollator(reading.collate, plan)

    def batch(self, indices: np.ndarray) -> tuple[dict[str, Any], BatchUnits]:
        """What the model takes of some rows (where units are groups, also their `GROUPS_KEY`), and whose it is: a row
        is known by its number.

        Raises:
            ValueError: there are no labels, or no batch.
        """
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
            made = dict(self._collate(items))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"data_collator made no batch of {len(items)} rows of {self.name} ({error}): rows are dicts with "
                "input_ids and labels, and those of different lengths need a collator that pads, such as "
                "DataCollatorForSeq2Seq(tokenizer)"
            ) from error
        if self.reading.unit == "group":
            made[GROUPS_KEY] = group_positions(rows, made, self.reading.column)
        return made

    def check(self) -> None:
        """Tries the collator on a batch of rows.

        Raises:
            ValueError: it labels what rows leave out, or draws at random.
        """
        self._check_labels_kept()
        self._check_repeatable()

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


def without_first_behind_padding(inputs: dict[str, Any]) -> Tensor:
    """Labels without that of each row's first token: padding on the left would be what predicts it, in rows that are
    shorter than the longest of their batch, so that scores would depend on the batch."""
    labels: Tensor = inputs["labels"]
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return labels
    return labels.masked_fill(mask.bool() & mask.bool().cumsum(1).eq(1), IGNORED)
