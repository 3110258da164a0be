"""Two processes of torchrun give the scores of one, and divide the work."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import records

SETTINGS = ["task.n_train=61", "task.n_val=8", "task.n_query=7", "evaluation=[]"]
DIGITS = ["task=digits", "model.recipe.epochs=3", *SETTINGS]
SENTIMENT = ["task=sst2", "task.data=generated", "model.recipe.epochs=1", "model.width=16", "model.intermediate=16"]
METHODS = {
    "ekfac": DIGITS,
    "logra method.store=STORE method.curvature.matrix=empirical": DIGITS,
    "relatif": [*SENTIMENT, *SETTINGS],
}
WORK = """
import sys
sys.path[:0] = {paths!r}
import torch, torch.distributed as dist
from functools import partial
from cases import bert, three_classes
from methods.base import Problem
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense
from methods.curvature.diagonal import Diagonal
from methods.curvature.ekfac import EKFAC
from methods.curvature.kfac import KFAC
from methods.curvature.shampoo import Shampoo
from methods.gradients.sharding import first, joined, processes
from methods.influence import Influence
from methods.source import SOURCE
from tasks.training.train import train

def scores():
    found = {{}}
    for case in (three_classes, bert):
        task = case()
        for name, curvature in {{"ekfac": EKFAC("fisher"), "kfac": KFAC("fisher"), "shampoo": Shampoo("ggn"),
                                "diagonal": Diagonal("fisher"), "dense": Dense("ggn", "global", 1.0)}}.items():
            problem = Problem(task, 0, partial(train, task))
            method = Influence(curvature, Damping("mean_eigenvalue", 0.1, "block"))
            found[case.__name__, name] = method.attribute(problem, task.splits["query"]), method.value(problem)
    task = three_classes()
    problem = Problem(task, 0, partial(train, task))
    found["source"] = (SOURCE(2, "fisher", None).attribute(problem, task.splits["query"]),)
    return found

alone = scores()
with joined():
    assert processes() == 2
    together = scores()
    assert alone.keys() == together.keys() and len(alone) == 11
    for key in alone:
        for a, b in zip(alone[key], together[key], strict=True):
            assert (a - b).abs().max() <= 1e-9 * a.abs().max() and a.abs().max() > 0, key
    if first():
        print("all alike")
"""


def run(out: Path, method: str, settings: list[str], processes: int, *more: str) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    chosen = f"method={method}".replace("STORE", str(out / "store")).split()
    command = [sys.executable, *launch, "-m", "bench", *chosen, *settings, f"out={out}", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def scores(out: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    (folder,) = [p.parent for p in (out / "runs").rglob("record.json")]
    return records.read_scores(folder)[0], records.read(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_scores_of_one(method: str, tmp_path: Path) -> None:
    found = {}
    for processes in (1, 2):
        done = run(tmp_path / str(processes), method, METHODS[method], processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("record:") == 1, "only one process reports"
        found[processes] = scores(tmp_path / str(processes))
    one, two = found[1][0], found[2][0]
    assert one.keys() == two.keys() and one
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=0, atol=1e-5 * np.abs(array).max())
    gradients = [found[k][1]["cost"]["gradients"] for k in (1, 2)]  # type: ignore[index]
    assert gradients[1] <= gradients[0] + 4 * 7, "the work is divided; only queries are asked by both"


@pytest.mark.slow
def test_every_curvature_that_divides_its_work_is_that_of_one_process(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "work.py"
    script.write_text(WORK.format(paths=[str(root), str(root / "tests" / "methods")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.count("all alike") == 1, done.stderr


def test_sweeps_go_with_one_process(tmp_path: Path) -> None:
    done = run(tmp_path, "graddot", DIGITS, 2, "-m")
    assert done.returncode != 0 and "-m goes with one process" in done.stderr
