"""Quality against price: one small figure a table, drawn from the same numbers; and curves of errors found.

Each method is a point with its label beside it: attribution seconds (log) across, the table's main metric with its
interval upwards, the noise ceiling as a dashed line. A grey line joins the Pareto front, the methods that are better
than all cheaper ones. Open points carry a footnote in the table (unfit, seeds without a number). A method has the same
colour in every figure.
"""

import colorsys
import io
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from bench import records
from bench.aggregate import Table, main_column, number

LONGEST = 36  # letters of a line of a label
CURVES = 8  # of a panel
SHORTEST = 1e-3  # seconds: what took less is drawn here
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "svg.hashsalt": "bench",  # the same figure gives the same file
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Point:
    label: str
    method: str
    x: float
    y: float
    low: float
    high: float
    hollow: bool


def quality_against_seconds(table: Table, path: str | Path) -> list[Path]:
    """Draws `path`.png and `path`.svg and returns them; none where no row has both a number and a price.

    A suffix .png or .svg of `path` is ignored. Raises UserError naming `out` where the files cannot be written.
    """
    column = None if table.part else main_column(table)  # an update's seconds are no attribution's
    points = _points(table, column) if column is not None else []
    if column is None or not points:
        return []
    with matplotlib.rc_context(STYLE):
        head = table.columns[column]
        return _written(_draw(points, head.label, head.ceiling, table.caption), Path(path))


def detection_curves(table: Table, path: str | Path) -> list[Path]:
    """Share of the planted errors found against the share of rows looked at, a panel for each of the two rankings: the
    methods that find most, and what chance and an oracle find. As the other figure; none where nothing was detected."""
    panels = {
        ranking: curves for ranking in ("value", "attribution") if (curves := _found_shares(table, f"{ranking}_found"))
    }
    if not panels:
        return []
    rates = [row.cells[k] for k, head in enumerate(table.columns) if head.metric == "base_rate" for row in table.rows]
    base = next((cell.value for cell in rates if cell is not None and cell.value is not None), None)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4 * len(panels), 3.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        for k, (ranking, curves) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), k + 1)
            widest = max(max(curve) for curve in curves.values())
            axes.plot([0, widest], [0, widest], color="0.6", linestyle=":", linewidth=1, label="chance")
            if base is not None:
                axes.plot([0, base, max(base, widest)], [0, 1, 1], color="0.6", linestyle="--", lw=1, label="oracle")
            first = sorted(curves, key=lambda label: (-float(np.mean(list(curves[label].values()))), label))[:CURVES]
            for place, label in enumerate(first):
                points = sorted({0.0: 0.0, **curves[label]}.items())
                name = _wrapped(label, LONGEST)
                axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, color=f"C{place}", label=name)
            axes.set_xlabel("share of rows looked at")
            axes.set_ylabel("share of errors found")
            axes.set_ylim(0, 1.03)
            axes.set_title(f"by {ranking}")
            axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        figure.suptitle(_wrapped(table.caption, 90 * len(panels)), color="0.3", fontsize=7.5)
        return _written(figure, Path(path))


def unlearning_paths(table: Table, path: str | Path) -> list[Path]:
    """What forgetting costs: retain loss (log) against forget loss on the way of each update, from the original (a
    square) to the retrainings (stars). As the other figures; none where nothing was unlearned."""
    if not table.paths:
        return []
    shown = [row.label for row in table.rows if len(table.paths.get(row.label, ())) > 1]
    names = [_wrapped(label, LONGEST) for label in shown]
    lines = sum(name.count("\n") + 1 for name in names)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, max(4.2, 1 + 0.155 * lines)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for place, (label, name) in enumerate(zip(shown, names, strict=True)):
            x, y = zip(*((max(a, LEAST_LOSS), max(b, LEAST_LOSS)) for a, b in table.paths[label]), strict=True)
            style, shade = STROKES[place // len(SHADES) % len(STROKES)], SHADES[place % len(SHADES)]
            axes.plot(x, y, style, marker="o", ms=3, lw=1.2, color=shade, label=name)
        columns = {head.metric: k for k, head in enumerate(table.columns)}
        for label, marker in {"retrain": "*", "original": "s"}.items():
            for row in table.rows:
                ends = [row.cells[columns[n]] for n in ("forget_loss", "retain_loss") if n in columns]
                values = [cell.value for cell in ends if cell is not None and cell.value is not None]
                if row.method.startswith(label) and not row.config and len(values) == 2:  # no run of its own
                    across, up = (max(value, LEAST_LOSS) for value in values)
                    size, face = (130 if marker == "*" else 45), "white" if "new" in row.label else "0.25"
                    axes.scatter(across, up, size, face, marker=marker, edgecolor="0.25", zorder=4, label=row.label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"loss of the forget set, {table.unit}")
        axes.set_ylabel(f"loss of the retained rows, {table.unit}")
        axes.grid(color="0.92", zorder=0)
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)
        axes.set_title(_wrapped(table.caption, 80), color="0.3", fontsize=7.5)
        return _written(figure, Path(path))


