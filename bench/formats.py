"""A table as text: on the console, in Markdown, in LaTeX, and tidy in CSV."""

import csv
import io
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from bench import records
from bench.aggregate import COSTS, Cell, Column, Table, decimals_for, fixed, number

PANEL = 130  # characters that a console table may be wide


def cell_text(cell: Cell | None) -> str:
    """`0.41 [0.37, 0.45] ±0.02 (3 nan) †`; a status with its footnote; a dash where nothing was measured."""
    if cell is None:
        return "–"
    parts = [cell.status]
    if cell.value is not None:
        show, interval = number, []
        if cell.low is not None and cell.high is not None:
            show = partial(fixed, decimals=decimals_for(cell.high - cell.low))
            interval = [f"[{show(cell.low)}, {show(cell.high)}]"]
        parts = [show(cell.value), *interval, *([f"±{show(cell.sd)}"] if cell.sd is not None else [])]
    if cell.nan:
        parts.append(f"({cell.nan} nan)")
    return " ".join(filter(None, (*parts, cell.mark)))


def _memory(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


Line = list[tuple[str, bool]]  # the texts of a line and whether each is bold


def _grid(table: Table) -> tuple[list[str], list[Line], Line | None]:
    """Header, rows and the line of noise ceilings (None where no column has one) as texts."""
    uneven = len({len(row.seeds) for row in table.rows}) > 1
    header = ["method", *["seeds"] * uneven, *(column.label for column in table.columns)]
    header += ["seconds", "trainings", "peak memory"]
    lines: list[Line] = []
    for row in table.rows:
        line = [(row.label, False), *[(str(len(row.seeds)), False)] * uneven]
        line += [(cell_text(cell), cell is not None and cell.best) for cell in row.cells]
        trainings = row.costs["trainings"]
        line += [(number(row.costs["seconds"]), False), (f"{trainings:g}" if trainings is not None else "–", False)]
        lines.append([*line, (_memory(row.costs["peak_memory_bytes"]), False)])
    if all(column.ceiling is None for column in table.columns):
        return header, lines, None
    ceiling = ["noise ceiling", *[""] * uneven, *(number(column.ceiling) for column in table.columns), "", "", ""]
    return header, lines, [(text, False) for text in ceiling]


# --- the four forms --------------------------------------------------------------------------------------------------


def to_console(table: Table, bold: bool | None = None, width: int | None = None) -> str:
    """Aligned text; the best in bold where `bold` (default: on a terminal), else with an asterisk.

    A table that is too wide is turned, if its rows then fit beside each other, as those of a single run do; else what
    does not fit goes below, beside the methods again.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    bold = sys.stdout.isatty() if bold is None else bold
    width = width or (shutil.get_terminal_size((PANEL, 0)).columns if bold else PANEL)
    header, lines, ceiling = _grid(table)
    lines += [ceiling] if ceiling is not None else []
    heads, turned = _turned(header, lines)
    if len(_panels(header, lines, width)) > 1 and len(_panels(heads, turned, width)) == 1:
        header, lines = heads, turned
    file = io.StringIO()
    console = Console(file=file, force_terminal=bold, color_system="standard" if bold else None, width=100_000)
    for columns in _panels(header, lines, width):
        grid = Grid(box=SIMPLE_HEAD, pad_edge=False)
        for c in columns:
            grid.add_column(Text(header[c]), justify="right" if c else "left", no_wrap=True)
        for line in lines:
            grid.add_row(*(Text(t, "bold") if b and bold else Text(t + "*" * b) for t, b in (line[c] for c in columns)))
        console.print(grid)
    body = [line.rstrip() for line in file.getvalue().splitlines()]
    starred = not bold and any(b for line in lines for _, b in line)
    notes = [*table.notes, *["* best, or not told from the best by a paired test"] * starred]
    return "\n".join([table.caption, *filter(None, body), *notes]) + "\n"


def _turned(header: Sequence[str], lines: Sequence[Line]) -> tuple[list[str], list[Line]]:
    """A line a column."""
    return ["", *(line[0][0] for line in lines)], [
        [(name, False), *(line[c] for line in lines)] for c, name in enumerate(header) if c
    ]


def _panels(header: Sequence[str], lines: Sequence[Line], width: int) -> list[list[int]]:
    """Columns that fit beside each other, the first one (the method) in every panel."""
    widths = [max(len(name), *(len(line[c][0]) + 1 for line in lines)) + 3 for c, name in enumerate(header)]
    panels: list[list[int]] = [[0]]
    for c in range(1, len(header)):
        if len(panels[-1]) > 1 and sum(widths[k] for k in panels[-1]) + widths[c] > width:
            panels.append([0])
        panels[-1].append(c)
    return panels


def to_markdown(table: Table) -> str:
    header, lines, ceiling = _grid(table)

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    body = [line(f"**{escape_markdown(t)}**" if b else escape_markdown(t) for t, b in cells) for cells in lines]
    last = [line(f"*{t}*" if t else "" for t, _ in ceiling)] if ceiling else []
    rule = line([":--"] + ["--:"] * (len(header) - 1))
    notes = [f"- {escape_markdown(note)}" for note in (*table.notes, *table.truths)]
    grid = [line(escape_markdown(name) for name in header), rule, *body, *last]
    return "\n".join([f"**{escape_markdown(table.caption)}**", "", *grid, *[""] * bool(notes), *notes]) + "\n"


def escape_markdown(text: str) -> str:
    """One line without markup; an underscore inside a word is none."""
    text = re.sub(r"([\\|*`<]|\](?=[(\[]))", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def to_latex(table: Table) -> str:
    r"""A `table` environment; its document needs \usepackage{booktabs}."""
    header, lines, ceiling = _grid(table)

    def line(cells: Iterable[str]) -> str:
        return "{}" + " & ".join(cells) + r" \\"  # {}: a bracket after \\ would be its argument

    notes = [rf"{escape_latex(note)}\\" for note in (*table.notes, *table.truths)]
    body = [line(rf"\textbf{{{escape_latex(t)}}}" if b else escape_latex(t) for t, b in cells) for cells in lines]
    last = [r"\midrule", line(escape_latex(t) for t, _ in ceiling)] if ceiling else []
    return (
        "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{escape_latex(table.caption)}}}",
                rf"\label{{tab:{re.sub(r'[^A-Za-z0-9.-]+', '-', table.name)}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
                r"\toprule",
                line(map(escape_latex, header)),
                r"\midrule",
                *body,
                *last,
                r"\bottomrule",
                r"\end{tabular}",
                *([r"\par\footnotesize\raggedright", *notes] if notes else []),
                r"\end{table}",
            ]
        )
        + "\n"
    )


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "†": r"\dag{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
}


def escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def tidy(table: Table) -> list[dict[str, Any]]:
    """One dict a row and metric, numbers in full: a long table for pandas (`DataFrame(tidy(table))`) and for CSV."""
    lines = []
    for row in table.rows:
        head = {
            "task": table.task,
            "data_source": table.source,
            "fingerprint": table.fingerprint,
            "n_train": table.n_train,
            "model": table.model,
            "method": row.method,
            "label": row.label,
            "config": records.canonical(row.config),
        }
        costs = {key: row.costs[key] for key in COSTS}
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell is not None:
                lines.append({**head, **_tidy_cell(column, cell), **costs})
    return lines


def _tidy_cell(column: Column, cell: Cell) -> dict[str, Any]:
    share = cell.value / cell.ceiling if cell.value is not None and cell.ceiling else None
    return {
        "metric": column.metric,
        "column": column.label,
        "truth": records.canonical(column.truth),
        "better": column.better,
        "status": cell.status,
        "reason": cell.reason,
        "value": cell.value,
        "low": cell.low,
        "high": cell.high,
        "sd_over_seeds": cell.sd,
        "ceiling": cell.ceiling,
        "of_ceiling": share,
        "n": cell.n,
        "nan": cell.nan,
        "seeds": cell.seeds,
        "best": cell.best,
    }


FIELDS = (
    *("task", "data_source", "fingerprint", "n_train", "model", "method", "label", "config"),
    *_tidy_cell(Column("", {}, "", None, None), Cell()),
    *COSTS,
)


def to_csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(tidy(table))
    return file.getvalue()


def differences_to_csv(table: Table) -> str:
    """Each row against the best of each column: difference, its interval, p by Holm over the column."""
    file = io.StringIO()
    fields = ("column", "best", "row", "difference", "low", "high", "p")
    writer = csv.DictWriter(file, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({field: getattr(found, field) for field in fields} for found in table.differences)
    return file.getvalue()
