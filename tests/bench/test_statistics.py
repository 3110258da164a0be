"""Statistics of agreement against scipy and scikit-learn, and on planted data whose answer is known."""

import tracemalloc
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from bench.statistics import (
    Array,
    _midranks,
    _order,
    average_precision,
    bootstrap_correlation,
    bootstrap_intercept,
    bootstrap_parts,
    bootstrap_queries,
    bootstrap_slope,
    ceiling,
    ceilings,
    centred,
    crossed,
    found_in_first,
    holm,
    intercept,
    interval,
    kendall,
    paired_difference,
    pearson,
    reliability,
    removal_area,
    resamples,
    roc_auc,
    slope,
    spearman,
    spearman_brown,
    split_half,
    stratified_counts,
    top_overlap,
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
    wanted = [stats.kendalltau(a, b).statistic for a, b in zip(x.T, y.T, strict=True)]
    np.testing.assert_allclose(kendall(x, y), wanted, atol=1e-12)
    fits = [stats.linregress(a, b) for a, b in zip(x.T, y.T, strict=True)]
    np.testing.assert_allclose(slope(x, y), [fit.slope for fit in fits], atol=1e-12)
    np.testing.assert_allclose(intercept(x, y), [fit.intercept for fit in fits], atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(arrays(float, (7, 2), elements=small), arrays(float, (7, 2), elements=small))
def test_kendall_with_ties_is_scipys_and_odd(x: Array, y: Array) -> None:
    found = kendall(x, y)
    wanted = [stats.kendalltau(a, b).statistic for a, b in zip(x.T, y.T, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-12)  # NaN where scipy has it
    np.testing.assert_array_equal(kendall(y, x), found)
    np.testing.assert_array_equal(kendall(-x, y), -found)
    np.testing.assert_array_equal(kendall(np.exp(x), y**3), found)


def test_kendall_by_hand() -> None:
    x = np.array([[1.0, 2, 3, 4]]).T
    # Of 6 pairs one is discordant; then one is tied in y, 5 concordant: 5 / √(6 · 5); then nothing is known.
    assert kendall(x, np.array([[1.0, 2, 4, 3]]).T)[0] == pytest.approx(4 / 6)
    assert kendall(x, np.array([[1.0, 2, 3, 3]]).T)[0] == pytest.approx(5 / 30**0.5)
    assert np.isnan(kendall(x[:1], x[:1])[0])
    assert kendall(x, x)[0] == 1.0 and kendall(x, -x)[0] == -1.0


def test_kendall_of_many_rows_is_exact_and_holds_little() -> None:
    """5000² is beyond the integers that float32 holds, and beyond one block of pairs."""
    x, y = columns(5000, 1, values=300)
    tracemalloc.start()
    found = kendall(x, y)
    bootstrap_correlation(x[:1000], y[:1000], "kendall", 0, 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0] == pytest.approx(stats.kendalltau(x[:, 0], y[:, 0]).statistic, abs=1e-12)
    assert peak < 100e6


def test_intercept_by_hand() -> None:
    x = np.array([[0.0, 1, 2], [5, 5, 5]]).T
    y = np.array([[1.0, 1, 4], [1, 2, 3]]).T
    found = intercept(x, y)  # slope 3/2, mean 2 at 1
    assert found[0] == pytest.approx(0.5) and np.isnan(found[1])
    assert intercept(x[:, :1], 3 - 2 * x[:, :1])[0] == pytest.approx(3.0)
    weighed = intercept(x[:, :1], y[:, :1], np.array([2.0, 0, 1]))  # through (0, 1) and (2, 4)
    assert weighed[0] == pytest.approx(1.0)


@settings(deadline=None, max_examples=100)
@given(arrays(float, (8, 3), elements=small), arrays(np.int64, 8, elements=st.integers(0, 3)).filter(lambda c: c.sum()))
def test_ranks_of_a_resample_are_those_of_the_expanded_sample(x: Array, counts: np.ndarray) -> None:
    rows = np.repeat(np.arange(8), counts)
    wanted = 2 * stats.rankdata(x[rows], axis=0) - (len(rows) + 1)
    for q in range(3):
        found = _midranks(*_order(x[:, q]), counts[:, None].astype(float))[rows, 0]
        np.testing.assert_array_equal(found, wanted[:, q])


def test_weighted_pearson_is_that_of_the_expanded_sample() -> None:
    x, y = columns(20, 4)
    counts = np.random.default_rng(0).integers(0, 4, 20)
    rows = np.repeat(np.arange(20), counts)
    for statistic in (pearson, slope, intercept):
        np.testing.assert_allclose(statistic(x, y, counts.astype(float)), statistic(x[rows], y[rows]), atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -3.3e-9])
@pytest.mark.parametrize("statistic", [pearson, spearman, kendall, slope, intercept])
def test_a_constant_column_has_no_agreement(statistic: Callable[[Array, Array], Array], value: float) -> None:
    x, y = columns(10, 2)
    x[:, 0] = value
    found = statistic(x, y)
    assert np.isnan(found[0]) and np.isfinite(found[1])


def test_a_sum_that_is_constant_but_for_rounding_is_constant() -> None:
    """Subsets of one size under equal scores: the order of summing differs, the sum does not."""
    x, y = columns(10, 1)
    x[:, 0] = 0.1 + 1e-17 * np.arange(10) + np.where(np.arange(10) % 2, 1.4e-17, 0)
    for statistic in (pearson, spearman, kendall, slope, intercept):
        assert np.isnan(statistic(x, y)[0])
    for kind in ("pearson", "spearman", "kendall"):
        assert (bootstrap_correlation(x, y, kind, 0, 50) == 0).all()
    assert top_overlap(x, y, 3)[0] == pytest.approx(0.3)


@pytest.mark.parametrize("kind", ["spearman", "pearson", "kendall"])
@pytest.mark.parametrize("cells", [40, 2**16])
def test_a_replicate_is_the_statistic_of_the_resample(kind: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.statistics.CELLS", cells)
    x, y = columns(12, 5, values=6)
    found = bootstrap_correlation(x, y, kind, seed=3, number=20)
    rows, queries = resamples(12, 5, 3, 20)
    assert (rows.sum(1) == 12).all() and (queries.sum(1) == 5).all()
    correlation = {"spearman": spearman, "pearson": pearson, "kendall": kendall}[kind]
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
    found = bootstrap_intercept(x, y + 7, seed=3, number=20)
    for r in range(20):
        s, q = np.repeat(np.arange(12), rows[r]), np.repeat(np.arange(5), queries[r])
        assert found[r] == pytest.approx(intercept(x[s][:, q], y[s][:, q] + 7).mean(), abs=1e-9)


def test_a_statistic_has_a_known_name() -> None:
    x, y = columns(5, 2)
    with pytest.raises(ValueError, match="slope"):
        bootstrap_correlation(x, y, "slope", 0, 2)
    with pytest.raises(ValueError, match="tau"):
        bootstrap_parts(x, y, "tau", 0, 2)


def test_replicates_of_queries_alone() -> None:
    values = np.array([0.2, np.nan, 1.0, 0.4])
    found = bootstrap_queries(values, seed=5, number=4000)
    assert found.shape == (4000,) and np.array_equal(found, bootstrap_queries(values, 5, 4000))
    assert not np.array_equal(found, bootstrap_queries(values, 6, 4000))
    zeroed = np.array([0.2, 0, 1.0, 0.4])
    assert found.mean() == pytest.approx(zeroed.mean(), abs=4 * zeroed.std() / 2 / 4000**0.5)
    assert found.std() == pytest.approx(zeroed.std() / 2, rel=0.05)
    assert set(np.round(found * 20)) <= set(range(21)), "means of four of 0, .2, .4 and 1"
    assert (bootstrap_queries(np.full(3, 0.7), 0, 9) == pytest.approx(0.7)) and len(
        bootstrap_queries(values, 0)
    ) == 1000


@pytest.mark.parametrize("kind", ["spearman", "pearson", "kendall", "slope", "intercept"])
def test_the_parts_of_a_replicate(kind: str) -> None:
    """Without their widening, and about the mean, they sum to the replicate that resamples rows and queries."""
    x, y = columns(12, 5)
    whole: dict[str, Callable[..., Array]] = {"slope": bootstrap_slope, "intercept": bootstrap_intercept}
    both = whole[kind](x, y, 3, 50) if kind in whole else bootstrap_correlation(x, y, kind, 3, 50)
    parts = bootstrap_parts(x, y, kind, 3, 50)
    assert parts.shape == (3, 50)
    np.testing.assert_allclose(parts.mean(1), 0, atol=1e-12)
    g = [np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975) for n in (12, 5)]
    np.testing.assert_allclose(parts[0] / g[0] + parts[1] / g[1] + parts[2], both - both.mean(), atol=1e-9)
    one_query = bootstrap_parts(x[:, :1], y[:, :1], kind, 3, 50)
    np.testing.assert_allclose(one_query[1:], 0, atol=1e-12)


def test_crossed_parts_by_hand() -> None:
    unit = np.array([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    for scale, variance in (((2, 1, 1), 4), ((2, 1, 0), 5), ((1, 1, 9), 1), ((3, 0, 1), 9), ((0, 0, 0), 0)):
        parts = unit * np.array(scale)[:, None]
        found = crossed(parts)
        assert found.var() == pytest.approx(variance) and found.mean() == pytest.approx(0)
        if variance:
            assert np.corrcoef(found, parts[0] + parts[1])[0, 1] == pytest.approx(1)


def test_the_spread_of_a_crossed_mean_is_that_of_its_own_noise() -> None:
    """Slopes of own noise in every query and nothing else: a replicate spreads √3 too far, the crossed parts do not."""
    rng = np.random.default_rng(0)
    design = np.tile(rng.normal(size=(400, 1)), 400)
    y = rng.normal(size=(400, 400))
    spread = 1 / np.sqrt((design[:, 0] ** 2).sum() * 400)
    assert bootstrap_slope(design, y, 0).std() == pytest.approx(3**0.5 * spread, rel=0.1)
    assert crossed(bootstrap_parts(design, y, "slope", 0)).std() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_query_without_information_counts_as_zero(value: float) -> None:
    x, y = columns(30, 4)
    x[:, :2] = value
    y[:, 2:] = x[:, 2:]
    kinds = ("spearman", "pearson", "kendall")
    for found in (*(bootstrap_correlation(x, y, kind, 0, 200) for kind in kinds), bootstrap_slope(x, y, 0, 200)):
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


@pytest.mark.parametrize("correlation", [spearman, pearson, kendall])
def test_a_ceiling_is_the_mean_of_the_ceilings_of_queries(correlation: Callable[[Array, Array], Array]) -> None:
    parts = [noisy_runs(signal, 3, rows=60, queries=2, seed=s)[1] for s, signal in enumerate((0.9, 0.3))]
    runs = np.concatenate([*parts, np.zeros((3, 60, 1))], 2)
    found = ceilings(runs, correlation)
    assert found.shape == (5,) and found[:2].min() > found[2:].max() and found[4] == 0
    assert ceiling(runs, correlation) == pytest.approx(found.mean())
    np.testing.assert_allclose(found[:4], np.sqrt(spearman_brown(reliability(runs, correlation), 3))[:4])
    np.testing.assert_allclose(ceilings(runs[:, :, 1:2], correlation), found[1])


@pytest.mark.parametrize("runs", [2, 3])
@pytest.mark.parametrize("correlation", [spearman, pearson])
def test_halves_of_two_and_three_runs_are_pairs(runs: int, correlation: Callable[[Array, Array], Array]) -> None:
    _, measured = noisy_runs(0.5, runs, rows=40, queries=6)
    wanted = spearman_brown(reliability(measured, correlation), runs)
    np.testing.assert_allclose(split_half(measured, correlation), wanted, atol=1e-12)


@pytest.mark.parametrize("runs", [4, 5])
def test_split_half_over_all_splits(runs: int) -> None:
    _, measured = noisy_runs(0.4, runs, rows=30, queries=3)
    found = []
    for one in combinations(range(runs), 2):
        for other in combinations(sorted(set(range(runs)) - set(one)), 2):
            if one < other:
                found.append(pearson(measured[list(one)].mean(0), measured[list(other)].mean(0)))
    assert len(found) == {4: 3, 5: 15}[runs]
    wanted = spearman_brown(np.mean(found, axis=0), runs / 2)
    for seed in (0, 1):
        np.testing.assert_allclose(split_half(measured, pearson, seed), wanted, atol=1e-12)


def test_split_half_of_many_runs_is_near_that_of_pairs() -> None:
    _, measured = noisy_runs(0.3, 9, rows=1000, queries=5)
    found = split_half(measured, pearson)
    np.testing.assert_array_equal(found, split_half(measured, pearson))
    assert not np.array_equal(found, split_half(measured, pearson, seed=1)), "20 of 315 splits"
    np.testing.assert_allclose(found, spearman_brown(0.3, 9), atol=0.03)
    np.testing.assert_allclose(found, spearman_brown(reliability(measured, pearson), 9), atol=0.01)
    np.testing.assert_allclose(split_half(measured[::-1], pearson), found, atol=0.03)


def test_split_half_of_runs_that_agree_and_do_not() -> None:
    truth, _ = noisy_runs(0.5, 1, rows=50)
    assert split_half(np.stack([truth] * 4)) == pytest.approx(1.0)
    assert split_half(np.stack([truth, -truth])) == pytest.approx(-1.0)
    assert split_half(np.stack([truth, -truth, truth])) == pytest.approx(-1.0)
    assert (split_half(np.zeros((4, 9, 2))) == 0).all()


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
    np.testing.assert_allclose(intercept(x, y), 5, atol=0.05)
    low, high = interval(bootstrap_slope(x, y, 0, 200))
    assert low < 1 < high
    low, high = interval(bootstrap_intercept(x, y, 0, 200))
    assert low < 5 < high


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


def test_a_paired_difference_by_hand() -> None:
    a, b = np.array([3.0, 4, 5, 6, 7, 8, 9]), np.array([2.0, 4, 6, 4, 6, 4, 6])
    # d* = 1 0 -1 2 1 4 3, of mean 10/7: two of seven are 0 or less
    difference, low, high, p = paired_difference(a, b)
    assert difference == pytest.approx(10 / 7) and p == pytest.approx(2 * 3 / 8)
    assert (low, high) == pytest.approx((-0.85, 3.85))
    # Moved by 2 all are above 0
    difference, low, high, p = paired_difference(a, b, value_a=5.0, value_b=5 - 24 / 7, level=0.5)
    beyond = 2 * stats.norm.sf(24 / 7 / (a - b).std())  # counting could say no more than 2/8
    assert difference == pytest.approx(24 / 7) and p == pytest.approx(beyond) and p < 2 / 8
    assert (low, high) == pytest.approx((0.5 + 2, 2.5 + 2))
    back = paired_difference(b, a, 5 - 24 / 7, 5.0, 0.5)
    assert back == pytest.approx((-24 / 7, -4.5, -2.5, beyond))


def test_equal_methods_do_not_differ() -> None:
    a = np.random.default_rng(0).normal(size=200)
    assert paired_difference(a, a, 0.3, 0.3) == (0.0, 0.0, 0.0, 1.0)
    assert paired_difference(a, a + 0.5)[::3] == pytest.approx((-0.5, 0.0))


def test_a_hopeless_method_is_told_from_the_best_among_forty() -> None:
    """Holm multiplies by the number of tests: with 1,000 replicates a count alone never gets below 40 * 2/1001."""
    rng = np.random.default_rng(0)
    best, rivals = 0.8 + 0.01 * rng.normal(size=1000), 0.1 + 0.01 * rng.normal(size=(40, 1000))
    p = holm(np.array([paired_difference(best, rival)[3] for rival in rivals]))
    assert (p < 1e-6).all()
    # What counting can tell, it tells: normal replicates around a difference of two of their spreads
    near = paired_difference(0.02 + 0.01 * rng.normal(size=1000), np.zeros(1000))[3]
    assert near == pytest.approx(2 * stats.norm.sf(2), rel=0.5)


def test_replicates_of_different_resamples_are_refused() -> None:
    a = np.random.default_rng(0).normal(size=200)
    with pytest.raises(ValueError, match="resamples"):
        paired_difference(a, a[1:])


@settings(deadline=None, max_examples=50)
@given(arrays(float, 30, elements=small), arrays(float, 30, elements=small))
def test_a_difference_is_significant_where_its_interval_is_off_zero(a: Array, b: Array) -> None:
    difference, low, high, p = paired_difference(a, b)
    assert low <= difference + 1e-9 and difference <= high + 1e-9 and 0 <= p <= 1
    assert paired_difference(b, a) == pytest.approx((-difference, -high, -low, p))
    low, high = paired_difference(a, b, level=0.5)[1:3]
    assert p < 0.6 or low <= 1e-9 or high >= -1e-9


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.5, 0.4, 0.01])), [0.8, 0.8, 0.03])
    np.testing.assert_allclose(holm(np.array([0.2, 0.2])), [0.4, 0.4])
    assert holm(np.array([0.03])) == 0.03 and len(holm(np.array([]))) == 0
    # Figures of statsmodels 0.15, multipletests(method="holm")
    p = [
        0.838541,
        0.642194,
        0.680846,
        0.967834,
        0.716269,
        0.177097,
        5.23656777e-05,
        0.0202732689,
        0.000281405,
        0.01498773,
    ]
    wanted = [1, 1, 1, 1, 1, 1, 5.23656777e-04, 0.1419128823, 0.002532645, 0.11990184]
    np.testing.assert_allclose(holm(np.array(p)), wanted)


