"""Shapley values of one update, by enumerating coalitions or by drawing permutations.

    phi_i = sum_T  |T|! (N - |T| - 1)! / N!  [ U(T + i) - U(T) ]        over all T without i
          = E[ U(those before i, and i) - U(those before i) ]           over all orders of the N samples

with the game of `one_update` (Shapley, "A Value for n-Person Games", 1953). It is what a value of one update
approximates, whatever its order; values of a run are sums of those. The unit is nats of validation loss, positive
where the sample lowers it, and over samples they add up to l_v(w(0)) - l_v(w(1)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb

import numpy as np
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from .one_update import Floats, Rows, one_update


MOST_ENUMERATED = 12


@dataclass(frozen=True)
class ShapleyValues:
    """Values of the N samples of one update on K targets, in nats.

    Attributes:
        values: [N, K], rows in the order of the batch.
        standard_error: [N, K], of values that were estimated; 0 for exact ones.
        actual: [K], l_v(w(0)) - l_v(w(1)): the fall of each target's loss that the samples brought about.
        targets: the targets' names, [""] for one without a name.
    """

    values: Floats
    standard_error: Floats
    actual: Floats
    targets: list[str]


def exact_shapley(
    model: nn.Module,
    batch: Rows,
    validation: Rows | Mapping[str, Rows],
    update_rule: Optimizer,
    max_grad_norm: float | None = 1.0,
    num_items_in_batch: int | None = None,
    progress: bool = True,
) -> ShapleyValues:
    """Exact Shapley values of the update that an optimizer is about to make, by enumerating all coalitions.

    Costs a step of the optimizer, a copy of its state and a validation pass for each of 2^N coalitions, and memory
    for N gradients. Model and optimizer are left as they were.

    Args:
        model: a causal language model, at the weights before the update.
        batch: the N <= 12 samples of the update, over all of its micro-batches: `input_ids`, `labels`, ... as tensors
            with a row for each sample.
        validation: rows of the same kind whose mean token loss is to be explained, or a dict of them by the targets'
            names.
        update_rule: any torch optimizer over the model's parameters, with its state as it stands before the step.
        max_grad_norm: as in `TrainingArguments`; 0 or None: no clipping.
        num_items_in_batch: what the samples' summed losses are divided by; None: the batch's number of loss tokens.
            `Trainer` counts a row's first label too with models that it does not know to shift labels.
        progress: whether to show a bar.

    Raises:
        ValueError: more than 12 samples, or rows without labels.
    """
    players = len(batch.get("labels", ()))
    if players > MOST_ENUMERATED:
        raise ValueError(
            f"exact_shapley enumerates all coalitions of at most {MOST_ENUMERATED} samples, not of {players}: use "
            "monte_carlo_shapley, or a smaller batch"
        )
    with one_update(model, batch, validation, update_rule, max_grad_norm, num_items_in_batch) as game:
        coalitions = [[i for i in range(players) if mask >> i & 1] for mask in range(2**players)]
        shown = tqdm(coalitions, "coalitions", disable=not progress, leave=False)
        utilities = np.stack([game.utility(members) for members in shown])
        targets = list(game.validation)
    masks = np.arange(2**players)
    sizes = np.array([len(members) for members in coalitions])
    weights = np.array([1 / (players * comb(players - 1, size)) for size in range(players)])
    values = np.empty((players, len(targets)))
    for i in range(players):
        without = masks[masks >> i & 1 == 0]
        values[i] = weights[sizes[without]] @ (utilities[without | 1 << i] - utilities[without])
    return ShapleyValues(values, np.zeros_like(values), utilities[-1] - utilities[0], targets)


def monte_carlo_shapley(
    model: nn.Module,
    batch: Rows,
    validation: Rows | Mapping[str, Rows],
    update_rule: Optimizer,
    permutations: int = 1000,
    seed: int = 0,
    max_grad_norm: float | None = 1.0,
    num_items_in_batch: int | None = None,
    progress: bool = True,
) -> ShapleyValues:
    """Shapley values of one update, estimated from random orders of its samples; for any number of them.

    Every order is followed by its reverse, and the mean of the two is one draw: a sample that comes early in the one
    comes late in the other, so that what is quadratic in the game cancels exactly. The standard error is over those
    draws. The values add up to `actual` exactly, as each order's do.

    Costs (N - 1) x `permutations` coalitions at most, each as in `exact_shapley`; none is computed twice.

    Args:
        permutations: number of orders, even, at least 4.
        seed: of the orders; no global random state is used or changed.
        model, batch, validation, update_rule, max_grad_norm, num_items_in_batch, progress: as `exact_shapley` has
            them.

    Raises:
        ValueError: another number of permutations, or rows without labels.
    """
    if permutations < 4 or permutations % 2:
        raise ValueError(
            f"permutations={permutations}: give an even number from 4 on, since orders are drawn in pairs and a "
            "standard error takes two pairs"
        )
    generator = np.random.default_rng(seed)
    known: dict[frozenset[int], Floats] = {}
    with one_update(model, batch, validation, update_rule, max_grad_norm, num_items_in_batch) as game:

        def utility(members: frozenset[int]) -> Floats:
            if members not in known:
                known[members] = game.utility(sorted(members))
            return known[members]

        def marginals(order: list[int]) -> Floats:
            utilities = np.stack([utility(frozenset(order[:size])) for size in range(game.players + 1)])
            found = np.empty((game.players, len(game.validation)))
            found[order] = np.diff(utilities, axis=0)
            return found

        draws = []
        for _ in tqdm(range(permutations // 2), "pairs of orders", disable=not progress, leave=False):
            order = generator.permutation(game.players).tolist()
            draws.append((marginals(order) + marginals(order[::-1])) / 2)
        actual = utility(frozenset(range(game.players))) - utility(frozenset())
        targets = list(game.validation)
    return ShapleyValues(
        values=np.mean(draws, axis=0),
        standard_error=np.std(draws, axis=0, ddof=1) / np.sqrt(len(draws)),
        actual=actual,
        targets=targets,
    )
