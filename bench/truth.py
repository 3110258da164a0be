"""Fills the store of finished trainings, and looks after it.

python -m bench.truth task=digits evaluation=[lds,loo] ...   trains what these truths need
python -m bench.truth list|verify|prune [out=results]

Any number of launches, on any machines that see `out`, share one truth: each claims rows, finishes them and leaves them
durable. A launch that dies loses the rows in flight, which another takes over.
"""

import json
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """Fills the store of finished trainings, and looks after it.

    python -m bench.truth task=digits evaluation=[lds,loo] [truth.lds.subsets=100 ...] [-m for a sweep]
    python -m bench.truth list   [out=results]   what the store holds
    python -m bench.truth verify [out=results]   every file against its checksum; exit status 1 if one is damaged
    python -m bench.truth prune  [out=results]   removes what is of no use: damaged files, remains of dead launches,
                                                 rows of earlier versions of the trainer

The first form takes the keys of python -m bench; the method is not asked for. Start it as often and on as many machines
as you like: launches that see the same out= share the work, row by row."""


# --- filling ---------------------------------------------------------------------------------------------------------


def fill(config: "DictConfig") -> dict[str, int]:
    """Trains what the config's evaluations need before any method has spoken; how many rows came, by evaluation."""
    import torch

    from bench import run
    from bench.console import Console
    from tasks.training.retrain import retrain, store_of

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    task = run.build_task(config)
    evaluations, executor = run.build_evaluations(config, task), run.build(config.executor)
    root, console = Path(config.out) / "cache" / "truth", Console()
    if config.plan:
        from bench.plan import planned_work

        print(planned_work(task, evaluations, config.seed, root.parent, executor, run.shipped_truth()))
        return {}
    executor.engine_for(task)  # refused before anything is written
    run.check_writable(Path(config.out))
    made: dict[str, int] = {}
    for name, evaluation in evaluations.items():
        plan = evaluation.plan(task, config.seed)
        if plan is None:
            print(f"{name}: nothing to train beforehand", file=sys.stderr)
            continue
        before: list[int] = []

        def tell(done: int, of: int, name: str = name, before: list[int] = before) -> None:
            before.append(done)
            console.progress(name, done, of)

        with console.phase("evaluation", name):
            retrain(task, plan, root, executor, tell, run.shipped_truth())
        made[name] = len(set(plan.keys())) - before[0]
        where = store_of(task, root).folder
        print(f"{name}: {len(plan)} rows, {before[0]} were there, engine {executor.engine_for(task)}, {where}")
    return made


# --- looking after ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One file of finished rows."""

    path: Path
    intact: bool
    rows: int
    facts: dict[str, Any]


def stores(out: Path) -> list[Path]:
    """The folder of every task key."""
    return sorted(path for path in (out / "cache" / "truth").glob("*") if path.is_dir())


def shards(folder: Path) -> Iterator[Shard]:
    """Every file of rows in a folder, read whole."""
    from tasks.training.store import intact

    for path in sorted(folder.glob("*.safetensors")):
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # a launch has just set it aside
            continue
        except OSError as error:
            raise UserError("out", str(path), f"cannot be read ({error.strerror})") from error
        if not intact(path, content):
            yield Shard(path, False, 0, {})
            continue
        (length,) = struct.unpack("<Q", content[:8])  # safetensors: the size of a JSON header, the header, the numbers
        header = json.loads(content[8 : 8 + length])
        facts = json.loads(header.get("__metadata__", {}).get("facts", "{}"))
        yield Shard(path, True, header["key"]["shape"][0], facts)


def listing(out: Path) -> str:
    """One line a task key: rows, size, which engine made them, their mean seconds, when the last came."""
    lines = []
    for folder in stores(out):
        found = [shard for shard in shards(folder) if shard.intact]
        rows, size = sum(s.rows for s in found), sum(s.path.stat().st_size for s in found)
        engines = sorted({str(s.facts["engine"]) for s in found if "engine" in s.facts})
        timed = [s for s in found if "seconds" in s.facts]
        each = sum(s.facts["seconds"] for s in timed) / max(1, sum(s.rows for s in timed))
        last = max((s.path.stat().st_mtime for s in found), default=0.0)
        when = f"{datetime.fromtimestamp(last):%Y-%m-%d %H:%M}" if last else "never"
        told = about(folder)
        data = f", {told['source']} data, {told['n_train']:,} training examples" if told else ""
        lines.append(
            f"{folder.name}: {rows:,} rows in {len(found)} files, {size / 2**20:.1f} MiB, "
            f"{'/'.join(engines) or 'unknown engine'}, {each:.3g} s a row, last {when}{data}"
        )
    return "\n".join(lines)


