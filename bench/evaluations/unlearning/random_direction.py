"""A step in a random direction: what forgetting costs when it knows nothing."""

from dataclasses import dataclass

import torch

from bench.evaluations.unlearning.base import Context, Parameters, flat
from bench.evaluations.unlearning.one_shot import OneShot


@dataclass(frozen=True)
class RandomDirection(OneShot):
    """θ0 + `scale` · u, u uniform on the unit sphere; of use at matched forgetting only."""

    def direction(self, context: Context) -> Parameters:
        rng = context.generator("random direction")
        drawn = {
            name: torch.randn(p.shape, generator=rng, dtype=torch.float64) for name, p in sorted(context.start.items())
        }
        norm = flat(drawn).norm()
        return {name: (drawn[name] / norm).to(p) for name, p in context.start.items()}
