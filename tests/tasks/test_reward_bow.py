"""The bag-of-words reward model: its features by hand, two answers rewarded alike, many at once as one at a time."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_tasks import recipe
from torch.func import functional_call, grad, vmap
from torch.nn.functional import logsigmoid

from tasks.base import Examples, Task
from tasks.errors import UserError
from tasks.models.encoder import ScratchBert
from tasks.models.mlp import MLP
from tasks.models.reward import RewardBow, RewardNetwork, frequent, reward_model, words_of
from tasks.objectives.classification import Classification
from tasks.training.train import train
from tasks.training.vectorised import train_stack

ADAMW = recipe(optimizer="adamw", decay="decoupled", lr=0.02, weight_decay=0.05, epochs=3, batch_size=7)
BOW = RewardBow("bow", 4, 3, "float64", ADAMW)
TEXTS = (
    "zebra zebra zebra?\x1eAn apple, an APPLE\x1eno pear",
    "zebra\x1epear it's\x1ean it's - it's",
    "q\x1epear\x1eno no",
)


def pairs(rows: int, seed: int) -> Examples:
    """x (N, 2, 4) in place of counts."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, 4, dtype=torch.float64, generator=draw)
    return Examples(tuple(f"{seed}:{i}" for i in range(rows)), {"x": x}, (x[:, 1, 0] > x[:, 0, 0]).long())


def pair_task(rows: int = 20) -> Task:
    splits = {name: pairs(n, k) for k, (name, n) in enumerate({"train": rows, "val": 5, "query": 6, "test": 9}.items())}
    return Task(
        name="pairs",
        splits=splits,
        build=lambda: RewardNetwork(4, 3),
        objective=Classification(2),
        recipe=ADAMW,
        model="bow",
        source="generated",
        floor={},
        identity={},
        dtype=torch.float64,
        pairs=True,
    )


def test_features_are_those_by_hand() -> None:
    encode, build, identity = BOW.prepare(TEXTS)
    words = ["an", "it's", "no", "pear"]  # three times each; `apple` stands twice, `zebra` only in prompts
    assert identity["words"] == words == frequent(TEXTS, 4)
    counts = [
        [[2, 0, 0, 0, 4], [0, 0, 1, 1, 2]],
        [[0, 1, 0, 1, 2], [1, 2, 0, 0, 4]],
        [[0, 0, 0, 1, 1], [0, 0, 2, 0, 2]],
    ]
    x = encode(TEXTS)["x"]
    torch.testing.assert_close(x, torch.tensor(counts, dtype=torch.float64).log1p(), rtol=0, atol=0)
    assert build()(x.to(torch.float32)).shape == (3, 2)
    unseen = encode(["zebra\x1ezebra zebra\x1eunknown pear"])["x"]
    torch.testing.assert_close(unseen.expm1()[0], torch.tensor([[0, 0, 0, 0, 2.0], [0, 0, 0, 1, 2]]).double())
    assert words_of("Don't  stop–now, don’t!") == ["don't", "stop", "now", "don’t"]


def test_a_pair_shown_the_other_way_round_is_the_same_pair() -> None:
    encode, build, _ = BOW.prepare(TEXTS)
    turned = ["\x1e".join((p, b, a)) for p, a, b in (text.split("\x1e") for text in TEXTS)]
    assert BOW.prepare(turned)[2] == BOW.prepare(TEXTS)[2], "the vocabulary does not hang on the order"
    torch.manual_seed(0)
    model = build().double()
    one, other = model(**encode(TEXTS)), model(**encode(turned))
    torch.testing.assert_close(one, other.flip(1), rtol=0, atol=0)
    assert (one[:, 0] != one[:, 1]).all()


