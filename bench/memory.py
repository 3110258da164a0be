"""Peak memory of one phase of this process, where the system can tell."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """`bytes` is the largest resident set while any `measured` block ran; None where it cannot be reset."""

    bytes: int | None = None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Resets the kernel's high-water mark, so that earlier phases do not count."""
        can = False
        with suppress(OSError):
            RESET.write_text("5")
            can = True
        try:
            yield
        finally:
            if can:
                lines = STATUS.read_text().splitlines()
                peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
                self.bytes = max(self.bytes or 0, peak)
