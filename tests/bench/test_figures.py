"""Figures: every number of the table is a point, labels cover nothing, and the same table gives the same file."""

import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from bench import figures
from bench.aggregate import Cell, Column, Row, Table
from bench.figures import Point, colour, quality_against_seconds
from tasks.errors import UserError


def table(*rows: tuple[str, Cell | None, float | None], metric: str = "lds", ceiling: float | None = 0.9) -> Table:
    column = Column(metric, {}, f"{metric} common", "higher", ceiling)
    made = [
        Row(label, label.split()[0], {}, (0,), (cell,), {"seconds": seconds, "trainings": 1, "peak_memory_bytes": 0})
        for label, cell, seconds in rows
    ]
    return Table("name", "digits, some data", "digits", "bundled", "f", 9, "mlp", (column,), tuple(made), (), ())


def crowd(size: int) -> list[Point]:
    """Points so close that labels at their right would lie on one another."""
    return [Point(f"method number {i}", f"m{i}", 10 + i / 10, 0.5 + i / 1000, 0.45, 0.55, False) for i in range(size)]


def draw(points: Sequence[Point], ceiling: float | None = None) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(figures.STYLE):
        figure = figures._draw(points, "lds", ceiling, "caption")
    return figure, figure.axes[0]


ROWS = [
    ("ekfac (k=1)", Cell(0.4, 0.35, 0.45), 12.0),
    ("graddot", Cell(0.2, 0.1, 0.3, mark="†"), 1.0),
    ("random", Cell(0.0), 0.0),
    ("failed", Cell(status="failed"), 3.0),
    ("unpriced", Cell(0.3), None),
    ("other", None, 1.0),
]


def test_both_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a", "a.png", "a.svg"):
        assert quality_against_seconds(table(*ROWS), tmp_path / "sub" / name) == [
            tmp_path / "sub" / "a.png",
            tmp_path / "sub" / "a.svg",
        ]
    assert {path.name for path in (tmp_path / "sub").iterdir()} == {"a.png", "a.svg"}
    assert matplotlib.image.imread(tmp_path / "sub" / "a.png").shape[:2] == (600, 900)  # 6 x 4 inches at 150 dpi
    text = (tmp_path / "sub" / "a.svg").read_text()
    assert all(word in text for word in ("ekfac (k=1)", "graddot", "random", "noise ceiling 0.90", "lds common"))
    assert not any(word in text for word in ("failed", "unpriced", "other"))


def test_a_name_with_dots_is_kept(tmp_path: Path) -> None:
    paths = quality_against_seconds(table(*ROWS), tmp_path / "digits-mlp-0.5")
    assert [path.name for path in paths] == ["digits-mlp-0.5.png", "digits-mlp-0.5.svg"]


def test_the_same_table_gives_the_same_files(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in quality_against_seconds(table(*ROWS), tmp_path / "a")]
    assert [path.read_bytes() for path in quality_against_seconds(table(*ROWS), tmp_path / "b")] == first


@pytest.mark.parametrize("rows", [[], ROWS[3:]])
def test_nothing_to_draw_is_no_file(tmp_path: Path, rows: list[tuple[str, Cell | None, float | None]]) -> None:
    assert quality_against_seconds(table(*rows), tmp_path / "a") == []
    assert quality_against_seconds(table(*ROWS, metric="base_rate"), tmp_path / "a") == []
    assert list(tmp_path.iterdir()) == []


