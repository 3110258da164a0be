"""SOURCE: training unrolled segment by segment, each as if its curvature and gradients stood still."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from methods.base import Method, Problem
from methods.curvature.eigenbasis import Basis, eigenvectors, second_moments
from methods.curvature.kfac import covariances
from methods.curvature.root import ROOTED, columns, require_matrix
from methods.gradients.blocks import blocks_of, with_rows_in_use
from methods.gradients.per_example import Gradient, inner, plain
from methods.gradients.sharding import mine
from methods.gradients.source import Source
from tasks.base import Checkpoint, Examples, Task
from tasks.errors import require


@dataclass(frozen=True)
class SOURCE(Method):
    """score(q, i) = −(1/N) Σ_l ∇m(q)ᵀ (Π_{l' > l} S_l') F_l ḡ_l(i)          (Bae et al. 2024, eq. 15)

        S_l = exp(−τ_l (H_l + γI)),        F_l = (I − S_l)(H_l + γI)⁻¹

    Segment l holds checkpoints of equal share: H_l is the mean of their EK-FAC curvatures (one eigenbasis of their mean
    covariances), ḡ_l(i) the mean of their ∇ℓ(i), τ_l = Σ η/(1 − μ) over its steps, μ the momentum. A long segment is an
    influence function without damping, (H + γI)⁻¹; a short one is τ_l ∇m(q)ᵀ ḡ_l(i), as in TracIn. The gradient ∇m(q)
    is of the end of training.
    """

    segments: int
    matrix: str
    modules: tuple[str, ...] | None
    needs = frozenset({"checkpoints"})
    calibrated = True

    def __post_init__(self) -> None:
        require(self.segments >= 1, "method.segments", self.segments, "1 or more")
        require_matrix(self.matrix, ROOTED)
        if self.modules is not None:
            object.__setattr__(
                self, "modules", (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)
            )

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        task = problem.task
        segments = self._segments(problem)
        measured = segments[-1].sources[-1].collected(queries, task.objective.measure)
        problem.meter.gradients += len(queries)
        scores = torch.zeros(len(queries), len(problem.train), dtype=torch.float64)
        for segment in reversed(segments):
            asked = segment.applied(measured, lambda x, tau: -torch.expm1(-tau * x) / x, limit=segment.tau)
            for source in segment.sources:
                for index, found in source.gradients(problem.train, task.objective.loss):
                    problem.meter.gradients += len(index)
                    product = inner(asked, plain(found)).double().cpu()
                    scores[:, index] -= product / (len(segment.sources) * len(problem.train))
            measured = segment.applied(measured, lambda x, tau: torch.exp(-tau * x), limit=1.0)
        return scores

    def unmet(self, task: Task) -> str | None:
        if reason := super().unmet(task):
            return reason
        if task.recipe.optimizer != "sgd":
            return f"needs steps of SGD, and model={task.model} is trained by {task.recipe.optimizer}"
        if self.segments > task.recipe.checkpoints:
            return (
                f"needs a checkpoint for each of method.segments={self.segments}; model={task.model} keeps "
                f"model.recipe.checkpoints={task.recipe.checkpoints}"
            )
        return None

    def _segments(self, problem: Problem) -> list["Segment"]:
        checkpoints = problem.trajectory().checkpoints
        groups = torch.arange(len(checkpoints)).tensor_split(min(self.segments, len(checkpoints)))
        chosen = [[checkpoints[c] for c in group.tolist()] for group in groups]
        return [
            problem.once(("source", self, k), lambda k=k, group=group: self._segment(problem, k, group))  # type: ignore[misc]
            for k, group in enumerate(chosen)
        ]

    def _segment(self, problem: Problem, k: int, checkpoints: Sequence[Checkpoint]) -> "Segment":
        task, recipe = problem.task, problem.task.recipe
        model = problem.model(checkpoints[0].parameters)
        blocks = with_rows_in_use(task, model, blocks_of(model, self.modules), [problem.train])
        first = Source(task, model, tuple(blocks))
        sources = [first, *(replace(first, model=problem.model(c.parameters)) for c in checkpoints[1:])]

        def stream(use: str):  # type: ignore[no-untyped-def]
            for c, source in enumerate(sources):
                yield from columns(problem, source, self.matrix, f"{use} {k} {c}", mine(len(problem.train)))

        sums = covariances(blocks, stream("factors"))
        bases = {
            name: Basis(eigenvectors(c.outputs), None if c.inputs.ndim == 1 else eigenvectors(c.inputs))
            for name, c in sums.items()
        }
        moments = second_moments(len(problem.train) * len(sources), bases, first, stream("eigenvalues"))
        tau = sum(c.path for c in checkpoints) / (1 - recipe.momentum)
        return Segment(tuple(sources), bases, {name: v + recipe.l2 for name, v in moments.items()}, tau)


@dataclass(frozen=True, eq=False)
class Segment:
    """Gradients at its checkpoints; bases and eigenvalues (out, in) of H + γI by block; τ."""

    sources: tuple[Source, ...]
    bases: dict[str, Basis]
    eigenvalues: dict[str, Tensor]
    tau: float

    def applied(
        self, vectors: Sequence[Gradient], function: Callable[[Tensor, float], Tensor], limit: float
    ) -> list[Gradient]:
        """f(H + γI) of vectors, f(x) = function(x, τ), which tends to `limit` as x → 0."""
        found = []
        for g in vectors:
            x, basis = self.eigenvalues[g.block.name], self.bases[g.block.name]
            known = x > 1e-12 * x.max()
            values = torch.where(known, function(torch.where(known, x, 1.0), self.tau), limit).to(g.values)
            found.append(replace(g, values=basis.back(basis.forth(g.values) * values)))
        return found
