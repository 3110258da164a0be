"""Per-example gradients of convolutions, language models and odd modules equal autograd, one example at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    Named,
    bert,
    close,
    draw,
    explained,
    far,
    per_example,
    problem_of,
    randomised,
    stacked,
    task_of,
    three_classes,
)
from models import IGNORED, cnn, columns, gpt, images, llama, named_to_blocks, regression
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import prune

from methods.gradients.blocks import Block, blocks_of, from_parameters
from methods.gradients.per_example import factors, flat, gradients, output_gradients, plain, recording
from tasks.base import Examples, Task
from tasks.errors import UserError
from tasks.objectives.classification import Classification

MODELS: dict[str, Callable[[], Task]] = {
    "mlp": three_classes,
    "regression": regression,
    "bert": bert,
    "cnn": cnn,
    "gpt": gpt,
    "gpt, wide": partial(gpt, width=8),
    "gpt, untied": partial(gpt, tied=False),
    "gpt, not silent": partial(gpt, silent=False),
    "gpt, all targets": partial(gpt, prompt=0),
    "llama": llama,
    "llama, wide": partial(llama, width=8),
    "llama, tied": partial(llama, tied=True),
    "llama, the library's precision": partial(llama, double=False),
}
LANGUAGE = ["gpt", "gpt, not silent", "llama", "llama, tied"]


def found_by_block(
    task: Task, model: nn.Module, examples: Examples, blocks: Sequence[Block], of: Callable, batch_size: int = 64
) -> Named:
    """{block: (N, out, in)} from all batches."""
    found = {b.name: torch.full((len(examples), *b.shape), torch.nan, dtype=torch.float64) for b in blocks}
    for index, batch in gradients(task, model, examples, blocks, of, batch_size):
        for g in plain(batch):
            found[g.block.name][index] = g.dense()
    return found


def expected_by_block(task: Task, blocks: Sequence[Block], examples: Examples, of: Callable) -> Named:
    model = explained(problem_of(task))
    return named_to_blocks(model, blocks, columns(per_example(model, examples, of)))


def agree(found: Named, expected: Named) -> bool:
    """Block by block, and all blocks at once: the bias of a key has no gradient, hence no scale of its own."""
    names = [name for name in expected if not name.endswith("attention.self.key")]
    left, right = (torch.cat([g[name].flatten(1) for name in expected], 1) for g in (found, expected))
    return found.keys() == expected.keys() and all(close(found[n], expected[n]) for n in names) and close(left, right)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("of", ["loss", "measure"])
@pytest.mark.parametrize("name", MODELS)
def test_factors_equal_autograd_whatever_the_batch(name: str, of: str) -> None:
    task = MODELS[name]()
    model, function = problem_of(task).model(), getattr(task.objective, of)
    blocks = blocks_of(model)
    covered = [n for b in blocks for n in b.parameters]
    assert sorted(covered) == sorted(n for n, _ in model.named_parameters())
    expected = expected_by_block(task, blocks, task.train, function)
    for batch_size in (1, 3, 64):
        assert agree(found_by_block(task, model, task.train, blocks, function, batch_size), expected)
    assert hooks(model) == 0


MODES = ("zeros", "reflect", "replicate", "circular")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": (1, 2), "padding": (2, 1)},
        {"dilation": (2, 1)},
        {"dilation": 2, "stride": 2, "padding": 2},
        {"groups": 2},
        {"groups": 4, "stride": 2, "padding": 1, "padding_mode": "circular"},
        *({"padding": (1, 2), "padding_mode": mode} for mode in MODES),
        *({"padding": "same", "padding_mode": mode} for mode in MODES),
        {"padding": "same", "dilation": (3, 2)},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_convolutions(options: dict[str, Any], bias: bool) -> None:
    task = cnn(**options, bias=bias)
    model = problem_of(task).model()
    blocks = blocks_of(model)
    assert blocks[1].kind == ("whole" if "groups" in options else "linear")
    expected = expected_by_block(task, blocks, task.train, task.objective.loss)
    for batch_size in (1, 3, 64):
        assert agree(found_by_block(task, model, task.train, blocks, task.objective.loss, batch_size), expected)


def test_padding_modes_are_different_gradients() -> None:
    found = {}
    for mode in MODES:
        task = cnn(padding=1, padding_mode=mode)
        model = problem_of(task).model()
        blocks = blocks_of(model, ["second"])
        found[mode] = found_by_block(task, model, task.train, blocks, task.objective.loss)["second"]
    for one in MODES:
        assert all(far(found[one], found[other]) for other in MODES if other != one)


def test_images_without_an_axis_of_examples_are_refused() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return pad(self.conv(x[0]).mean((1, 2)), (0, 1)).expand(len(x), -1)

    rows = images("train", 2, 0)
    task = task_of(rows, rows, partial(randomised, Single), Classification(3))
    model = problem_of(task).model()
    with pytest.raises(RuntimeError, match="conv: its input has 3 axes"):  # the channels look like the two examples
        list(gradients(task, model, rows, blocks_of(model), task.objective.loss))


def test_llama_in_double_precision_is_the_same_function() -> None:
    ours, theirs = (llama(double=double) for double in (True, False))
    batch = ours.train.batch()
    found, expected = (task.outputs(task.initial(0), batch).detach() for task in (ours, theirs))
    assert close(found, expected, 1e-5) and not close(found, expected, 1e-12)


# Padding and ignored targets


@pytest.mark.parametrize("name", LANGUAGE)
def test_padding_does_not_matter(name: str) -> None:
    """Neither how much of it there is nor what stands under it."""
    task = MODELS[name]()
    model = problem_of(task).model()
    blocks, short = blocks_of(model), task.train.select([1, 3, 4])  # 3, 2 and 4 tokens
    expected = expected_by_block(task, blocks, short, task.objective.loss)
    whole = torch.cat([expected[b.name].flatten(1) for b in blocks], 1)
    for extra, low in ((0, 0), (0, 1), (2, 0), (2, 1)):
        batch = short.batch()
        inputs = {k: pad(v, (0, extra)) for k, v in batch.inputs.items()}
        if low:
            noise = torch.randint(low, 11, inputs["input_ids"].shape, generator=draw(5))
            inputs["input_ids"] = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], noise)
        with torch.enable_grad(), recording(model, blocks, replace(batch, inputs=inputs)) as tape:
            total = task.objective.loss(model(**inputs), batch.targets).sum()
            found = factors(tape, model, blocks, total, None)
        assert close(flat(plain(found)), whole)
        for f in found:
            if f.mask.shape == inputs["attention_mask"].shape:
                assert torch.equal(f.mask, inputs["attention_mask"].double())
                assert (f.outputs[f.mask == 0] == 0).all()


def test_a_mask_of_ones_is_another_gradient() -> None:
    task = gpt(silent=False)
    model = problem_of(task).model()
    blocks = blocks_of(model)
    inputs = {key: t.flip(1) for key, t in task.train.inputs.items()}  # padded on the left, where GPT-2 could look
    left = replace(task.train, inputs=inputs, targets=task.train.targets.flip(1))
    wrong = replace(left, inputs={**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})
    found, other = (
        flat(plain(next(gradients(task, model, rows, blocks, task.objective.loss))[1])) for rows in (left, wrong)
    )
    assert far(found, other)


@pytest.mark.parametrize("name", LANGUAGE)
def test_ignored_targets_have_no_loss(name: str) -> None:
    """Against a sum over the other positions, written out."""
    task = MODELS[name]()
    model, free = problem_of(task).model(), explained(problem_of(task))
    blocks = blocks_of(model)

    def written_out(outputs: Tensor, targets: Tensor) -> Tensor:
        logs = outputs.log_softmax(2)
        kept = [(t, int(y)) for t, y in enumerate(targets[0]) if y != IGNORED]
        assert kept and all(t < outputs.shape[1] for t, _ in kept)
        return -torch.stack([logs[0, t, y] for t, y in kept]).sum()[None]

    assert (task.train.targets[:, 0] == IGNORED).any()
    expected = named_to_blocks(free, blocks, columns(per_example(free, task.train, written_out)))
    assert agree(found_by_block(task, model, task.train, blocks, task.objective.loss), expected)
    told = replace(task.train, targets=task.train.targets.clamp_min(0))
    assert far(found_by_block(task, model, told, blocks, task.objective.loss)[blocks[0].name], expected[blocks[0].name])


# Modules without a rule of their own


class Odd(nn.Module):
    """x (B, 4, 3) -> (B, 2) through a module of any kind, twice where `twice`."""

    def __init__(self, odd: Callable[[], nn.Module], twice: bool = False) -> None:
        super().__init__()
        self.odd, self.twice = odd(), twice
        self.head = nn.LazyLinear(2)
        self(torch.zeros(1, 4, 3))  # makes the head

    def forward(self, x: Tensor) -> Tensor:
        x = self.odd(x)
        x = self.odd(x.tanh()) if self.twice else x
        return self.head(x.flatten(1))


class Scaled(nn.Linear):
    """Not what its base class says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Gate(nn.Module):
    """A parameter beside a module that has its own; a scalar; and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.sharp = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(()))
        self.idle = nn.Parameter(torch.empty(2))
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.inner(x * self.gate) * (self.sharp * x).sigmoid()


ODD: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(3),
    "LayerNorm, two axes": lambda: nn.LayerNorm((4, 3)),
    "LayerNorm, no bias": lambda: nn.LayerNorm(3, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(3),
    "RMSNorm, two axes": lambda: nn.RMSNorm((4, 3), eps=0.1),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "BatchNorm1d": lambda: nn.BatchNorm1d(4).eval(),
    "Conv1d": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "PReLU": lambda: nn.PReLU(4),
    "LayerNorm, pruned": lambda: prune.l1_unstructured(nn.LayerNorm(3), "weight", amount=1),
    "Linear, pruned": lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", amount=2),
    "Scaled": lambda: Scaled(3, 3),
    "Gate": Gate,
}


def odd(name: str, twice: bool = False) -> Task:
    splits = []
    for split, rows, seed in (("train", 7, 0), ("query", 3, 1)):
        x = torch.randn(rows, 4, 3, generator=draw(seed), dtype=torch.float64)
        y = torch.randint(2, (rows,), generator=draw(seed + 9))
        splits.append(Examples(tuple(f"{split}{i}" for i in range(rows)), {"x": x}, y))
    return task_of(splits[0], splits[1], partial(randomised, partial(Odd, ODD[name], twice)), Classification(2))


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_modules_without_a_rule(name: str, twice: bool) -> None:
    task = odd(name, twice)
    model = problem_of(task).model()
    blocks = blocks_of(model)
    assert (blocks[0].name, blocks[0].kind) == ("odd", "whole")
    expected = expected_by_block(task, blocks, task.train, task.objective.loss)
    for batch_size in (1, 3, 64):
        assert agree(found_by_block(task, model, task.train, blocks, task.objective.loss, batch_size), expected)
    for index, found in gradients(task, model, task.train, blocks, task.objective.loss):
        f = found[0]  # G = d · 1
        assert f.inputs.shape == (len(index), 1, 1) and f.outputs.shape == (len(index), 1, blocks[0].size)
        assert (f.inputs == 1).all() and f.mask.shape == (len(index), 1) and f.mask.all()


class Mixed(nn.Module):
    """Its output for an example depends on the other examples."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * self.scale


