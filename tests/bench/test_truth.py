"""python -m bench.truth: fills the store once, however often it is started, and looks after it."""

import errno
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from bench import config as configuration
from bench import records, run
from bench import truth as program
from bench.truth import main, prune, shards, stores, verify
from tasks.errors import UserError
from tasks.training import engines, retrain
from tasks.training.engines import Executor
from tasks.training.plan import planned, random_subsets
from tasks.training.store import Store

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "task=digits",
    "task.n_train=60",
    "task.n_val=10",
    "task.n_query=12",
    "model.recipe.epochs=1",
    "truth.lds.subsets=6",
    "truth.loo.sample=5",
    "evaluation=[lds,loo]",
]
ROWS = 12 + 6  # lds twice; loo and, to compare with, nothing left out


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; what the program sets comes back afterwards."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for variable in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(variable, "1")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("filled")
    assert main([*SETTINGS, f"out={out}"]) == 0
    return out


@pytest.fixture
def out(filled: Path, tmp_path: Path) -> Path:
    """A copy of a filled store."""
    return Path(shutil.copytree(filled, tmp_path / "out"))


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The program: its status, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main(list(arguments))
        return status, *capfd.readouterr()

    return call


def keys_of(out: Path) -> list[str]:
    return [
        key.tobytes().hex()
        for folder in stores(out)
        for path in folder.glob("*.safetensors")
        for key in load_file(path)["key"]
    ]


def only(found: list[Path]) -> Path:
    (path,) = found
    return path


