"""Softmax cross-entropy: loss, margin, the curvature at the logits, samples."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tasks.objectives.classification import Classification

C = 4
OBJECTIVE = Classification(C)
LOGITS = 3 * torch.randn(50, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.arange(50) % C


def test_loss_is_cross_entropy_per_example() -> None:
    loss = OBJECTIVE.loss(LOGITS, TARGETS)
    assert loss.shape == (50,)
    torch.testing.assert_close(loss, -LOGITS.log_softmax(1)[torch.arange(50), TARGETS])
    torch.testing.assert_close(loss.mean(), cross_entropy(LOGITS, TARGETS))


def test_measure_is_the_margin_over_all_other_classes_together() -> None:
    wanted = torch.stack(
        [z[y] - torch.cat([z[:y], z[y + 1 :]]).logsumexp(0) for z, y in zip(LOGITS, TARGETS, strict=True)]
    )
    torch.testing.assert_close(OBJECTIVE.measure(LOGITS, TARGETS), wanted)
    p = LOGITS.softmax(1)[torch.arange(50), TARGETS]
    torch.testing.assert_close(wanted, (p / (1 - p)).log())


@pytest.mark.parametrize("size", [1e2, 1e3])
def test_measure_and_its_gradient_stand_huge_logits(size: float) -> None:
    logits = torch.tensor([[size, 0.0, -size], [0.0, size, -size]], dtype=torch.float32, requires_grad=True)
    margins = Classification(3).measure(logits, torch.tensor([0, 0]))
    assert margins.tolist() == [size, -size]
    (gradient,) = torch.autograd.grad(margins.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, 0.0]]), rtol=0, atol=1e-30)


def test_hessian_root_squares_to_the_hessian_with_one_column_less() -> None:
    root = OBJECTIVE.hessian_root(LOGITS)
    assert root.shape == (50, C, C - 1)
    p = LOGITS.softmax(1)
    wanted = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(root @ root.mT, wanted, rtol=1e-12, atol=1e-12)
    one = torch.autograd.functional.hessian(lambda z: OBJECTIVE.loss(z[None], TARGETS[:1])[0], LOGITS[0])
    torch.testing.assert_close((root @ root.mT)[0], one)


def test_hessian_root_stands_certainty() -> None:
    root = Classification(3).hessian_root(torch.tensor([[1e3, 0.0, 0.0]]))
    assert root.dtype == torch.float32 and torch.isfinite(root).all() and root.abs().max() < 1e-6


def test_samples_come_from_the_predictive_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5]], dtype=torch.float64)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = OBJECTIVE.sample(logits.expand(20_000, C), uniforms)
    frequency = torch.bincount(drawn, minlength=C).double() / 20_000
    torch.testing.assert_close(frequency, logits.softmax(1)[0], rtol=0, atol=4 * 0.5 / 20_000**0.5)
    order = torch.randperm(20_000, generator=torch.Generator().manual_seed(2))
    again = OBJECTIVE.sample(logits.expand(20_000, C), uniforms[order])
    assert torch.equal(drawn[order], again), "an example's draw depends on its own number only"
    apart = OBJECTIVE.sample(50 * torch.eye(C), torch.rand(C))
    assert apart.tolist() == list(range(C)), "each row from its own distribution"
    edges = OBJECTIVE.sample(torch.zeros(2, C), torch.tensor([0.0, 1.0]))
    assert edges.tolist() == [0, C - 1], "float32 may round a number below 1 up"


def test_fitness_is_accuracy() -> None:
    assert OBJECTIVE.fitness(torch.eye(C)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 3])) == {"accuracy": 0.75}
