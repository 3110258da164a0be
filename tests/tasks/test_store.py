"""Rows of truth on disk: whole or missing, shared, and free again when their builder dies."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import UserError
from tasks.training.store import Builder, Store

ROOT = Path(__file__).parents[2]
KEYS = [f"{i:064x}" for i in range(10)]


def rows(*numbers: int) -> dict[str, np.ndarray]:
    return {"val": np.array([[n, n + 0.5] for n in numbers]), "query": np.array([[-n] * 3 for n in numbers], float)}


def filled(folder: Path) -> Store:
    store = Store(folder)
    store.add(KEYS[:3], rows(0, 1, 2))
    store.add(KEYS[3:5], rows(3, 4))
    return store


def shard_of(folder: Path, key: str) -> Path:
    for path in folder.glob("*.safetensors"):
        if bytes.fromhex(key) in path.read_bytes():
            return path
    raise AssertionError(key)


def test_what_was_added_is_read_back_exactly(tmp_path: Path) -> None:
    filled(tmp_path / "deep" / "store")
    found = Store(tmp_path / "deep" / "store").read()
    assert sorted(found) == KEYS[:5]
    for n in range(5):
        wanted = rows(n)
        assert found[KEYS[n]].keys() == wanted.keys()
        assert all(np.array_equal(found[KEYS[n]][k], wanted[k][0]) for k in wanted)
        assert found[KEYS[n]]["val"].dtype == np.float64


def test_a_store_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").read() == {} and not (tmp_path / "none").exists()


def test_reading_sees_what_others_add_meanwhile(tmp_path: Path) -> None:
    mine, other = filled(tmp_path), Store(tmp_path)
    assert len(mine.read()) == 5
    other.add(KEYS[5:6], rows(5))
    assert len(mine.read()) == 6


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty])
def test_a_damaged_shard_is_told_and_only_its_rows_are_missing(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    filled(tmp_path)
    damage(shard_of(tmp_path, KEYS[1]))
    store = Store(tmp_path)
    with pytest.warns(UserWarning, match="damaged"):
        assert sorted(store.read()) == KEYS[3:5]
    store.add(KEYS[:3], rows(0, 1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(Store(tmp_path).read()) == sorted(store.read()) == KEYS[:5]


def test_half_written_files_are_no_rows(tmp_path: Path) -> None:
    store = filled(tmp_path)
    (tmp_path / ".abc.part").write_bytes(b"half")
    assert len(store.read()) == len(Store(tmp_path).read()) == 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["rename", "open"])
def test_a_failed_write_is_one_line_and_leaves_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    store = filled(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, fail)
        with pytest.raises(UserError, match=os.strerror(number)) as told:
            store.add(KEYS[5:7], rows(5, 6))
    assert "\n" not in str(told.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert sorted(Store(tmp_path).read()) == KEYS[:5]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(UserError, match="cannot be written"):
        store.add(KEYS[:1], rows(0))
    with pytest.raises(UserError, match="cannot be written"), store.builder():
        pass


def test_a_claim_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk stops the launch with the same words wherever it is noticed."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Store(tmp_path).builder() as builder, monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(UserError, match="cannot be written"):
            builder.claim(KEYS, 2)


def test_claims_are_disjoint_skip_what_is_done_and_end_with_their_builder(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with store.builder() as one:
        assert one.claim([*KEYS, KEYS[5]], 2) == KEYS[5:7]
        with Store(tmp_path).builder() as two:
            assert two.claim(KEYS, 99) == KEYS[7:]
            assert one.claim(KEYS, 99) == [], "what it holds itself is not claimed again"
            assert two.claim(KEYS, 0) == []
        assert one.claim(KEYS, 99) == KEYS[7:], "claims add up"
        with Store(tmp_path).builder() as two:
            assert two.claim(KEYS, 99) == []
            store.add(KEYS[5:7], rows(5, 6))
            assert two.claim(KEYS, 99) == [] and one.claim(KEYS, 99) == []
        assert one.held == KEYS[7:], "a finished row is held no more"
    with store.builder() as three:
        assert three.claim(KEYS, 99) == KEYS[7:]
    assert not [p for p in (tmp_path / "builders").iterdir() if p.suffix in {".claims", ".part"} or p.stem != "queue"]


def test_claims_end_with_a_builder_that_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Store(tmp_path).builder() as one:
        assert one.claim(KEYS, 3) == KEYS[:3]
        raise ZeroDivisionError
    with Store(tmp_path).builder() as two:
        assert two.claim(KEYS, 3) == KEYS[:3]


CLAIM = """
import sys, time
from pathlib import Path
from tasks.training.store import Store
context = Store(Path(sys.argv[1])).builder()
print(*context.__enter__().claim(sys.argv[2].split(","), 4), flush=True)
time.sleep(60)
"""


def test_a_living_builders_claims_are_respected_and_a_killed_ones_are_free(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", CLAIM, str(tmp_path), ",".join(KEYS)]
    other = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert other.stdout is not None
        assert other.stdout.readline().split() == KEYS[:4]
        with Store(tmp_path).builder() as mine:
            assert mine.claim(KEYS, 99) == KEYS[4:]
            other.send_signal(signal.SIGKILL)
            other.wait()
            assert mine.claim(KEYS, 99) == KEYS[:4]
    finally:
        other.kill()
        other.communicate()


def test_a_row_finished_while_another_looks_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading what is done and reading who makes what, the other one finishes and leaves."""
    theirs, mine = Store(tmp_path), Store(tmp_path)
    context = theirs.builder()
    assert context.__enter__().claim(KEYS[:2], 2) == KEYS[:2]
    left = False

    def finish() -> None:
        nonlocal left
        if not left:
            left = True
            theirs.add(KEYS[:2], rows(0, 1))
            context.__exit__(None, None, None)

    read, taken = Store.read, Builder._claims_of_others

    def slow_read(self: Store) -> object:
        found = dict(read(self))
        if self is mine:
            finish()
        return found

    def slow_taken(self: Builder) -> set[str]:
        found = taken(self)
        finish()
        return found

    with mine.builder() as builder, monkeypatch.context() as patch:
        patch.setattr(Store, "read", slow_read)
        patch.setattr(Builder, "_claims_of_others", slow_taken)
        assert builder.claim(KEYS[:4], 4) == KEYS[2:4]


def test_a_builder_may_leave_while_its_claims_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Store(tmp_path).builder()
    context.__enter__().claim(KEYS[:2], 2)
    read_text = Path.read_text

    def leave_first(self: Path, *arguments: object, **options: object) -> str:
        if self.suffix == ".claims":
            self.unlink()  # what a builder does that ends
        return read_text(self)

    with Store(tmp_path).builder() as mine, monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", leave_first)
        assert mine.claim(KEYS[2:4], 2) == KEYS[2:4]
    context.__exit__(None, None, None)
