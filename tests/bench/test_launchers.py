"""Sweeps through submitit, as a Slurm cluster would run them; here its local executor starts the processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_a_sweep_by_submitit_is_a_sweep(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra `cluster` is not installed")
    settings = ["task=digits", "task.n_train=60", "evaluation=[lds]", "truth.lds.subsets=5", "model.recipe.epochs=1"]
    command = [
        sys.executable,
        "-m",
        "bench",
        "-m",
        "hydra/launcher=submitit_local",
        "method=random,same_label",
        *settings,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "out=kept"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(path.read_text()) for path in (tmp_path / "kept" / "runs").glob("*/*/*/record.json")]
    assert sorted(record["method"] for record in records) == ["random", "same_label"]
    assert {record["metrics"]["lds"]["truth"]["subsets"] for record in records} == {5}
    assert not (tmp_path / "kept" / "sweeps").exists() and [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_slurm_is_configured_by_hydra_alone() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra `cluster` is not installed")
    command = [sys.executable, "-m", "bench", "hydra/launcher=submitit_slurm", "task=digits", "--cfg", "hydra"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "SlurmLauncher" in done.stdout, done.stderr[-1000:]
