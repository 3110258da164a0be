"""Reward transformers: a pair in one pass equals its two sides in two; from scratch, from a folder, with adapters."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_tasks import recipe
from torch import Tensor, nn

from tasks.base import Examples, Task
from tasks.errors import UserError
from tasks.models.lora import Lora
from tasks.models.reward_transformer import Pair, PretrainedReward, RewardNetwork, ScratchReward, build_gpt, layout
from tasks.objectives.classification import Classification
from tasks.training.explained import explained
from tasks.training.train import load, train

ADAMW = recipe(optimizer="adamw", lr=0.01, decay="decoupled", weight_decay=0.01, epochs=6, batch_size=8, bucket=2)
SCRATCH = ScratchReward("reward_gpt", 24, "float32", ADAMW, 1, 8, 2, 300, 0.0, 0.02)
LORA = Lora(2, 4.0, 0.0, "all-linear")
WORDS = ("good", "fine", "bad", "poor", "tea", "rain", "sun", "is", "the", "why")


def pairs(number: int) -> tuple[list[str], Tensor]:
    """The better answer says good."""
    texts, targets = [], []
    for i in range(number):
        prompt = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 7))
        better, worse = (f"{WORDS[(3 * i) % len(WORDS)]} {word} {'sun ' * (i % 3)}" for word in ("good", "poor"))
        texts.append("\x1e".join((prompt, better, worse) if i % 2 else (prompt, worse, better)))
        targets.append(1 - i % 2)
    return texts, torch.tensor(targets)


def task_of(model: Any, dtype: torch.dtype = torch.float32) -> Task:
    texts, targets = pairs(32)
    encode, build, identity = model.prepare(texts[:24])

    def part(name: str, rows: slice) -> Examples:
        chosen = tuple(texts[rows])
        return Examples(tuple(f"{name}{i}" for i in range(len(chosen))), encode(chosen), targets[rows], chosen)

    held = part("query", slice(24, 32))
    return Task(
        name="pairs",
        splits={"train": part("train", slice(24)), "val": held, "query": held, "test": held},
        build=build,
        objective=Classification(2),
        recipe=model.recipe,
        model=model.name,
        source="generated",
        floor={},
        identity=identity,
        dtype=dtype,
        pairs=True,
    )


def separate(network: RewardNetwork, input_ids: Tensor, attention_mask: Tensor, sides: Tensor) -> Tensor:
    """Rewards (B, 2), each side of each row in a pass of its own, without padding and by the library's own masks."""
    found = []
    for ids, mask, side in zip(input_ids, attention_mask, sides, strict=True):
        for number in (1, 2):
            alone = ids[(mask > 0) & ((side == 0) | (side == number))]
            found.append(network.head(network.body(input_ids=alone[None]).last_hidden_state[:, -1]))
    return torch.cat(found).reshape(-1, 2)


def gpt() -> RewardNetwork:
    network = build_gpt(2, 8, 2, 16, 0.0, 0.5, 20).double().eval()
    assert isinstance(network, RewardNetwork)
    return network


def inputs(rows: list[tuple[int, int, int]], vocabulary: int = 20) -> dict[str, Tensor]:
    """Tokens of prompt, first and second of each row, drawn; padding of arbitrary ids."""
    generator, width = torch.Generator().manual_seed(0), max(map(sum, rows))
    ids = torch.randint(vocabulary, (len(rows), width), generator=generator)
    mask = torch.tensor([[1] * sum(row) + [0] * (width - sum(row)) for row in rows])
    sides = torch.tensor([[0] * p + [1] * a + [2] * b + [0] * (width - p - a - b) for p, a, b in rows])
    return {"input_ids": ids, "attention_mask": mask, "sides": sides}


