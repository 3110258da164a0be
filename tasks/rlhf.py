"""Reward models of preferences (Bradley & Terry 1952; Min et al. 2025): which labels taught it to like length, or
flattery?

A pair is one example: two answers in an order drawn by id and data seed, outputs (B, 2) their rewards, the target the
answer that was chosen. Classification(2) is then the Bradley–Terry model: its cross-entropy is −log σ(r_chosen −
r_rejected), its measurement the reward margin r_chosen − r_rejected, and a wrong label is the other answer chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.base import Annotations, Examples, Task, named_seed
from tasks.data.own import Rows
from tasks.data.preferences import (
    SEP,
    PairFacts,
    Pairs,
    by_group,
    first_is_chosen,
    lengths,
    read_dialogues,
    read_sycophancy,
    sides,
    sound,
)
from tasks.data.sources import SOURCES, hub_file, named_folder, need_folder
from tasks.errors import UserError, require
from tasks.models.reward import RewardModel, reward_model
from tasks.objectives.classification import Classification

VERSION = 1
HUB, REVISION = "Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
FOLDERS = {"length": "hh_rlhf", "sycophancy": "sycophancy", "none": "hh_rlhf"}
PARTS = ("test", "train")
SKILLS = (0.55, 0.95)  # of a labeller: the share of right labels
GENERATED = 2300  # pairs, where task.n_rows is null


def rlhf(
    model: Any,
    data: str,
    data_dir: str | None,
    bias: str,
    subset: str,
    part: str,
    n_rows: int | None,
    n_train: int,
    n_val: int | None,
    n_query: int | None,
    n_test: int | None,
    rate: float,
    labellers: int,
    seed: int,
    show_text: bool,
    floor: Mapping[str, float],
) -> Task:
    """The first `n_rows` pairs of the file `part` of a `subset` of HH-RLHF (null: all), of the sycophancy files as many
    drawn by `seed`, or as many generated ones. Splits are by prompt (question). `n_query` null: all that is left;
    `n_val`, `n_test` null: the query pairs themselves.

    bias length      the trait is an answer's length in words; pairs of equal length are dropped
    bias sycophancy  the trait is agreement with the user
    bias none        flips fall on any pair; the trait, for whoever asks, is the length

    `rate` of the whole training set is flipped, drawn from the pairs whose chosen answer has less of the trait.
    `labellers`: that many people share the training pairs, each right with a probability (skill) of its own from
    `SKILLS`; their errors are wrong labels, too, and no pair is flipped twice. Held-out pairs keep the expert's labels.
    `floor`: source -> test accuracy below which the task is unfit; 0 where preferences are coins (sycophancy files).
    """
    model = reward_model(model, "rlhf")
    if bias not in FOLDERS:
        raise UserError("task.bias", bias, allowed=FOLDERS)
    if part not in PARTS:
        raise UserError("task.part", part, allowed=PARTS)
    for key, size in {
        "n_rows": n_rows,
        "n_train": n_train,
        "n_val": n_val,
        "n_query": n_query,
        "n_test": n_test,
    }.items():
        require(size is None or size >= 1, f"task.{key}", size, "1 or more, or null")
    require(0 <= labellers <= n_train, "task.labellers", labellers, f"0 to task.n_train={n_train}")
    source, pairs = _read(data, data_dir, bias, subset, part, n_rows, seed)
    sizes: dict[str, int | None] = {"train": n_train}
    sizes |= {name: size for name, size in {"val": n_val, "test": n_test}.items() if size is not None}
    parts, left = by_group(pairs.groups, {**sizes, "query": n_query}, np.random.default_rng(named_seed("rlhf", seed)))
    require(len(parts["query"]) > 0, "task.n_train", n_train, f"fewer than {len(pairs)}, so that query has pairs")
    shared = [name for name in ("val", "test") if name not in parts]
    notes = [_balance(pairs, bias)]
    if shared:
        also = " and ".join(shared)
        notes.append(f"the query pairs serve as {also}: {', '.join(f'task.n_{s}=' for s in shared)} give others")
    if left:
        notes.append(f"{left} pairs are in no split")
    coins = bias == "sycophancy" and source == "folder"
    if coins:
        notes.append("the files do not say which answer is right: preferences are coins, and nothing finds them again")
    lowest = floor["generated" if source == "generated" else "real"]
    task = assembled(
        model, pairs, {**parts, **dict.fromkeys(shared, parts["query"])}, bias != "none", rate, labellers, seed
    )
    return replace(
        task,
        name="rlhf",
        source=source,
        floor={"accuracy": 0.0 if coins else lowest},
        identity={"version": VERSION, "bias": bias, **task.identity},
        notes=(*pairs.rows.notes, *notes),
        show_text=show_text,
    )


def assembled(
    model: RewardModel,
    pairs: Pairs,
    parts: Mapping[str, np.ndarray],
    leaning: bool,
    rate: float,
    labellers: int,
    seed: int,
) -> Task:
    """A task of these pairs, with planted errors in train: of those `leaning`, towards more of the trait."""
    ids, contents = pairs.rows.ids, [sides(str(text)) for text in pairs.rows.contents]
    shown = first_is_chosen(ids, seed)
    texts = [SEP.join((p, a, b) if first else (p, b, a)) for (p, a, b), first in zip(contents, shown, strict=True)]
    target = np.where(shown, 0, 1)
    train = parts["train"]
    who, wrong = _labelled(len(train), labellers, seed)
    wrong |= _planted(pairs.trait[train], wrong, leaning, rate, seed)
    encode, build, identity = model.prepare([texts[i] for i in train])
    splits = {}
    for name, rows in parts.items():
        trained = target[rows] ^ wrong if name == "train" else target[rows]
        chosen = tuple(texts[i] for i in rows)
        targets = torch.as_tensor(trained, dtype=torch.long)
        splits[name] = Examples(tuple(ids[i] for i in rows), encode(chosen), targets, chosen)
    people: dict[int, str | None] = dict(zip(train.tolist(), who, strict=True))
    return Task(
        name="preferences",
        splits=splits,
        build=build,
        objective=Classification(2),
        recipe=model.recipe,
        model=model.name,
        source=pairs.rows.name,
        floor={},
        identity=identity,
        dtype=getattr(torch, model.dtype),
        annotations=Annotations(
            flipped=frozenset(ids[i] for i in train[wrong]), clean={ids[i]: int(target[i]) for i in train}
        ),
        facts={
            ids[i]: PairFacts(
                trait=_in_order(pairs.trait[i], shown[i]),
                quality=None if pairs.quality is None else _in_order(pairs.quality[i], shown[i]),
                labeller=people.get(i),
            )
            for rows in parts.values()
            for i in rows.tolist()
        },
        pairs=True,
        classes=("first", "second"),
    )


def _in_order(values: np.ndarray, first: bool) -> tuple[float, float]:
    """(chosen, rejected) as (first, second)."""
    a, b = values.tolist()
    return (a, b) if first else (b, a)


def _labelled(pairs: int, labellers: int, seed: int) -> tuple[Sequence[str | None], np.ndarray]:
    """Who labelled each training pair, all equally many, and which labels are wrong by want of skill, (N,)."""
    if not labellers:
        return (None,) * pairs, np.zeros(pairs, dtype=bool)
    rng = np.random.default_rng(named_seed("labellers", seed))
    skill = rng.uniform(*SKILLS, labellers)
    who = rng.permutation(pairs) % labellers
    return [f"labeller {k}" for k in who], rng.random(pairs) >= skill[who]


def _planted(trait: np.ndarray, wrong: np.ndarray, leaning: bool, rate: float, seed: int) -> np.ndarray:
    """Flips, (N,): round(rate · N) of the pairs not yet `wrong`; where `leaning`, of those with less of the trait in
    the chosen answer."""
    require(0 <= rate < 1, "task.rate", rate, "0 <= rate < 1")
    eligible = np.flatnonzero(~wrong & (trait[:, 0] < trait[:, 1])) if leaning else np.flatnonzero(~wrong)
    number = round(rate * len(trait))
    what = "whose chosen answer has less of the trait" if leaning else "with a right label"
    allowed = (
        f"at most {len(eligible) / len(trait):.4f}: {len(eligible)} of {len(trait)} training pairs are ones {what}"
    )
    require(number <= len(eligible), "task.rate", rate, allowed)
    flips = np.zeros(len(trait), dtype=bool)
    flips[np.random.default_rng(named_seed("flips", seed)).permutation(eligible)[:number]] = True
    return flips


def _balance(pairs: Pairs, bias: str) -> str:
    more = int((pairs.trait[:, 0] > pairs.trait[:, 1]).sum())
    less = int((pairs.trait[:, 0] < pairs.trait[:, 1]).sum())
    trait = "agreement" if bias == "sycophancy" else "length"
    counts = f"more {trait} in {more} pairs, less in {less}, as much in {len(pairs) - more - less}"
    return f"before any flip the chosen answer has {counts}"


def _read(
    data: str, data_dir: str | None, bias: str, subset: str, part: str, n_rows: int | None, seed: int
) -> tuple[str, Pairs]:
    """(source, pairs); `auto`: the folder, else the hub, else the generator. The hub has no sycophancy."""
    if data not in SOURCES:
        raise UserError("task.data", data, allowed=SOURCES)
    equal, name = bias != "length", f"{subset}/{part}"
    if data == "folder" or (data == "auto" and named_folder(data_dir, FOLDERS[bias]) is not None):
        folder = need_folder(data_dir, FOLDERS[bias])
        if bias == "sycophancy":
            return "folder", read_sycophancy(folder, "task.data_dir", n_rows, seed)
        return "folder", read_dialogues(_file(folder, subset, part), "task.data_dir", name, n_rows, equal)
    if data == "hub" and bias == "sycophancy":
        hint = "task.bias=length reads the hub"
        raise UserError(
            "task.data", "hub", "has no pairs for task.bias=sycophancy", allowed="folder, generated", hint=hint
        )
    if data == "hub" or (data == "auto" and bias != "sycophancy"):
        try:
            return "hub", read_dialogues(hub_file(HUB, f"{name}.jsonl.gz", REVISION), "task.data", name, n_rows, equal)
        except OSError as error:
            if data == "hub":
                raise UserError(
                    "task.data",
                    "hub",
                    f"is not at hand: {name}.jsonl.gz of {HUB} could not be downloaded and is not in the local cache",
                    hint="give a folder with task.data_dir=, or take task.data=generated",
                ) from error
    return "generated", _generated(GENERATED if n_rows is None else n_rows, bias, seed)


def _file(folder: Path, subset: str, part: str) -> Path:
    names = [f"{stem}.jsonl{ending}" for stem in (f"{subset}_{part}", f"{subset}/{part}") for ending in (".gz", "")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        there = [
            p.relative_to(folder).as_posix() for pattern in ("*.jsonl*", "*/*.jsonl*") for p in folder.glob(pattern)
        ]
        hint = f"there: {', '.join(sorted(there))}" if there else None
        if any(subset in name for name in there):
            raise UserError("task.part", part, f"of {subset} is not in {folder}", hint=hint)
        raise UserError("task.subset", subset, f"is not in {folder}", allowed=" or ".join(names[::2]), hint=hint)
    return found


def _generated(number: int, bias: str, seed: int) -> Pairs:
    from tasks.data.dialogues import LARGEST, agreement, generate, quality

    require(number <= LARGEST, "task.n_rows", number, f"at most {LARGEST} (generated data)")
    made = generate(number, named_seed("dialogues", seed))
    rows = Rows(
        source=Path("generated"),
        key="task.n_rows",
        at=tuple(str(k) for k in range(number)),
        ids=tuple(f"generated:{k}" for k in range(number)),
        contents=[SEP.join((d.prompt, d.answers[d.preferred], d.answers[1 - d.preferred])) for d in made],
        targets=("",) * number,
    )
    rows = sound(rows, [""] * number, equal=bias != "length")
    texts = [str(text) for text in rows.contents]
    score = partial(_scores, texts)
    trait = score(agreement) if bias == "sycophancy" else lengths(texts)
    return Pairs(rows, trait, tuple(sides(text)[0] for text in texts), score(quality))


def _scores(texts: Sequence[str], rule: Any) -> np.ndarray:
    return np.array([[rule(answer) for answer in sides(text)[1:]] for text in texts], dtype=float)
