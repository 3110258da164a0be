"""An installed copy has its configuration with it and works from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel of this project would put into site-packages."""
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    return place / "site"


def test_every_yaml_travels(installed: Path) -> None:
    ours = {p.relative_to(ROOT / "conf") for p in (ROOT / "conf").rglob("*.yaml")}
    assert ours and ours == {
        p.relative_to(installed / "bench/conf") for p in (installed / "bench/conf").rglob("*.yaml")
    }


def test_it_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    settings = ["method=graddot", "task=digits", "model=logreg", "task.n_train=60", "evaluation=[]"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *settings],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["results"]
    assert len(list((tmp_path / "results/runs/digits/graddot").iterdir())) == 1
