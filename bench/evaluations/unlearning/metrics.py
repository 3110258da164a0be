"""How near an unlearned model is to a retrained one. Pure functions of what models say (`measure`)."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bench.evaluations.unlearning.measure import Measured, by_example, divergence
from bench.statistics import Array, roc_auc

Said = Mapping[str, Measured]  # by set: forget, retain, test, neighbours, nonmembers


def kl(gold: Measured, model: Measured) -> Array:
    """KL(gold; model) of each example (n,), mean over its scored tokens; gold first."""
    return by_example(divergence(gold.logp, model.logp), gold.row, len(gold.nll)).numpy()


def agreement(gold: Measured, model: Measured) -> Array:
    """Share of an example's predictions whose largest is gold's, (n,)."""
    same = (gold.logp.argmax(-1) == model.logp.argmax(-1)).double()
    return by_example(same, gold.row, len(gold.nll)).numpy()


def accuracy(said: Measured) -> Array:
    return said.correct.double().numpy()


def tow(model: Sequence[float], gold: Sequence[float]) -> float:
    """Tug of war: Π over forget, retain and test of 1 − |a(θ, S) − a(θ*, S)|, accuracies a as fractions, in [0, 1]
    (Zhao et al. 2024, RUM). It sees accuracies alone: a loss driven far beyond the gold's
    is not told from one that just flips the label."""
    return float(np.prod([1 - abs(a - b) for a, b in zip(model, gold, strict=True)]))


def mia_auc(members: Measured, others: Measured) -> float:
    """Area under the ROC of −loss as the sign of membership, members F, others never trained on: 1, still memorised;
    a gold's own area is the goal, which is 1/2 on random sets only."""
    scores = -torch.cat([members.loss, others.loss]).numpy()
    return roc_auc(np.arange(len(scores)) < len(members.loss), scores)


def ks(model: Measured, gold: Measured) -> float:
    """Two-sample Kolmogorov–Smirnov distance D of the margins; to be read beside that of two golds, since true
    retrainings differ too: a p would tell them apart from each other."""
    return two_samples(model.margin.numpy(), gold.margin.numpy())[0]


def two_samples(first: Array, second: Array) -> tuple[float, float]:
    """Kolmogorov–Smirnov distance and p: exact, or asymptotic where scipy cannot count that far."""
    from scipy.stats import ks_2samp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning)
        found = ks_2samp(first, second)
    return float(found.statistic), float(found.pvalue)


def distance(model: Mapping[str, Any], gold: Mapping[str, Any], start: Mapping[str, Any]) -> float:
    """‖θ − θ*‖ / ‖θ0 − θ*‖: an alarm of divergence and no rank, a true retraining is as far away as the original."""
    off = sum(float((model[name] - gold[name]).double().square().sum()) for name in gold)
    of = sum(float((start[name] - gold[name]).double().square().sum()) for name in gold)
    return float(np.sqrt(off / of))


def normalised(value: float, original: float, floor: float) -> float:
    """(m − original) / (floor − original): 0 for doing nothing, 1 for a retraining; NaN where both are one."""
    span = floor - original
    return float("nan") if abs(span) < 1e-9 else (value - original) / span


def against(said: Said, golds: Sequence[Said]) -> dict[str, Array | float]:
    """Every figure of a model, per example (n,) where it is a mean of examples. What compares with a gold is the mean
    over `golds`, the reference: who is judged must not be in it."""
    if not golds:
        raise ValueError("no gold model to compare with: a missing one is no reference")
    found: dict[str, Array | float] = {}
    for name in ("forget", "retain", "test", "neighbours"):
        found[f"{name}_accuracy"] = accuracy(said[name])
        found[f"{name}_loss"] = said[name].loss.numpy()
    for name in ("forget", "test", "retain"):
        found[f"kl_{name}"] = np.mean([kl(gold[name], said[name]) for gold in golds], axis=0)
    for name in ("forget", "test"):
        found[f"agreement_{name}"] = np.mean([agreement(gold[name], said[name]) for gold in golds], axis=0)
    found["tow"] = float(np.mean([tow(accuracies(said), accuracies(gold)) for gold in golds]))
    found["mia_auc"] = mia_auc(said["forget"], said["nonmembers"])
    found["mia_gap"] = found["mia_auc"] - float(np.mean([mia_auc(g["forget"], g["nonmembers"]) for g in golds]))
    found["ks_d"] = float(np.mean([ks(said["forget"], gold["forget"]) for gold in golds]))
    return found


def accuracies(said: Said) -> list[float]:
    return [float(accuracy(said[name]).mean()) for name in ("forget", "retain", "test")]
