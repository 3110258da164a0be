"""Tables: means over seeds by hand-computed numbers, no two truths in one column, and nothing that failed is lost."""

import csv
import io
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import records
from bench.aggregate import Cell, Row, Stored, Table, main_column, number, tables
from bench.formats import cell_text, escape_latex, escape_markdown, tidy, to_console, to_csv, to_latex, to_markdown
from bench.tables import load, main, write

COMMON = {"regime": "common", "fraction": 0.5, "subsets": 50, "repeats": 2, "seed": 0}
FIXED = {"regime": "fixed", "sample": 100, "repeats": 1}
SHARED = np.random.default_rng(0).normal(0, 0.05, 400)  # what the resamples do to every method alike


def metric(value: float | None, **changes: Any) -> dict[str, Any]:
    bounds = {"low": value - 0.1, "high": value + 0.1} if value is not None else {"low": None, "high": None}
    return {"value": value, **bounds, "ceiling": 0.9, "n": 50, "nan": 0, "better": "higher", "truth": COMMON, **changes}


def run(
    method: str = "ekfac",
    seed: int = 0,
    metrics: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    replicates: dict[str, np.ndarray] | None = None,
    **changes: Any,
) -> Stored:
    record = {
        "schema": 1,
        "run_id": records.run_id({"run": repr((method, seed, metrics, config, changes))}),
        "status": "ok",
        "reason": None,
        "task": "digits",
        "data": {"source": "bundled", "fingerprint": "abcdef0123456789", "n_train": 1000},
        "model": "mlp",
        "method": method,
        "method_label": method,
        "seed": seed,
        "config": {"method": {"seed": seed, **(config or {})}},
        "metrics": {"lds": metric(0.4)} if metrics is None else metrics,
        "fitness": {"test_accuracy": 0.93},
        "cost": {"seconds": 2.0, "phases": {}, "peak_memory_bytes": 2**20, "trainings": 1},
        "provenance": {"started": "2026-01-01T00:00:00"},
        **changes,
    }
    records.validate(record)
    return record, replicates or {}


def only(stored: list[Stored]) -> Table:
    (table,) = tables(stored)
    return table


def row(table: Table, label: str) -> Row:
    (found,) = [row for row in table.rows if row.label == label]
    return found


def cell(table: Table, label: str, column: int = 0) -> Cell:
    found = row(table, label).cells[column]
    assert found is not None
    return found


def bold(table: Table, column: int = 0) -> set[str]:
    return {row.label for row in table.rows if (found := row.cells[column]) and found.best}


# --- rows ------------------------------------------------------------------------------------------------------------


def test_one_seed_keeps_its_own_interval() -> None:
    table = only([run(metrics={"lds": metric(0.4, low=0.31, high=0.52)}, replicates={"lds": np.zeros(9)})])
    found = cell(table, "ekfac")
    assert (found.value, found.low, found.high, found.sd, found.seeds) == (0.4, 0.31, 0.52, None, 1)


def test_seeds_are_averaged_replicate_by_replicate() -> None:
    replicates = [np.arange(101) / 100, np.arange(101)[::-1] / 100 + 0.2, np.full(101, 0.1)]
    values, ceilings = (0.2, 0.4, 0.9), (0.9, 0.8, 0.7)
    stored = [
        run(
            seed=seed,
            metrics={"lds": metric(values[seed], ceiling=ceilings[seed], n=50 - seed, nan=seed)},
            replicates={"lds": replicates[seed]},
            cost={"seconds": 1.0 + seed, "trainings": 1, "peak_memory_bytes": None},
        )
        for seed in range(3)
    ]
    table = only(stored)
    found = cell(table, "ekfac")
    assert found.value == pytest.approx(0.5)
    assert found.sd == pytest.approx(np.sqrt((0.09 + 0.01 + 0.16) / 2))
    # index by index the first two sum to 1.2 everywhere: the averaged replicates are (1.2 + 0.1) / 3, without spread
    assert (found.low, found.high) == pytest.approx((1.3 / 3, 1.3 / 3))
    assert found.ceiling == pytest.approx(0.8)
    assert (found.n, found.nan, found.seeds) == (48, 3, 3)
    assert row(table, "ekfac").seeds == (0, 1, 2)
    assert row(table, "ekfac").costs["seconds"] == 2.0
    assert row(table, "ekfac").costs["peak_memory_bytes"] is None


def test_the_interval_of_averaged_replicates_is_its_percentiles() -> None:
    stored = [run(seed=s, replicates={"lds": np.arange(101.0) * (s + 1)}) for s in range(2)]
    found = cell(only(stored), "ekfac")
    assert (found.low, found.high) == pytest.approx((1.5 * 2.5, 1.5 * 97.5))
    assert found.sd is None  # two seeds are no spread


@pytest.mark.parametrize("second", [None, np.zeros(7)])
def test_without_equal_replicates_the_bounds_are_averaged(second: np.ndarray | None) -> None:
    stored = [
        run(seed=0, metrics={"lds": metric(0.4, low=0.3, high=0.5)}, replicates={"lds": np.zeros(9)}),
        run(
            seed=1,
            metrics={"lds": metric(0.6, low=0.4, high=0.9)},
            replicates={} if second is None else {"lds": second},
        ),
    ]
    found = cell(only(stored), "ekfac")
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.35, 0.7))


