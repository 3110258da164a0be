"""How much of the identity is added to the curvature before it is inverted."""

from dataclasses import dataclass

from tasks.errors import UserError

RULES = ("absolute", "mean_eigenvalue", "trace")
SCOPES = ("block", "global")


@dataclass(frozen=True)
class Damping:
    """λ. absolute: λ = value. mean_eigenvalue: value · trace/dimension. trace: value · trace.

    Scope `block`: each block by its own eigenvalues (Grosse et al. 2023, §2.4 take 0.1 · their mean); `global`: one λ
    from all of them.
    """

    rule: str
    value: float
    scope: str

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError("method.damping.rule", self.rule, allowed=RULES)
        if self.scope not in SCOPES:
            raise UserError("method.damping.scope", self.scope, allowed=SCOPES)
        if not self.value >= 0:
            raise UserError("method.damping.value", self.value, allowed="0 or more")

    def strengths(self, traces: dict[str, float], sizes: dict[str, int]) -> dict[str, float]:
        """λ of each block, from the trace and the dimension of its curvature."""
        if self.scope == "global":
            one = self._strength(sum(traces.values()), sum(sizes.values()))
            return dict.fromkeys(traces, one)
        return {name: self._strength(traces[name], sizes[name]) for name in traces}

    def _strength(self, trace: float, size: int) -> float:
        return {"absolute": self.value, "mean_eigenvalue": self.value * trace / size, "trace": self.value * trace}[
            self.rule
        ]
