"""What a batch carries beside the model's inputs: whose its rows, or its runs of positions, are.

Collators drop keys they do not know, so ids do not travel in the rows that the user's collator sees: it is wrapped, to
take them off before and to put them into the batch afterwards. What is put there are tensors that begin with the
batch's own first dimension, as accelerate's slicing and broadcasting want it. The lengths of runs are shapes of empty
tensors: known on every device without waiting for it.

Shapes: R rows, T positions of a row, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ghost.units import Places, Rows, Runs, Units
from ..loss_tokens import count_loss_tokens, loss_positions
from .boundaries import begins, check_apart, check_token_labels, row_documents
from .packed import packed_lengths
from .samples import identified


# Keys of the batch that no model argument and no column is called.
SAMPLES_KEY = "_datashapley_sample_id"
DOCUMENTS_KEY = "_datashapley_document_id"
RUNS_KEY = "_datashapley_runs"
UNITS_KEY = "_datashapley_unit"
COUNT_KEY = "_datashapley_units"
POSITIONS_KEY = "_datashapley_position"


@dataclass
class BatchUnits:
    """The units of a batch: their ids by name, int64 [U], and their numbers of loss tokens, int64 [U]."""

    units: Units | Places
    ids: dict[str, Tensor]
    tokens: Tensor


@dataclass
class IdColumns:
    """Where rows carry ids that the model knows nothing of; `document` and `group`, one for each position, None:
    nowhere."""

    sample: str
    document: str | None = None
    group: str | None = None

    def without(self, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        return {key: value for key, value in row.items() if key not in (self.sample, self.document, self.group)}


@dataclass
class UnitPlan:
    """What a run gives values to.

    Attributes:
        unit: `ShapleyConfig.value_unit`.
        columns: where rows carry ids.
        packs: whether the collator makes one row of all samples.
        shifted: see `loss_tokens.shifts_labels`.
        forward: whether positions are scored one by one, whatever attends to whatever; else documents are apart.
        token_samples: samples whose tokens have values of their own; with unit "token", the others' documents have.
    """

    unit: str
    columns: IdColumns
    packs: bool
    shifted: bool
    forward: bool
    token_samples: frozenset[int] = frozenset()


class IdentifyingCollator:
    """Collates the rows of its items with the user's collator and adds whose they are.

    Of rows, sample ids, int64 [R]; of samples that the collator packs into one row, int64 [1, samples] and their
    lengths. Of documents and tokens, ids of samples and documents, int64 [R, T], and either the lengths of runs that
    are one document's in one sample, or each position's unit, int64 [R, T], the number of units, and each position's
    place in its sample.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], plan: UnitPlan):
        self.collate = collate
        self.plan = plan

    def __call__(self, items: list[Any]) -> Any:
        plan = self.plan
        pairs = identified(items, plan.columns.sample)
        rows = [plan.columns.without(pair.row) for pair in pairs]
        batch = self.collate(rows)
        lengths = None
        if plan.packs:
            lengths = packed_lengths(rows, batch)
        else:
            check_rows_kept(batch, len(rows))
        samples = torch.tensor([pair.sample_id for pair in pairs], dtype=torch.int64)
        if plan.unit == "sample":
            batch[SAMPLES_KEY] = samples if lengths is None else samples.unsqueeze(0)
            if lengths is not None:
                batch[RUNS_KEY] = runs_as_shapes(lengths, 1)
            return batch
        check_token_labels(batch, plan.unit)
        shape = batch["input_ids"].shape
        place_RT = torch.arange(len(pairs)).repeat_interleave(shape[1] if lengths is None else torch.tensor(lengths))
        place_RT = place_RT.view(shape)
        document_RT = self._documents([pair.row for pair in pairs], shape)
        begins_RT = begins(place_RT, document_RT)
        batch[SAMPLES_KEY] = samples[place_RT]
        batch[DOCUMENTS_KEY] = document_RT
        if plan.forward:
            self._add_places(batch, samples, place_RT, begins_RT)
            return batch
        check_apart(batch, begins_RT, plan.shifted)
        starts = begins_RT.flatten().nonzero().flatten().tolist()
        batch[RUNS_KEY] = runs_as_shapes(np.diff([*starts, shape.numel()]).tolist(), shape[0])
        return batch

    def _documents(self, rows: list[Any], shape: torch.Size) -> Tensor:
        """int64 [R, T]; -1 where rows have no documents and need none."""
        column = self.plan.columns.document
        if self.plan.unit == "token" and not (isinstance(rows[0], Mapping) and column in rows[0]):
            return torch.full(shape, -1)
        documents = [row_documents(row, column, self.plan.unit) for row in rows]
        lengths = [len(ids) for ids in documents]
        if sum(lengths) != shape.numel() or (not self.plan.packs and set(lengths) != {shape[1]}):
            raise ValueError(
                f"the data collator made input_ids {list(shape)} of rows with {lengths} ids in {column!r}, one for "
                "each token: make rows of one length (`pack_documents` does) and use "
                "transformers.default_data_collator, or DataCollatorWithFlattening"
            )
        return torch.from_numpy(np.concatenate(documents)).view(shape)

    def _add_places(self, batch: Any, samples: Tensor, place_RT: Tensor, begins_RT: Tensor) -> None:
        """Tokens with a loss are units where their sample was chosen, else (and where none has) the document's run."""
        loss = loss_positions(batch["labels"], self.plan.shifted).flatten()
        run = begins_RT.flatten().cumsum(0) - 1
        start = begins_RT.flatten().nonzero().flatten()
        has_loss = torch.zeros(len(start), dtype=torch.bool).scatter_(0, run[loss], True)
        chosen = torch.tensor([int(sample) in self.plan.token_samples for sample in samples])[place_RT.flatten()]
        alone = chosen & has_loss[run]
        # What a unit is known by: its token's position, or its run's first.
        known_by = torch.where(alone, torch.arange(len(run)), start[run])
        counts = ~alone | loss
        unit_of = known_by[counts].unique()
        unit = torch.where(counts, torch.searchsorted(unit_of, known_by), len(unit_of))
        batch[UNITS_KEY] = unit.view(place_RT.shape)
        batch[COUNT_KEY] = torch.empty(len(place_RT), len(unit_of), 0)
        if self.plan.unit == "token":
            place = place_in_sample(batch, begins(place_RT)).flatten()
            batch[POSITIONS_KEY] = torch.where(alone, place, -1).view(place_RT.shape)


