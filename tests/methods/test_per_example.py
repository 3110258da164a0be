"""Per-example factors equal autograd, one example at a time, whatever the module, the batch and the padding."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    Positioned,
    bert,
    blocked,
    close,
    draw,
    error,
    explained,
    far,
    logit,
    per_example,
    problem_of,
    randomised,
    shared,
    stacked,
    task_of,
    three_classes,
    vector_task,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.base import Problem
from methods.gradients.blocks import Block, blocks_of
from methods.gradients.per_example import (
    Gradient,
    factors,
    flat,
    gradients,
    inner,
    norms,
    output_gradients,
    plain,
    recording,
    sum_of_products,
)
from methods.gradients.source import Source
from tasks.base import Examples, Task
from tasks.objectives.classification import Classification


def found_by_block(
    task: Task, model: nn.Module, examples: Examples, blocks: Sequence[Block], of: Callable, batch_size: int = 64
) -> dict[str, Tensor]:
    """{block: (N, out, in)} from all batches."""
    found = {b.name: torch.full((len(examples), *b.shape), torch.nan, dtype=torch.float64) for b in blocks}
    for index, batch in gradients(task, model, examples, blocks, of, batch_size):
        for g in plain(batch):
            found[g.block.name][index] = g.dense()
    return found


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("of", ["loss", "measure"])
@pytest.mark.parametrize("name", CASES)
def test_factors_equal_autograd(name: str, of: str, batch_size: int) -> None:
    task = CASES[name]()
    problem, function = problem_of(task), getattr(task.objective, of)
    model = problem.model()
    found = found_by_block(task, model, task.train, blocks_of(model), function, batch_size)
    free = explained(problem)
    reference = per_example(free, task.train, function)
    expected = blocked(free, reference)
    assert found.keys() == expected.keys() and len(found) >= 1
    for block, g in expected.items():
        if not block.endswith("attention.self.key"):
            assert close(found[block], g), block
    # Attention does not see a key's bias: its exact gradient is zero, and only the whole gradient has a scale.
    assert close(
        torch.cat([found[b].flatten(1) for b in expected], 1), torch.cat([g.flatten(1) for g in expected.values()], 1)
    )


def test_bias_is_the_last_column() -> None:
    task = three_classes()
    problem = problem_of(task)
    found = found_by_block(task, problem.model(), task.train, blocks_of(problem.model()), task.objective.loss)
    model = explained(problem)
    reference = per_example(model, task.train, task.objective.loss)
    first = blocked(model, reference, bias_last=False)
    for name, g in found.items():
        assert close(g[:, :, -1], torch.stack([r[f"{name}.bias"] for r in reference]))
        assert far(g, first[name])


def test_sums_and_not_means() -> None:
    """A loss that is averaged over the batch would divide every gradient by its size."""
    task = three_classes()
    problem = problem_of(task)
    blocks = blocks_of(problem.model())
    mean = found_by_block(
        task, problem.model(), task.train, blocks, lambda z, y: task.objective.loss(z, y) / len(y), batch_size=3
    )
    found = found_by_block(task, problem.model(), task.train, blocks, task.objective.loss, batch_size=3)
    for name, g in found.items():
        assert close(mean[name] * 3, g)
        assert far(mean[name], g)


def test_flat_has_the_blocks_one_after_the_other() -> None:
    task = three_classes()
    problem = problem_of(task)
    blocks = blocks_of(problem.model())
    whole = found_by_block(task, problem.model(), task.train, blocks, task.objective.loss)
    for index, found in gradients(task, problem.model(), task.train, blocks, task.objective.loss):
        assert close(flat(plain(found)), torch.cat([whole[b.name][index].flatten(1) for b in blocks], 1))


def test_padding_owes_nothing_to_the_loss_and_is_masked() -> None:
    task = bert()
    problem = problem_of(task)
    blocks, seen = blocks_of(problem.model()), set()
    for index, found in gradients(task, problem.model(), task.train, blocks, task.objective.loss):
        mask = task.train.batch(index).inputs["attention_mask"]
        assert (mask == 0).any()
        for f in found:
            if f.mask.shape == mask.shape:
                assert torch.equal(f.mask, mask.to(f.mask.dtype))
                assert (f.outputs[mask == 0] == 0).all()
                seen.add(f.block.kind)
            else:
                assert f.mask.shape == (len(index), 1) and f.mask.all()  # the head reads the first token only
    assert seen == {"linear", "embedding"}  # a norm has one number for all its positions


def refilled(examples: Examples) -> Examples:
    """Padding filled with random ids; the mask stays."""
    ids, mask = examples.inputs["input_ids"], examples.inputs["attention_mask"]
    noise = torch.randint(1, 12, ids.shape, generator=draw(77))
    return replace(examples, inputs={"input_ids": torch.where(mask > 0, ids, noise), "attention_mask": mask})


def test_what_stands_under_the_padding_does_not_matter() -> None:
    task = bert()
    problem = problem_of(task)
    model, blocks = problem.model(), blocks_of(problem.model())
    found = found_by_block(task, model, task.train, blocks, task.objective.loss)
    again = found_by_block(task, model, refilled(task.train), blocks, task.objective.loss)
    assert not torch.equal(refilled(task.train).inputs["input_ids"], task.train.inputs["input_ids"])
    unmasked = replace(refilled(task.train), inputs=dict(refilled(task.train).inputs))
    unmasked.inputs["attention_mask"] = torch.ones_like(unmasked.inputs["attention_mask"])
    wrong = found_by_block(task, model, unmasked, blocks, task.objective.loss)
    for block in blocks:
        if not block.name.endswith("attention.self.key"):
            assert close(again[block.name], found[block.name])
            assert far(wrong[block.name], found[block.name])


def test_extra_columns_of_padding_do_not_matter() -> None:
    task = bert()
    short = task.train.select([i for i, n in enumerate(task.train.lengths.tolist()) if n <= 5])  # type: ignore[union-attr]
    longest = 5
    problem = problem_of(task)
    model = problem.model()
    blocks = blocks_of(model)
    batches = {}
    for width in (longest, 8):
        batch = short.batch()
        inputs = {k: torch.nn.functional.pad(v[:, :longest], (0, width - longest)) for k, v in batch.inputs.items()}
        with torch.enable_grad(), recording(model, blocks, replace(batch, inputs=inputs)) as tape:
            total = task.objective.loss(model(**inputs), batch.targets).sum()
            batches[width] = factors(tape, model, blocks, total, None)
    assert batches[8][0].mask.shape[1] == 8 > batches[5][0].mask.shape[1]
    assert close(flat(plain(batches[8])), flat(plain(batches[5])))


def test_order_does_not_matter() -> None:
    task = bert()
    model = problem_of(task).model()
    blocks = blocks_of(model)
    order = torch.randperm(len(task.train), generator=draw(3))
    found = found_by_block(task, model, task.train, blocks, task.objective.loss, 3)
    shuffled = found_by_block(task, model, task.train.select(order), blocks, task.objective.loss, 3)
    for name in found:
        if not name.endswith("attention.self.key"):
            assert close(shuffled[name], found[name][order])
            assert far(shuffled[name], found[name])


def test_positions_looked_up_once_have_a_gradient_for_each_example() -> None:
    task = bert()
    problem = problem_of(task)
    model = problem.model()
    block = blocks_of(model, ["*position_embeddings"])
    found = found_by_block(task, model, task.train, block, task.objective.loss)[block[0].name]
    free = explained(problem)
    expected = blocked(free, per_example(free, task.train, task.objective.loss))[block[0].name]
    assert close(found, expected)
    assert far(expected.mean(0).expand_as(found).contiguous(), found)  # what sharing one lookup among all would give


def positioned() -> Task:
    def split(name: str, rows: int, seed: int) -> Examples:
        x = torch.randn(rows, 6, 3, generator=draw(seed), dtype=torch.float64)
        y = torch.randint(2, (rows,), generator=draw(seed + 1))
        return Examples(tuple(f"{name}{i}" for i in range(rows)), {"x": x}, y)

    build = partial(randomised, partial(Positioned, 6, 3, 2))
    return task_of(split("train", 3, 0), split("query", 2, 5), build, Classification(2))


@pytest.mark.parametrize("modules", [None, ("project",)])
def test_what_is_computed_once_for_all_examples_is_right_or_refused(modules: tuple[str, ...] | None) -> None:
    """The positions' vectors go through a linear layer before they meet an example: its input is (1, T, in).

    With B = 3 examples and T = 6 positions a careless reshape to (B, T / B, in) fits and is wrong.
    """
    task = positioned()
    problem = problem_of(task)
    model = problem.model()
    try:
        found = found_by_block(task, model, task.train, blocks_of(model, modules), task.objective.loss)
    except (RuntimeError, ValueError) as refusal:
        assert "project" in str(refusal)
        return
    free = explained(problem)
    expected = blocked(free, per_example(free, task.train, task.objective.loss))
    assert close(found["project"], expected["project"])


def test_a_module_used_twice_has_the_sum_of_its_uses() -> None:
    task = shared()
    problem = problem_of(task)
    model = problem.model()
    free = explained(problem)
    expected = blocked(free, per_example(free, task.train, task.objective.loss))
    twice = {"table", "mix", "norm"}
    for index, found in gradients(task, model, task.train, blocks_of(model), task.objective.loss):
        for f in found:
            assert close(f.gradient().dense(), expected[f.block.name][index])
            if f.block.name in twice:
                half = f.outputs.shape[1] // 2
                first = replace(f, inputs=f.inputs[:, :half], outputs=f.outputs[:, :half], mask=f.mask[:, :half])
                assert far(first.gradient().dense(), expected[f.block.name][index])  # only one use kept
                twice.remove(f.block.name)
    assert not twice


class Normed(nn.Module):
    """x (B, a, b) -> (B, 2) through a LayerNorm of any shape."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).flatten(1))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_norms_of_any_shape(shape: tuple[int, ...], bias: bool) -> None:
    x = torch.randn(4, 2, 3, generator=draw(0), dtype=torch.float64)
    rows = Examples(tuple("abcd"), {"x": x}, torch.tensor([0, 1, 1, 0]))
    build = partial(randomised, lambda: Normed(nn.LayerNorm(shape, bias=bias)))
    task = task_of(rows, rows, build, Classification(2))
    problem = problem_of(task)
    model, free = problem.model(), explained(problem_of(task))
    reference = per_example(free, rows, task.objective.loss)
    found = found_by_block(task, model, rows, blocks_of(model), task.objective.loss)["norm"]
    parts = [torch.stack([g[f"norm.{key}"].flatten() for g in reference]) for key in ("weight", "bias")[: 1 + bias]]
    assert close(found, torch.cat(parts, 1)[:, :, None])


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_perceptron(data: st.DataObject) -> None:
    widths = [*data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)), data.draw(st.integers(2, 4))]
    biases = data.draw(st.lists(st.booleans(), min_size=len(widths) - 1, max_size=len(widths) - 1))
    rows, batch_size = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 8))
    task = vector_task(widths, biases, rows=rows, seed=data.draw(st.integers(0, 99)))
    problem = problem_of(task)
    model, free = problem.model(), explained(problem)
    found = found_by_block(task, model, task.train, blocks_of(model), task.objective.loss, batch_size)
    expected = blocked(free, per_example(free, task.train, task.objective.loss))
    whole = torch.cat([g.flatten(1) for g in expected.values()], 1)
    assert close(torch.cat([found[name].flatten(1) for name in expected], 1), whole)


