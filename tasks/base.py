"""The vocabulary that every floor speaks: Examples, Batch, Recipe, Task, Trajectory."""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tasks.errors import UserError, require

SEP = "\x1e"  # in the text of a pair, between the prompt and the answers
_GLOBAL_RANDOM_STATE = threading.Lock()  # torch has one for all threads, and its initialisers draw from it


@dataclass(frozen=True)
class Batch:
    """What a model sees (`inputs`, keyword arguments of its forward) and what it should say (`targets`)."""

    inputs: dict[str, Tensor]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> "Batch":
        """Moved to `device`; floating-point inputs and targets cast to `dtype`."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, dtype if dtype is not None and t.is_floating_point() else t.dtype)

        return Batch({k: move(v) for k, v in self.inputs.items()}, move(self.targets))


@dataclass(frozen=True)
class Examples:
    """Rows of one split. `ids` are stable: they name the row in the source, whatever is selected from it.

    `inputs[name]` has shape (N, ...); where there is an `attention_mask` (N, T), a batch is cut to its longest row.
    `texts` is what a reader, and a method that reads, would see; vectors have none.
    """

    ids: tuple[str, ...]
    inputs: dict[str, Tensor]
    targets: Tensor
    texts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.ids), len(self.targets), *(len(v) for v in self.inputs.values())}
        if self.texts is not None:
            sizes.add(len(self.texts))
        if len(sizes) != 1:
            raise ValueError(f"examples of different lengths: {sorted(sizes)}")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("example ids are not unique")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each row, (N,), where rows have tokens."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.sum(1)

    def select(self, rows: Sequence[int] | Tensor | np.ndarray) -> "Examples":
        """The rows in the given order."""
        index = torch.as_tensor(np.asarray(rows), dtype=torch.long)
        return Examples(
            tuple(self.ids[i] for i in index.tolist()),
            {k: v[index] for k, v in self.inputs.items()},
            self.targets[index],
            None if self.texts is None else tuple(self.texts[i] for i in index.tolist()),
        )

    def batch(self, rows: Sequence[int] | Tensor | slice = slice(None)) -> Batch:
        """The rows as one batch, without columns that are padding in all of them."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows, dtype=torch.long)
        inputs = {k: v[index] for k, v in self.inputs.items()}
        mask = inputs.get("attention_mask")
        if mask is not None and mask.numel():
            width, longest = mask.shape[1], int(mask.sum(1).max())
            inputs = {k: v[:, :longest] if v.ndim > 1 and v.shape[1] == width else v for k, v in inputs.items()}
        return Batch(inputs, self.targets[index])

    def batches(self, size: int) -> list[Tensor]:
        """Row indices in batches of `size`, rows of like length together, so that little is padding."""
        order = torch.arange(len(self)) if self.lengths is None else torch.argsort(self.lengths, stable=True)
        return list(order.split(size))

    def fingerprint(self) -> str:
        """Changes whenever a row, its id, its order or its target does."""
        digest = hashlib.sha256()
        digest.update("\x00".join(self.ids).encode())
        for name, tensor in [*sorted(self.inputs.items()), ("targets", self.targets)]:
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
        digest.update("\x00".join(self.texts or ()).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: data, not code. Objective: mean over a batch of the per-example losses.

    `weight_decay` γ is either `l2` (½γ‖θ‖² over all parameters is part of the objective, and so of its curvature) or
    `decoupled` (AdamW: no part of the objective). `bucket` batches are pooled and sorted by length before they are cut,
    1 keeps them purely random. `checkpoints` states are kept, the last one is the end of training. `epochs` 0:
    nothing is trained, what is explained are the weights that the model starts from.
    """

    optimizer: str  # sgd | adam | adamw | lbfgs
    lr: float
    epochs: int
    batch_size: int
    weight_decay: float
    decay: str  # l2 | decoupled
    schedule: str  # constant | linear | cosine
    warmup: float  # share of the steps
    momentum: float
    betas: tuple[float, float]
    eps: float
    clip: float | None
    bucket: int
    checkpoints: int
    tolerance: float  # lbfgs: gradient norm at which it stops

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        options = {
            "optimizer": ("sgd", "adam", "adamw", "lbfgs"),
            "decay": ("l2", "decoupled"),
            "schedule": ("constant", "linear", "cosine"),
        }
        for key, allowed in options.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"model.recipe.{key}", getattr(self, key), allowed=allowed)
        require(self.epochs >= 0, "model.recipe.epochs", self.epochs, "0 or more")
        require(self.batch_size >= 1, "model.recipe.batch_size", self.batch_size, "1 or more")
        require(self.lr > 0, "model.recipe.lr", self.lr, "above 0")
        require(self.weight_decay >= 0, "model.recipe.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.warmup < 1, "model.recipe.warmup", self.warmup, "0 <= warmup < 1")
        require(self.bucket >= 1, "model.recipe.bucket", self.bucket, "1 or more")
        require(self.checkpoints >= 1, "model.recipe.checkpoints", self.checkpoints, "1 or more")
        require(self.clip is None or self.clip > 0, "model.recipe.clip", self.clip, "above 0, or null")
        require(0 <= self.momentum < 1, "model.recipe.momentum", self.momentum, "0 <= momentum < 1")
        require(all(0 <= b < 1 for b in self.betas), "model.recipe.betas", list(self.betas), "two numbers, 0 <= b < 1")
        require(self.eps > 0, "model.recipe.eps", self.eps, "above 0")
        require(self.tolerance > 0, "model.recipe.tolerance", self.tolerance, "above 0")
        if self.weight_decay > 0:
            decay = "decoupled" if self.optimizer == "adamw" else "l2"
            require(self.decay == decay, "model.recipe.decay", self.decay, f"{decay} with {self.optimizer}")
        elif self.optimizer == "lbfgs":
            require(
                False, "model.recipe.weight_decay", self.weight_decay, "above 0 with lbfgs: the optimum must be unique"
            )

    @property
    def l2(self) -> float:
        """γ of the objective's own ½γ‖θ‖² (0 where the decay is decoupled)."""
        return self.weight_decay if self.decay == "l2" else 0.0


class Objective(Protocol):
    """What model outputs (B, ...) mean: the training loss, the measurement, and the curvature at the output."""

    @property
    def name(self) -> str:
        """In one word."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Per-example training loss in nats: outputs (..., O), targets (...) -> (...), also of many models, (M, B)."""

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What is attributed, (B,): higher is better for the query."""

    def loss_of_measurement(self, m: Tensor) -> Tensor:
        """ℓ(m), elementwise: the loss of an example whose measurement is m."""

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """f, (B,): the number that the loss is a function of, as a regression sees it (the margin; the prediction)."""

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """−∂ℓ/∂f, (B,): what is left to explain (1 − p; y − f)."""

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """S (B, O, R) with S Sᵀ = ∂²loss/∂outputs² of each example. Raises `NotImplementedError` where its columns
        would be too many: there `hessian_times` is all there is."""

    def hessian_times(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        """(∂²loss/∂outputs²) u of each example, u (..., *outputs.shape) -> the same shape."""

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Targets drawn from the model's own predictive distribution, as in the true Fisher: its quantiles at these
        numbers from [0, 1), one a target, so that an example's draw depends on no other example. NaN stands where there
        is no target, and none is drawn."""

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B,) bool: whether the most probable answer is the target. Raises `NotImplementedError` where none is."""

    def fitness(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """How good the outputs are, named (`accuracy`, `r2`, ...)."""


@dataclass(frozen=True)
class Annotations:
    """Facts that only the judge may know, by example id: `flipped`, and the labels before corruption."""

    flipped: frozenset[str] = frozenset()
    clean: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Data, model, objective and recipe. `identity` is everything that changes what a training on it gives.

    `pairs`: an example is two answers to one prompt, the outputs (B, 2) are their rewards, the target says which of the
    two was preferred. `classes`: names of the class labels by index; `notes`: what a reader should know of the data
    (dropped rows, rare labels), a line each; `places`: of rows of a user's file, by id, their lines (or files);
    `show_text`: whether texts may be written where people read. None of these four changes a training.
    """

    name: str
    splits: Mapping[str, Examples]  # train, val, query, test
    build: Callable[[], nn.Module]  # θ0, drawn from torch's current random state (or loaded)
    objective: Objective
    recipe: Recipe
    model: str
    source: str  # where the data came from: bundled | generated | folder | hub, or the name of a set among several
    floor: Mapping[str, float]  # fitness that a model must reach on test
    identity: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    annotations: Annotations | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # provenance by id, where data is generated; judge's only
    pairs: bool = False
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    show_text: bool = True

    @property
    def train(self) -> Examples:
        return self.splits["train"]

    def public(self) -> "Task":
        """The same without what only the judge may know."""
        return replace(self, annotations=None, facts={})

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch.inputs)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Per-example training loss in nats, (B,)."""
        return self.objective.loss(self.outputs(model, batch), batch.targets)

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is attributed, (B,); higher is better for the query."""
        return self.objective.measure(self.outputs(model, batch), batch.targets)

    def initial(self, seed: int) -> nn.Module:
        """θ0 of a seed; leaves the global random state as it was."""
        with _GLOBAL_RANDOM_STATE, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().to(self.dtype).eval()

    def key(self) -> str:
        """Names the data, the model and the recipe together: two tasks of one key train to the same models."""
        return digest(
            {
                **self.identity,
                "task": self.name,
                "model": self.model,
                "recipe": vars(self.recipe),
                "dtype": str(self.dtype),
                "data": self.fingerprint(),
            }
        )

    def fingerprint(self) -> str:
        return digest({name: split.fingerprint() for name, split in self.splits.items()})


@dataclass(frozen=True)
class Checkpoint:
    """Parameters after `step` steps; `path` is the sum of the learning rates since the checkpoint before. `moments`: of
    Adam, its running means of gradients and of their squares, by parameter."""

    step: int
    parameters: dict[str, Tensor]
    path: float
    moments: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Trajectory:
    """One training: where it started, what was kept on the way, where it ended and what it cost."""

    seed: int
    initial: dict[str, Tensor]
    checkpoints: tuple[Checkpoint, ...]
    seconds: float
    final_loss: float

    @property
    def final(self) -> dict[str, Tensor]:
        return self.checkpoints[-1].parameters


def sides(text: str) -> tuple[str, str, str]:
    """(prompt, first, second) of a pair's text."""
    prompt, first, second = text.split(SEP)
    return prompt, first, second


def digest(content: object) -> str:
    """Hex SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def named_seed(*name: object) -> int:
    """A 63-bit seed from a name: seeds of different names never collide as sums of small integers do."""
    return int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:8], "big") >> 1


def generator(*name: object) -> torch.Generator:
    """A torch generator of its own for each name."""
    return torch.Generator().manual_seed(named_seed(*name))
