"""Peak memory of one phase of this process, where the system can tell."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """`bytes` is the most that any `measured` block added to the resident set; None where that cannot be told."""

    bytes: int | None = None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Resets the kernel's high-water mark, so that earlier phases do not count; nor does memory that they freed and
        the allocator kept hide what this one takes."""
        give_back()
        can = False
        before = 0
        with suppress(OSError):
            RESET.write_text("5")
            before = _kibibytes("VmRSS")
            can = True
        try:
            yield
        finally:
            if can:
                self.bytes = max(self.bytes or 0, 1024 * (_kibibytes("VmHWM") - before))


def give_back() -> None:
    """Free memory goes back to the system, where it can be told to."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _kibibytes(name: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))
