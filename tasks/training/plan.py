"""What to retrain: one row a training, and the designs that truths are made of."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tasks.base import named_seed
from tasks.errors import UserError, require

REGIMES = ("fixed", "common", "fresh")


@dataclass(frozen=True)
class Plan:
    """Row m trains with `weights[m]` (N,) >= 0 on the examples' losses (0 removes, 1 keeps) and with `seeds[m]`.

    `own_batches`: batches are drawn from the rows of positive weight; otherwise from all rows, a removed example being
    masked inside its batch, whose denominator stays.
    """

    weights: Tensor  # (M, N), float64
    seeds: tuple[int, ...]  # (M,)
    own_batches: bool

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.seeds):
            raise ValueError(f"{len(self.weights)} rows of weights, {len(self.seeds)} seeds")
        if not (torch.isfinite(self.weights).all() and (self.weights >= 0).all()):
            raise UserError("weights", problem="hold a negative or non-finite number", allowed="0 or more")
        if (self.weights.sum(1) == 0).any():
            raise UserError("weights", problem="leave a training without any example")

    def __len__(self) -> int:
        return len(self.seeds)

    def keys(self) -> list[str]:
        """Names each row by what it does: equal rows of different designs are one training."""
        rows = np.ascontiguousarray(self.weights.numpy().astype(np.float64))
        head = b"own" if self.own_batches else b"shared"
        return [
            hashlib.sha256(head + seed.to_bytes(8, "big") + row.tobytes()).hexdigest()
            for seed, row in zip(self.seeds, rows, strict=True)
        ]

    def select(self, rows: Sequence[int]) -> "Plan":
        return Plan(self.weights[list(rows)], tuple(self.seeds[r] for r in rows), self.own_batches)


def explained_seed(seed: int) -> int:
    """The seed of the explained run that the user calls `seed`."""
    return named_seed("explained", seed)


def planned(weights: Tensor, repeats: int, regime: str, seed: int, explained: int) -> Plan:
    """Rows repeat by repeat: `weights` (S, N) under each of `repeats` seeds, (repeats · S, N) in all.

    fixed   the explained run's own initialisation and batch order; it has no noise, so it is not repeated
    common  one new seed a repeat, shared by all subsets of that repeat; batches drawn from the subset
    fresh   a new seed for every subset of every repeat
    Seeds of truths and of explained runs are drawn from different names and never meet.
    """
    if regime not in REGIMES:
        raise UserError("truth.regime", regime, allowed=REGIMES)
    require(repeats >= 1, "truth.repeats", repeats, "1 or more")
    subsets = len(weights)
    if regime == "fixed":
        return Plan(weights, (explained_seed(explained),) * subsets, own_batches=False)
    seeds = [
        named_seed("truth", seed, r) if regime == "common" else named_seed("truth", seed, r, s)
        for r in range(repeats)
        for s in range(subsets)
    ]
    return Plan(weights.repeat(repeats, 1), tuple(seeds), own_batches=True)


def random_subsets(n: int, subsets: int, fraction: float, seed: int) -> Tensor:
    """Masks (S, N) that keep `fraction` of N examples, uniform without replacement, all distinct."""
    require(0 < fraction < 1, "truth.lds.fraction", fraction, "0 < fraction < 1")
    require(subsets >= 3, "truth.lds.subsets", subsets, "3 or more (a rank correlation over fewer says nothing)")
    size = round(fraction * n)
    require(0 < size < n, "truth.lds.fraction", fraction, f"one that keeps 1 to {n - 1} of {n} examples")
    rng = np.random.default_rng(named_seed("subsets", seed))
    masks = torch.zeros(subsets, n, dtype=torch.float64)
    seen: set[bytes] = set()
    row = tries = 0
    while row < subsets:
        chosen = np.sort(rng.permutation(n)[:size])
        tries += 1
        if chosen.tobytes() in seen:
            require(
                tries < 100 * subsets, "truth.lds.subsets", subsets, f"fewer: {n} examples have {len(seen)} subsets"
            )
            continue
        seen.add(chosen.tobytes())
        masks[row, chosen] = 1
        row += 1
    return masks


def leave_one_out(n: int, rows: Sequence[int], weight: float) -> Tensor:
    """One row a left-out example: its loss is multiplied with `weight`, 0 removes it. (len(rows), N)."""
    require(weight >= 0 and weight != 1, "truth.loo.weight", weight, "0 or more, not 1")
    weights = torch.ones(len(rows), n, dtype=torch.float64)
    weights[torch.arange(len(rows)), torch.as_tensor(list(rows))] = weight
    return weights


def stratified_sample(labels: Tensor, size: int | None, seed: int) -> list[int]:
    """Rows with the classes in the proportions of `labels`; None: every row."""
    n = len(labels)
    if size is None:
        return list(range(n))
    require(1 <= size <= n, "truth.loo.sample", size, f"1 to {n}, or null for every example")
    rng = np.random.default_rng(named_seed("sample", seed))
    order = rng.permutation(n)
    classes = labels.numpy()[order]
    # Rank of each row inside its class, as a share of the class: the smallest shares first keep the proportions.
    share = np.empty(n)
    for c in np.unique(classes):
        of_class = np.flatnonzero(classes == c)
        share[of_class] = (np.arange(len(of_class)) + rng.random()) / len(of_class)
    return sorted(order[np.argsort(share, kind="stable")[:size]].tolist())
