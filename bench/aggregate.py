"""From records to tables: rows, columns, cells, and what may be called best. Pure functions.

One table a task, data and model. A row is a method's configuration without its seed: several seeds are one row, with
the mean over seeds, the bootstrap interval of that mean and, from three seeds on, the spread over seeds as its own
figure. A column is a metric with its truth: numbers measured against different truths never meet in one column. The
best of a column is bold, and so is every method that the paired test, Holm-corrected over the column, cannot tell from
the best: the bootstrap, or Student's t over seeds for figures that have none. Cells with a footnote (unfit, or some
seeds without a number), and those without interval or spread, are shown but not ranked.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bench import records
from bench.statistics import around, crossed, holm, interval, paired_difference

COSTS = ("seconds", "trainings", "peak_memory_bytes", "gradients", "stored_bytes")
LDS_LOO = ("lds", "loo_pearson", "loo_spearman", "loo_slope", "loo_intercept", "pbrf_pearson")
BIAS = tuple(f"{name}_{kind}auc" for name in ("less", "more", "full") for kind in ("", "matched_"))
DETECTED = ("value_auc", "value_matched_auc", "attribution_auc", "value_ap", "attribution_ap")
SETS = ("forget", "retain", "neighbours", "test")
ON_SETS = tuple(f"{name}_{figure}" for figure in ("accuracy", "loss") for name in SETS)
TO_GOLD = (
    "kl_forget",
    "kl_test",
    "kl_retain",
    "agreement_forget",
    "agreement_test",
    "mia_auc",
    "mia_gap",
    "ks_d",
)
UNLEARNED = ("tow", "tow_normalised", *ON_SETS, *TO_GOLD, "kl_forget_normalised")
FIRST = (*LDS_LOO, *BIAS, *DETECTED, *UNLEARNED)  # then others, then LAST
LAST = ("base_rate",)
DETECTION = ("detection_auc", "value_auc", "attribution_auc")
MAIN = ("lds", "less_auc", *DETECTION, "loo_spearman", "loo_pearson", "tow")
SEED_SPREAD_FROM = 3
UNTOLD = ("_target_", "data", "n_train", "floor", "show_text")  # of a task: said already, or nothing to the numbers
LEVEL = 0.05

Stored = tuple[Mapping[str, Any], Mapping[str, np.ndarray]]  # a record and its replicates


@dataclass(frozen=True)
class Column:
    """A metric with its truth."""

    metric: str
    truth: Mapping[str, Any]
    label: str
    better: str | None  # higher | lower | one | None: not ranked
    ceiling: float | None


@dataclass(frozen=True)
class Cell:
    """The mean over seeds of one metric of one row, or the status that stands in its place."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    sd: float | None = None  # over seeds
    ceiling: float | None = None
    n: int | None = None
    nan: int = 0
    seeds: int = 0
    status: str = "ok"
    reason: str | None = None
    mark: str = ""  # of the footnote
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One method configuration; `cells` holds None where nothing was measured."""

    label: str
    method: str
    config: Mapping[str, Any]
    seeds: tuple[int, ...]
    cells: tuple[Cell | None, ...]
    costs: Mapping[str, float | None]


@dataclass(frozen=True)
class Table:
    """All that was measured on one task, data and model, and of unlearning on one forget set (`part`); `name` is the
    stem of its files. `paths`: by row, the losses (forget, retain) on the way of an update, means over seeds, in
    `unit`."""

    name: str
    caption: str
    task: str
    source: str
    fingerprint: str
    n_train: int
    model: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    truths: tuple[str, ...]
    differences: "tuple[Difference, ...]" = ()
    part: str = ""
    paths: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    unit: str = "nats"


@dataclass(frozen=True)
class _Entry:
    """One seed's metric in the cell (row, column)."""

    row: str
    column: str
    seed: int
    metric: Mapping[str, Any]
    replicates: np.ndarray | None
    record: Mapping[str, Any]


Entries = Mapping[tuple[str, str], Mapping[int, _Entry]]  # (row, column) -> seed -> entry


# --- from records to tables ------------------------------------------------------------------------------------------