def test_a_newer_number_takes_the_place_of_an_older_one_and_says_so() -> None:
    stored = [
        run(metrics={"lds": metric(0.7)}, provenance={"started": "2026-02-01"}),
        run(metrics={"lds": metric(0.4)}, provenance={"started": "2026-01-01"}),
    ]
    for order in (stored, stored[::-1]):
        table = only(order)
        assert (cell(table, "ekfac").value, cell(table, "ekfac").seeds) == (0.7, 1)
        assert table.notes == ("1 older number of the same row, seed and truth not shown",)


def test_runs_of_other_evaluations_fill_one_row() -> None:
    table = only([run(), run(metrics={"loo_pearson": metric(0.2, truth=FIXED)})])
    assert [column.metric for column in table.columns] == ["lds", "loo_pearson"]
    assert [found and found.value for found in row(table, "ekfac").cells] == [0.4, 0.2]
    assert table.notes == ()


def test_equal_labels_show_what_tells_them_apart() -> None:
    configs = [{"damping": {"rule": "mean", "value": v}, "modules": ["a"]} for v in (0.01, 0.1)]
    table = only([run(config=config) for config in configs] + [run("kfac"), run("graddot", config={"x": 1})])
    assert {row.label for row in table.rows} == {
        "ekfac (damping.value=0.01)",
        "ekfac (damping.value=0.1)",
        "kfac",
        "graddot",
    }


def test_a_key_that_only_one_config_has_is_shown_there() -> None:
    table = only([run(config={"k": None, "a": [1, 2]}), run(config={"a": [1, 2]})])
    assert {row.label for row in table.rows} == {"ekfac (k=null)", "ekfac"}


def test_equal_labels_of_two_methods_are_told_apart() -> None:
    table = only([run("a", method_label="mine"), run("b", method_label="mine")])
    assert {row.label for row in table.rows} == {"mine (method=a)", "mine (method=b)"}


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "sst2"},
        {"model": "logreg"},
        {"data": {"source": "generated", "fingerprint": "abcdef0123456789", "n_train": 1000}},
        {"data": {"source": "bundled", "fingerprint": "0000000000000000", "n_train": 1000}},
        {"data": {"source": "bundled", "fingerprint": "abcdef0123456789", "n_train": 500}},
        {"config": {"method": {}, "model": {"hidden": [32]}}},
    ],
)
def test_other_data_and_other_models_are_other_tables(changes: dict[str, Any]) -> None:
    other = run()[0]
    found = tables([run(), ({**other, **changes}, {})])
    assert len(found) == len({table.name for table in found}) == 2
    assert all(len(table.rows) == 1 for table in found)


def test_models_of_one_name_are_told_apart_in_the_caption() -> None:
    stored = [
        ({**run()[0], "config": {"method": {}, "model": {"hidden": [width], "dtype": "float32"}}}, {})
        for width in (32, 64)
    ]
    captions = sorted(table.caption for table in tables(stored))
    assert "mlp (hidden=[32])" in captions[0] and "mlp (hidden=[64])" in captions[1]


def test_the_unit_of_losses_is_that_of_the_model() -> None:
    assert only([run()]).unit == "nats"
    assert only([run(fitness={"test_accuracy": 1.0, "test_loss_per_token": 0.1}), run("b")]).unit == "nats a token"


def test_the_caption_says_on_what_the_numbers_stand() -> None:
    stored = [run(seed=s, fitness={"test_accuracy": 0.9 + s / 50}) for s in range(3)] + [run("random")]
    assert only(stored).caption == (
        "digits, bundled data abcdef01, 1,000 training examples, mlp, test accuracy 0.92, 1 to 3 seeds"
    )
    facts = {"test_perplexity": 21.5, "flips_memorised": 0.4, "floor": {"perplexity": 30}, "fit": True}
    assert ", mlp, test perplexity 21.50, 1 seed" in only([run(fitness=facts)]).caption
    assert only([run(fitness={})]).caption.endswith("mlp, fitness not measured, 1 seed")


def test_the_order_of_the_records_does_not_matter() -> None:
    stored = [run(m, s, {"lds": metric(v)}) for m, s, v in (("a", 0, 0.1), ("a", 1, 0.2), ("b", 0, 0.2), ("c", 0, 0.3))]
    texts = {to_csv(only(list(order))) + to_markdown(only(list(order))) for order in itertools.permutations(stored)}
    assert len(texts) == 1
    assert [row.label for row in only(stored).rows] == ["c", "b", "a"]  # best first


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*COMMON, "extra"])
def test_other_truths_never_share_a_column(key: str) -> None:
    other = {**COMMON, key: {"regime": "fresh", "fraction": 0.3}.get(key, 7)}
    table = only([run("a"), run("b", metrics={"lds": metric(0.5, truth=other)})])
    assert len(table.columns) == 2
    assert len({column.label for column in table.columns}) == 2
    for found in table.rows:
        assert sum(cell is not None for cell in found.cells) == 1
    assert bold(table, 0) == bold(table, 1) == set()  # nothing to compare with


