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
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ghost.units import Rows, Runs, Units
from ..loss_tokens import IGNORED, count_loss_tokens, loss_positions
from .packed import packed_lengths
from .samples import identified


# Keys of the batch that no model argument and no column is called.
SAMPLES_KEY = "_datashapley_sample_id"
DOCUMENTS_KEY = "_datashapley_document_id"
RUNS_KEY = "_datashapley_runs"


@dataclass
class BatchUnits:
    """The units of a batch: their ids by name, int64 [U], and their numbers of loss tokens, int64 [U]."""

    units: Units
    ids: dict[str, Tensor]
    tokens: Tensor


@dataclass
class IdColumns:
    """Where rows carry ids that the model knows nothing of; `document`, one for each position, None: nowhere."""

    sample: str
    document: str | None = None

    def without(self, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        return {key: value for key, value in row.items() if key not in (self.sample, self.document)}


class IdentifyingCollator:
    """Collates the rows of its items with the user's collator and adds their ids.

    Of rows, int64 [R]; of samples that the collator packs into one row (`packs`), int64 [1, samples] and their
    lengths; of documents, ids of samples and documents, int64 [R, positions], and the lengths of runs that are one
    document's in one sample. `apart`: documents attend to themselves only, or are meant to. `shifted`: see
    `loss_tokens.shifts_labels`.
    """

    def __init__(
        self, collate: Callable[[list[Any]], Any], columns: IdColumns, packs: bool, apart: bool, shifted: bool
    ):
        self.collate = collate
        self.columns = columns
        self.packs = packs
        self.apart = apart
        self.shifted = shifted

    def __call__(self, items: list[Any]) -> Any:
        pairs = identified(items, self.columns.sample)
        samples = [pair.sample_id for pair in pairs]
        rows = [self.columns.without(pair.row) for pair in pairs]
        batch = self.collate(rows)
        lengths = None
        if self.packs:
            lengths = packed_lengths(rows, batch)
        else:
            check_rows_kept(batch, len(rows))
        if self.columns.document is not None:
            documents = [row_documents(pair.row, self.columns.document) for pair in pairs]
            return self._with_documents(batch, samples, documents)
        batch[SAMPLES_KEY] = torch.tensor(samples, dtype=torch.int64)
        if lengths is not None:
            batch[SAMPLES_KEY] = batch[SAMPLES_KEY].unsqueeze(0)
            batch[RUNS_KEY] = runs_as_shapes(lengths, 1)
        return batch

    def _with_documents(self, batch: Any, samples: list[int], documents: list[np.ndarray]) -> Any:
        place_RT = torch.from_numpy(np.repeat(np.arange(len(samples)), [len(ids) for ids in documents]))
        document_RT = torch.from_numpy(np.concatenate(documents))
        shape = batch["input_ids"].shape
        if document_RT.numel() != shape.numel() or (not self.packs and {len(ids) for ids in documents} != {shape[1]}):
            raise ValueError(
                f"the data collator made input_ids {list(shape)} of rows with {[len(ids) for ids in documents]} ids "
                f"in {self.columns.document!r}, one for each token: make rows of one length (`pack_documents` does) "
                "and use transformers.default_data_collator, or DataCollatorWithFlattening"
            )
        place_RT, document_RT = place_RT.view(shape), document_RT.view(shape)
        begins_RT = torch.ones(shape, dtype=torch.bool)
        begins_RT[:, 1:] = (place_RT[:, 1:] != place_RT[:, :-1]) | (document_RT[:, 1:] != document_RT[:, :-1])
        check_boundaries(batch, begins_RT, self.apart, self.shifted)
        starts = begins_RT.flatten().nonzero().flatten().tolist()
        batch[SAMPLES_KEY] = torch.tensor(samples, dtype=torch.int64)[place_RT]
        batch[DOCUMENTS_KEY] = document_RT
        batch[RUNS_KEY] = runs_as_shapes(np.diff([*starts, shape.numel()]).tolist(), shape[0])
        return batch


def check_rows_kept(batch: Any, count: int) -> None:
    for name in ("input_ids", "labels"):
        if name in batch and len(batch[name]) != count:
            raise ValueError(
                f"the data collator made {len(batch[name])} rows of {name} from {count} samples, which cannot be told "
                "apart any more: use one that keeps a row for each sample "
                "(DataCollatorForLanguageModeling(tokenizer, mlm=False)), or DataCollatorWithFlattening"
            )


def row_documents(row: Any, column: str) -> np.ndarray:
    """A row's document of each position, int64. Padding (-1) goes to a document beside it, to which it adds nothing.

    Raises:
        ValueError: there are none, or they are not integers from 0 on.
    """
    cure = "make the rows with `pack_documents`, set document_id_column, or set value_unit='sample'"
    if not isinstance(row, Mapping) or column not in row:
        raise ValueError(
            f"value_unit='document', and a row has no column {column!r} (`document_id_column`) with the document of "
            f"each of its tokens: {cure}"
        )
    ids = np.asarray(row[column])
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or (ids < -1).any() or not (ids >= 0).any():
        raise ValueError(
            f"{column} of a row is not a list of integers from 0 to 2**63 - 1, -1 for padding, one for each token: "
            f"{cure}"
        )
    known = np.flatnonzero(ids >= 0)
    nearest = np.searchsorted(known, np.arange(len(ids)), side="right") - 1
    return ids[known[nearest.clip(min=0)]].astype(np.int64)


def check_boundaries(batch: Any, begins_RT: Tensor, apart: bool, shifted: bool) -> None:
    """Raises `ValueError` where a document's loss takes in another one's tokens by what the batch says."""
    inside = begins_RT.clone()
    inside[:, 0] = False
    labels = batch.get("labels")
    if labels is None or labels.shape != begins_RT.shape:
        raise ValueError(
            "value_unit='document', and the batch has no label for each token: use a model of tokens, or set "
            "value_unit='sample'"
        )
    cure = "make the rows with `pack_documents` and keep the column"
    if shifted and labels[inside].ne(IGNORED).any():
        raise ValueError(
            "value_unit='document', and the first token of a document is labelled, so the document before it would "
            f"have to predict it: label it {IGNORED}; {cure} labels"
        )
    if not apart:
        return
    if "attention_mask" in batch:
        raise ValueError(
            "value_unit='document', and the data collator adds an attention_mask, beside which models of transformers "
            "let documents attend to each other: use transformers.default_data_collator, or value_kernel='jvp' where "
            "they are meant to"
        )
    places = batch.get("position_ids")
    if places is None or (places[:, 1:] == places[:, :-1] + 1)[inside[:, 1:]].any():
        raise ValueError(
            "value_unit='document', and position_ids do not begin again at each document, so documents attend to each "
            f"other: {cure} position_ids; or set value_kernel='jvp' where they are meant to"
        )


def runs_as_shapes(lengths: list[int], rows: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty(rows, length, 0) for length in lengths)


def take_units(inputs: dict[str, Any], shifted: bool) -> BatchUnits:
    """Takes what `IdentifyingCollator` has added out of the batch. `shifted`: see `loss_tokens.shifts_labels`.

    Raises:
        ValueError: it is not there.
    """
    samples, documents, runs = (inputs.pop(key, None) for key in (SAMPLES_KEY, DOCUMENTS_KEY, RUNS_KEY))
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
    lengths = [run.shape[1] for run in runs]
    units = Runs(lengths, len(labels))
    tokens = units.sum(loss_positions(labels, shifted).long().unsqueeze(-1)).squeeze(-1)
    if documents is None:
        return BatchUnits(units, {"sample_id": samples.flatten()}, tokens)
    starts = torch.tensor([0, *accumulate(lengths[:-1])]).to(samples.device, non_blocking=True)
    ids = {"sample_id": samples.flatten()[starts], "document_id": documents.flatten()[starts]}
    return BatchUnits(units, ids, tokens)