ROWS = [(4, 3, 5), (1, 1, 1), (6, 2, 1), (0, 3, 2), (9, 7, 6)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_one_pass_equals_two() -> None:
    network, batch = gpt(), inputs(ROWS)
    found, expected = network(**batch), separate(network, **batch)
    assert expected.std() > 0.1
    assert torch.allclose(found, expected, rtol=0, atol=1e-8)
    weights = torch.randn(found.shape, dtype=torch.float64)
    parameters = list(network.parameters())
    for mine, theirs in zip(
        *(torch.autograd.grad((r * weights).sum(), parameters) for r in (found, expected)), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-8)


def test_an_answer_does_not_see_the_other_nor_the_padding() -> None:
    network, batch = gpt(), inputs(ROWS)
    with torch.no_grad():
        first = network(**batch)
        for number in (1, 2):
            changed = batch["input_ids"].where(batch["sides"] != number, (batch["input_ids"] + 1) % 20)
            difference = (network(**{**batch, "input_ids": changed}) - first).abs()
            assert difference[:, 2 - number].max() < 1e-12 and difference[:, number - 1].min() > 1e-6
        padding = batch["input_ids"].where(batch["attention_mask"] > 0, 7)
        assert torch.allclose(network(**{**batch, "input_ids": padding}), first, atol=1e-12)
        for i, row in enumerate(ROWS):
            alone = {name: value[i : i + 1, : sum(row)] for name, value in batch.items()}
            assert torch.allclose(network(**alone)[0], first[i], atol=1e-12)


def test_layout_is_as_said() -> None:
    batch = inputs(ROWS)
    sees, positions, last = layout(batch["attention_mask"], batch["sides"])
    for r, (p, a, b) in enumerate(ROWS):
        kind = [0] * p + [1] * a + [2] * b
        assert sees[r].diagonal().all() and not (sees[r].tril(-1) | sees[r].triu(1))[:, len(kind) :].any()
        for q in range(len(kind)):
            for k in range(len(kind)):
                assert sees[r, q, k] == (k <= q and kind[k] in (0, kind[q]))
        assert positions[r, : len(kind)].tolist() == [*range(p + a), *range(p, p + b)]
        assert last[r].tolist() == [p + a - 1, p + a + b - 1]
    assert int(positions.max()) < 16  # padding too has a position that the model knows


@given(
    st.lists(st.integers(10, 99), max_size=30),
    st.lists(st.integers(10, 99), max_size=30),
    st.lists(st.integers(10, 99), max_size=30),
    st.integers(8, 40),
    st.booleans(),
)
def test_what_is_kept_of_long_pairs(
    prompt: list[int], first: list[int], second: list[int], most: int, begins: bool
) -> None:
    start = [1] if begins else []
    row, side = Pair(start, 2, 0, most).row(prompt, first, second)
    parts = [[t for t, s in zip(row, side, strict=True) if s == number] for number in range(3)]
    assert side == sorted(side) and len(row) == sum(map(len, parts))
    kept = parts[0][len(start) :]
    assert parts[0][: len(start)] == start and kept == prompt[len(prompt) - len(kept) :]
    longest = max(len(first), len(second))
    room = most - len(start) - 1
    for part, answer in zip(parts[1:], (first, second), strict=True):
        assert part[-1] == 2 and part[:-1] == answer[: len(part) - 1]
        assert len(parts[0]) + len(part) <= most
        assert len(part) - 1 >= min(len(answer), room // 2)
    if len(prompt) + longest <= room:
        assert [kept, parts[1][:-1], parts[2][:-1]] == [prompt, first, second]
    else:  # nothing is dropped without need: the longer side is full
        assert len(parts[0]) + max(len(parts[1]), len(parts[2])) == most


def test_a_model_from_scratch_learns_and_is_the_same_again() -> None:
    longer = replace(SCRATCH, recipe=replace(ADAMW, epochs=15, lr=0.02))
    task = task_of(longer)
    made = train(task, 0)
    network = load(task.initial(0), made.final)
    with torch.no_grad():
        outputs = task.outputs(network, task.splits["query"].batch())
    assert outputs.shape == (8, 2)
    assert task.objective.fitness(outputs, task.splits["query"].targets)["accuracy"] == 1.0
    again = task_of(longer)
    assert again.key() == task.key()
    for name, value in train(again, 0).final.items():
        assert torch.equal(value, made.final[name])


def test_a_vocabulary_is_of_prompts_and_of_both_answers() -> None:
    words = ("zebra", "quail", "otter")
    _, _, identity = SCRATCH.prepare(["\x1e".join(words)] * 3)
    assert set(words) < set(identity["vocabulary"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 9}, "model.width=9 .*a multiple of model.heads=2"),
        ({"max_length": 7}, "model.max_length=7 .*8 or more"),
        ({"recipe": replace(ADAMW, epochs=0)}, "model.recipe.epochs=0 .*1 or more"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(SCRATCH, **changes)


# Pretrained


def configuration(kind: str = "Llama", **changes: Any) -> Any:
    import transformers

    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = {"vocab_size": 20, "max_position_embeddings": 32, **shape, **ids, **changes}
    return getattr(transformers, f"{kind}Config")(**settings)


def write(folder: Path, network: nn.Module, **tokens: str) -> PretrainedReward:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    known = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **tokens}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in known.items() if v})
    fast.save_pretrained(folder)
    network.save_pretrained(folder)  # type: ignore[operator]
    return PretrainedReward("reward_llama", 24, "float32", ADAMW, None, None, str(folder), None)