def test_the_label_names_the_truth() -> None:
    (column,) = only([run()]).columns
    assert column.label == "lds common 50%x50x2"
    other = run("b", metrics={"lds": metric(0.5, truth={**COMMON, "seed": 1})})
    assert [c.label for c in only([run(), other]).columns] == [
        "lds common 50%x50x2 seed=0",
        "lds common 50%x50x2 seed=1",
    ]


def test_a_fixed_truth_that_follows_the_explained_seed_is_one_column() -> None:
    stored = [run(seed=s, metrics={"loo": metric(0.1 * s, truth={**FIXED, "seed": s})}) for s in (1, 2, 3)]
    table = only(stored)
    assert [dict(column.truth) for column in table.columns] == [FIXED]
    assert (cell(table, "ekfac").seeds, cell(table, "ekfac").value) == (3, pytest.approx(0.2))


def test_the_subset_seed_of_a_fixed_truth_stays_in_its_column() -> None:
    stored = [
        run(seed=s, metrics={"lds": metric(0.5, truth={"regime": "fixed", "seed": d, "explained_seed": s})})
        for s in (0, 1)
        for d in (0, 1)
    ]
    table = only(stored)
    assert [dict(column.truth) for column in table.columns] == [{"regime": "fixed", "seed": d} for d in (0, 1)]
    assert [found and found.seeds for found in row(table, "ekfac").cells] == [2, 2]


def test_other_subsets_of_a_fixed_truth_are_another_column_even_if_they_carry_the_explained_seed() -> None:
    stored = [
        run(seed=s, metrics={"lds": metric(0.5, truth={"regime": "fixed", "seed": s, "explained_seed": s})})
        for s in (0, 1)
    ]
    assert [dict(column.truth)["seed"] for column in only(stored).columns] == [0, 1]


def test_an_unknown_metric_gets_its_column_between_the_known() -> None:
    metrics = {"base_rate": metric(0.1), "zeta": metric(0.2), "loo_pearson": metric(0.3), "lds": metric(0.4)}
    assert [c.metric for c in only([run(metrics=metrics)]).columns] == ["lds", "loo_pearson", "zeta", "base_rate"]


def test_the_ceiling_is_a_line_of_its_own() -> None:
    table = only([run(metrics={"lds": metric(0.4, ceiling=0.93), "auc": metric(0.8, ceiling=None)})])
    assert [column.ceiling for column in table.columns] == [0.93, None]
    (line,) = [line for line in to_console(table, bold=False).splitlines() if "noise ceiling" in line]
    assert line.split() == ["noise", "ceiling", "0.93", "–"]
    assert "noise ceiling" not in to_console(only([run(metrics={"auc": metric(0.8, ceiling=None)})]), bold=False)


def test_the_main_column() -> None:
    def of(*names: str) -> str | None:
        table = only([run(metrics={name: metric(0.5) for name in names})])
        index = main_column(table)
        return None if index is None else table.columns[index].metric

    assert of("loo_pearson", "value_auc", "lds") == "lds"
    assert of("loo_pearson", "value_auc") == "value_auc"
    assert of("loo_pearson", "base_rate") == "loo_pearson"
    assert of("base_rate") is None


# --- what did not come through ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["unsupported", "diverged", "failed", "unfit"])
def test_a_run_without_numbers_stays_in_the_table_with_its_reason(status: str) -> None:
    table = only([run(), run("tracin", metrics={}, status=status, reason="needs | checkpoints")])
    found = cell(table, "tracin")
    mark = "†" if status == "unfit" else "(a)"
    assert (found.status, found.value, found.mark) == (status, None, mark)
    assert table.notes == (f"{mark} {status}: needs | checkpoints",)
    assert [row.label for row in table.rows] == ["ekfac", "tracin"]
    for text in (to_console(table, bold=False), to_markdown(table), to_latex(table)):
        assert status in text and "checkpoints" in text
    assert [line["status"] for line in tidy(table)] == ["ok", status]


def test_an_unfit_number_is_shown_marked_and_not_ranked() -> None:
    unfit = {"status": "unfit", "reason": "test accuracy 0.7 below 0.85"}
    stored = [run("a", metrics={"lds": metric(0.9)}, **unfit), run("b", metrics={"lds": metric(0.3)}), run("c")]
    table = only(stored)
    assert cell_text(cell(table, "a")) == "0.90 [0.80, 1.00] †"
    assert table.notes == ("† unfit: test accuracy 0.7 below 0.85",)
    assert bold(table) == {"c"}


def test_a_table_in_which_nothing_came_through_says_why() -> None:
    table = only([run(metrics={}, status="failed", reason="out of memory")])
    assert cell_text(cell(table, "ekfac")) == "failed (a)"
    assert table.notes == ("(a) failed: out of memory",)
    assert len(tidy(table)) == 1


def test_a_seed_without_a_number_is_not_passed_over_in_silence() -> None:
    stored = [run("a", seed=0), run("a", seed=1, metrics={}, status="diverged", reason="loss is nan"), run("b")]
    table = only(stored)
    assert (cell(table, "a").seeds, cell(table, "a").value, cell(table, "a").mark) == (1, 0.4, "†")
    assert table.notes == ("† 1 of 2 seeds without a number (diverged: loss is nan)",)
    assert bold(table) == set()


