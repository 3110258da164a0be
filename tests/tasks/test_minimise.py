"""The optimum of a convex task: against scipy and scikit-learn, many weightings at once against one by one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from small_tasks import CONVEX, assert_same, vector_task
from torch import Tensor
from torch.func import functional_call

from tasks.training import minimise as module
from tasks.training.minimise import lbfgs, minimise
from tasks.training.train import train
from tasks.training.vectorised import train_stack

GAMMA = CONVEX["weight_decay"]
TASK = vector_task(**CONVEX)


def weights() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    random = torch.rand(4, 24, generator=draw, dtype=torch.float64) * 3
    random[1] = (random[1] > 1.5).double()
    random[2] = 1.0
    random[3, :20] = 0.0
    return random


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in parameters.values()])


def objective(parameters: dict[str, Tensor], w: Tensor, n: float) -> Tensor:
    outputs = functional_call(TASK.initial(0), parameters, (), TASK.train.inputs)
    losses = TASK.objective.loss(outputs, TASK.train.targets)
    return (w * losses).sum() / n + GAMMA / 2 * sum(p.square().sum() for p in parameters.values())


def test_gradients_vanish_to_the_tolerance_and_values_are_the_objectives() -> None:
    counts = torch.tensor([24, 12, 24, 4])
    found, values = minimise(TASK, weights(), counts)
    for m, w in enumerate(weights()):
        one = {k: v[m].clone().requires_grad_() for k, v in found.items()}
        value = objective(one, w, float(counts[m]))
        gradients = torch.autograd.grad(value, list(one.values()))
        assert torch.cat([g.flatten() for g in gradients]).norm() <= 1.01 * TASK.recipe.tolerance
        assert values[m].item() == pytest.approx(value.item(), abs=1e-12)


@pytest.mark.parametrize("row", range(4))
def test_the_optimum_is_scipys(row: int) -> None:
    w, n = weights()[row], 10.0
    shapes = {name: p.shape for name, p in TASK.initial(0).named_parameters()}

    def function(theta: np.ndarray) -> tuple[float, np.ndarray]:
        parts = torch.tensor(theta, requires_grad=True)
        pieces = parts.split([s.numel() for s in shapes.values()])
        value = objective({k: p.view(s) for (k, s), p in zip(shapes.items(), pieces, strict=True)}, w, n)
        (gradient,) = torch.autograd.grad(value, parts)
        return value.item(), gradient.numpy()

    size = sum(s.numel() for s in shapes.values())
    wanted = minimize(function, np.zeros(size), jac=True, method="BFGS", options={"gtol": 1e-10})
    found, values = minimise(TASK, w[None], torch.tensor([n]))
    np.testing.assert_allclose(flat({k: v[0] for k, v in found.items()}).numpy(), wanted.x, atol=1e-6)
    assert values.item() == pytest.approx(wanted.fun, abs=1e-12)


def test_the_optimum_is_scikit_learns() -> None:
    w = weights()[0]
    x = torch.cat([TASK.train.inputs["x"], torch.ones(24, 1, dtype=torch.float64)], 1).numpy()  # the bias is penalised
    wanted = LogisticRegression(C=1 / (24 * GAMMA), fit_intercept=False, tol=1e-10, max_iter=10_000)
    wanted.fit(x, TASK.train.targets.numpy(), sample_weight=w.numpy())
    found, _ = minimise(TASK, w[None], torch.tensor([24]))
    both = torch.cat([found["layers.linear0.weight"][0], found["layers.linear0.bias"][0][:, None]], 1)
    np.testing.assert_allclose(both.numpy(), wanted.coef_, atol=1e-5)


def test_rows_at_once_are_rows_one_by_one() -> None:
    counts = torch.tensor([24, 12, 24, 4])
    together, values = minimise(TASK, weights(), counts)
    in_pieces, _ = minimise(TASK, weights(), counts, chunk=3)
    for m, w in enumerate(weights()):
        alone, value = minimise(TASK, w[None], counts[m : m + 1])
        for name in together:
            torch.testing.assert_close(together[name][m], alone[name][0], rtol=0, atol=1e-7)
            torch.testing.assert_close(in_pieces[name][m], alone[name][0], rtol=0, atol=1e-7)
        assert values[m].item() == pytest.approx(value.item(), abs=1e-12)
    assert not torch.allclose(together["layers.linear0.weight"][0], together["layers.linear0.weight"][3], atol=1e-2)


def test_both_trainers_reach_it_with_their_denominators() -> None:
    mask = weights()[1]
    for own, n in ((False, 24.0), (True, mask.sum().item())):
        wanted, _ = minimise(TASK, mask[None], torch.tensor([n]))
        made = train(TASK, 3, mask, own_batches=own)
        assert_same(made.final, {k: v[0] for k, v in wanted.items()})
        stack = train_stack(TASK, mask[None], [5], own_batches=own)
        assert_same(stack, wanted)
        assert len(made.checkpoints) == 1
    one, other = train(TASK, 1), train(TASK, 2)
    assert_same(one.final, other.final, 1e-8)  # the optimum is nobody's seed


def test_an_unreached_optimum_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ITERATIONS", 1)
    with pytest.raises(ArithmeticError, match="no optimum"):
        minimise(TASK, weights(), torch.full((4,), 24))


def rows_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Values and gradients of one function for every row."""

    def found(theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert len(theta) == len(rows)
        theta = theta.detach().requires_grad_()
        values = function(theta)
        return values.detach(), torch.autograd.grad(values.sum(), theta)[0]

    return found


ONE = torch.ones(1, 1, dtype=torch.float64)


def test_each_row_stops_at_its_own_tolerance() -> None:
    theta = torch.full((2, 1), 0.5, dtype=torch.float64)
    function = rows_of(lambda t: (t.cosh() - 1)[:, 0])
    found, values, norms = lbfgs(function, theta, ONE, torch.tensor([0.1, 1e-9]))
    assert 1e-9 < norms[0] <= 0.1 and norms[1] <= 1e-9 and values[1] < 1e-15
    assert norms.tolist() == found.sinh().abs()[:, 0].tolist()


def test_a_step_to_where_nothing_is_defined_is_shortened() -> None:
    theta = torch.tensor([[3.0], [0.5]], dtype=torch.float64)
    found, _, norms = lbfgs(rows_of(lambda t: (t - t.log())[:, 0]), theta, 0.1 * ONE, 1e-9)
    assert norms.max() <= 1e-9 and (found - 1).abs().max() < 1e-8


def test_a_row_at_a_kink_stops_and_says_so_and_the_others_go_on() -> None:
    """|a| + b²: started at a = 0 whose gradient is put to 1, no step goes down; b alone would."""

    def function(theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        stuck = (rows == 0).double()[:, None]
        calls.append(len(rows))
        slope = stuck * torch.where(theta >= 0, 1.0, -1.0) + (1 - stuck) * 2 * theta
        return (stuck * theta.abs() + (1 - stuck) * theta**2)[:, 0], slope

    calls: list[int] = []
    start = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
    found, values, norms = lbfgs(function, start, ONE, 1e-9)
    assert norms[0] == 1.0 and norms[1] <= 1e-9
    assert found[0] == 0 and values[0] == 0
    assert len(calls) < 100, "two failed line searches are enough"
