"""The tables in results/reference are what their records give, and nothing else."""

from pathlib import Path

import numpy as np
import pytest

from bench import aggregate, records, run, tables
from bench.config import compose
from tasks.training.engines import one_by_one
from tasks.training.plan import planned, random_subsets
from tasks.training.retrain import store_of

REFERENCE = Path(__file__).parent.parent / "results" / "reference"
TEXTS = (".csv", ".md", ".tex")


def test_the_kept_tables_are_rebuilt_from_the_kept_records(tmp_path: Path) -> None:
    for table in aggregate.tables(tables.load(REFERENCE)):
        tables.write(table, tmp_path)
    kept = {p.name: p.read_text(encoding="utf-8") for p in (REFERENCE / "tables").iterdir() if p.suffix in TEXTS}
    made = {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()}
    assert kept and made == kept


def test_every_kept_record_says_how_it_was_made() -> None:
    found = records.read_all(REFERENCE)
    assert found
    for record, folder in found:
        command = record["provenance"]["command"]
        assert command.startswith("python -m bench ") and "=/" not in command, "a command that others can use"
        assert not (folder / "scores.safetensors").exists(), "slim records hold no scores"


@pytest.mark.parametrize("source", ["folder", "generated", "bundled"])
def test_real_and_generated_data_are_both_there(source: str) -> None:
    assert any(record["data"]["source"] == source for record, _ in records.read_all(REFERENCE))


@pytest.mark.parametrize("model", ["mlp", "logreg"])
def test_digits_needs_no_retraining_in_a_checkout(model: str, tmp_path: Path) -> None:
    """What the default run asks for is among the trainings that travel with the project."""
    config = compose(["task=digits", f"model={model}"])
    task = run.build_task(config)
    kept = store_of(task.public(), tmp_path, run.shipped_truth()).read()
    for name, evaluation in run.build_evaluations(config, task).items():
        plan = evaluation.plan(task, config.seed)
        assert plan is not None and set(plan.keys()) <= set(kept), name


def test_a_shipped_training_is_what_it_says(tmp_path: Path) -> None:
    """One of the rows made again here; other processors round otherwise, and float32 carries that along."""
    task = run.build_task(compose(["task=digits"])).public()
    kept = store_of(task, tmp_path, run.shipped_truth()).read()
    plan = planned(random_subsets(len(task.train), 100, 0.5, 0), 5, "common", 0, 0).select([3])
    made = one_by_one(task, plan)["query"][0]
    there = kept[plan.keys()[0]]["query"]
    assert np.corrcoef(made, there)[0, 1] > 0.999 and np.abs(made - there).max() < 0.5
