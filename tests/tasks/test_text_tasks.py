"""SST-2 from a folder, the hub's cache or the generator; text encoders from scratch and pretrained."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small_tasks import assert_same, recipe

from tasks.base import Task
from tasks.data.corruption import Corruption
from tasks.errors import UserError
from tasks.models.encoder import PretrainedEncoder, ScratchBert, padded, word_pieces
from tasks.models.mlp import MLP
from tasks.sst2 import HUB, REVISION, sst2
from tasks.training.engines import Executor
from tasks.training.plan import planned, random_subsets
from tasks.training.retrain import retrain
from tasks.training.train import load, train

ROOT = Path(__file__).parents[2]
ADAMW = recipe(optimizer="adamw", lr=0.01, decay="decoupled", weight_decay=0.01, epochs=1, batch_size=8, bucket=2)
BERT = ScratchBert("tiny", 1, 8, 2, 16, 300, 16, 0.0, 0.02, "float32", ADAMW)
WORDS = ("good", "fine", "great", "bad", "poor", "film", "plot", "cast", "scene", "story")


def rows(number: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) + f" {seed}{i}" for i in range(number)]
    return pd.DataFrame({"sentence": texts, "label": rng.integers(0, 2, number)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Training rows with the text first, dev rows with the label first."""
    place = tmp_path / "sst2"
    place.mkdir()
    rows(60, 0).to_csv(place / "train.tsv", sep="\t", index=False)
    rows(40, 1)[["label", "sentence"]].to_csv(place / "dev.tsv", sep="\t", index=False)
    return place


def made(
    data: str = "generated",
    data_dir: Path | None = None,
    model: Any = BERT,
    n: tuple[int, int, int] = (40, 10, 12),
    seed: int = 0,
    corruption: Corruption | None = None,
) -> Task:
    place = None if data_dir is None else str(data_dir)
    floor = {"generated": 0.7, "real": 0.6}
    return sst2(model, data, place, *n, seed, corruption or Corruption(0.1, "uniform"), floor)


@pytest.mark.parametrize("kind", ["uniform", "one_class", "hard"])
def test_a_folder_becomes_a_task(folder: Path, kind: str) -> None:
    task = made("folder", folder, corruption=Corruption(0.1, kind))
    assert (task.source, dict(task.floor)) == ("folder", {"accuracy": 0.6})
    assert {k: len(v) for k, v in task.splits.items()} == {"train": 40, "val": 10, "query": 12, "test": 18}
    ids = [i for split in task.splits.values() for i in split.ids]
    assert len(set(ids)) == len(ids)
    files = {"train": rows(60, 0), "dev": rows(40, 1)}
    assert task.annotations is not None and len(task.annotations.flipped) == 4
    for name, split in task.splits.items():
        assert split.texts is not None
        for i, text, y in zip(split.ids, split.texts, split.targets.tolist(), strict=True):
            file, row = i.split(":")
            assert file == ("train" if name == "train" else "dev")
            assert text == files[file].sentence[int(row)]
            assert (y != files[file].label[int(row)]) == (name == "train" and i in task.annotations.flipped)
    if kind == "one_class":
        assert {task.annotations.clean[i] for i in task.annotations.flipped} == {1}


def test_the_data_seed_chooses_rows_and_flips(folder: Path) -> None:
    one, same, other = (made("folder", folder, seed=s) for s in (1, 1, 2))
    assert one.key() == same.key() and one.annotations == same.annotations
    assert one.train.ids != other.train.ids and one.fingerprint() != other.fingerprint()
    clean = made("folder", folder, seed=1, corruption=Corruption(0.0, "uniform"))
    assert clean.train.ids == one.train.ids and clean.key() != one.key()


def test_impossible_sizes_and_places_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCH_DATA", raising=False)
    assert len(made("folder", folder, n=(60, 19, 20)).splits["test"]) == 1
    refused: list[tuple[Callable[[], Task], str]] = [
        (lambda: made("folder", folder, n=(61, 5, 5)), r"task\.n_train=61 .*at most 60 \(folder data\)"),
        (lambda: made("folder", folder, n=(40, 20, 20)), r"task\.n_query=20 .*at most 19"),
        (lambda: made("folder", folder, n=(40, 0, 20)), r"task\.n_val=0"),
        (lambda: made("folder", None), r"task\.data=folder needs a folder.*BENCH_DATA"),
        (lambda: made("folder", folder / "none"), r"task\.data_dir=.*none is no folder"),
        (lambda: made("auto", folder / "none"), r"task\.data_dir=.*none is no folder"),
        (lambda: made("web"), r"task\.data=web .*auto, hub, folder, generated"),
        (lambda: made(model=MLP("mlp", (), 0.0, "float64", recipe())), r"model=mlp does not read text"),
    ]
    for make, problem in refused:
        with pytest.raises(UserError, match=problem) as told:
            make()
        assert "\n" not in str(told.value)
    (folder / "dev.tsv").unlink()
    with pytest.raises(UserError, match=r"has no dev\.tsv"):
        made("folder", folder)


