"""Planted label errors: which labels are flipped, and to what."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.base import Annotations, named_seed
from tasks.errors import UserError, require

KINDS = ("uniform", "one_class", "hard")


@dataclass(frozen=True)
class Corruption:
    """`rate` of the *whole training set* gets a wrong label.

    uniform    rows at random, the new label uniform among the wrong ones
    one_class  only rows of class 1 (for sentiment: positive called negative), new label as above
    hard       the rows that a bag-of-features logistic regression, cross-fitted on clean labels, finds most ambiguous
               (smallest gap between its two likeliest classes); the new label is its likeliest wrong one
    """

    rate: float
    kind: str

    def __post_init__(self) -> None:
        require(0 <= self.rate < 1, "task.corruption.rate", self.rate, "0 <= rate < 1")
        if self.kind not in KINDS:
            raise UserError("task.corruption.kind", self.kind, allowed=KINDS)

    def apply(
        self, ids: Sequence[str], labels: np.ndarray, classes: int, features: object, seed: int
    ) -> tuple[np.ndarray, Annotations]:
        """Returns the labels to train on and what the judge knows. `features`: (N, F) array or sparse matrix."""
        labels = np.asarray(labels)
        rng = np.random.default_rng(named_seed("corruption", seed))
        n_flips = round(self.rate * len(labels))
        wrong = (labels + rng.integers(1, classes, len(labels))) % classes
        candidates = np.arange(len(labels))
        if self.kind == "one_class":
            candidates = np.flatnonzero(labels == 1)
            require(
                n_flips <= len(candidates),
                "task.corruption.rate",
                self.rate,
                f"at most {len(candidates) / len(labels):.3f} with kind=one_class (that class has no more rows)",
            )
        if self.kind == "hard" and n_flips:
            probabilities = _cross_fitted(features, labels, classes)
            ranked = np.sort(probabilities, axis=1)
            order = np.argsort(ranked[:, -1] - ranked[:, -2], kind="stable")
            masked = probabilities.copy()
            masked[np.arange(len(labels)), labels] = -1
            wrong, rows = masked.argmax(1), order[:n_flips]
        else:
            rows = rng.permutation(candidates)[:n_flips]
        corrupted = labels.copy()
        corrupted[rows] = wrong[rows]
        return corrupted, Annotations(
            flipped=frozenset(ids[i] for i in rows),
            clean={i: int(y) for i, y in zip(ids, labels, strict=True)},
        )


def _cross_fitted(features: object, labels: np.ndarray, classes: int) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    present, coded = np.unique(labels, return_inverse=True)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    model = LogisticRegression(max_iter=1000)
    found = cross_val_predict(model, features, coded, cv=folds, method="predict_proba")
    probabilities = np.zeros((len(labels), classes))
    probabilities[:, present] = found
    return probabilities
