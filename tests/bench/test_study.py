"""Studies: curves from records made by hand, their files, and one line for a mistake."""

import csv
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bench import records
from bench.records import Record
from bench.study import Curve, Point, curves, flatten, main, to_text, write

FRACTION = "truth.lds.fraction"


def run(
    method: str = "ekfac",
    seed: int = 0,
    value: float | None = 0.4,
    started: str = "2026-01-01",
    metric: dict[str, Any] | None = None,
    fingerprint: str = "abcdef",
    **settings: Any,
) -> Record:
    """A record; `settings` are keys of its config, with `__` for a dot."""
    config: dict[str, Any] = {
        "seed": seed,
        "evaluation": ["lds"],
        "task": {"n_train": 1000, "seed": 0},
        "model": {"hidden": [32], "recipe": {"epochs": 30}},
        "method": {"_target_": f"methods.{method}", "damping": {"value": 0.1}},
        "truth": {"lds": {"fraction": 0.5, "repeats": 2, "regime": "common"}},
    }
    for key, setting in settings.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = setting
    low, high = (None, None) if value is None else (value - 0.1, value + 0.2)
    entry: dict[str, Any] = {
        "value": value,
        "low": low,
        "high": high,
        "ceiling": 0.9,
        "n": 50,
        "nan": 0,
        "better": "higher",
    }
    entry["truth"] = dict(config["truth"]["lds"])
    record = {
        "schema": 1,
        "run_id": records.run_id({"run": repr((method, seed, value, started, settings))}),
        "status": "ok",
        "reason": None,
        "task": "digits",
        "data": {"source": "bundled", "fingerprint": fingerprint, "n_train": 1000},
        "model": "mlp",
        "method": method,
        "method_label": method,
        "seed": seed,
        "config": config,
        "metrics": {"lds": {**entry, **(metric or {})}},
        "fitness": {},
        "cost": {"seconds": 1.0, "phases": {}},
        "provenance": {"started": started},
    }
    records.validate(record)
    return record


def shape(found: list[Curve]) -> list[tuple[str, str, list[Any]]]:
    return sorted((c.method, c.rest, [p.x for p in c.points]) for c in found)


def test_two_methods_over_a_number_in_its_order() -> None:
    found = curves(
        [
            run(method, value=value + fraction / 10, truth__lds__fraction=fraction, metric={"ceiling": fraction})
            for fraction in (0.5, 0.1, 0.98)
            for method, value in (("ekfac", 0.4), ("graddot", 0.1))
        ],
        FRACTION,
        "lds",
    )
    assert shape(found) == [("ekfac", "", [0.1, 0.5, 0.98]), ("graddot", "", [0.1, 0.5, 0.98])]
    points = next(c for c in found if c.method == "graddot").points
    assert [p.value for p in points] == pytest.approx([0.11, 0.15, 0.198])
    assert [p.low for p in points] == pytest.approx([0.01, 0.05, 0.098])
    assert [p.high for p in points] == pytest.approx([0.31, 0.35, 0.398])
    assert [p.ceiling for p in points] == [0.1, 0.5, 0.98] and {p.seeds for p in points} == {1}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model__hidden", [[8], [16], [16, 4], [128]]),
        ("model__recipe__epochs", [3, 10, 100]),
        ("truth__lds__regime", ["common", "fixed", "fresh"]),
        ("method__damping__value", [0, 0.01, 1.0]),
        ("method__clip", [False, True]),
    ],
)
def test_keys_of_every_kind_have_their_order(key: str, values: list[Any]) -> None:
    (curve,) = curves([run(**{key: value}) for value in values[::-1]], key.replace("__", "."), "lds")
    assert [p.x for p in curve.points] == values


