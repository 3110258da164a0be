"""Unlearning: does the model after an update behave as one that never saw the forget set?"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.evaluations.agreement import seed_of
from bench.evaluations.base import Case, Metric, NotApplicable, Unfit
from bench.evaluations.unlearning import language
from bench.evaluations.unlearning.base import Context, Parameters, Unlearned, Unlearner, moved
from bench.evaluations.unlearning.forget import Forget, Forgotten, checked
from bench.evaluations.unlearning.gold import Golds, control, retrained
from bench.evaluations.unlearning.iterated_newton import loss_of
from bench.evaluations.unlearning.masks import Mask, NoMask
from bench.evaluations.unlearning.matched import matched, unit
from bench.evaluations.unlearning.measure import measured, strangers
from bench.evaluations.unlearning.metrics import Said, against, distance, normalised
from bench.evaluations.unlearning.neighbours import nearest
from bench.evaluations.unlearning.tuning import tuned
from bench.statistics import Array, bootstrap_queries
from methods.base import Method
from tasks.base import Examples, Task
from tasks.errors import UserError, require

MAIN = ("tow", "kl_forget")  # normalised between the original and the floor
ANCHORS = (  # label, whose figures, the golds that judge them: who is judged is none of them
    ("retrain (floor)", "gold_2", ("gold_1",)),
    ("retrain, new initialisation", "gold_3", ("gold_1", "gold_2")),
    ("original", "original", ("gold_1", "gold_2")),
)
SAME = 1e-6  # relative: a forget loss that changed less did not change
Figures = Mapping[str, Array | float]


@dataclass(frozen=True)
class Unlearning:
    """The explained model θ0 was trained on D = F + R. `unlearner` changes it; golds were trained on R alone.

    The reference are two golds with θ0's initialisation; whoever is one of them is judged by the other. Beside each
    figure stand those of the original and of the floor: a retraining judged by another, and one with a new
    initialisation. A figure m normalised is (m − original)/(floor − original).

    No figure ranks alone: accuracies and the tug of war are blind to a loss driven too far, a coin flip has a good KL.
    One is ranked: the retain loss where all one-shot directions have forgotten equally much (`matched` forget losses in
    nats a token).
    """

    unlearner: Unlearner | None
    forget: Forget | None
    mask: Mask | NoMask | None
    matched: tuple[float, ...]
    tune: bool

    def __post_init__(self) -> None:
        for name in ("unlearner", "forget", "mask"):
            if getattr(self, name) is None:
                raise UserError(name, None, "is missing", hint=f"evaluation=[unlearning] needs one: {name}=...")
        object.__setattr__(self, "matched", tuple(self.matched))
        for target in self.matched:
            require(target > 0, "truth.unlearning.matched", target, "losses above 0")

    @property
    def chosen(self) -> tuple[Unlearner, Forget, Mask | NoMask]:
        assert self.unlearner is not None and self.forget is not None and self.mask is not None
        return self.unlearner, self.forget, self.mask

    def plan(self, task: Task, seed: int) -> None:
        """Golds are trainings of another task, kept with the explained ones; nothing is in the store of retrainings."""
        if task.train.targets.is_floating_point() or task.pairs:
            raise NotApplicable(
                f"unlearning needs class labels or texts to be continued, not those of task={task.name}"
            )
        if "test" not in task.splits or len(strangers(task)[1]) == 0:
            raise NotApplicable(f"unlearning needs examples that task={task.name} was not trained on")
        self.chosen[1].check(task)

    def later(self) -> int:
        """Golds, and the control of a chosen forget set: once for all unlearners."""
        return 3 + (self.chosen[1].uses is not None)

    def require(self, task: Task, method: Method) -> None:
        """Refuses, before anything is trained, a method that lacks what is asked of it."""
        unlearner, forget, _ = self.chosen
        for key, part in (("unlearner", unlearner), ("forget", forget)):
            if part.uses is not None and not method.offers(part.uses):
                lacks = {"solve": "inverts no curvature", "attribute": "scores no query"}[part.uses]
                who = {"solve": "ekfac, cg, diagonal, uncompressed", "attribute": "ekfac, graddot, trak"}[part.uses]
                raise UserError(
                    "method", type(method).__name__, f"{lacks}, which {key}={part.name} needs", allowed=f"such as {who}"
                )
        if unlearner.calibrated and not method.calibrated:
            raise UserError(
                "method",
                type(method).__name__,
                f"gives scores without a unit, and unlearner={unlearner.name} predicts outputs with them",
                allowed="a calibrated one such as ekfac",
            )

    def evaluate(self, case: Case) -> dict[str, Metric]:
        assert case.problem is not None and case.method is not None
        self.require(case.task, case.method)
        unlearner, forget, _ = self.chosen
        first, models = case.trajectory, case.store.parent / "models"
        forgotten = checked(case.task, forget.chosen(case))
        note = case.notes.setdefault("unlearning", {})
        note |= self.place(case.method, len(forgotten.rows))
        golds = retrained(case.task, forgotten.rows, first, case.seed, models)
        context = Context(case.problem, case.method, first.final, forgotten.rows, None, partial(bought, case, golds))
        context = replace(context, mask=self.masked(context, note))
        unlearner, done, seconds = self.made(context, note)
        self.moves(unlearner, context, done)

        states = {
            "own": done.final,
            "original": first.final,
            **{f"gold_{k}": gold.final for k, gold in enumerate((*golds.paired, golds.new), 1)},
        }
        sets = judged_by(context)
        said = {name: says(context, sets, parameters) for name, parameters in states.items()}
        judges = ["gold_2"] if unlearner.sees_gold else ["gold_1", "gold_2"]
        texts, why = language.judged(context, case.task.facts, states, judges[0])
        note |= why
        truth = {"forget": forget.name, "n_forget": len(forgotten.rows), "golds": len(golds.paired)}
        reference = [said[name] for name in judges]
        figures = against(said["own"], reference)
        anchors = {
            label: {**means(against(said[name], [said[k] for k in golds_of])), **texts.get(name, {})}
            for label, name, golds_of in ANCHORS
        }
        scalars = dict(texts.get("own", {}))
        for name in MAIN:
            ends = (anchors["original"][name], anchors["retrain (floor)"][name])
            scalars[f"{name}_normalised"] = normalised(mean(figures[name]), *ends)
        scalars["parameter_distance"] = distance(done.final, states[judges[0]], first.final)
        scalars["update_seconds"] = seconds
        scalars["speedup"] = golds.paired[0].seconds / max(seconds, 1e-9)
        if forgotten.control is not None:
            scalars |= self.controlled(case, context, golds, forgotten, models)
        metrics = as_metrics(figures, truth, len(forgotten.rows))
        metrics |= {name: Metric(v, np.empty(0), 1, truth, better=None) for name, v in scalars.items()}
        if done.direction is not None:
            metrics |= self.at_equal_forgetting(context, unit(done.direction), said, sets, truth, note)
        note["anchors"] = anchors
        note["trajectory"] = [
            {
                "step": step,
                "forget_loss": loss_of(context, parameters, context.forget),
                "retain_loss": loss_of(context, parameters, context.retain),
            }
            for step, parameters in done.path
        ]
        return metrics

    def place(self, method: Method, size: int) -> dict[str, Any]:
        """Which table the record belongs to, and how its row is called there."""
        unlearner, forget, mask = self.chosen
        return {
            "forget": forget.name,
            "n_forget": size,
            "unlearner": unlearner.name,
            "mask": mask.name,
            "uses_method": unlearner.uses is not None,
            "forget_uses_method": forget.uses is not None,
        }

    def masked(self, context: Context, note: dict[str, Any]) -> Parameters | None:
        """The chosen mask; where none is, the unlearner's own if it has one."""
        mask: Any = self.chosen[2]
        if isinstance(mask, NoMask):
            mask = getattr(self.unlearner, "mask", None) or mask
        found: Parameters | None = mask.fit(context)
        note["mask"] = mask.name
        if found is not None:
            note["weights_that_move"] = sum(int(m.sum()) for m in found.values())
        return found

    def made(self, context: Context, note: dict[str, Any]) -> tuple[Unlearner, Unlearned, float]:
        """The update, tuned where that is asked for, and its seconds: all that is tried, trainings beside the explained
        one, and fits that an earlier run made. The meter gets what is in no other account."""
        context.problem.trajectory()
        unlearner, meter, started = self.chosen[0], context.problem.meter, time.perf_counter()
        gradients, waited, others = meter.gradients, meter.waited, meter.seconds_of_trainings + meter.seconds_of_fits
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.tune and unlearner.grid:
                unlearner, done, note["tuning"] = tuned(unlearner, context)
            else:
                done = unlearner.unlearn(context)
        seconds = time.perf_counter() - started - (meter.waited - waited)
        meter.seconds_of_updates += seconds
        note |= {"gradients": meter.gradients - gradients, **done.notes}
        return unlearner, done, seconds + meter.seconds_of_trainings + meter.seconds_of_fits - others

    def moves(self, unlearner: Unlearner, context: Context, done: Unlearned) -> None:
        """An update that diverged, or that left everything as it was, is no row."""
        if not all(torch.isfinite(p).all() for p in done.final.values()):
            raise Unfit(f"unlearner={unlearner.name} diverged: its last weights are not finite")
        if not unlearner.changes or unlearner.is_gold:
            return
        same = all(torch.equal(done.final[name], value) for name, value in context.start.items())
        before, after = (loss_of(context, parameters, context.forget) for parameters in (context.start, done.final))
        if same or math.isclose(before, after, rel_tol=SAME):
            what = "parameters" if same else f"forget loss ({before:.3g})"
            hint = "it takes longer or more steps (unlearner.scale, lr, steps), or a mask that lets more weights move"
            raise UserError("unlearner", unlearner.name, f"left the {what} unchanged", hint=hint)

    def at_equal_forgetting(
        self,
        context: Context,
        direction: Parameters,
        said: Mapping[str, Said],
        sets: Mapping[str, Examples],
        truth: dict[str, Any],
        note: dict[str, Any],
    ) -> dict[str, Metric]:
        """Retain loss and accuracy, KL on test, and the tug of war where the forget loss has reached each target along
        a unit direction; no number where it has not."""
        metrics = {}

        def at(step: float) -> Parameters:
            return context.allowed(moved(context.start, direction, step))

        golds = [said["gold_1"], said["gold_2"]]
        for target in self.matched:
            found = matched(lambda step: loss_of(context, at(step), context.forget), target)
            note.setdefault("matched", {})[f"{target:g}"] = asdict(found)
            figures: Figures = against(says(context, sets, at(found.step)), golds) if found.reached else {}
            for name in ("retain_loss", "retain_accuracy", "kl_test", "tow"):
                value = mean(figures[name]) if found.reached else float("nan")
                better = "lower" if name == "retain_loss" else None
                key = f"matched_{target:g}_{name}"
                metrics[key] = Metric(value, np.empty(0), 1, truth, nan=int(not found.reached), better=better)
        return metrics

    def controlled(
        self, case: Case, context: Context, golds: Golds, forgotten: Forgotten, models: Any
    ) -> dict[str, float]:
        """What a retraining loses without F, and what without as many rows of the same labels: its accuracy on what it
        did not see, and the loss of the queries."""
        assert forgotten.control is not None
        other = control(case.task, forgotten.control, case.trajectory, case.seed, models).final
        pairs = (("gold", golds.paired[0].final, forgotten.rows), ("control", other, forgotten.control))
        found = {}
        for name, parameters, rows in pairs:
            model = context.network(parameters)
            gone = measured(context.task, model, case.task.train.select(rows))
            found[f"{name}_forget_accuracy"] = float(gone.correct.double().mean())
            found[f"{name}_query_loss"] = loss_of(context, parameters, case.task.splits["query"])
        return found


