"""Statistics of agreement: rank and product-moment correlations, bootstrap, noise ceilings. Pure functions of arrays.

Columns are queries throughout: `x`, `y` (S, Q) hold S subsets, or S left-out examples, of Q queries.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]
RESAMPLES = 1000
TINY = 1e-24  # a constant column of floating-point sums is seldom exactly constant: variance that is rounding is none
Correlation = Callable[[Array, Array], Array]


def pearson(x: Array, y: Array, counts: Array | None = None) -> Array:
    """Product-moment correlation of each column, (Q,); `counts` (S,) weigh the rows. NaN where a column is constant."""
    w = np.ones(len(x)) if counts is None else np.asarray(counts, float)
    w = (w / w.sum())[:, None]
    dx, dy = x - (w * x).sum(0), y - (w * y).sum(0)
    vx, vy = (w * dx**2).sum(0), (w * dy**2).sum(0)
    flat = (vx <= TINY * (w * x**2).sum(0)) | (vy <= TINY * (w * y**2).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (w * dx * dy).sum(0) / np.sqrt(vx * vy)
    return np.where(flat, np.nan, np.clip(r, -1, 1))


def spearman(x: Array, y: Array) -> Array:
    """Rank correlation of each column, ties at their mean rank, (Q,)."""
    return pearson(rankdata(x, axis=0), rankdata(y, axis=0))


def slope(x: Array, y: Array, counts: Array | None = None) -> Array:
    """Least-squares slope of y on x of each column, (Q,): 1 for calibrated x and effects y. NaN where x is constant."""
    w = np.ones(len(x)) if counts is None else np.asarray(counts, float)
    w = (w / w.sum())[:, None]
    dx, dy = x - (w * x).sum(0), y - (w * y).sum(0)
    variance = (w * dx**2).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (w * dx * dy).sum(0) / variance
    return np.where(variance <= TINY * (w * x**2).sum(0), np.nan, found)


class Ranks:
    """Mid-ranks of the columns of one (S, Q) array under any resampling of its rows, without sorting again."""

    def __init__(self, x: Array) -> None:
        self.order = np.argsort(x, axis=0, kind="stable")
        ordered = np.take_along_axis(x, self.order, 0)
        new = np.ones_like(ordered, dtype=bool)
        new[1:] = ordered[1:] != ordered[:-1]
        position = np.arange(len(x))[:, None]
        self.start = np.maximum.accumulate(np.where(new, position, 0), 0)  # of each tie group, inclusive
        last = np.ones_like(new)
        last[:-1] = new[1:]
        self.end = np.minimum.accumulate(np.where(last, position + 1, len(x))[::-1], 0)[::-1]  # exclusive
        self.back = np.argsort(self.order, axis=0, kind="stable")

    def resampled(self, counts: NDArray[np.int64], columns: NDArray[np.int64] | slice = slice(None)) -> Array:
        """Mid-rank of each row in the sample that holds row s `counts[s]` times, of the given columns, (S, k)."""
        order = self.order[:, columns]
        below = np.zeros((len(counts) + 1, order.shape[1]))
        np.cumsum(counts[order], axis=0, out=below[1:])
        ends = np.take_along_axis(below, self.start[:, columns], 0) + np.take_along_axis(below, self.end[:, columns], 0)
        return np.take_along_axis((ends + 1) / 2, self.back[:, columns], 0)


def resamples(
    rows: int, columns: int, seed: int, number: int = RESAMPLES
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How often each row and each column is drawn in each resample: (R, rows), (R, columns).

    Of one truth (one seed) they are the same for every method, so that differences of replicates are paired.
    """
    rng = np.random.default_rng(seed)
    return (
        rng.multinomial(rows, np.full(rows, 1 / rows), size=number),
        rng.multinomial(columns, np.full(columns, 1 / columns), size=number),
    )


