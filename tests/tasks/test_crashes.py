"""Builders that are killed, run out of disk or may not write: what was finished is kept, whole, and made once.

Functions whose name starts with `story` run in a process of their own, which forks builders.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load as parse
from small_tasks import vector_task

from bench.truth import prune
from tasks.base import Task
from tasks.errors import UserError
from tasks.training import engines
from tasks.training.engines import Executor, Rows, stacked
from tasks.training.plan import Plan, planned, random_subsets
from tasks.training.retrain import retrain, store_of
from tasks.training.store import intact

pytestmark = pytest.mark.xdist_group("crashes")
HERE = Path(__file__).parent
UNIT = 2  # rows that are trained, and kept, together: always the same two, so that rows are equal bit by bit
SLOW = vector_task(epochs=100, batch_size=12)  # a unit takes some 60 ms
QUICK = vector_task(epochs=1, batch_size=12)
LONG = planned(random_subsets(24, 20, 0.5, 0), 2, "common", 0, 0)
SHORT = LONG.select(range(6))
PATIENCE = 60.0  # seconds that nothing takes unless it hangs


Tell = Callable[[Callable[[Path], None]], None]


@pytest.fixture(scope="module")
def teller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything, and has no thread that a fork would lose."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", "import test_crashes; test_crashes.serve()"]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def tell(teller: subprocess.Popen[str], tmp_path: Path) -> Tell:
    """Runs a story in a folder of its own; what it says is the test's."""

    def run(story: Callable[[Path], None]) -> None:
        assert teller.stdin is not None and teller.stdout is not None
        (tmp_path / "story").mkdir()
        teller.stdin.write(f"{story.__name__} {tmp_path}\n")
        teller.stdin.flush()
        assert teller.stdout.readline() == "0\n", (tmp_path / "said").read_text()

    return run


def serve() -> None:
    """Forks a process for every story. They share one thread and units of two rows."""
    torch.set_num_threads(1)
    engines.STACK = dict.fromkeys(engines.STACK, UNIT)
    stacked(QUICK, SHORT.select([0, 1]))
    for line in sys.stdin:
        name, _, folder = line.rstrip("\n").partition(" ")

        def work(say: Callable[[object], None], name: str = name, folder: Path = Path(folder)) -> None:
            os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT), 2)
            globals()[name](folder / "story")

        child = forked(work)
        print(os.waitpid(child.pid, 0)[1], flush=True)


# --- builders --------------------------------------------------------------------------------------------------------


@dataclass
class Builder:
    """A forked process that builds; `told`: what it said through its pipe, one number or text a line."""

    pid: int
    pipe: int
    text: bytes = b""
    status: int | None = None

    @property
    def told(self) -> list[str]:
        with suppress(BlockingIOError):
            while more := os.read(self.pipe, 65536):
                self.text += more
        return self.text.decode().split("\n")[:-1]

    @property
    def done(self) -> int:
        """Rows that it has told to be finished, its own and others'."""
        return max((int(line) for line in self.told if line.isdigit()), default=-1)

    def alive(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is None

    def wait(self) -> None:
        """To its end, which is a good one."""
        until(lambda: not self.alive())
        assert self.status == 0, (self.status, self.told)

    def kill(self) -> bool:
        """Whether it was alive until now."""
        if not self.alive():
            return False
        os.kill(self.pid, signal.SIGKILL)
        _, self.status = os.waitpid(self.pid, 0)
        return os.WIFSIGNALED(self.status)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.005)


