"""A prefilter: the base scores of its candidates, nothing of others, and how many of the best it lets through."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from cases import close, three_classes
from torch import Tensor

from bench.run import preset
from methods.base import Method, Problem, Unsupported
from methods.prefilter import Prefilter
from tasks.base import Examples
from tasks.errors import UserError
from tasks.training.train import train

TASK = three_classes()
QUERIES = TASK.splits["query"]
N = len(TASK.train)


@dataclass(frozen=True)
class Fixed(Method):
    """Row q of the table for the q-th query."""

    table: Tensor

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        return self.table[[QUERIES.ids.index(i) for i in queries.ids]]


def problem() -> Problem:
    return Problem(TASK, 0, partial(train, TASK))


def drawn(seed: int) -> Tensor:
    return torch.randn(len(QUERIES), N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_candidates_have_the_scores_of_the_base_and_others_none() -> None:
    found, scores = drawn(0), drawn(1)
    got = Prefilter(Fixed(scores), Fixed(found), 3, None).attribute(problem(), QUERIES)
    for q in range(len(QUERIES)):
        first = found[q].abs().argsort(descending=True)[:3]  # who is most unlike is of interest, too
        assert set(got[q].nonzero()[:, 0].tolist()) == set(first.tolist()) and close(got[q, first], scores[q, first])
    assert close(Prefilter(Fixed(scores), Fixed(found), 10 * N, None).attribute(problem(), QUERIES), scores)


def test_influence_takes_gradients_of_candidates_only() -> None:
    found = torch.zeros(len(QUERIES), N, dtype=torch.float64)
    found[:, [2, 5]] = 1.0
    whole, asked = problem(), problem()
    base = preset("graddot")
    wanted = base.attribute(whole, QUERIES)
    got = Prefilter(base, Fixed(found), 2, None).attribute(asked, QUERIES)
    assert close(got[:, [2, 5]], wanted[:, [2, 5]]) and got.count_nonzero() == 2 * len(QUERIES)
    assert whole.meter.gradients - asked.meter.gradients == N - 2


def test_recall_by_hand_and_without_charge() -> None:
    scores = torch.arange(N, dtype=torch.float64).expand(len(QUERIES), N)
    found = torch.zeros(len(QUERIES), N, dtype=torch.float64)
    found[0, [N - 1, N - 2, 0]] = 1.0  # two of the best four
    found[1:, [N - 4, 1, 2]] = -1.0  # one
    filtered = Prefilter(Fixed(scores), Fixed(found), 3, 4)
    asked = problem()
    got = filtered.report(asked, QUERIES)
    assert list(got) == ["prefilter_recall4"] and got["prefilter_recall4"].tolist() == [0.5] + [0.25] * (
        len(QUERIES) - 1
    )
    assert replace(filtered, recall=None).report(asked, QUERIES) == {}
    Prefilter(preset("graddot"), Fixed(found), 3, 4).report(asked, QUERIES)
    assert asked.meter.gradients == 0


def test_what_it_does_not_offer_is_told() -> None:
    with pytest.raises(Unsupported, match="a value has none"):
        preset("prefilter").value(problem())
    assert "texts" in str(preset("prefilter").unmet(TASK))
    for key, settings in {"method.top": (0, None), "method.recall": (3, 0)}.items():
        with pytest.raises(UserError, match=key):
            Prefilter(Fixed(drawn(0)), Fixed(drawn(1)), *settings)