@pytest.fixture
def llama(tmp_path: Path) -> PretrainedReward:
    from transformers import LlamaForCausalLM

    return write(tmp_path / "llama", LlamaForCausalLM(configuration()))


def test_a_pretrained_model_is_the_one_in_the_folder(llama: PretrainedReward) -> None:
    from safetensors.torch import load_file

    assert llama.path is not None
    task = task_of(llama)
    stored = load_file(Path(llama.path) / "model.safetensors")
    first, second = task.initial(0), task.initial(1)
    body = {f"model.{name}": p for name, p in first.body.named_parameters()}  # type: ignore[union-attr]
    assert body.keys() == stored.keys() - {"lm_head.weight"}
    assert all(torch.equal(p, stored[name]) for name, p in body.items())
    assert torch.equal(first.head.weight, task.initial(0).head.weight)  # type: ignore[union-attr]
    assert not torch.equal(first.head.weight, second.head.weight)  # type: ignore[union-attr]
    batch = task.train.batch()
    assert isinstance(first, RewardNetwork)
    with torch.no_grad():
        assert torch.allclose(first(**batch.inputs), separate(first, **batch.inputs), atol=1e-6)
    assert batch.inputs["input_ids"][:, 0].eq(1).all()  # the start token
    other = (Path(llama.path) / "config.json").read_text()
    (Path(llama.path) / "config.json").write_text(json.dumps({**json.loads(other), "rms_norm_eps": 1e-5}))
    assert task_of(llama).key() != task.key()


def test_a_trained_reward_model_keeps_its_head(tmp_path: Path, llama: PretrainedReward) -> None:
    from transformers import LlamaForSequenceClassification

    network = LlamaForSequenceClassification(configuration(num_labels=1))
    trained = replace(write(tmp_path / "reward", network), recipe=replace(ADAMW, epochs=0))
    task = task_of(trained)
    assert torch.equal(task.initial(3).head.weight, network.score.weight)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"model\.recipe\.epochs=0 .*has no score\.weight"):
        task_of(replace(llama, recipe=replace(ADAMW, epochs=0)))


def test_models_that_cannot_read_a_pair_in_one_pass_are_refused(tmp_path: Path, llama: PretrainedReward) -> None:
    from transformers import BertForMaskedLM, LlamaForCausalLM, MistralForCausalLM

    for width in (3, 7):  # 7: wider than a side of the first pair, not of the longest
        network = MistralForCausalLM(configuration("Mistral", sliding_window=width, num_key_value_heads=1))
        with pytest.raises(UserError, match=r"otherwise than one by one.*full attention"):
            task_of(write(tmp_path / f"window{width}", network))
    both_ways = write(tmp_path / "bert", BertForMaskedLM(configuration("Bert")))
    with pytest.raises(UserError, match="does not read from left to right"):
        task_of(both_ways)
    with pytest.raises(UserError, match=r"model\.max_length=33 .*at most 32"):
        task_of(replace(llama, max_length=33))
    endless = write(tmp_path / "endless", LlamaForCausalLM(configuration()), eos_token="")
    with pytest.raises(UserError, match="without an end token"):
        task_of(endless)


