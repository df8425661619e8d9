"""What a model makes of each query: its mean token loss, or the margin of its narrowest token.

Shapes: Q queries, B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..directions.validation import Collate, evaluating
from ..loss_tokens import IGNORED, count_loss_tokens, shifts_labels
from ..random_state import random_state_kept
from .one_update import Floats, Rows, token_losses


@torch.no_grad()
def query_losses(model: nn.Module, batches: Iterable[Rows]) -> Floats:
    """Mean token loss of each row of the batches, nats, dropout off; [Q]. NaN for a row without a label.

    Costs a forward pass. The model is left as it was.
    """
    with evaluating(model):
        found = [mean_losses(model, rows) for rows in batches]
    return np.concatenate(found)


def mean_losses(model: nn.Module, rows: Rows) -> Floats:
    """[B]"""
    losses_B = token_losses(model, rows).cpu().double().sum(1)
    mean_B: Floats = (losses_B / count_loss_tokens(rows["labels"].cpu(), shifts_labels(model))).numpy()
    return mean_B


@torch.no_grad()
def query_margins(model: nn.Module, batches: Iterable[Rows]) -> Floats:
    """By how much each row's worst token falls short of being predicted, dropout off; [Q], in logits.

    The greatest over the row's loss tokens of (the greatest logit of another token - the label's logit): below 0, the
    model predicts every one of them; above, it does not. `brittleness` asks when that flips. As with a loss, less is
    better.
    """
    with evaluating(model):
        found = [short_by(model, rows) for rows in batches]
    return torch.cat(found).double().numpy()


def short_by(model: nn.Module, rows: Rows) -> Tensor:
    """[B], on the CPU."""
    inputs: dict[str, Any] = {key: value for key, value in rows.items() if key != "labels"}
    logits_BTV, labels_BT = model(**inputs).logits, rows["labels"]
    if shifts_labels(model):
        logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
    counts_BT = labels_BT != IGNORED
    at_BT1 = labels_BT.where(counts_BT, 0)[..., None]
    label_BT = logits_BTV.gather(2, at_BT1)[..., 0]
    others_BT = logits_BTV.scatter(2, at_BT1, -torch.inf).amax(2)
    return (others_BT - label_BT).where(counts_BT, -torch.inf).amax(1).cpu()


def batches_of(rows: Sequence[Any], collate: Collate, batch_size: int, device: torch.device) -> Iterator[Rows]:
    """The rows in their order, collated without a trace in any random state."""
    for start in range(0, len(rows), batch_size):
        with random_state_kept():
            batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        yield {name: value.to(device) for name, value in batch.items()}