def test_seeds_are_averaged() -> None:
    bounds = {0: (0.1, 0.3), 1: (0.3, 0.8), 2: (0.2, 0.4)}
    stored = [
        run(seed=s, value=(low + high) / 2, metric={"low": low, "high": high, "ceiling": c}, truth__lds__repeats=r)
        for (s, (low, high)), c in zip(bounds.items(), (0.9, 0.6, None), strict=True)
        for r in (1, 2)
    ]
    (curve,) = curves(stored[:-1], "truth.lds.repeats", "lds")
    one, two = curve.points
    assert (one.x, one.seeds, two.seeds) == (1, 3, 2)
    assert (one.value, one.low, one.high) == pytest.approx((0.35, 0.2, 0.5)) and one.ceiling == pytest.approx(0.75)
    assert (two.value, two.low, two.high) == pytest.approx((0.375, 0.2, 0.55))


def test_the_newest_number_of_a_seed_counts() -> None:
    stored = [
        run(value=0.7, started="2026-03-01", method__k=1),
        run(value=0.1, started="2026-02-01", method__k=1),
        run(method__k=2),
    ]
    for order in (stored, stored[::-1]):
        (curve,) = curves(order, "method.k", "lds")
        assert [p.value for p in curve.points] == [0.7, 0.4]


def test_a_fixed_truth_stands_beside_those_with_repeats() -> None:
    common = {"subsets": 50, "repeats": 2, "regime": "common", "fraction": 0.5, "seed": 0}
    fixed = {"subsets": 50, "regime": "fixed", "fraction": 0.5, "seed": 0}
    stored = [
        run(seed=s, truth__lds__regime=truth["regime"], metric={"truth": truth})
        for s in (0, 1)
        for truth in (common, {**common, "regime": "fresh"}, {**fixed, "explained_seed": s})
    ]
    (curve,) = curves(stored, "truth.lds.regime", "lds")
    assert [(p.x, p.seeds) for p in curve.points] == [("common", 2), ("fixed", 2), ("fresh", 2)]
    more = run(truth__lds__regime="fresh", truth__lds__repeats=4, metric={"truth": {**common, "repeats": 4}})
    assert len(curves([*stored, more], "truth.lds.regime", "lds")) == 1, "four repeats have one regime only"


def test_one_x_is_no_curve() -> None:
    stored = [run("ekfac", truth__lds__fraction=f) for f in (0.1, 0.5)] + [run("graddot"), run("graddot", seed=1)]
    assert [c.method for c in curves(stored, FRACTION, "lds")] == ["ekfac"]
    assert curves(stored[2:], FRACTION, "lds") == [] == curves(stored, FRACTION, "loo_pearson")
    assert curves(stored, "no.such.key", "lds") == [] == curves([], FRACTION, "lds")


def test_other_settings_are_other_curves_and_are_named() -> None:
    stored = [
        run(truth__lds__fraction=f, truth__lds__regime=regime, model__recipe__epochs=epochs)
        for f in (0.1, 0.5)
        for regime, epochs in (("common", 30), ("fixed", 30), ("fixed", 3))
    ]
    assert [rest for _, rest, _ in shape(curves(stored, FRACTION, "lds"))] == [
        "model.recipe.epochs=3, truth.regime=fixed",
        "model.recipe.epochs=30, truth.regime=common",
        "model.recipe.epochs=30, truth.regime=fixed",
    ]


def test_configurations_of_one_method_are_told_apart() -> None:
    stored = [
        run(method, truth__lds__fraction=f, method__damping__value=damping)
        for f in (0.1, 0.5)
        for method, damping in (("ekfac", 0.1), ("ekfac", 0.01), ("graddot", 0.1))
    ]
    found = shape(curves(stored, FRACTION, "lds"))
    assert [name for name, _, _ in found] == [
        "ekfac method.damping.value=0.01",
        "ekfac method.damping.value=0.1",
        "graddot",
    ]
    swept = shape(curves(stored, "method.damping.value", "lds"))
    assert swept == [("ekfac", f"truth.fraction={f}", [0.01, 0.1]) for f in (0.1, 0.5)]