def forked(work: Callable[[Callable[[object], None]], None]) -> Builder:
    """A child that does `work(say)`."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    pid = os.fork()
    if pid:
        os.close(write)
        return Builder(pid, read)
    status = 1
    try:
        work(lambda word: (os.write(write, f"{word}\n".encode()), None)[1])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def builder(root: Path, task: Task, plan: Plan, before: Callable[[], object] = lambda: None) -> Builder:
    """Builds the plan, telling how far it is."""

    def work(say: Callable[[object], None]) -> None:
        before()
        build(root, task, plan, lambda done, of: say(done))

    return forked(work)


def build(root: Path, task: Task, plan: Plan, progress: Callable[[int, int], None] | None = None) -> Rows:
    return retrain(task, plan, root, Executor("vectorised", 1), progress)


def uninterrupted(folder: Path, task: Task, plan: Plan) -> Rows:
    builder(folder / "uninterrupted", task, plan).wait()
    return build(folder / "uninterrupted", task, plan)  # read


def on_disk(root: Path, task: Task) -> list[str]:
    """The key of every row in every file; every file is what was written."""
    keys = []
    for path in store_of(task, root).folder.glob("*.safetensors"):
        content = path.read_bytes()
        assert intact(path, content), path
        keys += [key.tobytes().hex() for key in parse(content)["key"]]
    return keys


def claimed(root: Path, task: Task) -> list[str]:
    """Rows that living and dead builders have claimed."""
    return [
        key for path in (store_of(task, root).folder / "builders").glob("*.claims") for key in path.read_text().split()
    ]


def same(found: Rows, wanted: Rows) -> bool:
    """Bit by bit; what a training took is another time another."""
    return all(np.array_equal(found[split], wanted[split]) for split in ("val", "query"))


def assert_whole(root: Path, task: Task, plan: Plan, wanted: Rows) -> None:
    """After one more launch: every row once, bit by bit as in an uninterrupted build."""
    builder(root, task, plan).wait()
    found = build(root, task, plan)
    assert same(found, wanted)
    assert sorted(on_disk(root, task)) == sorted(plan.keys())


def assert_tidy(out: Path, task: Task) -> None:
    """After pruning nothing is there but rows, what they are of, and the queue's lock."""
    prune(out)
    folder = store_of(task, out / "cache" / "truth").folder
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix != ".safetensors"}
    assert left <= {"builders", "builders/queue.lock", "task.json"}, left
    json.loads((folder / "task.json").read_text())


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def story_thirty_kills(folder: Path) -> None:
    wanted, random_time = uninterrupted(folder, SLOW, LONG), random.Random(0)
    kills, finished = 0, 0
    while kills < 30:
        out = folder / str(finished)
        root = out / "cache" / "truth"
        child = builder(root, SLOW, LONG)
        until(lambda child=child: child.told or not child.alive())
        time.sleep(random_time.uniform(0, 0.25))
        killed = child.kill()
        there = on_disk(root, SLOW)
        assert len(there) >= child.done, "what was told to be finished was lost"
        lost = set(claimed(root, SLOW)) - set(there)  # one unit in training, one on its way to the disk
        assert len(lost) <= 2 * UNIT, "more than the rows in flight were lost"
        if killed and child.done < len(LONG):
            kills += 1
        else:  # it was too quick: once more from the beginning
            assert_whole(root, SLOW, LONG, wanted)
            finished += 1
    assert_whole(root, SLOW, LONG, wanted)
    assert_tidy(out, SLOW)


@pytest.mark.slow
def test_thirty_kills_lose_the_rows_in_flight_and_nothing_else(tell: Tell) -> None:
    tell(story_thirty_kills)


def story_killed_at_every_step(folder: Path) -> None:
    two_units = SHORT.select(range(2 * UNIT))
    wanted = uninterrupted(folder, QUICK, two_units)
    steps = {"open", "os.rename", "os.remove", "os.mkdir", "fcntl.flock", "os.scandir", "os.listdir"}

    def at(step: int, root: Path) -> Callable[[], object]:
        count = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event in steps and (isinstance(arguments[0], int) or str(arguments[0]).startswith(str(root))):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        return lambda: sys.addaudithook(hook)

    for step in range(1, 10_000):
        out = folder / str(step)
        root = out / "cache" / "truth"
        child = builder(root, QUICK, two_units, at(step, root))
        until(lambda child=child: not child.alive())
        assert child.status in (0, signal.SIGKILL)
        assert len(on_disk(root, QUICK)) >= child.done
        assert_whole(root, QUICK, two_units, wanted)
        assert_tidy(out, QUICK)
        if child.status == 0:
            assert step > 30, "killed hardly anywhere"
            return
        shutil.rmtree(out)


