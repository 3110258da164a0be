"""TRAK: the model as a linear one in projected gradients, of which influence is known in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Method, Problem
from methods.compression.base import Compression
from methods.curvature.damping import Damping
from methods.gradients.blocks import blocks_of, with_rows_in_use
from methods.gradients.per_example import flat, plain
from methods.gradients.source import Source
from tasks.base import Examples
from tasks.errors import UserError, require

ROWS = 4096  # features at once in float64


@dataclass(frozen=True)
class TRAK(Method):
    """score(q, i) = [mean_j φ_j(q)ᵀ (Φ_jᵀ Φ_j + NλI)⁻¹ φ_j(i)] · [mean_j Q_j(i)]           (Park et al. 2023, eq. 16)

    over `k` explained trainings j, each with a projection S_j of its own: φ_j(i) = S_j ∇f(i; θ_j) (the rows of Φ_j),
    φ_j(q) = S_j ∇m(q; θ_j), Q_j(i) = −∂ℓ/∂f; for classifiers f = m, the margin, and Q = 1 − p; for a regression f is
    the prediction and Q what is left, y − f. The two means are taken apart. λ, the ridge, is a damping of Φᵀ Φ/N
    (`absolute` 0 is the paper's; it needs fewer dimensions than examples). The ℓ'' that a Newton step would put between
    Φᵀ and Φ is left out: only the order of the scores counts. k trainings are charged.
    """

    k: int
    compression: Compression
    damping: Damping
    modules: tuple[str, ...] | None

    def __post_init__(self) -> None:
        require(self.k >= 1, "method.k", self.k, "1 or more")
        if self.modules is not None:
            object.__setattr__(
                self, "modules", (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)
            )

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        products = torch.zeros(len(queries), len(problem.train), dtype=torch.float64)
        residuals = torch.zeros(len(problem.train), dtype=torch.float64)
        for j in range(self.k):
            source, gram, features, left = self._features(problem, j)
            asked = flat(source.collected(queries, problem.task.objective.measure)).double()
            problem.meter.gradients += len(queries)
            products += torch.linalg.solve(gram, asked.T).T @ features.double().T
            residuals += left
        return products / self.k * residuals / self.k

    def value(self, problem: Problem) -> Tensor:
        """value(i) = −[mean_j φ_jᵀ (Φᵀ Φ + NλI)⁻¹ φ_j(i)] · [mean_j Q_j(i)]², the score of i for its own loss."""
        leverage = torch.zeros(len(problem.train), dtype=torch.float64)
        residuals = torch.zeros(len(problem.train), dtype=torch.float64)
        for j in range(self.k):
            _, gram, kept, left = self._features(problem, j)
            features = kept.double()
            leverage += (torch.linalg.solve(gram, features.T).T * features).sum(1)
            residuals += left
        return -leverage / self.k * (residuals / self.k).square()

    def _features(self, problem: Problem, j: int) -> tuple[Source, Tensor, Tensor, Tensor]:
        """Of one training: where gradients come from, Φᵀ Φ + NλI (k, k) in float64, Φ (N, k) and Q (N,)."""

        def made() -> tuple[Source, Tensor, Tensor, Tensor]:
            task, member = problem.task, problem.member(j)
            model = member.model()
            blocks = with_rows_in_use(task, model, blocks_of(model, self.modules), [problem.train])
            source = Source(task, model, tuple(blocks))
            source = Source(task, model, tuple(blocks), self.compression.fit(member, source))
            n, size = len(problem.train), source.size
            features = torch.empty(n, size, dtype=next(model.parameters()).dtype)
            residuals = torch.empty(n, dtype=torch.float64)

            def output(outputs: Tensor, targets: Tensor) -> Tensor:
                residual.append(task.objective.residual(outputs.detach(), targets).double().cpu())
                return task.objective.output(outputs, targets)

            residual: list[Tensor] = []
            for index, found in source.gradients(problem.train, output):
                problem.meter.gradients += len(index)
                features[index], residuals[index] = flat(plain(found)).cpu(), residual.pop()
            gram = torch.zeros(size, size, dtype=torch.float64)
            for rows in features.split(ROWS):
                gram.addmm_(rows.double().T, rows.double())
            strength = self.damping.strengths({"all": gram.trace().item() / n}, {"all": size})["all"]
            if strength == 0 and size >= n:
                raise UserError(
                    "method.damping.value",
                    0,
                    f"needs fewer dimensions than the {n} training examples; these are {size}",
                    hint="take more damping or a smaller method.compression.dimension",
                )
            gram.diagonal().add_(n * strength)
            return source, gram, features, residuals

        return problem.once(("trak", self, j), made)
