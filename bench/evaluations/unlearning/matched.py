"""Matched forgetting: every direction is followed until it has forgotten as much, then its price is read."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.evaluations.unlearning.base import Parameters, flat

FIRST, GROWTH, MOST, HALVINGS = 1e-2, 1.2, 1e4, 8
TOLERANCE = 0.1  # of the target


@dataclass(frozen=True)
class Matched:
    """The length of the step, the forget loss there, and whether that is the target's: a direction along which the loss
    jumps over it, or never comes up to it, is not matched."""

    step: float
    loss: float
    reached: bool


def unit(direction: Parameters) -> Parameters:
    norm = float(flat(direction).double().norm())
    if norm == 0:
        raise ValueError("a direction of length 0 leads nowhere")
    return {name: value / norm for name, value in direction.items()}


def matched(loss_at: Callable[[float], float], target: float) -> Matched:
    """The first step (along a unit direction) whose forget loss is at least `target`: it grows by 1.2 from 0.01 until
    the loss is passed, then is bisected eight times."""
    low, high = 0.0, FIRST
    while (loss := loss_at(high)) < target:
        low, high = high, high * GROWTH
        if high > MOST:
            return Matched(low, loss, False)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if (there := loss_at(middle)) >= target:
            high, loss = middle, there
        else:
            low = middle
    return Matched(high, loss, abs(loss - target) <= TOLERANCE * target)
