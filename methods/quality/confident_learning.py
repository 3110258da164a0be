"""Confident learning: models that never saw a row say which label it should have."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Method, Problem, Unsupported
from tasks.base import Task, named_seed
from tasks.errors import require
from tasks.training.plan import Plan
from tasks.training.predictions import per_class

SLACK = 1e-6  # a mean of equal probabilities is one of them only up to rounding


@dataclass(frozen=True)
class ConfidentLearning(Method):
    """value(i) = p_y − max_{c ≠ y} p_c, less 2 where the row counts as mislabelled, so that these come first
    (Northcutt et al. 2021, eq. 1 and 2: the off-diagonal of the confident joint; the normalised margin ranks)

    p(c | x) comes from the model of the fold that holds the row out: the task's own recipe, trained on the other
    `folds` − 1 of `folds` folds, which are equal in labels. t_c is the mean of p(c | x) over rows labelled c. A row is
    mislabelled if, of the classes with p_c >= t_c, the most probable one is not its label.
    """

    folds: int
    needs = frozenset({"labels", "retraining"})

    def __post_init__(self) -> None:
        require(self.folds >= 2, "method.folds", self.folds, "2 or more")

    def unmet(self, task: Task) -> str | None:
        if (lacking := super().unmet(task)) is not None:
            return lacking
        rows = len(task.train)
        require(self.folds <= rows, "method.folds", self.folds, f"2 to {rows}, the training rows")
        if len(task.train.targets.unique()) < 2:
            return f"needs two classes; all training rows of task={task.name} have one label"
        return None

    def retrainings(self, task: Task) -> int:
        return self.folds

    def value(self, problem: Problem) -> Tensor:
        classes, labels = problem.train.targets.unique(return_inverse=True)
        return quality(self.probabilities(problem, classes), labels)

    def probabilities(self, problem: Problem, classes: Tensor) -> Tensor:
        """p (N, C) of each row under the model that did not see it.

        A margin m = z_c − logsumexp(z_k, k ≠ c) is the log-odds of c: p(c | x) = σ(m of x with the target c).
        """
        rows, name = problem.train, ("confident learning", problem.seed, *problem.where)
        fold = folds_of(rows.ids, rows.targets.tolist(), self.folds, *name)
        kept = (fold[None] != torch.arange(self.folds)[:, None]).double()
        plan = Plan(kept, tuple(named_seed(*name, k) for k in range(self.folds)), own_batches=True)
        margins = problem.retrained(plan, per_class(rows, classes)).view(self.folds, len(rows), len(classes))
        own = margins[fold, torch.arange(len(rows))]
        if not own.isfinite().all():
            raise Unsupported("a training on all folds but one diverged")
        return own.sigmoid()


def folds_of(ids: Sequence[str], labels: Sequence[int], folds: int, *name: object) -> Tensor:
    """The fold of each row, (N,): each label dealt out evenly, in an order drawn by id, so that the order of the rows
    means nothing."""
    order = sorted(range(len(ids)), key=lambda i: (labels[i], named_seed(*name, ids[i])))
    fold = torch.empty(len(ids), dtype=torch.long)
    fold[torch.tensor(order)] = torch.arange(len(ids)) % folds
    return fold


def mislabelled(p: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: the most probable of the classes with p_c >= t_c is not the label, p (N, C)."""
    own = torch.nn.functional.one_hot(labels, p.shape[1]).double()
    thresholds = (own * p).sum(0) / own.sum(0)
    confident = p >= thresholds - SLACK
    guess = torch.where(confident, p, -1.0).argmax(1)
    return confident.any(1) & (guess != labels)


def quality(p: Tensor, labels: Tensor) -> Tensor:
    """p_y − max_{c ≠ y} p_c, in [−1, 1], less 2 where `mislabelled`."""
    chosen = labels[:, None]
    margin = p.gather(1, chosen)[:, 0] - p.scatter(1, chosen, -1.0).amax(1)
    return margin - 2.0 * mislabelled(p, labels)