LEAST_LOSS = 1e-4  # of the axes
SHADES = tuple(f"C{k}" for k in range(10))
STROKES = ("-", "--", ":", "-.")


def _found_shares(table: Table, prefix: str) -> dict[str, dict[float, float]]:
    """Of each row that has them: share looked at -> share found, by the columns `<prefix><percent>`."""
    heads = {
        k: int(head.metric.removeprefix(prefix)) / 100
        for k, head in enumerate(table.columns)
        if head.metric.startswith(prefix) and head.metric.removeprefix(prefix).isdigit()
    }
    found: dict[str, dict[float, float]] = {}
    for row in table.rows:
        for k, share in heads.items():
            cell = row.cells[k]
            if cell is not None and cell.value is not None:
                found.setdefault(row.label, {})[share] = cell.value
    return found


def _written(figure: Figure, path: Path) -> list[Path]:
    """As PNG and SVG; a suffix .png or .svg of `path` is ignored."""
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        file = io.BytesIO()
        figure.savefig(file, format=suffix[1:], dpi=150, metadata=metadata)
        written.append(stem.with_name(stem.name + suffix))
        with records.writable(stem.parent):
            records.write_bytes(written[-1], file.getvalue())
    return written


def _points(table: Table, column: int) -> list[Point]:
    points = []
    for row in table.rows:
        cell, seconds = row.cells[column], row.costs["seconds"]
        if cell is None or cell.value is None or seconds is None:
            continue
        low = cell.value if cell.low is None else cell.low
        high = cell.value if cell.high is None else cell.high
        label = textwrap.shorten(row.label, LONGEST, placeholder=" …")
        points.append(Point(label, row.method, max(seconds, SHORTEST), cell.value, low, high, bool(cell.mark)))
    return points