def tables(stored: Iterable[Stored]) -> list[Table]:
    """The tables of (record, replicates) pairs, sorted by name; the order of the pairs does not matter."""
    groups: dict[tuple[str, str], list[Stored]] = defaultdict(list)
    for pair in sorted(stored, key=lambda pair: _age(pair[0])):
        record, data = pair[0], pair[0]["data"]
        place = [record["task"], data["source"], data["fingerprint"], data["n_train"], record["model"]]
        place += [part] if (part := _part(record)) else []
        groups[records.canonical(place), records.canonical(record["config"].get("model"))].append(pair)
    heads = [group[0][0] for group in groups.values()]
    configs = [head["config"].get("model") or {} for head in heads]
    models = _distinct([head["model"] for head in heads], configs, [place for place, _ in groups])
    alike = [records.canonical([head["task"], head["data"]["source"], head["model"]]) for head in heads]
    planted = [
        {"task": {k: v for k, v in (head["config"].get("task") or {}).items() if k not in UNTOLD}} for head in heads
    ]
    settings = _distinct([""] * len(heads), planted, alike, form="{keys}")
    built = [_table(*named) for named in zip(groups.items(), models, settings, strict=True)]
    return sorted(built, key=lambda table: table.name)


def _age(record: Mapping[str, Any]) -> tuple[bool, str, str]:
    """Sorts what to prefer last: a record with numbers before one without, then the newer one."""
    return bool(record["metrics"]), str(record["provenance"].get("started", "")), record["run_id"]


def _table(grouped: tuple[tuple[str, str], Sequence[Stored]], model: str, settings: str) -> Table:
    """`settings` of the data that tell it from other tables of the same task, source and model."""
    key, group = grouped
    by_row: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record, _ in group:
        by_row[_row_key(record)].append(record)
    entries: dict[tuple[str, str], dict[int, _Entry]] = defaultdict(dict)
    found = _entries(group)
    for entry in found:  # oldest first: the newest stays
        entries[entry.row, entry.column][entry.seed] = entry
    columns = _columns(found, any(record["status"] != "ok" for record, _ in group))
    cells = {(row, column): _cell(entries.get((row, column), {}), by_row[row]) for row in by_row for column in columns}
    differences: list[Difference] = []
    for column, head in columns.items():
        best, paired = _compared({row: cells[row, column] for row in by_row}, entries, column, head.better)
        differences += paired
        for row in best:
            if cell := cells[row, column]:
                cells[row, column] = replace(cell, best=True)

    heads = list(columns.values())
    firsts = [row[0] for row in by_row.values()]
    configs = [{"method": _row_name(record), **_row_config(record)} for record in firsts]
    labels = _distinct([_row_label(record) for record in firsts], configs)
    rows = [
        Row(
            label=label,
            method=_row_name(records_of_row[0]),
            config=_row_config(records_of_row[0]),
            seeds=tuple(record["seed"] for record in _newest(records_of_row)),
            cells=tuple(cells[row, column] for column in columns),
            costs=_costs(records_of_row),
        )
        for label, (row, records_of_row) in zip(labels, by_row.items(), strict=True)
    ]
    named = dict(zip(by_row, labels, strict=True))
    differences = [
        replace(d, column=columns[d.column].label, best=named[d.best], row=named[d.row]) for d in differences
    ]
    main = _main(heads, rows)
    rows, notes = _footnotes(sorted(rows, key=lambda row: _rank(row, main, heads)))
    if older := len(found) - sum(map(len, entries.values())):
        notes.append(f"{older} older number{'s' * (older > 1)} of the same row, seed and truth not shown")
    rows += _anchors([record for record, _ in group], heads)
    record, data = group[0][0], group[0][0]["data"]
    digest = records.run_id({"table": list(key)})[:8]
    part = _part_label(record)
    stem = [record["task"], data["source"], record["model"], f"n{data['n_train']}", *filter(None, [part]), digest]
    return Table(
        name="-".join(re.sub(r"[^\w.+]+", "_", part) for part in stem),
        caption=_caption([record for record, _ in group], model, rows, settings),
        task=record["task"],
        source=data["source"],
        fingerprint=data["fingerprint"],
        n_train=data["n_train"],
        model=model,
        columns=tuple(heads),
        rows=tuple(rows),
        notes=tuple(notes),
        truths=_truths(heads),
        differences=tuple(differences),
        part=part,
        paths=dict(filter(lambda pair: pair[1], ((named[row], _path(by_row[row])) for row in by_row))),
        unit=_unit(record for record, _ in group),
    )


