"""λ by hand: three rules, two scopes."""

import math

import pytest

from methods.curvature.base import positive
from methods.curvature.damping import Damping
from tasks.errors import UserError

TRACES = {"first": 6.0, "second": 40.0}
SIZES = {"first": 3, "second": 5}


@pytest.mark.parametrize(
    ("rule", "scope", "expected"),
    [
        ("absolute", "block", {"first": 0.5, "second": 0.5}),
        ("absolute", "global", {"first": 0.5, "second": 0.5}),
        ("mean_eigenvalue", "block", {"first": 1.0, "second": 4.0}),  # 0.5 · 6/3, 0.5 · 40/5
        ("mean_eigenvalue", "global", {"first": 2.875, "second": 2.875}),  # 0.5 · 46/8, not the mean of 1 and 4
        ("trace", "block", {"first": 3.0, "second": 20.0}),
        ("trace", "global", {"first": 23.0, "second": 23.0}),
    ],
)
def test_strengths(rule: str, scope: str, expected: dict[str, float]) -> None:
    assert Damping(rule, 0.5, scope).strengths(TRACES, SIZES) == pytest.approx(expected)
    backwards = dict(reversed(TRACES.items()))
    assert Damping(rule, 0.5, scope).strengths(backwards, SIZES) == pytest.approx(expected)


def test_what_is_handed_in_stays() -> None:
    traces, sizes = dict(TRACES), dict(SIZES)
    Damping("trace", 0.5, "block").strengths(traces, sizes)
    assert traces == TRACES and sizes == SIZES


@pytest.mark.parametrize(
    ("rule", "value", "scope", "key"),
    [
        ("relative", 0.1, "block", r"method\.damping\.rule=relative.*absolute, mean_eigenvalue, trace"),
        ("absolute", 0.1, "module", r"method\.damping\.scope=module.*block, global"),
        ("absolute", -1e-9, "block", r"method\.damping\.value=-1e-09.*0 or more"),
        ("absolute", math.nan, "block", r"method\.damping\.value=nan"),
    ],
)
def test_impossible_settings_are_refused(rule: str, value: float, scope: str, key: str) -> None:
    with pytest.raises(UserError, match=key):
        Damping(rule, value, scope)


def test_only_a_system_that_has_an_inverse_is_solved() -> None:
    assert positive(0.1, 0.0, 1.0, "it") == 0.1
    assert positive(0.0, 0.2, 1.0, "it") == 0.0
    for strength, smallest in ((0.0, 0.0), (0.1, -0.1), (1e-16, 0.0)):
        with pytest.raises(UserError, match=r"method\.damping\.value.*leave it singular"):
            positive(strength, smallest, 1.0, "it")
