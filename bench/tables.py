"""Results tables from records, and from nothing else.

python -m bench.tables [out=results] [task=sst2,digits] [format=text|md|tex|csv]
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench import records
from bench.aggregate import Stored, Table, tables
from bench.formats import differences_to_csv, to_console, to_csv, to_latex, to_markdown
from bench.records import Record
from tasks.errors import UserError

# --- the program -----------------------------------------------------------------------------------------------------

FORMATS: dict[str, Callable[[Table], str]] = {
    "text": to_console,
    "md": to_markdown,
    "tex": to_latex,
    "csv": to_csv,
}


def load(out: str | Path, tasks: Iterable[str] | None = None) -> list[Stored]:
    """Every readable record under `out` with its replicates; damaged ones are skipped with a warning."""
    stored: list[Stored] = []
    for record, folder in records.read_all(out, tasks):
        try:
            stored.append((record, records.read_replicates(folder)))
        except ValueError as error:
            warnings.warn(f"intervals without their replicates: {error}", stacklevel=2)
            stored.append((record, {}))
    return stored


def write(table: Table, folder: str | Path) -> list[Path]:
    """Writes <name>.csv, .md and .tex into the folder, and <name>-differences.csv (each row against the best of each
    column) where rows were compared; each file whole or not at all."""
    paths = [Path(folder) / f"{table.name}.{suffix}" for suffix in ("csv", "md", "tex")]
    with records.writable(folder):
        for path in paths:
            records.write_bytes(path, FORMATS[path.suffix[1:]](table).encode())
        if table.differences:
            paths.append(Path(folder) / f"{table.name}-differences.csv")
            records.write_bytes(paths[-1], differences_to_csv(table).encode())
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables of the records under `out` and prints them; exit status 2 for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments):
        print(_HELP)
        return 0
    try:
        options = _options(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            stored = load(options["out"], options["task"].split(",") if options["task"] else None)
        if not stored:
            there = sorted({record["task"] for record in _quietly(options["out"])})
            key, value, problem = ("task", options["task"], "has no records") if there else ("out", options["out"], "")
            hint = "run python -m bench first"
            raise UserError(key, value, problem or "holds no records", allowed=there or None, hint=hint)
        for table in tables(stored):
            print(FORMATS[options["format"]](table))
            print("written:", *write(table, Path(options["out"]) / "tables"), file=sys.stderr)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _options(arguments: Sequence[str]) -> dict[str, str]:
    options = {"out": "results", "task": "", "format": "text"}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in options or not equals or not value:
            raise UserError(argument, problem="is not understood", allowed=[f"{key}=..." for key in options])
        options[key] = value
    if options["format"] not in FORMATS:
        raise UserError("format", options["format"], allowed=FORMATS)
    return options


def _quietly(out: str) -> list[Record]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [record for record, _ in records.read_all(out)]


_HELP = """Results tables from the records of runs.

    python -m bench.tables [out=results] [task=sst2,digits] [format=text|md|tex|csv]

out     the folder that holds runs/; the tables are written to <out>/tables as .csv, .md and .tex
task    only these tasks
format  what is printed; all three files are written whatever it says"""

if __name__ == "__main__":
    sys.exit(main())