@settings(deadline=None, max_examples=100)
@given(arrays(float, 6, elements=st.floats(0, 1, allow_subnormal=False)), st.permutations(range(6)))
def test_holm_is_monotone_and_between_the_raw_and_the_bonferroni_values(p: Array, order: list[int]) -> None:
    found = holm(p)
    assert (found >= p).all() and (found <= np.minimum(6 * p, 1)).all()
    assert (np.diff(found[np.argsort(p, kind="stable")]) >= 0).all()
    np.testing.assert_array_equal(holm(p[order]), found[order])


def test_top_overlap_by_hand() -> None:
    x = np.array([9.0, 8, 7, 6, 5])[:, None]
    y = np.array([5.0, 9, 1, 8, 0])[:, None]
    assert [top_overlap(x, y, k)[0] for k in range(1, 6)] == pytest.approx([0, 1 / 2, 2 / 3, 1, 1])
    assert top_overlap(x, x, 2) == 1.0 and top_overlap(x, -x, 2) == 0.0
    tied = np.array([2.0, 1, 1, 1, 0])[:, None]
    # One of rows 2 to 4 joins the first: row 2, which is among the first two of x, in one case of three.
    assert top_overlap(tied, x, 2)[0] == pytest.approx((1 + 1 / 3) / 2)
    assert top_overlap(tied, tied, 2)[0] == pytest.approx((1 + 3 * (1 / 3) ** 2) / 2)
    for k in (0, 6):
        with pytest.raises(ValueError, match="of 5 rows"):
            top_overlap(x, y, k)


