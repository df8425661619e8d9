"""The linear datamodeling score against loops, and on retrainings whose truth is known: linear ones with noise."""

import numpy as np
import pytest
from oracles_evaluation import lds_of_query, mean_ranks, spearman

from hf_datashapley.evaluation import lds, random_masks, table
from hf_datashapley.evaluation.fidelity import ranks
from hf_datashapley.evaluation.weighted_ranks import WeightedRanks


def linear_bank(subsets, units, queries, seeds, noise, seed=0):
    """Weights [U, Q] of units that lower the loss, masks, and losses [S, R, Q]; noise in parts of the signal."""
    draw = np.random.default_rng(seed)
    weights = draw.normal(size=(units, queries))
    masks = random_masks(units, subsets, seed=seed)
    signal = 5 - masks @ weights
    spread = np.sqrt(units / 4)
    return weights, masks, signal[:, None] + noise * spread * draw.normal(size=(subsets, seeds, queries))


@pytest.mark.parametrize("seeds", [None, 1, 3])
def test_against_loops_over_subsets(seeds):
    weights, masks, outputs = linear_bank(17, 9, 6, seeds or 1, noise=0.7)
    scores = np.round(weights, 0)  # with ties among predictions
    outputs = np.round(outputs, 1)  # and among losses
    found = lds(scores, masks, outputs if seeds else outputs[:, 0], resamples=5)
    expected = [lds_of_query(scores[:, q], masks, outputs.mean(1)[:, q]) for q in range(6)]
    np.testing.assert_allclose(found.of_queries, expected, atol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))


def test_resampled_ranks_are_those_of_repeated_rows():
    draw = np.random.default_rng(0)
    left, right = draw.integers(0, 8, (20, 5)).astype(float), draw.normal(size=(20, 5))
    drawn = draw.multinomial(20, np.full(20, 1 / 20))
    rows = np.repeat(np.arange(20), drawn)
    of_left, of_right = WeightedRanks.of(left), WeightedRanks.of(right)
    for q in range(5):
        np.testing.assert_array_equal(of_left.ranks(drawn)[rows, q], mean_ranks(left[rows, q]))
        np.testing.assert_array_equal(of_left.ranks(np.ones(20, int))[:, q], ranks(left[:, q]))
    expected = [spearman(left[rows, q], right[rows, q]) for q in range(5)]
    np.testing.assert_allclose(of_left.correlation(of_right, drawn), expected, atol=1e-12)


def test_falls_with_noise_and_turns_with_the_sign():
    truth = [lds(weights, masks, outputs).mean for weights, masks, outputs in (
        linear_bank(60, 40, 30, 1, noise) for noise in (0.0, 0.5, 1.0, 2.0, 8.0)
    )]  # fmt: skip
    assert truth[0] == pytest.approx(1.0)
    assert all(before > after + 0.03 for before, after in zip(truth, truth[1:], strict=False))
    weights, masks, outputs = linear_bank(60, 40, 30, 1, 0.5)
    assert lds(-weights, masks, outputs).mean == pytest.approx(-truth[1])
    unrelated = np.random.default_rng(1).normal(size=weights.shape)
    found = lds(unrelated, masks, outputs)
    assert abs(found.mean) < 0.1 and found.low < 0 < found.high


def test_only_the_order_counts():
    weights, masks, outputs = linear_bank(30, 20, 10, 2, 0.5)
    found = lds(weights, masks, outputs)
    shifted = lds(1e3 * weights, masks, outputs * 7 + np.arange(10))
    np.testing.assert_allclose(shifted.of_queries, found.of_queries)
    assert (shifted.low, shifted.high, shifted.ceiling) == (found.low, found.high, found.ceiling)


def test_interval_covers():
    """The truth, the mean over very many subsets and queries, lies within about as often as the interval says.

    Retraining is unlucky for all queries together, and queries differ: subsets drawn anew, or queries, would not do.
    """

    def bank(subsets, queries, seed):
        draw = np.random.default_rng(seed)
        chosen = draw.choice(400, queries, replace=queries > 400)
        weights = np.random.default_rng(99).normal(size=(30, 400))[:, chosen]
        masks = random_masks(30, subsets, seed=seed)
        noise = 5.4 * draw.normal(size=(subsets, 1)) + 2.7 * draw.normal(size=(subsets, queries))
        return weights, masks, noise - masks @ weights * np.linspace(0.5, 2, 400)[chosen]

    truth = lds(*bank(3000, 1000, 0), resamples=1).mean
    found = [lds(*bank(50, 25, seed), confidence=0.8, resamples=150) for seed in range(1, 61)]
    # Of 60, 48 are expected, with a standard deviation of 3.1; drawing subsets alone or queries alone covers 33.
    assert 41 <= sum(one.low <= truth <= one.high for one in found) <= 56


