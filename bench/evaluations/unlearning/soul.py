"""Second-order steps inside gradient difference: Sophia, whose curvature comes from labels of the model's own."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.evaluations.unlearning.ascent import GradDiff
from bench.evaluations.unlearning.base import Context, Unlearned, cycle, kept_steps, state_of
from bench.evaluations.unlearning.descend import Draw, restore
from bench.evaluations.unlearning.measure import UNSCORED
from tasks.base import Batch, Task
from tasks.errors import require

EPS = 1e-12  # of what the momentum is divided by


@dataclass
class Moments:
    """Running means by parameter: m of gradients, h of the diagonal of the Gauss–Newton matrix."""

    m: dict[str, Tensor]
    h: dict[str, Tensor]


def with_gradient(m: Tensor, gradient: Tensor, beta: float) -> Tensor:
    """β m + (1 − β) g, once a step."""
    return beta * m + (1 - beta) * gradient


def with_curvature(h: Tensor, sampled: Tensor, beta: float, size: int) -> Tensor:
    """β h + (1 − β) B ĝ², ĝ the mean gradient of B examples at labels that the model draws (Gauss–Newton–Bartlett)."""
    return beta * h + (1 - beta) * size * sampled.square()


def step_of(m: Tensor, h: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """clip(m / max(γ h, ε), ±1), and where it was clipped."""
    ratio = m / (gamma * h).clamp_min(EPS)
    return ratio.clamp(-1, 1), ratio.abs() > 1


def tuned_gamma(moments: Moments, clipped: float) -> float:
    """γ at which this share of the moving coordinates has |m| > γ h."""
    pairs = [(moments.m[name].abs().flatten(), moments.h[name].flatten()) for name in moments.m]
    m, h = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    ratios = (m / h.clamp_min(EPS))[m > 0]
    return float(torch.quantile(_thinned(ratios), 1 - clipped)) if len(ratios) else 1.0


def _thinned(values: Tensor, most: int = 1_000_000) -> Tensor:
    """Evenly taken, where there are more than a quantile takes."""
    return values[:: -(-len(values) // most)]


def sampled_labels(task: Task, model: nn.Module, batch: Batch, rng: torch.Generator) -> Batch:
    """The batch with labels from the model's predictive distribution; what is not scored stays so."""
    uniforms = torch.rand(batch.targets.shape, generator=rng, dtype=torch.float64).to(batch.targets.device)
    with torch.no_grad():
        outputs = task.outputs(model, batch)
    uniforms = uniforms.masked_fill(batch.targets == UNSCORED, torch.nan)
    return Batch(batch.inputs, task.objective.sample(outputs, uniforms))


@dataclass(frozen=True)
class SOUL(GradDiff):
    """θ ← θ − η clip(m / max(γ h, ε), ±1) (Jia et al. 2024, SOUL; Liu et al. 2024, Sophia, algorithm 3): m the running
    mean of the gradient of −γ' L_F + α L_R, h that of the Gauss–Newton–Bartlett diagonal, renewed every `every` steps.

    How many coordinates are clipped depends on a network's size: `clipped` is the share that γ is set for, anew with
    each curvature; the share that came out is in the record. Weight decay is decoupled.
    """

    betas: tuple[float, float]
    every: int
    clipped: float

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", tuple(self.betas))
        require(self.every >= 1, "unlearner.every", self.every, "1 or more")
        require(0 < self.clipped < 1, "unlearner.clipped", self.clipped, "0 < clipped < 1")
        require(all(0 <= b < 1 for b in self.betas), "unlearner.betas", list(self.betas), "two numbers, 0 <= b < 1")

    def unlearn(self, context: Context) -> Unlearned:
        objective, device, task = self.prepared(context), context.problem.device, context.task
        model = context.network(context.start)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        moments = Moments(*({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2)))
        forget, retain, path = context.forget, context.retain, [(0, context.start)]
        forget_rows = cycle(len(forget), self.batch, context.generator("forget batches"))
        retain_rows = cycle(len(retain), self.batch, context.generator("retain batches"))
        labels, shares, gammas = context.generator("sampled labels"), [], [1.0]
        for step in range(1, self.steps + 1):
            f, r = next(forget_rows), next(retain_rows)
            draw = Draw(step, forget.batch(f).to(device), retain.batch(r).to(device), f, r)
            for name, g in gradient(objective(model, draw), named).items():
                may_move = 1 if context.mask is None else context.mask[name].to(g)
                moments.m[name] = with_gradient(moments.m[name], g * may_move, self.betas[0])
            context.problem.meter.gradients += len(f) + len(r)
            if (step - 1) % self.every == 0:
                batch = sampled_labels(task, model, draw.retain, labels)
                for name, g in gradient(task.loss(model, batch).mean(), named).items():
                    moments.h[name] = with_curvature(moments.h[name], g, self.betas[1], len(r))
                gammas.append(tuned_gamma(moments, self.clipped))
                context.problem.meter.gradients += len(r)
            shares.append(self._move(named, moments, gammas[-1]))
            restore(context, named)
            if step in kept_steps(self.steps):
                path.append((step, state_of(model)))
        log = {"clipped": sum(shares) / len(shares), "gamma": sum(gammas[1:]) / len(gammas[1:])}
        return Unlearned(tuple(path), log)

    @torch.no_grad()
    def _move(self, named: dict[str, nn.Parameter], moments: Moments, gamma: float) -> float:
        """One step in place; the share of moving coordinates that were clipped."""
        cut = moving = 0
        for name, p in named.items():
            step, clipped = step_of(moments.m[name], moments.h[name], gamma)
            p.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * step)
            cut, moving = cut + int(clipped.sum()), moving + int((moments.m[name] != 0).sum())
        return cut / max(1, moving)


def gradient(loss: Tensor, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