@pytest.mark.slow
def test_a_kill_at_every_step_on_the_disk_leaves_a_store_that_resumes(tell: Tell) -> None:
    tell(story_killed_at_every_step)


def story_half_written(folder: Path) -> None:
    """Killed by the kernel while it writes: beyond a limit, a write is a signal."""
    wanted = uninterrupted(folder, QUICK, SHORT)

    def within(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    for limit, name in ((400, ".*.part"), (100, "builders/*.part")):
        out = folder / str(limit)
        root = out / "cache" / "truth"
        builder(root, QUICK, SHORT.select(range(UNIT))).wait()
        child = builder(root, QUICK, SHORT, lambda limit=limit: within(limit))
        until(lambda child=child: not child.alive())
        assert child.status == signal.SIGXFSZ and child.done == UNIT
        (half,) = store_of(QUICK, root).folder.glob(name)
        assert half.stat().st_size == limit and sorted(on_disk(root, QUICK)) == sorted(SHORT.keys()[:UNIT])
        assert_whole(root, QUICK, SHORT, wanted)
        assert half.exists()
        assert_tidy(out, QUICK)


def test_a_builder_that_dies_while_it_writes_leaves_no_half_row(tell: Tell) -> None:
    tell(story_half_written)


def story_eight_builders(folder: Path) -> None:
    """Of long trainings, and of ones so short that all claim all the time."""
    for task in (SLOW, QUICK):
        wanted, root = uninterrupted(folder, task, LONG), folder / "shared"
        go = folder / f"go {task.recipe.epochs}"

        def work(
            say: Callable[[object], None], task: Task = task, wanted: Rows = wanted, root: Path = root, go: Path = go
        ) -> None:
            def noted(task: Task, plan: Plan) -> Rows:
                for key in Plan.keys(plan):
                    say(f"made {key}")
                return stacked(task, plan)

            engines.stacked = noted
            until(go.exists)
            found = build(root, task, LONG)
            assert same(found, wanted)
            say("equal")

        children = [forked(work) for _ in range(8)]
        go.touch()
        for child in children:
            child.wait()
            assert child.told[-1] == "equal"
        made = [[line.split()[1] for line in child.told if line.startswith("made ")] for child in children]
        assert sorted(key for keys in made for key in keys) == sorted(LONG.keys()), "made twice, or never"
        assert sum(len(keys) > 0 for keys in made) > 1, "nothing was shared"
        assert_whole(root, task, LONG, wanted)


@pytest.mark.slow
def test_eight_builders_make_every_row_once(tell: Tell) -> None:
    tell(story_eight_builders)


def story_taken_over(folder: Path) -> None:
    wanted = uninterrupted(folder, QUICK, LONG)
    out = folder / "shared"
    root = out / "cache" / "truth"

    def hang() -> None:
        engines.stacked = lambda task, plan: time.sleep(1000)

    first = builder(root, QUICK, LONG, hang)
    until(lambda: len(claimed(root, QUICK)) == UNIT)
    held = claimed(root, QUICK)
    others = [builder(root, QUICK, LONG) for _ in range(2)]
    until(lambda: all(child.done == len(LONG) - UNIT for child in others))
    os.kill(first.pid, signal.SIGSTOP)  # one that only stands still is not dead
    time.sleep(1.2)  # they look every half second
    assert all(child.alive() for child in others) and not set(on_disk(root, QUICK)) & set(held)
    assert prune(out) == [] and claimed(root, QUICK) == held, "of a living builder"
    assert first.kill()
    for child in others:
        child.wait()
        assert child.done == len(LONG)
    assert_whole(root, QUICK, LONG, wanted)
    assert_tidy(out, QUICK)


@pytest.mark.slow
def test_those_who_wait_take_over_what_a_killed_builder_held(tell: Tell) -> None:
    tell(story_taken_over)


# --- disks -----------------------------------------------------------------------------------------------------------


def refused(root: Path, before: Callable[[], object]) -> str:
    """What a builder says that cannot write."""

    def work(say: Callable[[object], None]) -> None:
        before()
        try:
            build(root, QUICK, SHORT)
        except UserError as error:
            say(error)

    child = forked(work)
    child.wait()
    (line,) = child.told
    return line


def story_full_disk(folder: Path) -> None:
    """No file may grow beyond a limit: a whole row does not fit, nor what is claimed, nor anything at all."""
    wanted = uninterrupted(folder, QUICK, SHORT)
    for limit, rows in ((400, 0), (400, 2), (100, 2), (0, 0)):
        out = folder / f"{limit} {rows}"
        root = out / "cache" / "truth"
        if rows:
            builder(root, QUICK, SHORT.select(range(rows))).wait()
        line = refused(root, lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert line == (
            f"out={store_of(QUICK, root).folder} cannot be written (File too large); finished rows are kept"
        )
        left = [path.name for path in store_of(QUICK, root).folder.rglob("*") if path.is_file()]
        there = on_disk(root, QUICK)
        assert sorted(there) == sorted(SHORT.keys()[:rows]), (limit, there)
        assert {name for name in left if not name.endswith(".safetensors")} <= {"task.json", "queue.lock"}, left
        assert_whole(root, QUICK, SHORT, wanted)
        assert_tidy(out, QUICK)


def test_a_full_disk_is_one_line_and_the_store_resumes(tell: Tell) -> None:
    tell(story_full_disk)


def story_read_only(folder: Path) -> None:
    """Another user's folder: also for root, who becomes nobody."""
    wanted = uninterrupted(folder, QUICK, SHORT)
    with tempfile.TemporaryDirectory() as name:
        root, place = Path(name) / "root", store_of(QUICK, Path(name) / "root").folder
        builder(root, QUICK, SHORT.select([0, 1])).wait()
        before = sorted(path.name for path in root.rglob("*"))
        folders = [Path(name), *(path for path in root.rglob("*") if path.is_dir()), root]
        for path in folders:
            path.chmod(0o555)
        line = refused(root, lambda: os.seteuid(65534) if os.geteuid() == 0 else None)
        assert line == f"out={place} cannot be written (Permission denied); finished rows are kept"
        assert sorted(path.name for path in root.rglob("*")) == before
        read_only = forked(lambda say: (os.geteuid() or os.seteuid(65534), build(root, QUICK, SHORT.select([1])))[0])
        read_only.wait()  # what is there can be read
        for path in folders:
            path.chmod(0o755)
        assert_whole(root, QUICK, SHORT, wanted)


def test_a_folder_of_somebody_else_is_one_line(tell: Tell) -> None:
    tell(story_read_only)


@contextmanager
def in_pairs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(engines, "STACK", dict.fromkeys(engines.STACK, UNIT))
        yield


@pytest.mark.parametrize("seed", range(4))
def test_a_row_with_one_wrong_byte_is_told_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Wherever the byte: in the header, in a key, in a number."""
    draw = random.Random(seed)
    with in_pairs(monkeypatch):
        wanted = build(tmp_path, QUICK, SHORT)
        path = draw.choice(sorted(store_of(QUICK, tmp_path).folder.glob("*.safetensors")))
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        told: list[int] = []
        with pytest.warns(UserWarning, match=f"{path.name} is damaged: its rows are made again") as warned:
            found = build(tmp_path, QUICK, SHORT, lambda done, of: told.append(done))
        assert len(warned) == 1 and told == [4, 6, 6]
        assert same(found, wanted)
        assert sorted(on_disk(tmp_path, QUICK)) == sorted(SHORT.keys())
        assert path.with_suffix(".damaged").read_bytes() == content, "set aside, for whoever wants to look"