def _draw(points: Sequence[Point], metric: str, ceiling: float | None, caption: str) -> Figure:
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    decades = np.log10(max(p.x for p in points) / min(p.x for p in points))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=9))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    for point in points:
        shade = colour(point.method)
        bars = [[max(0.0, point.y - point.low)], [max(0.0, point.high - point.y)]]
        face = "white" if point.hollow else shade
        axes.errorbar(
            point.x, point.y, yerr=bars, fmt="o", ms=5, color=shade, mfc=face, elinewidth=1, capsize=0, zorder=3
        )
    front = pareto_front(points)
    if len(front) > 1:
        axes.plot([p.x for p in front], [p.y for p in front], color="0.75", linewidth=1, zorder=2)
    if ceiling is not None:
        axes.axhline(ceiling, color="0.45", linestyle="--", linewidth=1, zorder=1)
    lowest, highest = min(p.x for p in points), max(p.x for p in points)
    axes.set_xlim(lowest / 2, highest * 2 * (highest / lowest) ** 0.2)  # room for the labels on the right
    axes.margins(y=0.12)
    axes.set_xlabel("seconds: attribution and the trainings that it uses")
    axes.set_ylabel(metric)
    axes.set_title(_wrapped(caption, 92), color="0.3", fontsize=7.5)
    axes.grid(axis="y", color="0.92", zorder=0)
    figure.draw_without_rendering()  # fixes the layout, so that labels can be placed in pixels
    _label(axes, points, ceiling)
    return figure


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that are better than every cheaper one, cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def _label(axes: Axes, points: Sequence[Point], ceiling: float | None) -> None:
    """Puts each label at its point, moved up or down (and to the left) until it covers nothing else."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer, scale = canvas.get_renderer(), figure.dpi / 72
    pixels = [tuple(map(float, axes.transData.transform((p.x, p.y)))) for p in points]
    taken = [Bbox.from_extents(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in pixels]
    for point, (x, _) in zip(points, pixels, strict=True):
        (_, low), (_, high) = axes.transData.transform([(point.x, point.low), (point.x, point.high)])
        taken.append(Bbox.from_extents(x - scale, float(low), x + scale, float(high)))
    edges = axes.get_window_extent()
    labels: list[Bbox] = []  # of the points above: labels one over the other keep the order of their points
    if ceiling is not None:
        note = axes.annotate(
            f"noise ceiling {number(ceiling)}",
            (1, ceiling),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=7.5,
            color="0.45",
        )
        taken.append(note.get_window_extent(renderer))
        line = float(axes.transData.transform((points[0].x, ceiling))[1])
        taken.append(Bbox.from_extents(edges.x0, line - scale, edges.x1, line + scale))
    for i in sorted(range(len(points)), key=lambda i: (-points[i].y, points[i].label)):
        x, y = pixels[i]
        text = axes.annotate(
            points[i].label,
            (points[i].x, points[i].y),
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour(points[i].method),
        )
        size = text.get_window_extent(renderer)
        places = [(side, shift, _box(x, y, side, shift, size.width, size.height, scale)) for side, shift in PLACES]
        inside = [place for place in places if edges.x0 <= place[2].x0 and place[2].x1 <= edges.x1 + 8 * scale]
        inside = [place for place in inside if edges.y0 <= place[2].y0 and place[2].y1 <= edges.y1] or places
        free = [place for place in inside if not any(place[2].overlaps(other) for other in taken)]
        ordered = [place for place in free if not any(_below(other, place[2]) for other in labels)]
        side, shift, box = next(iter(ordered or free), None) or min(inside, key=lambda p: _overlap(p[2], taken))
        taken.append(box)
        labels.append(box)
        text.set_horizontalalignment("left" if side > 0 else "right")
        text.set_position((side * GAP, shift * size.height / scale))
        if abs(shift) >= 1:
            end = (box.x0 if side > 0 else box.x1, (box.y0 + box.y1) / 2)
            to = axes.transData.inverted().transform(end)
            axes.plot([points[i].x, to[0]], [points[i].y, to[1]], color=colour(points[i].method), lw=0.5, alpha=0.6)


GAP = 6  # points between a marker and its label
PLACES = sorted(  # side (right, left) and shift in label heights, nearest first
    ((side, shift / 2) for side in (1, -1) for shift in range(-16, 17)),
    key=lambda place: (abs(place[1]) + 1.2 * (place[0] < 0), place[1] < 0),
)


def _box(x: float, y: float, side: int, shift: float, width: float, height: float, scale: float) -> Bbox:
    """The pixels that a label covers on that side of (x, y)."""
    near, middle = x + side * GAP * scale, y + shift * height
    return Bbox.from_extents(
        min(near, near + side * width), middle - height / 2, max(near, near + side * width), middle + height / 2
    )


def _below(box: Bbox, other: Bbox) -> bool:
    return bool(box.y1 <= other.y0 and box.x0 < other.x1 and other.x0 < box.x1)


def _overlap(box: Bbox, others: Sequence[Bbox]) -> float:
    shared = (Bbox.intersection(box, other) for other in others)
    return float(sum(both.width * both.height for both in shared if both is not None))


def colour(method: str) -> tuple[float, float, float]:
    """A dark enough colour that depends on the method's name alone."""
    code = zlib.crc32(method.encode())
    return colorsys.hls_to_rgb((code % 360) / 360, (0.34, 0.44)[code // 360 % 2], 0.65)


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
