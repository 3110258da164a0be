"""Statistics of agreement against scipy and scikit-learn, and on planted data whose answer is known."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from bench.statistics import (
    Array,
    Ranks,
    average_precision,
    bootstrap_correlation,
    bootstrap_slope,
    ceiling,
    centred,
    found_in_first,
    interval,
    pearson,
    reliability,
    resamples,
    roc_auc,
    slope,
    spearman,
    spearman_brown,
    stratified_counts,
)

small = st.integers(0, 4).map(float)


def columns(rows: int, queries: int, values: int = 10**9, seed: int = 0) -> tuple[Array, Array]:
    """Correlated columns; few `values` make ties."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, queries))
    y = x + rng.normal(size=x.shape)
    return np.round(x * values / 4) / values, np.round(y * values / 4) / values


@pytest.mark.parametrize("values", [2, 5, 10**9])
def test_correlations_are_scipys(values: int) -> None:
    x, y = columns(40, 7, values)
    wanted = [stats.spearmanr(a, b).statistic for a, b in zip(x.T, y.T, strict=True)]
    np.testing.assert_allclose(spearman(x, y), wanted, atol=1e-12)
    wanted = [stats.pearsonr(a, b).statistic for a, b in zip(x.T, y.T, strict=True)]
    np.testing.assert_allclose(pearson(x, y), wanted, atol=1e-12)
    wanted = [stats.linregress(a, b).slope for a, b in zip(x.T, y.T, strict=True)]
    np.testing.assert_allclose(slope(x, y), wanted, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(arrays(float, (8, 3), elements=small), arrays(np.int64, 8, elements=st.integers(0, 3)).filter(lambda c: c.sum()))
def test_ranks_of_a_resample_are_those_of_the_expanded_sample(x: Array, counts: np.ndarray) -> None:
    rows = np.repeat(np.arange(8), counts)
    wanted = stats.rankdata(x[rows], axis=0)
    np.testing.assert_array_equal(Ranks(x).resampled(counts)[rows], wanted)


def test_weighted_pearson_is_that_of_the_expanded_sample() -> None:
    x, y = columns(20, 4)
    counts = np.random.default_rng(0).integers(0, 4, 20)
    rows = np.repeat(np.arange(20), counts)
    np.testing.assert_allclose(pearson(x, y, counts.astype(float)), pearson(x[rows], y[rows]), atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -3.3e-9])
@pytest.mark.parametrize("statistic", [pearson, spearman, slope])
def test_a_constant_column_has_no_agreement(statistic: Callable[[Array, Array], Array], value: float) -> None:
    x, y = columns(10, 2)
    x[:, 0] = value
    found = statistic(x, y)
    assert np.isnan(found[0]) and np.isfinite(found[1])


def test_a_sum_that_is_constant_but_for_rounding_is_constant() -> None:
    """Subsets of one size under equal scores: the order of summing differs, the sum does not."""
    x, y = columns(10, 1)
    x[:, 0] = 0.1 + 1e-17 * np.arange(10) + np.where(np.arange(10) % 2, 1.4e-17, 0)
    assert np.isnan(pearson(x, y)[0])


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_a_replicate_is_the_statistic_of_the_resample(kind: str) -> None:
    x, y = columns(12, 5, values=6)
    found = bootstrap_correlation(x, y, kind, seed=3, number=20)
    rows, queries = resamples(12, 5, 3, 20)
    assert (rows.sum(1) == 12).all() and (queries.sum(1) == 5).all()
    correlation = {"spearman": spearman, "pearson": pearson}[kind]
    for r in range(20):
        s, q = np.repeat(np.arange(12), rows[r]), np.repeat(np.arange(5), queries[r])
        wanted = np.nan_to_num(correlation(x[s][:, q], y[s][:, q])).mean()
        assert found[r] == pytest.approx(wanted, abs=1e-12)


