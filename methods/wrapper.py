"""A method that asks another one."""

from dataclasses import dataclass

from methods.base import Method
from tasks.base import Task


@dataclass(frozen=True)
class Wrapper(Method):
    """What it promises and needs is what its base does, unless it says otherwise."""

    base: Method

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        return self.base.calibrated

    @property
    def signed(self) -> bool:  # type: ignore[override]
        return self.base.signed

    def unmet(self, task: Task) -> str | None:
        return super().unmet(task) or self.base.unmet(task)

    def inputs(self) -> dict[str, str]:
        return self.base.inputs()
