"""The command line: exit status, one line an error, nothing left behind. A stand-in plays bench.run."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

import bench
from bench.__main__ import main
from bench.config import choices, describe
from bench.help import groups, help_text

ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, "-m", "bench"]

YAMLS = {
    "method/toy.yaml": "# A toy\n_target_: toys_of_cli.Method\nk: 1\n",
    "task/toy.yaml": """
        # @package _global_
        # A toy
        defaults:
          - override /model: toy
        task:
          _target_: toys_of_cli.task
          n: 3
        evaluation: [lds]
        """,
    "model/toy.yaml": "# A toy\n_target_: toys_of_cli.Model\n",
    "study/toy.yaml": """
        # @package _global_
        # A toy
        evaluation: [loo]
        hydra:
          sweeper:
            params:
              method.k: 1,2
              seed: 3,4
        """,
}
MODULE = """
class Model: ...
class Method:
    def __init__(self, k: int, extra: int = 0): ...
def task(model, n: int): ...
"""
# Imported by every Python process that has this folder on its path, the workers of joblib among them.
STAND_IN = """
import dataclasses, os, sys, time, types, warnings

@dataclasses.dataclass(frozen=True)
class Outcome:
    status: str
    folder: str | None
    reason: str | None
    task: str
    found: bool

def run(config):
    print("running", config.seed, "in", os.getpid(), flush=True)
    if config.seed == 1:
        raise RuntimeError("it broke\\nin two lines")
    if config.seed == 5:
        ours = os.environ["PYTHONPATH"].split(os.pathsep)[0]
        warnings.warn_explicit("far\\n  off", UserWarning, os.path.join(ours, "methods", "curvature", "cg.py"), 3)
        warnings.warn_explicit("of others", UserWarning, os.path.join("elsewhere", "methods", "theirs.py"), 3)
        warnings.warn_explicit("of Python", DeprecationWarning, os.path.join(ours, "bench", "run.py"), 3)
    if config.seed == 7:
        os._exit(7)
    if config.seed == 60:
        time.sleep(60)
    return Outcome("ok", None, None, config.choice.task, False)

def report(out, outcomes):
    return "report " + " ".join(o.status for o in outcomes)