def test_auto_takes_the_folder_of_bench_data_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DATA", str(folder.parent))
    found = made("auto")
    assert found.source == "folder" and found.key() == made("folder", folder).key()
    assert made("generated").source == "generated"


def test_generated_data_is_another_task_with_known_facts(folder: Path) -> None:
    task = made("generated")
    assert (task.source, dict(task.floor)) == ("generated", {"accuracy": 0.7})
    assert len(task.splits["test"]) == 1000
    ids = {i for split in task.splits.values() for i in split.ids}
    assert set(task.facts) == ids
    assert task.annotations is not None
    assert all(task.facts[i].label == task.annotations.clean[i] for i in task.train.ids)
    assert task.key() != made("folder", folder).key()
    assert task.public().facts == {}


OFFLINE = """
import json, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from test_text_tasks import made, rows
from tasks.errors import UserError
from tasks.sst2 import HUB, REVISION
import datasets, tokenizers, huggingface_hub  # imported beforehand: only the look for the data is timed

def told(**options):
    started = time.perf_counter()
    try:
        answer = made(**options)
    except UserError as error:
        return {"error": str(error), "seconds": time.perf_counter() - started}
    return {"source": answer.source, "key": answer.key(), "train": list(answer.train.texts), "ids": answer.train.ids}

out = {"hub": told(data="hub"), "auto": told(data="auto")}
cache = Path(sys.argv[2]) / "hub" / ("datasets--" + HUB.replace("/", "--"))
snapshot = cache / "snapshots" / REVISION / "sst2"
snapshot.mkdir(parents=True)
(cache / "refs").mkdir()
(cache / "refs" / "main").write_text(REVISION)
rows(60, 0).to_parquet(snapshot / "train-00000-of-00001.parquet")
out["half"] = told(data="auto")
rows(40, 1).to_parquet(snapshot / "validation-00000-of-00001.parquet")
out |= {"cached": told(data="hub"), "cached_auto": told(data="auto")}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Without a network: first with an empty cache, then with the file laid out as the hub's client does."""
    home = tmp_path_factory.mktemp("home")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "BENCH_", "HUGGINGFACE_"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(OFFLINE), str(Path(__file__).parent), str(home)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_unreachable_hub_is_told_quickly_in_one_line(offline: dict[str, Any]) -> None:
    told = offline["hub"]["error"]
    assert told.startswith("task.data=hub is not at hand: nyu-mll/glue") and "\n" not in told
    assert "task.data_dir=" in told and "task.data=generated" in told
    assert offline["hub"]["seconds"] < 5


def test_auto_falls_back_to_the_generator(offline: dict[str, Any]) -> None:
    assert offline["auto"]["source"] == offline["half"]["source"] == "generated"
    assert offline["auto"]["key"] == made("generated").key(), "one key in every process"


def test_the_hubs_cache_is_enough(offline: dict[str, Any]) -> None:
    found = offline["cached"]
    assert found == offline["cached_auto"] and found["source"] == "hub"
    texts = rows(60, 0).sentence
    assert [texts[int(i.removeprefix("train:"))] for i in found["ids"]] == found["train"]
    assert len(found["ids"]) == 40


def test_an_error_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    def fail(*_: object, local_files_only: bool, **__: object) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        raise RepositoryNotFoundError("404", response=type("Response", (), {"headers": {}, "request": None})())

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("tasks.data.sources.hub_reachable", lambda: True)
    with pytest.raises(UserError, match=r"task\.data=hub is not at hand"):
        made("hub")
    assert HUB == "nyu-mll/glue" and len(REVISION) == 40 and int(REVISION, 16)


@pytest.mark.skipif("BENCH_DATA" not in os.environ, reason="BENCH_DATA names no folder with real data")
def test_real_sst2_reads() -> None:
    place = Path(os.environ["BENCH_DATA"]) / "sst2"
    if not place.is_dir():
        pytest.skip("BENCH_DATA has no sst2/")
    task = made("folder", place, n=(500, 100, 200))
    assert len(task.splits["test"]) == 872 - 300
    assert {i.split(":")[0] for i in task.train.ids} == {"train"}
    assert 0.4 < task.splits["test"].targets.double().mean() < 0.6
    with pytest.raises(UserError, match="at most 67349"):
        made("folder", place, n=(10**6, 100, 200))


PIECES = """
import hashlib, json, sys
from tasks.models.encoder import word_pieces
print(hashlib.sha256(json.dumps(word_pieces(json.loads(sys.argv[1]), 300)).encode()).hexdigest())
"""


