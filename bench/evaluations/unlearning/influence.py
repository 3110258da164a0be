"""One Newton or influence step, with the inverse curvature of any attribution method that has one."""

from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from bench.evaluations.unlearning.base import Context, Parameters
from bench.evaluations.unlearning.gradients import combined, mean_gradient
from bench.evaluations.unlearning.one_shot import OneShot
from methods.base import Method
from tasks.errors import UserError

FORMS = ("koh_liang", "newton", "reweight")


@dataclass(frozen=True)
class Influence(OneShot):
    """θ0 + `scale` · d, with n_f = |F|, n_r = |R|, N = n_f + n_r, γ the objective's own L2 term:

    koh_liang  d = (1/N) (H_D + γI + λI)⁻¹ Σ_F ∇ℓ: F is weighed down by 1/N each, curvature of all of D
               (Koh & Liang 2017, §2.1)
    newton     d = (1/n_r) (H_R + γI + λI)⁻¹ Σ_F (∇ℓ + γθ0): a Newton step on the objective of R from a minimum of
               that of D, where −∇J_R = (1/n_r) Σ_F (∇ℓ + γθ0); exact for least squares, λ = 0
               (Guo et al. 2020, Certified data removal, eq. 2)
    reweight   d = (n_f/N) (H_D + γI + λI)⁻¹ (g_F − g_R), g mean gradients: also goes on training on R where θ0 is no
               minimum (the "IU" of the literature)

    `damping`: put in the place of the method's own; null: the method's. Relative damping is made for scores: on a
    fitted network the mean eigenvalue is so small that a step of scale 1 diverges.
    """

    form: str
    damping: Any

    @property
    def uses(self) -> str | None:
        return "solve"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise UserError("unlearner.form", self.form, allowed=FORMS)

    def direction(self, context: Context) -> Parameters:
        method = damped(context.method, self.damping)
        forget, start = context.forget, context.start
        n_f, n = len(forget), len(context.task.train)
        g_f = mean_gradient(context, start, forget)
        if self.form == "koh_liang":
            return method.solve(context.problem, combined((n_f / n, g_f)))
        if self.form == "reweight":
            g_r = mean_gradient(context, start, context.retain)
            return method.solve(context.problem, combined((n_f / n, g_f), (-n_f / n, g_r)))
        share = n_f / (n - n_f)
        vector = combined((share, g_f), (share * context.task.recipe.l2, start))
        return method.solve(context.at(start), vector, [forget])


def damped(method: Method, damping: Any) -> Method:
    """The method with this damping; itself where there is none to change."""
    if damping is None or not hasattr(method, "damping") or not is_dataclass(method):
        return method
    return replace(method, damping=damping)
