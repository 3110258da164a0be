"""Where labelled sentences come from: a folder of TSV files, the hub at a pinned revision, or the generator."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from tasks.errors import UserError

SOURCES = ("auto", "hub", "folder", "generated")


@dataclass(frozen=True)
class Labelled:
    """Rows of one file: ids name the row in the source."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int]) -> "Labelled":
        return Labelled(
            tuple(self.ids[i] for i in rows), tuple(self.texts[i] for i in rows), tuple(self.labels[i] for i in rows)
        )


def named_folder(data_dir: str | None, name: str) -> Path | None:
    """The folder that the user gave, or $BENCH_DATA/<name> where it exists."""
    if data_dir is not None:
        return Path(data_dir).expanduser()
    root = os.environ.get("BENCH_DATA")
    folder = Path(root).expanduser() / name if root else None
    return folder if folder is not None and folder.is_dir() else None


def need_folder(data_dir: str | None, name: str) -> Path:
    """As `named_folder`, or one line that says what is missing."""
    folder = named_folder(data_dir, name)
    if folder is None:
        raise UserError(
            "task.data",
            "folder",
            "needs a folder",
            hint=f"give task.data_dir=, or BENCH_DATA with a folder {name}/ in it",
        )
    if not folder.is_dir():
        raise UserError("task.data_dir", str(folder), "is no folder")
    return folder


def read_tsv(path: Path, text: str, label: str, labels: Sequence[str]) -> Labelled:
    """A tab-separated file with a header; columns are found by name, in either order. No quoting, as GLUE has none.

    A missing column, an empty text or something that is no label is told with its line.
    """
    if not path.is_file():
        raise UserError("task.data_dir", str(path.parent), f"has no {path.name}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError("task.data_dir", str(path), f"is not UTF-8 (byte {error.start})") from error
    if lines[-1] == "":
        lines.pop()
    header = lines[0].rstrip("\r").split("\t") if lines else []
    for column in (text, label):
        if column not in header:
            raise UserError(
                "task.data_dir", str(path), f"has no column {column!r}", allowed=f"a header with {text} and {label}"
            )
    text_at, label_at = header.index(text), header.index(label)
    texts, values = [], []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(header):
            raise UserError(
                "task.data_dir",
                f"{path}:{number}",
                f"has {len(cells)} columns",
                allowed=f"{len(header)}, as in the header",
            )
        if cells[label_at] not in labels:
            raise UserError("task.data_dir", f"{path}:{number}", f"has label {cells[label_at]!r}", allowed=labels)
        if not cells[text_at].strip():
            raise UserError("task.data_dir", f"{path}:{number}", "has an empty text", hint="remove the row")
        texts.append(cells[text_at].strip())
        values.append(labels.index(cells[label_at]))
    ids = tuple(f"{path.stem}:{i}" for i in range(len(texts)))
    return Labelled(ids, tuple(texts), tuple(values))


def hub_file(repository: str, name: str, revision: str) -> Path:
    """A file of a data set at a pinned revision, from the local cache or the hub. OSError where neither has it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def get(local: bool) -> Path:
        found = hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_files_only=local)
        return Path(found)

    try:
        return get(local=True)
    except LocalEntryNotFoundError:
        if not hub_reachable():
            raise
        return get(local=False)


def hub_reachable(seconds: float = 3.0) -> bool:
    """Whether a connection opens at once: the hub's own client would try for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    place = urlparse(constants.ENDPOINT)
    try:
        with socket.create_connection((place.hostname, place.port or 443), timeout=seconds):
            return True
    except OSError:
        return bool(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"))


def read_parquet(path: Path, split: str, text: str, label: str, classes: int) -> Labelled:
    """A hub data set's table; rows without a label (-1) are no rows of a benchmark."""
    from datasets import Dataset

    table: Mapping[str, Sequence] = Dataset.from_parquet(str(path), split=split).to_dict()
    for column in (text, label):
        if column not in table:
            raise UserError("task.data", "hub", f"has no column {column!r} in {path.name}")
    rows = [i for i, y in enumerate(table[label]) if 0 <= y < classes and table[text][i].strip()]
    return Labelled(
        tuple(f"{split}:{i}" for i in rows),
        tuple(table[text][i].strip() for i in rows),
        tuple(int(table[label][i]) for i in rows),
    )