class Greedy(Mixed):
    """It changes what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1).exp() * self.scale


class Reader(Mixed):
    """It looks at a number, which cannot be done for many examples at once."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if x.sum().item() > 0 else -x * self.scale


class Couple(Mixed):
    """Two outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale, x)  # type: ignore[return-value]


class First(Mixed):
    """An output that is no tensor is taken apart."""

    def __init__(self, inner: nn.Module, *more: Any) -> None:
        super().__init__()
        self.inner, self.more = inner, more

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x * self.scale, *self.more)
        return found[0] if isinstance(found, tuple) else found


class Second(Mixed):
    """It can take a second input."""

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        return x * self.scale if more is None else x * self.scale + more


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Mixed, "odd is a Mixed, whose output is another one when an example is alone"),
        (Greedy, "odd is a Greedy, whose output is another one"),
        (Reader, "odd is a Reader, which cannot be run one example at a time"),
        (lambda: First(Couple()), r"odd\.inner is a Couple, which does not map one tensor to one tensor"),
        (lambda: First(nn.LSTM(3, 3)), r"odd\.inner is a LSTM, which does not map one tensor to one tensor"),
        (lambda: First(Second(), torch.ones(())), r"odd\.inner is a Second, which does not map one tensor to one"),
    ],
)
def test_modules_that_are_not_functions_of_one_example_are_refused_by_name(
    build: Callable[[], nn.Module], message: str
) -> None:
    task = odd("RMSNorm")
    task = replace(task, build=partial(randomised, partial(Odd, build)))
    model = problem_of(task).model()
    blocks = blocks_of(model)
    with pytest.raises(UserError, match=rf"method\.modules={message}.*leave it out"):
        list(gradients(task, model, task.train, blocks, task.objective.loss))
    assert hooks(model) == 0
    assert list(gradients(task, model, task.train, blocks_of(model, ["head"]), task.objective.loss))


# Curvature at the output


def output(k: int, outputs: Tensor, targets: Tensor) -> Tensor:
    """The k-th of all outputs."""
    return outputs.flatten(1)[:, k]


def gauss_newton(model: nn.Module, task: Task, examples: Examples, blocks: Sequence[Block]) -> Tensor:
    """J_iᵀ (∂²ℓ/∂outputs²) J_i of each example, (N, P, P), one output at a time."""
    found = []
    for i in range(len(examples)):
        one = examples.select([i])
        shape = task.outputs(model, one.batch()).shape[1:]
        rows = []
        for k in range(shape.numel()):
            gradient = per_example(model, one, partial(output, k))
            named = named_to_blocks(model, blocks, columns(gradient))
            rows.append(torch.cat([named[b.name].flatten() for b in blocks]))
        jacobian = torch.stack(rows)
        z = task.outputs(model, one.batch()).detach()

        def loss(z: Tensor, shape: torch.Size = shape, target: Tensor = one.targets) -> Tensor:
            return task.objective.loss(z.view(1, *shape), target).sum()

        h = torch.autograd.functional.hessian(loss, z.flatten())
        found.append(jacobian.T @ h @ jacobian)
    return torch.stack(found)


@pytest.mark.parametrize(
    "task",
    [cnn(), cnn(groups=2), regression(), odd("Gate", twice=True), gpt(layers=1, prompt=0), llama(layers=1, prompt=0)],
    ids=["cnn", "groups", "regression", "odd", "gpt", "llama"],
)
def test_columns_of_the_root_make_the_gauss_newton_matrix(task: Task) -> None:
    model, free = problem_of(task).model(), explained(problem_of(task))
    blocks, few = blocks_of(model), task.train.select([3, 4, 1])
    expected, compared = gauss_newton(free, task, few, blocks), 0
    for index, found in output_gradients(task, model, few, blocks, 2):
        rows = torch.stack([flat(plain(column)) for column in found], 1)  # (B, R, P)
        assert close(rows.transpose(1, 2) @ rows, expected[index])
        compared += len(index)
    assert compared == 3 and hooks(model) == 0


# Failures


@pytest.mark.parametrize("name", ["cnn", "gpt", "llama"])
def test_hooks_are_gone_after_an_exception(name: str) -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ArithmeticError("broken objective")

    task = MODELS[name]()
    model = problem_of(task).model()
    blocks = blocks_of(model)
    with pytest.raises(ArithmeticError, match="broken objective"):
        list(gradients(task, model, task.train, blocks, broken))
    assert hooks(model) == 0
    lost = replace(task, objective=replace(task.objective, name="lost"))  # type: ignore[type-var]
    object.__setattr__(lost.objective, "hessian_root", broken)
    with pytest.raises(TypeError):
        list(output_gradients(lost, model, task.train, blocks))
    assert hooks(model) == 0


class Steep(Classification):
    """Infinite curvature."""

    def hessian_root(self, outputs: Tensor) -> Tensor:
        return outputs[..., None] / 0


def test_gradients_that_are_not_finite_name_their_module() -> None:
    def steep(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - outputs.detach()).sqrt().sum(1)

    task = cnn()
    model = problem_of(task).model()
    for name in ("first", "head"):
        with pytest.raises(ArithmeticError, match=f"^{name}: its gradients are not finite$"):
            list(gradients(task, model, task.train, blocks_of(model, [name]), steep))
        with pytest.raises(ArithmeticError, match=f"^{name}: its gradients are not finite$"):
            list(output_gradients(replace(task, objective=Steep(3)), model, task.train, blocks_of(model, [name])))
    assert hooks(model) == 0


def test_nothing_is_left_in_the_model() -> None:
    """Parameters keep their values and get no gradient, buffers theirs, also of what is run once more."""
    for task in (odd("BatchNorm1d"), gpt(), cnn(groups=2)):
        model = problem_of(task).model()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        list(gradients(task, model, task.train, blocks_of(model), task.objective.loss))
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_two_mappings_from_parameters_to_blocks_agree() -> None:
    for name in ("cnn", "gpt", "llama, tied", "bert"):
        task = MODELS[name]()
        model = explained(problem_of(task))
        blocks = blocks_of(model)
        named = columns(per_example(model, task.train, task.objective.loss))
        expected = named_to_blocks(model, blocks, named)
        assert all(torch.equal(from_parameters(b, named), expected[b.name]) for b in blocks)
        assert stacked(per_example(model, task.train, task.objective.loss)).abs().sum() > 0
