"""A metric against any key of the config, method by method, from records and from nothing else.

python -m bench.study x=truth.lds.fraction [metric=lds] [task=digits] [out=results]
"""

import difflib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import records
from bench.records import Record
from tasks.errors import UserError

HELP = """A metric against any key of the config, method by method, from the records of a sweep.

    python -m bench.study x=truth.lds.fraction [metric=lds] [task=digits] [out=results]

x       the key that was swept, for example truth.lds.repeats, model.recipe.epochs, method.damping.value, task.n_train
metric  of the records; its ceiling is drawn as a dashed line
Writes <out>/tables/study-<task>-<metric>-<x>.csv and .png, one figure for each set of the other settings."""


@dataclass(frozen=True)
class Point:
    """The mean over seeds at one x."""

    x: Any
    value: float
    low: float
    high: float
    ceiling: float | None
    seeds: int


@dataclass(frozen=True)
class Curve:
    """One method configuration under one set of the other settings (`rest`, what they differ in)."""

    method: str
    rest: str
    points: tuple[Point, ...]


def curves(found: Sequence[Record], x: str, metric: str) -> list[Curve]:
    """Records grouped by everything but x and the seed; groups that have one x only are no curve."""
    groups: dict[tuple[str, str], dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    settings: dict[str, Mapping[str, Any]] = {}
    for record in sorted(found, key=lambda r: str(r["provenance"].get("started", ""))):
        if record["metrics"].get(metric, {}).get("value") is None:
            continue
        flat = flatten(record["config"])
        flat["data"] = record["data"]["fingerprint"] if not x.startswith("task.") else record["data"]["source"]
        value = flat.pop(x, None)
        if value is None:
            continue
        flat.pop("seed", None)
        of_method = {k: v for k, v in flat.items() if k.startswith("method.")}
        of_truth = dict(record["metrics"][metric].get("truth") or {})
        owner, _, last = x.rpartition(".")
        if last == "regime":  # a fixed truth does not name the repeats that it has no use for
            of_truth.setdefault("repeats", flat.get(f"{owner}.repeats"))
        for key in (last if x.startswith("truth.") else "", "explained_seed"):
            of_truth.pop(key, None)
        others = {k: v for k, v in flat.items() if k.partition(".")[0] in ("model", "task", "data")}
        others |= {f"truth.{k}": v for k, v in of_truth.items()}
        rest = records.canonical(others)
        settings[rest] = others
        method = records.canonical([record["method_label"], of_method])
        groups[rest, method][json.dumps(value)][record["seed"]] = record
    swept = {key: by_x for key, by_x in groups.items() if len(by_x) > 1}
    rests = _names({rest: settings[rest] for rest, _ in swept})
    labels = _labels([method for _, method in swept])
    return [
        Curve(labels[method], rests[rest], tuple(_point(x_text, by_x[x_text], metric) for x_text in _ordered(by_x)))
        for (rest, method), by_x in swept.items()
    ]


def _point(x_text: str, by_seed: Mapping[int, Record], metric: str) -> Point:
    entries = [record["metrics"][metric] for record in by_seed.values()]

    def mean(key: str) -> float:
        """A bound that a number does not have is the number."""
        return fmean(entry["value"] if entry.get(key) is None else entry[key] for entry in entries)

    ceilings = [entry["ceiling"] for entry in entries if entry.get("ceiling") is not None]
    ceiling = fmean(ceilings) if ceilings else None
    return Point(json.loads(x_text), mean("value"), mean("low"), mean("high"), ceiling, len(entries))


def _ordered(by_x: Iterable[str]) -> list[str]:
    def order(text: str) -> tuple[int, Any]:
        value = json.loads(text)
        return (1, str(value)) if isinstance(value, str) else (0, value if isinstance(value, list) else [value])

    return sorted(by_x, key=order)


def _differences(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Each set of settings by the keys in which the sets differ."""
    keys = sorted({key for of in settings.values() for key in of})
    differ = [key for key in keys if len({json.dumps(of.get(key)) for of in settings.values()}) > 1]
    return {rest: ", ".join(f"{key}={of.get(key)}" for key in differ) for rest, of in settings.items()}


def _names(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Each set of settings by the first few keys that tell all sets apart, the model's name before others."""
    keys = sorted({key for of in settings.values() for key in of}, key=lambda key: (not key.endswith("name"), key))
    told: dict[str, list[str]] = {rest: [] for rest in settings}
    for key in keys:
        more = {rest: [*told[rest], f"{key}={of.get(key)}"] for rest, of in settings.items()}
        if len({json.dumps(parts) for parts in more.values()}) > len({json.dumps(parts) for parts in told.values()}):
            told = more
    return {rest: ", ".join(parts) for rest, parts in told.items()}


def _labels(methods: Sequence[str]) -> dict[str, str]:
    """The method's name; with the keys in which configurations of one name differ."""
    by_name: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for text in dict.fromkeys(methods):
        name, config = json.loads(text)
        by_name[name].append((text, config))
    labels: dict[str, str] = {}
    for name, group in by_name.items():
        more = _differences(dict(group))
        labels |= {text: f"{name} {more[text]}".strip() for text, _ in group}
    return labels


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists stay."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def write(found: Sequence[Curve], x: str, metric: str, task: str, folder: Path) -> list[Path]:
    """A CSV of all points, and one figure of all curves, a panel for each set of the other settings."""
    import pandas as pd

    stem = re.sub(r"[^\w.+-]+", "_", f"study-{task}-{metric}-{x}")
    rows = [{"settings": c.rest, "method": c.method, **{x if k == "x" else k: v for k, v in vars(p).items()}}
            for c in found for p in c.points]  # fmt: skip
    with records.writable(folder):
        records.write_bytes(folder / f"{stem}.csv", pd.DataFrame(rows).to_csv(index=False).encode())
        _draw(found, x, metric, task, folder / f"{stem}.png")
    return [folder / f"{stem}.csv", folder / f"{stem}.png"]


def _draw(found: Sequence[Curve], x: str, metric: str, task: str, path: Path) -> None:
    import io

    from matplotlib.figure import Figure

    rests = list(dict.fromkeys(c.rest for c in found))
    figure = Figure(figsize=(4.6 * len(rests) + 1.0, 3.6), layout="constrained")
    methods = sorted({c.method for c in found})
    for column, rest in enumerate(rests):
        axes = figure.add_subplot(1, len(rests), column + 1)
        ceilings: dict[Any, float] = {}
        there = _ordered({json.dumps(p.x) for c in found if c.rest == rest for p in c.points})
        positions = {text: k for k, text in enumerate(there)}
        numbers = [json.loads(text) for text in there]
        numeric = all(isinstance(x, int | float) for x in numbers)
        at = (lambda v: v) if numeric else (lambda v: positions[json.dumps(v)])  # noqa: B023
        for curve in (c for c in found if c.rest == rest):
            xs, values = [at(p.x) for p in curve.points], [p.value for p in curve.points]
            errors = [[p.value - p.low for p in curve.points], [p.high - p.value for p in curve.points]]
            axes.errorbar(
                xs, values, errors, marker="o", capsize=2, label=curve.method, color=f"C{methods.index(curve.method)}",
                linestyle="-" if numeric else "none",
            )  # fmt: skip
            ceilings |= {at(p.x): p.ceiling for p in curve.points if p.ceiling is not None}
        if ceilings:
            style = {"linestyle": "--"} if numeric else {"linestyle": "none", "marker": "_", "markersize": 18}
            axes.plot(*zip(*sorted(ceilings.items()), strict=True), color="k", label="noise ceiling", **style)
        if not numeric:
            axes.set_xticks(list(positions.values()), [str(x) for x in numbers])
        elif 0 < 8 * min(numbers) < max(numbers):
            axes.set_xscale("log")
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.set(xlabel=x, ylabel=metric, title=rest if rest else task)
        axes.title.set_fontsize(8)
        if column == 0:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    records.write_bytes(path, buffer.getvalue())


def to_text(found: Sequence[Curve], x: str, metric: str) -> str:
    """One line a point."""
    lines = []
    for curve in found:
        lines.append(f"{curve.method}{f' ({curve.rest})' if curve.rest else ''}")
        for p in curve.points:
            ceiling = "" if p.ceiling is None else f", ceiling {p.ceiling:.2f}"
            lines.append(f"  {x}={p.x}: {metric} {p.value:.3f} [{p.low:.3f}, {p.high:.3f}]{ceiling}, {p.seeds} seed(s)")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    options = {"x": "", "metric": "lds", "task": "digits", "out": "results"}
    try:
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if key not in options or not equals or not value:
                raise UserError(argument, None, "is not understood", allowed=[f"{k}=..." for k in options])
            options[key] = value
        if not options["x"]:
            raise UserError("x", None, "is missing", hint="x=truth.lds.fraction, or another key that was swept")
        there = [record for record, _ in records.read_all(options["out"], [options["task"]])]
        if not there:
            raise UserError("task", options["task"], f"has no records in {options['out']}")
        metrics = sorted({metric for record in there for metric in record["metrics"]})
        if options["metric"] not in metrics:
            raise UserError("metric", options["metric"], "is in no record", allowed=metrics)
        keys = sorted({key for record in there for key in flatten(record["config"])})
        if options["x"] not in keys:
            near = difflib.get_close_matches(options["x"], keys, 1)
            hint = f"did you mean {near[0]}?" if near else None
            raise UserError("x", options["x"], "is no key of the records' configs", hint=hint)
        found = curves(there, options["x"], options["metric"])
        if not found:
            raise UserError(
                "x", options["x"], f"takes no two values in the records with {options['metric']}",
                hint="sweep it: python -m bench -m ...",
            )  # fmt: skip
        print(to_text(found, options["x"], options["metric"]))
        written = write(found, options["x"], options["metric"], options["task"], Path(options["out"]) / "tables")
        print("written:", *written, file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
