"""Which parameters are covered, in which shape; what has no rule is refused by name."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import (
    Twice,
    bert,
    close,
    draw,
    far,
    parameters,
    per_example,
    problem_of,
    randomised,
    shared,
    task_of,
    vector_task,
    without_bias,
)
from models import cnn, columns, gpt, llama, named_to_blocks
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from methods.gradients.blocks import (
    WHOLE_LIMIT,
    Block,
    blocks_of,
    coverage,
    from_parameters,
    to_parameters,
    with_rows_in_use,
)
from methods.gradients.per_example import flat, gradients, plain
from tasks.base import Examples, Task
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
    assert (norm.kind, norm.shape, norm.bias) == ("whole", (8, 1), False)
    assert (head.kind, head.shape, head.bias) == ("linear", (2, 5), True)
    assert head.parameters == ("head.weight", "head.bias")
    assert head.size == 10
    plain = {b.name: b for b in blocks_of(without_bias().initial(0))}
    assert plain["layers.0"].shape == (4, 3) and not plain["layers.0"].bias
    assert {b.name: b.shape for b in blocks_of(Twice(3))}["norm"] == (4, 1)


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
    """A parameter of a module that computes nothing itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def pruned() -> nn.Module:
    """Its type says Linear, its parameters are others."""
    return prune.l1_unstructured(nn.Linear(3, 3), "weight", amount=2)


