"""Tail-patch: one more training step, on the examples that a method names for a query; what does it do to the loss?

    change_q = l_q(w - lr * grad L(w)) - l_q(w)       L: mean token loss on the k units with the highest scores for q

after Chang et al., "Scalable Influence and Fact Tracing for Large Language Model Pretraining", arXiv 2410.17413, who
follow the probability of the query's target. It needs no retraining: a forward and a backward pass and a query's
forward for each query and method. It asks what the examples teach the finished model, not what they taught it: one
that it has learnt to the end has little left to teach.

Shapes: U units, Q queries, K units of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import default_data_collator

from ..directions.validation import Collate, evaluating
from ..directions.weights import weights_at
from ..loss_tokens import count_loss_tokens, shifts_labels
from .lds import check_scores
from .markdown import markdown
from .one_update import Floats, Rows, token_losses
from .query_losses import batches_of, query_losses
from .removal import RANDOM, check_names


@dataclass(frozen=True)
class TailPatch:
    """Changes of the queries' losses by one step, nats; below 0 where the step lowered the loss.

    Attributes:
        change: [Q] of each method, and of "random".
        before: the losses before the step, [Q].
    """

    change: dict[str, Floats]
    before: Floats

    def __str__(self) -> str:
        """Means and their standard errors over queries, as a Markdown table."""
        rows = []
        for name, change_Q in self.change.items():
            error = change_Q.std(ddof=min(1, len(change_Q) - 1)) / np.sqrt(len(change_Q))
            rows.append([name, f"{change_Q.mean():+.5f} ± {error:.5f}", f"{np.mean(change_Q < 0):.0%}"])
        return markdown(["one step on the top of", "change of the loss", "queries it lowered"], rows)


def tail_patch(
    model: nn.Module,
    methods: Mapping[str, Any],
    train_rows: Sequence[Any],
    query_rows: Sequence[Any],
    *,
    learning_rate: float,
    k: int = 10,
    labels: Any = None,
    data_collator: Collate = default_data_collator,
    draw_seed: int = 0,
    progress: bool = True,
) -> TailPatch:
    """Takes a step of plain gradient descent for each method and query, from the same weights each time.

    The step is taken on all k units together, as one batch, dropout off, over the parameters that require a gradient.
    Costs memory for one gradient and one copy of those. The model is left as it was, also after an exception.

    Args:
        model: a causal language model.
        methods: scores by name, [U, Q] each.
        train_rows: rows with `input_ids`, `labels`, ..., as the model takes them once they are collated.
        query_rows: rows of the same kind, each a query.
        learning_rate: of the step; that of the end of training, or somewhat above.
        k: units of the step.
        labels: the unit of each row of `train_rows`; None: each is a unit.
        draw_seed: of the k random units of each query; no global random state is used or changed.

    Raises:
        ValueError: no method, k out of range, scores of another shape, or a unit without rows.
    """
    check_names(methods)
    labels_N = np.arange(len(train_rows)) if labels is None else np.asarray(labels)
    units, queries = int(labels_N.max()) + 1, len(query_rows)
    if labels_N.shape != (len(train_rows),) or len(np.unique(labels_N)) != units:
        raise ValueError(
            f"labels has shape {labels_N.shape} for {len(train_rows)} rows and names {len(np.unique(labels_N))} of "
            f"{units} units: give the unit of each row, counted from 0, none without a row"
        )
    if not 1 <= k <= units:
        raise ValueError(f"k={k}: give at least 1 and at most the {units} units there are")
    generator = np.random.default_rng(draw_seed)
    # [K, Q]
    chosen = {
        name: np.argsort(-check_scores(scores, units, queries), axis=0, kind="stable")[:k]
        for name, scores in methods.items()
    }
    chosen[RANDOM] = np.stack([generator.choice(units, k, replace=False) for _ in range(queries)], axis=1)
    device = next(model.parameters()).device
    every = list(batches_of(query_rows, data_collator, 1, device))
    before_Q = query_losses(model, every)
    change = {name: np.empty(queries) for name in chosen}
    steps = [(name, q) for name in chosen for q in range(queries)]
    with evaluating(model):
        for name, q in tqdm(steps, "tail-patch", disable=not progress, leave=False):
            rows = np.flatnonzero(np.isin(labels_N, chosen[name][:, q]))
            (batch,) = batches_of([train_rows[int(i)] for i in rows], data_collator, len(rows), device)
            with weights_at(stepped(model, batch, learning_rate)):
                change[name][q] = query_losses(model, [every[q]])[0] - before_Q[q]
    return TailPatch(change, before_Q)


def stepped(model: nn.Module, batch: Rows, learning_rate: float) -> dict[nn.Parameter, torch.Tensor]:
    """The weights after a step on the mean token loss of the batch; of those that it reaches."""
    tokens = count_loss_tokens(batch["labels"], shifts_labels(model)).sum()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = token_losses(model, batch).sum() / tokens
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        parameter: parameter.detach() - learning_rate * gradient
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
    }
