"""One update of the optimizer as a game: the samples of the batch play, and every coalition makes the real step.

    g_i     sample i's share of the gradient: that of its summed token losses over the batch's loss tokens
    c       min(1, max_grad_norm / (|sum_i g_i| + 1e-6)), the clipping factor; of the whole batch, a constant
    w_T     what `optimizer.step()` makes of the weights with gradient c sum_{i in T} g_i, from the same weights and
            state each time; the empty coalition has gradient 0, so that momentum and weight decay act alone
    U(T)    - l_v(w_T), with l_v the mean token loss on the validation rows, nats

so U({}) = -l_v(w(0)) and U(all) = -l_v(w(1)), the ends of the path of `directions.path`. Dropout is off throughout,
also for the g_i: a coalition's loss would otherwise depend on masks that were drawn for others.

Losses are taken from the logits, in float32 at least. With small steps the differences of U drown in float32:
make a float64 copy of the model and of the optimizer's state where the last digits count.

Shapes: N samples, K targets, B rows, T tokens.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ..attribution import losses
from ..attribution.losses import without_cache
from ..directions.validation import evaluating
from ..directions.weights import weights_at
from ..loss_tokens import count_loss_tokens, shifts_labels
from ..random_state import random_state_kept


Floats = NDArray[np.float64]
Rows = Mapping[str, Tensor]


@dataclass
class OneUpdate:
    """The game, within `one_update`.

    Attributes:
        validation: rows of each of the K targets.
        optimizer: with its state before the step.
        weights: w_t.
        shares: c g_i, [N, *shape], of the parameters that the loss reaches.
    """

    model: nn.Module
    players: int
    validation: dict[str, Rows]
    optimizer: Optimizer
    weights: dict[nn.Parameter, Tensor]
    shares: dict[nn.Parameter, Tensor]

    @torch.no_grad()
    def utility(self, members: Sequence[int]) -> Floats:
        """U of the coalition, [K]."""
        chosen = torch.tensor(members, dtype=torch.int64)
        for parameter, weight in self.weights.items():
            parameter.copy_(weight)
            shares_N = self.shares.get(parameter)
            parameter.grad = None if shares_N is None else shares_N[chosen.to(shares_N.device)].sum(0)
        copy_of(self.optimizer).step()
        return np.array([-mean_token_loss(self.model, rows) for rows in self.validation.values()])


@contextmanager
def one_update(
    model: nn.Module,
    batch: Rows,
    validation: Rows | Mapping[str, Rows],
    optimizer: Optimizer,
    max_grad_norm: float | None,
    num_items_in_batch: int | None,
) -> Iterator[OneUpdate]:
    """The game of the update that `optimizer` is about to make of `batch`; arguments as `exact_shapley` has them.

    Afterwards, also after an exception, the weights lie in the memory that they were in, which nothing has written;
    gradients, train and eval flags and all random states are as they were. The optimizer itself is never touched.
    """
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    targets = by_target(validation)
    check_rows(model, "batch", batch)
    for name, rows in targets.items():
        check_rows(model, f"validation[{name!r}]" if name else "validation", rows)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    weights = {parameter: parameter.data for parameter in dict.fromkeys([*trained, *stepped])}
    gradients = {parameter: parameter.grad for parameter in weights}
    with evaluating(model), random_state_kept():
        shares = clipped(gradient_shares(model, trained, batch, num_items_in_batch), max_grad_norm)
        try:
            with weights_at({parameter: weight.clone() for parameter, weight in weights.items()}):
                yield OneUpdate(model, len(batch["labels"]), targets, optimizer, weights, shares)
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


def by_target(validation: Rows | Mapping[str, Rows]) -> dict[str, Rows]:
    """Rows of each target; "" is the name of one that came without."""
    if any(isinstance(value, Tensor) for value in validation.values()):
        return {"": cast(Rows, validation)}
    return dict(cast(Mapping[str, Rows], validation))


def check_rows(model: nn.Module, name: str, rows: Rows) -> None:
    """Raises `ValueError` for rows that make no game; `name` is the argument that they came in."""
    if "labels" not in rows or rows["labels"].ndim != 2:
        raise ValueError(f"{name} has no labels of shape [rows, tokens]: give input_ids, labels, ... as tensors")
    count = len(rows["labels"])
    for key, value in rows.items():
        if len(value) != count:
            raise ValueError(
                f"{name} has {count} rows of labels, but {len(value)} of {key}: give a row for each sample"
            )
    if not count_loss_tokens(rows["labels"], shifts_labels(model)).any():
        raise ValueError(f"{name}: every label is -100, so there is no loss: label the tokens that should count")


def token_losses(model: nn.Module, rows: Rows) -> Tensor:
    """Cross-entropy of every label, [B, T]; 0 where there is none."""
    with without_cache(model):
        return losses.token_losses(model, rows, shifts_labels(model))


def mean_token_loss(model: nn.Module, rows: Rows) -> float:
    """Summed in float64, on the CPU: not every accelerator has float64."""
    tokens = int(count_loss_tokens(rows["labels"], shifts_labels(model)).sum())
    return float(token_losses(model, rows).cpu().double().sum()) / tokens


def gradient_shares(
    model: nn.Module, parameters: Sequence[nn.Parameter], batch: Rows, num_items_in_batch: int | None
) -> dict[nn.Parameter, Tensor]:
    """g_i, [N, *shape], of the parameters that the loss reaches; a backward pass for each sample."""
    if num_items_in_batch is None:
        num_items_in_batch = int(count_loss_tokens(batch["labels"], shifts_labels(model)).sum())
    found = []
    for i in range(len(batch["labels"])):
        loss = token_losses(model, {key: value[i : i + 1] for key, value in batch.items()}).sum() / num_items_in_batch
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    shares = {}
    for parameter, of_samples in zip(parameters, zip(*found, strict=True), strict=True):
        if any(gradient is not None for gradient in of_samples):
            zeros = torch.zeros_like(parameter)
            shares[parameter] = torch.stack([zeros if gradient is None else gradient for gradient in of_samples])
    return shares


def clipped(shares: dict[nn.Parameter, Tensor], max_grad_norm: float | None) -> dict[nn.Parameter, Tensor]:
    """c g_i, with Trainer's factor c."""
    if not max_grad_norm:
        return shares
    norm = math.hypot(*(float(shares_N.sum(0).norm()) for shares_N in shares.values()))
    factor = min(1.0, max_grad_norm / (norm + 1e-6))
    return {parameter: shares_N * factor for parameter, shares_N in shares.items()}


def copy_of(optimizer: Optimizer) -> Optimizer:
    """The same optimizer over the same parameters, with a state of its own.

    It has no step hooks: those belong to the run, as `ShapleyTrainer`'s does.
    """
    twin = copy.copy(optimizer)
    twin.state = defaultdict(
        dict,
        {
            parameter: {name: copy_of_entry(entry) for name, entry in entries.items()}
            for parameter, entries in optimizer.state.items()
        },
    )
    twin.param_groups = [
        {name: setting if name == "params" else copy_of_entry(setting) for name, setting in group.items()}
        for group in optimizer.param_groups
    ]
    return twin


def copy_of_entry(entry: Any) -> Any:
    """Tensors by `clone`: `deepcopy` takes several times as long."""
    return entry.clone() if isinstance(entry, Tensor) else copy.deepcopy(entry)
