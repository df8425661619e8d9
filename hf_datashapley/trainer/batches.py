"""What a batch carries beside the model's inputs: whose its rows, or its runs of positions, are.

Collators drop keys they do not know, so ids do not travel in the rows that the user's collator sees: it is wrapped, to
take them off before and to put them into the batch afterwards. What is put there are tensors that begin with the
batch's own first dimension, as accelerate's slicing and broadcasting want it. The lengths of runs are shapes of empty
tensors: known on every device without waiting for it.

Shapes: R rows, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ghost.units import Rows, Runs, Units
from ..loss_tokens import count_loss_tokens, loss_positions
from .packed import packed_lengths
from .samples import identified


# Keys of the batch that no model argument and no column is called.
SAMPLES_KEY = "_datashapley_sample_id"
RUNS_KEY = "_datashapley_runs"


@dataclass
class BatchUnits:
    """The units of a batch: their ids by name, int64 [U], and their numbers of loss tokens, int64 [U]."""

    units: Units
    ids: dict[str, Tensor]
    tokens: Tensor


class WithoutColumn:
    """A collator whose rows lose one column first, if they have it."""

    def __init__(self, collate: Callable[[list[Any]], Any], column: str):
        self.collate = collate
        self.column = column

    def __call__(self, rows: list[Any]) -> Any:
        if isinstance(rows[0], Mapping) and self.column in rows[0]:
            rows = [{key: value for key, value in row.items() if key != self.column} for row in rows]
        return self.collate(rows)


class IdentifyingCollator:
    """Collates the rows of its items with the user's collator and adds their ids, int64 [rows].

    Of samples that the collator packs into one row (`packs`), int64 [1, samples], and their lengths.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], id_column: str, packs: bool):
        self.collate = WithoutColumn(collate, id_column)
        self.id_column = id_column
        self.packs = packs

    def __call__(self, items: list[Any]) -> Any:
        pairs = identified(items, self.id_column)
        ids = torch.tensor([pair.sample_id for pair in pairs], dtype=torch.int64)
        rows = [pair.row for pair in pairs]
        batch = self.collate(rows)
        if self.packs:
            batch[RUNS_KEY] = runs_as_shapes(packed_lengths(rows, batch), 1)
            batch[SAMPLES_KEY] = ids.unsqueeze(0)
            return batch
        for name in ("input_ids", "labels"):
            if name in batch and len(batch[name]) != len(rows):
                raise ValueError(
                    f"the data collator made {len(batch[name])} rows of {name} from {len(rows)} samples, which "
                    "cannot be told apart any more: use one that keeps a row for each sample "
                    "(DataCollatorForLanguageModeling(tokenizer, mlm=False)), or DataCollatorWithFlattening"
                )
        batch[SAMPLES_KEY] = ids
        return batch


def runs_as_shapes(lengths: list[int], rows: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty(rows, length, 0) for length in lengths)


def take_units(inputs: dict[str, Any], shifted: bool) -> BatchUnits:
    """Takes what `IdentifyingCollator` has added out of the batch. `shifted`: see `loss_tokens.shifts_labels`.

    Raises:
        ValueError: it is not there.
    """
    samples, runs = inputs.pop(SAMPLES_KEY, None), inputs.pop(RUNS_KEY, None)
    if samples is None:
        raise ValueError(
            "a batch came without its samples' ids: get_train_dataloader was overridden; give the rows as "
            "train_dataset, and what makes batches of them as data_collator"
        )
    labels = inputs.get("labels")
    if runs is None:
        tokens = torch.ones_like(samples) if labels is None else count_loss_tokens(labels, shifted)
        return BatchUnits(Rows(len(samples)), {"sample_id": samples}, tokens)
    assert labels is not None
    units = Runs([run.shape[1] for run in runs], len(labels))
    tokens = units.sum(loss_positions(labels, shifted).long().unsqueeze(-1)).squeeze(-1)
    return BatchUnits(units, {"sample_id": samples.flatten()}, tokens)