def bootstrap_correlation(x: Array, y: Array, kind: str, seed: int, number: int = RESAMPLES) -> Array:
    """Replicates (R,) of the mean over queries of the `spearman` or `pearson` correlation, resampling rows and queries.

    A query whose correlation is undefined counts as 0: no information is a failure, not a gap.
    """
    row_counts, query_counts = resamples(x.shape[0], x.shape[1], seed, number)
    if kind == "pearson":
        cov, vx, vy = _moments(x, y, row_counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.where((vx > 0) & (vy > 0), cov / np.sqrt(vx * vy), 0.0)
        return (found * query_counts).sum(1) / query_counts.sum(1)
    rx, ry = Ranks(x), Ranks(y)
    replicates = np.empty(number)
    for r, (c, q) in enumerate(zip(row_counts, query_counts, strict=True)):
        drawn = np.flatnonzero(q)
        found = pearson(rx.resampled(c, drawn), ry.resampled(c, drawn), c)
        replicates[r] = (np.nan_to_num(found) * q[drawn]).sum() / q.sum()
    return replicates


def bootstrap_slope(x: Array, y: Array, seed: int, number: int = RESAMPLES) -> Array:
    """Replicates (R,) of the mean over queries of the slope; an undefined one counts as 0."""
    row_counts, query_counts = resamples(x.shape[0], x.shape[1], seed, number)
    cov, vx, _ = _moments(x, y, row_counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(vx > 0, cov / vx, 0.0)
    return (found * query_counts).sum(1) / query_counts.sum(1)


def _moments(x: Array, y: Array, counts: NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """Covariance of x and y and their variances in each resample, (R, Q) each; a variance that is rounding is 0.

    By matrix products over centred columns, so that little cancels.
    """
    w = counts / counts.sum(1, keepdims=True)  # (R, S)
    dx, dy = x - x.mean(0), y - y.mean(0)
    mx, my = w @ dx, w @ dy
    vx, vy = w @ dx**2 - mx**2, w @ dy**2 - my**2
    vx = np.where(vx <= TINY * (x**2).mean(0) + 1e-12 * mx**2, 0.0, vx)
    vy = np.where(vy <= TINY * (y**2).mean(0) + 1e-12 * my**2, 0.0, vy)
    return w @ (dx * dy) - mx * my, vx, vy


def centred(replicates: Array, value: float, most: float = np.inf) -> Array:
    """Replicates moved so that their mean is the estimate: resampling repeats rows, and ranks among repeated rows agree
    less than among distinct ones, a bias that an interval around the estimate must not carry. At most `most`."""
    if not len(replicates):
        return replicates
    return np.minimum(replicates - replicates.mean() + value, most)


def interval(replicates: Array, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval."""
    low, high = np.nanquantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spearman_brown(r: Array, k: float) -> Array:
    """Reliability of the mean of k measurements of reliability r."""
    return k * r / (1 + (k - 1) * r)


def reliability(runs: Array, correlation: Correlation = spearman) -> Array:
    """Of one run, query by query: the mean over pairs of runs of their correlation, (Q,). `runs` (R, S, Q), R >= 2.

    A query that a run measures as constant agrees with nothing: 0.
    """
    pairs = [np.nan_to_num(correlation(runs[a], runs[b])) for a in range(len(runs)) for b in range(a)]
    return np.mean(pairs, axis=0)


def ceiling(runs: Array, correlation: Correlation = spearman) -> float | None:
    """What a perfect method would reach against the mean of R noisy runs, mean_q √(Spearman–Brown of R, for q).

    Query by query, as the metric is: the root of a mean reliability would promise more than can be reached where
    queries differ in noise. None without repeats.
    """
    if len(runs) < 2:
        return None
    r = spearman_brown(np.clip(reliability(runs, correlation), 0, 1), len(runs))
    return float(np.sqrt(r).mean())


def average_precision(positive: NDArray[np.bool_], score: Array, counts: Array | None = None) -> float:
    """Σ (recall step) · precision, tied scores entering together: the order of ties does not matter."""
    c = np.ones(len(score)) if counts is None else counts
    order = np.argsort(-score, kind="stable")
    hits, seen = np.cumsum((c * positive)[order]), np.cumsum(c[order])
    last = np.append(np.diff(score[order]) != 0, True)
    hits, seen = hits[last], seen[last]
    with np.errstate(invalid="ignore"):
        precision = np.where(seen > 0, hits / np.maximum(seen, 1e-300), 0)
    return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])


def roc_auc(positive: NDArray[np.bool_], score: Array, counts: Array | None = None) -> float:
    """P(score of a positive > score of a negative) + ½ P(equal)."""
    c = np.ones(len(score)) if counts is None else np.asarray(counts, float)
    values, group = np.unique(score, return_inverse=True)
    p = np.bincount(group, c * positive, len(values))
    n = np.bincount(group, c * ~positive, len(values))
    below = np.cumsum(n) - n
    return float((p * (below + n / 2)).sum() / (p.sum() * n.sum()))


def found_in_first(positive: NDArray[np.bool_], score: Array, share: float, counts: Array | None = None) -> float:
    """Share of the positives among the first `share` of all rows; what ties at the edge counts in proportion."""
    c = np.ones(len(score)) if counts is None else np.asarray(counts, float)
    values, group = np.unique(-score, return_inverse=True)
    p, size = np.bincount(group, c * positive, len(values)), np.bincount(group, c, len(values))
    room = np.clip(share * size.sum() - (np.cumsum(size) - size), 0, size)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(size > 0, room / size, 0)
    return float((p * part).sum() / p.sum())


def stratified_counts(positive: NDArray[np.bool_], seed: int, number: int = RESAMPLES) -> NDArray[np.int64]:
    """Bootstrap counts (R, N) that keep the number of positives and of negatives."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((number, len(positive)), dtype=np.int64)
    for stratum in (np.flatnonzero(positive), np.flatnonzero(~positive)):
        counts[:, stratum] = rng.multinomial(len(stratum), np.full(len(stratum), 1 / len(stratum)), size=number)
    return counts