def test_nan_is_counted_and_shown() -> None:
    stored = [run("a", metrics={"lds": metric(None, nan=50)}), run("b", metrics={"lds": metric(0.5, nan=3)})]
    table = only(stored)
    assert cell_text(cell(table, "a")) == "nan (50 nan)"
    assert cell_text(cell(table, "b")) == "0.50 [0.40, 0.60] (3 nan)"


def test_a_metric_that_a_method_does_not_offer() -> None:
    metrics = {"lds": metric(0.5), "value_auc": metric(None, status="unsupported", reason="no value()")}
    table = only([run(metrics=metrics)])
    assert [cell_text(found) for found in row(table, "ekfac").cells] == ["0.50 [0.40, 0.60]", "unsupported (a)"]


def test_what_was_not_measured_is_a_dash() -> None:
    table = only([run("a"), run("b", metrics={"auc": metric(0.6)})])
    assert [[cell_text(found)[:4] for found in row.cells] for row in table.rows] == [["0.40", "–"], ["–", "0.60"]]
    assert len(tidy(table)) == 2


# --- ranks -----------------------------------------------------------------------------------------------------------


def ranked(values: dict[str, float], noise: float, better: str | None = "higher", **changes: Any) -> set[str]:
    """The bold of methods whose replicates share their resamples and differ by own noise of that size."""
    generator = np.random.default_rng(1)
    stored = []
    for name, value in values.items():
        own = generator.normal(0, noise, len(SHARED)) if noise else 0.0
        stored.append(run(name, 0, {"lds": metric(value, better=better)}, replicates={"lds": value + SHARED + own}))
    return bold(only(stored))


def test_pairing_tells_methods_apart_that_their_intervals_do_not() -> None:
    assert 2 * SHARED.std() > 0.02  # the intervals overlap widely
    assert ranked({"a": 0.42, "b": 0.40, "c": 0.10}, noise=0.002) == {"a"}


def test_methods_that_cannot_be_told_apart_are_bold_together() -> None:
    assert ranked({"a": 0.42, "b": 0.40, "c": 0.10}, noise=0.02) == {"a", "b"}


@pytest.mark.parametrize(("better", "expected"), [("higher", {"d"}), ("lower", {"a"}), ("one", {"c"}), (None, set())])
def test_the_direction_of_a_metric(better: str | None, expected: set[str]) -> None:
    assert ranked({"a": -2.0, "b": 0.1, "c": 1.2, "d": 3.0}, noise=0.001, better=better) == expected


def test_slopes_on_both_sides_of_one_tie() -> None:
    assert ranked({"a": 0.8, "b": 1.2, "c": 2.0}, noise=0.2, better="one") == {"a", "b"}


def test_a_metric_without_direction_counts_upwards() -> None:
    without = metric(0.3)
    del without["better"]
    assert bold(only([run("a", metrics={"lds": without}), run("b", metrics={"lds": metric(0.2)})])) == {"a"}


def test_equal_numbers_are_bold_together_without_replicates() -> None:
    assert bold(only([run("a"), run("b"), run("c", metrics={"lds": metric(0.39)})])) == {"a", "b"}


def test_one_row_alone_is_not_the_best() -> None:
    assert bold(only([run()])) == set()


def test_replicates_of_other_lengths_are_not_paired() -> None:
    stored = [
        run("a", metrics={"lds": metric(0.42)}, replicates={"lds": 0.42 + SHARED}),
        run("b", metrics={"lds": metric(0.41)}, replicates={"lds": 0.41 + SHARED[:-1]}),
    ]
    assert bold(only(stored)) == {"a"}


def test_pairs_are_made_over_the_seeds_that_both_have() -> None:
    def of(name: str, seed: int, value: float) -> Stored:
        return run(name, seed, {"lds": metric(value)}, replicates={"lds": value + SHARED})

    stored = [of("a", 0, 0.4), of("a", 1, 0.8), of("b", 0, 0.41), of("c", 1, 0.5), of("d", 2, 0.1)]
    table = only(stored)
    assert bold(table) == {"a", "b"}  # on seed 0 b is not worse; c is on seed 1; d shares none
    assert {d.row: round(d.difference, 12) for d in table.differences} == {"b": -0.01, "c": 0.3}


def without_intervals(values: dict[str, list[float]]) -> Table:
    """Figures that have one number a seed, the less the better."""
    bare = {"low": None, "high": None, "better": "lower"}
    return only([
        run(name, seed, {"loss": metric(value, **bare)})
        for name, by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ])  # fmt: skip


def test_without_replicates_rows_are_told_apart_over_seeds() -> None:
    """Differences of .1, .2, .3: t = 2 √3, and with two degrees of freedom p = 1 − t / √(t² + 2)."""
    table = without_intervals({"a": [0.1, 0.2, 0.3], "b": [0.2, 0.4, 0.6], "c": [1.1, 1.21, 1.29]})
    assert bold(table) == {"a", "b"}
    b, c = sorted(table.differences, key=lambda d: d.row)
    assert (b.best, b.row, c.row) == ("a", "b", "c")
    assert (b.difference, b.p) == pytest.approx((0.2, 1 - 12**0.5 / 14**0.5))
    assert (b.low, b.high) == pytest.approx((0.2 - 4.302653 * 0.1 / 3**0.5, 0.2 + 4.302653 * 0.1 / 3**0.5))
    assert c.p == pytest.approx(2 * (1 - (30000 / 30002) ** 0.5), rel=1e-3), "times two, by Holm"
    assert bold(without_intervals({"a": [0.1, 0.2, 0.3], "c": [1.1, 1.21, 1.29]})) == {"a"}


