"""What a user reads first: which training rows are suspicious and why, and which rows a query's answer rests on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from bench.statistics import Array
from methods.base import Method, Problem
from tasks.base import Examples, Task, Trajectory, sides
from tasks.training.train import load

SHOWN = 5  # proponents, and opponents, of a query
ANSWER = "its answer"  # the label of a text that is continued
CHOSEN = "chosen"  # of a pair: the first and second answer of an example are a matter of this program


@dataclass(frozen=True)
class Said:
    """What the explained model says of some rows, as text, and how probable it finds their own labels (N,)."""

    predicted: tuple[str, ...]
    probability: Array | None = None  # of regressions: none
    error: Array | None = None  # |prediction − target| of regressions


def said(task: Task, trajectory: Trajectory, examples: Examples) -> Said:
    model = load(task.initial(trajectory.seed), trajectory.final)
    if examples.targets.ndim > 1:
        return said_of_answers(task, model, examples)
    with torch.no_grad():
        index = examples.batches(256)
        outputs = torch.cat([task.outputs(model, examples.batch(i)) for i in index])[torch.argsort(torch.cat(index))]
    if examples.targets.is_floating_point():
        numbers = outputs.reshape(len(examples)).double()
        error = (numbers - examples.targets.double()).abs().numpy()
        return Said(tuple(f"{x:.4g}" for x in numbers.tolist()), error=error)
    own = outputs.double().softmax(-1).gather(1, examples.targets[:, None])[:, 0]
    if task.pairs:
        agrees = outputs.argmax(-1) == examples.targets
        return Said(tuple(CHOSEN if yes else "rejected" for yes in agrees.tolist()), probability=own.numpy())
    return Said(tuple(named(task, outputs.argmax(-1))), probability=own.numpy())


def said_of_answers(task: Task, model: nn.Module, examples: Examples) -> Said:
    """Of answers of several tokens: whether each token is the most probable one, and how probable all are together."""
    right, probability = torch.zeros(len(examples), dtype=torch.bool), torch.zeros(len(examples), dtype=torch.float64)
    with torch.no_grad():
        for index in examples.batches(256):
            batch = examples.batch(index)
            outputs = task.outputs(model, batch)
            right[index] = task.objective.correct(outputs, batch.targets)
            probability[index] = (-task.objective.loss(outputs, batch.targets)).double().exp()
    return Said(tuple(ANSWER if yes else "another" for yes in right.tolist()), probability=probability.numpy())


def named(task: Task, targets: torch.Tensor) -> list[str]:
    """Targets as the user wrote them: names of classes where the task has them."""
    if targets.ndim > 1 or task.pairs:
        return [CHOSEN if task.pairs else ANSWER] * len(targets)
    if targets.is_floating_point():
        return [f"{y:.4g}" for y in targets.tolist()]
    return [task.classes[y] if task.classes else str(y) for y in targets.tolist()]


def ranked(task: Task, trajectory: Trajectory, helps: Array, by: str) -> pd.DataFrame:
    """All training rows, with their lines in the user's file, most suspicious first: lowest `helps` (N,), a value or a
    mean attribution to `val`, of the method that `by` names."""
    train, n = task.train, len(task.train)
    found, labels = said(task, trajectory, train), named(task, task.train.targets)
    order = np.argsort(helps, kind="stable")
    why = []
    for rank, i in enumerate(order, start=1):
        if task.pairs and found.probability is not None:
            p = found.probability[i]
            model = f"the model prefers the {found.predicted[i]} answer (the chosen one with p = {p:.2g})"
        elif found.probability is not None:
            verb = "agrees" if found.predicted[i] == labels[i] else f"says {found.predicted[i]}"
            model = f"the model {verb} (its own label: p = {found.probability[i]:.2g})"
        else:
            assert found.error is not None
            model = f"the model says {found.predicted[i]} (off by {found.error[i]:.2g})"
        why.append(f"{rank} of {n} by {by}; {model}")
    columns = {
        "id": [train.ids[i] for i in order],
        **({"row": [task.places[train.ids[i]] for i in order]} if task.places else {}),
        "score": helps[order],
        "label": [labels[i] for i in order],
        "predicted": [found.predicted[i] for i in order],
        "why": why,
    }
    return pd.DataFrame({**columns, **_texts(task, train, order, "text")})


def suspects(problem: Problem, method: Method) -> pd.DataFrame:
    """All training rows, most suspicious first by the method's value or, without one, its mean attribution to val."""
    name, val = type(method).__name__, problem.task.splits["val"]
    if method.offers("value") or not len(val):
        return ranked(problem.task, problem.trajectory(), method.value(problem).numpy(), name)
    helps = method.attribute(problem, val).mean(0).numpy()
    return ranked(problem.task, problem.trajectory(), helps, f"{name}, mean over val")


def influence(task: Task, trajectory: Trajectory, queries: Examples, scores: Array) -> pd.DataFrame:
    """For each query of `scores` (Q, N) the training rows that helped most and those that harmed most, a line each."""
    train = task.train
    asked, predicted = named(task, queries.targets), said(task, trajectory, queries).predicted
    labels, lines = named(task, train.targets), []
    for q, row in enumerate(scores):
        order = np.argsort(-row, kind="stable")
        few = min(SHOWN, len(order))
        for kind, chosen in {"proponent": order[:few], "opponent": order[::-1][:few]}.items():
            for rank, i in enumerate(chosen, start=1):
                line: dict[str, object] = {"query": queries.ids[q], "label": asked[q], "predicted": predicted[q]}
                line.update(kind=kind, rank=rank, train=train.ids[i])
                if task.places:
                    line.update(train_row=task.places[train.ids[i]])
                line.update(score=row[i], train_label=labels[i])
                texts = {**_text(task, queries, q, "query_text"), **_text(task, train, i, "train_text")}
                lines.append({**line, **texts})
    return pd.DataFrame(lines)


def _texts(task: Task, examples: Examples, rows: Sequence[int] | np.ndarray, name: str) -> Mapping[str, list[str]]:
    if examples.texts is None or not task.show_text:
        return {}
    if not task.pairs:
        return {name: [examples.texts[i] for i in rows]}
    prefix = name.removesuffix("text")
    parts = [sides(examples.texts[i]) for i in rows]
    first_chosen = [int(examples.targets[i]) == 0 for i in rows]
    return {
        f"{prefix}prompt": [prompt for prompt, _, _ in parts],
        f"{prefix}chosen": [a if yes else b for (_, a, b), yes in zip(parts, first_chosen, strict=True)],
        f"{prefix}rejected": [b if yes else a for (_, a, b), yes in zip(parts, first_chosen, strict=True)],
    }


def _text(task: Task, examples: Examples, row: int, name: str) -> dict[str, str]:
    return {key: texts[0] for key, texts in _texts(task, examples, [row], name).items()}