def test_a_replicate_of_the_slope_is_that_of_the_resample() -> None:
    x, y = columns(12, 5)
    found = bootstrap_slope(x, y, seed=3, number=20)
    rows, queries = resamples(12, 5, 3, 20)
    for r in range(20):
        s, q = np.repeat(np.arange(12), rows[r]), np.repeat(np.arange(5), queries[r])
        assert found[r] == pytest.approx(slope(x[s][:, q], y[s][:, q]).mean(), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_query_without_information_counts_as_zero(value: float) -> None:
    x, y = columns(30, 4)
    x[:, :2] = value
    y[:, 2:] = x[:, 2:]
    for found in (
        bootstrap_correlation(x, y, "spearman", 0, 200),
        bootstrap_correlation(x, y, "pearson", 0, 200),
        bootstrap_slope(x, y, 0, 200),
    ):
        assert np.isfinite(found).all()
        _, queries = resamples(30, 4, 0, 200)
        np.testing.assert_allclose(found, queries[:, 2:].sum(1) / 4, atol=1e-9)


def test_resamples_are_of_the_truth_not_of_the_method() -> None:
    """Two methods that rank alike have the same replicates; two that are alike differ by little."""
    x, y = columns(30, 10)
    one = bootstrap_correlation(x, y, "spearman", 7, 200)
    assert np.array_equal(one, bootstrap_correlation(np.exp(3 * x), y, "spearman", 7, 200))
    assert not np.array_equal(one, bootstrap_correlation(x, y, "spearman", 8, 200))
    near = x + 0.1 * np.random.default_rng(0).normal(size=x.shape)
    other = bootstrap_correlation(near, y, "spearman", 7, 200)
    assert (one - other).std() < 0.3 * one.std()


def planted(subsets: int, queries: int, seed: int, examples: int = 40) -> tuple[Array, Array]:
    """Predictions and noisy measurements of an additive world; methods are better on some queries than on others."""
    rng = np.random.default_rng(seed)
    masks = np.array([rng.permutation(examples) < examples // 2 for _ in range(subsets)], float)
    truth = rng.normal(size=(queries, examples))
    quality = rng.uniform(0.3, 2.0, (queries, 1))
    scores = quality * truth + rng.normal(size=truth.shape)
    measured = masks @ truth.T + 1.5 * rng.normal(size=(subsets, queries))
    return masks @ scores.T, measured


def test_the_interval_covers_the_known_score() -> None:
    known = float(np.mean([spearman(*planted(400, 300, seed)).mean() for seed in range(3)]))
    assert 0.4 < known < 0.8
    x, y = planted(60, 40, seed=123)
    low, high = interval(bootstrap_correlation(x, y, "spearman", 0))
    assert low < known < high and high - low < 0.3
    covered, replications = 0, 150
    for seed in range(1000, 1000 + replications):
        x, y = planted(30, 12, seed)
        low, high = interval(bootstrap_correlation(x, y, "spearman", seed, number=120))
        covered += low <= known <= high
    assert 0.88 <= covered / replications <= 0.99, covered / replications


def test_an_interval_has_its_quantiles() -> None:
    assert interval(np.arange(1001.0)) == pytest.approx((25.0, 975.0))
    assert interval(np.arange(101.0), level=0.5) == pytest.approx((25.0, 75.0))


def noisy_runs(signal: float, runs: int, rows: int = 3000, queries: int = 4, seed: int = 0) -> tuple[Array, Array]:
    """Truth (S, Q) of variance `signal`, and runs (R, S, Q) of variance 1 and so of reliability `signal`."""
    rng = np.random.default_rng(seed)
    truth = np.sqrt(signal) * rng.normal(size=(rows, queries))
    return truth, truth + np.sqrt(1 - signal) * rng.normal(size=(runs, rows, queries))


@pytest.mark.parametrize("signal", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("runs", [2, 4])
@pytest.mark.parametrize("correlation", [spearman, pearson])
def test_a_perfect_method_reaches_the_ceiling(
    signal: float, runs: int, correlation: Callable[[Array, Array], Array]
) -> None:
    truth, measured = noisy_runs(signal, runs)
    of_the_mean = runs * signal / (1 + (runs - 1) * signal)
    found = ceiling(measured, correlation)
    assert found is not None
    assert found == pytest.approx(np.sqrt(of_the_mean), abs=0.02)
    assert correlation(truth, measured.mean(0)).mean() == pytest.approx(found, abs=0.02)
    assert correlation(np.random.default_rng(1).permutation(truth), measured.mean(0)).mean() == pytest.approx(
        0, abs=0.05
    )
    assert correlation(-truth, measured.mean(0)).mean() == pytest.approx(-found, abs=0.02)


def test_a_perfect_method_reaches_the_ceiling_of_queries_of_unequal_noise() -> None:
    """The metric is a mean over queries of correlations, and the square root of a mean is above the mean of roots."""
    parts = [noisy_runs(signal, 2, seed=s) for s, signal in enumerate((0.95, 0.95, 0.1, 0.1))]
    truth, measured = np.concatenate([t for t, _ in parts], 1), np.concatenate([m for _, m in parts], 2)
    reached = spearman(truth, measured.mean(0)).mean()
    found = ceiling(measured)
    assert found is not None
    assert reached == pytest.approx(found, abs=0.03)


def test_a_ceiling_needs_repeats_that_agree() -> None:
    _, one = noisy_runs(0.5, 1, rows=50)
    assert ceiling(one) is None
    truth, _ = noisy_runs(0.5, 1, rows=50)
    assert ceiling(np.stack([truth, -truth])) == 0.0
    assert ceiling(np.stack([truth, truth])) == pytest.approx(1.0)
    assert reliability(np.stack([truth, truth, -truth])) == pytest.approx(-1 / 3)


def test_spearman_brown_by_hand() -> None:
    assert spearman_brown(0.5, 2) == pytest.approx(2 / 3)
    assert spearman_brown(0.7, 1) == pytest.approx(0.7)
    assert spearman_brown(spearman_brown(0.3, 2), 3) == pytest.approx(spearman_brown(0.3, 6))


def test_the_slope_is_one_for_calibrated_scores() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3))
    y = x + 0.5 * rng.normal(size=x.shape) + 5
    np.testing.assert_allclose(slope(x, y), 1, atol=0.05)
    np.testing.assert_allclose(slope(2 * x, y), 0.5, atol=0.03)
    low, high = interval(bootstrap_slope(x, y, 0, 200))
    assert low < 1 < high


@settings(deadline=None, max_examples=100)
@given(arrays(float, 15, elements=small), arrays(bool, 15), st.permutations(range(15)))
def test_auc_and_average_precision_are_scikit_learns_in_any_order(
    score: Array, positive: np.ndarray, order: list[int]
) -> None:
    if positive.all() or not positive.any():
        return
    assert roc_auc(positive, score) == pytest.approx(roc_auc_score(positive, score))
    assert average_precision(positive, score) == pytest.approx(average_precision_score(positive, score))
    for statistic in (roc_auc, average_precision, lambda p, s: found_in_first(p, s, 0.3)):
        assert statistic(positive[order], score[order]) == pytest.approx(statistic(positive, score))


@settings(deadline=None, max_examples=60)
@given(arrays(float, 10, elements=small), arrays(bool, 10), arrays(np.int64, 10, elements=st.integers(0, 3)))
def test_counts_are_repeated_rows(score: Array, positive: np.ndarray, counts: np.ndarray) -> None:
    rows = np.repeat(np.arange(10), counts)
    if not positive[rows].any() or positive[rows].all():
        return
    for statistic in (roc_auc, average_precision, lambda p, s, c=None: found_in_first(p, s, 0.3, c)):
        assert statistic(positive, score, counts) == pytest.approx(statistic(positive[rows], score[rows]))


def test_extremes_of_detection() -> None:
    positive = np.array([True, True, False, False])
    assert roc_auc(positive, np.array([4.0, 3, 2, 1])) == average_precision(positive, np.array([4.0, 3, 2, 1])) == 1
    assert roc_auc(positive, np.array([1.0, 2, 3, 4])) == 0
    assert roc_auc(positive, np.zeros(4)) == average_precision(positive, np.zeros(4)) == 0.5


def test_found_in_first_by_hand() -> None:
    positive = np.array([True, False, True, False, True, False, False, False, False, False])
    score = np.array([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    for share, found in ((0.1, 1), (0.2, 1), (0.3, 2), (0.4, 2), (0.5, 3), (1.0, 3)):
        assert found_in_first(positive, score, share) == pytest.approx(found / 3)
    assert found_in_first(positive, np.zeros(10), 0.3) == pytest.approx(0.3)
    tied = np.array([2.0, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    # Two places are left for four that tie, two of them positive: one of these is found.
    assert found_in_first(positive, tied, 0.3) == pytest.approx((1 + 2 * 2 / 4) / 3)


def test_stratified_counts_keep_both_strata() -> None:
    positive = np.arange(20) < 5
    counts = stratified_counts(positive, 1, 300)
    assert counts.shape == (300, 20)
    assert (counts[:, positive].sum(1) == 5).all() and (counts[:, ~positive].sum(1) == 15).all()
    assert np.array_equal(counts, stratified_counts(positive, 1, 300))
    assert not np.array_equal(counts, stratified_counts(positive, 2, 300))
    assert abs(counts.mean(0) - 1).max() < 4 / 300**0.5


def test_centred_replicates_have_the_estimate_in_their_middle() -> None:
    replicates = np.random.default_rng(0).normal(0.3, 0.05, 1000)
    moved = centred(replicates, 0.4)
    assert moved.mean() == pytest.approx(0.4) and moved.std() == pytest.approx(replicates.std())
    assert centred(replicates, 0.99, 1.0).max() == 1.0
    assert len(centred(np.empty(0), 0.4)) == 0
