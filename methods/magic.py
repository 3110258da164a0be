"""MAGIC: the exact derivative of a measurement by each example's weight, back through the whole training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from methods.base import Method, Problem
from tasks.base import Examples, Task
from tasks.training.replay import Parameters, Replay, State, replay

TOGETHER = 2**22  # parameters of the adjoints that are carried back at once


@dataclass(frozen=True)
class MAGIC(Method):
    """score(q, i) = ∂m_q(θ_T(w)) / ∂w_i at w = 1          (Ilyas & Engstrom 2025)

    θ_T(w) is where the explained run ends, its initialisation and batches as they were, when the losses are weighted by
    w. Training is s_{t+1} = Φ_t(s_t, w), s = (θ, the optimizer's state); backwards, from c_T = ∂m/∂s_T,
        ∂m/∂w += (∂Φ_t/∂w)ᵀ c_{t+1},        c_t = (∂Φ_t/∂s_t)ᵀ c_{t+1}.
    Every ⌈√T⌉-th state is kept, the others are replayed. Many queries are carried back at once. This answers the regime
    `fixed`, to first order: it is exact where the run is smooth in w and few examples are left out.
    """

    needs = frozenset({"checkpoints"})

    calibrated = True

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        explained = problem.trajectory()
        run = replay(problem.task, explained.seed)
        every = max(1, round(len(run.steps) ** 0.5))
        kept = [s for t, s in enumerate(run.states(run.start, 0, len(run.steps))) if t % every == 0]
        *_, last = run.states(kept[-1], every * (len(kept) - 1), len(run.steps))
        _require_same(last[0], explained.final)
        size = sum(p.numel() for p in run.start[0].values())
        scores = torch.zeros(len(queries), len(problem.train), dtype=torch.float64)
        for rows in torch.arange(len(queries)).split(max(1, TOGETHER // size)):
            problem.meter.gradients += len(rows) * (1 + sum(len(step) for step in run.steps))
            adjoint = _measurements(problem, run, last, queries.select(rows))
            end = len(run.steps)
            for c in reversed(range(len(kept))):
                before = list(run.states(kept[c], c * every, max(c * every, end - 1)))
                for t in reversed(range(c * every, end)):
                    ones = torch.ones(len(run.steps[t]), dtype=problem.task.dtype)
                    _, pull, *_ = vjp(run.step(t), before[t - c * every], ones)
                    adjoint, by_weight = vmap(pull)(adjoint)
                    scores[rows[:, None], run.steps[t]] += by_weight.double()
                end = c * every
        return scores

    def unmet(self, task: Task) -> str | None:
        if reason := super().unmet(task):
            return reason
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in task.initial(0).modules()):
            return f"needs a training without random draws, and model={task.model} has dropout"
        return None


def _measurements(problem: Problem, run: Replay, state: State, queries: Examples) -> State:
    """c_T: each query's ∂m/∂s at the end, (Q, ...); the optimizer's tensors do not enter a measurement."""
    batch = queries.batch()

    def measured(theta: Parameters) -> Tensor:
        outputs = functional_call(run.model, theta, (), batch.inputs)
        return problem.task.objective.measure(outputs, batch.targets)

    run.model.eval()
    m, pull, *_ = vjp(measured, state[0])
    (by_theta,) = vmap(pull)(torch.eye(len(m), dtype=m.dtype))
    run.model.train()
    zeros = [{name: torch.zeros_like(p) for name, p in by_theta.items()} for _ in state[1:]]
    return (by_theta, *zeros)


def _require_same(found: Parameters, wanted: Parameters) -> None:
    """The replay must end where the explained run did, up to rounding."""
    missed = sum((found[name] - p).square().sum().item() for name, p in wanted.items())
    apart = (missed / sum(p.square().sum().item() for p in wanted.values())) ** 0.5
    if not apart < 1e-3:
        raise ArithmeticError(
            f"the replayed training ends elsewhere than the explained one (by {apart:.1e} of its norm): it is not "
            f"reproducible, or rounding grows in it"
        )
