"""Compression: every map against its matrix, and the matrix against what its random state promises."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from cases import (
    GAMMA,
    bert,
    blocked,
    captured,
    close,
    explained,
    far,
    logistic,
    per_example,
    problem_of,
    shared,
    stacked,
    unit_vectors,
    vector_task,
    without_bias,
)
from torch import Tensor

from methods.base import Problem
from methods.compression import dense_projection
from methods.compression.base import Compression
from methods.compression.dense_projection import DenseProjection
from methods.compression.gaussian import Gaussian
from methods.compression.grass import GraSS
from methods.compression.logra import LoGra
from methods.compression.logra_pca import LoGraPCA
from methods.compression.mask import Mask
from methods.compression.oporp import OPORP
from methods.compression.rademacher import Rademacher
from methods.compression.saliency import Saliency
from methods.compression.sjlt import SJLT
from methods.compression.two_sided import Layer, TwoSided
from methods.curvature.damping import Damping
from methods.curvature.ekfac import EKFAC
from methods.curvature.identity import Identity
from methods.gradients.blocks import blocks_of, with_rows_in_use
from methods.gradients.per_example import Factors, Gradient, Scalar, flat, gradients, plain
from methods.gradients.source import Source, Squeeze
from methods.influence import Influence
from tasks.base import Examples, Task
from tasks.errors import UserError

FLAT: dict[str, Callable[[int], Compression]] = {
    "gaussian": Gaussian,
    "rademacher": Rademacher,
    "sjlt": SJLT,
    "sjlt of sparsity 3": lambda k: SJLT(k, 3),
    "mask": Mask,
    "grass": GraSS,
    "oporp": OPORP,
}
DENSE: dict[str, Callable[[int], Compression]] = {"gaussian": Gaussian, "rademacher": Rademacher}
UNBIASED = FLAT | {"logra": LoGra}
ALL = UNBIASED | {"logra_pca": LoGraPCA}
TASKS = {"bert": bert, "shared": shared, "logistic": logistic}
SIZE = {"bert": 7, "shared": 5, "logistic": 3}  # dimension or rank; logistic has 12 numbers, in 3 x 4


def source_of(problem: Problem, data: Sequence[Examples] = ()) -> Source:
    """Uncompressed; all rows of embeddings, or those that `data` looks up."""
    model = problem.model()
    blocks = blocks_of(model)
    if data:
        blocks = with_rows_in_use(problem.task, model, blocks, data)
    return Source(problem.task, model, tuple(blocks))


def squeezed(compression: Compression, problem: Problem, source: Source) -> Source:
    return replace(source, squeeze=compression.fit(problem, source))


def matrix_of(squeeze: Squeeze, source: Source) -> Tensor:
    """Sᵀ (P, numbers that come out): what becomes of the unit vectors."""
    return flat(plain(squeeze(unit_vectors(source.blocks))))


def features(source: Source, examples: Examples, batch_size: int = 32, of: Scalar | None = None) -> Tensor:
    """Gradients of the loss, or of another number, as they leave the source, (N, numbers)."""
    found = torch.zeros(len(examples), source.size, dtype=next(source.model.parameters()).dtype)
    of = of or source.task.objective.loss
    for index, factors in gradients(source.task, source.model, examples, source.covered, of, batch_size):
        found[index] = flat(plain(factors if source.squeeze is None else source.squeeze(factors)))
    return found


def oracle(problem: Problem) -> Tensor:
    """∇ℓ of the training examples by plain autograd, (N, P)."""
    return stacked(per_example(explained(problem), problem.train, problem.task.objective.loss))


# The random state


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", UNBIASED)
def test_keeps_inner_products_in_expectation(name: str, task: str) -> None:
    """⟨Sx, Sy⟩ over seeds against ⟨x, y⟩ of autograd's gradients; a map that is √2 times as large is found out."""
    problem = problem_of(TASKS[task]())
    source, compression = source_of(problem), UNBIASED[name](SIZE[task])
    ((_, factors),) = source.gradients(problem.train, problem.task.objective.loss)
    index = problem.train.batches(32)[0]
    products = []
    for seed in range(600):
        phi = flat(plain(compression.fit(replace(problem, seed=seed), source)(factors)))
        products.append(phi @ phi.T)
    found, g = torch.stack(products), oracle(problem)[index]

    def z(scale: float) -> float:
        mean, deviation = (scale * found).mean(0), (scale * found).std(0) / len(found) ** 0.5
        return ((mean - g @ g.T) / deviation).abs().max().item()

    assert z(1.0) < 5
    assert z(2.0) > 5


