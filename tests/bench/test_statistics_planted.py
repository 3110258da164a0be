"""Planted worlds: influence that is linear, noise of known size, subsets as LDS draws them, answers by formula.

m_s(q) = Σ_i w_si β_i(q) + noise_sq, w_s a random half of N examples. Over halves the sum has variance N/4 · S²(β), S²
with N − 1, and two sums correlate as their coefficients do: noise of variance N/4 · S²(β) (1 − r)/r makes a run of
reliability r, and scores of correlation ρ with β reach, by Pearson, ρ √(reliability of the mean of the runs).
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from bench.evaluations.base import Metric
from bench.statistics import (
    Array,
    bootstrap_correlation,
    bootstrap_parts,
    bootstrap_slope,
    ceiling,
    crossed,
    intercept,
    kendall,
    paired_difference,
    pearson,
    slope,
    spearman,
    split_half,
    top_overlap,
)
from tasks.training.plan import random_subsets

N, SHARED = 60, 4  # examples, and directions that the queries of a world have in common
STATISTICS: dict[str, Callable[[Array, Array], Array]] = {
    "spearman": spearman,
    "pearson": pearson,
    "kendall": kendall,
    "slope": slope,
}


def halves(subsets: int, seed: int) -> Array:
    masks: Array = random_subsets(N, subsets, 0.5, seed).numpy()
    return masks


def influences(rng: np.random.Generator, queries: int, own: float = 0.5, world: int = 0) -> Array:
    """β (N, Q) of new queries of the world: directions of the world in the query's proportions, and its own part."""
    directions = np.random.default_rng(world).normal(size=(N, SHARED)) / SHARED**0.5
    return np.sqrt(1 - own) * directions @ rng.normal(size=(SHARED, queries)) + np.sqrt(own) * rng.normal(
        size=(N, queries)
    )


def measured(rng: np.random.Generator, masks: Array, beta: Array, r: float, repeats: int, common: float = 0.0) -> Array:
    """Runs (R, S, Q) of reliability r; a share of the noise moves queries together."""
    shape = (repeats, len(masks), beta.shape[1])
    mixed = rng.normal(size=(*shape[:2], SHARED)) @ rng.normal(size=(SHARED, shape[2])) / SHARED**0.5
    noise = np.sqrt(common) * mixed + np.sqrt(1 - common) * rng.normal(size=shape)
    return masks @ beta + np.sqrt(N / 4 * beta.var(0, ddof=1) * (1 - r) / r) * noise


def correlated(beta: Array, other: Array, rho: float | Array) -> Array:
    """Scores (N, Q) of correlation exactly ρ with β, in β's units: mixed with what of `other` is orthogonal to it."""
    b, e = beta - beta.mean(0), other - other.mean(0)
    e = e - b * (b * e).sum(0) / (b * b).sum(0)
    return rho * b + np.sqrt(1 - np.square(rho)) * e * np.sqrt((b * b).sum(0) / (e * e).sum(0))


def test_true_scores_without_noise_are_perfect() -> None:
    masks, beta = halves(40, 0), influences(np.random.default_rng(1), 12)
    predicted, constant = masks @ beta, np.arange(12.0)
    for correlation in (spearman, pearson, kendall):
        np.testing.assert_allclose(correlation(predicted, predicted + constant), 1, atol=1e-12)
        np.testing.assert_allclose(correlation(7 * predicted, predicted), 1, atol=1e-12)
    np.testing.assert_allclose(slope(predicted, predicted + constant), 1, atol=1e-12)
    np.testing.assert_allclose(intercept(predicted, predicted + constant), constant, atol=1e-9)
    np.testing.assert_allclose(slope(4 * predicted, predicted + constant), 0.25, atol=1e-12)
    np.testing.assert_allclose(intercept(4 * predicted, predicted + constant), constant, atol=1e-9)
    # Each score larger by .1: every half has the same number of them.
    np.testing.assert_allclose(intercept(masks @ (beta + 0.1), predicted), -0.1 * N / 2, atol=1e-9)
    assert (top_overlap(beta, 3 * beta, 6) == 1).all()
    for kind, statistic in STATISTICS.items():
        value = float(statistic(predicted, predicted).mean())
        entry = Metric(value, replicates(kind, predicted, predicted, 0, 100), 12, {}).entry()
        assert (entry["low"], entry["value"], entry["high"]) == pytest.approx((1, 1, 1))


def test_reversed_scores_are_as_wrong_as_can_be() -> None:
    masks, beta = halves(40, 0), influences(np.random.default_rng(1), 12)
    for correlation in (spearman, pearson, kendall):
        np.testing.assert_allclose(correlation(masks @ -beta, masks @ beta), -1, atol=1e-12)
    np.testing.assert_allclose(slope(masks @ -beta, masks @ beta), -1, atol=1e-12)
    assert (top_overlap(-beta, beta, 6) == 0).all()


