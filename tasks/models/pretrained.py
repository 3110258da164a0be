"""Models of a hub at a pinned revision, or of a local folder in the hub's layout. Safetensors only, no remote code."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tasks.errors import UserError


@dataclass(frozen=True)
class Files:
    """Where a model's files lie: in `path`, or on the hub. `instead`: a model that needs no download."""

    name: str
    hub: str
    revision: str
    path: str | None
    instead: str

    def place(self) -> dict[str, Any]:
        if self.path is None:
            return {"name": self.hub, "revision": self.revision}
        folder = Path(self.path).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(
                "model.path", self.path, "holds no config.json", allowed="a folder in the hub's layout (safetensors)"
            )
        return {"name": str(folder), "revision": None}

    def fingerprint(self) -> dict[str, Any]:
        """Of a folder its content, of a hub model its pinned revision."""
        if self.path is None:
            return {"hub": self.hub, "revision": self.revision}
        content = hashlib.sha256()
        for file in sorted(Path(self.path).expanduser().iterdir()):
            if file.suffix in {".json", ".safetensors", ".txt", ".model"}:
                content.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return {"folder": content.hexdigest()}

    def unreachable(self, error: Exception) -> UserError:
        """One line for whatever kept the model from loading."""
        reason = " ".join(str(error).split())[:160]
        if self.path is not None:
            return UserError("model.path", self.path, f"cannot be loaded ({reason})")
        return UserError(
            "model",
            self.name,
            f"is not at hand: {self.hub} could not be loaded from the hub ({reason})",
            hint=f"give a local folder with model.path=, or take model={self.instead}, which needs no download",
        )

    def tokenizer(self, beside: str, special: str, without: str, allowed: str) -> Any:
        """The model's own; refused where the `special` token (`pad`, `eos`) is missing, with what it is `without`."""
        from transformers import AutoTokenizer

        place = self.place()
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                place["name"], revision=place["revision"], trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise self.unreachable(error) from error
        if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            raise UserError("model.path", place["name"], "holds no tokenizer", allowed=beside)
        if getattr(tokenizer, f"{special}_token_id") is None:
            raise UserError("model.path", place["name"], f"has a tokenizer without {without}", allowed=allowed)
        return tokenizer

    def load(self, kind: Any, **settings: Any) -> Any:
        """What `kind.from_pretrained` (an Auto class) makes of them, in float32. Attention is eager: it must stand
        double differentiation."""
        place = self.place()
        with quiet():
            try:
                return kind.from_pretrained(
                    place["name"],
                    revision=place["revision"],
                    use_safetensors=True,
                    trust_remote_code=False,
                    attn_implementation="eager",
                    dtype=torch.float32,
                    **settings,
                )
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                raise self.unreachable(error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """The library draws bars, and warns that a head is new, which is meant."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def require_trained(missing: Sequence[str], files: Files, epochs: int) -> None:
    """Refuses to explain, as it is, a model some of whose weights (`missing`) have yet to be trained."""
    if missing and epochs == 0:
        name = files.place()["name"]
        problem = f"is not possible: {name} has no {min(missing)}, so there is no trained model to explain"
        raise UserError("model.recipe.epochs", 0, problem, allowed="1 or more, or a model.path with a trained head")
