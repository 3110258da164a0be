"""Which parameters are covered, in which shape; what has no rule is refused by name."""

from functools import partial

import pytest
import torch
from cases import Twice, bert, draw, parameters, problem_of, randomised, shared, task_of, vector_task, without_bias
from torch import Tensor, nn

from methods.gradients.blocks import blocks_of, coverage, with_rows_in_use
from methods.gradients.per_example import flat, gradients, plain
from tasks.base import Examples
from tasks.errors import UserError
from tasks.objectives.classification import Classification


def test_every_parameter_belongs_to_one_block() -> None:
    for task in (bert(), shared(), without_bias()):
        model = task.initial(0)
        blocks = blocks_of(model)
        covered = [name for b in blocks for name in b.parameters]
        assert sorted(covered) == sorted(parameters(model))
        total = sum(p.numel() for p in model.parameters())
        assert coverage(model, blocks) == {"modules": [b.name for b in blocks], "parameters": total, "of": total}


def test_shapes_and_kinds() -> None:
    model = bert().initial(0)
    blocks = {b.name.split(".")[-1]: b for b in blocks_of(model)}
    words, positions, norm, head = (blocks[k] for k in ("word_embeddings", "position_embeddings", "LayerNorm", "head"))
    assert (words.kind, words.shape, words.bias) == ("embedding", (4, 11), False)  # 12 words less the padding
    assert words.rows is not None and words.rows.tolist() == list(range(1, 12))
    assert (positions.kind, positions.shape) == ("embedding", (4, 8))
    assert (norm.kind, norm.shape, norm.bias) == ("norm", (2, 4), True)
    assert (head.kind, head.shape, head.bias) == ("linear", (2, 5), True)
    assert head.parameters == ("head.weight", "head.bias")
    assert head.size == 10
    plain = {b.name: b for b in blocks_of(without_bias().initial(0))}
    assert plain["layers.0"].shape == (4, 3) and not plain["layers.0"].bias
    assert {b.name: b.shape for b in blocks_of(Twice(3))}["norm"] == (1, 4)


def test_a_module_used_twice_is_one_block() -> None:
    assert [b.name for b in blocks_of(Twice(3))] == ["table", "mix", "norm", "head"]


def test_patterns_choose_blocks() -> None:
    model = bert().initial(0)
    everything = [b.name for b in blocks_of(model)]
    assert [b.name for b in blocks_of(model, ["*attention.self.*"])] == [n for n in everything if "self" in n]
    assert [b.name for b in blocks_of(model, ["head", "*word_embeddings"])] == [everything[0], "head"]
    part = blocks_of(model, ["head"])
    assert coverage(model, part) == {"modules": ["head"], "parameters": 10, "of": 256}


def test_a_string_is_one_pattern_and_not_its_characters() -> None:
    model = bert().initial(0)
    assert [b.name for b in blocks_of(model, "*head")] == ["head"]
    assert len(blocks_of(model, list("*head"))) > 1  # what its characters would choose


def test_no_match_is_refused_with_the_names() -> None:
    with pytest.raises(UserError, match=r"method\.modules=nothing.*table, mix, norm, head"):
        blocks_of(Twice(3), ["nothing"])


class With(nn.Module):
    """A module of some kind before a linear head."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.odd = module
        self.head = nn.Linear(3, 3)


class Scaled(nn.Linear):
    """A linear layer that is not what its base class says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Own(nn.Module):
    """A parameter that belongs to no module with a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(2, 2, 3),
        nn.Conv2d(2, 2, 3, groups=2),
        nn.BatchNorm1d(3),
        nn.GroupNorm(1, 3),
        nn.LSTM(2, 2),
        nn.EmbeddingBag(4, 3),
        nn.Bilinear(2, 2, 3),
        nn.MultiheadAttention(4, 1),
        Scaled(3, 3),
        Own(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_unsupported_modules_are_refused_by_name(module: nn.Module) -> None:
    with pytest.raises(UserError, match=rf"method\.modules=odd.*{type(module).__name__}.*Linear, Embedding, LayerNorm"):
        blocks_of(With(module))
    assert [b.name for b in blocks_of(With(module), ["head"])] == ["head"]  # leaving it out is the user's choice


class Tied(nn.Module):
    """ids (B, T) -> (B, V): the output layer is the embedding transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh().sum(1))


def test_tied_parameters_are_refused() -> None:
    with pytest.raises(UserError, match=r"method\.modules=table shares its weight with head"):
        blocks_of(Tied())


@pytest.mark.parametrize("chosen", ["table", "head"])
def test_half_of_a_tie_is_right_or_refused(chosen: str) -> None:
    """A block that names a tied parameter must have its whole gradient, not that of one of its uses."""
    ids = torch.randint(0, 5, (4, 2), generator=draw(0))
    rows = Examples(tuple("abcd"), {"ids": ids}, torch.tensor([0, 2, 4, 1]))
    task = task_of(rows, rows, partial(randomised, Tied), Classification(5))
    model = problem_of(task).model()
    try:
        blocks = blocks_of(model, [chosen])
    except UserError as refusal:
        assert "shares" in str(refusal)
        return
    (found,) = [flat(plain(f)) for _, f in gradients(task, model, rows, blocks, task.objective.loss)]
    free = task.initial(0)
    for i in range(len(rows)):
        loss = task.loss(free, rows.batch([i])).sum()
        (g,) = torch.autograd.grad(loss, [free.get_parameter("table.weight")])
        expected = g.T if chosen == "table" else g
        torch.testing.assert_close(found[i], expected.flatten())


