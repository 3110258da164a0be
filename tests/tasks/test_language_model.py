"""tasks/objectives/language_model: next-token loss over scored tokens, and the products and draws that go with it."""

import math

import pytest
import torch
from torch import Tensor

from tasks.objectives.classification import Classification
from tasks.objectives.language_model import NO_TARGET, LanguageModel
from tasks.objectives.regression import Regression

B, T, V = 3, 4, 5
DRAW = torch.Generator().manual_seed(0)
OUTPUTS = 2 * torch.randn(B, T, V, generator=DRAW, dtype=torch.float64)
TARGETS = torch.tensor([[NO_TARGET, 1, 4, NO_TARGET], [2, NO_TARGET, NO_TARGET, NO_TARGET], [0, 1, 2, 3]])
WIDER = torch.cat([TARGETS, torch.full((B, 2), NO_TARGET)], 1)  # as of a split whose longest row is elsewhere
OBJECTIVE = LanguageModel(V)


def by_hand(outputs: Tensor, targets: Tensor) -> Tensor:
    """Σ_t −log p(y_t), token by token."""
    found = []
    for z, y in zip(outputs, targets, strict=True):
        found.append(-sum(math.log(z[t].softmax(0)[y[t]]) for t in range(T) if y[t] != NO_TARGET))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("targets", [TARGETS, WIDER])
def test_loss_is_the_sum_over_scored_tokens_and_the_measurement_its_negative(targets: Tensor) -> None:
    expected = by_hand(OUTPUTS, TARGETS)
    assert torch.allclose(OBJECTIVE.loss(OUTPUTS, targets), expected, atol=1e-12)
    m = OBJECTIVE.measure(OUTPUTS, targets)
    assert torch.allclose(m, -expected, atol=1e-12)
    assert torch.equal(OBJECTIVE.loss_of_measurement(m), OBJECTIVE.loss(OUTPUTS, targets))
    f = OBJECTIVE.output(OUTPUTS, targets).requires_grad_()
    (slope,) = torch.autograd.grad(OBJECTIVE.loss_of_measurement(f).sum(), f)
    assert torch.equal(OBJECTIVE.residual(OUTPUTS, targets), -slope)


def hessian(loss: object, outputs: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(loss, outputs).reshape(outputs.numel(), outputs.numel())


@pytest.mark.parametrize("targets", [TARGETS, WIDER])
def test_hessian_times_is_autograds_hessian_times(targets: Tensor) -> None:
    whole = hessian(lambda z: OBJECTIVE.loss(z, targets).sum(), OUTPUTS)
    u = torch.randn(6, B, T, V, generator=DRAW, dtype=torch.float64)
    expected = (u.reshape(6, -1) @ whole).reshape(u.shape)
    assert torch.allclose(OBJECTIVE.hessian_times(OUTPUTS, targets, u), expected, atol=1e-12)
    with pytest.raises(NotImplementedError):
        OBJECTIVE.hessian_root(OUTPUTS)


def test_hessian_times_of_the_other_objectives() -> None:
    logits, labels = OUTPUTS[:, 0], TARGETS[:, 0].clamp_min(0)
    u = torch.randn(2, *logits.shape, generator=DRAW, dtype=torch.float64)
    whole = hessian(lambda z: Classification(V).loss(z, labels).sum(), logits)
    expected = (u.reshape(2, -1) @ whole).reshape(u.shape)
    assert torch.allclose(Classification(V).hessian_times(logits, labels, u), expected, atol=1e-12)
    f, y = logits[:, :1], logits[:, 1]
    whole = hessian(lambda z: Regression().loss(z, y).sum(), f)
    assert torch.allclose(Regression().hessian_times(f, y, u[..., :1]), (u[..., 0] @ whole)[..., None])


def test_draws_follow_the_model_and_keep_what_has_no_target() -> None:
    n = 20_000
    outputs = OUTPUTS[:1].expand(n, T, V)
    uniforms = torch.rand(n, T + 2, generator=DRAW, dtype=torch.float64)
    uniforms[:, 1] = torch.nan
    drawn = OBJECTIVE.sample(outputs, uniforms)
    assert drawn.shape == (n, T) and (drawn[:, 1] == NO_TARGET).all()
    for t in (0, 2, 3):
        shares = torch.bincount(drawn[:, t], minlength=V) / n
        assert (shares - OUTPUTS[0, t].softmax(0)).abs().max() < 0.015
    assert torch.equal(OBJECTIVE.sample(outputs[:5], uniforms[:5]), drawn[:5]), "a row's draw is its own"


def test_right_is_where_every_scored_token_is_greedily_right() -> None:
    best = OUTPUTS.argmax(-1)
    targets = best.masked_fill(TARGETS == NO_TARGET, NO_TARGET)
    assert OBJECTIVE.correct(OUTPUTS, targets).tolist() == [True, True, True]
    targets[2, 3] = (targets[2, 3] + 1) % V
    assert OBJECTIVE.correct(OUTPUTS, targets).tolist() == [True, True, False]
    facts = OBJECTIVE.fitness(OUTPUTS, targets)
    assert facts["accuracy"] == pytest.approx(2 / 3)
    assert facts["token_accuracy"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    tokens = torch.tensor([2.0, 1.0, 4.0], dtype=torch.float64)
    assert facts["loss_per_token"] == pytest.approx((by_hand(OUTPUTS, targets) / tokens).mean().item())


def test_right_of_classes_and_of_numbers() -> None:
    logits = OUTPUTS[:, 0]
    right = logits.argmax(-1)
    wrong = torch.stack([right[0], (right[1] + 1) % V, right[2]])
    assert Classification(V).correct(logits, wrong).tolist() == [True, False, True]
    with pytest.raises(NotImplementedError):
        Regression().correct(logits[:, :1], logits[:, 1])