@pytest.mark.parametrize("name", ALL)
def test_a_seed_names_a_map(name: str) -> None:
    """Also in a second problem, whatever was drawn in between; torch's own random state is neither read nor changed."""
    found = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        problem = problem_of(bert(), seed)
        source = source_of(problem)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        found.append(matrix_of(ALL[name](7).fit(problem, source), source))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[1])
    assert name == "logra_pca" or far(found[0], found[2])


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "sjlt", "oporp", "logra"])
def test_blocks_of_one_shape_have_maps_of_their_own(name: str) -> None:
    problem = problem_of(vector_task([4, 4, 4, 4, 4]))
    source = source_of(problem)
    if name == "logra":
        parts = [side[:, :4] for pair in sides(problem, LoGra(3)).values() for side in pair]
    else:
        parts = list(matrix_of(ALL[name](20).fit(problem, source), source).split(20))
    assert len(parts) >= 4
    for i, a in enumerate(parts):
        for b in parts[:i]:
            assert far(a, b)


def test_entries_are_signs() -> None:
    """±1/√k, in even numbers: Σ_j ±1 has the parity of P, and is as small as chance makes it."""
    problem = problem_of(bert())
    source = source_of(problem)
    signs = matrix_of(Rademacher(100).fit(problem, source), source) * 10
    assert close(signs.abs(), torch.ones(source.size, 100).double())
    sums = signs.sum(0).round()
    assert torch.equal(sums % 2, torch.full_like(sums, source.size % 2))
    assert signs.sum().abs() < 5 * (signs.numel() ** 0.5)
    normal = matrix_of(Gaussian(100).fit(problem, source), source) * 10
    assert far(normal.abs(), torch.ones(source.size, 100).double())
    assert abs(normal.square().mean().item() - 1) < 5 * (2 / normal.numel()) ** 0.5


@pytest.mark.parametrize("sparsity", [1, 3])
def test_each_number_goes_to_its_buckets(sparsity: int) -> None:
    problem = problem_of(bert())
    source = source_of(problem)
    s = matrix_of(SJLT(64, sparsity).fit(problem, source), source) * sparsity**0.5
    assert close(s, s.round())
    sums = s.abs().sum(1)  # two entries of a number may meet in a bucket, with equal or opposite signs
    assert (sums <= sparsity + 1e-9).all() and (sums == sparsity).double().mean() > 0.9
    assert 0.4 < (s[s != 0] > 0).double().mean() < 0.6


def test_bins_are_evenly_filled() -> None:
    problem = problem_of(bert())
    source = source_of(problem)
    s = matrix_of(OPORP(100).fit(problem, source), source)
    assert torch.equal(s.abs().sum(1), torch.ones(source.size).double())
    assert set(s.abs().sum(0).tolist()) == {source.size // 100, source.size // 100 + 1}
    assert 0.3 < (s[s != 0] > 0).double().mean() < 0.7
    whole = matrix_of(OPORP(source.size).fit(problem, source), source)
    assert torch.equal(whole @ whole.T, torch.eye(source.size).double())


# A fixed linear map


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ALL)
def test_is_its_matrix(name: str, task: str) -> None:
    """S is linear, one for training examples and queries; batches and their order change nothing."""
    problem = problem_of(TASKS[task]())
    plain_source = source_of(problem, [problem.train])
    source = squeezed(ALL[name](SIZE[task]), problem, plain_source)
    assert source.squeeze is not None
    s = matrix_of(source.squeeze, plain_source)
    assert s.shape == (plain_source.size, source.size)
    for split in ("query", "train"):
        examples = problem.task.splits[split]
        expected = features(plain_source, examples) @ s
        assert far(expected, torch.zeros_like(expected) + expected.mean())
        for size in (1, 5, 32):
            assert close(features(source, examples, size), expected)
        backwards = list(range(len(examples)))[::-1]
        assert close(features(source, examples.select(backwards), 5), expected[backwards])


