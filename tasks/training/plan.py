"""What to retrain: one row a training, and the designs that truths are made of."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tasks.base import named_seed
from tasks.errors import UserError, require
from tasks.training.memory import free_memory

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


def planned(weights: Tensor, repeats: int, regime: str, seed: int, explained: int, name: str = "truth.lds") -> Plan:
    """Rows repeat by repeat: `weights` (S, N) under each of `repeats` seeds, (repeats · S, N) in all.

    fixed   the explained run's own initialisation and batch order; it has no noise, so it is not repeated
    common  one new seed a repeat, shared by all subsets of that repeat; batches drawn from the subset
    fresh   a new seed for every subset of every repeat
    Seeds of truths and of explained runs are drawn from different names and never meet. `name`: of the keys that a
    mistake is told by.
    """
    if regime not in REGIMES:
        raise UserError(f"{name}.regime", regime, allowed=REGIMES)
    require(repeats >= 1, f"{name}.repeats", repeats, "1 or more")
    subsets = len(weights)
    if regime == "fixed":
        return Plan(weights, (explained_seed(explained),) * subsets, own_batches=False)
    seeds = [
        named_seed("truth", seed, r) if regime == "common" else named_seed("truth", seed, r, s)
        for r in range(repeats)
        for s in range(subsets)
    ]
    return Plan(weights.repeat(repeats, 1), tuple(seeds), own_batches=True)


def random_subsets(n: int, subsets: int, fraction: float, seed: int, name: str = "truth.lds") -> Tensor:
    """Masks (S, N) that keep `fraction` of N examples, uniform without replacement, all distinct.

    Each is the beginning of one permutation, so subsets of one seed are nested from fraction to fraction (as long as
    none had to be drawn again because it was there already). `name`: the keys that a mistake is told by.
    """
    require(0 < fraction < 1, f"{name}.fraction", fraction, "0 < fraction < 1")
    require(subsets >= 3, f"{name}.subsets", subsets, "3 or more (a rank correlation over fewer says nothing)")
    size = round(fraction * n)
    require(0 < size < n, f"{name}.fraction", fraction, f"one that keeps 1 to {n - 1} of {n} examples")
    possible = math.comb(n, size)
    if subsets > possible:  # else it may be a number of thousands of digits, which Python refuses to write
        raise UserError(f"{name}.subsets", subsets, allowed=f"fewer: {n} examples have {possible} subsets of {size}")
    most = free_memory() // (4 * 8 * n)  # masks, under each seed, as a plan and on the way
    require(subsets <= most, f"{name}.subsets", subsets, f"up to {most:,}, which is what fits in memory")
    rng = np.random.default_rng(named_seed("subsets", seed))
    masks = torch.zeros(subsets, n, dtype=torch.float64)
    seen: set[bytes] = set()
    while len(seen) < subsets:
        chosen = np.sort(rng.permutation(n)[:size])
        if chosen.tobytes() not in seen:
            masks[len(seen), chosen] = 1
            seen.add(chosen.tobytes())
    return masks


def leave_out(n: int, groups: Sequence[Sequence[int]], weight: float) -> Tensor:
    """One row a group: the losses of its examples are multiplied with `weight`, 0 removes them. (len(groups), N)."""
    if not weight >= 0 or weight == 1:
        raise UserError("weight", weight, allowed="0 or more, not 1")
    weights = torch.ones(len(groups), n, dtype=torch.float64)
    for row, group in zip(weights, groups, strict=True):
        row[list(group)] = weight
    return weights


def leave_one_out(n: int, rows: Sequence[int], weight: float) -> Tensor:
    """`leave_out` of single examples."""
    require(weight >= 0 and weight != 1, "truth.loo.weight", weight, "0 or more, not 1")
    return leave_out(n, [[row] for row in rows], weight)


def random_groups(n: int, groups: int, size: int, seed: int) -> list[list[int]]:
    """Groups of `size` rows, each drawn without replacement; disjoint where N allows it."""
    rng = np.random.default_rng(named_seed("groups", seed))
    drawn: list[list[int]] = []
    pool = rng.permutation(n)
    while len(drawn) < groups:
        if len(pool) < size:
            pool = rng.permutation(n)
        drawn.append(sorted(pool[:size].tolist()))
        pool = pool[size:]
    return drawn


def class_groups(labels: Tensor, groups: int, size: int, seed: int) -> list[list[int]]:
    """Groups of `size` rows of one class, the classes taking turns."""
    rng = np.random.default_rng(named_seed("groups", seed))
    rows = [np.flatnonzero(labels.numpy() == c) for c in np.unique(labels.numpy())]
    return [sorted(rng.permutation(rows[g % len(rows)])[:size].tolist()) for g in range(groups)]


def partition(n: int, players: int, seed: int) -> list[list[int]]:
    """All rows dealt out to `players` groups whose sizes differ by one at most."""
    order = np.random.default_rng(named_seed("players", seed)).permutation(n)
    return [sorted(part.tolist()) for part in np.array_split(order, players)]


def rotations(players: int, squares: int, seed: int) -> np.ndarray:
    """Orders of players (squares · players, players): every rotation of `squares` random permutations.

    Each order is uniform among all, so Shapley estimates stay unbiased; each player comes first equally often, so what
    the empty coalition is worth, which no training tells, adds the same constant to all players.
    """
    rng = np.random.default_rng(named_seed("rotations", seed))
    first = [rng.permutation(players) for _ in range(squares)]
    return np.stack([np.roll(order, k) for order in first for k in range(players)])


def coalitions(orders: np.ndarray, groups: Sequence[Sequence[int]], n: int) -> Tensor:
    """Masks of every beginning of every order of players, (orders · players, N): row o · players + k holds the first
    k + 1 players of order o."""
    member = torch.zeros(len(groups), n, dtype=torch.float64)
    for row, group in zip(member, groups, strict=True):
        row[list(group)] = 1
    return member[torch.as_tensor(orders)].cumsum(1).flatten(0, 1)


def stratified_sample(labels: Tensor, size: int | None, seed: int, name: str = "truth.loo.sample") -> list[int]:
    """Rows with the classes in the proportions of `labels` (quarters of the range of real targets); None: every row."""
    n = len(labels)
    if labels.is_floating_point():
        labels = torch.bucketize(labels, labels.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=labels.dtype)))
    if size is None:
        return list(range(n))
    require(1 <= size <= n, name, size, f"1 to {n}, or null for every example")
    rng = np.random.default_rng(named_seed("sample", seed))
    order = rng.permutation(n)
    classes = labels.numpy()[order]
    # Rank of each row inside its class, as a share of the class: the smallest shares first keep the proportions.
    share = np.empty(n)
    for c in np.unique(classes):
        of_class = np.flatnonzero(classes == c)
        share[of_class] = (np.arange(len(of_class)) + rng.random()) / len(of_class)
    return sorted(order[np.argsort(share, kind="stable")[:size]].tolist())