def test_word_pieces_are_the_same_in_every_process() -> None:
    texts = made("generated").train.texts
    assert texts is not None
    mine = word_pieces(texts, 300)
    assert mine[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(mine)) == len(mine) <= 300
    launches = [
        subprocess.Popen(
            [sys.executable, "-c", PIECES, json.dumps(texts)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    found = {launch.communicate(timeout=100)[0] for launch in launches}
    assert found == {hashlib.sha256(json.dumps(mine).encode()).hexdigest() + "\n"}


def test_texts_of_known_words_are_split_into_known_pieces() -> None:
    task = made("generated")
    ids, mask = task.train.inputs["input_ids"], task.train.inputs["attention_mask"]
    assert (ids[:, 0] == 2).all(), "[CLS] first"
    assert (ids.gather(1, mask.sum(1, keepdim=True) - 1) == 3).all(), "[SEP] last"
    assert ids.shape[1] <= 16 and (ids[mask == 0] == 0).all()
    assert (ids == 1).float().mean() < 0.01, "the vocabulary covers its own letters"


def test_padding_is_on_the_right_and_masked() -> None:
    assert {k: v.tolist() for k, v in padded([[5, 6, 7], [8]], pad=9).items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


def test_scratch_bert_trains_and_padding_says_nothing() -> None:
    task = made("generated")
    seed = 3
    trained = train(task, seed)
    assert_same(train(task, seed).final, trained.final)
    assert any(not torch.equal(trained.final[k], trained.initial[k]) for k in trained.final)
    model = load(task.initial(0), trained.final)
    query = task.splits["query"]
    alone = torch.cat([task.measure(model, query.batch([i])) for i in range(len(query))])
    torch.testing.assert_close(alone, task.measure(model, query.batch()), rtol=1e-4, atol=1e-5)
    assert made("generated", model=replace(BERT, width=16)).key() != task.key()
    with pytest.raises(UserError, match=r"model\.width=9 .*model\.heads=2"):
        replace(BERT, width=9)
    with pytest.raises(UserError, match=r"model\.max_length"):
        replace(BERT, max_length=3)


def test_an_engine_that_cannot_train_a_model_is_one_line(tmp_path: Path) -> None:
    """A transformer looks at its mask's values, which a stack of models cannot."""
    plan = planned(random_subsets(40, 3, 0.5, 0), 1, "common", 0, 0)
    with pytest.raises(UserError, match=r"executor\.engine=vectorised"):
        retrain(made("generated"), plan, tmp_path, Executor("vectorised", 1))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A tiny BERT as `save_pretrained` leaves it."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    place = tmp_path / "encoder"
    torch.manual_seed(0)
    vocabulary = word_pieces(made("generated").train.texts or (), 200)
    own = BertWordPieceTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, lowercase=True)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=own._tokenizer, **names).save_pretrained(place)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(place)
    assert (place / "model.safetensors").is_file()
    return place


def pretrained(place: Path) -> PretrainedEncoder:
    return PretrainedEncoder("local", "nobody/nothing", "0" * 40, str(place), 16, "float32", replace(ADAMW, epochs=1))


def test_a_pretrained_encoder_is_read_from_a_folder_and_trains(encoder: Path) -> None:
    from safetensors.torch import load_file

    spec = pretrained(encoder)
    task = made("generated", model=spec, n=(8, 4, 4))
    saved = load_file(encoder / "model.safetensors")
    one, other = task.initial(1).state_dict(), task.initial(2).state_dict()
    for name, value in saved.items():
        assert torch.equal(one[f"network.bert.{name}"], value), "the weights below are those of the folder"
    head = "network.classifier.weight"
    assert torch.equal(one[head], task.initial(1).state_dict()[head])
    assert not torch.equal(one[head], other[head]), "the head above is of the seed"
    made_one = train(task, 1)
    assert made_one.checkpoints[-1].step == 1 and np.isfinite(made_one.final_loss)
    name = "network.bert.embeddings.word_embeddings.weight"
    assert not torch.equal(made_one.final[name], made_one.initial[name])
    assert made("generated", model=spec, n=(8, 4, 4)).key() == task.key()
    from transformers import AutoModel

    again = AutoModel.from_pretrained(encoder)
    with torch.no_grad():
        again.embeddings.word_embeddings.weight[7, 0] += 1
    again.save_pretrained(encoder)
    assert made("generated", model=spec, n=(8, 4, 4)).key() != task.key(), "a folder is named by its content"


def as_pickle(place: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()


def without_config(place: Path) -> None:
    (place / "config.json").unlink()


def broken_config(place: Path) -> None:
    (place / "config.json").write_text("{")


def truncated(place: Path) -> None:
    path = place / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def of_another_shape(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))


def without_tokenizer(place: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (place / name).unlink(missing_ok=True)


def removed(place: Path) -> None:
    place.rename(place.with_name("elsewhere"))


@pytest.mark.parametrize(
    "spoil", [as_pickle, without_config, broken_config, truncated, of_another_shape, without_tokenizer, removed]
)
def test_a_folder_that_cannot_be_used_is_one_line(encoder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(encoder)
    with pytest.raises(UserError, match=r"^model\.path=") as told:
        made("generated", model=pretrained(encoder), n=(8, 4, 4))
    assert "\n" not in str(told.value) and str(encoder) in str(told.value)
