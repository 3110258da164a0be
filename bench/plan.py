"""`plan=true`: what a run would train, how long that takes and how much disk, before anything is trained."""

import time
from collections.abc import Mapping
from pathlib import Path

from bench.evaluations.base import Evaluation
from tasks.base import Recipe, Task
from tasks.training.engines import Executor
from tasks.training.plan import Plan
from tasks.training.recipe_steps import steps_of
from tasks.training.retrain import store_of


def planned_work(
    task: Task,
    evaluations: Mapping[str, Evaluation],
    seed: int,
    cache: Path,
    executor: Executor,
    shipped: Path | None = None,
    asked: int = 0,
) -> str:
    """A few lines, `asked` trainings being the method's own. Seconds come from one timed step on this machine; rows
    that the store holds are not counted."""
    parameters = sum(p.numel() for p in task.initial(0).parameters() if p.requires_grad)
    step = _seconds_of_a_step(task)
    steps = steps_of(task.recipe, len(task.train))
    kept = 1 + task.recipe.checkpoints * (3 if task.recipe.optimizer in ("adam", "adamw") else 1)  # Adam's moments
    size = parameters * task.dtype.itemsize * kept / 2**20
    lines = [
        f"task={task.name} data={task.source} n_train={len(task.train)} model={task.model} ({parameters:,} parameters)",
        f"explained model: 1 training, {steps} steps, about {steps * step:.0f} s, {size:.1f} MiB",
    ]
    if asked:
        seconds = asked * steps * step / executor.processes()
        lines.append(f"method: {asked} retrainings of its own, at most about {seconds:.0f} s")
    done = store_of(task.public(), cache / "truth", shipped).read()
    for name, evaluation in evaluations.items():
        plan = evaluation.plan(task, seed)
        later = getattr(evaluation, "later", None)
        if plan is None:
            seconds = later() * steps * step / executor.processes() if later else 0
            later_said = f"{later()} retrainings for each method, at most about {seconds:.0f} s" if later else ""
            lines.append(f"{name}: {later_said or 'no retraining'}")
            continue
        keys = plan.keys()
        missing = [k for k, key in enumerate(keys) if key not in done]
        seconds = sum(_steps(task.recipe, plan, k) for k in missing) * step / executor.processes()
        rows = sum(len(task.splits[s]) for s in ("val", "query"))
        lines.append(
            f"{name}: {len(keys)} retrainings, {len(keys) - len(missing)} in the store, {len(missing)} to make by "
            f"{executor.engine_for(task)}: at most about {seconds:.0f} s on {executor.processes()} processes, "
            f"{len(missing) * rows * 8 / 2**20:.1f} MiB"
        )
        if later:
            lines[-1] += f"; then {later()} more for each method"
    return "\n".join(lines)


def _steps(recipe: Recipe, plan: Plan, row: int) -> int:
    rows = int((plan.weights[row] > 0).sum()) if plan.own_batches else plan.weights.shape[1]
    return steps_of(recipe, rows)


def _seconds_of_a_step(task: Task) -> float:
    """One model's step, the median of five, in this process."""
    from tasks.training.recipe_steps import optimizer

    if task.recipe.optimizer == "lbfgs":
        return 0.0
    model = task.initial(0).train()
    update = optimizer(task.recipe, model.parameters())
    took = []
    for _ in range(6):
        started = time.perf_counter()
        update.zero_grad()
        task.loss(model, task.train.batch(list(range(min(task.recipe.batch_size, len(task.train)))))).mean().backward()
        update.step()
        took.append(time.perf_counter() - started)
    return sorted(took[1:])[2]
