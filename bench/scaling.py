"""What a truth of ten thousand fine-tunings costs on many GPUs: measured unit costs, stated assumptions, arithmetic.

python -m bench.scaling [to=results/reference/scaling.md]
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import UserError

ROWS = 10_000
GPUS = (8, 64, 512)
PEAK = 312e12  # A100, dense bfloat16 (NVIDIA A100 data sheet)
UTILISATION = 0.35  # of the peak in fine-tuning: an assumption, of the order that well-run trainings report
COLUMNS = 477  # numbers a row: 200 val and 277 query measurements


@dataclass(frozen=True)
class Job:
    """One fine-tuning. `start`: seconds from a free GPU to the first step (process, weights): an assumption."""

    name: str
    parameters: float
    examples: int
    tokens: int
    epochs: int
    start: float

    @property
    def seconds(self) -> float:
        """6 FLOP a parameter and token, forward and backward, over half of the data; 2 for the measurements."""
        flop = 6 * self.parameters * self.tokens * self.examples / 2 * self.epochs
        return (flop + 2 * self.parameters * self.tokens * COLUMNS) / (PEAK * UTILISATION)


JOBS = (
    Job("BERT-base, 2,432 examples of 128 tokens, 3 epochs (RTE)", 110e6, 2432, 128, 3, 15.0),
    Job("BERT-base, 67,349 examples of 32 tokens, 3 epochs (SST-2)", 110e6, 67349, 32, 3, 15.0),
    Job("1B decoder, 5,000 documents of 512 tokens, 3 epochs", 1.0e9, 5000, 512, 3, 60.0),
)


@dataclass(frozen=True)
class StoreCost:
    """Measured here: seconds to claim a row while `ROWS` are finished, to keep one, to read all anew; bytes a row."""

    claim: float
    keep: float
    read: float
    bytes: float


def measure_store(rows: int = ROWS, samples: int = 20) -> StoreCost:
    """A store of one-row files, as fine-tunings leave it, on this machine's temporary folder."""
    import numpy as np

    from tasks.training.store import Store

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        keys = [f"{k:064x}" for k in range(rows + samples)]
        writer, kept, claimed = Store(folder), [], []
        rng = np.random.default_rng(0)
        for key in keys[:rows]:
            started = time.perf_counter()
            writer.add([key], {"val": rng.normal(size=(1, 200)), "query": rng.normal(size=(1, COLUMNS - 200))})
            kept.append(time.perf_counter() - started)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        reader, started = Store(folder), time.perf_counter()
        reader.read()
        read = time.perf_counter() - started
        with reader.builder() as builder:
            for _ in range(samples):
                started = time.perf_counter()
                builder.claim(keys, 1)
                claimed.append(time.perf_counter() - started)
    return StoreCost(statistics.median(claimed), statistics.median(kept), read, size / rows)


def report(cost: StoreCost) -> str:
    """The arithmetic as Markdown."""
    lines = [
        f"# {ROWS:,} fine-tunings",
        "",
        "Made by `python -m bench.scaling`. Measured on the machine that wrote this, with "
        f"{ROWS:,} finished one-row files in the store: claiming a row {1000 * cost.claim:.0f} ms (one launch at a "
        f"time), keeping one durably {1000 * cost.keep:.1f} ms, reading them all anew {cost.read:.1f} s, "
        f"{cost.bytes / 1024:.1f} KiB a row of {COLUMNS} measurements.",
        "",
        f"Assumed: {PEAK / 1e12:.0f} TFLOP/s dense bfloat16 a GPU (A100) at {UTILISATION:.0%} utilisation, 6 FLOP a "
        "parameter and token, half of the data a training, seconds to start as in the table. No GPU was measured.",
        "",
        "| fine-tuning | a training | GPU-hours | " + " | ".join(f"{g} GPUs" for g in GPUS) + " |",
        "| :-- | --: | --: | " + " | ".join("--:" for _ in GPUS) + " |",
    ]
    for job in JOBS:
        cells = [f"{hours:.2f} h ({what})" for hours, what in (_hours(job, gpus, cost) for gpus in GPUS)]
        lines.append(
            f"| {job.name}, {job.start:.0f} s to start | {job.seconds:.0f} s | {ROWS * job.seconds / 3600:,.0f} | "
            + " | ".join(cells)
            + " |"
        )
    queue = 1 / cost.claim
    lines += [
        "",
        "In brackets what takes the largest part: training, the start of a launch (paid once: a launch of "
        "`python -m bench.truth` holds its GPU and trains row after row), or the queue, where rows are claimed faster "
        f"than it hands them out ({queue:.0f} a second: {GPUS[-1]} GPUs are kept busy by trainings of "
        f"{GPUS[-1] / queue:.0f} s and more). The store ends at {ROWS * cost.bytes / 2**20:.0f} MiB: measurements, not "
        "models.",
        "",
    ]
    return "\n".join(lines)


def _hours(job: Job, gpus: int, cost: StoreCost) -> tuple[float, str]:
    """Hours and what most of them are: rounds of trainings after one start, or the queue where that is slower."""
    parts = {
        "training": -(-ROWS // gpus) * (job.seconds + cost.keep),
        "start": job.start,
        "queue": ROWS * cost.claim if ROWS * cost.claim > -(-ROWS // gpus) * job.seconds else 0.0,
    }
    total = job.start + max(parts["training"], parts["queue"])
    return total / 3600, max(parts, key=lambda name: parts[name])


def main(argv: Sequence[str] | None = None) -> int:
    to = "results/reference/scaling.md"
    try:
        for argument in sys.argv[1:] if argv is None else argv:
            key, equals, value = argument.partition("=")
            if key != "to" or not equals or not value:
                raise UserError(argument, None, "is not understood", allowed=["to=..."])
            to = value
        text = report(measure_store())
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        Path(to).write_text(text, encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
