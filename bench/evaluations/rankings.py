"""The two ways in which a method ranks training examples, which are never mixed."""

from collections.abc import Iterator

from bench.evaluations.base import Case, NotApplicable, finite
from bench.statistics import Array
from methods.base import Unsupported


def rankings(case: Case) -> Iterator[tuple[str, Array, int]]:
    """Name, helpfulness (N,) (lowest is most suspicious), and how many queries were not finite: by `value`
    (self-influence, loss …), and by the mean attribution to the clean `val` split, as far as the method offers them."""
    found = 0
    for name, make in {"value": lambda: case.value()[None], "attribution": lambda: case.attribution("val")}.items():
        try:
            scores, nan = finite(make())
        except (Unsupported, NotApplicable):
            continue
        found += 1
        yield name, scores.mean(0), nan
    if not found:
        raise NotApplicable("the method neither values nor attributes")
