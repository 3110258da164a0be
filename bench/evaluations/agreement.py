"""What evaluations share: how well predictions agree with noisy measurements, as metrics with interval and ceiling."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.evaluations.base import Metric
from bench.statistics import (
    Array,
    Correlation,
    bootstrap_parts,
    bootstrap_queries,
    ceilings,
    intercept,
    kendall,
    pearson,
    slope,
    spearman,
    split_half,
    top_overlap,
)
from tasks.base import digest

CORRELATIONS: dict[str, Correlation] = {"spearman": spearman, "pearson": pearson, "kendall": kendall}
TOP = 0.1  # share of the rows whose overlap is reported


def truth_of(settings: Mapping[str, Any], explained: int) -> dict[str, Any]:
    """What a truth says of itself: under `fixed` it belongs to the explained seed, and repeating changes nothing."""
    if settings["regime"] != "fixed":
        return dict(settings)
    return {**{k: v for k, v in settings.items() if k != "repeats"}, "explained_seed": explained}


def seed_of(truth: Mapping[str, Any]) -> int:
    """Of the resamples: one truth, one seed, so that differences between methods are paired."""
    return int(digest(dict(truth))[:8], 16)


def correlated(
    predicted: Array, runs: Array, name: str, truth: Mapping[str, Any], nan: int, noisy: bool = True
) -> Metric:
    """Mean over queries of the correlation of `predicted` (S, Q) with the mean of the repeats of `runs` (R, S, Q).

    An undefined correlation counts as 0, and is counted.
    """
    actual = runs.mean(0)
    found = CORRELATIONS[name](predicted, actual)
    by_query = {"value": np.nan_to_num(found)}
    if noisy and len(runs) > 1:
        by_query["reliability"] = split_half(runs, CORRELATIONS[name])
        by_query["ceiling"] = ceilings(runs, CORRELATIONS[name])
    return Metric(
        value=float(by_query["value"].mean()),
        replicates=bootstrap_parts(predicted, actual, name, seed_of(truth)),
        n=len(found),
        nan=max(nan, int(np.isnan(found).sum())),
        truth=dict(truth),
        ceiling=float(by_query["ceiling"].mean()) if "ceiling" in by_query else None,
        by_query=by_query,
    )


def effects_metrics(
    prefix: str,
    predicted: Array,
    effects: Array,
    truth: Mapping[str, Any],
    *,
    calibrated: bool,
    nan: int,
    noisy: bool,
) -> dict[str, Metric]:
    """Predicted effects (n, Q) of taking something away against measured ones (R, n, Q): correlations, the overlap of
    the largest tenth, and for calibrated methods slope and intercept of measured on predicted."""
    actual, seed = effects.mean(0), seed_of(truth)
    metrics = {
        f"{prefix}_{name}": correlated(predicted, effects, name, truth, nan, noisy) for name in ("pearson", "spearman")
    }
    top = max(1, round(TOP * len(actual)))
    shared = top_overlap(predicted, actual, top)
    metrics[f"{prefix}_top10"] = Metric(
        float(shared.mean()), bootstrap_queries(shared, seed), len(shared), dict(truth), nan=nan
    )
    if calibrated:
        for name, (fit, better) in {"slope": (slope, "one"), "intercept": (intercept, None)}.items():
            metrics[f"{prefix}_{name}"] = Metric(
                value=float(np.nan_to_num(fit(predicted, actual)).mean()),
                replicates=bootstrap_parts(predicted, actual, name, seed),
                n=predicted.shape[1],
                nan=nan,
                truth=dict(truth),
                better=better,
            )
    return metrics
