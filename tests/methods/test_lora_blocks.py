"""What a training leaves alone is no block: of adapters their own gradients, of frozen parameters none.

Gradients of a pair that is read in one pass are those of its two sides, read one by one.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import (
    Biased,
    Named,
    close,
    draw,
    exact_scores,
    explained,
    per_example,
    randomised,
    stacked,
    task_of,
    vectors,
)
from models import Norm, attention, columns, named_to_blocks
from torch import Tensor, nn

from methods.base import Problem
from methods.curvature.base import Curvature
from methods.curvature.damping import Damping
from methods.curvature.dense import Dense
from methods.curvature.ekfac import EKFAC
from methods.curvature.identity import Identity
from methods.gradients.blocks import blocks_of
from methods.gradients.per_example import gradients, plain
from methods.influence import Influence
from tasks.base import Examples, Task
from tasks.errors import UserError
from tasks.models.lora import Lora
from tasks.models.reward_transformer import RewardNetwork, build_gpt
from tasks.objectives.classification import Classification
from tasks.training.train import load, state, train, without_frozen

LORA = Lora(2, 4.0, 0.1, "all-linear")
VOCABULARY = 11


def gpt() -> RewardNetwork:
    network = build_gpt(2, 4, 2, 16, 0.0, 0.02, VOCABULARY)
    assert isinstance(network, RewardNetwork)
    return network


def llama() -> RewardNetwork:
    """Norms and softmax in the precision of what they are given."""
    from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaModel
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("same_precision", attention)
    AttentionMaskInterface.register("same_precision", eager_mask)
    shape = {"hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=VOCABULARY, num_key_value_heads=1, attn_implementation="same_precision", **shape
    )
    body = LlamaModel(config)
    for name, norm in list(body.named_modules()):
        if type(norm).__name__ == "LlamaRMSNorm":
            body.set_submodule(name, Norm(norm.weight, norm.variance_epsilon))
    return RewardNetwork(body, nn.Linear(4, 1, bias=False))


def adapted(build: Callable[[], RewardNetwork]) -> RewardNetwork:
    network = build()
    LORA.adapt(network.body)
    return network


BUILDS: dict[str, Callable[[], RewardNetwork]] = {
    "gpt": gpt,
    "llama": llama,
    "gpt, adapted": partial(adapted, gpt),
    "llama, adapted": partial(adapted, llama),
}


def pairs(name: str, rows: list[tuple[int, int, int]], seed: int) -> Examples:
    """Prompt, first and second of so many tokens each."""
    width = max(map(sum, rows))
    ids = torch.randint(1, VOCABULARY, (len(rows), width), generator=draw(seed))
    mask = torch.tensor([[1] * sum(row) + [0] * (width - sum(row)) for row in rows])
    sides = torch.tensor([[0] * p + [1] * a + [2] * b + [0] * (width - p - a - b) for p, a, b in rows])
    targets = torch.randint(2, (len(rows),), generator=draw(seed + 1))
    inputs = {"input_ids": ids * mask, "attention_mask": mask, "sides": sides}
    return Examples(tuple(f"{name}{i}" for i in range(len(rows))), inputs, targets)


def rewarding(build: Callable[[], RewardNetwork]) -> Task:
    parts = [(3, 2, 4), (1, 1, 1), (5, 4, 2), (2, 3, 3), (6, 1, 5), (4, 4, 4)]
    return task_of(
        pairs("train", parts, 0), pairs("query", parts[1:5], 5), partial(randomised, build), Classification(2)
    )


def problem_of(task: Task) -> Problem:
    """A real training, which keeps what it trained."""
    return Problem(task, 0, lambda k: train(task, k))


def one_by_one(model: nn.Module, examples: Examples, of: Callable[[Tensor, Tensor], Tensor]) -> Named:
    """Gradients by the parameters (N, ...), each side of a pair in a pass of its own, without mask or padding."""
    assert isinstance(model, RewardNetwork)
    named, found = dict(model.named_parameters()), []
    for i in range(len(examples)):
        ids, mask, sides = (examples.inputs[name][i] for name in ("input_ids", "attention_mask", "sides"))
        alone = [ids[(mask > 0) & ((sides == 0) | (sides == number))][None] for number in (1, 2)]
        ends = [model.body(input_ids=one).last_hidden_state[:, -1] for one in alone]
        rewards = torch.cat([model.head(end) for end in ends], 1)
        value = of(rewards, examples.targets[i : i + 1]).sum()
        found.append(dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True)))
    return columns(found)


@pytest.mark.parametrize("of", ["loss", "measure"])
@pytest.mark.parametrize("name", BUILDS)
def test_gradients_of_a_pair_are_those_of_its_sides(name: str, of: str) -> None:
    task = rewarding(BUILDS[name])
    problem, function = problem_of(task), getattr(task.objective, of)
    model = problem.model()
    blocks = blocks_of(model)
    expected = named_to_blocks(explained(problem), blocks, one_by_one(explained(problem), task.train, function))
    for batch_size in (2, 6):
        found = {b.name: torch.full((len(task.train), *b.shape), torch.nan).double() for b in blocks}
        for index, batch in gradients(task, model, task.train, blocks, function, batch_size):
            for g in plain(batch):
                found[g.block.name][index] = g.dense()
        for block in blocks:
            assert torch.allclose(found[block.name], expected[block.name], rtol=0, atol=1e-8), block.name
    assert max(float(g.abs().max()) for g in expected.values()) > 0.01


@pytest.mark.parametrize(("name", "layers"), [("gpt, adapted", 2 * 4), ("llama, adapted", 2 * 7)])
def test_blocks_of_adapters(name: str, layers: int) -> None:
    task = rewarding(BUILDS[name])
    problem = problem_of(task)
    blocks = blocks_of(problem.model())
    covered = {key for block in blocks for key in block.parameters}
    assert covered == set(problem.trajectory().final)
    assert len(blocks) == 2 * layers + 1 and {b.kind for b in blocks} == {"linear"}
    assert {b.name.split(".")[-2] for b in blocks if b.name != "head"} == {"lora_A", "lora_B"}
    with pytest.raises(UserError, match="matches no module"):
        Influence(Identity(), Damping("absolute", 0.0, "global"), modules=("*base_layer",)).attribute(
            problem, task.splits["query"]
        )


CURVATURES: dict[str, tuple[Curvature, float]] = {
    "identity": (Identity(), 0.0),
    "exact": (Dense("ggn", "global", 1.0), 0.1),
}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", ["gpt, adapted", "llama, adapted"])
def test_influence_by_adapters_alone(name: str, curvature: str) -> None:
    task = rewarding(BUILDS[name])
    problem, queries = problem_of(task), task.splits["query"]
    how, damping = CURVATURES[curvature]
    found = Influence(how, Damping("absolute", damping, "global")).attribute(problem, queries)
    if curvature == "exact":
        expected = exact_scores(problem, queries, damping + task.recipe.l2)
    else:
        model = explained(problem)
        m, g = (
            stacked(per_example(model, part, of))
            for part, of in ((queries, task.objective.measure), (task.train, task.objective.loss))
        )
        expected = -m @ g.T / len(task.train)
    assert close(found, expected)


def test_ekfac_by_adapters_runs() -> None:
    task = rewarding(BUILDS["gpt, adapted"])
    found = Influence(EKFAC("empirical"), Damping("mean_eigenvalue", 0.1, "block")).attribute(
        problem_of(task), task.splits["query"]
    )
    assert found.isfinite().all() and found.std() > 0


# Any model


def partly() -> nn.Module:
    """3 → 4 → 4 → 2, the second layer frozen, of the third the bias."""
    network = Biased([3, 4, 4, 2], [True, True, True])
    network.layers[1].requires_grad_(False)
    network.layers[2].bias.requires_grad_(False)  # type: ignore[union-attr]
    return network


def test_frozen_parameters_of_any_model_are_no_blocks() -> None:
    task = task_of(
        vectors("train", 8, 3, 2, 0), vectors("query", 4, 3, 2, 1), partial(randomised, partly), Classification(2)
    )
    problem = problem_of(task)
    model = problem.model()
    shapes = {block.name: block.shape for block in blocks_of(model)}
    assert shapes == {"layers.0": (4, 4), "layers.2": (2, 4)}
    found = Influence(Identity(), Damping("absolute", 0.0, "global")).attribute(problem, task.splits["query"])
    plain_model = load(task.initial(0), problem.trajectory().final)
    trained = {name for name, p in plain_model.named_parameters() if p.requires_grad}
    batch = task.train.batch()
    assert torch.equal(model(**batch.inputs), plain_model(**batch.inputs))

    def of_trained(examples: Examples, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        free = plain_model.requires_grad_(True)
        return stacked([{n: g for n, g in one.items() if n in trained} for one in per_example(free, examples, of)])

    m, g = of_trained(task.splits["query"], task.objective.measure), of_trained(task.train, task.objective.loss)
    assert close(found, -m @ g.T / 8)


def test_without_frozen_keeps_what_the_model_computes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.norm = nn.LayerNorm(3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.norm(self.table(ids)))

    model, ids = Tied(), torch.tensor([[1, 2], [4, 0]])
    model.table.weight.requires_grad_(False)
    before, trained = model(ids), state(model)
    assert without_frozen(model) is model
    assert torch.equal(model(ids), before)
    assert {name for name, _ in model.named_parameters()} == set(trained) == {"norm.weight", "norm.bias"}
    assert model.table.weight is not None and model.table.weight.data_ptr() == model.out.weight.data_ptr()
    free = nn.Linear(2, 2)
    kept = dict(free.named_parameters())
    assert dict(without_frozen(free).named_parameters()) == kept
