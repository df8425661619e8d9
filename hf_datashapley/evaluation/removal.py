"""Retraining without the units that a method puts first: does the query's loss rise, and how soon?

For a query q, a method's scores name the k units that lowered its loss most; the model is trained again without them.
The rise of the query's loss, against k, is the removal curve; one that lies above that of k units drawn at random
found what mattered to this query. *Brittleness* turns it round: the fewest units whose removal raises the loss by a
margin, or flips the prediction (Ilyas et al., "Datamodels", arXiv 2202.00622; Park et al., arXiv 2303.14186).

Every (method, query, k) is a training of its own, unless two name the same units: methods x Q x K x seeds of them, and
K x draws x seeds for the baseline. Ask for a few queries.

Shapes: U units, Q queries, K counts, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bank import Indices, Retraining, RetrainingBank
from .lds import check_scores
from .markdown import markdown
from .one_update import Floats


RANDOM = "random"


@dataclass(frozen=True)
class RemovalCurve:
    """Losses of Q queries after retraining without k units, means over seeds.

    Attributes:
        counts: the k, [K].
        whole: with nothing removed, [Q].
        losses: [K, Q] of each method; of "random", means over draws.
    """

    counts: list[int]
    whole: Floats
    losses: dict[str, Floats]

    def __str__(self) -> str:
        """The mean rise of the loss and its standard error over queries, as a Markdown table."""
        rows = []
        for name, losses_KQ in self.losses.items():
            rise_KQ = losses_KQ - self.whole
            error_K = rise_KQ.std(1, ddof=min(1, rise_KQ.shape[1] - 1)) / np.sqrt(rise_KQ.shape[1])
            cells = [f"{rise:+.4f} ± {error:.4f}" for rise, error in zip(rise_KQ.mean(1), error_K, strict=True)]
            rows.append([name, *cells])
        return markdown(["rise of the loss without", *(f"top {count}" for count in self.counts)], rows)


@dataclass(frozen=True)
class Brittleness:
    """The fewest units whose removal did it, of the counts that were tried.

    Attributes:
        counts: those tried, [K].
        fewest: [Q] of each method; infinite where none of the counts sufficed, NaN where a query had flipped before.
    """

    counts: list[int]
    fewest: dict[str, Floats]

    def flipped(self, method: str) -> Floats:
        """The part of the queries that some number of units up to k has flipped, [K]; without those flipped before."""
        fewest_Q = self.fewest[method]
        known_Q = fewest_Q[~np.isnan(fewest_Q)]
        return np.array([np.mean(known_Q <= count) if len(known_Q) else np.nan for count in self.counts])

    def __str__(self) -> str:
        """The parts as a Markdown table."""
        rows = [[name, *(f"{part:.0%}" for part in self.flipped(name))] for name in self.fewest]
        return markdown(["queries flipped by at most", *(f"top {count}" for count in self.counts)], rows)


def removal_curve(
    folder: str | Path,
    train: Retraining,
    methods: Mapping[str, Any],
    counts: Sequence[int],
    *,
    labels: Any = None,
    seeds: int | Sequence[int] = 1,
    draws: int = 3,
    draw_seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    workers: int = 2,
    progress: bool = True,
) -> RemovalCurve:
    """Retrains without the top k units of each method for each query, and without k drawn at random.

    Args:
        folder: of the bank that holds the retrainings; a run that was killed goes on there.
        train: as `RetrainingBank.run` takes it.
        methods: scores by name, [U, Q] each, those of `trivial_baselines` among them; of equal ones, the unit with
            the smaller number is removed first.
        counts: how many units are removed, each at least 1 and less than U.
        draws: orders of the units from which the baseline's k are taken, the first k of each.
        draw_seed: of those orders; no global random state is used or changed.
        labels, seeds, settings, workers, progress: as `RetrainingBank` has them.

    Raises:
        ValueError: no method, a count out of range, or scores that are not all [U, Q].
    """
    check_names(methods)
    if not counts or draws < 1:
        raise ValueError(f"counts={list(counts)}, draws={draws}: give at least one of each")
    units, queries = np.shape(next(iter(methods.values())))
    if not all(1 <= count < units for count in counts):
        raise ValueError(f"counts={list(counts)}: remove at least 1 and leave at least one of the {units} units")
    generator = np.random.default_rng(draw_seed)
    # [U, columns]: in which order units are removed, for each query or draw.
    orders = {
        name: np.argsort(-check_scores(scores, units, queries), axis=0, kind="stable")
        for name, scores in methods.items()
    }
    orders[RANDOM] = np.stack([generator.permutation(units) for _ in range(draws)], axis=1)

    masks: dict[bytes, int] = {}  # the place of each in the bank

    def place_without(removed: Indices) -> int:
        mask_U = np.ones(units, bool)
        mask_U[removed] = False
        return masks.setdefault(mask_U.tobytes(), len(masks))

    whole = place_without(np.zeros(0, np.int64))
    places = {
        name: np.array([[place_without(order_U[:count]) for order_U in order.T] for count in counts])
        for name, order in orders.items()
    }
    masks_SU = np.array([np.frombuffer(mask, bool) for mask in masks])
    bank = RetrainingBank(folder, masks_SU, labels, seeds, settings).run(train, workers, progress)
    losses_SQ = bank.outputs.mean(1)
    if losses_SQ.shape[1] != queries:
        raise ValueError(f"train returned {losses_SQ.shape[1]} losses, while scores are of {queries} queries")
    every_Q = np.arange(queries)
    losses = {name: losses_SQ[place_KQ, every_Q] for name, place_KQ in places.items() if name != RANDOM}
    losses[RANDOM] = losses_SQ[places[RANDOM]].mean(1)
    return RemovalCurve(list(counts), losses_SQ[whole], losses)


def check_names(methods: Mapping[str, Any]) -> None:
    if not methods or RANDOM in methods:
        raise ValueError(f"methods={list(methods)}: name one at least, and none {RANDOM!r}, which is the baseline")
    for name, scores in methods.items():
        if np.ndim(scores) != 2:
            raise ValueError(f"methods[{name!r}] has shape {np.shape(scores)}: give scores [units, queries]")


def brittleness(curve: RemovalCurve, *, rise: float | None = None, level: float | None = None) -> Brittleness:
    """How few units carry a query.

    Args:
        curve: of `removal_curve`; with `query_margins` as its measure, `level=0` is where a prediction flips.
        rise: flipped is a query whose loss is this much above that of the whole data.
        level: or one whose loss has come up to this.

    Raises:
        ValueError: not exactly one of the two is given.
    """
    if (rise is None) == (level is None):
        raise ValueError(f"rise={rise}, level={level}: give one of the two")
    level_Q = curve.whole + rise if rise is not None else np.full_like(curve.whole, level)
    order_K = np.argsort(curve.counts)
    counts_K = np.array(curve.counts, dtype=np.float64)[order_K]
    fewest = {}
    for name, losses_KQ in curve.losses.items():
        flipped_KQ = losses_KQ[order_K] >= level_Q
        fewest_Q = np.where(flipped_KQ.any(0), counts_K[flipped_KQ.argmax(0)], np.inf)
        fewest[name] = np.where(curve.whole >= level_Q, np.nan, fewest_Q)
    return Brittleness([int(count) for count in counts_K], fewest)