def bought(case: Case, golds: Golds) -> Parameters:
    """The first gold, whose training is charged to who asks for it."""
    assert case.problem is not None
    case.problem.meter.charge("gold", golds.paired[0].seconds)
    return golds.paired[0].final


def judged_by(context: Context) -> dict[str, Examples]:
    """The sets that every model is asked about. Where an unlearner may look at half of the test split, for want of
    other strangers, it is judged by the other half."""
    task = context.task
    return {
        "forget": context.forget,
        "retain": context.retain,
        "test": task.splits["test"] if "nonmembers" in task.splits else strangers(task)[1],
        "neighbours": task.train.select(nearest(context)),
        "nonmembers": strangers(task)[1],
    }


def says(context: Context, sets: Mapping[str, Examples], parameters: Parameters) -> Said:
    model = context.network(parameters)
    return {name: measured(context.task, model, examples) for name, examples in sets.items()}


def mean(figure: Array | float) -> float:
    return float(np.mean(figure))


def means(figures: Figures) -> dict[str, float]:
    return {name: mean(figure) for name, figure in figures.items()}


def as_metrics(figures: Figures, truth: dict[str, Any], examples: int) -> dict[str, Metric]:
    """Means over examples with bootstrap intervals, of the same resamples for every unlearner of one truth. The others
    have none of one run: the spread over seeds, each with golds of its own, is theirs."""
    seed, found = seed_of(truth), {}
    for name, figure in figures.items():
        if isinstance(figure, float):
            found[name] = Metric(figure, np.empty(0), examples, truth, better=None)
        else:
            drawn = bootstrap_queries(figure, seed)
            found[name] = Metric(mean(figure), drawn, len(figure), truth, better=None, by_query={"value": figure})
    return found