@pytest.mark.parametrize("name", ALL)
def test_a_coarser_model_meets_the_same_map(name: str) -> None:
    problem = problem_of(bert())
    source = source_of(problem)
    source.model.float()
    squeeze = ALL[name](7).fit(problem_of(bert()), source_of(problem))
    ((_, factors),) = source.gradients(problem.train, problem.task.objective.loss)
    coarse = flat(plain(squeeze(factors)))
    assert coarse.dtype == torch.float32
    index = problem.train.batches(32)[0]
    assert close(coarse.double(), flat(plain(factors)).double() @ matrix_of(squeeze, source), 1e-5)
    fine = features(replace(source_of(problem), squeeze=squeeze), problem.train)
    assert close(coarse.double(), fine[index], 1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_that_looks_up_no_known_row(name: str) -> None:
    """Queries may use none of the rows that training examples do."""
    problem = problem_of(shared())
    plain_source = source_of(problem, [problem.train.select([0])])
    source = squeezed(ALL[name](3), problem, plain_source)
    assert source.squeeze is not None
    queries = problem.task.splits["query"]
    known = next(b.rows for b in plain_source.blocks if b.rows is not None)
    foreign = torch.tensor([r for r in range(6) if r not in known.tolist()])
    assert len(foreign)
    strange = replace(queries, inputs={k: foreign[v % len(foreign)] for k, v in queries.inputs.items()})
    expected = features(plain_source, strange) @ matrix_of(source.squeeze, plain_source)
    assert close(features(source, strange), expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("task", TASKS)
def test_products_of_compressed_gradients(name: str, task: str) -> None:
    """m Sᵀ S g through the coordinates that a curvature works in, S applied to autograd's gradients."""
    problem = problem_of(TASKS[task]())
    plain_source = source_of(problem)
    source = squeezed(ALL[name](SIZE[task]), problem, plain_source)
    assert source.squeeze is not None
    s = matrix_of(source.squeeze, plain_source)
    fitted = Identity().fit(problem, source)
    found = flat(source.collected(problem.train, problem.task.objective.loss, fitted.coordinates))
    by_block = blocked(explained(problem), per_example(explained(problem), problem.train, problem.task.objective.loss))
    g = torch.cat([by_block[b.name].flatten(1) for b in plain_source.blocks], 1)
    assert close(found @ found.T, g @ s @ s.T @ g.T)
    assert name == "logra_pca" or far(found @ found.T, g @ g.T)


# As curvatures read it

EMPIRICAL = EKFAC("empirical")
DAMPING = Damping("absolute", 0.02, "global")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", FLAT)
def test_scores_in_the_projected_space(name: str, task: str) -> None:
    """TRAK's form, −(1/N) m Sᵀ (S F Sᵀ + δI)⁻¹ S g: of a block without structure EK-FAC is the exact Fisher."""
    problem, queries = problem_of(TASKS[task]()), TASKS[task]().splits["query"]
    source, compression = source_of(problem, [problem.train]), FLAT[name](SIZE[task])
    s = matrix_of(compression.fit(problem, source), source)
    g, m = features(source, problem.train) @ s, features(source, queries, of=problem.task.objective.measure) @ s
    fisher = g.T @ g / len(g) + (GAMMA + 0.02) * torch.eye(g.shape[1], dtype=g.dtype)
    method = Influence(EMPIRICAL, DAMPING, compression=compression)
    assert close(method.attribute(problem, queries), -m @ torch.linalg.solve(fisher, g.T) / len(g), 1e-8)
    assert close(method.value(problem), -(g * torch.linalg.solve(fisher, g.T).T).sum(1) / len(g), 1e-8)
    assert far(method.attribute(problem, queries), Influence(EMPIRICAL, DAMPING).attribute(problem, queries))


@pytest.mark.parametrize("task", TASKS)
def test_full_rank_principal_sides_change_no_score(task: str) -> None:
    """They are EK-FAC's own basis: only norms, projected to no more numbers than they have, could differ."""
    problem, queries = problem_of(TASKS[task]()), TASKS[task]().splits["query"]
    rank = max(max(b.shape) for b in source_of(problem, [problem.train]).blocks)
    expected = Influence(EMPIRICAL, DAMPING).attribute(problem, queries)
    for r, same in ((rank, close), (2, far)):
        assert same(Influence(EMPIRICAL, DAMPING, compression=LoGraPCA(r)).attribute(problem, queries), expected)


# Masks


def test_a_mask_of_everything_keeps_the_order() -> None:
    problem = problem_of(bert())
    source = source_of(problem)
    s = matrix_of(Mask(source.size).fit(problem, source), source)
    assert torch.equal(s.sum(0), torch.ones(source.size).double())
    assert torch.equal(s.sum(1), torch.ones(source.size).double())
    assert torch.equal(s @ s.T, torch.eye(source.size).double())


def test_a_mask_keeps_as_many_numbers_as_it_says() -> None:
    problem = problem_of(bert())
    source = source_of(problem)
    s = matrix_of(Mask(16).fit(problem, source), source)
    assert torch.equal((s != 0).sum(0), torch.ones(16))
    assert ((s != 0).sum(1) <= 1).all()
    assert close(s.sum(0), torch.full((16,), (source.size / 16) ** 0.5, dtype=torch.float64))


def test_grass_touches_four_times_its_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of linear layers it reads only these, and never forms a gradient."""
    problem = problem_of(without_bias())
    source = source_of(problem)
    squeeze = GraSS(3).fit(problem, source)
    assert (matrix_of(squeeze, source) != 0).any(1).sum() == 12
    expected = features(source, problem.train) @ matrix_of(squeeze, source)
    formed = Factors.gradient

    def guarded(f: Factors) -> Gradient:
        assert f.block.kind != "linear", "a layer's whole gradient was formed"
        return formed(f)

    monkeypatch.setattr(Factors, "gradient", guarded)
    assert close(features(replace(source, squeeze=squeeze), problem.train), expected)
    with pytest.raises(AssertionError, match="whole gradient"):
        features(squeezed(SJLT(3), problem, source), problem.train)


def test_grass_masks_nothing_where_little_is_left() -> None:
    problem = problem_of(logistic())
    source = source_of(problem)
    s = matrix_of(GraSS(5).fit(problem, source), source)
    assert torch.equal(s.abs().sum(1), torch.ones(12).double())


# Dense projections


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_projection_is_never_in_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks tile the blocks, each from a random state of its own, none above the limit."""
    monkeypatch.setattr(dense_projection, "CHUNK_BYTES", 8 * 7 * 10)
    problem = problem_of(bert())
    source = source_of(problem)
    squeeze = DENSE[name](7).fit(problem, source)
    assert isinstance(squeeze, DenseProjection)
    shapes, states, draw_entries = [], set(), squeeze.draw

    def watched(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        shapes.append(shape)
        states.add(generator.initial_seed())
        return draw_entries(shape, generator)

    s = matrix_of(replace(squeeze, draw=watched), source)
    assert max(height for height, _ in shapes) == 10 and {width for _, width in shapes} == {7}
    assert sum(height for height, _ in shapes) == source.size
    assert len(states) == len(shapes)
    assert torch.equal(s, matrix_of(squeeze, source))
    assert len(s.round(decimals=9).unique(dim=0)) > (0.9 * source.size if name == "gaussian" else 100)


def test_rows_out_of_use_cost_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_projection, "CHUNK_BYTES", 8 * 7)
    problem = problem_of(bert())
    source = source_of(problem)
    squeeze = Gaussian(7).fit(problem, source)
    drawn: list[str] = []

    def watched(block: str, chunk: int) -> torch.Generator:
        drawn.append(block)
        return squeeze.generator(block, chunk)

    ((_, factors),) = source.gradients(problem.train.select([3]), problem.task.objective.loss)
    replace(squeeze, generator=watched)(factors)
    (table,) = (b for b in source.blocks if b.kind == "embedding" and len(b.rows if b.rows is not None else ()) == 11)
    looked_up = problem.train.inputs["input_ids"][3, :2].unique()
    assert drawn.count(table.name) == len(looked_up) * table.shape[0] < table.size


# Two sides


def sides(problem: Problem, compression: Compression) -> dict[str, tuple[Tensor, Tensor]]:
    """C and A of each layer."""
    squeeze = compression.fit(problem, source_of(problem))
    assert isinstance(squeeze, TwoSided)
    return {layer.block.name: (layer.left, layer.right) for layer in squeeze.layers if isinstance(layer, Layer)}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["logra", "logra_pca"])
def test_each_layer_is_mapped_from_two_sides(name: str, task: str) -> None:
    """C G Aᵀ of autograd's gradients, r = min(rank, side); norms of up to rank² numbers pass."""
    problem = problem_of(TASKS[task]())
    source = squeezed(ALL[name](3), problem, source_of(problem))
    by_block = blocked(explained(problem), per_example(explained(problem), problem.train, problem.task.objective.loss))
    matrices = sides(problem, ALL[name](3))
    found = source.collected(problem.train, problem.task.objective.loss)
    assert [b.name for b in source.blocks] == [b.name for b in source_of(problem).blocks]
    for g in found:
        dense = by_block[g.block.name]
        if g.block.name in matrices:
            left, right = (side.double() for side in matrices[g.block.name])
            assert g.block.kind == "linear" and not g.block.bias and g.block.parameters == ()
            assert g.values.shape[1:] == (min(3, dense.shape[1]), min(3, dense.shape[2]))
            assert close(g.values, left @ dense @ right.T)
        else:
            assert g.block.kind == "whole" and g.block.shape == (min(9, dense[0].numel()), 1)
            if dense[0].numel() <= 9:
                assert close(g.values.flatten(1), dense.flatten(1))
    assert {b.kind for b in source.blocks} == ({"linear"} if task == "logistic" else {"linear", "whole"})


@pytest.mark.parametrize("name", ["logra", "logra_pca"])
@pytest.mark.parametrize("task", TASKS)
def test_a_full_rank_loses_nothing(name: str, task: str) -> None:
    problem = problem_of(TASKS[task]())
    source = source_of(problem)
    rank = max(max(b.shape) for b in source.blocks)
    g = oracle(problem)
    found = features(squeezed(ALL[name](rank), problem, source), problem.train)
    assert close(found @ found.T, g @ g.T)
    less = features(squeezed(ALL[name](2), problem, source), problem.train)
    assert far(less @ less.T, g @ g.T)


@pytest.mark.parametrize("task", TASKS)
def test_principal_sides(task: str) -> None:
    """Orthonormal, and they diagonalise the oracle's second moments to the largest eigenvalues, in order."""
    problem = problem_of(TASKS[task]())
    model, loss = explained(problem), problem.task.objective.loss
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for i in range(len(problem.train)):
        one = problem.train.select([i])
        batch = one.batch()
        for name, pair in captured(model, batch.inputs, batch.targets, loss).items():
            seen.setdefault(name, []).append(pair)
    for name, (left, right) in sides(problem, LoGraPCA(3)).items():
        a, d = (torch.cat(column) for column in zip(*seen[name], strict=True))
        if not a.is_floating_point():
            block = next(b for b in source_of(problem).blocks if b.name == name)
            assert block.rows is not None
            a = (a[:, None] == block.rows).double()
        for side, x in ((right, a), (left, d)):
            assert close(side @ side.T, torch.eye(len(side)).double())
            largest = torch.linalg.eigvalsh(x.T @ x).flip(0)[: len(side)]
            assert close(side @ x.T @ x @ side.T, largest.diag(), 1e-8)


def test_principal_sides_read_no_padding() -> None:
    """Padding tokens moved to another id: the same sides."""
    task = bert()
    ids, mask = task.train.inputs["input_ids"], task.train.inputs["attention_mask"]
    dirty = replace(task.train, inputs={"input_ids": torch.where(mask > 0, ids, 8), "attention_mask": mask})
    clean, other = (
        sides(problem_of(replace(task, splits={**task.splits, "train": train})), LoGraPCA(3))
        for train in (task.train, dirty)
    )
    for name, (left, right) in clean.items():
        for a, b in ((left, other[name][0]), (right, other[name][1])):
            assert close(a.T @ a, b.T @ b, 1e-8)


def test_a_large_norm_is_projected() -> None:
    """Above rank² numbers; unbiased as everything else."""
    problem = problem_of(shared())
    source = source_of(problem)
    squeeze = LoGra(1).fit(problem, source)
    assert [b.shape for b in squeeze.blocks] == [(1, 1)] * 4
    g = source.collected(problem.train, problem.task.objective.loss)
    place = [b.name for b in source.blocks].index("norm")
    norms = [f.block.kind == "whole" for f in squeeze(unit_vectors(source.blocks))]
    assert norms == [b.name == "norm" for b in source.blocks]
    x = g[place].dense().flatten(1)
    found = []
    for seed in range(500):
        squeeze = LoGra(1).fit(replace(problem, seed=seed), source)
        s = matrix_of(squeeze, source).split([b.size for b in source.blocks])[place][:, place]
        found.append((x @ s).square())
    mean, deviation = torch.stack(found).mean(0), torch.stack(found).std(0) / len(found) ** 0.5
    assert ((mean - x.square().sum(1)) / deviation).abs().max() < 5


# Refusals


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("number", [0, -1])
def test_nothing_is_left_of_a_gradient(name: str, number: int) -> None:
    key = "rank" if name.startswith("logra") else "dimension"
    with pytest.raises(UserError, match=rf"method\.compression\.{key}={number} .*1 or more"):
        ALL[name](number)


def test_sparsity_below_one() -> None:
    with pytest.raises(UserError, match=r"method\.compression\.sparsity=0 "):
        SJLT(4, 0)


def test_sparsity_above_the_dimension() -> None:
    SJLT(4, 4)
    with pytest.raises(UserError, match=r"^method\.compression\.sparsity=5 .*1 to method\.compression\.dimension=4$"):
        SJLT(4, 5)


@pytest.mark.parametrize("name", FLAT)
def test_more_numbers_than_the_gradient_has(name: str) -> None:
    problem = problem_of(logistic())
    FLAT[name](12).fit(problem, source_of(problem))
    with pytest.raises(UserError, match=r"method\.compression\.dimension=13 is above the 12 numbers of a gradient"):
        FLAT[name](13).fit(problem, source_of(problem))


@pytest.mark.parametrize("name", ["logra", "logra_pca"])
def test_a_rank_that_compresses_nothing(name: str) -> None:
    problem = problem_of(logistic())
    with pytest.raises(UserError, match=r"method\.compression\.rank=5 is above the 4 numbers of a gradient along"):
        ALL[name](5).fit(problem, source_of(problem))


def test_what_comes_out_belongs_to_no_module() -> None:
    """Blocks stay the same objects, so that what was fitted to them is found again."""
    problem = problem_of(bert())
    source = source_of(problem)
    for make in ALL.values():
        squeeze = make(7).fit(problem, source)
        assert all(a is b for a, b in zip(squeeze.blocks, squeeze.blocks, strict=True))
        assert all(b.parameters == () and not b.bias and b.rows is None for b in squeeze.blocks)
        assert [f.block for f in squeeze(unit_vectors(source.blocks))] == list(squeeze.blocks)
        assert make(7) == make(7) and hash(make(7)) == hash(make(7))


@pytest.mark.parametrize("case", [vector_task, bert, shared])
def test_saliency_keeps_the_parameters_with_the_largest_gradients(case: Callable[..., Task]) -> None:
    """Scores by the mask are the products of these numbers alone, whatever block they are in."""
    task = case([4, 4, 3]) if case is vector_task else case()
    problem, queries, model = problem_of(task), task.splits["query"], explained(problem_of(task))
    g = stacked(per_example(model, task.train, task.objective.loss))
    m = stacked(per_example(model, queries, task.objective.measure))
    method = Influence(Identity(), Damping("absolute", 0.0, "global"), compression=Saliency(12))
    largest = g.square().sum(0).topk(12).indices
    expected = -m[:, largest] @ g[:, largest].T / len(task.train)
    assert close(method.attribute(problem, queries), expected)
    assert far(-m @ g.T / len(task.train), expected)
    first = torch.arange(12)
    assert far(-m[:, first] @ g[:, first].T / len(task.train), expected)
    with pytest.raises(UserError, match=r"method\.compression\.dimension=100000"):
        replace(method, compression=Saliency(100_000)).attribute(problem, queries)