@pytest.mark.parametrize("name", ["logistic", "three_classes", "bert", "shared"])
def test_columns_of_the_root_make_the_gauss_newton_matrix(name: str) -> None:
    """Σ_r g_r g_rᵀ = Jᵀ (diag p − p pᵀ) J, example by example."""
    task = CASES[name]()
    problem = problem_of(task)
    model, free, classes = problem.model(), explained(problem), task.objective.classes  # type: ignore[attr-defined]
    jacobian = torch.stack([stacked(per_example(free, task.train, logit(c))) for c in range(classes)], 1)
    whole = [blocked(free, per_example(free, task.train, logit(c))) for c in range(classes)]
    assert jacobian.shape[:2] == (len(task.train), classes)
    compared = 0
    for index, columns in output_gradients(task, model, task.train, blocks_of(model), 5):
        assert len(columns) == classes - 1
        p = task.outputs(model, task.train.batch(index)).softmax(-1)
        h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        names = [f.block.name for f in columns[0]]
        j = torch.stack([torch.cat([w[n][index].flatten(1) for n in names], 1) for w in whole], 1)  # (B, C, P)
        expected = j.transpose(1, 2) @ h @ j
        rows = torch.stack([flat(plain(column)) for column in columns], 1)  # (B, R, P)
        assert close(rows.transpose(1, 2) @ rows, expected)
        compared += len(index)
    assert compared == len(task.train)


