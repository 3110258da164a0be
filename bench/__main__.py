"""The program: `python -m bench method=ekfac task=sst2`, or `-m` for a sweep.

Everything is validated before anything heavy is imported, run or written; then Hydra runs the jobs.
Exit status: 0 done, 1 a run failed, 2 a mistake in the command (one line says which), 130 interrupted.
"""

import argparse
import dataclasses
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bench.run import Outcome

HOME = Path(__file__).resolve().parent.parent
PACKAGES = ("bench", "methods", "tasks")
FIXED = "hydra.job.config.override_dirname.exclude_keys"  # Hydra's own list of keys that do not tell jobs apart
RAW = warnings.formatwarning  # Python's own: path, line and source


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    prepare()
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130


def prepare() -> None:
    """The process's surroundings, set before torch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # parallel work is done by processes
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own package, as with python -m
    warnings.formatwarning = _one_line_warning


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What this project warns of is meant for users; others' warnings stay as they are."""
    place = Path(filename).resolve()
    if category is not UserWarning or not any(place.is_relative_to(HOME / package) for package in PACKAGES):
        return RAW(message, category, filename, lineno, line)
    start = "\r\033[K" if sys.stderr.isatty() else ""  # over a phase that is being announced
    return f"{start}warning: {' '.join(str(message).split())}\n"