def verify(out: Path) -> list[Path]:
    """The damaged files."""
    return [shard.path for folder in stores(out) for shard in shards(folder) if not shard.intact]


def prune(out: Path) -> list[Path]:
    """Removes what no launch can use and no living one holds; what was removed. A damaged file's rows are made again
    when they are asked for."""
    import shutil

    from filelock import FileLock, Timeout

    from tasks.training.retrain import VERSION

    removed: list[Path] = []
    for folder in stores(out):
        builders = folder / "builders"
        alive = False
        for lock in sorted(builders.glob("*.lock")):
            if lock.stem == "queue":
                continue
            try:
                with FileLock(lock, timeout=0):
                    removed += _remove(builders.glob(f"{lock.stem}.*"))
            except Timeout:
                alive = True
        if alive:  # what looks like remains may be a file that it is just writing
            continue
        version = re.search(r"-v(\d+)$", folder.name)
        if version is None:  # nobody's, as far as we know: a copy that somebody has put there
            continue
        if int(version[1]) < VERSION:
            shutil.rmtree(folder)
            removed.append(folder)
            continue
        removed += _remove([*folder.glob(".*.part"), *folder.glob("*.damaged"), *builders.glob("*.part")])
        removed += _remove(shard.path for shard in shards(folder) if not shard.intact)
    return removed


def _remove(paths: Any) -> list[Path]:
    gone = []
    for path in list(paths):
        with suppress(FileNotFoundError):
            path.unlink()
            gone.append(path)
    return gone


def about(folder: Path) -> dict[str, Any]:
    """What a task key stands for; empty where nobody wrote it down."""
    try:
        found: dict[str, Any] = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


# --- the program -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 done, 1 a damaged file or a training that failed, 2 a mistake in the command, 130 interrupted."""
    from bench.__main__ import prepare

    prepare()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    try:
        commands: dict[str, Callable[[Path], int]] = {"list": _list, "verify": _verify, "prune": _prune}
        if arguments[0] in commands:
            return commands[arguments[0]](_out(arguments[1:]))
        return _fill(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130


def _fill(arguments: list[str]) -> int:
    from bench import config

    many = [a for a in arguments if a in ("-m", "--multirun")]
    overrides = [a for a in arguments if a not in many]
    for argument in overrides:
        if argument.startswith("-"):
            raise UserError(argument, None, "is no option here", allowed=["-m", "--help"])
        if "=" not in argument:
            raise UserError(argument, None, "is not understood", allowed=["key=value", "list", "verify", "prune"])
    points = config.expand(overrides) if many else [overrides]
    composed = config.compose_all(points)
    if not many and composed[0].choice.study is not None:
        raise UserError("study", composed[0].choice.study, "is a sweep", hint="add -m")
    for one in composed:
        config.check(one)
    started, made = time.perf_counter(), 0
    for one in composed:
        made += sum(fill(one).values())
    print(f"{made} trainings in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return 0


def _out(arguments: list[str]) -> Path:
    out = "results"
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key != "out" or not equals or not value:
            raise UserError(argument, None, "is not understood", allowed=["out=..."])
        out = value
    if not stores(Path(out)):
        raise UserError("out", out, "holds no finished trainings", hint="python -m bench.truth task=... makes some")
    return Path(out)


def _list(out: Path) -> int:
    print(listing(out))
    return 0


def _verify(out: Path) -> int:
    damaged = verify(out)
    for path in damaged:
        print(f"damaged: {path}")
    files = sum(len(list(folder.glob("*.safetensors"))) for folder in stores(out))
    print(f"{len(damaged)} of {files} files damaged" + ("; the next run makes their rows again" if damaged else ""))
    return 1 if damaged else 0


def _prune(out: Path) -> int:
    try:
        removed = prune(out)
    except OSError as error:
        raise UserError("out", str(out), f"cannot be changed ({error.strerror})") from error
    for path in removed:
        print(f"removed: {path}")
    print(f"{len(removed)} removed")
    return 0


if __name__ == "__main__":
    from bench.truth import main as importable  # worker processes import by name

    sys.exit(importable())