@pytest.mark.parametrize(
    "module", [nn.Bilinear(2, 2, 3), nn.MultiheadAttention(4, 1), Own(), nn.ParameterList([torch.ones(2)])],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_modules_without_a_rule_are_refused_by_name(module: nn.Module) -> None:
    with pytest.raises(UserError, match=rf"method\.modules=odd is a {type(module).__name__}.*leave it out"):
        blocks_of(With(module))
    assert [b.name for b in blocks_of(With(module), ["head"])] == ["head"]  # leaving it out is the user's choice


@pytest.mark.parametrize(
    "module",
    [nn.Conv1d(2, 2, 3), nn.Conv2d(2, 2, 3, groups=2), nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.RMSNorm(3),
     nn.EmbeddingBag(4, 3), Scaled(3, 3), pruned()],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_other_modules_are_one_dense_vector(module: nn.Module) -> None:
    block, _ = blocks_of(With(module))
    own = dict(module.named_parameters())
    assert (block.kind, block.shape, block.bias) == ("whole", (sum(p.numel() for p in own.values()), 1), False)
    assert block.parameters == tuple(f"odd.{key}" for key in own)
    assert block.shapes == tuple(p.shape for p in own.values())


def test_large_modules_without_a_rule_are_refused_by_name() -> None:
    assert blocks_of(With(nn.GroupNorm(1, WHOLE_LIMIT // 2)))[0].shape == (4096, 1)
    with pytest.raises(UserError, match=r"method\.modules=odd is a GroupNorm of 4098 numbers.*4096.*list all others"):
        blocks_of(With(nn.GroupNorm(1, WHOLE_LIMIT // 2 + 1)))


def test_linear_layers_of_all_kinds() -> None:
    first, second, _ = blocks_of(cnn(bias=False).initial(0))
    assert (first.kind, first.shape, first.bias) == ("linear", (4, 9), True)
    assert (second.kind, second.shape, second.bias) == ("linear", (4, 24), False)
    blocks = {b.name: b for b in blocks_of(gpt().initial(0))}
    mixed = blocks["network.transformer.h.0.attn.c_attn"]
    assert (mixed.kind, mixed.shape, mixed.bias, mixed.transposed) == ("linear", (12, 5), True, True)
    assert mixed.shapes == ((4, 12), (12,))


# Parameters that modules share


class Tied(nn.Module):
    """ids (B, T) -> (B, V): the output layer is the embedding transposed."""

    def __init__(self, rows: int = 5, padding: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 3, padding_idx=padding)
        self.head = nn.Linear(3, rows, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh().sum(1))


class Pair(nn.Module):
    """ids (B, T) -> (B, 5): two modules, one after the other, share their weight, and their bias where there is one."""

    def __init__(self, first: nn.Module, second: nn.Module, weight_only: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.first, self.second = first, second
        second.weight = first.weight
        if not weight_only and getattr(first, "bias", None) is not None:
            second.bias = first.bias
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        if isinstance(self.first, nn.Embedding):
            x = self.first(ids) * self.second(ids.flip(1)).tanh() + x
        elif isinstance(self.first, nn.Conv2d):
            x = self.second(self.first(x[:, None]).tanh())[:, 0]
        else:
            x = self.second(self.first(x).tanh() + x)
        return self.head(x.tanh().sum(1))


def words(build: Callable[[], nn.Module]) -> Task:
    ids = torch.randint(0, 5, (4, 3), generator=draw(0))
    rows = Examples(tuple("abcd"), {"ids": ids}, torch.tensor([0, 2, 4, 1]))
    return task_of(rows, rows, partial(randomised, build), Classification(5))


def convolution(padding: int, dilation: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(1, 1, 3, padding=padding, dilation=dilation, groups=groups)


TIES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], str, tuple[int, int]]] = {
    "table": (Tied, ("table", "head"), "linear", (3, 5)),
    "padded table": (partial(Tied, padding=2), ("table", "head"), "linear", (3, 5)),
    "linear": (lambda: Pair(nn.Linear(6, 6), nn.Linear(6, 6)), ("first", "second"), "linear", (6, 7)),
    "conv1d": (lambda: Pair(Conv1D(6, 6), Conv1D(6, 6)), ("first", "second"), "linear", (6, 7)),
    "conv2d": (lambda: Pair(convolution(1, 1), convolution(2, 2)), ("first", "second"), "linear", (1, 10)),
    "norms": (lambda: Pair(nn.LayerNorm(6), nn.LayerNorm(6)), ("first", "second"), "whole", (12, 1)),
    "odd": (lambda: Pair(Scaled(6, 6), Scaled(6, 6)), ("first", "second"), "whole", (42, 1)),
    "embeddings": (
        lambda: Pair(nn.Embedding(5, 6, padding_idx=1), nn.Embedding(5, 6, padding_idx=1)),
        ("first", "second"),
        "embedding",
        (6, 4),
    ),
}


@pytest.mark.parametrize("name", TIES)
def test_modules_that_share_their_parameters_are_one_block(name: str) -> None:
    build, modules, kind, shape = TIES[name]
    task = words(build)
    model, free = problem_of(task).model(), task.initial(0)
    blocks = blocks_of(model)
    (block,) = [b for b in blocks if len(b.modules) > 1]
    assert (block.name, block.modules, block.kind, block.shape) == (modules[0], modules, kind, shape)
    assert sorted(name for b in blocks for name in b.parameters) == sorted(parameters(model))
    total = sum(p.numel() for p in model.parameters())
    assert coverage(model, blocks)["parameters"] == coverage(model, blocks)["of"] == total
    expected = named_to_blocks(free, blocks, columns(per_example(free, task.train, task.objective.loss)))
    for batch_size in (1, 3, 4):
        for index, found in gradients(task, model, task.train, blocks, task.objective.loss, batch_size):
            for g in plain(found):
                assert close(g.dense(), expected[g.block.name][index])
    (f,) = [f for f in found if f.block is block]
    half = f.outputs.shape[1] // 2
    if kind != "whole":  # one use alone is another gradient
        part = replace(f, inputs=f.inputs[:, :half], outputs=f.outputs[:, :half], mask=f.mask[:, :half])
        assert far(part.gradient().dense(), expected[block.name][index])


def test_a_padding_row_is_a_parameter_of_the_output_layer_only() -> None:
    task = words(partial(Tied, padding=2))
    free = task.initial(0)
    model = problem_of(task).model()
    (block,) = blocks_of(model)
    ((_, (f,)),) = gradients(task, model, task.train, [block], task.objective.loss)
    assert (task.train.inputs["ids"] == 2).any()
    p = task.outputs(free, task.train.batch()).softmax(1)[:, 2] - (task.train.targets == 2).double()
    state = free.table(task.train.inputs["ids"]).tanh().sum(1)  # type: ignore[operator]
    torch.testing.assert_close(f.gradient().dense()[:, :, 2], (p[:, None] * state).detach())


@pytest.mark.parametrize("chosen", ["table", "head"])
def test_half_of_a_tie_is_refused(chosen: str) -> None:
    other = {"table": "head", "head": "table"}[chosen]
    with pytest.raises(UserError, match=rf"method\.modules={chosen} shares its weight with {other}; take all.*or none"):
        blocks_of(Tied(), [chosen])
    assert [b.name for b in blocks_of(Tied(), ["head", "table"])] == ["table"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Tied(bias=True), "table,head share parameters, but not their bias"),
        (Pair(nn.Linear(6, 6), nn.Linear(6, 6), weight_only=True), "first,second share parameters, but not their bias"),
        (Tied(rows=4097), "table,head share a weight of 4097 rows, more than 4096"),
        (Pair(nn.Linear(6, 6), Scaled(6, 6)), "first,second share their weight, but use it in different ways"),
        (Pair(nn.Linear(6, 6), Conv1D(6, 6)), "first,second share their weight, but use it in different ways"),
        (Pair(nn.Embedding(5, 6), nn.Embedding(5, 6, padding_idx=0)), "first,second share their weight, but"),
    ],
)  # fmt: skip
def test_ties_without_a_rule_are_refused_by_name(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=rf"method\.modules={message}.*leave it out"):
        blocks_of(model)
    if isinstance(model, Pair):
        assert [b.name for b in blocks_of(model, ["table", "head"])] == ["table", "head"]


def test_tables_of_the_output_layer_are_not_cut_and_shared_embeddings_to_all_their_ids() -> None:
    task = words(Tied)
    model = problem_of(task).model()
    ids = torch.tensor([[0, 1, 1]])
    few = Examples(("a",), {"ids": ids}, torch.tensor([0]))
    (table,) = with_rows_in_use(task, model, blocks_of(model), [few])
    assert table.shape == (3, 5) and table.rows is None

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Embedding(5, 6), nn.Embedding(5, 6)
            self.second.weight = self.first.weight

        def forward(self, ids: Tensor) -> Tensor:
            return (self.first(input=ids) * self.second(ids + 2)).sum((1, 2))[:, None]

    (shared_by_two,) = with_rows_in_use(task, Apart(), blocks_of(Apart()), [few])
    assert shared_by_two.rows is not None and shared_by_two.rows.tolist() == [0, 1, 2, 3]


# To the model's parameters and back


def all_kinds() -> dict[str, tuple[Task, list[Block]]]:
    found = {"cnn": cnn(), "no bias": cnn(bias=False), "groups": cnn(groups=2), "gpt": gpt(), "llama": llama(tied=True)}
    found |= {"bert": bert(), "shared": shared(), "without_bias": without_bias()}
    found |= {name: words(build) for name, (build, *_) in TIES.items()}
    made = {}
    for name, task in found.items():
        model = problem_of(task).model()
        made[name] = task, with_rows_in_use(task, model, blocks_of(model), [task.train.select([0, 1])])
    return made


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_matrices_and_parameters_are_two_forms_of_one_thing(lead: tuple[int, ...]) -> None:
    kinds, cut = set(), 0
    for name, (task, blocks) in all_kinds().items():
        model = task.initial(0)
        rng = draw(1)
        whole = {n: torch.randn(*lead, *p.shape, generator=rng) for n, p in model.named_parameters()}
        flat_lead = {n: v.flatten(0, len(lead) - 1) if lead else v[None] for n, v in whole.items()}
        expected = named_to_blocks(model, blocks, flat_lead)
        for block in blocks:
            matrix = torch.randn(*lead, *block.shape, generator=rng)
            named = to_parameters(block, matrix)
            assert {n: v.shape for n, v in named.items()} == {n: whole[n].shape for n in block.parameters}, name
            assert torch.equal(from_parameters(block, named), matrix)
            read = from_parameters(block, whole)
            assert torch.equal(read.reshape(-1, *block.shape), expected[block.name])
            products = sum((named[n] * whole[n]).sum() for n in named), (matrix * read).sum()
            torch.testing.assert_close(*products)
            kinds.add((block.kind, block.bias, block.transposed))
            cut += sum(v.numel() for v in named.values()) > matrix.numel()
    assert cut > 0
    assert kinds == {
        ("linear", True, False), ("linear", False, False), ("linear", True, True), ("linear", False, True),
        ("embedding", False, True), ("whole", False, False),
    }  # fmt: skip


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