def test_what_is_not_there_is_said_in_a_line(tmp_path: Path, llama: PretrainedReward) -> None:
    with pytest.raises(UserError, match=r"model\.path=.* holds no config\.json"):
        task_of(replace(llama, path=str(tmp_path)))
    with pytest.raises(UserError, match=r"model\.revision is needed with model\.hub"):
        replace(llama, path=None, hub="someone/something")
    assert llama.path is not None
    (Path(llama.path) / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"model\.path=.* cannot be loaded") as error:
        task_of(llama)
    assert "\n" not in str(error.value)


# Adapters


def test_adapters_and_head_are_trained_and_nothing_else(tmp_path: Path, llama: PretrainedReward) -> None:
    task, plain = task_of(replace(llama, lora=LORA)), task_of(llama)
    assert task.key() != plain.key()
    network, batch = task.initial(0), task.train.batch()
    own = {name for name, p in network.named_parameters() if p.requires_grad}
    assert "head.weight" in own and len(own) == 1 + 2 * 7  # seven linear layers in a Llama block
    assert all(".lora_A." in name or ".lora_B." in name for name in own - {"head.weight"})
    other = plain.initial(0)
    other.head.weight.data = network.head.weight.data  # type: ignore[union-attr, operator]
    with torch.no_grad():  # B = 0
        assert torch.allclose(network(**batch.inputs), other(**batch.inputs), atol=1e-6)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    made = explained(task, 0, 0, tmp_path)
    assert made.final.keys() == made.initial.keys() == own
    again = explained(task, 0, 0, tmp_path)
    assert all(torch.equal(again.final[name], value) for name, value in made.final.items())
    after = load(task.initial(0), made.final)
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    assert moved == own


def test_adapters_of_chosen_layers_add_what_the_paper_says(llama: PretrainedReward) -> None:
    task = task_of(replace(llama, lora=Lora(3, 5.0, 0.5, ("q_proj", "down_proj"))), torch.float64)
    network = task.initial(0)
    layer = network.get_submodule("body.layers.0.mlp.down_proj")
    adapted = {n for n, m in network.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {"body.layers.0.self_attn.q_proj", "body.layers.0.mlp.down_proj"}
    a, b = (layer.get_parameter(f"lora_{k}.default.weight") for k in "AB")
    nn.init.normal_(b)
    x = torch.randn(2, 12, dtype=torch.float64)
    weight = layer.get_parameter("base_layer.weight")
    expected = x @ (weight + 5.0 / 3.0 * b @ a).T  # no dropout: eval mode
    assert torch.allclose(layer(x), expected)
    torch.manual_seed(1)
    found = layer.train()(x)
    torch.manual_seed(1)
    expected = x @ weight.T + 5.0 / 3.0 * nn.functional.dropout(x, 0.5) @ (b @ a).T
    assert torch.allclose(found, expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0}, r"model\.lora\.rank=0"),
        ({"alpha": 0.0}, r"model\.lora\.alpha=0"),
        ({"dropout": 1.0}, r"model\.lora\.dropout=1"),
        ({"targets": ("q_proj", "qqq")}, r"model\.lora\.targets=qqq is no linear layer; allowed: all-linear, q_proj"),
    ],
)
def test_impossible_adapters_are_refused(changes: dict[str, Any], said: str, llama: PretrainedReward) -> None:
    with pytest.raises(UserError, match=said):
        task_of(replace(llama, lora=replace(LORA, **changes)))


def test_without_peft_the_line_says_what_to_install(llama: PretrainedReward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs the package peft.*attribution-bench\[peft\]"):
        task_of(replace(llama, lora=LORA))


@pytest.mark.skipif("BENCH_DATA" not in os.environ, reason="BENCH_DATA is not set")
def test_a_real_llama_reads_a_pair_in_one_pass() -> None:
    path = Path(os.environ["BENCH_DATA"]) / "models" / "tinystories-656k"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    model = PretrainedReward("reward_llama", 48, "float32", ADAMW, None, None, str(path), None)
    task = task_of(model)
    network, batch = task.initial(0), task.train.batch()
    assert isinstance(network, RewardNetwork)
    with torch.no_grad():
        found, expected = network(**batch.inputs), separate(network, **batch.inputs)
    assert expected.std() > 1e-3 and torch.allclose(found, expected, atol=1e-5)
    assert batch.inputs["input_ids"][:, 0].eq(1).all()