@pytest.mark.parametrize("r", [0.5, 0.8])
@pytest.mark.parametrize("repeats", [2, 5])
def test_what_perfect_and_imperfect_scores_reach(r: float, repeats: int) -> None:
    worlds, subsets, queries = 20, 100, 40
    reached: dict[str, list[float]] = defaultdict(list)
    for world in range(worlds):
        rng = np.random.default_rng([repeats, world])
        masks, beta, other = halves(subsets, world), influences(rng, queries), influences(rng, queries, world=1)
        runs = measured(rng, masks, beta, r, repeats)
        actual = runs.mean(0)
        for rho in (1.0, 0.7, 0.3):
            reached[f"{rho}"].append(pearson(masks @ correlated(beta, other, rho), actual).mean())
        reached["spearman"].append(spearman(masks @ beta, actual).mean())
        for name, correlation in {"ceiling": pearson, "ceiling of ranks": spearman}.items():
            reached[name].append(ceiling(runs, correlation) or 0.0)
        reached["reliability"].append(split_half(runs, pearson).mean())
        reached["slope"].append(slope(masks @ beta, actual).mean())
        reached["intercept"].append(intercept(masks @ beta, actual).mean())
    mean = {key: np.mean(found) for key, found in reached.items()}
    error = {key: np.std(found, ddof=1) / worlds**0.5 for key, found in reached.items()}
    of_mean = repeats * r / (1 + (repeats - 1) * r)
    for rho in (1.0, 0.7, 0.3):
        known = rho * np.sqrt(of_mean)
        known *= 1 - (1 - known**2) / (2 * (subsets - 1))  # of a correlation by so many subsets
        assert mean[f"{rho}"] == pytest.approx(known, abs=4 * error[f"{rho}"]), rho
        assert mean[f"{rho}"] == pytest.approx(rho * mean["ceiling"], abs=0.02), rho
    assert mean["reliability"] == pytest.approx(of_mean, abs=4 * error["reliability"] + 0.01)
    assert mean["ceiling of ranks"] == pytest.approx(mean["spearman"], abs=0.02)
    assert mean["slope"] == pytest.approx(1, abs=4 * error["slope"])
    assert mean["intercept"] == pytest.approx(0, abs=4 * error["intercept"])


def test_shuffled_scores_say_nothing() -> None:
    rng = np.random.default_rng(0)
    queries, subsets = 200, 100
    masks, beta = halves(subsets, 0), influences(rng, queries)
    actual = measured(rng, masks, beta, 0.8, 2).mean(0)
    scores = rng.permuted(beta, axis=0)
    # A shuffle correlates by chance with sd 1/√(N − 1), and subsets see it with 1/√(S − 1) more.
    band = 3.5 * np.sqrt((1 / (N - 1) + 1 / (subsets - 1)) / queries)
    for statistic in STATISTICS.values():
        assert abs(statistic(masks @ scores, actual).mean()) < band
    assert top_overlap(scores, beta, 6).mean() == pytest.approx(6 / N, abs=3.5 * np.sqrt(0.1 * 0.9 / 6 / queries))


def replicates(kind: str, x: Array, y: Array, seed: int, number: int) -> Array:
    return bootstrap_slope(x, y, seed, number) if kind == "slope" else bootstrap_correlation(x, y, kind, seed, number)


def coverage(worlds: int, own: float, common: float, subsets: int, queries: int, number: int) -> dict[str, float]:
    """How often the 95 % interval holds the mean of the values of all worlds: that of one of two methods, as an
    evaluation makes it and by crossed parts; and that of their paired difference, by replicates and by crossed parts.

    Every world has new subsets and new queries; the methods are of various quality from query to query, and their
    errors, like the noise, are partly common to the queries.
    """
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for world in range(worlds):
        rng = np.random.default_rng([7, world])
        masks, beta = halves(subsets, world), influences(rng, queries, own)
        actual = measured(rng, masks, beta, 2 / 3, 2, common).mean(0)
        errors = influences(rng, queries, own, world=1), influences(rng, queries, own, world=2)
        other = errors[0] + errors[1]
        one, two = (
            masks @ correlated(beta, e, np.clip(rng.normal(0.6, 0.1, queries), -0.9, 0.9)) for e in (errors[0], other)
        )
        for kind, statistic in STATISTICS.items():
            better = "one" if kind == "slope" else "higher"
            values = [float(statistic(x, actual).mean()) for x in (one, two)]
            parts = [bootstrap_parts(x, actual, kind, world, number) for x in (one, two)]
            plain = [
                Metric(value, replicates(kind, x, actual, world, number), queries, {}, better=better)
                for value, x in zip(values, (one, two), strict=True)
            ]
            mended = Metric(values[0], values[0] + crossed(parts[0]), queries, {}, better=better)
            for name, metric in (("plain", plain[0]), ("crossed", mended)):
                entry = metric.entry()
                found[f"{kind} {name}"].append((entry["value"], entry["low"], entry["high"]))
            pairs = {"plain": (plain[0].replicates, plain[1].replicates)}
            pairs["crossed"] = (crossed(parts[0] - parts[1]), np.zeros(number))
            for name, (a, b) in pairs.items():
                found[f"{kind} {name} difference"].append(paired_difference(a, b, *values)[:3])
    covered = {}
    for name, rows in found.items():
        value, low, high = np.array(rows).T
        covered[name] = float(np.mean((low <= value.mean()) & (value.mean() <= high)))
    return covered


@pytest.mark.slow
@pytest.mark.parametrize(("own", "common"), [(0.5, 0.5), (1.0, 0.0)])
def test_intervals_cover_the_expectation_over_new_subsets_and_queries(own: float, common: float) -> None:
    """Replicates that resample both axes hold it too often, crossed parts in about 95 % of the worlds; the band is that
    of a binomial count around 93 to 97 %."""
    worlds = 120
    found = coverage(worlds, own, common, subsets=30, queries=20, number=150)
    assert len(found) == 16
    least = 0.93 - 2 * np.sqrt(0.93 * 0.07 / worlds)
    most = 0.97 + 2 * np.sqrt(0.97 * 0.03 / worlds)
    for name, covered in found.items():
        assert least <= covered, (name, covered)
        assert covered <= most or "plain" in name, (name, covered)