def test_numbers_on_other_data_meet_only_where_the_data_is_swept() -> None:
    stored = [run(truth__lds__fraction=f, fingerprint=p) for f, p in ((0.1, "a"), (0.5, "a"), (0.1, "b"), (0.5, "b"))]
    assert [rest for _, rest, _ in shape(curves(stored, FRACTION, "lds"))] == ["data=a", "data=b"]
    assert curves([stored[0], stored[3]], FRACTION, "lds") == []
    sizes = [run(task__n_train=n, fingerprint=str(n)) for n in (500, 1000)]
    assert shape(curves(sizes, "task.n_train", "lds")) == [("ekfac", "", [500, 1000])]


def test_a_number_that_is_none_is_no_point() -> None:
    stored = [run(truth__lds__fraction=f, value=v, seed=s) for f, v, s in
              ((0.1, 0.2, 0), (0.5, None, 0), (0.9, 0.3, 0), (0.9, None, 1), (0.9, 0.5, 2))]  # fmt: skip
    (curve,) = curves(stored, FRACTION, "lds")
    assert [(p.x, p.value, p.seeds) for p in curve.points] == [(0.1, 0.2, 1), (0.9, 0.4, 2)]
    failed = [{**record, "metrics": {}} for record in stored]
    assert curves(failed, FRACTION, "lds") == []


def test_a_number_without_an_interval_is_a_point_of_no_height() -> None:
    bare = {"low": None, "high": None, "ceiling": None}
    (curve,) = curves([run(metric=bare, truth__lds__fraction=f) for f in (0.1, 0.5)], FRACTION, "lds")
    assert curve.points[0] == Point(0.1, 0.4, 0.4, 0.4, None, 1)
    some = [run(value=v, seed=s, metric=m, truth__lds__fraction=f) for f in (0.1, 0.5) for v, s, m in
            ((0.2, 0, bare), (0.8, 1, {"low": 0.75, "high": 0.82}))]  # fmt: skip
    (curve,) = curves(some, FRACTION, "lds")
    assert curve.points[0].low <= curve.points[0].value == 0.5 <= curve.points[0].high


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": None}) == {
        "a.b": 1, "a.c.d": [1, {"e": 2}], "f": None
    }  # fmt: skip


# --- files -----------------------------------------------------------------------------------------------------------