def test_a_model_that_is_one_bare_layer() -> None:
    """The root module has the empty name; its parameters are `weight` and `bias`."""
    x = torch.randn(4, 3, generator=draw(0), dtype=torch.float64)
    rows = Examples(tuple("abcd"), {"input": x}, torch.tensor([0, 1, 1, 0]))
    task = task_of(rows, rows, partial(randomised, partial(nn.Linear, 3, 2)), Classification(2))
    model = problem_of(task).model()
    blocks = blocks_of(model)
    assert blocks[0].parameters == ("weight", "bias")
    assert coverage(model, blocks)["parameters"] == 8
    (found,) = [flat(plain(f)) for _, f in gradients(task, model, rows, blocks, task.objective.loss)]
    p = task.outputs(model, rows.batch()).softmax(-1)
    d = p - torch.eye(2, dtype=torch.float64)[rows.targets]
    expected = d[:, :, None] * torch.cat([x, torch.ones(4, 1, dtype=torch.float64)], 1)[:, None, :]
    torch.testing.assert_close(found, expected.flatten(1))


def test_embeddings_are_cut_to_the_rows_that_are_looked_up() -> None:
    task = bert()
    model = problem_of(task).model()
    whole = blocks_of(model)
    cut = {b.name.split(".")[-1]: b for b in with_rows_in_use(task, model, whole, [task.train])}
    ids = task.train.inputs["input_ids"]
    expected = sorted(set(ids[task.train.inputs["attention_mask"] > 0].tolist()))
    assert 0 not in expected and len(expected) < 11
    words, positions = cut["word_embeddings"], cut["position_embeddings"]
    assert words.rows is not None and words.rows.tolist() == expected
    assert words.shape == (4, len(expected))
    assert positions.rows is not None and positions.rows.tolist() == list(range(7))
    assert cut["head"].shape == (2, 5)
    both = with_rows_in_use(task, model, whole, [task.train, task.splits["query"]])
    wider = {b.name.split(".")[-1]: b for b in both}["word_embeddings"]
    assert wider.rows is not None and set(wider.rows.tolist()) > set(expected)
    assert [b.shape for b in whole] == [b.shape for b in blocks_of(model)]  # what was handed in stays


def test_cut_gradients_are_the_columns_of_uncut_ones() -> None:
    task = bert()
    model = problem_of(task).model()
    whole = blocks_of(model, ["*_embeddings"])
    cut = with_rows_in_use(task, model, whole, [task.train])
    compared = 0
    # Queries look up rows outside the cut: those must fall away, not land in a neighbour's column.
    for split in (task.train, task.splits["query"]):
        loss = task.objective.loss
        pairs = zip(gradients(task, model, split, whole, loss), gradients(task, model, split, cut, loss), strict=True)
        for (_, uncut), (_, small) in pairs:
            for u, s in zip(uncut, small, strict=True):
                assert u.block.rows is not None and s.block.rows is not None
                columns = torch.isin(u.block.rows, s.block.rows)
                left, right = s.gradient().dense(), u.gradient().dense()
                torch.testing.assert_close(left, right[:, :, columns])
                if split is task.train:
                    assert (right[:, :, ~columns] == 0).all()
                compared += int((~columns).sum())
    assert compared > 0


def test_rows_under_the_padding_are_not_in_use() -> None:
    task = bert()
    ids, mask = task.train.inputs["input_ids"], task.train.inputs["attention_mask"]
    filled = Examples(
        task.train.ids,
        {"input_ids": torch.where(mask > 0, ids, torch.full_like(ids, 11)), "attention_mask": mask},
        task.train.targets,
    )
    model = problem_of(task).model()
    plain, other = (with_rows_in_use(task, model, blocks_of(model), [split]) for split in (task.train, filled))
    assert [b.shape for b in other] == [b.shape for b in plain]


def test_looking_for_rows_leaves_no_hooks() -> None:
    task = bert()
    model = problem_of(task).model()
    blocks = blocks_of(model)
    with_rows_in_use(task, model, blocks, [task.train])
    broken = Examples(("a",), {"nonsense": torch.zeros(1, 2)}, torch.zeros(1, dtype=torch.long))
    with pytest.raises(TypeError):
        with_rows_in_use(task, model, blocks, [broken])
    assert all(not m._forward_hooks for m in model.modules())


def test_models_without_embeddings_are_left_alone() -> None:
    task = vector_task([3, 2])
    model = task.initial(0)
    blocks = blocks_of(model)
    assert with_rows_in_use(task, model, blocks, [task.train]) == blocks
