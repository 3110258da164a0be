"""Metrics of question and answer texts (TOFU, Maini et al. 2024), where paraphrases and wrong answers are at hand."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.evaluations.unlearning.base import Context, Parameters
from bench.evaluations.unlearning.measure import Measured, measured
from bench.evaluations.unlearning.metrics import two_samples
from bench.statistics import Array
from tasks.base import Examples

LEAST_ROWS, LEAST_PARAPHRASE = 80, 0.5
SPLITS = ("paraphrase", "perturbed")


def base_ids(examples: Examples, known: Sequence[str]) -> list[str]:
    """The training row that each belongs to: its own id, or what stands before the last slash."""
    there = set(known)
    return [i if i in there else i.rpartition("/")[0] for i in examples.ids]


def truth_ratios(
    right: Measured, right_ids: Sequence[str], wrong: Measured, wrong_ids: Sequence[str]
) -> dict[str, float]:
    """Geometric variant: (Π_k P(wrong_k)^{1/n_k})^{1/K} / P(paraphrase)^{1/n}, by the training row's id, paired by id.
    The arithmetic mean of the wrong answers gives another number."""
    perturbed: dict[str, list[float]] = defaultdict(list)
    for name, loss in zip(wrong_ids, wrong.loss.tolist(), strict=True):
        perturbed[name].append(loss)
    pairs = zip(right_ids, right.loss.tolist(), strict=True)
    return {name: float(np.exp(loss - np.mean(perturbed[name]))) for name, loss in pairs if name in perturbed}


def of_rows(ratios: Mapping[str, float], rows: Sequence[str]) -> Array:
    """(n,), NaN where a row has none."""
    return np.array([ratios.get(i, np.nan) for i in rows])


def invalid(paraphrased: float, rows: int) -> str | None:
    """Why forget quality would say nothing here; None where it may be printed."""
    if paraphrased <= LEAST_PARAPHRASE:
        return f"forget quality: the original answers {paraphrased:.2f} of the paraphrases, more than .5 are needed"
    if rows < LEAST_ROWS:
        return f"forget quality: {rows} forgotten questions with wrong answers, {LEAST_ROWS} are needed"
    return None


def forget_quality(model: Array, gold: Array) -> float:
    """p of the two-sample Kolmogorov–Smirnov test on the truth ratios of F."""
    return two_samples(model[~np.isnan(model)], gold[~np.isnan(gold)])[1]


def utility(parts: Sequence[float]) -> float:
    """Harmonic mean; 0 where one of them is."""
    return 0.0 if min(parts) <= 0 else len(parts) / sum(1 / part for part in parts)


def utility_parts(said: Measured, ratios: Array) -> list[float]:
    """Of one set: mean P(answer)^{1/n}, share answered rightly, and mean max(0, 1 − truth ratio) where it is known."""
    found = [float((-said.loss).exp().mean()), float(said.correct.double().mean())]
    known = ratios[~np.isnan(ratios)]
    return [*found, float(np.maximum(0, 1 - known).mean())] if len(known) else found


def judged(
    context: Context, facts: Mapping[str, Any], states: Mapping[str, Parameters], judge: str
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Of each model: the mean truth ratio of F, the model utility over retained rows and over facts of the world (a
    collapse alarm), and forget quality against a gold (of "own" against `judge`) where it says something; and what was
    left out, and why."""
    task, ids = context.task, context.task.train.ids
    if not all(name in task.splits and len(task.splits[name]) for name in SPLITS):
        return {}, {"left_out": "truth ratio, model utility, forget quality: no paraphrases and no wrong answers here"}
    world = [i for i in context.retain_rows if ids[i] in facts and facts[ids[i]].kind == "world"]
    own = sorted(set(context.retain_rows) - set(world))
    found: dict[str, dict[str, float]] = {}
    ratios: dict[str, Array] = {}
    paraphrased = 0.0
    for name, parameters in states.items():
        model = context.network(parameters)
        right, wrong = (measured(task, model, task.splits[split]) for split in SPLITS)
        ratio = truth_ratios(right, base_ids(task.splits[SPLITS[0]], ids), wrong, base_ids(task.splits[SPLITS[1]], ids))
        ratios[name] = of_rows(ratio, [ids[i] for i in context.rows])
        parts: list[float] = []
        for rows in filter(None, (own, world)):
            parts += utility_parts(
                measured(task, model, task.train.select(rows)), of_rows(ratio, [ids[i] for i in rows])
            )
        found[name] = {"truth_ratio": float(np.nanmean(ratios[name])), "model_utility": utility(parts)}
        if name == "original":
            paraphrased = float(right.correct.double().mean())
    known = int(np.isfinite(ratios["original"]).sum())
    why = invalid(paraphrased, known)
    if why is None:
        for name, ratio_of_set in ratios.items():
            gold = ratios[judge if name == "own" else "gold_2" if name == "gold_1" else "gold_1"]
            found[name]["forget_quality"] = forget_quality(ratio_of_set, gold)
    ratio_is = f"geometric mean of P(wrong answer) over P(paraphrase), each to the power 1/tokens; of {known} rows"
    said = {"truth_ratio": ratio_is}
    return found, {**said, **({} if why is None else {"left_out": why})}