@settings(deadline=None, max_examples=60)
@given(arrays(float, (6, 2), elements=small), arrays(float, (6, 2), elements=small), st.integers(1, 6))
def test_the_overlap_of_ties_is_its_mean_over_their_orders(x: Array, y: Array, k: int) -> None:
    found = top_overlap(x, y, k)
    assert ((found >= -1e-12) & (found <= 1 + 1e-12)).all()
    np.testing.assert_allclose(top_overlap(y, x, k), found)
    np.testing.assert_allclose(top_overlap(x[::-1], y[::-1], k), found)
    np.testing.assert_allclose(top_overlap(np.full_like(x, 0.1), y, k), k / 6)
    orders = [
        [set(part) | set(above) for part in combinations(tied, k - len(above))]
        for z in (x[:, 0], y[:, 0])
        for edge in [np.sort(z)[6 - k]]
        for above, tied in [(np.flatnonzero(z > edge).tolist(), np.flatnonzero(z == edge).tolist())]
    ]
    assert found[0] == pytest.approx(np.mean([len(one & other) / k for one in orders[0] for other in orders[1]]))


def test_the_overlap_of_chance() -> None:
    rng = np.random.default_rng(0)
    found = top_overlap(rng.normal(size=(50, 4000)), rng.normal(size=(50, 4000)), 10)
    assert found.mean() == pytest.approx(10 / 50, abs=4 * found.std() / 4000**0.5)


