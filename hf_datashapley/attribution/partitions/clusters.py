"""K-means clusters of points, of any sizes or of equal ones.

    minimise sum_i |x_i - c_k(i)|^2   over centres c and k(i), each unit's cluster

by mini-batches (Sculley, "Web-Scale K-Means Clustering", WWW 2010; scikit-learn's MiniBatchKMeans), which look at
points drawn from all of them, so that the order in which a corpus lies does not matter much. It finds a local minimum.
Points are as they are given: what is longer weighs more, and whoever wants angles gives directions.

**Equal sizes** are made in rounds, with the centres as they are: each point that has no cluster asks for the nearest
centre with room left, and each centre takes those that are nearest to it until it is full. So every cluster has n / K
points rounded down or up (up: where most would go). At most K rounds; each costs distances of the points that are left
to the centres that have room.

Costs mini-batches of BATCH points until ten in a row bring nothing, and N K F products for the assignment. Memory: K F
numbers, and some for each point. (Measured on a mixture of 200 clusters of all sizes, 20,000 points in 32 dimensions:
with 64 and with 312 clusters, the sum of squares is within 1% of that of Lloyd's algorithm.)

Shapes: N points, n of a block, K clusters, F features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...random_state import random_state_kept
from ..group_passes import ranks_within
from .points import Features, Points, points_of


BATCH = 4096
# Beginnings, of which the best on some points is gone on with.
BEGINNINGS = 3
# Distances that are held at a time.
DISTANCES = 2**22

Labels = NDArray[np.int64]
Floats = NDArray[np.float64]


def kmeans_labels(features: Features, num_groups: int, balanced: bool, seed: int) -> Labels:
    """The cluster of each point, [N]; the same for the same seed, whatever has been drawn elsewhere. None is empty.

    Args:
        balanced: sizes differ by one at most.

    Raises:
        ValueError: there are fewer different points than groups, or features are not finite.
        ImportError: the extra "grouping" is not installed.
    """
    method = mini_batch_kmeans()
    with points_of(features) as points_NF:
        if not 1 <= num_groups <= len(points_NF):
            raise ValueError(
                f"num_groups={num_groups} of {len(points_NF)} points: ask for at least 1 and at most a group for each"
            )
        fitted = method(num_groups, batch_size=BATCH, n_init=BEGINNINGS, random_state=seed, compute_labels=False).fit(
            points_NF
        )
        centres_KF = fitted.cluster_centers_.astype(np.float64)
        if balanced:
            return of_equal_sizes(points_NF, centres_KF)
        return without_empty(points_NF, *nearest(points_NF, centres_KF, np.arange(len(points_NF))), num_groups)


def mini_batch_kmeans() -> Any:
    try:
        with random_state_kept():  # something that it imports draws when it is first imported
            from sklearn.cluster import MiniBatchKMeans
    except ModuleNotFoundError as error:
        raise ImportError(
            'clusters need scikit-learn, which is not installed: pip install "hf_datashapley[grouping]"'
        ) from error
    return MiniBatchKMeans


def nearest(points_NF: Points, centres_KF: Floats, chosen_n: Labels) -> tuple[Labels, Floats]:
    """Of the chosen points each one's nearest centre, and the square of its distance, [n] both."""
    # Distances are differences: far from 0 they would be lost in rounding.
    middle_F = centres_KF.mean(0)
    centres_KF = centres_KF - middle_F
    square_K = (centres_KF**2).sum(1)
    step = max(1, DISTANCES // max(centres_KF.shape))
    own_n, distance_n = np.empty(len(chosen_n), np.int64), np.empty(len(chosen_n))
    for begin in range(0, len(chosen_n), step):
        part = slice(begin, begin + step)
        block_nF = points_NF[chosen_n[part]] - middle_F
        squares_nK = square_K - 2 * block_nF @ centres_KF.T
        own_n[part] = squares_nK.argmin(1)
        distance_n[part] = squares_nK.min(1) + (block_nF**2).sum(1)
    return own_n, distance_n.clip(min=0)


def without_empty(points_NF: Points, labels_N: Labels, distance_N: Floats, num_groups: int) -> Labels:
    """Gives each empty cluster the point that is farthest from its own centre, of those that are not their cluster's
    last."""
    sizes_K = np.bincount(labels_N, minlength=num_groups)
    empty = np.flatnonzero(sizes_K == 0).tolist()
    if empty and not has_different(points_NF, num_groups):
        raise ValueError(
            f"num_groups={num_groups}, and there are fewer different points: ask for fewer groups, or balanced=True"
        )
    for point in np.argsort(-distance_N, kind="stable") if empty else ():
        if not empty:
            break
        if sizes_K[labels_N[point]] > 1:
            sizes_K[labels_N[point]] -= 1
            labels_N[point] = empty.pop()
    return labels_N


def has_different(points_NF: Points, count: int) -> bool:
    """Whether there are so many different points; looks no further than needed."""
    found = set()
    for point_F in points_NF:
        found.add(point_F.tobytes())
        if len(found) == count:
            return True
    return False


def of_equal_sizes(points_NF: Points, centres_KF: Floats) -> Labels:
    count, groups = len(points_NF), len(centres_KF)
    room_K = np.full(groups, count // groups)
    free_n = np.arange(count)
    labels_N = np.full(count, -1)
    asked_n, distance_n = nearest(points_NF, centres_KF, free_n)
    sizes_K = np.bincount(asked_n, minlength=groups)
    room_K[np.argsort(-sizes_K, kind="stable")[: count % groups]] += 1
    while True:
        order_n = np.lexsort((distance_n, asked_n))
        by_centre_n = asked_n[order_n]
        taken_n = ranks_within(by_centre_n) < room_K[by_centre_n]
        labels_N[free_n[order_n[taken_n]]] = by_centre_n[taken_n]
        room_K -= np.bincount(by_centre_n[taken_n], minlength=groups)
        free_n = np.sort(free_n[order_n[~taken_n]])
        if not len(free_n):
            return labels_N
        # Whoever was refused was so by a centre that is now full: there are fewer of these each time.
        open_K = np.flatnonzero(room_K)
        own_n, distance_n = nearest(points_NF, centres_KF[open_K], free_n)
        asked_n = open_K[own_n]
