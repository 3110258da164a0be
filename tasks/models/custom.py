"""What a user brings as a model: weights to start from, and a network that a callable of his own makes."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from tasks.base import Recipe
from tasks.errors import UserError, require

CONVERT = "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
NAMED = 3  # tensors that an error names
KINDS = {"features": "vectors", "vocabulary": "text"}  # what the callable is told the size of, and what it then reads
TOKENS = 4  # of the rows that a network of text is tried on


@dataclass(frozen=True, eq=False)
class Weights:
    """Parameters to start from, θ0, by name; `fingerprint`: of the file's content."""

    path: str
    tensors: Mapping[str, Tensor]
    fingerprint: str


def read_weights(path: str) -> Weights:
    """A safetensors file. Other formats are pickles, which run what they hold: they are not opened."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError("model.path", path, "is no file", allowed="a file of weights, .safetensors")
    if file.suffix.lower() != ".safetensors":
        problem = "is no .safetensors file, and nothing else is opened"
        raise UserError("model.path", path, problem, hint=f"where you trust it, convert it: {CONVERT}")
    try:
        content = file.read_bytes()
        tensors = load(content)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        problem = f"cannot be read ({' '.join(str(error).split())[:160]})"
        raise UserError("model.path", path, problem, hint=f"write it by {CONVERT}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError("model.path", path, f"holds numbers that are not finite, in {name}")
    return Weights(path, tensors, hashlib.sha256(content).hexdigest())


def started(model: nn.Module, weights: Weights | None) -> nn.Module:
    """The model with these weights, as precise as they are; refused unless names and shapes are the model's own."""
    if weights is None:
        return model
    own = model.state_dict()
    shared = set(own) - {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # under another name
    wrong = [
        f"{name} is {_shape(weights.tensors.get(name))} in the file and {_shape(own.get(name))} in the model"
        for name in dict.fromkeys([*own, *weights.tensors])
        if _shape(weights.tensors.get(name)) != _shape(own.get(name))
        and not (name in shared and name not in weights.tensors)
    ]
    if wrong:
        more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        problem = f"does not fit the model: {', '.join(wrong[:NAMED])}{more}"
        raise UserError(
            "model.path", weights.path, problem, hint="give the settings of the model that it was saved from"
        )
    if any(tensor.dtype == torch.float64 for tensor in weights.tensors.values()):
        model = model.double()
    model.load_state_dict(dict(weights.tensors), strict=False)
    return model


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"({', '.join(str(size) for size in tensor.shape)})"


def require_start(path: str | None, recipe: Recipe) -> None:
    """Without an epoch of training there must be something that was trained before."""
    hint = "nothing would be trained: name the weights to explain by model.path="
    require(recipe.epochs > 0 or path is not None, "model.recipe.epochs", 0, "1 or more without model.path", hint)


class ByPosition(nn.Module):
    """x -> network(x), whatever the network calls its argument."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


@dataclass(frozen=True)
class Custom:
    """`make(features, outputs, **settings)` gives a module: x (B, features) -> (B, outputs);
    `make(vocabulary, outputs, **settings)` gives one of text: input_ids, attention_mask (B, T) -> (B, outputs).

    Random numbers of the initialisation come from torch's global state, which the seed sets. Text is read through a
    WordPiece vocabulary of the training texts, or of vocab.txt beside the weights. `path`: weights to start from.
    """

    name: str
    make: Callable[..., Any]
    settings: Mapping[str, Any]
    vocabulary: int
    max_length: int
    dtype: str
    recipe: Recipe
    path: str | None
    _tried: set[tuple[int, int]] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float64"):
            raise UserError("model.dtype", self.dtype, allowed=("float32", "float64"))
        require(self.max_length >= 4, "model.max_length", self.max_length, "4 or more")
        allowed = "sgd or adamw with model=custom: the loss may have no unique optimum"
        require(self.recipe.optimizer != "lbfgs", "model.recipe.optimizer", "lbfgs", allowed)
        require_start(self.path, self.recipe)
        own, anything = _arguments(self.make, self.name)
        mine = [name for name in own if name not in (*KINDS, "outputs")]
        for setting in self.settings:
            if setting not in mine and not anything:
                hint = f"{self.name} takes no other"
                raise UserError(f"model.{setting}", None, "is no key", allowed=mine or "none", hint=hint)
        for name in mine:
            if own[name].default is inspect.Parameter.empty and name not in self.settings:
                raise UserError(f"model.{name}", None, "is missing", hint=f"{self.name} needs it: model.{name}=...")

    @cached_property
    def start(self) -> Weights | None:
        return None if self.path is None else read_weights(self.path)

    def build(self, features: int, outputs: int) -> nn.Module:
        """A network of vectors."""
        return self._built("features", features, outputs)

    def prepare(self, texts: Sequence[str], classes: int) -> tuple[Any, Callable[[], nn.Module], dict[str, Any]]:
        """The tokenizer of these training texts, the builder of θ0, and what identifies both."""
        from tasks.models.encoder import vocabulary_of, word_piece_tokenizer

        pieces = vocabulary_of(texts, self.vocabulary, self.path)
        identity = {**self.identity(), "vocabulary": pieces, "max_length": self.max_length}
        return (
            word_piece_tokenizer(pieces, self.max_length),
            partial(self._built, "vocabulary", len(pieces), classes),
            identity,
        )

    def identity(self) -> dict[str, object]:
        """What tells two of one name apart: the code, its settings, the weights."""
        start = {} if self.start is None else {"start": self.start.fingerprint}
        return {"make": _qualified(self.make), "code": _code(self.make), "settings": dict(self.settings), **start}

    def _built(self, kind: str, size: int, outputs: int) -> nn.Module:
        own, anything = _arguments(self.make, self.name)
        if kind not in own and not anything:
            problem = f"has no argument {kind!r}, so its network does not read {KINDS[kind]}"
            raise UserError("model.make", self.name, problem, allowed=f"make({kind}, outputs, ...)")
        model = self.make(**{kind: size, "outputs": outputs}, **self.settings)
        if not isinstance(model, nn.Module):
            raise UserError("model.make", self.name, f"gives a {type(model).__name__}", allowed="a torch.nn.Module")
        model = started(model, self.start)
        if kind == "features" and "x" not in inspect.signature(model.forward).parameters:
            model = ByPosition(model)
        if (size, outputs) not in self._tried:
            self._try(model, kind, size, outputs)
            self._tried.add((size, outputs))
        return model

    def _try(self, model: nn.Module, kind: str, size: int, outputs: int) -> None:
        """Two rows through the network, as it is trained: told before anything is."""
        like = next(model.parameters(), None)
        if like is None:
            raise UserError("model.make", self.name, "gives a network without parameters")
        if kind == "features":
            inputs = {"x": torch.stack([torch.zeros(size, dtype=like.dtype), torch.ones(size, dtype=like.dtype)])}
        else:
            ids = torch.ones(2, TOKENS, dtype=torch.long)
            inputs = {"input_ids": ids, "attention_mask": ids.clone()}
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        training = model.training
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                found = model.train()(**inputs)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            problem = f"gives a network that cannot read {', '.join(inputs)} ({reason})"
            raise UserError("model.make", self.name, problem) from error
        model.train(training)
        if not isinstance(found, Tensor) or found.shape != (2, outputs):
            shape = _shape(found) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise UserError("model.make", self.name, f"gives outputs {shape} for 2 rows", allowed=f"(2, {outputs})")
        running = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
        if running:
            problem = f"keeps running statistics ({running[0]}), which are no parameters"
            raise UserError("model.make", self.name, problem, allowed="LayerNorm or GroupNorm, say")


def custom(
    make: str | Callable[..., Any],
    name: str | None,
    vocabulary: int,
    max_length: int,
    dtype: str,
    recipe: Recipe,
    path: str | None = None,
    **settings: Any,
) -> Custom:
    """`make`: the callable, or its dotted name; `settings` are its own arguments."""
    if isinstance(make, str):
        try:
            found = resolve_name(make)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError("model.make", make, "cannot be imported", hint=reason) from None
    else:
        found = make
    if not callable(found):
        raise UserError("model.make", make, "cannot be called", allowed="a function or a class")
    called = name or str(getattr(found, "__name__", type(found).__name__))
    return Custom(called, found, settings, vocabulary, max_length, dtype, recipe, path)


def _arguments(make: Callable[..., Any], name: str) -> tuple[dict[str, inspect.Parameter], bool]:
    """Those with a name, and whether it takes any other."""
    try:
        found = inspect.signature(make).parameters
    except (TypeError, ValueError) as error:
        problem = "has no signature that can be read"
        raise UserError("model.make", name, problem, allowed="make(features, outputs, ...)") from error
    named = {p: v for p, v in found.items() if v.kind in (v.POSITIONAL_OR_KEYWORD, v.KEYWORD_ONLY)}
    return named, any(v.kind is v.VAR_KEYWORD for v in found.values())


def _qualified(make: Callable[..., Any]) -> str:
    kind = make if hasattr(make, "__qualname__") else type(make)
    return f"{kind.__module__}.{kind.__qualname__}"


def _code(make: Callable[..., Any]) -> str | None:
    """Fingerprint of the file that the callable stands in: edited, it makes another model."""
    try:
        file = inspect.getfile(make if hasattr(make, "__qualname__") else type(make))
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None