def test_points_and_bars_are_the_numbers_of_the_table() -> None:
    points = figures._points(table(*ROWS), 0)
    assert [(p.label, p.x, p.y, p.low, p.high, p.hollow) for p in points] == [
        ("ekfac (k=1)", 12.0, 0.4, 0.35, 0.45, False),
        ("graddot", 1.0, 0.2, 0.1, 0.3, True),
        ("random", figures.SHORTEST, 0.0, 0.0, 0.0, False),
    ]
    _, axes = draw(points, 0.9)
    bars = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
    drawn = [container.lines[0].get_xydata().tolist()[0] for container in bars]
    assert drawn == [[p.x, p.y] for p in points]
    spans = [container.lines[2][0].get_segments()[0][:, 1].tolist() for container in bars]
    assert spans == [pytest.approx([p.low, p.high]) for p in points]
    assert [container.lines[0].get_markerfacecolor() == "white" for container in bars] == [False, True, False]
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "lds"
    assert [name for name, spine in axes.spines.items() if spine.get_visible()] == ["left", "bottom"]
    (ceiling,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert list(ceiling.get_ydata()) == [0.9, 0.9]
    assert not [line for line in draw(points)[1].lines if line.get_linestyle() == "--"]


def test_the_front_is_of_those_that_no_cheaper_one_equals() -> None:
    def point(label: str, x: float, y: float) -> Point:
        return Point(label, label, x, y, y, y, False)

    points = [point("dear", 9, 0.5), point("cheap", 1, 0.2), point("worse", 2, 0.1), point("good", 3, 0.6),
              point("same price, worse", 3, 0.3), point("as good, dearer", 4, 0.6), point("best", 8, 0.7)]  # fmt: skip
    assert [p.label for p in figures.pareto_front(points)] == ["cheap", "good", "best"]
    _, axes = draw(points)
    (line,) = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert list(line.get_xdata()) == [1, 3, 8] and list(line.get_ydata()) == [0.2, 0.6, 0.7]


@pytest.mark.parametrize("size", [1, 2, 8, 14])
def test_labels_do_not_overlap_and_stay_inside(size: int) -> None:
    points = crowd(size)
    figure, axes = draw(points, 0.52)
    texts = [text for text in axes.texts if isinstance(text, Annotation)]
    assert {text.get_text() for text in texts} == {p.label for p in points} | {"noise ceiling 0.52"}
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    edges = figure.bbox
    assert all(edges.x0 <= box.x0 and box.x1 <= edges.x1 and edges.y0 <= box.y0 and box.y1 <= edges.y1 for box in boxes)


def test_a_lone_label_is_beside_its_point() -> None:
    _, axes = draw([Point("alone", "alone", 1.0, 0.5, 0.4, 0.6, False)])
    (text,) = axes.texts
    box, (x, y) = text.get_window_extent(), axes.transData.transform((1.0, 0.5))
    assert 0 < box.x0 - x < 30 and abs((box.y0 + box.y1) / 2 - y) < 6


def test_a_method_keeps_its_colour() -> None:
    names = ["ekfac", "kfac", "graddot", "trak", "random"]
    assert [colour(name) for name in names] == [colour(name) for name in names]
    assert len({colour(name) for name in names}) == len(names)
    assert all(max(colour(name)) < 0.8 for name in names)  # dark enough on white
    program = "from bench.figures import colour; print(colour('ekfac'))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == str(colour("ekfac"))  # in every process


def test_a_folder_that_cannot_be_written_is_the_users_to_know(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^out=.*cannot be written"):
        quality_against_seconds(table(*ROWS), tmp_path / "file" / "a")


def test_no_window_system_is_touched(tmp_path: Path) -> None:
    program = (
        "import sys, bench.figures as f\n"
        "from matplotlib.figure import Figure\n"
        "f._draw([f.Point('a', 'a', 1.0, 0.5, 0.4, 0.6, False)], 'lds', None, 'c')\n"
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "False False\n"


def test_detection_curves_go_through_the_shares_of_the_table(tmp_path: Path) -> None:
    columns = tuple(
        Column(metric, {}, metric, better, None)
        for metric, better in (("value_found10", "higher"), ("value_found30", "higher"), ("base_rate", None))
    )
    costs = {"seconds": 1.0, "trainings": 1, "peak_memory_bytes": 0}
    rows = [("loss", (0.9, 1.0)), ("random", (0.1, 0.3)), ("tfidf", (None, None))]
    made = tuple(
        Row(label, label, {}, (0,), (*(None if s is None else Cell(s) for s in shares), Cell(0.1)), costs)
        for label, shares in rows
    )
    detected = Table("name", "digits", "digits", "bundled", "f", 9, "mlp", columns, made, (), ())
    assert figures._found_shares(detected, "value_found") == {
        "loss": {0.1: 0.9, 0.3: 1.0}, "random": {0.1: 0.1, 0.3: 0.3},
    }  # fmt: skip
    written = figures.detection_curves(detected, tmp_path / "a.png")
    assert [path.name for path in written] == ["a.png", "a.svg"]
    drawn = (tmp_path / "a.svg").read_text()
    assert all(word in drawn for word in ("loss", "random", "chance", "oracle", "by value"))
    assert "by attribution" not in drawn and "tfidf" not in drawn
    assert figures.detection_curves(table(*ROWS), tmp_path / "b.png") == [] and not (tmp_path / "b.png").exists()


def unlearned(*labels: str, unit: str = "nats") -> Table:
    """A path a label."""
    rows = tuple(Row(label, "influence", {"a": 1}, (0,), (), {}) for label in labels)
    paths = {label: [(0.1, 0.1), (1.0, 0.2 + k)] for k, label in enumerate(labels)}
    return Table("n", "c", "unlearning", "generated", "f", 9, "m", (), rows, (), (), paths=paths, unit=unit)


def words(path: Path) -> list[str]:
    """The lines of text of an SVG."""
    return re.findall(r">([^<>]+)</t(?:ext|span)>", path.read_text())


def test_paths_are_named_as_the_rows_of_the_table(tmp_path: Path) -> None:
    labels = [f"influence by ekfac (unlearner.scale=1, unlearner.damping.value={value})" for value in ("0.01", "0.1")]
    _, drawn = figures.unlearning_paths(unlearned(*labels, "npo (tune=true)", "npo (tune=false)"), tmp_path / "a")
    said = " ".join(words(drawn))
    assert all(label in said for label in (*labels, "npo (tune=true)", "npo (tune=false)"))


def test_a_long_legend_stays_on_the_page(tmp_path: Path) -> None:
    labels = [f"influence by ekfac (unlearner.scale=1, unlearner.damping.value={k})" for k in range(30)]
    figures.unlearning_paths(unlearned(*labels), tmp_path / "a")
    image = matplotlib.image.imread(tmp_path / "a.png")
    edges = [image[0], image[-1], image[:, 0], image[:, -1]]
    assert all((edge[:, :3] == 1).all() for edge in edges), "nothing is cut"


@pytest.mark.parametrize("unit", ["nats", "nats a token"])
def test_paths_say_the_unit_of_their_losses(unit: str, tmp_path: Path) -> None:
    _, drawn = figures.unlearning_paths(unlearned("npo", unit=unit), tmp_path / "a")
    assert {f"loss of the forget set, {unit}", f"loss of the retained rows, {unit}"} <= set(words(drawn))
