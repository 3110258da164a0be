"""Keeps the slim part of records (no score files) in results/reference, with the tables and figures made from them.

    python -m bench.reference out=results [to=results/reference] [task=sst2] [truth=digits]

What is kept is enough to rebuild every table: record.json, which holds the config, and the bootstrap replicates.
`truth`: tasks whose finished trainings are kept too, so that a checkout scores methods on them without retraining.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench import aggregate, figures, records, tables, truth
from tasks.errors import UserError
from tasks.training.store import Store

KEPT = ("record.json", "replicates.safetensors")


def keep(out: Path, to: Path, tasks: Sequence[str] | None = None) -> list[Path]:
    """Copies the slim records of `out` to `to` and writes the tables and figures of all that `to` then holds."""
    for record, folder in records.read_all(out, tasks):
        target = records.folder(to, record)
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (folder / name).exists():
                shutil.copyfile(folder / name, target / name)
    return write_tables(to)


def ship(out: Path, to: Path, tasks: Sequence[str]) -> list[Path]:
    """All finished trainings of the tasks, one file for each model, in to/truth."""
    shipped = []
    for folder in truth.stores(out):
        if truth.about(folder).get("task") not in tasks or folder.name.startswith("pbrf"):
            continue
        rows = Store(folder).read()
        target = to / "truth" / folder.name
        keys = sorted(rows)
        names = ("val", "query")  # what a training took here is nobody's price elsewhere
        shutil.rmtree(target, ignore_errors=True)
        Store(target).add(keys, {name: np.stack([rows[key][name] for key in keys]) for name in names})
        shutil.copyfile(folder / "task.json", target / "task.json")
        shipped.append(target)
    return shipped


def write_tables(to: Path) -> list[Path]:
    """Every table and figure of the records that `to` holds."""
    written: list[Path] = []
    for table in aggregate.tables(tables.load(to)):
        written += tables.write(table, to / "tables")
        written += figures.quality_against_seconds(table, to / "tables" / f"{table.name}.png")
        written += figures.detection_curves(table, to / "tables" / f"{table.name}-detection.png")
        written += figures.unlearning_paths(table, to / "tables" / f"{table.name}-paths.png")
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    options = {"out": "results", "to": "results/reference", "task": "", "truth": ""}
    try:
        for argument in sys.argv[1:] if arguments is None else arguments:
            key, equals, value = argument.partition("=")
            if not equals or key not in options:
                raise UserError(key, value or None, "is no key", allowed=[f"{k}=" for k in options])
            options[key] = value
        if not (Path(options["out"]) / "runs").is_dir() and not options["truth"]:
            raise UserError("out", options["out"], "holds no runs")
        tasks = options["task"].split(",") if options["task"] else None
        for path in keep(Path(options["out"]), Path(options["to"]), tasks):
            print(path)
        for path in ship(Path(options["out"]), Path(options["to"]), options["truth"].split(",")):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