def _row_key(record: Mapping[str, Any]) -> str:
    if _unlearning(record):
        return records.canonical([_row_name(record), _row_label(record), _row_config(record)])
    return records.canonical([record["method"], record["method_label"], _seedless(record)])


def _seedless(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record["config"]["method"].items() if key != "seed"}


# --- unlearning: a table a forget set, a row an update ---------------------------------------------------------------


def _unlearning(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a run that unlearns; nothing of others."""
    found: Mapping[str, Any] = record["config"].get("truth", {}).get("unlearning", {})
    return found


def _unlearned(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the evaluation noted of itself; nothing where it did not come so far."""
    found: Mapping[str, Any] = record.get("truths", {}).get("unlearning", {})
    return found


def _part(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is forgotten, with the method where its scores choose it."""
    settings = _unlearning(record)
    if not settings:
        return {}
    by = [record["method"], record["method_label"], _seedless(record)] if _part_by_method(record) else []
    return {"forget": settings["forget"], "by": by}


def _part_by_method(record: Mapping[str, Any]) -> bool:
    return bool(_unlearned(record).get("forget_uses_method", _unlearning(record)["forget"]["name"] == "topk"))


def _part_label(record: Mapping[str, Any]) -> str:
    settings = _unlearning(record)
    if not settings:
        return ""
    return str(settings["forget"]["name"]) + (f"_{record['method_label']}" if _part_by_method(record) else "")


def _row_name(record: Mapping[str, Any]) -> str:
    settings = _unlearning(record)
    return str(settings["unlearner"]["name"] if settings else record["method"])


def _row_label(record: Mapping[str, Any]) -> str:
    """The unlearner, with the method where it uses one and the mask where there is one."""
    settings = _unlearning(record)
    if not settings:
        return str(record["method_label"])
    by = f" by {record['method_label']}" if _unlearned(record).get("uses_method", True) else ""
    mask = _unlearned(record).get("mask", settings["mask"]["name"])
    return f"{settings['unlearner']['name']}{by}" + (f", {mask} mask" if mask != "none" else "")


def _row_config(record: Mapping[str, Any]) -> dict[str, Any]:
    settings = _unlearning(record)
    if not settings:
        return _seedless(record)
    own = {key: value for key, value in settings.items() if key != "forget"}
    used = _unlearned(record).get("uses_method", True)
    return {**own, "method": _seedless(record)} if used else own


def _anchors(group: Sequence[Mapping[str, Any]], heads: Sequence[Column]) -> list[Row]:
    """Rows below all others: what a retraining and the untouched model get in the columns; the newest run of each seed
    says."""
    found: dict[str, dict[int, Mapping[str, float]]] = defaultdict(dict)
    for record in group:
        for label, figures in _unlearned(record).get("anchors", {}).items():
            found[label][record["seed"]] = figures
    rows = []
    for label, by_seed in found.items():
        cells: list[Cell | None] = []
        for head in heads:
            said = [figures[head.metric] for figures in by_seed.values() if figures.get(head.metric) is not None]
            sd = float(np.std(said, ddof=1)) if len(said) >= SEED_SPREAD_FROM else None
            cells.append(Cell(value=_mean(said), sd=sd, seeds=len(said)) if said else None)
        rows.append(Row(label, label, {}, tuple(sorted(by_seed)), tuple(cells), dict.fromkeys(COSTS)))
    return rows


def _path(row: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Losses (forget, retain) on the way, means over the seeds, as far as all of them went."""
    paths = [path for record in _newest(row) if (path := _unlearned(record).get("trajectory"))]
    steps = zip(*paths, strict=False)
    return [(_mean_of(points, "forget_loss"), _mean_of(points, "retain_loss")) for points in steps]


def _unit(group: Iterable[Mapping[str, Any]]) -> str:
    """Of losses: models of language, whose fitness has a loss a token, are averaged over tokens."""
    texts = any(key.endswith("loss_per_token") for record in group for key in record["fitness"])
    return "nats a token" if texts else "nats"


def _mean_of(points: Iterable[Mapping[str, Any]], key: str) -> float:
    values = [point[key] for point in points]
    return float(np.mean(values)) if None not in values else math.nan


# --- columns ---------------------------------------------------------------------------------------------------------


def _entries(group: Sequence[Stored]) -> list[_Entry]:
    """Every number of the group with its row and column, in the group's order.

    Under `fixed` a truth is made anew for each explained seed and yet is one column. Its `explained_seed` is left out;
    where it has none, so is a `seed` that always is the explained run's own. Any other `seed` draws the subsets, and
    other subsets are another truth.
    """
    found = [
        (name, metric, dict(metric.get("truth") or {}), replicates.get(name), record)
        for record, replicates in group
        for name, metric in record["metrics"].items()
    ]
    drawn = {
        _column_key(name, _unseeded(truth))
        for name, _, truth, _, record in found
        if "explained_seed" in truth or truth.get("seed", record["seed"]) != record["seed"]
    }
    entries = []
    for name, metric, truth, replicates, record in found:
        if truth.get("regime") == "fixed":
            bare = _unseeded(truth)
            keeps = "seed" in truth and _column_key(name, bare) in drawn
            truth = {**bare, "seed": truth["seed"]} if keeps else bare
        column = _column_key(name, truth)
        entries.append(_Entry(_row_key(record), column, record["seed"], metric, replicates, record))
    return entries


def _unseeded(truth: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in truth.items() if key not in ("seed", "explained_seed")}


def _columns(entries: Sequence[_Entry], some_failed: bool) -> dict[str, Column]:
    """The columns by key, in the order in which they are shown."""
    by_key: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in entries:
        by_key[entry.column].append(entry.metric)
    if not by_key and some_failed:  # where no run came through, say at least why
        by_key[_column_key("status", {})].append({"better": None})
    columns = {}
    for key in sorted(by_key, key=_column_order):
        metric, truth = json.loads(key)
        better = by_key[key][-1].get("better", "higher")
        ceiling = _mean(metric_of_seed.get("ceiling") for metric_of_seed in by_key[key])
        columns[key] = Column(metric, truth, _truth_label(metric, truth), better, ceiling)
    labels, truths = [c.label for c in columns.values()], [c.truth for c in columns.values()]
    names = _distinct(labels, truths, form="{name} {keys}", between=" ")
    return {key: replace(columns[key], label=name) for key, name in zip(columns, names, strict=True)}


def _column_key(metric: str, truth: Mapping[str, Any]) -> str:
    return records.canonical([metric, truth])


def _column_order(key: str) -> tuple[int, int, str, str]:
    metric = json.loads(key)[0]
    if metric in FIRST:
        return 0, FIRST.index(metric), metric, key
    return (2, LAST.index(metric), metric, key) if metric in LAST else (1, 0, metric, key)


def _truth_label(metric: str, truth: Mapping[str, Any]) -> str:
    """`lds common 50%x50x2`: metric, regime, fraction x subsets x repeats."""
    sizes = [str(truth[key]) for key in ("subsets", "repeats") if truth.get(key) is not None and "subsets" in truth]
    if truth.get("fraction") is not None:
        sizes.insert(0, f"{100 * truth['fraction']:g}%")
    return " ".join(filter(None, (metric, truth.get("regime"), "x".join(sizes))))


def _truths(columns: Iterable[Column]) -> tuple[str, ...]:
    """One line for each truth: the columns that it judges and all that it says of itself."""
    judged: dict[str, list[str]] = defaultdict(list)
    for column in columns:
        if column.truth:
            judged[", ".join(f"{key}={_show(value)}" for key, value in column.truth.items())].append(column.label)
    return tuple(f"truth of {', '.join(labels)}: {truth}" for truth, labels in judged.items())


def _distinct(
    names: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
    places: Sequence[str] | None = None,
    form: str = "{name} ({keys})",
    between: str = ", ",
) -> list[str]:
    """The names, with the keys of `configs` that tell equal names of one place apart: `ekfac (damping.value=0.01)`.

    A key that only some of them have, as settings do that came later, is left out where the others tell them apart.
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        groups[name, places[i] if places else ""].append(i)
    labels = list(names)
    for (name, _), members in groups.items():
        flat = {i: dict(_flat(configs[i])) for i in members}
        keys = {key: None for config in flat.values() for key in config}  # a set that keeps its order
        differing = [key for key in keys if len({flat[j].get(key, "") for j in members}) > 1]
        for key in reversed([key for key in differing if any(key not in flat[j] for j in members)]):
            others = [k for k in differing if k != key]
            if len({tuple(flat[j].get(k, "") for k in others) for j in members}) == len(members):
                differing = others
        for i in members:
            shown = [f"{key}={flat[i][key]}" for key in differing if key in flat[i]]
            labels[i] = form.format(name=name, keys=between.join(shown)) if shown else name
    return labels


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif key == "_target_" and prefix:  # curvature=KFAC
            yield prefix.rstrip("."), str(value).rpartition(".")[2]
        else:
            yield f"{prefix}{key}", _show(value)


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.12g}"
    return f"[{', '.join(map(_show, value))}]" if isinstance(value, list | tuple) else str(value)


# --- cells -----------------------------------------------------------------------------------------------------------


def _cell(entries: Mapping[int, _Entry], row: Sequence[Mapping[str, Any]]) -> Cell | None:
    """Mean over seeds with its interval; a status where no seed has a number; None where nothing was measured."""
    used = [entries[seed] for seed in sorted(entries) if entries[seed].metric.get("value") is not None]
    lost = [_state(entry) for seed, entry in entries.items() if entry not in used]
    measured = {record["seed"] for record in row if record["metrics"]}
    lost += [
        (record["status"], record.get("reason") or "")
        for record in _newest(row)
        if record["seed"] not in measured and record["status"] != "ok"
    ]
    nan = sum(entry.metric.get("nan") or 0 for entry in entries.values())
    if not used:
        if not lost:
            return None
        status = lost[-1][0] if lost[-1][0] != "ok" else "nan"
        return Cell(status=status, reason=_join(reason for _, reason in lost), nan=nan, seeds=len(lost))
    unfit = _join(entry.record["reason"] for entry in used if entry.record["status"] == "unfit")
    reasons = [f"unfit: {unfit}"] if unfit else []
    if lost:
        what = _join(": ".join(filter(None, (state if state != "ok" else "nan", why))) for state, why in lost)
        reasons.append(f"{len(lost)} of {len(lost) + len(used)} seeds without a number ({what})")
    values = np.array([entry.metric["value"] for entry in used], dtype=float)
    low, high = _interval(used)
    return Cell(
        value=float(values.mean()),
        low=low,
        high=high,
        sd=float(values.std(ddof=1)) if len(values) >= SEED_SPREAD_FROM else None,
        ceiling=_mean(entry.metric.get("ceiling") for entry in used),
        n=min((entry.metric["n"] for entry in used if entry.metric.get("n") is not None), default=None),
        nan=nan,
        seeds=len(used),
        status="unfit" if unfit else "ok",
        reason="; ".join(reasons) or None,
    )


def _state(entry: _Entry) -> tuple[str, str]:
    """Why a metric has no number: its own status where it has one, else the record's."""
    owner = entry.metric if "status" in entry.metric else entry.record
    return owner["status"], owner.get("reason") or ""


def _interval(entries: Sequence[_Entry]) -> tuple[float | None, float | None]:
    """One seed: its own. Several: that of the replicates averaged over seeds, else the mean of the seeds' bounds."""
    if len(entries) > 1:
        averaged = _averaged(entries)
        if averaged is not None and np.isfinite(averaged).any():
            value = float(np.mean([entry.metric["value"] for entry in entries]))
            return interval(around(averaged, value))
    bounds = [(entry.metric.get("low"), entry.metric.get("high")) for entry in entries]
    if any(bound is None for pair in bounds for bound in pair):
        return None, None
    low, high = np.array(bounds, dtype=float).mean(0)
    return float(low), float(high)


def _averaged(entries: Sequence[_Entry]) -> np.ndarray | None:
    """Replicates (R,), or parts (3, R), averaged over seeds index by index; None unless every seed has R of them."""
    arrays = [entry.replicates for entry in entries if entry.replicates is not None]
    if not arrays or len(arrays) < len(entries) or len({array.shape for array in arrays}) > 1:
        return None
    averaged: np.ndarray = np.stack(arrays).astype(float).mean(0)
    return averaged


def _newest(row: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One record a seed, in the order of seeds; `row` is sorted by age."""
    by_seed = {record["seed"]: record for record in row}
    return [by_seed[seed] for seed in sorted(by_seed)]


def _costs(row: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    return {key: _mean(record["cost"].get(key) for record in _newest(row)) for key in COSTS}


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


def _join(texts: Iterable[str | None]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


# --- ranks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The best of a column − another row, on the seeds that both have: paired test, `p` by Holm in the column."""

    column: str
    best: str
    row: str
    difference: float
    low: float
    high: float
    p: float


def _compared(
    cells: Mapping[str, Cell | None], entries: Entries, column: str, better: str | None
) -> tuple[list[str], list[Difference]]:
    """The best row of a column with those that are not worse than it beyond doubt, and the differences that say so;
    none where fewer than two compete, and who has no spread does not."""
    if better is None:
        return [], []
    ranked = {
        row: cell.value
        for row, cell in cells.items()
        if cell and cell.value is not None and cell.reason is None and (cell.low is not None or cell.sd is not None)
    }
    if len(ranked) < 2:
        return [], []
    first = max(ranked, key=lambda row: float(goodness(ranked[row], better)))
    found = {
        row: paired
        for row in ranked
        if row != first and (paired := _paired(entries[first, column], entries[row, column], better)) is not None
    }
    adjusted = dict(zip(found, holm(np.array([p for *_, p in found.values()])), strict=True)) if found else {}
    differences = [Difference(column, first, row, *found[row][:3], float(adjusted[row])) for row in found]
    best = [
        row
        for row in ranked
        if row == first
        or goodness(ranked[row], better) == goodness(ranked[first], better)
        or adjusted.get(row, 0.0) > LEVEL
        or (row in found and found[row][0] <= 0)  # on the seeds of both the other is the better
    ]
    return best, differences


def _paired(
    best: Mapping[int, _Entry], other: Mapping[int, _Entry], better: str
) -> tuple[float, float, float, float] | None:
    """(difference, low, high, p) of best − other in goodness, over the seeds of both; None without a spread."""
    seeds = sorted(set(best) & set(other))
    ours, theirs = [best[seed] for seed in seeds], [other[seed] for seed in seeds]
    a, b = _averaged(ours), _averaged(theirs)
    if a is None or b is None:
        good = [[goodness(entry.metric["value"], better) for entry in side] for side in (ours, theirs)]
        return _over_seeds(*np.array(good, dtype=float))
    if a.shape != b.shape:
        return None
    values = [float(np.mean([entry.metric["value"] for entry in side])) for side in (ours, theirs)]
    if a.ndim == 2 and better in ("higher", "lower"):  # the parts of a difference are the difference of the parts
        a, b = (
            goodness(values[0], better) + crossed(goodness(a - b, better)),
            np.full(a.shape[1], goodness(values[1], better)),
        )
    else:
        a, b = (goodness(around(side, value), better) for side, value in zip((a, b), values, strict=True))
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.any():
        return None
    return paired_difference(a[finite], b[finite], *(goodness(value, better) for value in values))


def _over_seeds(best: np.ndarray, other: np.ndarray) -> tuple[float, float, float, float] | None:
    """(difference, low, high, p) by the paired t-test over seeds (S,), from three on; None where they all differ by as
    much, which is no spread."""
    from scipy.stats import ttest_rel

    if len(best) < SEED_SPREAD_FROM or np.ptp(best - other) == 0:
        return None
    found = ttest_rel(best, other)
    bounds = found.confidence_interval(1 - LEVEL)
    return float((best - other).mean()), float(bounds.low), float(bounds.high), float(found.pvalue)


def goodness(value: Any, better: str) -> Any:
    """A number, or an array of them, turned so that more is better."""
    return {"higher": value, "lower": -value, "one": -abs(value - 1)}[better]


def main_column(table: Table) -> int | None:
    """The index of the column that speaks for the table: LDS, else detection AUC (of a bias by the query set that
    exposes it), else LOO correlation."""
    return _main(table.columns, table.rows)


def _main(columns: Sequence[Column], rows: Sequence[Row]) -> int | None:
    for metric in MAIN:
        filled = {
            i: sum(cell is not None and cell.value is not None for cell in (row.cells[i] for row in rows))
            for i, column in enumerate(columns)
            if column.metric == metric
        }
        if any(filled.values()):
            return max(filled, key=lambda i: filled[i])
    return None


def _rank(row: Row, main: int | None, columns: Sequence[Column]) -> tuple[bool, float, str]:
    """Best first in the main column, rows without a number there last, then by label."""
    cell = row.cells[main] if main is not None else None
    if main is None or cell is None or cell.value is None:
        return True, 0.0, row.label
    return False, -float(goodness(cell.value, columns[main].better or "higher")), row.label


# --- words around the numbers ----------------------------------------------------------------------------------------


def _footnotes(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Daggers for cells with numbers, letters for those with a status; equal reasons share one."""
    marks: dict[str, str] = {}
    daggers = letters = 0
    marked = []
    for row in rows:
        cells: list[Cell | None] = []
        for cell in row.cells:
            if cell is not None and cell.reason:
                words = cell.reason if cell.value is not None else f"{cell.status}: {cell.reason}"
                if words not in marks:
                    dagger = cell.value is not None or cell.status == "unfit"
                    daggers, letters = daggers + dagger, letters + (not dagger)
                    marks[words] = "†" * daggers if dagger else f"({_letter(letters)})"
                cell = replace(cell, mark=marks[words])
            cells.append(cell)
        marked.append(replace(row, cells=tuple(cells)))
    return marked, [f"{mark} {words}" for words, mark in marks.items()]


def _letter(number: int) -> str:
    """1 -> a, 26 -> z, 27 -> aa."""
    text = ""
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(ord("a") + rest) + text
    return text


def _caption(group: Sequence[Mapping[str, Any]], model: str, rows: Sequence[Row], settings: str) -> str:
    data = group[0]["data"]
    explained = {record["seed"]: record["fitness"] for record in group if record["fitness"]}
    tests = dict.fromkeys(key for fitness in explained.values() for key in fitness if key.startswith("test_"))
    means = {key: _mean(fitness.get(key) for fitness in explained.values()) for key in tests}
    fit = [f"{key.replace('_', ' ')} {number(mean)}" for key, mean in means.items() if mean is not None]
    counts = sorted({len(row.seeds) for row in rows})
    seeds = f"{counts[0]} seed{'s' * (counts[0] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    parts = [
        group[0]["task"],
        f"{data['source']} data {data['fingerprint'][:8]}" + (f" ({settings})" if settings else ""),
        f"{data['n_train']:,} training examples",
        model,
        *([f"forget {_part_label(group[0])}"] if _part_label(group[0]) else []),
        *(fit or ["fitness not measured"]),
        seeds,
    ]
    return ", ".join(" ".join(part.split()) for part in parts)


def number(value: float | None) -> str:
    """Two decimals; more where they would hide a small number, none where the number is large."""
    if value is None:
        return "–"
    if 1e-6 < abs(value) < 0.005:
        return f"{value:.1g}"
    return fixed(value, 2) if abs(value) < 1000 else f"{value:.0f}" if abs(value) < 1e7 else f"{value:.3g}"


def fixed(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no -0.00


def decimals_for(width: float) -> int:
    """Enough to see an interval of that width, at least two."""
    return min(6, max(2, math.ceil(-math.log10(width)))) if width > 0 else 2
