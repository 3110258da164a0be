"""Imports go down only: tasks <- methods <- bench; and bench reaches concrete classes through the config alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {"tasks": {"tasks"}, "methods": {"tasks", "methods"}, "bench": {"tasks", "methods", "bench"}}
VOCABULARY = {  # what bench may name of the floors below: contracts and training, no concrete task or method
    "methods.base",
    "methods.gradients.blocks",
    "methods.gradients.sharding",  # who of several processes reports
    "tasks.base",
    "tasks.errors",
    "tasks.training",
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("floor", MAY_IMPORT)
def test_imports_go_down_only(floor: str) -> None:
    files = list((ROOT / floor).rglob("*.py"))
    assert files
    for path in files:
        upwards = {name for name in imports(path) if name.split(".")[0] in set(MAY_IMPORT) - MAY_IMPORT[floor]}
        assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"


def test_bench_names_no_concrete_task_or_method() -> None:
    for path in (ROOT / "bench").rglob("*.py"):
        if path.name.startswith("speed"):  # judges nothing: it times what it names
            continue
        for name in imports(path):
            if name.split(".")[0] in ("tasks", "methods"):
                assert any(name == v or name.startswith(v + ".") for v in VOCABULARY), f"{path.name} imports {name}"
