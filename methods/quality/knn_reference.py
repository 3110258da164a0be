"""Distance to the nearest rows of a clean reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Problem
from methods.quality.reference import FromReference
from methods.repsim import unit
from tasks.errors import require


@dataclass(frozen=True)
class KNNReference(FromReference):
    """value(i) = −‖z_i − z_(k)‖, z = h/‖h‖, z_(k) the k-th nearest of the rows of `reference`, the farthest where there
    are fewer (Sun et al. 2022, §3)."""

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k >= 1, "method.k", self.k, "1 or more")

    def value(self, problem: Problem) -> Tensor:
        known, h = (unit(rows) for rows in self.compared(problem))
        distances = torch.cdist(h, known, compute_mode="donot_use_mm_for_euclid_dist")
        return -distances.kthvalue(min(self.k, len(known)), dim=1).values