@pytest.mark.parametrize("seeds", [1, 2])
def test_without_a_spread_nothing_is_best_or_worse(seeds: int) -> None:
    table = without_intervals({"a": [0.1] * seeds, "b": [0.5, 0.6][:seeds]})
    assert bold(table) == set() and table.differences == ()
    table = without_intervals({"a": [0.01] * seeds, "b": [0.1, 0.2, 0.3], "c": [1.1, 1.21, 1.29]})
    assert bold(table) == {"b"} and [d.row for d in table.differences] == ["c"], "a is out of the race"


def test_two_seeds_that_both_have_are_no_spread() -> None:
    bare = {"low": None, "high": None, "better": "lower"}
    stored = [run("a", seed, {"loss": metric(0.1 + seed / 100, **bare)}) for seed in (0, 1, 2)]
    stored += [run("b", seed, {"loss": metric(0.5 - seed / 9, **bare)}) for seed in (1, 2, 3)]
    stored += [run("c", seed, {"loss": metric(0.9, **bare)}) for seed in (4, 5, 6)]
    assert only(stored).differences == ()


def test_what_differs_by_as_much_on_every_seed_is_not_tested() -> None:
    assert without_intervals({"a": [0.0, 0.0, 0.0], "b": [1.0, 1.0, 1.0]}).differences == ()
    assert bold(without_intervals({"a": [0.1, 0.2, 0.3], "b": [0.1, 0.2, 0.3]})) == {"a", "b"}


def around_difference(tail: int, size: int = 199) -> np.ndarray:
    """Deviations (R,) of mean 0 by which a difference of .1 has `tail` replicates below 0: p = 2 (1 + tail) / 200."""
    deviations = np.full(size, 0.2 * tail / (size - tail))
    deviations[:tail] = -0.2
    return deviations


def test_settings_that_came_later_are_shown_only_where_they_tell_rows_apart() -> None:
    old = [run("m", config={"damping": {"value": v}}) for v in (0.1, 0.2)]
    new = [run("m", config={"damping": {"value": v}, "matrix": "ggn", "rank": None}) for v in (0.2, 0.3)]
    labels = {row.label for row in only([*old, *new]).rows}
    assert labels == {"m (damping.value=0.1)", "m (damping.value=0.2)", "m (damping.value=0.2, matrix=ggn)",
                      "m (damping.value=0.3, matrix=ggn)"}  # fmt: skip
    labels = {row.label for row in only([old[0], new[1]]).rows}
    assert labels == {"m (damping.value=0.1)", "m (damping.value=0.3)"}


def test_holm_over_three_methods_by_hand() -> None:
    def of(*tails: int) -> Table:
        best = run("a", metrics={"lds": metric(0.5)}, replicates={"lds": np.full(199, 0.5)})
        others = [
            run(name, replicates={"lds": 0.4 - around_difference(tail)})
            for name, tail in zip("bcd", tails, strict=True)
        ]
        return only([best, *others])

    # p = .02, .03, .04, each below .05; adjusted 3 · .02, 2 · .03, .04 and never less than the one before: .06 all
    table = of(1, 2, 3)
    assert {d.row: d.p for d in table.differences} == pytest.approx({"b": 0.06, "c": 0.06, "d": 0.06})
    assert bold(table) == {"a", "b", "c", "d"}
    # p = 0, .03, .04: 0, 2 · .03, .06; replicates that are all above 0, and all the same, have no tail
    table = of(0, 2, 3)
    assert {d.row: d.p for d in table.differences} == pytest.approx({"b": 0.0, "c": 0.06, "d": 0.06})
    assert bold(table) == {"a", "c", "d"}
    # p = 0, .02, .04: 0, 2 · .02, .04
    table = of(0, 1, 3)
    assert {d.row: d.p for d in table.differences} == pytest.approx({"b": 0.0, "c": 0.04, "d": 0.04})
    assert bold(table) == {"a"}


def test_columns_are_corrected_each_for_itself() -> None:
    replicates = {"a": np.full(199, 0.5), "b": 0.4 - around_difference(1), "c": 0.4 - around_difference(1)}
    stored = [
        run(
            name,
            metrics={
                key: metric(value[0] if name == "a" else 0.4) for key in ("lds", "auc") if (name, key) != ("c", "auc")
            },
            replicates={"lds": value, "auc": value},
        )
        for name, value in replicates.items()
    ]
    table = only(stored)
    assert {(d.column.split()[0], d.row): d.p for d in table.differences} == pytest.approx(
        {("lds", "b"): 0.04, ("lds", "c"): 0.04, ("auc", "b"): 0.02}
    )


