"""What the matrix-free solvers share: H of all blocks together as a product, its damping, its largest eigenvalue."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem
from methods.curvature.base import Curvature, Fitted, unflat
from methods.curvature.damping import Damping
from methods.curvature.products import product_of
from methods.curvature.root import columns, has_columns
from methods.gradients.per_example import Gradient, flat, plain
from methods.gradients.source import Source

PROBES = 32  # of Hutchinson's estimate of a Hessian's trace
BATCHES = 8  # of which the largest curvature is taken for steps on batches
POWER = 30  # steps of a power iteration


@dataclass(frozen=True)
class Operator:
    """H by name (hessian, ggn, empirical) times vectors (R, P); blocks are coupled, so one damping holds for all."""

    problem: Problem
    source: Source
    matrix: str

    def times(self, vectors: Tensor, rows: Tensor | None = None) -> Tensor:
        """H V over the given rows of the training set, or over all of it; (R, P)."""
        return product_of(self.problem, self.source, self.matrix)(vectors, rows)

    def vectors(self, gradients: Sequence[Gradient]) -> Tensor:
        """(R, P) in the model's dtype."""
        return flat(gradients).to(next(self.source.model.parameters()).dtype)

    def random(self, count: int, use: str) -> Tensor:
        """Standard normal vectors (count, P), seeded by the run."""
        parameter = next(self.source.model.parameters())
        rng = self.problem.generator("operator", use)
        drawn = torch.randn(count, self.source.size, generator=rng, dtype=torch.float64)
        return drawn.to(parameter.device, parameter.dtype)

    def shift(self, damping: Damping, l2: float) -> float:
        """γ + λ."""
        trace = 0.0 if damping.rule == "absolute" else self.trace()
        return l2 + damping.strengths({"all": trace}, {"all": self.source.size})["all"]

    def trace(self) -> float:
        """tr H: mean Σ_r ‖s_r‖² over examples; of a Hessian by random signs (Hutchinson 1989), an estimate; of a GGN
        without columns mean ‖g_i‖² at labels drawn from the model, whose expectation it is, an estimate."""

        def made() -> float:
            if self.matrix == "hessian":
                signs = self.random(PROBES, "trace").sign()
                return (self.times(signs) * signs).sum().item() / PROBES
            rooted = has_columns(self.problem, self.source, self.matrix)
            stream = columns(self.problem, self.source, self.matrix if rooted else "fisher", "trace")
            norms = (flat(plain(c)).double().square().sum().item() for _, found in stream for c in found)
            return sum(norms) / len(self.problem.train)

        return self.problem.once(("trace", self.source.blocks, self.matrix), made)

    def largest(self, shift: float, inverse: "Inverse | None" = None, batch_size: int | None = None) -> float:
        """λ_max of M⁻¹ (H + δI), M = I without `inverse`, by power iteration, an estimate from below: over all data, or
        the largest of `BATCHES` random batches, whose curvature in a direction may be many times the mean's."""
        values = []
        for rows in [None] if self.whole(batch_size) else [self.batch(batch_size, "power", k) for k in range(BATCHES)]:
            v, value = self.random(1, "power"), 0.0
            for _ in range(POWER):
                w = self.times(v, rows) + shift * v
                w = w if inverse is None else inverse(w)
                value = (w.norm() / v.norm()).item()
                v = w / w.norm().clamp_min(torch.finfo(w.dtype).tiny)
            values.append(value)
        return max(values)

    def whole(self, batch_size: int | None) -> bool:
        """Whether a batch of that size is the training set."""
        return batch_size is None or batch_size >= len(self.problem.train)

    def batch(self, batch_size: int | None, *name: object) -> Tensor | None:
        """Rows of a random batch without replacement, seeded by the run and its name; None for all."""
        if self.whole(batch_size):
            return None
        return torch.randperm(len(self.problem.train), generator=self.problem.generator(*name))[:batch_size]


@dataclass(frozen=True)
class Inverse:
    """M⁻¹ = (H̃ + δI)⁻¹ of another fitted curvature, for vectors (R, P); the δ of the system that it preconditions."""

    fitted: Fitted
    source: Source
    shift: float

    def __call__(self, vectors: Tensor) -> Tensor:
        damping = Damping("absolute", self.shift, "global")
        return flat(self.fitted.solve(unflat(self.source.blocks, vectors), damping, 0.0)).to(vectors.dtype)


def preconditioner(problem: Problem, source: Source, curvature: Curvature | None) -> Fitted | None:
    """The other curvature, fitted once for the problem; none is the identity."""
    if curvature is None:
        return None
    return problem.once((curvature, source.blocks), lambda: curvature.fit(problem, source))


def relative(residual: Tensor, vectors: Tensor) -> Tensor:
    """‖r‖ / ‖v‖ of each row, (R,); 0 where v = 0."""
    size = vectors.norm(dim=1)
    return torch.where(size > 0, residual.norm(dim=1) / size.where(size > 0, 1.0), 0.0)
