"""MNIST from idx files or the hub's cache: the first images in file order, the same from either place."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_tasks import recipe
from test_vectors import idx

from tasks.base import Task
from tasks.data.corruption import Corruption
from tasks.errors import UserError
from tasks.mnist import HUB, REVISION, mnist
from tasks.models.mlp import MLP

ROOT = Path(__file__).parents[2]
MODEL = MLP("mlp_mnist", (6,), 0.1, "float32", recipe())
ROWS = {"train": 60, "test": 25}


def images(pool: str) -> tuple[np.ndarray, np.ndarray]:
    """`ROWS` random images and labels of each pool."""
    rng = np.random.default_rng(len(pool))
    rows = ROWS[pool]
    return rng.integers(0, 256, (rows, 28, 28)).astype(np.uint8), rng.integers(0, 10, rows)


def write_idx(place: Path, zipped: bool) -> Path:
    place.mkdir(exist_ok=True)
    for pool, stem in {"train": "train", "test": "t10k"}.items():
        pixels, labels = images(pool)
        idx(place, pixels, f"{stem}-images-idx3-ubyte", zipped)
        idx(place, labels, f"{stem}-labels-idx1-ubyte", zipped)
    return place


def write_parquet(place: Path, pool: str) -> Path:
    """As the hub holds it: each image as the bytes of a PNG file."""
    from PIL import Image

    cells = []
    for pixels in images(pool)[0]:
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    path = place / f"{pool}-00000-of-00001.parquet"
    pd.DataFrame({"image": cells, "label": images(pool)[1]}).to_parquet(path)
    return path


def made(
    data: str = "folder",
    data_dir: Path | None = None,
    model: Any = MODEL,
    n: tuple[int, int, int] = (40, 5, 8),
    seed: int = 0,
    rate: float = 0.0,
) -> Task:
    place = None if data_dir is None else str(data_dir)
    return mnist(model, data, place, *n, seed, Corruption(rate, "uniform"))


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as told:
        make()
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("zipped", [False, True])
def test_the_first_images_in_file_order_become_a_task(tmp_path: Path, zipped: bool) -> None:
    task = made(data_dir=write_idx(tmp_path, zipped))
    rows = {"train": ("train", 0, 40), "val": ("train", 40, 45), "query": ("test", 0, 8), "test": ("test", 8, 25)}
    for name, (pool, start, end) in rows.items():
        pixels, labels = images(pool)
        split = task.splits[name]
        assert split.ids == tuple(f"{pool}:{i}" for i in range(start, end))
        wanted = (pixels[start:end].reshape(-1, 784) / 255 - 0.1307) / 0.3081
        np.testing.assert_allclose(split.inputs["x"].numpy(), wanted, rtol=1e-6, atol=1e-6)
        assert split.targets.tolist() == labels[start:end].tolist()
    assert (task.source, dict(task.floor)) == ("folder", {"accuracy": 0.8})
    assert [p.shape for p in task.initial(0).parameters()] == [(6, 784), (6,), (10, 6), (10,)]
    assert [type(m).__name__ for m in task.initial(0).layers] == ["Linear", "ReLU", "Dropout", "Linear"]  # type: ignore


def test_the_seed_draws_flips_and_nothing_else(tmp_path: Path) -> None:
    place = write_idx(tmp_path, True)
    assert made(data_dir=place, seed=1).key() == made(data_dir=place, seed=2).key()
    one, other = (made(data_dir=place, seed=s, rate=0.2) for s in (1, 2))
    assert one.annotations is not None and len(one.annotations.flipped) == 8
    assert one.annotations != other.annotations and one.train.ids == other.train.ids
    labels = images("train")[1]
    wrong = {i for i, y in zip(one.train.ids, one.train.targets.tolist(), strict=True) if y != labels[int(i[6:])]}
    assert wrong == one.annotations.flipped
    without = made(data_dir=place, model=replace(MODEL, dropout=0.0))
    assert [name for name, _ in without.initial(0).layers.named_children()] == ["linear0", "relu1", "linear1"]  # type: ignore
    assert without.key() != made(data_dir=place).key() and without.fingerprint() == made(data_dir=place).fingerprint()


def test_impossible_sizes_models_and_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCH_DATA", raising=False)
    place = write_idx(tmp_path, True)
    assert len(made(data_dir=place, n=(55, 5, 24)).splits["test"]) == 1
    cases: list[tuple[Callable[[], Task], str]] = [
        (lambda: made(data_dir=place, n=(56, 5, 8)), "task.n_train=56 is not possible; allowed: at most 55"),
        (lambda: made(data_dir=place, n=(40, 5, 25)), "task.n_query=25 is not possible; allowed: at most 24"),
        (lambda: made(data_dir=place, n=(40, 0, 8)), "task.n_val=0"),
        (lambda: made("web"), "task.data=web is not possible; allowed: auto, folder, hub"),
        (lambda: made(), "task.data=folder needs a folder"),
        (lambda: made("auto", place / "none"), "none is no folder"),
        (
            lambda: made(data_dir=place, model=MLP("linear", (), 0.0, "float64", recipe())),
            "model=linear is for regress",
        ),
        (lambda: made(model=type("Model", (), {"name": "bert"})()), "model=bert does not read vectors"),
    ]
    for make, problem in cases:
        assert problem in refused(make)
    monkeypatch.setenv("BENCH_DATA", str(tmp_path.parent))
    tmp_path.rename(tmp_path.parent / "mnist")
    assert made("auto").source == made("folder").source == "folder"


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    place = write_idx(tmp_path, False)
    path = place / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert "t10k-labels-idx1-ubyte is damaged (24 bytes of data)" in refused(lambda: made(data_dir=place))
    path.write_bytes(content[:-1] + b"\x0b")
    assert "has 25 labels up to 11 for test images (25, 28, 28)" in refused(lambda: made(data_dir=place))
    idx(place, np.zeros(24), path.name, False)
    assert "has 24 labels up to 0 for test images" in refused(lambda: made(data_dir=place))
    path.unlink()
    assert "has no t10k-labels-idx1-ubyte and no" in refused(lambda: made(data_dir=place))


def test_a_damaged_table_of_the_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    paths = {pool: write_parquet(tmp_path, pool) for pool in ROWS}
    monkeypatch.setattr("tasks.mnist.hub_file", lambda _, name, __: paths[name.split("/")[1].split("-")[0]])
    assert made("hub").source == "hub"
    good = paths["train"].read_bytes()
    small = BytesIO()
    Image.new("L", (2, 2)).save(small, "PNG")
    cells = {"not an image": b"nothing", "smaller": small.getvalue()}
    for image in cells.values():
        pd.DataFrame({"image": [{"bytes": image}] * 60, "label": [1] * 60}).to_parquet(paths["train"])
        assert "task.data=hub cannot be used" in refused(lambda: made("hub"))
    for content in (good[:1000], b""):
        paths["train"].write_bytes(content)
        assert f"{paths['train']} is damaged" in refused(lambda: made("hub"))
    pd.DataFrame({"picture": [1]}).to_parquet(paths["train"])
    assert "task.data=hub cannot be used" in refused(lambda: made("hub"))


OFFLINE = """
import json, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from test_mnist import made, write_parquet
from tasks.errors import UserError
from tasks.mnist import HUB, REVISION
import huggingface_hub, pandas, sklearn  # imported beforehand: only the look for the data is timed