def test_ceiling_is_what_the_expected_losses_score():
    weights, masks, outputs = linear_bank(400, 40, 12, 3, noise=1.5)
    found = lds(weights, masks, outputs, resamples=1)
    assert found.ceiling == pytest.approx(found.mean, abs=0.02)  # the weights are the expected losses
    luck = np.random.default_rng(7).normal(size=(400, 3, 12)).mean(1)  # of as many other seeds
    others = 5 - masks @ weights + 1.5 * np.sqrt(10) * luck
    agreement = np.mean([spearman(others[:, q], outputs.mean(1)[:, q]) for q in range(12)])
    assert found.reliability == pytest.approx(agreement, abs=0.02)
    assert found.reliability < found.ceiling - 0.05
    assert np.isnan(lds(weights, masks, outputs[:, :1], resamples=1).ceiling)


def test_seeds_that_agree_on_nothing_have_no_ceiling():
    weights, masks, outputs = linear_bank(50, 10, 5, 1, noise=1.0)
    assert lds(weights, masks, np.stack([outputs[:, 0], -outputs[:, 0] + 0.1], 1), resamples=1).ceiling == 0


def test_scores_that_foretell_nothing_count_as_nothing():
    """A query without a unit of its source, say; and equal scores, whose sums differ by rounding alone."""
    weights, masks, outputs = linear_bank(40, 11, 3, 1, noise=0.1)
    scores = weights.copy()
    scores[:, 1] = 0
    scores[:, 2] = 0.1 + 1e-17
    found = lds(scores, masks, outputs)
    assert found.of_queries[0] > 0.9
    np.testing.assert_array_equal(found.of_queries[1:], 0)


def test_same_seed_same_interval():
    weights, masks, outputs = linear_bank(40, 11, 3, 1, noise=1.0)
    state = np.random.get_state()[1].copy()
    first, again, other = (lds(weights, masks, outputs, seed=seed) for seed in (0, 0, 1))
    assert (first.low, first.high) == (again.low, again.high) != (other.low, other.high)
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scores": np.zeros((8, 5))}, "scores has shape .8, 5.*9 units and 5 queries"),
        ({"scores": np.full((9, 5), np.nan)}, "scores has numbers that are not finite"),
        ({"masks": np.ones((20, 9), bool)}, "masks are the same for every subset"),
        ({"masks": np.full((20, 9), 0.5)}, "masks has shape"),
        ({"masks": np.ones(20, bool)}, "masks has shape"),
        ({"masks": np.eye(19, 9, dtype=bool)}, "outputs has shape .20, 5. and masks .19, 9."),
        ({"outputs": np.zeros(20)}, "outputs has shape"),
        ({"outputs": np.zeros((20, 5))}, "query 0 .5 in all. is the same for every subset"),
        ({"outputs": np.full((20, 5), np.inf)}, "outputs has numbers that are not finite"),
        ({"masks": np.eye(3, 9, dtype=bool), "outputs": np.zeros((3, 5))}, "masks has 3 subsets"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"resamples": 0}, "resamples=0"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, message):
    weights, masks, outputs = linear_bank(20, 9, 5, 1, noise=1.0)
    with pytest.raises(ValueError, match=message):
        lds(**{"scores": weights, "masks": masks, "outputs": outputs[:, 0], **change})


def test_table_has_the_baselines_and_the_ceiling():
    weights, masks, outputs = linear_bank(40, 11, 6, 2, noise=0.5)
    draw = np.random.default_rng(3)
    near, nothing = weights + 0.3 * draw.normal(size=weights.shape), np.zeros_like(weights)
    best, other = lds(weights, masks, outputs), lds(near, masks, outputs)
    low, high = np.quantile(best.resampled - other.resampled, [0.025, 0.975])
    apart = np.quantile(best.resampled - lds(near, masks, outputs, seed=1).resampled, [0.025, 0.975])
    assert high - low < 0.8 * (apart[1] - apart[0]), "the resamples are not the same draws"
    assert table({"truth": weights}, {"nothing": nothing, "near": near}, masks, outputs).splitlines() == [
        "| scores | LDS | 95% interval | above the best baseline |",
        "| --- | ---: | ---: | ---: |",
        f"| truth | {best.mean:.3f} | {best.low:.3f} to {best.high:.3f} "
        f"| {best.mean - other.mean:+.3f} ({low:+.3f} to {high:+.3f}) |",
        "| nothing (baseline) | 0.000 | 0.000 to 0.000 |  |",
        f"| near (baseline) | {other.mean:.3f} | {other.low:.3f} to {other.high:.3f} |  |",
        f"| noise ceiling | {best.ceiling:.3f} |  |  |",
    ]
    assert "ceiling" not in table({}, {"nothing": nothing}, masks, outputs[:, 0])
    with pytest.raises(ValueError, match="baselines is empty"):
        table({"truth": weights}, {}, masks, outputs)
    with pytest.raises(ValueError, match="truth is among both"):
        table({"truth": weights}, {"truth": weights}, masks, outputs)