def test_differences_in_csv(tmp_path: Path) -> None:
    table = only(
        [
            run("a", metrics={"lds": metric(0.5)}, replicates={"lds": np.full(199, 0.5)}),
            run("b", config={"k": 1}, replicates={"lds": 0.4 - around_difference(2)}),
            run("b", config={"k": 2}, replicates={"lds": 0.4 - around_difference(0)}),
            run("no replicates"),
        ]
    )
    paths = write(table, tmp_path)
    assert [path.name for path in paths] == [
        f"{table.name}{end}" for end in (".csv", ".md", ".tex", "-differences.csv")
    ]
    lines = sorted(csv.DictReader(paths[-1].open()), key=lambda line: line["row"])
    assert [(line["column"], line["best"], line["row"]) for line in lines] == [
        ("lds common 50%x50x2", "a", "b (k=1)"),
        ("lds common 50%x50x2", "a", "b (k=2)"),
    ]
    first, second = ({key: float(line[key]) for key in ("difference", "low", "high", "p")} for line in lines)
    low, high = 0.1 + np.quantile(around_difference(2), [0.025, 0.975])
    assert first == pytest.approx({"difference": 0.1, "low": low, "high": high, "p": 0.03})
    assert second == pytest.approx({"difference": 0.1, "low": 0.1, "high": 0.1, "p": 0.0})
    assert bold(table) == {"a"}, "what cannot be compared is not called equal"
    assert to_csv(table) == paths[0].read_text()


def test_tables_without_anything_to_compare_have_no_differences(tmp_path: Path) -> None:
    for stored in ([run()], [run("a"), run("b")], [run("a", metrics={"x": metric(1, better=None)}), run("b")]):
        table = only(stored)
        assert table.differences == () and len(write(table, tmp_path)) == 3


# --- parts of a crossed bootstrap ------------------------------------------------------------------------------------

PARTS = np.random.default_rng(5).normal(size=(3, 400)) * np.array([[0.05], [0.03], [0.01]])
PARTS -= PARTS.mean(1, keepdims=True)


def noise(size: float, seed: int) -> np.ndarray:
    found: np.ndarray = np.random.default_rng(seed).normal(0, size, PARTS.shape)
    return found - found.mean(1, keepdims=True)


def test_parts_are_averaged_over_seeds_part_by_part() -> None:
    parts = [PARTS, PARTS[:, ::-1], 3 * PARTS]
    stored = [run(seed=s, metrics={"lds": metric(0.1 + 0.2 * s)}, replicates={"lds": parts[s]}) for s in range(3)]
    found = cell(only(stored), "ekfac")
    mean = (parts[0] + parts[1] + parts[2]) / 3
    both = mean[0] + mean[1]
    variance = mean[0].var() + mean[1].var() - mean[2].var()
    wanted = 0.3 + np.quantile(both * np.sqrt(variance / (mean[0].var() + mean[1].var())), [0.025, 0.975])
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx(tuple(wanted))
    alone = cell(only(stored[:1]), "ekfac")
    assert (alone.low, alone.high) == (0.0, 0.2), "one seed keeps its own"


@pytest.mark.parametrize("sign", [1, -1])
def test_parts_are_paired_by_their_differences(sign: int) -> None:
    better = "higher" if sign == 1 else "lower"

    def of(own: float) -> Table:
        return only(
            [
                run(
                    name,
                    metrics={"lds": metric(sign * value, better=better)},
                    replicates={"lds": PARTS + noise(own, k)},
                )
                for k, (name, value) in enumerate({"a": 0.42, "b": 0.40, "c": 0.1}.items())
            ]
        )

    near, far = of(0.001), of(0.02)
    assert bold(near) == {"a"} and bold(far) == {"a", "b"}
    (found,) = [d for d in near.differences if d.row == "b"]
    assert found.best == "a" and found.difference == pytest.approx(0.02) and found.low < 0.02 < found.high
    assert found.low > 0.01 and found.p < 1e-6, "none of 400 is below 0, by far"
    parts = noise(0.001, 0) - noise(0.001, 1)
    variance = max(parts[0].var() + parts[1].var() - parts[2].var(), parts[0].var(), parts[1].var())
    assert (found.high - found.low) / 3.92 == pytest.approx(variance**0.5, rel=0.15)


def test_parts_are_paired_over_the_seeds_of_both() -> None:
    stored = [
        run(name, s, {"lds": metric(value)}, replicates={"lds": (1 + s) * PARTS + noise(0.001, s)})
        for name, value, seeds in (("a", 0.42, (0, 1, 2)), ("b", 0.4, (1, 2, 3)))
        for s in seeds
    ]
    table = only(stored)
    (found,) = table.differences
    assert (found.best, found.row) == ("a", "b") and found.difference == pytest.approx(0.02)
    assert (found.low, found.high) == pytest.approx((0.02, 0.02)), "what both share is no noise of the difference"
    assert bold(table) == {"a"}


def test_parts_of_a_slope_are_compared_by_the_distance_to_one() -> None:
    def of(own: float) -> set[str]:
        values = {"a": 0.9, "b": 1.15, "c": 2.0}
        return bold(
            only(
                [
                    run(name, metrics={"s": metric(v, better="one")}, replicates={"s": noise(own, k)})
                    for k, (name, v) in enumerate(values.items())
                ]
            )
        )

    assert of(0.1) == {"a", "b"} and of(0.001) == {"a"}


