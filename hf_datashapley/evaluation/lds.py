"""The linear datamodeling score: do summed scores foretell what retraining on a part of the units gives?

    predicted_jq = - sum_{i in subset j} scores_iq          lower where the subset's units lower the query's loss more
    LDS_q        = Spearman over subsets j of predicted_jq and the loss of query q, retrained on subset j
    LDS          = mean over queries

(Park et al., "TRAK: Attributing Model Behavior at Scale", arXiv 2303.14186, after Ilyas et al., "Datamodels", arXiv
2202.00622). It assumes nothing but that units add up; 1 is a perfect order of the subsets, 0 is chance. Only the order
counts, so scores need no unit, and what all subsets have alike (a query's own difficulty) drops out.

Two uncertainties stand beside it. The *interval* is a percentile bootstrap over subsets and over queries: another
draw of either would have given another number. The *ceiling* says how much of the losses is anything but the luck of
retraining. With r_1 the Spearman correlation of two seeds' losses, meaned over pairs of seeds and over queries,

    reliability = R r_1 / (1 + (R - 1) r_1)      Spearman-Brown: what the mean of R other seeds would score
    ceiling     = sqrt(reliability)              what the expected losses themselves would score

which holds exactly for Pearson's correlation under noise that is independent of the subset, and nearly for Spearman's;
where queries differ in noise, the ceiling of their mean is a little too high.

Shapes: U units, Q queries, S subsets, R seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .one_update import Floats
from .weighted_ranks import WeightedRanks


FEWEST_SUBSETS = 4
# Sums that differ by less than this part of the absolute sum are equal: rounding would break their ties at random.
ROUNDING = 2.0**-40


@dataclass(frozen=True)
class LinearDatamodelingScore:
    """How well one method's scores foretell retraining; without unit, between -1 and 1.

    Attributes:
        mean: over queries.
        low, high: ends of the bootstrap interval of the mean.
        confidence: of that interval, 0.95 say.
        of_queries: [Q]; 0 where the scores foretell the same loss for every subset.
        resampled: the mean in each resample, [resamples]. With the same seed and bank, two methods' are of the same
            draws: quantiles of their difference say whether one is better.
        reliability: what the mean losses of as many other seeds would score; NaN with one seed.
        ceiling: what the expected losses would score; NaN with one seed.
    """

    mean: float
    low: float
    high: float
    confidence: float
    of_queries: Floats = field(repr=False)
    resampled: Floats = field(repr=False)
    reliability: float
    ceiling: float


def lds(
    scores: Any,
    masks: Any,
    outputs: Any,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> LinearDatamodelingScore:
    """Scores a method against losses of models that were retrained on subsets of the units.

    Costs `resamples` times some ten passes over [S, Q] numbers: 2 seconds for 100 subsets and 500 queries.

    Args:
        scores: [U, Q], positive where the unit lowers the query's loss; the more, the greater.
        masks: bool [S, U], True where the unit was in the subset.
        outputs: mean token loss of each query after retraining, [S, Q], or [S, R, Q] for R seeds of each subset. Where
            more is better, as with margins, give the negative.
        confidence: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap; no global random state is used or changed.

    Raises:
        ValueError: shapes that do not fit each other, numbers that are not finite, masks or losses that are the same
            for every subset.
    """
    masks_SU, outputs_SRQ = check_bank(masks, outputs)
    scores_UQ = check_scores(scores, masks_SU.shape[1], outputs_SRQ.shape[2])
    check_resampling(confidence, resamples)
    predicted = WeightedRanks.of(predicted_losses(scores_UQ, masks_SU))
    actual = WeightedRanks.of(outputs_SRQ.mean(1))
    resampled = bootstrap(predicted, actual, resamples, seed)
    low, high = interval(resampled, confidence)
    of_queries = predicted.correlation(actual)
    reliability = reliability_of(outputs_SRQ)
    return LinearDatamodelingScore(
        mean=float(of_queries.mean()),
        low=low,
        high=high,
        confidence=confidence,
        of_queries=of_queries,
        resampled=resampled,
        reliability=reliability,
        ceiling=math.sqrt(reliability),
    )


def predicted_losses(scores_UQ: Floats, masks_SU: NDArray[np.bool_]) -> Floats:
    """[S, Q], in multiples of what rounding cannot tell apart."""
    weights_SU = masks_SU.astype(np.float64)
    step_Q = ROUNDING * np.abs(scores_UQ).sum(0)
    step_Q[step_Q == 0] = 1.0
    return np.rint(-(weights_SU @ scores_UQ) / step_Q)


def bootstrap(predicted: WeightedRanks, actual: WeightedRanks, resamples: int, seed: int) -> Floats:
    """Means over queries, [resamples]; subsets and queries are drawn with replacement, independently of each other."""
    subsets, queries = predicted.shape
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn_S = generator.multinomial(subsets, np.full(subsets, 1 / subsets))
        drawn_Q = generator.multinomial(queries, np.full(queries, 1 / queries))
        means[i] = predicted.correlation(actual, drawn_S) @ drawn_Q / queries
    return means


def interval(means: Floats, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def reliability_of(outputs_SRQ: Floats) -> float:
    """Of the mean of R seeds; NaN with one. Seeds that contradict each other have 0."""
    seeds = outputs_SRQ.shape[1]
    if seeds == 1:
        return math.nan
    ranked = [WeightedRanks.of(outputs_SRQ[:, r]) for r in range(seeds)]
    of_one = float(np.mean([left.correlation(right).mean() for left, right in combinations(ranked, 2)]))
    of_one = max(of_one, 0.0)
    return seeds * of_one / (1 + (seeds - 1) * of_one)


def check_bank(masks: Any, outputs: Any) -> tuple[NDArray[np.bool_], Floats]:
    """Masks [S, U] and losses [S, R, Q], float64.

    Raises:
        ValueError: as `lds` has it.
    """
    given = np.asarray(masks)
    if given.ndim != 2 or not given.size or not np.isin(given, (0, 1)).all():
        raise ValueError(
            f"masks has shape {given.shape} and type {given.dtype}: give bool [subsets, units], True where the unit "
            "was in the subset"
        )
    masks_SU = given.astype(bool)
    outputs_SRQ = np.asarray(outputs, dtype=np.float64)
    if outputs_SRQ.ndim == 2:
        outputs_SRQ = outputs_SRQ[:, None]
    if outputs_SRQ.ndim != 3 or not outputs_SRQ.size or len(outputs_SRQ) != len(masks_SU):
        raise ValueError(
            f"outputs has shape {np.shape(outputs)} and masks {masks_SU.shape}: give outputs [subsets, queries] or "
            "[subsets, seeds, queries] for the subsets of masks"
        )
    if len(masks_SU) < FEWEST_SUBSETS:
        raise ValueError(
            f"masks has {len(masks_SU)} subsets: an order takes at least {FEWEST_SUBSETS}, and a useful one 50"
        )
    if (masks_SU == masks_SU[0]).all():
        raise ValueError("masks are the same for every subset: give the subsets that the models were retrained on")
    if not np.isfinite(outputs_SRQ).all():
        raise ValueError("outputs has numbers that are not finite: leave those queries or retrainings out")
    same_Q = np.ptp(outputs_SRQ.mean(1), axis=0) == 0
    if same_Q.any():
        raise ValueError(
            f"outputs: the loss of query {int(same_Q.argmax())} ({int(same_Q.sum())} in all) is the same for every "
            "subset, so there is nothing to foretell: leave such queries out"
        )
    return masks_SU, outputs_SRQ


def check_scores(scores: Any, units: int, queries: int) -> Floats:
    """Scores [U, Q], float64.

    Raises:
        ValueError: of another shape, or not finite.
    """
    scores_UQ = np.asarray(scores, dtype=np.float64)
    if scores_UQ.shape != (units, queries):
        raise ValueError(
            f"scores has shape {scores_UQ.shape}, while masks and outputs have {units} units and {queries} queries: "
            "give [units, queries]"
        )
    if not np.isfinite(scores_UQ).all():
        raise ValueError("scores has numbers that are not finite: a sum over a subset with one tells nothing")
    return scores_UQ


def check_resampling(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: give a number between 0 and 1, such as 0.95")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: give at least 1, and 1000 for an interval that is quoted")
