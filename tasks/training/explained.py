"""The explained trainings, made once and kept: every method explains the same runs."""

import hashlib
import json
import os
import uuid
import warnings
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tasks.base import Checkpoint, Task, Trajectory, named_seed
from tasks.errors import UserError
from tasks.training.plan import explained_seed
from tasks.training.train import train

VERSION = 2
MOMENTS = ("mean", "square")  # of gradients, where the optimizer is Adam


def explained(task: Task, seed: int, k: int, root: Path) -> Trajectory:
    """The k-th explained training of the run that the user calls `seed`; k = 0 is the run itself, others are
    independent."""
    number = explained_seed(seed) if k == 0 else named_seed("explained", seed, "member", k)
    return kept(task, number, root, f"{seed}-{k}")


def kept(task: Task, number: int, root: Path, name: str) -> Trajectory:
    """The training of this seed number, read from `root` where it is, else made and kept there under `name`; who comes
    second waits for the first."""
    folder = root / f"{task.name}-{task.model}-{task.key()[:16]}-v{VERSION}"
    path = folder / f"{name}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            if path.exists():
                found = _read(path, number)
                if found is not None:
                    return found
                warnings.warn(f"{path} is damaged: it is trained again", stacklevel=2)
            made = train(task, number)
            _write(path, made)
            return made
    except OSError as error:
        raise UserError("out", str(root), f"cannot be written ({error.strerror})") from error


def _write(path: Path, trajectory: Trajectory) -> None:
    tensors = {f"initial/{name}": value for name, value in trajectory.initial.items()}
    for c, checkpoint in enumerate(trajectory.checkpoints):
        tensors |= {f"{c}/{name}": value.contiguous() for name, value in checkpoint.parameters.items()}
        for kind, moments in zip(MOMENTS, checkpoint.moments or (), strict=False):
            tensors |= {f"{kind}{c}/{name}": value.contiguous() for name, value in moments.items()}
    facts = {
        "seed": trajectory.seed,
        "seconds": trajectory.seconds,
        "final_loss": trajectory.final_loss,
        "checkpoints": [{"step": c.step, "path": c.path} for c in trajectory.checkpoints],
    }
    content = save(tensors, {"trajectory": json.dumps(facts)})
    aside = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def _read(path: Path, seed: int) -> Trajectory | None:
    """None where the file is not what was written."""
    checksum = path.with_suffix(".sha256")
    if not checksum.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != checksum.read_text():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["trajectory"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError:
        return None
    if facts["seed"] != seed:
        return None

    def part(prefix: str) -> dict:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    def checkpoint(i: int, said: dict) -> Checkpoint:
        first, second = (part(f"{kind}{i}/") for kind in MOMENTS)
        return Checkpoint(said["step"], part(f"{i}/"), said["path"], (first, second) if second else None)

    return Trajectory(
        seed=seed,
        initial=part("initial/"),
        checkpoints=tuple(checkpoint(i, said) for i, said in enumerate(facts["checkpoints"])),
        seconds=facts["seconds"],
        final_loss=facts["final_loss"],
    )