def place_in_sample(batch: Any, begins_RT: Tensor) -> Tensor:
    """[R, T]; a row that is padded begins after its padding."""
    if "attention_mask" in batch and batch["attention_mask"].shape == begins_RT.shape:
        return batch["attention_mask"].cumsum(1) - 1
    column_RT = torch.arange(begins_RT.shape[1]).expand(begins_RT.shape)
    return column_RT - torch.where(begins_RT, column_RT, 0).cummax(1).values


def check_rows_kept(batch: Any, count: int) -> None:
    for name in ("input_ids", "labels"):
        if name in batch and len(batch[name]) != count:
            raise ValueError(
                f"the data collator made {len(batch[name])} rows of {name} from {count} samples, which cannot be told "
                "apart any more: use one that keeps a row for each sample "
                "(DataCollatorForLanguageModeling(tokenizer, mlm=False)), or DataCollatorWithFlattening"
            )


def runs_as_shapes(lengths: list[int], rows: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty(rows, length, 0) for length in lengths)


def take_units(inputs: dict[str, Any], shifted: bool) -> BatchUnits:
    """Takes what `IdentifyingCollator` has added out of the batch.

    Raises:
        ValueError: it is not there.
    """
    samples, documents, runs = (inputs.pop(key, None) for key in (SAMPLES_KEY, DOCUMENTS_KEY, RUNS_KEY))
    unit, count, positions = (inputs.pop(key, None) for key in (UNITS_KEY, COUNT_KEY, POSITIONS_KEY))
    if samples is None:
        raise ValueError(
            "a batch came without its samples' ids: get_train_dataloader was overridden; give the rows as "
            "train_dataset, and what makes batches of them as data_collator"
        )
    labels = inputs.get("labels")
    if runs is None and unit is None:
        tokens = torch.ones_like(samples) if labels is None else count_loss_tokens(labels, shifted)
        return BatchUnits(Rows(len(samples)), {"sample_id": samples}, tokens)
    assert labels is not None
    loss = loss_positions(labels, shifted).long().unsqueeze(-1)
    if unit is not None:
        places = Places(unit, count.shape[1])
        ids = {"sample_id": places.any_of(samples), "document_id": places.any_of(documents)}
        if positions is not None:
            ids["position"] = places.any_of(positions)
        return BatchUnits(places, ids, places.sum(loss).squeeze(-1))
    lengths = [run.shape[1] for run in runs]
    units = Runs(lengths, len(labels))
    tokens = units.sum(loss).squeeze(-1)
    if documents is None:
        return BatchUnits(units, {"sample_id": samples.flatten()}, tokens)
    starts = torch.tensor([0, *accumulate(lengths[:-1])]).to(samples.device, non_blocking=True)
    ids = {"sample_id": samples.flatten()[starts], "document_id": documents.flatten()[starts]}
    return BatchUnits(units, ids, tokens)