def test_the_objective_is_bradley_terry() -> None:
    rewards = torch.tensor([[1.5, -0.5], [0.2, 0.9], [-30.0, 40.0]], dtype=torch.float64, requires_grad=True)
    for target in (0, 1):
        targets = torch.full((3,), target)
        margin = rewards[:, target] - rewards[:, 1 - target]
        torch.testing.assert_close(
            Classification(2).loss(rewards, targets), -logsigmoid(margin), rtol=1e-12, atol=1e-15
        )
        torch.testing.assert_close(Classification(2).measure(rewards, targets), margin, rtol=1e-12, atol=0)
        p = torch.sigmoid(margin).detach()
        roots = Classification(2).hessian_root(rewards.detach())
        d = torch.tensor([1.0, -1.0], dtype=torch.float64)
        wanted = (p * (1 - p))[:, None, None] * torch.outer(d, d)
        torch.testing.assert_close(roots @ roots.mT, wanted, rtol=1e-9, atol=1e-12)


def test_both_answers_are_rewarded_by_the_same_formula() -> None:
    torch.manual_seed(1)
    model = RewardNetwork(4, 3).double()
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    own = dict(model.named_parameters())
    hidden = (x @ own["layer.weight"].T + own["layer.bias"]).clamp_min(0)
    torch.testing.assert_close(model(x), (hidden * own["head.weight"][0]).sum(-1))
    assert list(own) == ["layer.weight", "layer.bias", "head.weight"]


def test_a_stack_is_vmap_over_models() -> None:
    torch.manual_seed(2)
    models = [RewardNetwork(4, 3).double() for _ in range(3)]
    stack = {
        name: torch.stack([dict(m.named_parameters())[name] for m in models])
        for name in dict(models[0].named_parameters())
    }
    x = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    template = copy.deepcopy(models[0])

    def one(parameters: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        return functional_call(template, parameters, (rows,))

    found, wanted = models[0].forward_stack(stack, x), vmap(one)(stack, x)
    assert found.shape == (3, 5, 2)
    torch.testing.assert_close(found, wanted)

    def total(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda s: (forward(s, x) ** 3).sum()

    one_way, other_way = grad(total(models[0].forward_stack))(stack), grad(total(vmap(one)))(stack)
    for name, value in one_way.items():
        torch.testing.assert_close(value, other_way[name])


def test_engines_agree_on_pairs() -> None:
    task = pair_task()
    stacked = train_stack(task, torch.ones(2, 20), [3, 4], own_batches=False)
    for k, seed in enumerate((3, 4)):
        for name, value in train(task, seed).final.items():
            torch.testing.assert_close(stacked[name][k], value, rtol=1e-9, atol=1e-11)


def test_flipping_the_target_is_swapping_the_answers() -> None:
    """What relabelling rests on: the same training either way."""
    task = pair_task()
    rows = [1, 4, 7]
    x, targets = task.train.inputs["x"].clone(), task.train.targets.clone()
    targets[rows] = 1 - targets[rows]
    x[rows] = x[rows].flip(1)
    flipped = replace(task, splits={**task.splits, "train": replace(task.train, targets=targets)})
    swapped = replace(task, splits={**task.splits, "train": replace(task.train, inputs={"x": x})})
    one, other, clean = (train(t, 0).final["layer.weight"] for t in (flipped, swapped, task))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert (one - clean).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocabulary": 0}, r"model\.vocabulary=0"),
        ({"hidden": 0}, r"model\.hidden=0"),
        ({"dtype": "float16"}, r"model\.dtype=float16 .*float32, float64"),
        ({"recipe": recipe(optimizer="lbfgs", weight_decay=0.1)}, r"model\.recipe\.optimizer=lbfgs"),
        ({"recipe": recipe(epochs=0)}, r"model\.recipe\.epochs=0"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(BOW, **change)


def test_only_reward_models_reward() -> None:
    assert reward_model(BOW, "rlhf") is BOW
    bert = ScratchBert("tiny", 1, 8, 2, 16, 300, 16, 0.0, 0.02, "float32", recipe())
    for other in (bert, MLP("mlp", (), 0.0, "float64", recipe())):
        with pytest.raises(
            UserError, match=rf"model={other.name} does not reward answers, as task=rlhf asks; .*reward_bow"
        ):
            reward_model(other, "rlhf")