def test_parts_and_replicates_of_older_records_are_not_paired() -> None:
    stored = [
        run("a", metrics={"lds": metric(0.42)}, replicates={"lds": PARTS}),
        run("b", metrics={"lds": metric(0.41)}, replicates={"lds": 0.41 + PARTS[0]}),
        run("c", metrics={"lds": metric(0.41)}, replicates={"lds": PARTS[:, :-1]}),
    ]
    table = only(stored)
    assert bold(table) == {"a"} and table.differences == ()
    mixed = [
        run(seed=0, metrics={"lds": metric(0.4, low=0.3, high=0.5)}, replicates={"lds": PARTS}),
        run(seed=1, metrics={"lds": metric(0.6, low=0.4, high=0.9)}, replicates={"lds": 0.6 + PARTS[0]}),
    ]
    found = cell(only(mixed), "ekfac")
    assert (found.low, found.high) == pytest.approx((0.35, 0.7)), "the mean of the bounds"


# --- texts -----------------------------------------------------------------------------------------------------------


def test_cells() -> None:
    assert cell_text(None) == "–"
    assert cell_text(Cell(0.41, 0.37, 0.45)) == "0.41 [0.37, 0.45]"
    assert cell_text(Cell(0.41, 0.37, 0.45, sd=0.021)) == "0.41 [0.37, 0.45] ±0.02"
    assert cell_text(Cell(-0.001, -0.1, -0.004)) == "0.00 [-0.10, 0.00]"
    assert cell_text(Cell(0.0021, 0.0018, 0.0024)) == "0.0021 [0.0018, 0.0024]"
    assert cell_text(Cell(0.1)) == "0.10"
    assert [number(x) for x in (None, 0.0, -0.0, 0.0012, 12.345, 54321.0)] == [
        "–",
        "0.00",
        "0.00",
        "0.001",
        "12.35",
        "54321",
    ]


def test_console_marks_the_best_by_an_asterisk_or_in_bold() -> None:
    table = only([run("a", metrics={"lds": metric(0.5)}), run("b[x]")])
    plain = to_console(table, bold=False)
    assert "\x1b" not in plain
    assert "0.50 [0.40, 0.60]*" in plain and "0.40 [0.30, 0.50]*" not in plain
    assert "b[x]" in plain  # no markup
    styled = to_console(table, bold=True, width=200)
    assert re.search(r"\x1b\[1m *0\.50 \[0\.40, 0\.60\]", styled) and "*" not in styled
    assert not re.search(r"\x1b\[1m *0\.40 ", styled)
    starts = {line.index("[0.") for line in plain.replace("*", " ").splitlines() if "[0." in line}
    assert len(starts) <= 2 and plain.startswith(table.caption)


MANY = {f"metric_{k}": metric(0.1 + k / 100) for k in range(12)}


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip().startswith(start)]


def test_a_wide_console_table_of_few_rows_is_turned() -> None:
    table = only([run("a", metrics=MANY), run("b", metrics={**MANY, "metric_3": metric(0.05)})])
    text = to_console(table, bold=False)
    assert max(map(len, text.splitlines())) <= 130
    (head,) = lines_of(text, "a ")
    assert head.split() == ["a", "b", "noise", "ceiling"]
    (line,) = lines_of(text, "metric_3 ")
    assert line.split("  ")[-1].strip() == "0.90" and "0.13 [0.03, 0.23]*" in line and "0.05 [-0.05, 0.15] " in line
    assert line.index("0.13") < line.index("0.05 "), "below their methods"
    for name in [*MANY, "seconds", "trainings", "peak memory"]:
        assert len(lines_of(text, f"{name} ")) == 1
    assert re.search(r"\x1b\[1m *0\.13 \[0\.03", to_console(table, bold=True, width=130))


def test_a_console_table_that_fits_or_has_too_many_rows_is_not_turned() -> None:
    narrow = to_console(only([run("a"), run("b")]), bold=False)
    assert len(lines_of(narrow, "method ")) == 1 and "0.40" in lines_of(narrow, "a ")[0]
    rows = [run(f"m{k}", metrics=MANY) for k in range(9)]
    long = to_console(only(rows), bold=False)
    assert max(map(len, long.splitlines())) <= 130
    panels = len(lines_of(long, "method "))
    assert panels > 1 and len(lines_of(long, "m4 ")) == panels, "the methods again in every panel"
    assert all(name in long for name in MANY)


def test_markdown() -> None:
    text = to_markdown(only([run("a|b", metrics={"lds": metric(0.5)}), run("c")]))
    lines = text.splitlines()
    assert lines[2] == "| method | lds common 50%x50x2 | seconds | trainings | peak memory |"
    assert lines[3] == "| :-- | --: | --: | --: | --: |"
    assert lines[4] == r"| a\|b | **0.50 [0.40, 0.60]** | 2.00 | 1 | 1.0 MiB |"
    assert lines[5] == "| c | 0.40 [0.30, 0.50] | 2.00 | 1 | 1.0 MiB |"
    assert lines[6].startswith("| *noise ceiling* | *0.90* |")
    assert "- truth of lds common 50%x50x2: fraction=0.5, regime=common, repeats=2, seed=0, subsets=50" in lines
    assert escape_markdown("_a_ b_c *d* [e](f) `g`") == r"\_a\_ b_c \*d\* [e\](f) \`g\`"


