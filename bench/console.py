"""What a run says while it works, on stderr: which phase, how far, how long it took and will take."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

EVERY = 10.0  # seconds between two lines where stderr is no terminal
WORTH_TELLING = 5  # finished parts from which a forecast is made: the first ones pay for the start of the workers


@contextmanager
def still_at_it(label: str) -> Iterator[None]:
    """Says so, once, of what takes long and cannot tell how far it is."""
    line = f"  {label}: still at it after {EVERY:.0f} s"
    timer = threading.Timer(EVERY, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclass
class Console:
    """Seconds by phase are kept in `seconds`: the record's cost comes from here."""

    seconds: dict[str, float] = field(default_factory=dict)
    _started: float = 0.0
    _told: float = 0.0
    _first: int | None = None

    @contextmanager
    def phase(self, name: str, label: str) -> Iterator[None]:
        """One phase: announced, timed, its seconds added to what `name` had."""
        self._started = self._told = time.perf_counter()
        self._first = None
        if sys.stderr.isatty():
            print(f"{label} …", end="", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            took = time.perf_counter() - self._started
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            start = "\r\033[K" if sys.stderr.isatty() else ""
            print(f"{start}{label}: {took:.1f} s", file=sys.stderr, flush=True)

    def progress(self, name: str, done: int, of: int) -> None:
        """Told after each finished part of a long phase."""
        now = time.perf_counter()
        if self._first is None:
            self._first = done
        made = done - self._first
        if done >= of or (not sys.stderr.isatty() and now - self._told < EVERY):
            return
        self._told = now
        left = f", about {(of - done) * (now - self._started) / made:.0f} s left" if made >= WORTH_TELLING else ""
        line = f"{name}: {done} of {of} retrainings, {now - self._started:.0f} s{left}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(f"  {line}", file=sys.stderr, flush=True)
