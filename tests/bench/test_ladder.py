"""The ladder: each solver at the damping that the validation split prefers."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench import ladder, records


def record(method: str, damping: float | None, seed: int, lds: float, val: float | None, **changes: Any) -> Any:
    settings = None if damping is None else {"rule": "mean_eigenvalue", "value": damping, "scope": "block"}
    metrics: dict[str, Any] = {"lds": {"value": lds, "ceiling": 0.9}}
    if val is not None:
        metrics["lds_val"] = {"value": val}
    return {
        "method_label": method,
        "seed": seed,
        "config": {"method": {"damping": settings}},
        "metrics": metrics,
    } | changes


def test_tuned_by_the_validation_split_and_judged_by_the_queries() -> None:
    found = [
        record("good", 0.1, 0, 0.30, 0.70),
        record("good", 0.1, 1, 0.50, 0.50),
        record("good", 0.3, 0, 0.90, 0.40),  # better for the queries, worse for val: must not be taken
        record("good", 0.3, 1, 0.90, 0.40),
        record("other", 0.1, 0, 0.60, 0.10),
        record("other", 0.1, 1, 0.60, 0.10),
    ]
    first, second = ladder.rows(found)
    assert (first["method"], first["lds"], first["sd over seeds"], first["seeds"]) == ("other", 0.6, 0.0, 2)
    assert second["lds"] == pytest.approx(0.4) and second["lds_val"] == pytest.approx(0.6)
    assert second["sd over seeds"] == pytest.approx(0.1 * 2**0.5)
    assert (second["damping"], second["dampings tried"]) == ("mean_eigenvalue 0.1 block", 2)
    assert second["ceiling"] == pytest.approx(0.9)


def test_a_damping_with_fewer_seeds_is_not_tuned_by() -> None:
    found = [record("m", 0.1, seed, 0.3, 0.3) for seed in (0, 1, 2)] + [record("m", 0.3, 0, 0.99, 0.99)]
    (row,) = ladder.rows(found)
    assert row["damping"] == "mean_eigenvalue 0.1 block" and (row["seeds"], row["dampings tried"]) == (3, 1)


def test_what_has_no_damping_or_no_val_is_left_out() -> None:
    assert ladder.rows([record("m", None, 0, 0.3, 0.3), record("n", 0.1, 0, 0.3, None)]) == []
    (row,) = ladder.rows([record("m", 0.1, 0, 0.3, 0.2)])
    assert row["sd over seeds"] is None


def test_the_command_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [record("m", 0.1, seed, 0.3, 0.3) for seed in (0, 1)]
    monkeypatch.setattr(records, "read_all", lambda out, tasks: [(json.loads(json.dumps(r)), out) for r in found])
    assert ladder.main([f"out={tmp_path}", "task=digits"]) == 0
    (row,) = pd.read_csv(tmp_path / "tables" / "ladder-digits.csv").to_dict("records")
    assert (row["method"], row["lds"], row["seeds"]) == ("m", 0.3, 2)
    assert "mean_eigenvalue 0.1 block" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "said"),
    [("tsk=digits", "tsk=digits"), ("digits", "digits"), ("task=", "task="), ("out=nowhere", "-m study=ladder")],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ladder.main([argument]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing is written"
