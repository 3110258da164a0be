"""Corrupted-label sentiment: SST-2 (Socher et al. 2013, in GLUE's form), or a generated corpus with known grammar."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tasks.base import Examples, Task, named_seed
from tasks.data.corruption import Corruption
from tasks.data.sources import SOURCES, Labelled, hub_file, named_folder, need_folder, read_parquet, read_tsv
from tasks.errors import UserError, require
from tasks.models.encoder import text_model
from tasks.objectives.classification import Classification

VERSION = 1
HUB, REVISION = "nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
LABELS = ("0", "1")
GENERATED_TEST = 1000


def sst2(
    model: Any,
    data: str,
    data_dir: str | None,
    n_train: int,
    n_val: int,
    n_query: int,
    seed: int,
    corruption: Corruption,
    floor: Mapping[str, float],
) -> Task:
    """Training rows from the train file (phrases), val, query and test from the dev file (sentences), drawn by `seed`.

    `floor`: source -> test accuracy below which the task is unfit.
    """
    model = text_model(model, "sst2")
    for key, size in {"n_train": n_train, "n_val": n_val, "n_query": n_query}.items():
        require(size >= 1, f"task.{key}", size, "1 or more")
    source, pools, facts = _read(data, data_dir, n_train, n_val, n_query, seed)
    require(n_train <= len(pools["train"]), "task.n_train", n_train, f"at most {len(pools['train'])} ({source} data)")
    held = len(pools["held_out"])
    require(
        n_val + n_query < held,
        "task.n_query",
        n_query,
        f"at most {held - n_val - 1} ({source} data, less val and test)",
    )

    rng = np.random.default_rng(named_seed("sst2", seed))
    rows = {"train": pools["train"].select(rng.permutation(len(pools["train"]))[:n_train].tolist())}
    order = rng.permutation(held)
    for name, chosen in zip(("val", "query", "test"), np.split(order, [n_val, n_val + n_query]), strict=True):
        rows[name] = pools["held_out"].select(chosen.tolist())

    train = rows["train"]
    labels, annotations = corruption.apply(train.ids, np.array(train.labels), 2, _bag_of_words(train.texts), seed)
    tokenize, build, identity = model.prepare(train.texts, 2)
    splits = {}
    for name, part in rows.items():
        targets = labels if name == "train" else np.array(part.labels)
        splits[name] = Examples(part.ids, tokenize(part.texts), torch.as_tensor(targets, dtype=torch.long), part.texts)
    return Task(
        name="sst2",
        splits=splits,
        build=build,
        objective=Classification(2),
        recipe=model.recipe,
        model=model.name,
        source=source,
        floor={"accuracy": floor["generated" if source == "generated" else "real"]},
        identity={"version": VERSION, **identity},
        dtype=getattr(torch, model.dtype),
        annotations=annotations,
        facts={i: facts[i] for part in rows.values() for i in part.ids if i in facts},
    )


def _read(
    data: str, data_dir: str | None, n_train: int, n_val: int, n_query: int, seed: int
) -> tuple[str, dict[str, Labelled], dict[str, Any]]:
    """(source, {"train", "held_out"}, provenance by id); `auto`: the folder, else the hub, else the generator."""
    if data not in SOURCES:
        raise UserError("task.data", data, allowed=SOURCES)
    if data == "folder" or (data == "auto" and named_folder(data_dir, "sst2") is not None):
        folder = need_folder(data_dir, "sst2")
        files = {"train": folder / "train.tsv", "held_out": folder / "dev.tsv"}
        return "folder", {k: read_tsv(path, "sentence", "label", LABELS) for k, path in files.items()}, {}
    if data in ("auto", "hub"):
        try:
            pools = {
                pool: read_parquet(
                    hub_file(HUB, f"sst2/{split}-00000-of-00001.parquet", REVISION), split, "sentence", "label", 2
                )
                for pool, split in {"train": "train", "held_out": "validation"}.items()
            }
            return "hub", pools, {}
        except OSError as error:
            if data == "hub":
                raise UserError(
                    "task.data",
                    "hub",
                    f"is not at hand: {HUB} could not be downloaded and is not in the local cache",
                    hint="give a folder with task.data_dir=, or take task.data=generated",
                ) from error
    from tasks.data.sentiment_grammar import LARGEST, generate

    held_out = n_val + n_query + GENERATED_TEST
    require(n_train + held_out <= LARGEST, "task.n_train", n_train, f"at most {LARGEST - held_out} (generated data)")
    sentences = generate(n_train + held_out, seed)
    ids = tuple(f"generated:{i}" for i in range(len(sentences)))
    rows = Labelled(ids, tuple(s.text for s in sentences), tuple(s.label for s in sentences))
    pools = {"train": rows.select(range(n_train)), "held_out": rows.select(range(n_train, len(rows)))}
    return "generated", pools, dict(zip(ids, sentences, strict=True))


def _bag_of_words(texts: tuple[str, ...]) -> Any:
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(token_pattern=r"\S+").fit_transform(texts)
