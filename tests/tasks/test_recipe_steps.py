"""What every engine shares: batch order, learning rates, kept steps, clipping."""

import pytest
import torch
from small_tasks import recipe, tokens

from tasks.training.recipe_steps import batch_order, clip, kept_steps, learning_rates, optimizer, steps_of

LENGTHS = tokens("train", 57, longest=30).lengths
ROWS = torch.arange(57)


def padding(steps: list[torch.Tensor]) -> int:
    assert LENGTHS is not None
    return sum(int(LENGTHS[s].max() * len(s) - LENGTHS[s].sum()) for s in steps)


@pytest.mark.parametrize("bucket", [1, 3])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("batch_size", [4, 57, 100])
def test_each_epoch_is_a_permutation_in_whole_batches(
    bucket: int, lengths: torch.Tensor | None, batch_size: int
) -> None:
    r = recipe(bucket=bucket, batch_size=batch_size, epochs=3)
    steps = batch_order(ROWS, lengths, r, seed=1)
    assert len(steps) == steps_of(r, 57) == 3 * -(-57 // batch_size)
    per_epoch = len(steps) // 3
    epochs = [torch.cat(steps[e * per_epoch : (e + 1) * per_epoch]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(57))
    assert len({tuple(e.tolist()) for e in epochs}) == 3, "epochs are shuffled anew"
    assert sorted(len(s) for s in steps[:per_epoch])[1:] == [batch_size] * (per_epoch - 1)


def test_buckets_reduce_padding() -> None:
    plain, bucketed = (batch_order(ROWS, LENGTHS, recipe(batch_size=4, bucket=b), 0) for b in (1, 8))
    assert padding(bucketed) < 0.5 * padding(plain)


def test_buckets_do_not_order_the_steps_by_length() -> None:
    assert LENGTHS is not None
    steps = batch_order(ROWS, LENGTHS, recipe(batch_size=4, bucket=15, epochs=1), 0)
    longest = [int(LENGTHS[s].max()) for s in steps]
    assert longest != sorted(longest)


def test_the_order_is_of_the_seed_and_permutes_positions() -> None:
    r = recipe(batch_size=4)
    first, again, other = (batch_order(ROWS, None, r, s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    shifted = batch_order(ROWS + 100, None, r, 1)
    assert all(torch.equal(a + 100, b) for a, b in zip(first, shifted, strict=True))


@pytest.mark.parametrize("rows", [1, 5, 23, 24, 25, 100])
@pytest.mark.parametrize("bucket", [1, 3])
def test_steps_of_counts_the_steps(rows: int, bucket: int) -> None:
    r = recipe(batch_size=4, bucket=bucket, epochs=2)
    lengths = torch.randint(1, 9, (rows,), generator=torch.Generator().manual_seed(0))
    assert steps_of(r, rows) == len(batch_order(torch.arange(rows), lengths, r, 0))


def test_learning_rates_by_hand() -> None:
    def rates(**changes: object) -> list[float]:
        return learning_rates(recipe(lr=2.0, **changes), 4)

    assert rates() == [2.0] * 4
    assert rates(schedule="linear") == [2.0, 1.5, 1.0, 0.5]
    assert rates(schedule="cosine") == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])
    assert rates(warmup=0.5) == [1.0, 2.0, 2.0, 2.0]
    assert rates(warmup=0.5, schedule="linear") == [1.0, 2.0, 2.0, 1.0]
    assert rates(warmup=0.5, schedule="cosine") == pytest.approx([1.0, 2.0, 2.0, 1.0])
    assert learning_rates(recipe(lr=2.0, warmup=0.9), 1) == [2.0]


def test_kept_steps_are_evenly_spaced_and_end_at_the_end() -> None:
    assert kept_steps(recipe(checkpoints=4), 12) == [3, 6, 9, 12]
    assert kept_steps(recipe(checkpoints=1), 12) == [12]
    assert kept_steps(recipe(checkpoints=5), 3) == [1, 2, 3]
    for steps in range(1, 40):
        kept = kept_steps(recipe(checkpoints=7), steps)
        assert kept[-1] == steps and kept == sorted(set(kept)) and len(kept) == min(7, steps) and kept[0] >= 1


def test_clipping_scales_each_model_by_its_own_norm() -> None:
    small, large = torch.tensor([0.3, 0.0]), torch.tensor([3.0, 0.0])
    a, b = torch.stack([small, large]), torch.stack([torch.tensor([[0.4]]), torch.tensor([[4.0]])])
    clip([a, b], 1.0, stacked=True)
    torch.testing.assert_close(a, torch.tensor([[0.3, 0.0], [0.6, 0.0]]))
    torch.testing.assert_close(b, torch.tensor([[[0.4]], [[0.8]]]))
    whole = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    clip(whole, 1.0, stacked=False)
    torch.testing.assert_close(whole[0], torch.tensor([0.6, 0.0]))


def test_there_is_no_step_wise_lbfgs() -> None:
    with pytest.raises(ValueError, match="lbfgs"):
        optimizer(recipe(optimizer="lbfgs", weight_decay=0.1), [torch.zeros(1, requires_grad=True)])