def points(*xs: Any, value: float = 0.4, ceiling: float | None = 0.9) -> tuple[Point, ...]:
    return tuple(Point(x, value, value - 0.1, value + 0.1, ceiling, 2) for x in xs)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures as they are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def kept(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


def test_files_hold_every_point(tmp_path: Path, drawn: list[Figure]) -> None:
    found = [Curve("ekfac", "a=1", points(0.1, 0.5)), Curve("graddot", "a=1", points(0.1, 0.5, value=0.1)),
             Curve("ekfac", "a=2", points(0.5, 0.9, ceiling=None))]  # fmt: skip
    table, figure = write(found, "truth.lds.fraction", "lds", "digits", tmp_path / "tables")
    assert table == tmp_path / "tables" / "study-digits-lds-truth.lds.fraction.csv"
    assert figure.name == "study-digits-lds-truth.lds.fraction.png"
    lines = list(csv.DictReader(table.open()))
    assert len(lines) == 6
    assert lines[2] == {
        "settings": "a=1", "method": "graddot", "truth.lds.fraction": "0.1", "value": "0.1", "low": "0.0",
        "high": "0.2", "ceiling": "0.9", "seeds": "2",
    }  # fmt: skip
    assert lines[4]["ceiling"] == ""
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 5000
    one, other = drawn[0].axes
    assert (one.get_title(), other.get_title(), one.get_xlabel()) == ("a=1", "a=2", "truth.lds.fraction")
    assert one.get_legend_handles_labels()[1] == ["noise ceiling", "ekfac", "graddot"]
    assert other.get_legend_handles_labels()[1] == ["ekfac"]
    assert [path.name for path in sorted(tmp_path.rglob("*.*"))] == [table.name, figure.name]


@pytest.mark.parametrize(
    ("xs", "scale"), [((1, 2, 4), "linear"), ((1, 2, 16), "log"), ((0, 0.01, 10), "linear"), ((-1, 5), "linear")]
)
def test_the_axis_is_logarithmic_where_it_can_be_and_should(
    tmp_path: Path, drawn: list[Figure], xs: tuple[float, ...], scale: str
) -> None:
    write([Curve("ekfac", "", points(*xs))], "k", "lds", "digits", tmp_path)
    assert drawn[0].axes[0].get_xscale() == scale and drawn[0].axes[0].get_title() == "digits"


def test_names_stand_in_their_order_whichever_curve_has_them(tmp_path: Path, drawn: list[Figure]) -> None:
    found = [Curve("a", "", points([8], [32])), Curve("b", "", points([8], [16], [32], [128]))]
    write(found, "model.hidden", "lds", "digits", tmp_path)
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["[8]", "[16]", "[32]", "[128]"]
    assert [list(bar.lines[0].get_xdata()) for bar in axes.containers] == [[0, 2], [0, 1, 2, 3]]


def test_text() -> None:
    text = to_text([Curve("ekfac", "a=1", points("fixed", ceiling=None)), Curve("b", "", points(3))], "k", "lds")
    assert text.splitlines() == [
        "ekfac (a=1)",
        "  k=fixed: lds 0.400 [0.300, 0.500], 2 seed(s)",
        "b",
        "  k=3: lds 0.400 [0.300, 0.500], ceiling 0.90, 2 seed(s)",
    ]


# --- the program -----------------------------------------------------------------------------------------------------


def test_the_program_reads_records_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("ekfac", "graddot"):
        for hidden in ([8], [16]):
            records.write(tmp_path, run(method, model__hidden=hidden), "", {}, {}, {})
    assert main(["x=model.hidden", f"out={tmp_path}"]) == 0
    said = capsys.readouterr()
    assert said.out.count("model.hidden=[8]: lds 0.400 [0.300, 0.600], ceiling 0.90, 1 seed(s)") == 2
    stem = tmp_path / "tables" / "study-digits-lds-model.hidden"
    assert said.err == f"written: {stem}.csv {stem}.png\n"
    assert stem.with_name(f"{stem.name}.csv").is_file() and stem.with_name(f"{stem.name}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["metric=lds"], "error: x is missing; x=truth.lds.fraction, or another"),
        (["x=truth.lds.fraction", "colour=red"], "error: colour=red is not understood; allowed: x=..., metric=..., "),
        (["truth.lds.fraction"], "error: truth.lds.fraction is not understood"),
        (["x="], "error: x= is not understood"),
        (["x=truth.lds.fraction", "task=sst3"], "error: task=sst3 has no records in "),
        (["x=truth.lds.fraction"], "error: x=truth.lds.fraction takes no two values in the records with lds; sweep it"),
        (["x=method.k"], "error: x=method.k is no key of the records' configs"),
        (["x=truth.lds.fractoin"], "error: x=truth.lds.fractoin is no key of the records' configs; did you mean truth"),
        (["x=truth.lds.fraction", "metric=loo"], "error: metric=loo is in no record; allowed: "),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    records.write(tmp_path, run(), "", {}, {}, {})
    assert main([*arguments, f"out={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith(said)
    assert not (tmp_path / "tables").exists()


def test_files_that_cannot_be_written_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for fraction in (0.1, 0.5):
        records.write(tmp_path, run(truth__lds__fraction=fraction), "", {}, {}, {})
    (tmp_path / "tables").write_text("")
    assert main([f"x={FRACTION}", f"out={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: out={tmp_path / 'tables'} cannot be written")


def test_no_argument_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr() == ("", "error: x is missing; x=truth.lds.fraction, or another key that was swept\n")


@pytest.mark.parametrize("arguments", [["--help"], ["x=seed", "-h"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    assert "python -m bench.study x=truth.lds.fraction" in capsys.readouterr().out
