"""Bayesian influence functions: what moves together under noise around the explained model, without any Hessian."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.base import Method, Problem
from methods.loss_covariance import covariance, observed
from tasks.base import Examples
from tasks.errors import require

TOGETHER = 256  # rows of one backward pass


@dataclass(frozen=True)
class BIF(Method):
    """score(q, i) = −β Cov(ℓ_i(θ), m_q(θ)), value(i) = −β Var(ℓ_i(θ))    (Kreer et al. 2025, arXiv 2509.26544)

    over the localised posterior exp(−U_w) at w = 1, θ* explained, ½γ₂‖θ‖² the recipe's own L2 term:

        U_w(θ) = β Σ_i w_i ℓ_i(θ) + βN ½γ₂‖θ‖² + ½γ‖θ − θ*‖²,      d E[m_q] / d w_i = −β Cov(ℓ_i, m_q),

    so that to first order the score is E[m_q] with i minus without i. The paper leaves out the factor β, and with it
    the unit. Where the posterior is narrow, this is the influence function with the Hessian and damping λ = γ / (βN);
    value(i) is, as there, the effect of i on its own loss. The draws are SGLD's,

        θ ← θ − ½ε [βN ∇L(θ) + γ(θ − θ*)] + √ε ξ,      L = mean loss + ½γ₂‖θ‖²,      ξ ~ N(0, I),

    with ∇L of all rows, or of `batch_size` rows drawn anew for each step; its bias goes with ε times the largest
    curvature of U, and it diverges from 4 on. `chains` start at θ*, drop `burn_in` steps and keep every `thin`-th state
    until each has `draws`; the covariance is over all of them. Its error: about √(Var ℓ_i Var m_q / independent draws).
    Raises ArithmeticError where a chain diverges.
    """

    chains: int
    draws: int
    burn_in: int
    thin: int
    step: float  # ε
    beta: float
    gamma: float
    batch_size: int | None
    calibrated = True

    def __post_init__(self) -> None:
        require(self.chains >= 1, "method.chains", self.chains, "1 or more")
        require(self.draws >= 1, "method.draws", self.draws, "1 or more")
        require(self.chains * self.draws >= 2, "method.draws", self.draws, "2 or more where there is one chain")
        require(self.burn_in >= 0, "method.burn_in", self.burn_in, "0 or more")
        require(self.thin >= 1, "method.thin", self.thin, "1 or more")
        require(self.beta > 0, "method.beta", self.beta, "above 0")
        require(self.gamma >= 0, "method.gamma", self.gamma, "0 or more")
        require(self.step > 0, "method.step", self.step, "above 0")
        require(
            self.step * self.gamma < 4, "method.step", self.step, "below 4 / method.gamma", "else every chain diverges"
        )
        require(
            self.batch_size is None or self.batch_size >= 1, "method.batch_size", self.batch_size, "1 or more, null"
        )

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        losses, measured = [], []
        for model in self._draws(problem):
            losses.append(self._losses(problem, model))
            measured.append(observed(problem, model, queries, problem.task.measure))
        seen = problem.once((self, "losses"), lambda: torch.stack(losses))
        return -self.beta * covariance(torch.stack(measured), seen)

    def value(self, problem: Problem) -> Tensor:
        def made() -> Tensor:
            return torch.stack([self._losses(problem, model) for model in self._draws(problem)])

        return -self.beta * problem.once((self, "losses"), made).var(0)

    def _losses(self, problem: Problem, model: nn.Module) -> Tensor:
        found = observed(problem, model, problem.train, problem.task.loss)
        if not found.isfinite().all():
            raise ArithmeticError(f"method.step={self.step}: a chain diverged; give a smaller one, or a larger gamma")
        return found

    def _draws(self, problem: Problem) -> Iterator[nn.Module]:
        """The kept states, all chains one after the other, as one model that is changed in place: the same states for
        any queries."""
        for chain in range(self.chains):
            rng = problem.generator("bif", chain)
            model = problem.model()
            centre = {name: p.to(problem.device) for name, p in problem.trajectory().final.items()}  # θ*
            named = {name: p.requires_grad_() for name, p in model.named_parameters() if name in centre}
            for step in range(1, self.burn_in + self.draws * self.thin + 1):
                slopes = self._slopes(problem, model, named, centre, rng)
                with torch.no_grad():
                    for p, slope in zip(named.values(), slopes, strict=True):
                        noise = torch.randn(p.shape, generator=rng, dtype=p.dtype).to(p.device)
                        p.add_(noise, alpha=self.step**0.5).add_(slope, alpha=-self.step / 2)
                if step > self.burn_in and (step - self.burn_in) % self.thin == 0:
                    yield model

    def _slopes(
        self,
        problem: Problem,
        model: nn.Module,
        named: dict[str, Tensor],
        centre: dict[str, Tensor],
        rng: torch.Generator,
    ) -> list[Tensor]:
        """βN ∇L(θ) + γ(θ − θ*) by parameter, with the gradient of one batch."""
        task, train, scale = problem.task, problem.train, self.beta * len(problem.train)
        rows = torch.arange(len(train))
        if self.batch_size is not None and self.batch_size < len(train):
            rows = torch.randperm(len(train), generator=rng)[: self.batch_size]
        problem.meter.gradients += len(rows)
        parameters = list(named.values())
        with torch.no_grad():
            slopes = [scale * task.recipe.l2 * p + self.gamma * (p - centre[name]) for name, p in named.items()]
        for index in rows.split(TOGETHER):
            with torch.enable_grad():
                total = task.loss(model, train.batch(index).to(problem.device)).sum() * (scale / len(rows))
                found = torch.autograd.grad(total, parameters, materialize_grads=True)
            slopes = [slope + g for slope, g in zip(slopes, found, strict=True)]
        return slopes
