"""A user's file of 100,000 rows and 40 features: suspects by the cheap methods, from the command to the last file.

Part `own` of `python -m bench.speed`: a process of its own, so that imports and reading count and its memory is known.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

ROWS, FEATURES, WRONG = 100_000, 40, 0.05
METHODS = ("loss", "confidence", "margin", "entropy", "aum", "mahalanobis", "grad_norm")


def report(rounds: int) -> list[str]:
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        wrong = write(place / "rows.csv")
        for k in range(rounds):
            started = time.perf_counter()
            command = [sys.executable, "-m", "bench", "-m", f"method={','.join(METHODS)}", "task=tabular"]
            own = [
                "task.data=folder",
                f"task.data_dir={place / 'rows.csv'}",
                "task.target=label",
                f"out={place / str(k)}",
            ]
            subprocess.run(
                [*command, *own], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            seconds.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # kilobytes on Linux
        found = []
        for method in METHODS:
            (path,) = place.glob(f"0/runs/tabular/{method}/*/suspects.csv")
            table = pd.read_csv(path, usecols=["id", "score"])
            found.append(f"{method} {roc_auc_score(wrong[table['id']], -table['score']):.3f}")
    spread = f"{statistics.median(seconds):.0f} s [{min(seconds):.0f}, {max(seconds):.0f}] over {rounds} rounds"
    return [
        f"{ROWS:,} rows, {FEATURES} features, {100 * WRONG:.0f} % wrong labels, {len(METHODS)} methods: {spread}, "
        f"peak {peak:.2f} GiB",
        f"area under the ROC curve: {', '.join(found)}",
    ]


def write(path: Path) -> np.ndarray:
    """Three classes of a quadratic rule, some labels wrong: which ones, (N,)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, FEATURES)).round(4)
    right = (x @ rng.normal(size=(FEATURES, 3)) + 2 * x[:, :3] * x[:, 3:6]).argmax(1)
    wrong = rng.random(ROWS) < WRONG
    labels = np.where(wrong, (right + rng.integers(1, 3, ROWS)) % 3, right)
    table = pd.DataFrame(x, columns=[f"feature{k}" for k in range(FEATURES)])
    table["label"] = np.array(["low", "middle", "high"])[labels]
    table.to_csv(path, index=False)
    return wrong