def _dispatch(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        from bench.help import help_text

        print(help_text())
        return 0
    if "--version" in argv:
        from bench.help import version_text

        print(version_text())
        return 0
    options = _options(argv)
    overrides = list(options.overrides)
    if options.config_dir is not None:
        if not Path(options.config_dir).is_dir():
            raise UserError("--config-dir", options.config_dir, "is no folder")
        overrides.append(f"hydra.searchpath=[{_quoted(f'file://{Path(options.config_dir).absolute()}')}]")
    if options.hydra_help or options.shell_completion or options.cfg or options.info:
        return _show(options, argv, overrides)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if options.multirun:
            raise UserError("-m", None, "goes with one process", hint="start torchrun once for each run")
        return shared(overrides)
    return sweep(overrides) if options.multirun else single(overrides)


def shared(overrides: Sequence[str]) -> int:
    """One run by all processes of torchrun; the first one reports it and writes the record."""
    from methods.gradients.sharding import first, joined

    with joined():
        if first():
            return single(overrides)
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            return single(overrides)


def single(overrides: Sequence[str]) -> int:
    """One run, its report."""
    from bench import config

    composed = config.compose(overrides)
    if composed.choice.study is not None:
        raise UserError("study", composed.choice.study, "is a sweep", hint="add -m")
    config.check(composed)
    outcomes: list[Outcome] = []
    errors: list[Exception] = []

    def job(job_config: "DictConfig") -> None:
        try:
            outcomes.append(_run(job_config))
        except Exception as error:  # raised again below, without Hydra's frames and hints
            errors.append(error)

    _launch(job, config.open_custom(overrides))
    if errors:
        raise errors[0]
    _report(composed.out, outcomes)
    if outcomes[0].status == "failed":
        print(f"failed: {outcomes[0].reason}", file=sys.stderr)
        return 1
    return 0


def sweep(overrides: Sequence[str]) -> int:
    """Every combination of the values given. A job that fails does not stop the others.

    Each job leaves its outcome in a folder as `<number>.json`, so that it does not matter which launcher runs it where.
    """
    from bench import config

    points = config.expand(overrides)
    composed = config.compose_all(points)
    for one in composed:
        config.check(one)
    out = composed[0].out
    if any(one.out != out for one in composed):
        raise UserError("out", None, "cannot be swept", hint="a sweep writes to one place")
    fixed = _fixed(points)
    if len(points) > 1:
        print(f"sweep of {len(points)} runs", file=sys.stderr)
    folder = Path(out).absolute() / "sweeps" / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    launch_error = "its process ended early"
    reported: dict[int, dict[str, Any]] = {}
    to_hydra = [f"hydra.sweep.dir={_quoted(str(folder))}", f"{FIXED}=[{','.join(map(_quoted, fixed))}]"]
    try:
        _launch(job_of_sweep, [*config.open_custom(overrides), *to_hydra], "--multirun")
    except Exception as error:  # a launcher that lost a worker: what was done is on disk
        launch_error = config.one_line(error).partition(". ")[0]
    except KeyboardInterrupt:
        _remove(folder)
        raise
    for number in range(len(points)):
        with suppress(FileNotFoundError):
            reported[number] = json.loads((folder / f"{number}.json").read_text(encoding="utf-8"))
    if len(reported) == len(points):
        _remove(folder)
    names = [_name(point, fixed) for point in points]
    return _conclude(out, names, composed, reported, f"no outcome: {launch_error}; see {folder}")


def job_of_sweep(job_config: "DictConfig") -> None:
    """One job of a sweep, in this process or another: its outcome, a failure included, goes to its file."""
    from hydra.core.hydra_config import HydraConfig

    from bench.config import one_line

    settings = HydraConfig.get()
    prepare()  # this process may be another one
    fixed = settings.job.config.override_dirname.exclude_keys
    print(f"run {settings.job.num + 1}: {_name(settings.overrides.task, fixed)}", file=sys.stderr, flush=True)
    try:
        outcome = dataclasses.asdict(_run(job_config))
    except (Exception, SystemExit) as error:
        task = str(settings.runtime.choices["task"])
        outcome = {"status": "failed", "folder": None, "reason": one_line(error), "task": task, "found": False}
    target = Path(settings.sweep.dir) / f"{settings.job.num}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".part")
    aside.write_text(json.dumps(outcome, default=str), encoding="utf-8")
    aside.replace(target)


def _fixed(points: Sequence[Sequence[str]]) -> list[str]:
    """The keys that have one value in all points of a sweep; none where nothing varies."""
    varying = {_key(overrides[0]) for overrides in zip(*points, strict=True) if len(set(overrides)) > 1}
    return sorted({_key(override) for override in points[0]} - varying) if varying else []


def _name(point: Sequence[str], fixed: Sequence[str]) -> str:
    """One run of a sweep, by what the others have otherwise."""
    return " ".join(o.lstrip("+") for o in point if not o.startswith("hydra") and _key(o) not in fixed)


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _conclude(
    out: str,
    names: list[str],
    composed: "list[DictConfig]",
    reported: dict[int, dict[str, Any]],
    lost: str,
) -> int:
    from bench.run import Outcome

    outcomes = [
        Outcome(**reported[number])
        if number in reported
        else Outcome(status="failed", folder=None, reason=lost, task=str(one.choice.task), found=False)
        for number, one in enumerate(composed)
    ]
    _report(out, outcomes)
    failed = [(name, outcome) for name, outcome in zip(names, outcomes, strict=True) if outcome.status == "failed"]
    for name, outcome in failed:
        print(f"failed: {name}: {outcome.reason}", file=sys.stderr)
    return 1 if failed else 0


def _run(job_config: "DictConfig") -> "Outcome":
    from hydra.core.hydra_config import HydraConfig

    from bench import config, run

    return run.run(config.add_choice(job_config, HydraConfig.get().runtime.choices))


def _report(out: str, outcomes: "list[Outcome]") -> None:
    from bench import run

    print(run.report(Path(out), outcomes))


def _launch(job: "Callable[[DictConfig], None]", arguments: Sequence[str], *flags: str) -> None:
    """Hydra's own program on our folder of YAMLs; its errors come as exceptions, without its hints."""
    import hydra

    from bench.config import conf_dir

    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *flags, *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    finally:
        sys.argv = argv
        del os.environ["HYDRA_FULL_ERROR"]
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _show(options: argparse.Namespace, argv: list[str], overrides: list[str]) -> int:
    """Hydra's own displays (--cfg, --info, --hydra-help, --shell-completion): nothing runs."""
    from hydra.errors import HydraException

    from bench import config

    if (options.cfg or options.info) and not options.multirun:
        config.compose(overrides)
    try:
        _launch(job_of_sweep, config.open_custom(argv))
    except HydraException as error:
        raise UserError("hydra", None, f"- {config.one_line(error)}") from None
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    """Hydra's command line; flags and key=value may stand in any order."""
    from hydra._internal.utils import get_args_parser

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            options = get_args_parser().parse_intermixed_args(argv)
    except SystemExit:
        raise UserError("command line", None, f"- {said.getvalue().strip().rpartition('error: ')[2]}") from None
    for flag in ("config_name", "config_path", "experimental_rerun"):
        if getattr(options, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')}", None, "is not possible", hint="--config-dir adds YAMLs")
    return options


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for parent in (folder.parent, folder.parent.parent):
        with suppress(OSError):
            parent.rmdir()  # only where it is empty


if __name__ == "__main__":
    from bench.__main__ import main as importable  # worker processes import the job by name

    sys.exit(importable())