def told(**options):
    started = time.perf_counter()
    try:
        answer = made(**options)
    except UserError as error:
        return {"error": str(error), "seconds": time.perf_counter() - started}
    return {"source": answer.source, "key": answer.key()}

out = {"hub": told(data="hub"), "auto": told(data="auto")}
cache = Path(sys.argv[2]) / "hub" / ("datasets--" + HUB.replace("/", "--"))
snapshot = cache / "snapshots" / REVISION / "mnist"
snapshot.mkdir(parents=True)
(cache / "refs").mkdir()
(cache / "refs" / "main").write_text(REVISION)
write_parquet(snapshot, "train")
out["half"] = told(data="auto")
write_parquet(snapshot, "test")
out |= {"cached": told(data="hub"), "cached_auto": told(data="auto")}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Without a network: first with an empty cache, then with the files laid out as the hub's client does."""
    home = tmp_path_factory.mktemp("home")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "BENCH_", "HUGGINGFACE_"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(OFFLINE), str(Path(__file__).parent), str(home)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_data_at_all_is_told_quickly_in_one_line(offline: dict[str, Any]) -> None:
    """There is no generator to fall back on."""
    for data in ("hub", "auto", "half"):
        said = offline[data]["error"]
        assert said.startswith(f"task.data={data.replace('half', 'auto')} finds no images: {HUB}") and "\n" not in said
        assert "task.data_dir=" in said and "BENCH_DATA" in said and offline[data]["seconds"] < 5


def test_the_hubs_cache_holds_the_same_task_as_the_folder(offline: dict[str, Any], tmp_path: Path) -> None:
    assert offline["cached"] == offline["cached_auto"]
    assert offline["cached"] == {"source": "hub", "key": made(data_dir=write_idx(tmp_path, True)).key()}
    assert len(REVISION) == 40 and int(REVISION, 16)


@pytest.mark.skipif("BENCH_DATA" not in os.environ, reason="BENCH_DATA names no folder with real data")
def test_real_mnist_reads() -> None:
    place = Path(os.environ["BENCH_DATA"]) / "mnist"
    if not place.is_dir():
        pytest.skip("BENCH_DATA has no mnist/")
    task = made(data_dir=place, n=(5000, 100, 200))
    assert task.train.targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert task.splits["query"].targets[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert len(task.splits["test"]) == 2000
    assert abs(task.train.inputs["x"].mean()) < 0.02 and abs(task.train.inputs["x"].std() - 1) < 0.02
    assert "at most 59900" in refused(lambda: made(data_dir=place, n=(60_000, 100, 200)))
