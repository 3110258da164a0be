"""Statistics of agreement: rank and product-moment correlations, bootstrap, noise ceilings. Pure functions of arrays.

Columns are queries throughout: `x`, `y` (S, Q) hold S subsets, or S left-out examples, of Q queries.
"""

from collections.abc import Callable
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata
from scipy.stats import t as student

Array = NDArray[np.float64]
RESAMPLES = 1000
SPLITS = 20
PAIRS = 2**22  # of rows at a time: bounds the memory
CELLS = 2**16  # of ranks at a time: they stay in the cache
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
    """Rank correlation of each column, ties at their mean rank, (Q,). NaN where a column is constant."""
    return pearson(rankdata(_settled(x), axis=0), rankdata(_settled(y), axis=0))


def kendall(x: Array, y: Array) -> Array:
    """τ-b of each column, (concordant − discordant) / √(untied in x · untied in y) pairs of rows (Kendall 1945), (Q,).
    NaN where a column is constant. Signs of all pairs, one query at a time."""
    once = np.ones((1, len(x)), dtype=np.int64)
    x, y = _settled(x), _settled(y)
    return np.array([_tau(x[:, q], y[:, q], once)[0] for q in range(x.shape[1])])


def _tau(x: Array, y: Array, counts: NDArray[np.int64]) -> Array:
    """τ-b of x and y (S,) where row s is there `counts[r, s]` times, (R,): cᵀAc / √(cᵀXc · cᵀYc) over ordered pairs,
    A = sign(x_s − x_t) sign(y_s − y_t), X and Y its factors' absolute values. Integers, so exact while they fit."""
    exact = int(counts.sum(1).max(initial=0)) ** 2 < 2**24
    c: NDArray[np.floating] = counts.astype(np.float32 if exact else np.float64)
    untied_x, untied_y, agree = _untied(x, c), _untied(y, c), np.zeros(len(c))
    step = max(1, PAIRS // len(x))
    for at in range(0, len(x), step):
        part = slice(at, at + step)
        signs = (_signs(x, x[part]) * _signs(y, y[part])).astype(c.dtype)
        agree += ((c @ signs) * c[:, part]).sum(1, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((untied_x > 0) & (untied_y > 0), agree / np.sqrt(untied_x * untied_y), np.nan)


def _rho(x: Array, y: Array, counts: NDArray[np.int64]) -> Array:
    """Spearman of the columns of x and y (S, Q) where row s is there `counts[r, s]` times, (R, Q)."""
    orders = [(_order(a), _order(b)) for a, b in zip(x.T, y.T, strict=True)]
    found = np.zeros((len(counts), len(orders)))
    step = max(1, CELLS // len(x))
    for at in range(0, len(counts), step):
        c = np.ascontiguousarray(counts[at : at + step].T, dtype=float)
        for q, (by_x, by_y) in enumerate(orders):
            u, v = _midranks(*by_x, c), _midranks(*by_y, c)
            cu, cv = c * u, c * v
            cov, vx, vy = (np.einsum("sr,sr->r", *pair) for pair in ((cu, v), (cu, u), (cv, v)))
            with np.errstate(invalid="ignore", divide="ignore"):
                found[at : at + step, q] = np.where((vx > 0) & (vy > 0), cov / np.sqrt(vx * vy), np.nan)
    return found


def _order(x: Array) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of x (S,): its sorting order, where in it each group of equal values begins, and which group each row is in."""
    order = np.argsort(x, kind="stable")
    new = np.append(True, np.diff(x[order]) != 0)
    group = np.empty_like(order)
    group[order] = np.cumsum(new) - 1
    return order, np.flatnonzero(new), group


def _midranks(order: NDArray[np.int64], first: NDArray[np.int64], group: NDArray[np.int64], counts: Array) -> Array:
    """Twice the mid-ranks about their mean, (S, R), of what `_order` says of x, where row s is there `counts[s, r]`
    times: running sums in the order of x, so that nothing is sorted again."""
    from torch import from_numpy

    drawn = counts[order]
    if len(first) < len(order):
        drawn = np.add.reduceat(drawn, first, axis=0)
    ranks = from_numpy(drawn).cumsum(0).numpy()  # NumPy's running sum down columns takes five times as long
    drawn += ranks[-1]
    ranks *= 2
    ranks -= drawn
    return np.asarray(ranks[group])


def _signs(x: Array, z: Array) -> NDArray[np.int8]:
    """sign(x_s − z_t), (S, T)."""
    return (x[:, None] > z).view(np.int8) - (x[:, None] < z).view(np.int8)


def _untied(x: Array, counts: NDArray[np.floating]) -> Array:
    """Ordered pairs of rows of unequal x in each resample: n² − Σ over groups of equal x of their size², (R,)."""
    order = np.argsort(x, kind="stable")
    first = np.flatnonzero(np.append(True, np.diff(x[order]) != 0))
    if len(first) < len(x):
        counts = np.add.reduceat(counts[:, order], first, axis=1)
    return counts.sum(1, dtype=float) ** 2 - (counts**2).sum(1, dtype=float)


def _settled(x: Array) -> Array:
    """x with what varies in a column by rounding alone made equal: ranks would see an order in it."""
    return np.where(x.var(0) <= TINY * (x**2).mean(0), 0.0, x)


def slope(x: Array, y: Array, counts: Array | None = None) -> Array:
    """Least-squares slope of y on x of each column, (Q,): 1 for calibrated x and effects y. NaN where x is constant."""
    w = np.ones(len(x)) if counts is None else np.asarray(counts, float)
    w = (w / w.sum())[:, None]
    dx, dy = x - (w * x).sum(0), y - (w * y).sum(0)
    variance = (w * dx**2).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (w * dx * dy).sum(0) / variance
    return np.where(variance <= TINY * (w * x**2).sum(0), np.nan, found)


def intercept(x: Array, y: Array, counts: Array | None = None) -> Array:
    """Least-squares intercept of y on x of each column, ȳ − slope · x̄, (Q,): 0 for calibrated x. NaN as the slope's."""
    w = np.ones(len(x)) if counts is None else np.asarray(counts, float)
    w = (w / w.sum())[:, None]
    return (w * y).sum(0) - slope(x, y, counts) * (w * x).sum(0)


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
    """Replicates (R,) of the mean over queries of the `spearman`, `pearson` or `kendall` correlation, resampling rows
    and queries. A query whose correlation is undefined counts as 0: no information is a failure, not a gap.
    """
    if kind not in ("spearman", "pearson", "kendall"):
        raise ValueError(f"no correlation is called {kind!r}")
    row_counts, query_counts = resamples(x.shape[0], x.shape[1], seed, number)
    return _mean(_replicates(x, y, kind, row_counts), query_counts)


def bootstrap_slope(x: Array, y: Array, seed: int, number: int = RESAMPLES) -> Array:
    """Replicates (R,) of the mean over queries of the slope; an undefined one counts as 0."""
    row_counts, query_counts = resamples(x.shape[0], x.shape[1], seed, number)
    return _mean(_replicates(x, y, "slope", row_counts), query_counts)


def bootstrap_intercept(x: Array, y: Array, seed: int, number: int = RESAMPLES) -> Array:
    """Replicates (R,) of the mean over queries of the intercept, on the resamples of the slope; an undefined one counts
    as 0, which is also the best: read it beside the slope."""
    row_counts, query_counts = resamples(x.shape[0], x.shape[1], seed, number)
    return _mean(_replicates(x, y, "intercept", row_counts), query_counts)


def bootstrap_queries(values: Array, seed: int, number: int = RESAMPLES) -> Array:
    """Replicates (R,) of the mean of `values` (Q,), resampling queries only; NaN counts as 0."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=number)
    return _mean(np.nan_to_num(values), counts)


def bootstrap_parts(x: Array, y: Array, kind: str, seed: int, number: int = RESAMPLES) -> Array:
    """What moves a replicate of `kind` (a correlation, `slope`, `intercept`, or the `mean` of y), (3, R), each of mean
    0: resampled rows, resampled queries, and what only both do together. Linear in the values of queries: the parts of
    a difference of methods, or of a mean over seeds, are the difference or the mean of their parts. For `crossed`.

    Resampling n things spreads √((n − 1)/n) as far as drawing new ones, and an interval of a spread so estimated is
    t_{.975, n−1}/z_.975 as wide: the first two parts carry these factors.
    """
    row_counts, query_counts = resamples(x.shape[0], x.shape[1], seed, number)
    found = _replicates(x, y, kind, row_counts)
    once = np.ones((1, len(x)), dtype=np.int64)
    both, rows = _mean(found, query_counts), found.mean(1)
    queries = _mean(_replicates(x, y, kind, once)[0], query_counts)
    parts = np.stack([_wider(x.shape[0]) * rows, _wider(x.shape[1]) * queries, both - rows - queries])
    return parts - parts.mean(1, keepdims=True)


def crossed(parts: Array) -> Array:
    """Deviations (R,) of a mean from its expectation over new rows and new queries, of `bootstrap_parts` (3, R).

    Noise of a query's own is in each of the parts; a replicate that resamples both has all three, thrice the variance
    that it should have (Owen 2007, the pigeonhole bootstrap). V = V_rows + V_queries − V_together (Cameron, Gelbach &
    Miller 2011), at least the larger of the first two: the sum of the first two parts, scaled to this variance.
    """
    rows, queries, together = parts.var(1)
    if rows + queries == 0:
        return np.zeros(parts.shape[1])
    variance = max(rows + queries - together, rows, queries)
    return (parts[0] + parts[1]) * np.sqrt(variance / (rows + queries))


def around(replicates: Array, value: float) -> Array:
    """Replicates (R,) of a value, from what is stored of it: themselves, or the parts (3, R) of a crossed bootstrap."""
    return value + crossed(replicates) if replicates.ndim == 2 else replicates


def _wider(n: int) -> float:
    """√(n/(n − 1)) t_{.975, n−1}/z_.975; 1 where one thing says nothing of a spread."""
    return float(np.sqrt(n / (n - 1)) * student.ppf(0.975, n - 1) / norm.ppf(0.975)) if n > 1 else 1.0


def _mean(found: Array, query_counts: NDArray[np.int64]) -> Array:
    """Mean over resampled queries, (R,), of values (R, Q), or (Q,) in every resample."""
    return (found * query_counts).sum(1) / query_counts.sum(1)


def _replicates(x: Array, y: Array, kind: str, counts: NDArray[np.int64]) -> Array:
    """The statistic of each query in each resample of rows, (R, Q); 0 where it is undefined."""
    if kind == "kendall":
        pairs = zip(_settled(x).T, _settled(y).T, strict=True)
        return np.nan_to_num(np.stack([_tau(a, b, counts) for a, b in pairs], 1))
    if kind == "spearman":
        return np.nan_to_num(_rho(_settled(x), _settled(y), counts))
    if kind == "mean":
        return np.asarray(counts @ y / counts.sum(1, keepdims=True))
    cov, vx, vy = _moments(x, y, counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        if kind == "pearson":
            return np.where((vx > 0) & (vy > 0), cov / np.sqrt(vx * vy), 0.0)
        slopes = np.where(vx > 0, cov / vx, 0.0)
    if kind == "slope":
        return slopes
    if kind != "intercept":
        raise ValueError(f"no statistic is called {kind!r}")
    w = counts / counts.sum(1, keepdims=True)
    return np.where(vx > 0, w @ y - slopes * (w @ x), 0.0)


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


def paired_difference(
    a: Array, b: Array, value_a: float | None = None, value_b: float | None = None, level: float = 0.95
) -> tuple[float, float, float, float]:
    """(difference, low, high, p) of two values by their replicates a, b (R,) of the same resamples; the values are the
    replicates' means unless given. d* = a − b, moved to the difference d of the values as `centred` does:
    the percentile interval, and p = 2 min((1 + #{d* ≤ 0}), (1 + #{d* ≥ 0})) / (R + 1), at most 1.

    Where no replicate lies beyond 0, counting cannot tell how small p is, and the correction for many tests would leave
    nothing significant: there p is that of a normal distribution of their spread, if it is smaller.
    """
    if a.shape != b.shape:
        raise ValueError(f"replicates of the same resamples have one shape, not {a.shape} and {b.shape}")
    difference = float((a.mean() if value_a is None else value_a) - (b.mean() if value_b is None else value_b))
    moved = centred(a - b, difference)
    zero = 1e-12 * np.abs(moved).max()  # what rounding leaves of an equal pair
    tail = min((moved <= zero).sum(), (moved >= -zero).sum())
    p = min(1.0, 2 * (1 + tail) / (len(moved) + 1))
    if tail == 0:
        spread = float(moved.std())
        p = min(p, 2 * float(norm.sf(abs(difference) / spread)) if spread > 0 else float(difference == 0))
    return difference, *interval(moved, level), p


def holm(p: Array) -> Array:
    """Adjusted p-values of m tests, max over j ≤ i of (m − j + 1) p_(j) in ascending order, at most 1 (Holm 1979)."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]), 1)
    return adjusted


def spearman_brown(r: Array, k: float) -> Array:
    """Reliability of the mean of k measurements of reliability r."""
    return k * r / (1 + (k - 1) * r)


def reliability(runs: Array, correlation: Correlation = spearman) -> Array:
    """Of one run, query by query: the mean over pairs of runs of their correlation, (Q,). `runs` (R, S, Q), R >= 2.

    A query that a run measures as constant agrees with nothing: 0.
    """
    pairs = [np.nan_to_num(correlation(runs[a], runs[b])) for a in range(len(runs)) for b in range(a)]
    return np.mean(pairs, axis=0)


def split_half(runs: Array, correlation: Correlation = spearman, seed: int = 0) -> Array:
    """Reliability of the mean of R >= 2 runs (R, S, Q), query by query, (Q,): the mean over splits into halves of
    h = ⌊R/2⌋ runs of the correlation of the halves' means, corrected by Spearman–Brown from h to R.

    Over all splits, or 20 where there are more. A half that is constant agrees with nothing: 0. At least -1, which the
    correction of opposed halves would fall below.
    """
    half = len(runs) // 2
    total = comb(len(runs), half) * comb(len(runs) - half, half) // 2
    rng = np.random.default_rng(seed)
    splits: dict[frozenset[frozenset[int]], None] = {}
    while len(splits) < min(total, SPLITS):
        order = rng.permutation(len(runs)).tolist()
        splits[frozenset((frozenset(order[:half]), frozenset(order[half : 2 * half])))] = None
    means = [[runs[sorted(part)].mean(0) for part in split] for split in splits]
    found = np.mean([np.nan_to_num(correlation(one, other)) for one, other in means], axis=0)
    k = len(runs) / half
    return spearman_brown(np.maximum(found, -1 / (2 * k - 1)), k)


def ceilings(runs: Array, correlation: Correlation = spearman) -> Array:
    """What a perfect method would reach on each query against the mean of R >= 2 noisy runs (R, S, Q):
    √(Spearman–Brown of R of its `reliability`, 0 at least), (Q,).

    Within .01 from a reliability of .5 on; of .2, by 50 rows, it is .04 too low (the root of a noisy number is below
    the root of its mean). By `split_half` it would be the same for 2 and 3 runs, and less than .03 nearer for more.
    """
    return np.sqrt(spearman_brown(np.clip(reliability(runs, correlation), 0, 1), len(runs)))


def ceiling(runs: Array, correlation: Correlation = spearman) -> float | None:
    """Mean over queries of their `ceilings`; None without repeats.

    Query by query, as the metric is: the root of a mean reliability would promise more than can be reached where
    queries differ in noise.
    """
    return float(ceilings(runs, correlation).mean()) if len(runs) >= 2 else None


def top_overlap(x: Array, y: Array, k: int) -> Array:
    """Share of the k rows of highest x that are among the k rows of highest y, of each column, (Q,); k/S by chance.

    Rows that tie at the edge are in the first k with equal probability, drawn for x and for y independently, and the
    share is the expected one: a constant column has k/S, and a column compared with itself less than 1 where it ties.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f"{k} of {len(x)} rows")
    return (_among_first(x, k) * _among_first(y, k)).sum(0) / k


def _among_first(x: Array, k: int) -> Array:
    """Probability of each row to be among the k highest of its column, ties in random order, (S, Q)."""
    x = _settled(x)
    edge = np.partition(x, len(x) - k, axis=0)[len(x) - k]
    above, tied = x > edge, x == edge
    return above + tied * ((k - above.sum(0)) / tied.sum(0))


def removal_area(fractions: Array, effect: Array) -> Array:
    """Mean height of a removal curve, from nothing removed (effect 0) to the largest of the removed `fractions` (K,),
    ascending: its area by trapezoids over the largest fraction. `effect` (K,) or (K, Q) is that of removing the highest
    scored minus that of removing as many at random; a number, or (Q,).
    """
    at = np.concatenate([[0.0], fractions])
    if not (np.diff(at) > 0).all():
        raise ValueError(f"fractions ascend from above 0, unlike {list(fractions)}")
    curve = np.concatenate([np.zeros_like(effect[:1], dtype=float), effect])
    return np.diff(at) @ (curve[1:] + curve[:-1]) / (2 * at[-1])


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


def specificity_at(positive: NDArray[np.bool_], score: Array, recall: float, counts: Array | None = None) -> float:
    """True negative rate at the true positive rate `recall`: share of the negatives that come after the first `recall`
    of the positives, highest score first; what ties at the edge counts in proportion."""
    c = np.ones(len(score)) if counts is None else np.asarray(counts, float)
    values, group = np.unique(-score, return_inverse=True)
    p, n = np.bincount(group, c * positive, len(values)), np.bincount(group, c * ~positive, len(values))
    room = recall * p.sum() - (np.cumsum(p) - p)  # positives that are still asked for where the group begins
    room = np.where(room > 1e-9 * p.sum(), room, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(p > 0, np.minimum(room / p, 1), room > 0)
    return float(1 - (n * part).sum() / n.sum())


def stratified_counts(positive: NDArray[np.bool_], seed: int, number: int = RESAMPLES) -> NDArray[np.int64]:
    """Bootstrap counts (R, N) that keep the number of positives and of negatives."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((number, len(positive)), dtype=np.int64)
    for stratum in (np.flatnonzero(positive), np.flatnonzero(~positive)):
        counts[:, stratum] = rng.multinomial(len(stratum), np.full(len(stratum), 1 / len(stratum)), size=number)
    return counts