def test_the_removal_area_by_hand() -> None:
    fractions = np.array([0.1, 0.3])
    # ½ · .1 · 2 + .2 · (2 + 4)/2 = .1 + .6, over .3
    assert removal_area(fractions, np.array([2.0, 4.0])) == pytest.approx(0.7 / 0.3)
    effect = np.array([[2.0, 0.0, -1.0], [4.0, 0.0, -3.0]])
    found = removal_area(fractions, effect)
    assert found.shape == (3,) and found == pytest.approx([0.7 / 0.3, 0, -(0.05 + 0.4) / 0.3])
    assert removal_area(np.array([0.2]), np.array([3.0])) == pytest.approx(1.5)
    for wrong in ([0.0, 0.1], [0.2, 0.1], [-0.1, 0.1], [0.1, 0.1]):
        with pytest.raises(ValueError, match="ascend"):
            removal_area(np.array(wrong), np.ones(2))


@settings(deadline=None, max_examples=60)
@given(arrays(float, (3, 2), elements=small), arrays(float, 3, elements=st.floats(0.01, 0.3)))
def test_the_removal_area_is_linear_and_of_no_unit_of_the_fractions(effect: Array, steps: Array) -> None:
    fractions = np.cumsum(steps)
    found = removal_area(fractions, effect)
    np.testing.assert_allclose(removal_area(100 * fractions, 3 * effect), 3 * found, atol=1e-12)
    np.testing.assert_allclose(
        found, np.trapezoid(np.vstack([[0, 0], effect]), [0, *fractions], axis=0) / fractions[-1]
    )
    finer, between = np.insert(fractions, 1, fractions[:2].mean()), np.insert(effect, 1, effect[:2].mean(0), axis=0)
    np.testing.assert_allclose(removal_area(finer, between), found, atol=1e-12)
    np.testing.assert_allclose(removal_area(fractions, fractions), fractions[-1] / 2)