module = types.ModuleType("bench.run")
module.Outcome, module.run, module.report = Outcome, run, report
Outcome.__module__ = "bench.run"
sys.modules["bench.run"] = module
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: str
    folder: str | None
    reason: str | None
    task: str
    found: bool


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    """A user's own folder: YAMLs, the module they name, and the stand-in for processes."""
    folder = tmp_path / "toys of a user"
    for name, text in YAMLS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    (folder / "toys_of_cli.py").write_text(MODULE)
    (folder / "sitecustomize.py").write_text(STAND_IN)
    return folder


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; sys.path and the environment come back afterwards."""
    folder = tmp_path / "work dir"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for variable in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    return folder


@pytest.fixture
def bench_run(monkeypatch: pytest.MonkeyPatch, toys: Path) -> types.ModuleType:
    """`bench.run` as a stand-in; tests replace what its `run` does."""

    def run(config: DictConfig) -> Outcome:
        return Outcome("ok", None, None, config.choice.task, False)

    def report(out: Path, outcomes: list[Outcome]) -> str:
        return f"report of {out}: " + " ".join(f"{o.task}:{o.status}" for o in outcomes)

    module = types.ModuleType("bench.run")
    module.__dict__.update(Outcome=Outcome, run=run, report=report)
    monkeypatch.setitem(sys.modules, "bench.run", module)
    monkeypatch.setattr(bench, "run", module, raising=False)
    monkeypatch.syspath_prepend(str(toys))
    monkeypatch.delitem(sys.modules, "toys_of_cli", raising=False)
    return module


@pytest.fixture
def run_toy(cwd: Path, toys: Path, bench_run: types.ModuleType) -> Callable[..., int]:
    """The program on the toy method and task."""
    return lambda *arguments: main(["--config-dir", str(toys), "method=toy", "task=toy", *arguments])


def process(cwd: Path, *arguments: str, path: Path | None = None, program: list[str] = CLI) -> tuple[int, str, str]:
    """Status, stdout and stderr of the program in a process of its own."""
    done = subprocess.run([*program, *arguments], cwd=cwd, env=environment(path), capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def environment(path: Path | None = None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in (ROOT, path) if p)}


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["method=foo"], "error: method=foo is unknown; allowed: "),
        (["task=digits", "task.n_trian=3"], "error: task.n_trian is no key; allowed: n_train"),
        (["task=digits", "seed=abc"], "error: seed=abc is not possible; allowed: an integer"),
        (["task=digits", "seed=[1"], "error: seed=[1 cannot be read"),
        (["digits"], "error: digits is no key=value"),
        (["task=digits", "+new=1"], "error: new is no key; allowed: "),
        (["task=digits", "seed=1,2"], "error: seed=1,2 is several values; add -m"),
        (["task=digits", "method=custom"], "error: method._target_ is missing"),
        (["task=digits", "method=custom", "method._target_=no.Such"], "error: method._target_=no.Such cannot be imp"),
        (["--no-such-flag"], "error: command line - unrecognized arguments: --no-such-flag"),
        (
            ["task=digits", "method.compression=logra"],
            "error: method.compression=logra is not possible: it is a choice",
        ),
        (["task=digits", "method.damping=0.1"], "error: method.damping=0.1 is not possible: it holds keys; write"),
        (
            ["task=digits", "method.damping.value=inf"],
            "error: method.damping.value=inf is not possible; allowed: a fin",
        ),
        (
            ["-m", "task=digits", "model.recipe.lr=0.1,inf"],
            "error: model.recipe.lr=inf is not possible; allowed: a fini",
        ),
        (["--config-name", "other"], "error: --config-name is not possible"),
        (["--config-dir", "nowhere"], "error: --config-dir=nowhere is no folder"),
        (["-m", "task=digits", "method=ekfac,foo"], "error: method=foo is unknown; allowed: "),
        (["task=digits", "-m", "seed=0,x"], "error: seed=x is not possible"),
        (["--cfg", "job", "task=digits", "seed=x"], "error: seed=x is not possible"),
        (["--cfg", "jobs"], "error: command line - argument --cfg"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    cwd: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], start: str
) -> None:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(start)
    assert files(cwd) == []


def test_the_same_in_a_process_of_its_own(cwd: Path) -> None:
    status, out, err = process(cwd, "task=digits", "task.n_trian=3")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: task.n_trian is no key")
    assert files(cwd) == []


def test_signatures_are_judged_before_the_run(
    run_toy: Callable[..., int], cwd: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_toy("+method.extr=1") == 2
    assert capfd.readouterr().err == "error: method.extr is no key; allowed: k, extra; did you mean extra?\n"
    assert run_toy("-m", "seed=0,1", "method.k=1,x") == 2
    assert capfd.readouterr().err == "error: method.k=x is not possible; allowed: an integer\n"
    assert files(cwd) == []


def test_help_lists_every_yaml() -> None:
    lines = help_text().splitlines()
    for group in groups():
        for option in choices(group):
            start = " ".join(describe(group, option).split()[:4])
            assert any(line.split()[:1] == [option] and start in line for line in lines), option
    assert all(len(line) <= 120 for line in lines)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_quick_and_writes_nothing(cwd: Path, flag: str) -> None:
    before = cpu_seconds()
    status, out, err = process(cwd, flag)
    assert cpu_seconds() - before < 2  # of the processor: what a busy machine adds is not its debt
    assert (status, err) == (0, "")
    assert "usage: bench" in out and "digits" in out
    assert files(cwd) == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bench ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cfg", "job", "task=digits", "seed=5"], "seed: 5"),
        (["--cfg", "hydra", "task=digits"], "hydra:"),
        (["--info", "searchpath", "task=digits"], "Config search path"),
        (["--hydra-help"], "Hydra"),
    ],
)
def test_displays_of_hydra(cwd: Path, arguments: list[str], said: str) -> None:
    status, out, err = process(cwd, *arguments)
    assert (status, err) == (0, "")
    assert said in out
    assert files(cwd) == []


def test_a_run_prints_its_report(run_toy: Callable[..., int], cwd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_toy("out=there") == 0
    assert capfd.readouterr() == ("report of there: toy:ok\n", "")
    assert files(cwd) == []


def test_the_job_sees_the_config(
    run_toy: Callable[..., int], bench_run: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[DictConfig] = []
    monkeypatch.setattr(bench_run, "run", lambda config: seen.append(config) or Outcome("ok", None, None, "toy", False))
    assert run_toy("seed=4", "method=custom", "method._target_=toys_of_cli.Method", "method.k=3") == 0
    assert seen[0].method == {"_target_": "toys_of_cli.Method", "k": 3}
    assert (seen[0].seed, seen[0].choice.method, seen[0].choice.task, seen[0].choice.model) == (
        4,
        "custom",
        "toy",
        "toy",
    )
    assert (os.environ["OMP_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"]) == ("1", "false")


@pytest.mark.parametrize(
    ("status", "code"), [("ok", 0), ("unfit", 0), ("unsupported", 0), ("diverged", 0), ("failed", 1)]
)
def test_exit_status_of_a_run(
    run_toy: Callable[..., int],
    bench_run: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    status: str,
    code: int,
) -> None:
    monkeypatch.setattr(bench_run, "run", lambda config: Outcome(status, None, "a reason", "toy", False))
    assert run_toy() == code
    assert capfd.readouterr().err == ("failed: a reason\n" if code else "")


def test_a_user_error_within_a_run(
    run_toy: Callable[..., int],
    bench_run: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from tasks.errors import UserError

    def run(config: DictConfig) -> Outcome:
        raise UserError("task.n", config.task.n, "is too small", allowed="10 or more")

    monkeypatch.setattr(bench_run, "run", run)
    assert run_toy() == 2
    assert capfd.readouterr().err == "error: task.n=3 is too small; allowed: 10 or more\n"


def test_a_defect_within_a_run_keeps_its_traceback(
    run_toy: Callable[..., int], bench_run: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "run", lambda config: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run_toy()


def test_an_interrupted_run(
    run_toy: Callable[..., int],
    bench_run: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    cwd: Path,
) -> None:
    def run(config: DictConfig) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_run, "run", run)
    for flags in ([], ["-m"]):
        assert run_toy(*flags) == 130
        assert capfd.readouterr().err.splitlines()[-1] == "interrupted; the same command resumes"
    assert files(cwd) == []


def test_a_sweep_goes_on_after_a_failure(
    run_toy: Callable[..., int],
    bench_run: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    cwd: Path,
) -> None:
    from tasks.errors import UserError

    def run(config: DictConfig) -> Outcome:
        if config.seed == 1:
            raise RuntimeError("it broke\nin two lines")
        if config.seed == 2:
            raise UserError("seed", 2, "is unlucky")
        return Outcome("failed" if config.seed == 3 else "ok", None, "as said", "toy", False)

    monkeypatch.setattr(bench_run, "run", run)
    assert run_toy("-m", "seed=0,1,2,3,4") == 1
    out, err = capfd.readouterr()
    assert out == "report of results: toy:ok toy:failed toy:failed toy:failed toy:ok\n"
    assert err.splitlines() == [
        "sweep of 5 runs",
        *(f"run {k + 1}: seed={k}" for k in range(5)),
        "failed: seed=1: RuntimeError: it broke",
        "failed: seed=2: seed=2 is unlucky",
        "failed: seed=3: as said",
    ]
    assert files(cwd) == []


def test_a_sweep_without_failures(run_toy: Callable[..., int], cwd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_toy("seed=0,1", "-m", "method.k=range(2)", "out=\"a 'b'\"") == 0
    out, err = capfd.readouterr()
    assert out == "report of a 'b': toy:ok toy:ok toy:ok toy:ok\n"
    assert err.splitlines()[1:] == [f"run {2 * s + k + 1}: seed={s} method.k={k}" for s in (0, 1) for k in (0, 1)]
    assert files(cwd) == []


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["seed=1"], ["method=toy task=toy seed=1"]),
        (["seed=1", "method.k=1,2"], ["method.k=1", "method.k=2"]),
        (
            ["seed=1", "method=custom", "method._target_=toys_of_cli.Method", "method.k=1,2"],
            ["method.k=1", "method.k=2"],
        ),
        (["study=toy", "seed=9"], ["method.k=1", "method.k=2"]),
        (["model=toy,mlp", "seed=1,2"], [f"model={m} seed={s}" for m in ("toy", "mlp") for s in (1, 2)]),
    ],
)
def test_a_run_of_a_sweep_is_named_by_what_is_swept(
    run_toy: Callable[..., int],
    bench_run: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    names: list[str],
) -> None:
    monkeypatch.setattr(bench_run, "run", lambda config: Outcome("failed", None, "as said", "toy", False))
    assert run_toy("-m", *arguments) == 1
    assert capfd.readouterr().err.splitlines() == [
        *([f"sweep of {len(names)} runs"] if len(names) > 1 else []),
        *(f"run {k}: {name}" for k, name in enumerate(names, 1)),
        *(f"failed: {name}: as said" for name in names),
    ]


@pytest.mark.parametrize("sweep", [[], ["-m"], ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]])
def test_a_warning_of_ours_is_one_line(cwd: Path, toys: Path, sweep: list[str]) -> None:
    arguments = ["--config-dir", str(toys), "method=toy", "task=toy", "seed=5", *sweep]
    status, _, err = process(cwd, *arguments, path=toys)
    said = [line for line in err.splitlines() if not line.startswith("run 1: ")]
    assert status == 0
    assert said[0] == "warning: far off"
    assert said[1].endswith("theirs.py:3: UserWarning: of others"), "others' warnings say where they come from"
    assert len(said) == 2


@pytest.mark.parametrize(
    ("arguments", "jobs"),
    [
        (["study=toy", "seed=9"], [(1, 9), (2, 9)]),
        (["method.k=6,5", "study=toy"], [(6, 3), (6, 4), (5, 3), (5, 4)]),
    ],
)
def test_a_study_is_a_sweep_in_which_the_users_values_hold(
    run_toy: Callable[..., int],
    bench_run: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    cwd: Path,
    arguments: list[str],
    jobs: list[tuple[int, int]],
) -> None:
    seen: list[DictConfig] = []
    monkeypatch.setattr(bench_run, "run", lambda config: seen.append(config) or Outcome("ok", None, None, "toy", False))
    assert run_toy("-m", *arguments) == 0
    assert [(config.method.k, config.seed) for config in seen] == jobs
    assert all(config.choice.study == "toy" and list(config.evaluation) == ["loo"] for config in seen)
    assert files(cwd) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["study=toy"], "error: study=toy is a sweep; add -m\n"),
        (["-m", "study=toy,regime"], "error: study=toy,regime is several sweeps; one at a time\n"),
        (["-m", "study=tay"], "error: study=tay is unknown; allowed: "),
        (["-m", "study=toy", "method.k=x,y"], "error: method.k=x is not possible; allowed: an integer"),
    ],
)
def test_a_mistaken_study_is_one_line(
    run_toy: Callable[..., int], cwd: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run_toy(*arguments) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith(said)
    assert files(cwd) == []


def test_a_sweep_writes_to_one_place(run_toy: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_toy("-m", "out=a,b") == 2
    assert capfd.readouterr().err == "error: out cannot be swept; a sweep writes to one place\n"


def test_joblib_workers_report_through_files(cwd: Path, toys: Path) -> None:
    arguments = ["--config-dir", str(toys), "method=toy", "task=toy", "-m", "hydra/launcher=joblib", "seed=0,1,2"]
    status, out, err = process(cwd, *arguments, "hydra.launcher.n_jobs=2", path=toys)
    assert status == 1
    assert "report ok failed ok" in out
    ours = [
        line for line in err.splitlines() if "joblib" not in line and "warnings.warn" not in line
    ]  # on a busy machine
    assert sorted(ours) == [
        "failed: seed=1: RuntimeError: it broke",
        *(f"run {k + 1}: seed={k}" for k in range(3)),
        "sweep of 3 runs",
    ]
    assert files(cwd) == []


def test_a_lost_worker_is_a_failure(cwd: Path, toys: Path) -> None:
    arguments = ["--config-dir", str(toys), "method=toy", "task=toy", "-m", "hydra/launcher=joblib", "seed=7"]
    status, out, err = process(cwd, *arguments, "hydra.launcher.n_jobs=2", path=toys)
    assert status == 1
    assert "report failed" in out
    assert err.startswith("run 1: method=toy task=toy seed=7\nfailed: method=toy task=toy seed=7: no outcome")
    assert "no outcome: TerminatedWorkerError" in err and err.count("\n") == 2


@pytest.mark.parametrize("sweep", [[], ["-m"], ["-m", "hydra/launcher=joblib"]])
def test_ctrl_c(cwd: Path, toys: Path, sweep: list[str]) -> None:
    arguments = ["--config-dir", str(toys), "method=toy", "task=toy", "seed=60", *sweep]
    with subprocess.Popen(
        [*CLI, *arguments],
        cwd=cwd,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
        env=environment(toys),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout and running.stderr
        assert running.stdout.readline().startswith("running 60")
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        assert running.wait(20) == 130
        assert running.stderr.read().splitlines()[-1] == "interrupted; the same command resumes"
    assert files(cwd) == []


def test_a_class_in_the_working_directory_is_found(cwd: Path, toys: Path) -> None:
    (cwd / "my_own.py").write_text("class Mine:\n    def __init__(self, k: int): ...\n")
    arguments = ["--config-dir", str(toys), "task=toy", "method=custom", "method._target_=my_own.Mine", "method.k=2"]
    program = [
        sys.executable,
        "-c",
        "import sys; from bench.__main__ import main; sys.path.remove(''); sys.exit(main())",
    ]
    status, out, err = process(cwd, *arguments, path=toys, program=program)
    assert (status, err) == (0, "")
    assert "report ok" in out
