"""The tables in results/reference are what their records give, and nothing else."""

from pathlib import Path

import pytest

from bench import aggregate, records, tables

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
        assert record["provenance"]["command"].startswith("python -m bench "), folder
        assert not (folder / "scores.safetensors").exists(), "slim records hold no scores"


@pytest.mark.parametrize("source", ["folder", "generated", "bundled"])
def test_real_and_generated_data_are_both_there(source: str) -> None:
    assert any(record["data"]["source"] == source for record, _ in records.read_all(REFERENCE))
