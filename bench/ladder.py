"""How much of the curvature has to be kept: solvers from the Hessian down to the diagonal, each at the damping that the
validation split prefers, from records and from nothing else.

python -m bench.ladder [task=digits] [out=results]
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from bench import records
from bench.records import Record
from tasks.errors import UserError

HELP = """Solvers, each at the damping that the validation split prefers (lds_val), and the lds of the queries there.

    python -m bench.ladder [task=digits] [out=results]

Reads the records of a sweep that has truth.lds.val=true (-m study=ladder). Writes <out>/tables/ladder-<task>.csv."""


def rows(found: Sequence[Record]) -> list[dict[str, object]]:
    """A row a method, best tuned first: the damping that has the best mean `lds_val` over seeds, and its `lds`."""
    by_method: dict[str, dict[tuple[str, float, str], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in found:
        damping = record["config"]["method"].get("damping")
        if damping is None or record["metrics"].get("lds_val", {}).get("value") is None:
            continue
        setting = (damping["rule"], float(damping["value"]), damping["scope"])
        by_method[record["method_label"]][setting].append(record)
    table: list[dict[str, object]] = []
    for method, settings in by_method.items():
        whole = max(len(group) for group in settings.values())
        complete = {s: group for s, group in settings.items() if len(group) == whole}  # no damping by fewer seeds
        tuned = max(complete, key=lambda s: _mean(complete[s], "lds_val"))
        values = [record["metrics"]["lds"]["value"] for record in complete[tuned]]
        ceilings = [record["metrics"]["lds"].get("ceiling") for record in complete[tuned]]
        table.append(
            {
                "method": method,
                "lds": fmean(values),
                "sd over seeds": stdev(values) if len(values) > 1 else None,
                "lds_val": _mean(complete[tuned], "lds_val"),
                "damping": f"{tuned[0]} {tuned[1]:g} {tuned[2]}",
                "dampings tried": len(complete),
                "seeds": whole,
                "ceiling": fmean(c for c in ceilings if c is not None) if any(ceilings) else None,
            }
        )
    return sorted(table, key=lambda row: -float(row["lds"]))  # type: ignore[arg-type]


def _mean(group: Sequence[Record], metric: str) -> float:
    return fmean(record["metrics"][metric]["value"] for record in group)


def main(argv: Sequence[str] | None = None) -> int:
    import pandas as pd

    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    options = {"task": "digits", "out": "results"}
    try:
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if key not in options or not equals or not value:
                raise UserError(argument, None, "is not understood", allowed=[f"{k}=..." for k in options])
            options[key] = value
        table = rows([record for record, _ in records.read_all(options["out"], [options["task"]])])
        if not table:
            hint = "python -m bench -m study=ladder"
            raise UserError("out", options["out"], "holds no records with lds_val", hint=hint)
        frame = pd.DataFrame(table)
        path = Path(options["out"]) / "tables" / f"ladder-{options['task']}.csv"
        with records.writable(path.parent):
            records.write_bytes(path, frame.to_csv(index=False).encode())
        print(frame.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
        print(f"written: {path}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