def test_latex() -> None:
    text = to_latex(only([run("a_b & c", metrics={"lds": metric(0.5)}), run("c", status="unfit", reason="50% #1")]))
    assert r"{}a\_b \& c & 0.50 [0.40, 0.60] & 2.00 & 1 & 1.0 MiB \\" in text
    assert r"{}method & lds common 50\%x50x2 & seconds" in text
    assert r"0.40 [0.30, 0.50] \dag{} &" in text and r"\dag{} unfit: 50\% \#1\\" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 2, 1]
    assert r"\begin{tabular}{lrrrr}" in text
    assert r"\textbf{0.50 [0.40, 0.60]}" in to_latex(only([run("a", metrics={"lds": metric(0.5)}), run("c")]))
    assert escape_latex("\\{}~^<>$±–") == (
        r"\textbackslash{}\{\}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\$$\pm$--"
    )


def test_csv_is_long_and_in_full() -> None:
    table = only([run(metrics={"lds": metric(1 / 3, ceiling=2 / 3), "auc": metric(0.8, ceiling=None)}), run("b,c")])
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [(line["method"], line["metric"]) for line in lines] == [("b,c", "lds"), ("ekfac", "lds"), ("ekfac", "auc")]
    found = lines[1]
    assert float(found["value"]) == 1 / 3 and float(found["of_ceiling"]) == pytest.approx(0.5)
    assert found["truth"] == records.canonical(COMMON) and found["seeds"] == "1" and found["best"] == "False"
    assert (found["data_source"], found["n_train"], found["seconds"]) == ("bundled", "1000", "2.0")
    assert lines[2]["ceiling"] == lines[2]["of_ceiling"] == ""


# --- the program -----------------------------------------------------------------------------------------------------


def stored_in(out: Path, *runs: Stored) -> None:
    for record, replicates in runs:
        records.write(out, record, "", {}, {}, replicates)


def test_the_program_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored_in(
        tmp_path,
        run("a", metrics={"lds": metric(0.42)}, replicates={"lds": 0.42 + SHARED}),
        run("b", replicates={"lds": 0.4 + SHARED[::-1]}),
        run("a", task="sst2"),
    )
    assert main([f"out={tmp_path}"]) == 0
    assert len(capsys.readouterr().out.split("noise ceiling")) == 3
    assert len(list((tmp_path / "tables").iterdir())) == 7
    (path,) = (tmp_path / "tables").glob("*-differences.csv")
    assert path.name.startswith("digits-"), "where two were compared"
    assert main([f"out={tmp_path}", "task=digits", "format=csv"]) == 0
    (path,) = (tmp_path / "tables").glob("digits-bundled-mlp-n1000-????????.csv")
    printed = capsys.readouterr().out
    assert printed.strip() == path.read_text().strip()
    assert printed.count("True") == 2  # the replicates came along: a tie


def test_a_table_is_rebuilt_from_kept_records_byte_for_byte(tmp_path: Path) -> None:
    stored = [run(m, s, replicates={"lds": 0.4 + SHARED.astype(np.float32)}) for m in "ab" for s in range(3)]
    stored_in(tmp_path, *stored)
    first = [(p.name, p.read_bytes()) for p in write(only(load(tmp_path)), tmp_path / "tables")]
    assert len(first) == 4
    for scores in tmp_path.rglob("scores.safetensors"):
        scores.unlink()
    assert [(p.name, p.read_bytes()) for p in write(only(load(tmp_path)), tmp_path / "tables")] == first
    assert not [path for path in (tmp_path / "tables").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["colour=red"], "colour=red is not understood; allowed: out=..., task=..., format=..."),
        (["results"], "results is not understood"),
        (["format=html"], "format=html is not possible; allowed: text, md, tex, csv"),
        (["task=sst3"], "task=sst3 has no records; allowed: digits"),
    ],
)
def test_a_users_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    stored_in(tmp_path, run())
    assert main([f"out={tmp_path}", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(said)
    assert not (tmp_path / "tables").exists()


def test_no_records_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"out={tmp_path}/none"]) == 2
    assert "none holds no records; run python -m bench first" in capsys.readouterr().err


def test_tables_that_cannot_be_written_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored_in(tmp_path, run())
    (tmp_path / "tables").write_text("")
    assert main([f"out={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"out={tmp_path / 'tables'} cannot be written")


def test_damaged_records_and_replicates_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored_in(tmp_path, run("a"), run("b"))
    (damaged,) = (tmp_path / "runs/digits/a").glob("*/record.json")
    damaged.write_text("{")
    (cut,) = (tmp_path / "runs/digits/b").glob("*/replicates.safetensors")
    cut.write_bytes(b"")
    assert main([f"out={tmp_path}", "format=csv"]) == 0
    printed = capsys.readouterr()
    assert str(damaged) in printed.err and str(cut) in printed.err
    assert [line["method"] for line in csv.DictReader(io.StringIO(printed.out.strip()))] == ["b"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "format=text|md|tex|csv" in capsys.readouterr().out
