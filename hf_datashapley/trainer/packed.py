"""Samples or documents that share a row: which tokens are whose, and whether they leave each other alone.

`DataCollatorWithFlattening` joins the samples of a micro-batch to one row and restarts `position_ids` at each. A
sample has a value of its own only where no other sample's tokens enter its loss. Models of transformers see to that by
a mask that they make of the positions, and make no such mask where an `attention_mask` or a cache comes along, without
a word. So it is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, PreTrainedModel

from ..directions.validation import Batch, Collate
from ..loss_tokens import IGNORED
from ..random_state import RandomState, random_state_kept


KEPT_APART = "set use_cache=False and load the model with attn_implementation='sdpa' or 'eager'"
CURE = "or use one that keeps a row for each sample (DataCollatorForLanguageModeling(tokenizer, mlm=False))"


def packs_samples(collator: Any) -> bool:
    """Whether it makes one row of all samples."""
    return isinstance(collator, DataCollatorWithFlattening)


def packed_lengths(rows: list[Any], batch: Mapping[str, Any]) -> list[int]:
    """How many positions of the packed row are whose, one sample after the other.

    Raises:
        ValueError: the row is not the samples' tokens one after the other, or a sample is to predict the next one's.
    """
    tokens = [torch.as_tensor(row["input_ids"]) for row in rows]
    lengths = [len(own) for own in tokens]
    joined = torch.cat(tokens).unsqueeze(0)
    if not torch.equal(batch["input_ids"], joined) or batch["labels"].shape != joined.shape:
        raise ValueError(
            f"the data collator's row of input_ids {list(batch['input_ids'].shape)} is not the tokens of its "
            f"{len(rows)} samples {list(joined.shape)} one after the other, so they cannot be told apart any more: "
            f"pack as DataCollatorWithFlattening does, {CURE}"
        )
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    if batch["labels"][0, starts].ne(IGNORED).any():
        raise ValueError(
            "the data collator labels the first token of a packed sample, so the sample before it would have to "
            f"predict it: leave separator_id at {IGNORED}, {CURE}"
        )
    return lengths


def check_samples_apart(
    model: PreTrainedModel, loss: Callable[[nn.Module, Batch], Tensor], collate: Collate, row: Any
) -> None:
    """Packs a row twice, and sees whether other tokens in the first sample move the loss of the second.

    Raises:
        ValueError: they do.
    """
    batch = dict(collate([row, row]))
    length, _ = packed_lengths([row, row], batch)
    if not first_leaves_second_alone(model, loss, batch, length):
        raise ValueError(
            "the samples of a packed row attend to each other: other tokens in one moved the loss of the next, so "
            "they have no values of their own. With DataCollatorWithFlattening leave return_position_ids=True, add no "
            f"attention_mask, {KEPT_APART}, {CURE}"
        )


def check_documents_apart(
    model: PreTrainedModel, loss: Callable[[nn.Module, Batch], Tensor], collate: Collate, row: Any, rows: int
) -> None:
    """The same of two documents in a row, whose positions begin again at the second; in so many rows alike.

    (flash_attention_2 keeps them apart where a batch has one row, and only there.)

    Raises:
        ValueError: the model lets the second attend to the first.
    """
    if not documents_apart(model, loss, collate([row]), rows):
        raise ValueError(
            "value_unit='document': documents that share a row attend to each other in this model although "
            f"position_ids begin again at each, so they have no values of their own: {KEPT_APART}, or set "
            "value_kernel='jvp', which tells them apart all the same"
        )


def documents_apart(
    model: PreTrainedModel, loss: Callable[[nn.Module, Batch], Tensor], alone: Mapping[str, Any], rows: int
) -> bool:
    """Whether a document, [1, T], is left alone by itself before it, where positions begin again between the two."""
    length = alone["input_ids"].shape[1]
    batch = {
        "input_ids": torch.as_tensor(alone["input_ids"]).repeat(rows, 2),
        "labels": torch.as_tensor(alone["labels"]).repeat(rows, 2),
        "position_ids": torch.arange(length).repeat(rows, 2),
    }
    batch["labels"][:, length] = IGNORED
    return first_leaves_second_alone(model, loss, batch, length)


def check_no_cache(model: PreTrainedModel) -> None:
    """Raises `ValueError` where a cache was turned on since this was tried."""
    if vars(model.config).get("use_cache"):
        raise ValueError(
            "config.use_cache was set while training, beside which samples or documents that share a row attend to "
            "each other: set model.config.use_cache=False again (generate(use_cache=True) needs no such setting)"
        )


def first_leaves_second_alone(
    model: PreTrainedModel, loss: Callable[[nn.Module, Batch], Tensor], batch: dict[str, Any], length: int
) -> bool:
    """Whether other tokens at the first `length` positions leave the loss of the others as it is, to the bit.

    Four forward passes. No global random state is drawn from, and every module's train or eval flag is as it was.
    """
    labels, changed = batch["labels"].clone(), batch["input_ids"].clone()
    labels[:, :length] = IGNORED
    changed[:, :length] = (changed[:, :length] + 1) % model.get_input_embeddings().num_embeddings
    with random_state_kept(), train_flags_kept(model), torch.no_grad():
        state = RandomState()
        for training in (True, False):
            model.train(training)
            losses = []
            for tokens in (batch["input_ids"], changed):
                state.restore()  # the same dropout
                losses.append(loss(model, {**batch, "labels": labels, "input_ids": tokens}))
            if not torch.equal(*losses):
                return False
    return True


@contextmanager
def train_flags_kept(model: nn.Module) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training
