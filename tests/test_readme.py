"""What the README shows is run as it stands there, in a copy of the project, without data and without a hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SAYS = (
    "record: ",
    ".md",
    ".png",
    " rows",
    " damaged",
    " removed",
    "optima",
    " skipped",
)  # what a program says that did something
FILES = {  # language of the block, and a word of it
    "methods/agreement.py": ("python", "Agreement"),
    "conf/method/agreement.yaml": ("yaml", "Agreement"),
    "my_nets.py": ("python", "# my_nets.py"),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and line != "make test"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own files, with the environment that is installed already, and the method that the README adds."""
    place = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    (place / ".venv").symlink_to(Path(sys.prefix))
    for name, (language, word) in FILES.items():
        (block,) = [b for b in blocks(language) if word in b]
        (place / name).write_text(block, encoding="utf-8")
    return place


def environment(copy: Path) -> dict[str, str]:
    ours = ("BENCH_DATA", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "ARGS")  # what `make test` hands on
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(copy / "hub"),
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
    }


def test_the_readme_has_the_commands_that_it_should() -> None:
    found = commands()
    assert "make bench" in found and any(" -m " in c and "seed=0,1,2" in c for c in found) and len(found) >= 8


@pytest.mark.slow
@pytest.mark.readme
@pytest.mark.skipif(not (Path(sys.prefix) / ".installed").exists(), reason="make finds no environment of its own")
@pytest.mark.xdist_group("readme")
def test_every_command_runs(copy: Path) -> None:
    for command in commands():
        done = subprocess.run(
            command, shell=True, cwd=copy, env=environment(copy), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if "bench" in command and "--help" not in command and "plan" not in command:
            assert any(said in done.stdout + done.stderr for said in SAYS), f"{command}\n{done.stdout[-2000:]}"
    records = [json.loads(p.read_text()) for p in (copy / "results/runs/digits").glob("*/*/record.json")]
    swept = [
        (r["method"], r["seed"])
        for r in records
        if r["method"] in ("random", "graddot", "ekfac", "tracin") and r["config"]["evaluation"] == ["lds", "loo"]
    ]
    assert len(swept) == len(set(swept)) == 12
    assert not [p for p in copy.iterdir() if p.name in ("outputs", "multirun", "multirun.yaml")]


@pytest.mark.slow
def test_the_python_example_runs(copy: Path) -> None:
    (block,) = [b for b in blocks("python") if "bench.run import run" in b]
    block = block.replace('"evaluation=[lds]"', '"evaluation=[lds]", "task.n_train=100", "truth.lds.subsets=5"')
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=copy, env=environment(copy), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'ceiling'" in done.stdout


@pytest.mark.slow
def test_a_model_of_ones_own_from_python(copy: Path) -> None:
    (block,) = [b for b in blocks("python") if "methods.own" in b]
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=copy, env=environment(copy), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch.Size([10, 1000])" in done.stdout and "SelfInfluence" in done.stdout


def test_no_two_lines_promise_different_versions() -> None:
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
