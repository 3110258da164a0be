"""Data Shapley and Beta Shapley: what an example adds to those that come before it, over random orders."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from methods.base import Problem
from methods.valuation.utility import Valuation, rows_by_id
from tasks.base import Examples, Task
from tasks.errors import require


@dataclass(frozen=True)
class Walks:
    """Orders of the rows (P, N), and the sizes 0 = s_0 < … < s_K = N of the beginnings that are looked at. Order p is
    followed up to beginning `reached[p]`; what comes behind adds nothing."""

    orders: Tensor
    sizes: Tensor
    reached: Tensor  # (P,), 1 to K

    def masks(self, k: int) -> Tensor:
        """The k-th beginning of each order, (P, N)."""
        return (self.orders.argsort(1) < self.sizes[k]).double()


@dataclass(frozen=True)
class Shapley(Valuation):
    """score(q, i) = mean over orders of w(j) [v(those up to i, q) − v(those before i, q)], j the place of i from 1

    Over `permutations` random orders. w = 1 for alpha = beta = 1: the Shapley value (Ghorbani & Zou 2019, Data Shapley,
    algorithm 1). Else Beta Shapley (Kwon & Zou 2022, §3.3), w as in `cardinality_weights`: alpha > beta favours small
    subsets, where the noise of training hides less.

    `prefixes` beginnings of each order are trained, evenly spaced, the last being everything; null: one an example, as
    in the papers. Those between two of them share their gain equally, w being its mean over their places.
    `truncation`: an order is left at the first beginning S with |v(D) − v(S)| < truncation · |v(D) − v(∅)|, v averaged
    over val: which trainings are made depends on no query. What comes behind adds 0. At 0 all are made.
    permutations · (prefixes − 1) + 1 trainings a repeat at most.
    """

    permutations: int
    prefixes: int | None
    truncation: float
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.permutations >= 1, "method.permutations", self.permutations, "1 or more")
        require(self.prefixes is None or self.prefixes >= 2, "method.prefixes", self.prefixes, "2 or more, or null")
        require(0 <= self.truncation < 1, "method.truncation", self.truncation, "0 <= truncation < 1")
        require(self.alpha > 0, "method.alpha", self.alpha, "above 0")
        require(self.beta > 0, "method.beta", self.beta, "above 0")

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        walks = problem.once((self, "walks"), lambda: self._walks(problem))
        return credited(walks, self._worths(problem, walks, queries), cardinality_weights(len(problem.train), self))

    def _walks(self, problem: Problem) -> Walks:
        """Trains the beginnings place by place, those of all living orders together."""
        sizes = self._sizes(problem.task)
        rng, rows = problem.generator("valuation", "permutations"), torch.as_tensor(rows_by_id(problem.train))
        n, last = len(rows), len(sizes) - 1
        orders = torch.stack([rows[torch.randperm(n, generator=rng)] for _ in range(self.permutations)])
        walks = Walks(orders, sizes, torch.full((len(orders),), last))
        if self.truncation == 0:
            return walks
        val = problem.task.splits["val"]
        nothing, everything = self._ends(problem, val).mean(1)
        alive = torch.arange(len(orders))
        for k in range(1, last):
            worth = self.worth(problem, walks.masks(k)[alive], val).mean(1)
            near = (everything - worth).abs() < self.truncation * (everything - nothing).abs()
            walks.reached[alive[near]] = k
            alive = alive[~near]
            if not len(alive):
                break
        return walks

    def _sizes(self, task: Task) -> Tensor:
        n = len(task.train)
        prefixes = n if self.prefixes is None else self.prefixes
        require(prefixes <= n, "method.prefixes", prefixes, f"2 to {n}, or null for one an example")
        return torch.linspace(0, n, prefixes + 1, dtype=torch.float64).round().long()

    def _ends(self, problem: Problem, examples: Examples) -> Tensor:
        """v(∅) and v(D), (2, Q)."""
        n = len(problem.train)
        return self.worth(problem, torch.stack([torch.zeros(n), torch.ones(n)]), examples)

    def _worths(self, problem: Problem, walks: Walks, queries: Examples) -> Tensor:
        """Of each beginning of each order, (P, K + 1, Q); behind its end an order is worth what it was there."""
        nothing, everything = self._ends(problem, queries)
        last = len(walks.sizes) - 1
        found = nothing.expand(len(walks.orders), last + 1, -1).clone()
        found[:, last] = everything
        trained = torch.arange(1, last)[None] <= walks.reached[:, None]  # (P, K − 1)
        if trained.any():
            masks = torch.stack([walks.masks(k) for k in range(1, last)], 1)
            found[:, 1:last][trained] = self.worth(problem, masks[trained], queries)
        upto = torch.minimum(torch.arange(last + 1)[None], walks.reached[:, None])
        return found.gather(1, upto[..., None].expand_as(found))

    def retrainings(self, task: Task) -> int:
        return self.repeats * (self.permutations * (len(self._sizes(task)) - 2) + 1)


def cardinality_weights(n: int, of: Shapley) -> Tensor:
    """w(j) = N · C(N−1, j−1) · B(j + β − 1, N − j + α) / B(α, β), j = 1 … N: (N,), of mean 1."""
    from scipy.special import betaln, gammaln

    j = np.arange(1, n + 1)
    choices = gammaln(n) - gammaln(j) - gammaln(n - j + 1)
    logs = np.log(n) + choices + betaln(j + of.beta - 1, n - j + of.alpha) - betaln(of.alpha, of.beta)
    return torch.as_tensor(np.exp(logs))


def credited(walks: Walks, worth: Tensor, weights: Tensor) -> Tensor:
    """Mean over the orders of the weighted gains, worth (P, K + 1, Q), weights (N,) -> (Q, N)."""
    count = walks.sizes.diff()
    total = torch.cat([torch.zeros(1, dtype=weights.dtype), weights.cumsum(0)])[walks.sizes].diff()
    shares = worth.diff(dim=1) * (total / count**2)[:, None]  # (P, K, Q): mean weight · gain / members
    step = torch.searchsorted(walks.sizes, walks.orders.argsort(1), right=True) - 1  # (P, N): with whom each row came
    scores = torch.zeros(worth.shape[2], walks.orders.shape[1], dtype=worth.dtype)
    for share, came in zip(shares, step, strict=True):
        scores += share[came].T
    return scores / len(shares)
