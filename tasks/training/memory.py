"""How much memory is there to use."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
UNLIMITED = 2**62


def free_memory() -> int:
    """Bytes to be had without swapping: what the machine has available, or what a limit on this process leaves."""
    return min(_machine(), _limited())


def _machine() -> int:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # no POSIX
        return 2**31


def _limited() -> int:
    """What the tightest control group leaves, of this process's and those around it (a container's, a Slurm job's).

    Version 2; a limit of version 1 or none is no limit.
    """
    try:
        own = next(line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        own = "/"
    group = CGROUP / own.lstrip("/")
    return min(_left(place) for place in (group, *group.parents) if place.is_relative_to(CGROUP))


def _left(group: Path) -> int:
    """A file that was read and may be forgotten is not in use, though it counts as current."""
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return UNLIMITED if limit == "max" else max(0, int(limit) - int(used) + _forgettable(group))
    except (OSError, ValueError):
        return UNLIMITED


def _forgettable(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, StopIteration):
        return 0
