"""tasks/unlearning: the model decides the corpus; what is held out is never trained on; mistakes are told by name."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.config import check, compose
from bench.run import build_task
from tasks.base import Recipe, Task
from tasks.errors import UserError
from tasks.models.gpt import ScratchGPT, answered
from tasks.objectives.language_model import NO_TARGET
from tasks.training.train import load, train

SMALL = (
    *("task.sentiment.n_train=60", "task.sentiment.n_val=10", "task.sentiment.n_query=5"),
    "task.sentiment.n_nonmembers=30",
)
FEW = ("model=authors_gpt", "task.authors.authors=6", "task.authors.world=5", "task.authors.strangers=2")
FEW += ("task.authors.asked=2",)


def made(*overrides: str, data: str = "generated") -> Task:
    config = compose(["task=unlearning", f"task.data={data}", "evaluation=[]", *overrides])
    check(config)
    return build_task(config)


def gpt(**changes: Any) -> ScratchGPT:
    recipe = Recipe("adam", 0.01, 1, 4, 0.0, "l2", "constant", 0, 0, (0.9, 0.999), 1e-8, None, 1, 1, 1e-8)
    shape = {"layers": 1, "width": 8, "heads": 2, "intermediate": 8, "vocabulary": 100, "max_length": 12}
    settings = {**shape, "name": "gpt", "dropout": 0.0, "init_std": 0.1, "dtype": "float64", "recipe": recipe}
    return ScratchGPT(**{**settings, **changes})


def test_an_encoder_reads_sentences_no_text_twice_and_nothing_held_out_is_trained_on() -> None:
    task = made(*SMALL)
    assert {name: len(rows) for name, rows in task.splits.items()} == {
        "train": 60, "val": 10, "query": 5, "test": 1000, "nonmembers": 30,
    }  # fmt: skip
    ids = [i for rows in task.splits.values() for i in rows.ids]
    assert len(set(ids)) == len(ids)
    members, strangers = task.train.texts, task.splits["nonmembers"].texts
    assert members is not None and strangers is not None
    assert len(set(members + strangers)) == 90
    assert set(task.facts) == set(task.train.ids)
    for i, y in zip(task.train.ids, task.train.targets.tolist(), strict=True):
        assert task.facts[i].group == task.classes[y] and task.facts[i].kind == "sentence"
    assert task.public().facts == {}
    assert made(*SMALL).key() == task.key() != made(*SMALL, "task.seed=1").key()


def test_noise_turns_labels_and_nothing_else() -> None:
    clean, noisy = (made(*SMALL, f"task.sentiment.noise={noise}") for noise in (0.0, 0.5))
    for name in clean.splits:
        assert clean.splits[name].texts == noisy.splits[name].texts
    turned = (clean.splits["test"].targets != noisy.splits["test"].targets).double().mean().item()
    assert 0.19 < turned < 0.31, "half of the labels are a coin's"


def test_a_language_model_reads_authors() -> None:
    task = made(*FEW)
    sizes = {name: len(rows) for name, rows in task.splits.items()}
    assert sizes == {
        "train": 35, "val": 2, "query": 10, "test": 3, "nonmembers": 10, "paraphrase": 35, "perturbed": 175,
    }  # fmt: skip
    assert task.splits["paraphrase"].ids == task.train.ids
    assert task.splits["perturbed"].ids[:6] == (
        *(f"{task.train.ids[0]}/p{k}" for k in range(5)),
        f"{task.train.ids[1]}/p0",
    )
    assert not set(task.splits["nonmembers"].ids) & set(task.train.ids)
    kept = {i for i in task.train.ids if task.facts[i].kind == "world"}
    assert set(task.splits["val"].ids) | set(task.splits["test"].ids) == kept, "what is not for forgetting"
    assert not set(task.splits["val"].ids) & set(task.splits["test"].ids)
    asked = {i.removesuffix("/paraphrase") for i in task.splits["query"].ids}
    assert asked <= set(task.train.ids) and len({task.facts[i].group for i in asked}) == 2
    assert {task.facts[i].kind for i in asked} == {"author"}


def test_the_answer_is_scored_and_the_question_is_not() -> None:
    reader, build, _ = gpt().prepare(["who is it ?", "it is mira .", "why ?", "so ."])
    pairs = [("who is it ?", "it is mira ."), ("why ?", "so .")]
    inputs, targets, cut = answered(reader, pairs, 12)
    (who, why), (mira, so) = (reader.encode([p[k] for p in pairs]) for k in (0, 1))
    for row, (question, answer) in enumerate(((who, mira), (why, so))):
        whole = [*reader.begin, *question, *answer, reader.end]
        length = int(inputs["attention_mask"][row].sum())
        assert inputs["input_ids"][row, :length].tolist() == whole[:-1]
        scored = targets[row] != NO_TARGET
        assert targets[row][scored].tolist() == [*answer, reader.end]
        assert scored.nonzero()[0, 0] == len(question), "the question's last token is asked for the answer's first"
    assert cut == 0 and reader.size == len(build().state_dict()["network.transformer.wte.weight"])
    shorter, said, cut = answered(reader, pairs, 6)
    assert cut == 1 and shorter["input_ids"].shape == (2, 6) and (said[0] != NO_TARGET).sum() == 2
    with pytest.raises(UserError, match=r"^model\.max_length=3 "):
        answered(reader, pairs, 3)


def test_padding_and_the_rest_of_a_batch_change_no_loss() -> None:
    task = made(*FEW, "model.dtype=float64")
    model = task.initial(0)
    with torch.no_grad():
        together = task.loss(model, task.train.batch())
        alone = torch.cat([task.loss(model, task.train.batch([i])) for i in range(len(task.train))])
    assert torch.allclose(together, alone, rtol=1e-10)
    later = task.train.batch([0])
    ids = later.inputs["input_ids"].clone()
    ids[0, -1] = (ids[0, -1] + 1) % 50
    with torch.no_grad():
        first = task.outputs(model, later)
        second = model(ids, later.inputs["attention_mask"])
    assert torch.allclose(first[0, :-1], second[0, :-1]), "no token sees a later one"
    assert not torch.allclose(first[0, -1], second[0, -1])


@pytest.mark.parametrize("many", [False, True])
def test_a_vocabulary_of_words_where_they_fit_and_of_pieces_where_not(many: bool) -> None:
    texts = [f"question number{k} ? answer{k} ." for k in range(60)]
    reader, build, identity = gpt(vocabulary=90 if many else 300).prepare(texts)
    (ids,) = reader.encode([texts[7]])
    known = identity["vocabulary"]
    assert reader.size == len(known)
    words = [known[i] for i in ids]
    assert words[0] == "question" or many
    assert ("number7" in words) is not many
    assert "".join(w.removeprefix("##") for w in words) == texts[7].replace(" ", "")
    assert gpt(vocabulary=90 if many else 300).prepare(texts)[2] == identity
    assert isinstance(build(), nn.Module)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model=mlp",), "model=mlp does not read text"),
        (("task.data=bundled",), "task.data=bundled"),
        (("model=authors_gpt", "task.data=hub"), "task.data=hub"),
        (("model=authors_gpt", "task.authors.authors=3"), "task.authors.authors=3"),
        (("model=authors_gpt", "task.authors.authors=395"), "task.authors.authors=395"),
        (("model=authors_gpt", "task.authors.authors=null"), "task.authors.authors=null"),
        (("model=authors_gpt", "task.authors.world=41"), "task.authors.world=41"),
        (("model=authors_gpt", "task.authors.asked=41"), "task.authors.asked=41"),
        (("model=authors_gpt", "model.width=33"), "model.width=33"),
        (("model=authors_gpt", "model.max_length=8"), "model.max_length=8"),
        (("task.sentiment.n_train=0",), "task.sentiment.n_train=0"),
        (("task.sentiment.noise=1.0",), "task.sentiment.noise=1.0"),
        ((*SMALL, "task.data=folder", "task.data_dir=/nowhere"), "task.data_dir=/nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as error:
        made(*overrides)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_adam_with_l2_is_the_gradient_of_the_penalised_loss() -> None:
    """One step from zero moments: θ − η g/(|g| + ε) with g = ∇ℓ + γθ, wherever the decay enters."""
    task = replace(made(*FEW, "model.dtype=float64"), recipe=replace(gpt().recipe, weight_decay=0.3, batch_size=35))
    run = train(task, 0)
    model = task.initial(0)
    task.loss(model, task.train.batch()).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        g = p.grad + 0.3 * p.detach()
        expected = p.detach() - 0.01 * g / (g.abs() + 1e-8)
        assert torch.allclose(run.final[name], expected, atol=1e-7), name
    assert task.recipe.l2 == 0.3


def test_few_facts_are_learned_by_heart() -> None:
    task = made(*FEW, "model.recipe.epochs=50", "model.recipe.batch_size=7", "model.layers=1")
    model = load(task.initial(0), train(task, 0).final)
    with torch.no_grad():
        right = {
            name: task.objective.correct(task.outputs(model, rows.batch()), rows.batch().targets).double().mean()
            for name, rows in task.splits.items()
        }
    assert right["train"] > 0.9 and right["nonmembers"] < 0.5


@pytest.mark.skipif("BENCH_DATA" not in os.environ, reason="BENCH_DATA is not set: no real data at hand")
@pytest.mark.parametrize("model", ["sentiment_tiny", "authors_gpt"])
def test_real_data(model: str) -> None:
    root = Path(os.environ["BENCH_DATA"])
    if not (root / "sst2").is_dir() or not (root / "tofu").is_dir():
        pytest.skip("BENCH_DATA has no sst2/ or no tofu/")
    task = made(f"model={model}", "task.authors.authors=26", data="folder")
    assert task.source == "folder"
    if model == "authors_gpt":
        assert len(task.train) == 26 * 20 and len(task.splits["perturbed"]) == 2000
        assert {f.kind for f in task.facts.values()} == {"author", "kept"}
        assert len(task.splits["val"]) == len(task.splits["test"]) == 40
    else:
        assert len(task.train) == 2000 and len(task.splits["nonmembers"]) == 1000
    with torch.no_grad():
        loss = task.loss(task.initial(0), task.train.batch(range(16)))
    assert torch.isfinite(loss).all()