def test_a_float32_task_is_measured_in_the_precision_of_the_model() -> None:
    task = three_classes()
    train = replace(task.train, inputs={"x": task.train.inputs["x"].float()})
    single = replace(task, splits={**task.splits, "train": train}, dtype=torch.float32)
    model = problem_of(single).model().double()
    found = found_by_block(single, model, train, blocks_of(model), single.objective.loss)
    same = replace(train, inputs={"x": train.inputs["x"].double()})
    free = single.initial(0).double()
    expected = blocked(free, per_example(free, same, single.objective.loss))
    for name, g in expected.items():
        assert close(found[name], g)


def broken(outputs: Tensor, targets: Tensor) -> Tensor:
    raise ArithmeticError("broken objective")


class Broken(nn.Module):
    """Fails after its first layer has run."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.head(x)
        raise ArithmeticError("broken model")


def test_hooks_are_gone_after_use() -> None:
    task = three_classes()
    model = problem_of(task).model()
    blocks = blocks_of(model)
    with recording(model, blocks, task.train.batch()):
        assert hooks(model) == len(blocks)
    for _ in gradients(task, model, task.train, blocks, task.objective.loss, 5):
        pass
    for _ in output_gradients(task, model, task.train, blocks, 5):
        pass
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_exception() -> None:
    task = three_classes()
    model = problem_of(task).model()
    with pytest.raises(ArithmeticError, match="broken objective"):
        list(gradients(task, model, task.train, blocks_of(model), broken))
    assert hooks(model) == 0
    failing = replace(vector_task([3, 3]), build=Broken)
    model = problem_of(failing).model()
    with pytest.raises(ArithmeticError, match="broken model"):
        list(gradients(failing, model, failing.train, blocks_of(model), failing.objective.loss))
    assert hooks(model) == 0
    with pytest.raises(ArithmeticError, match="broken model"):
        list(output_gradients(failing, model, failing.train, blocks_of(model)))
    assert hooks(model) == 0


def test_hooks_are_gone_when_the_reader_stops_early() -> None:
    task = three_classes()
    model = problem_of(task).model()
    reader = gradients(task, model, task.train, blocks_of(model), task.objective.loss, 3)
    next(reader)
    reader.close()  # type: ignore[attr-defined]
    assert hooks(model) == 0


def test_train_mode_is_refused() -> None:
    task = bert()
    model = problem_of(task).model()
    blocks = blocks_of(model)
    model.get_submodule("encoder.embeddings.dropout").train()
    with pytest.raises(RuntimeError, match=r"train mode.*encoder\.embeddings\.dropout"):
        next(gradients(task, model, task.train, blocks, task.objective.loss))
    with pytest.raises(RuntimeError, match="train mode"):
        next(output_gradients(task, model, task.train, blocks))


class Overwriting(nn.Module):
    """Changes the output of its first layer in place, through a view that autograd does not object to."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4)
        self.activation = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.second(self.first(x).tanh())))


