"""What needs no idea of influence, and often wins: every table carries these."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Method, Problem, require_eval
from methods.gradients.blocks import blocks_of, with_rows_in_use
from methods.gradients.per_example import gradients, norms, plain
from tasks.base import Examples, Task


@dataclass(frozen=True)
class Random(Method):
    """Standard normal scores and values, seeded by the run."""

    signed = False

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        # One draw an id: a query's scores do not depend on which others are asked.
        rows = [
            torch.randn(len(problem.train), generator=problem.generator("random", i), dtype=torch.float64)
            for i in queries.ids
        ]
        return torch.stack(rows)

    def value(self, problem: Problem) -> Tensor:
        return torch.randn(len(problem.train), generator=problem.generator("random"), dtype=torch.float64)


@dataclass(frozen=True)
class Loss(Method):
    """value(i) = −ℓ(i): what the model finds hard is suspicious."""

    def value(self, problem: Problem) -> Tensor:
        model = problem.model()
        require_eval(model)
        values = torch.empty(len(problem.train), dtype=torch.float64)
        with torch.no_grad():
            for index in problem.train.batches(256):
                values[index] = -problem.task.loss(model, problem.train.batch(index).to(problem.device)).double().cpu()
        return values


@dataclass(frozen=True)
class GradNorm(Method):
    """value(i) = −‖∇ℓ(i)‖."""

    modules: tuple[str, ...] | None = None

    def value(self, problem: Problem) -> Tensor:
        model = problem.model()
        blocks = with_rows_in_use(problem.task, model, blocks_of(model, self.modules), [problem.train])
        values = torch.empty(len(problem.train), dtype=torch.float64)
        for index, found in gradients(problem.task, model, problem.train, blocks, problem.task.objective.loss):
            problem.meter.gradients += len(index)
            values[index] = -norms(plain(found))
        return values


@dataclass(frozen=True)
class SameLabel(Method):
    """score(q, i) = 1 where the labels agree, else 0."""

    needs = frozenset({"labels"})

    def unmet(self, task: Task) -> str | None:
        return label_is_an_order(task) or super().unmet(task)

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        return (queries.targets[:, None] == problem.train.targets[None, :]).double()


@dataclass(frozen=True)
class TfIdf(Method):
    """score(q, i) = ± cosine of the TF-IDF vectors of the two texts: + where the labels agree, − where they do not."""

    needs = frozenset({"texts", "labels"})

    def unmet(self, task: Task) -> str | None:
        return label_is_an_order(task) or super().unmet(task)

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        from sklearn.feature_extraction.text import TfidfVectorizer

        assert problem.train.texts is not None and queries.texts is not None
        vectorizer = TfidfVectorizer(token_pattern=r"\S+")
        training = vectorizer.fit_transform(problem.train.texts)
        similarity = torch.as_tensor((vectorizer.transform(queries.texts) @ training.T).toarray())
        agree = queries.targets[:, None] == problem.train.targets[None, :]
        return torch.where(agree, similarity, -similarity)


def label_is_an_order(task: Task) -> str | None:
    """Why labels of two examples cannot be compared: of a pair of answers it says which one was preferred, and they
    stand in random order."""
    if task.pairs:
        return f"compares labels, which in task={task.name} say which of two answers in random order was preferred"
    return None