def damage(out: Path) -> Path:
    """One bit of one file of rows."""
    path = sorted(only(stores(out)).glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return path


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


# --- filling ---------------------------------------------------------------------------------------------------------


def test_it_fills_what_the_evaluations_need(filled: Path) -> None:
    keys = keys_of(filled)
    assert len(keys) == len(set(keys)) == ROWS
    facts = [shard.facts for shard in shards(only(stores(filled)))]
    assert all(f["engine"] == "vectorised" and f["seconds"] > 0 and f["host"] for f in facts)


def test_a_second_call_makes_nothing(out: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "stacked", lambda *_: 1 / 0)
    before = files(out)
    status, told, aside = said(*SETTINGS, f"out={out}")
    assert status == 0 and files(out) == before
    folder = only(stores(out))
    assert told.splitlines() == [
        f"lds: 12 rows, 12 were there, engine vectorised, {folder}",
        f"loo: 6 rows, 6 were there, engine vectorised, {folder}",
    ]
    assert aside.splitlines()[-1].startswith("0 trainings in ")


def test_more_rows_are_added_to_those_that_are_there(out: Path, said: Any) -> None:
    before = set(keys_of(out))
    status, told, aside = said(*SETTINGS, "truth.loo.sample=7", f"out={out}")
    assert status == 0 and before < set(keys_of(out))
    assert "lds: 12 rows, 12 were there" in told and aside.splitlines()[-1].startswith("2 trainings in ")


def test_a_method_is_then_judged_without_a_retraining(out: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(keys_of(out))
    monkeypatch.setattr(engines, "stacked", lambda *_: 1 / 0)
    outcome = run.run(configuration.compose([*SETTINGS, "method=random", f"out={out}"]))
    assert outcome.status in ("ok", "unfit"), outcome.reason
    record = records.read(Path(str(outcome.folder)))
    for name, rows in (("lds", 12), ("loo", 6)):
        note = record["truths"][name]
        assert (note["engine"], note["trainings"], note["made"]) == ("vectorised", rows, 0)
    assert {name.partition("_")[0] for name in record["metrics"]} == {"lds", "loo"} and set(keys_of(out)) == before


def test_a_plan_trains_nothing(surroundings: Path, out: Path, said: Any) -> None:
    status, told, _ = said(*SETTINGS, "plan=true", "out=new")
    assert status == 0 and files(surroundings) == []
    assert "lds: 12 retrainings, 0 in the store, 12 to make by vectorised" in told
    before = files(out)
    status, told, _ = said(*SETTINGS, "plan=true", "truth.lds.subsets=8", f"out={out}")
    assert status == 0 and files(out) == before
    assert "lds: 16 retrainings, 12 in the store, 4 to make" in told and "loo: 6 retrainings, 6 in the store" in told


def test_a_sweep_fills_every_point_and_what_they_share_once(surroundings: Path, said: Any) -> None:
    """Two subset sizes under two seeds of the explained run: the common regime does not ask for the latter."""
    swept = ["truth.lds.fraction=0.4,0.6", "seed=0,1", "evaluation=[lds]", "out=new"]
    status, told, aside = said("-m", *SETTINGS, *swept)
    assert status == 0 and aside.splitlines()[-1].startswith("24 trainings in ")
    there = [line.split(", ")[1] for line in told.splitlines()]
    assert there == ["0 were there", "12 were there", "0 were there", "12 were there"]
    keys = keys_of(Path("new"))
    assert len(keys) == len(set(keys)) == 24


def test_what_needs_no_retraining_beforehand_says_so(surroundings: Path, said: Any) -> None:
    status, told, aside = said(*SETTINGS, "task.corruption.rate=0.1", "evaluation=[detection]", "out=new")
    assert (status, told) == (0, "") and aside.startswith("detection: nothing to train beforehand\n0 trainings in ")


def test_a_full_disk_and_an_interruption_are_one_line(out: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    more, before = [*SETTINGS, "truth.loo.sample=7", f"out={out}"], files(out)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        status, _, aside = said(*more)
    assert status == 2 and files(out) == before
    wanted = f"error: out={only(stores(out))} cannot be written (No space left on device); finished rows are kept"
    assert aside.splitlines()[-1] == wanted

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engines, "stacked", interrupted)
        status, _, aside = said(*more)
    assert status == 130 and aside.splitlines()[-1] == "interrupted; the same command resumes"
    assert files(out) == before
    assert said(*more)[2].splitlines()[-1].startswith("2 trainings in ")


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["task.n_trian=3"], "task.n_trian is no key; allowed: n_train, "),
        (["truth.lds.fraction=1.5"], "truth.lds.fraction=1.5 is not possible; allowed: 0 < fraction < 1"),
        (["truth.lds.subsets=1000000000000"], "truth.lds.subsets=1000000000000 is not possible; allowed: up to "),
        (["truth.lds.subsets=61", "truth.lds.fraction=0.01"], "truth.lds.subsets=61 is not possible; allowed: fewer: "),
        (["truth.lds.subsets=10**9"], "truth.lds.subsets=10**9 is not possible; allowed: an integer"),
        (["truth.loo.sample=61"], "truth.loo.sample=61 is not possible; allowed: 1 to 60"),
        (["executor=ray"], "executor.engine=ray is not installed; pip install 'attribution-bench[cluster]'"),
        (["executor=ray", "plan=true"], "executor.engine=ray is not installed; pip install"),
        (["executor.engine=slurm"], "executor.engine=slurm is not possible; allowed: auto, vectorised, processes, ray"),
        (["executor.engine=vectorised", "model.dropout=0.5"], "executor.engine=vectorised cannot batch models"),
        (["evaluation=[nonsense]"], "evaluation=nonsense is unknown; allowed: lds"),
        (["evaluation=[detection]"], "evaluation=[detection] cannot judge task=digits; "),
        (["study=epochs"], "study=epochs is a sweep; add -m"),
        (["seed=0,1"], "seed=0,1 is several values; add -m"),
        (["-m", "seed=0,x"], "seed=x is not possible"),
        (["--rerun"], "--rerun is no option here; allowed: -m, --help"),
        (["list"], "list is not understood; allowed: key=value, list, verify, prune"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    surroundings: Path, said: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], start: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    status, told, aside = said(*SETTINGS, *arguments, "out=new")
    assert (status, told, aside.count("\n")) == (2, "", 1), aside
    assert aside.startswith(f"error: {start}")
    assert files(surroundings) == []


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_looking_after_nothing_is_one_line(surroundings: Path, said: Any, command: str) -> None:
    for arguments, start in (
        ([], "out=results holds no finished trainings; python -m bench.truth task=... makes some"),
        (["out=empty"], "out=empty holds no finished trainings; "),
        (["out="], "out= is not understood; allowed: out=..."),
        (["task=digits"], "task=digits is not understood; allowed: out=..."),
        (["--all"], "--all is not understood; "),
    ):
        status, told, aside = said(command, *arguments)
        assert (status, told, aside.count("\n")) == (2, "", 1), aside
        assert aside.startswith(f"error: {start}")
    assert files(surroundings) == []


@pytest.mark.parametrize("arguments", [[], ["-h"], ["task=digits", "--help"]])
def test_help(surroundings: Path, said: Any, arguments: list[str]) -> None:
    assert said(*arguments) == (0, program.HELP + "\n", "") and files(surroundings) == []


@pytest.mark.slow
def test_the_jobs_of_an_array_share_the_work(tmp_path: Path) -> None:
    """Four processes over one folder: every row once, and all of them end well."""
    more = ["truth.lds.subsets=60", "truth.lds.repeats=1", "truth.loo.sample=null", "executor.workers=1"]
    command = [sys.executable, "-m", "bench.truth", *SETTINGS, *more, f"out={tmp_path / 'new'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    jobs = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) for _ in range(4)]
    ended = [job.communicate(timeout=200) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, ended
    keys = keys_of(tmp_path / "new")
    assert len(keys) == len(set(keys)) == 60 + 61
    assert verify(tmp_path / "new") == [] and prune(tmp_path / "new") == []


# --- looking after ---------------------------------------------------------------------------------------------------


def test_the_list_says_what_is_there(out: Path, said: Any) -> None:
    folder = only(stores(out))
    status, told, aside = said("list", f"out={out}")
    assert (status, aside) == (0, "")
    assert told.startswith(f"{folder.name}: 18 rows in ")
    for part in (" MiB, vectorised, ", " s a row, last 2", ", bundled data, 60 training examples\n"):
        assert part in told
    (folder / "task.json").unlink()
    damage(out)
    (folder.parent / "other-mlp-0123-v1").mkdir()
    first, second = said("list", f"out={out}")[1].splitlines()
    assert int(first.partition(": ")[2].partition(" rows")[0]) < 18 and "training examples" not in first
    assert second.startswith("other-mlp-0123-v1: 0 rows in 0 files, 0.0 MiB, unknown engine, 0 s a row, last never")


def test_a_damaged_file_is_found_pruned_and_made_again(out: Path, said: Any) -> None:
    before = sorted(keys_of(out))
    assert said("verify", f"out={out}") == (0, "0 of 2 files damaged\n", "")
    path = damage(out)
    told = f"damaged: {path}\n1 of 2 files damaged; the next run makes their rows again\n"
    assert said("verify", f"out={out}") == (1, told, "") and path.exists()
    assert said("prune", f"out={out}") == (0, f"removed: {path}\n1 removed\n", "")
    assert said("verify", f"out={out}")[0] == 0 and said("prune", f"out={out}") == (0, "0 removed\n", "")
    lost = len(before) - len(keys_of(out))
    assert lost > 0
    assert said(*SETTINGS, f"out={out}")[2].splitlines()[-1].startswith(f"{lost} trainings in ")
    assert sorted(keys_of(out)) == before


def remains(folder: Path) -> list[Path]:
    """What dead launches leave: half-written files, a lock that nobody holds, its claims."""
    names = [".a1.part", "b2.damaged", "builders/c3.lock", "builders/c3.claims", "builders/c3.part", "builders/c3.json"]
    names += ["builders/d4.lock", "builders/e5.part"]
    for name in names:
        (folder / name).write_text("0" * 64)
    return [folder / name for name in names]


def test_pruning_removes_what_no_launch_can_use_and_nothing_else(out: Path, said: Any) -> None:
    folder = only(stores(out))
    before, keys = files(out), sorted(keys_of(out))
    useless = remains(folder)
    old = folder.parent / f"{folder.name[:-1]}0"
    shutil.copytree(folder, old)
    status, told, aside = said("prune", f"out={out}")
    gone = {line.removeprefix("removed: ") for line in told.splitlines()[:-1]}
    assert {str(path) for path in (*useless, old)} <= gone and (status, aside) == (0, "")
    assert files(out) == before and sorted(keys_of(out)) == keys


def test_pruning_keeps_what_is_not_the_stores(out: Path) -> None:
    """A copy that somebody has put aside is no earlier version."""
    folder = only(stores(out))
    shutil.copytree(folder, folder.parent / f"{folder.name}-copy")
    (folder.parent / "notes").mkdir()
    (folder.parent / "README").write_text("mine")
    before = files(out)
    assert prune(out) == [] and files(out) == before


def test_pruning_leaves_a_living_builder_alone(out: Path) -> None:
    """Nor what looks like remains and may be what it is just writing; dead builders beside it are gone."""
    folder = only(stores(out))
    old = Path(shutil.copytree(folder, folder.parent / f"{folder.name[:-1]}0"))
    wanted = [f"{row:064x}" for row in range(3)]
    with Store(folder).builder() as one, Store(old).builder() as two:
        assert one.claim(wanted, 2) == wanted[:2] and two.claim(wanted, 1) == wanted[:1]
        useless = remains(folder)
        dead = {path for path in useless if path.name.startswith(("c3.", "d4."))}
        damaged = sorted(folder.glob("*.safetensors"))[0]
        damaged.write_bytes(damaged.read_bytes()[:-1])
        assert set(prune(out)) == dead
        assert all(path.exists() for path in {*useless, old, damaged} - dead)
        with Store(folder).builder() as other, pytest.warns(UserWarning, match="damaged"):
            assert other.claim(wanted, 3) == wanted[2:], "its claims hold"
    assert {old, damaged.with_suffix(".damaged")} | (set(useless) - dead) <= set(prune(out))
    assert verify(out) == [] and not old.exists()


def test_rows_of_another_version_are_not_used_and_go(out: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = only(stores(out))
    monkeypatch.setattr(retrain, "VERSION", 2)
    assert said(*SETTINGS, f"out={out}")[2].splitlines()[-1].startswith(f"{ROWS} trainings in ")
    assert len(stores(out)) == 2
    assert prune(out) == [before]
    assert only(stores(out)).name == f"{before.name[:-1]}2" and len(keys_of(out)) == ROWS


def test_pruning_what_may_not_be_changed_is_one_line(out: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(out)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert said("prune", f"out={out}") == (2, "", f"error: out={out} cannot be changed (Read-only file system)\n")


# --- shipped truth ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(out: Path) -> Iterator[Path]:
    """Rows that a checkout brings along, which nobody may write to."""
    root = out / "cache" / "truth"
    builders = only(stores(out)) / "builders"
    shutil.rmtree(builders)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    yield root
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert not builders.exists()


def task_of_settings() -> Any:
    return run.build_task(configuration.compose(SETTINGS))


PLAN = planned(random_subsets(60, 6, 0.5, 0), 2, "common", 0, 0)
ONE = Executor("vectorised", 1)


def test_shipped_rows_are_used(shipped: Path, tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task, own = task_of_settings(), tmp_path / "own" / "cache" / "truth"
    there = retrain.retrain(task, PLAN, shipped, ONE)
    with monkeypatch.context() as patch:
        patch.setattr(engines, "stacked", lambda *_: 1 / 0)
        found = retrain.retrain(task, PLAN, own, ONE, shipped=shipped)
        assert all(np.array_equal(found[name], there[name]) for name in found) and not own.exists()
        patch.setattr(run, "shipped_truth", lambda: shipped)
        status, told, _ = said(*SETTINGS, f"out={tmp_path / 'own'}")
        assert status == 0 and "lds: 12 rows, 12 were there" in told and not own.exists()
        assert "12 in the store, 0 to make" in said(*SETTINGS, "plan=true", f"out={tmp_path / 'own'}")[1]
    monkeypatch.setattr(run, "shipped_truth", lambda: shipped)
    assert said(*SETTINGS, "truth.loo.sample=7", f"out={tmp_path / 'own'}")[0] == 0
    assert len(keys_of(tmp_path / "own")) == 2, "only what is not shipped"


def test_shipped_rows_that_are_damaged_are_told_and_made_in_the_own_folder(out: Path, tmp_path: Path) -> None:
    task, root, own = task_of_settings(), out / "cache" / "truth", tmp_path / "own" / "cache" / "truth"
    good = retrain.retrain(task, PLAN, root, ONE)
    path = damage(out)
    lost = set(PLAN.keys()) - {k for p in path.parent.glob("*.safetensors") if p != path for k in keys_in(p)}
    before = files(out)
    with pytest.warns(UserWarning, match=f"{path} is damaged: its rows are made again"):
        found = retrain.retrain(task, PLAN, own, ONE, shipped=root)
    assert files(out) == before, "what is shipped is not set aside either"
    assert set(keys_of(tmp_path / "own")) == lost
    for name in ("val", "query"):
        np.testing.assert_allclose(found[name], good[name], rtol=0, atol=1e-12)


def keys_in(path: Path) -> list[str]:
    return [key.tobytes().hex() for key in load_file(path)["key"]]


def test_a_damaged_shipped_file_does_not_hide_its_intact_twin(out: Path, tmp_path: Path) -> None:
    """Shipped files are copies of somebody's own, of the same names."""
    own = Path(shutil.copytree(out / "cache" / "truth", tmp_path / "own"))
    path = damage(out)
    store = Store(own / path.parent.name, path.parent)
    with pytest.warns(UserWarning, match="is damaged"):
        assert len(store.read()) == ROWS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(store.read()) == ROWS, "told once"


def test_shipped_rows_need_no_folder_of_ones_own(shipped: Path, tmp_path: Path) -> None:
    assert len(retrain.store_of(task_of_settings(), tmp_path / "none", shipped).read()) == ROWS
    assert retrain.store_of(task_of_settings(), tmp_path / "none", tmp_path / "nothing").read() == {}
    with pytest.raises(UserError, match="cannot be written"):
        (tmp_path / "file").write_text("in the way")
        retrain.store_of(task_of_settings(), tmp_path / "file", shipped).add(["00" * 32], {"val": np.zeros((1, 1))})