def test_outputs_changed_in_place_are_refused_by_name() -> None:
    task = replace(vector_task([3, 3]), build=partial(randomised, partial(Overwriting, True)))
    model = problem_of(task).model()
    with pytest.raises(RuntimeError, match=r"second.*in place"):
        list(gradients(task, model, task.train, blocks_of(model), task.objective.loss))
    task = replace(task, build=partial(randomised, partial(Overwriting, False)))
    model = problem_of(task).model()
    assert list(gradients(task, model, task.train, blocks_of(model), task.objective.loss))


class Idle(nn.Module):
    """`idle` is run and ignored; `unused` is not run at all."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        return self.head(x)


def test_a_module_without_effect_has_no_gradient_and_one_without_use_is_named() -> None:
    task = replace(vector_task([3, 3]), build=partial(randomised, Idle))
    model = problem_of(task).model()
    found = found_by_block(task, model, task.train, blocks_of(model, ["idle", "head"]), task.objective.loss)
    assert (found["idle"] == 0).all() and (found["head"] != 0).any()
    with pytest.raises(RuntimeError, match="unused"):
        list(gradients(task, model, task.train, blocks_of(model), task.objective.loss))


def test_tape_can_be_asked_again_with_another_cotangent() -> None:
    task = three_classes()
    model = problem_of(task).model()
    blocks, batch = blocks_of(model), task.train.batch()
    with torch.enable_grad(), recording(model, blocks, batch) as tape:
        outputs = model(**batch.inputs)
        one, other = (torch.randn(outputs.shape, generator=draw(k), dtype=torch.float64) for k in (1, 2))
        left = flat(plain(factors(tape, model, blocks, outputs, one)))
        right = flat(plain(factors(tape, model, blocks, outputs, other)))
        both = flat(plain(factors(tape, model, blocks, outputs, one + 2 * other)))
    assert close(both, left + 2 * right)
    assert error(left, right) > 0.1


def test_nothing_is_left_in_the_model() -> None:
    """Parameters keep their values and get no gradient."""
    task: Any = bert()
    problem: Problem = problem_of(task)
    model = problem.model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    list(gradients(task, model, task.train, blocks_of(model), task.objective.loss))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None


def test_embeddings_hold_the_columns_that_a_batch_looks_up() -> None:
    task = bert()
    model = problem_of(task).model()
    (block,) = blocks_of(model, ["*word_embeddings"])
    assert block.rows is not None
    for index, (f,) in gradients(task, model, task.train, [block], task.objective.loss, 3):
        g = f.gradient()
        ids = set(task.train.batch(index).inputs["input_ids"].flatten().tolist()) - {0}
        assert g.columns is not None and set(block.rows[g.columns].tolist()) == ids
        assert g.values.shape == (len(index), 4, len(ids)) and len(ids) < block.shape[1]
        others = torch.ones(block.shape[1], dtype=torch.bool)
        others[g.columns] = False
        assert (g.dense()[:, :, others] == 0).all() and torch.equal(g.dense()[:, :, g.columns], g.values)
        matrix = torch.randn(*block.shape, generator=draw(1), dtype=torch.float64)
        assert torch.equal(g.of(matrix), matrix[:, g.columns])
        assert close((g.of(matrix) * g.values).sum(), (matrix * g.dense()).sum())


@pytest.mark.parametrize("name", ["three_classes", "bert", "shared"])
def test_products_over_all_blocks(name: str) -> None:
    task = CASES[name]()
    problem = problem_of(task)
    model, free = problem.model(), explained(problem)
    blocks = blocks_of(model)
    m = stacked(per_example(free, task.splits["query"], task.objective.measure))
    g = stacked(per_example(free, task.train, task.objective.loss))
    asked = Source(task, model, tuple(blocks)).collected(task.splits["query"], task.objective.measure)
    assert all(a.columns is None for a in asked)
    assert close(norms(asked), m.norm(dim=1))
    for index, found in gradients(task, model, task.train, blocks, task.objective.loss, 5):
        assert close(inner(asked, plain(found)), m @ g[index].T)
        assert close(sum_of_products(plain(found), plain(found)), g[index].square().sum(1))
        assert close(norms(plain(found)), g[index].norm(dim=1))


def test_a_gradient_whose_square_is_no_float32_has_a_length() -> None:
    task = CASES["three_classes"]()
    blocks = blocks_of(problem_of(task).model())
    values = [torch.full((3, *block.shape), 1e-30) for block in blocks]
    values[0][1], values[1][2] = 0.0, 1e8
    found = [Gradient(block, v) for block, v in zip(blocks, values, strict=True)]
    flat = torch.cat([v.double().flatten(1) for v in values], 1)
    assert torch.allclose(norms(found), flat.norm(dim=1), rtol=1e-6)
    assert norms([Gradient(block, 0 * v) for block, v in zip(blocks, values, strict=True)]).tolist() == [0, 0, 0]


def test_collected_gradients_have_the_order_of_the_examples() -> None:
    task = bert()
    model = problem_of(task).model()
    blocks = blocks_of(model)
    found = Source(task, model, tuple(blocks)).collected(task.train, task.objective.loss)
    whole = found_by_block(task, model, task.train, blocks, task.objective.loss, 5)
    order = torch.argsort(task.train.lengths, stable=True)  # type: ignore[arg-type]
    for g in found:
        assert isinstance(g, Gradient)
        if not g.block.name.endswith("attention.self.key"):
            assert close(g.dense(), whole[g.block.name])
            assert far(g.dense()[order], whole[g.block.name])
