"""How much memory is there: what the kernel says, what limits it, and what to assume where nobody says."""

import os
from pathlib import Path

import pytest

from tasks.training import memory
from tasks.training.memory import free_memory

GIB = 2**30


class Machine:
    """Files as a Linux kernel writes them, in a folder."""

    def __init__(self, root: Path) -> None:
        self.meminfo, self.own, self.groups = root / "meminfo", root / "cgroup", root / "groups"
        self.groups.mkdir()
        self.meminfo.write_text("MemTotal:       16777216 kB\nMemFree:   1 kB\nMemAvailable:    8388608 kB\nX: 1 kB\n")
        self.own.write_text("4:memory:/elsewhere\n0::/slurm/job_7/step_0\n")

    def limit(self, group: str, limit: object, used: int, forgettable: int | None = 0) -> None:
        folder = self.groups / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        if forgettable is not None:
            (folder / "memory.stat").write_text(f"anon 5\ninactive_file_x 7\ninactive_file {forgettable}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(memory, "MEMINFO", made.meminfo)
    monkeypatch.setattr(memory, "OWN_CGROUP", made.own)
    monkeypatch.setattr(memory, "CGROUP", made.groups)
    return made


def test_what_the_machine_has_available(machine: Machine) -> None:
    assert free_memory() == 8 * GIB


@pytest.mark.parametrize("group", ["", "slurm", "slurm/job_7", "slurm/job_7/step_0"])
def test_a_limit_on_the_process_or_on_what_it_is_in_is_respected(machine: Machine, group: str) -> None:
    machine.limit(group, 3 * GIB, GIB)
    assert free_memory() == 2 * GIB


def test_the_tightest_limit_counts_and_those_of_others_do_not(machine: Machine) -> None:
    machine.limit("slurm", 7 * GIB, GIB)
    machine.limit("slurm/job_7", 5 * GIB, 2 * GIB)
    machine.limit("slurm/job_7/step_0", "max", 10**6)
    machine.limit("slurm/job_8", 10, 5)
    machine.limit("slurm/job_7/step_0/deeper", 10, 5)
    assert free_memory() == 3 * GIB


def test_a_limit_above_what_the_machine_has_gives_nothing(machine: Machine) -> None:
    machine.limit("slurm", 64 * GIB, GIB)
    assert free_memory() == 8 * GIB


def test_what_may_be_forgotten_is_free(machine: Machine) -> None:
    """A data set that was read once fills a small container's limit for good, and may be dropped at any time."""
    machine.limit("slurm/job_7", 4 * GIB, 4 * GIB, forgettable=3 * GIB)
    assert free_memory() == 3 * GIB


def test_a_group_that_is_full_leaves_nothing(machine: Machine) -> None:
    machine.limit("slurm/job_7", GIB, 2 * GIB)
    assert free_memory() == 0


def test_a_limit_holds_without_its_statistics(machine: Machine) -> None:
    machine.limit("slurm", 3 * GIB, GIB, forgettable=None)
    assert free_memory() == 2 * GIB


@pytest.mark.parametrize("own", ["4:memory:/v1/only\n", "", None, "0::/../outside\n", "0::/\n"])
def test_whatever_the_own_group_is_the_root_of_a_container_counts(machine: Machine, own: str | None) -> None:
    machine.own.unlink() if own is None else machine.own.write_text(own)
    machine.limit("", 3 * GIB, 2 * GIB)
    assert free_memory() == GIB


@pytest.mark.parametrize("name", ["memory.max", "memory.current"])
def test_nonsense_is_no_limit(machine: Machine, name: str) -> None:
    machine.limit("slurm", 3 * GIB, GIB)
    (machine.groups / "slurm" / name).write_text("")
    assert free_memory() == 8 * GIB


def test_a_system_without_these_files_gives_half_of_its_memory(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.meminfo.unlink()
    machine.own.unlink()
    monkeypatch.setattr(memory, "CGROUP", machine.groups / "none")
    answers = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", answers.__getitem__)
    assert free_memory() == 1000 * 4096 // 2
    monkeypatch.delattr(os, "sysconf")
    assert free_memory() == 2 * GIB


def test_a_kernel_that_does_not_tell_what_is_available_gives_half(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.meminfo.write_text("MemTotal:       16777216 kB\n")
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 100}.__getitem__)
    assert free_memory() == 500


def test_this_machine_has_some() -> None:
    assert 0 < free_memory() < memory.UNLIMITED
