"""Every solver against dense float64 algebra on small problems: absolute scale, never a correlation."""

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    GAMMA,
    Named,
    alone,
    block_scores,
    blocked,
    captured,
    close,
    error,
    exact_scores,
    explained,
    far,
    inverse,
    labels,
    parameters,
    per_example,
    problem_of,
    stacked,
    vector_task,
)
from models import cnn, regression
from torch import Tensor
from torch.func import functional_call

from methods.base import Problem
from methods.curvature.arnoldi import Arnoldi
from methods.curvature.astra import ASTRA
from methods.curvature.base import Curvature, positive, unflat
from methods.curvature.cg import ConjugateGradients
from methods.curvature.damping import Damping
from methods.curvature.datainf import DataInf
from methods.curvature.dense import Dense
from methods.curvature.diagonal import Diagonal
from methods.curvature.eigenpairs import Eigenpairs
from methods.curvature.ekfac import EKFAC
from methods.curvature.identity import Identity
from methods.curvature.kfac import KFAC
from methods.curvature.lissa import LiSSA
from methods.curvature.neumann import Neumann, require_solved
from methods.curvature.nystrom import Nystrom
from methods.curvature.shampoo import Shampoo
from methods.gradients.blocks import blocks_of
from methods.gradients.per_example import flat
from methods.gradients.source import Source
from methods.influence import Influence
from tasks.errors import UserError
from tasks.objectives.regression import Regression

SMALL = ["logistic", "without_bias", "three_classes", "bert", "shared"]
EVERYWHERE = {**CASES, "cnn": cnn, "regression": regression}
DELTA = 0.05
DAMPING = Damping("absolute", DELTA - GAMMA, "global")


def scores(curvature: Curvature, problem: Problem, damping: Damping = DAMPING) -> Tensor:
    return Influence(curvature, damping).attribute(problem, problem.task.splits["query"])


def oracle(problem: Problem, matrix: Tensor | None = None, delta: float = DELTA) -> Tensor:
    if matrix is None and isinstance(problem.task.objective, Regression):  # ∂²ℓ/∂f² = 1
        j = stacked(per_example(explained(problem), problem.train, lambda outputs, targets: outputs[:, 0]))
        matrix = j.T @ j / len(j)
    return exact_scores(problem, problem.task.splits["query"], delta, matrix)


def hessian(problem: Problem) -> Tensor:
    """∂²/∂θ² of the mean loss, one example at a time, in the model's order."""
    model, train = explained(problem), problem.train
    named = parameters(model)
    sizes = [p.numel() for p in named.values()]
    theta = torch.cat([p.flatten() for p in named.values()])

    def mean_loss(vector: Tensor) -> Tensor:
        parts = dict(zip(named, vector.split(sizes), strict=True))
        own = {name: parts[name].view_as(p) for name, p in named.items()}
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(train)):
            inputs, target = alone(train, i)
            total = total + problem.task.objective.loss(functional_call(model, own, (), inputs), target).sum()
        return total / len(train)

    return torch.autograd.functional.hessian(mean_loss, theta)


def outer(problem: Problem, matrix: str) -> Tensor:
    """(1/N) Σ g gᵀ at the training labels or at the same draws."""
    drawn = replace(problem.train, targets=labels(problem, matrix, ""))
    g = stacked(per_example(explained(problem), drawn, problem.task.objective.loss))
    return g.T @ g / len(g)


def within_modules(problem: Problem, matrix: Tensor) -> Tensor:
    """Off-diagonal blocks set to zero, a block each module."""
    owners = [name.rpartition(".")[0] for name, p in parameters(explained(problem)).items() for _ in range(p.numel())]
    same = torch.tensor([[a == b for b in owners] for a in owners])
    return matrix * same


# --- dense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL, "cnn", "regression"])
def test_the_hessian_is_the_hessian(name: str) -> None:
    problem = problem_of(EVERYWHERE[name]())
    exact = hessian(problem)
    delta = 0.1 + max(0.0, -torch.linalg.eigvalsh(exact)[0].item())
    damping = Damping("absolute", delta - GAMMA, "global")
    expected = oracle(problem, exact, delta)
    assert close(scores(Dense("hessian", "global", 1.0), problem, damping), expected, 1e-9)
    assert far(scores(Identity(), problem, damping), expected)
    if name != "logistic":  # one linear layer: there the two are the same matrix
        assert error(oracle(problem, None, delta), expected) > 1e-6


@pytest.mark.parametrize("matrix", ["fisher", "empirical"])
@pytest.mark.parametrize("name", [*SMALL, "cnn", "regression"])
def test_fishers_are_outer_products(name: str, matrix: str) -> None:
    problem = problem_of(EVERYWHERE[name]())
    expected = oracle(problem, outer(problem, matrix))
    assert close(scores(Dense(matrix, "global", 1.0), problem), expected, 1e-9)
    assert far(scores(Identity(), problem), expected)
    assert far(oracle(problem), expected)


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "empirical"])
@pytest.mark.parametrize("name", ["without_bias", "three_classes", "bert", "shared"])
def test_block_scope_couples_modules_with_nothing(name: str, matrix: str) -> None:
    problem = problem_of(EVERYWHERE[name]())
    full = {"hessian": hessian, "ggn": lambda p: None, "empirical": lambda p: outer(p, "empirical")}[matrix](problem)
    if full is None:
        from cases import ggn

        full = ggn(explained(problem), problem.train)
    whole = within_modules(problem, full)
    delta = 0.1 + max(0.0, -torch.linalg.eigvalsh(whole)[0].item())
    expected = oracle(problem, whole, delta)
    found = scores(Dense(matrix, "block", 1.0), problem, Damping("absolute", delta - GAMMA, "global"))
    assert close(found, expected, 1e-9)
    assert error(oracle(problem, full, delta), expected) > 1e-6


def test_an_indefinite_hessian_is_refused_with_its_smallest_eigenvalue() -> None:
    problem = problem_of(CASES["three_classes"]())
    smallest = torch.linalg.eigvalsh(hessian(problem))[0].item()
    assert smallest < -1e-3
    keys = r"^method\.damping\.value and model\.recipe\.weight_decay \(if l2\) add"
    with pytest.raises(UserError, match=keys) as told:
        scores(Dense("hessian", "global", 1.0), problem, Damping("absolute", 0.0, "global"))
    assert f"add {GAMMA:.3g} to the matrix (all), whose smallest eigenvalue is {smallest:.3g};" in str(told.value)
    enough = re.search(r"from method\.damping\.rule=absolute method\.damping\.value=(\S+) upwards$", str(told.value))
    assert enough and -smallest < float(enough[1]) < -1.2 * smallest
    scores(Dense("hessian", "global", 1.0), problem, Damping("absolute", float(enough[1]), "global"))
    with pytest.raises(UserError, match=keys + r" .* a curvature of -.*method\.damping\.value=") as told:
        scores(ConjugateGradients("hessian", 1e-10, 500), problem, Damping("absolute", 0.0, "global"))
    met = re.search(r"a curvature of (\S+) in some direction", str(told.value))
    assert met and smallest <= float(met[1]) * 0.99 and float(met[1]) < -GAMMA


# --- factored --------------------------------------------------------------------------------------------------------


def written_out(problem: Problem, kind: str) -> Named:
    """K-FAC, Shampoo and the diagonal at the training labels, as dense matrices over vec(G), rows first."""
    model, train = explained(problem), problem.train
    gradients = blocked(model, per_example(model, train, problem.task.objective.loss))
    entering: dict[str, list[Tensor]] = {}
    leaving: dict[str, list[Tensor]] = {}
    for i in range(len(train)):
        inputs, target = alone(train, i)
        for name, (a, d) in captured(model, inputs, target, problem.task.objective.loss).items():
            entering.setdefault(name, []).append(a)
            leaving.setdefault(name, []).append(d)
    found = {}
    for name, g in gradients.items():
        n, _, columns = g.shape
        module = model.get_submodule(name)
        if kind == "diagonal":
            found[name] = g.flatten(1).square().mean(0).diag()
        elif name not in entering:  # norms: their exact matrix
            found[name] = g.flatten(1).T @ g.flatten(1) / n
        elif kind == "kfac":
            a, d = torch.cat(entering[name]), torch.cat(leaving[name])
            if isinstance(module, torch.nn.Embedding):
                rows = [r for r in range(len(module.weight)) if r != module.padding_idx]
                a = (a[:, None] == torch.tensor(rows)).double()
            found[name] = torch.kron(d.T @ d / len(d), a.T @ a / len(a))
        else:
            left = torch.linalg.eigh(torch.einsum("noi,npi->op", g, g))[1]
            right = torch.linalg.eigh(torch.einsum("noi,noj->ij", g, g))[1]
            if isinstance(module, torch.nn.Embedding):
                right = torch.eye(columns, dtype=g.dtype)
            q = torch.kron(left.contiguous(), right.contiguous())
            found[name] = q @ (g.flatten(1) @ q).square().mean(0).diag() @ q.T
    return found


@pytest.mark.parametrize("kind", ["kfac", "shampoo", "diagonal"])
@pytest.mark.parametrize("name", [*SMALL, "single", "identical"])
def test_factored_matrices_equal_the_formulas_written_out(name: str, kind: str) -> None:
    curvature = {"kfac": KFAC, "shampoo": Shampoo, "diagonal": Diagonal}[kind]("empirical")
    problem = problem_of(EVERYWHERE[name]())
    matrices = written_out(problem, kind)
    expected = block_scores(problem, problem.task.splits["query"], matrices, dict.fromkeys(matrices, DELTA))
    found = scores(curvature, problem)
    assert close(found, expected, 1e-9)
    assert far(scores(Identity(), problem), expected)


@pytest.mark.parametrize("kind", [KFAC, EKFAC, Shampoo])
def test_expected_labels_are_what_draws_come_to(kind: Callable[[str], Curvature]) -> None:
    """matrix=ggn has no noise of labels: one example and one layer are exact."""
    problem = problem_of(vector_task([2, 3], rows=1))
    assert close(scores(EKFAC("ggn"), problem), oracle(problem), 1e-9)


def test_kfac_misses_a_factor_of_the_length_on_sequences() -> None:
    """Its trace is that of independent positions; EK-FAC's is that of sequences."""
    problem = problem_of(CASES["bert"]())
    source = Source(problem.task, problem.model(), tuple(blocks_of(problem.model())))
    g = blocked(explained(problem), per_example(explained(problem), problem.train, problem.task.objective.loss))
    name = "encoder.encoder.layer.0.output.dense"
    exact = g[name].flatten(1).square().sum(1).mean().item()
    of = {k: k("empirical").fit(problem, source).eigenvalues[name].sum().item() for k in (KFAC, EKFAC)}
    assert of[EKFAC] == pytest.approx(exact, rel=1e-10)
    assert of[KFAC] < 0.9 * exact


# --- DataInf ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL, "single", "identical"])
def test_datainf_is_the_mean_of_rank_one_inverses(name: str) -> None:
    problem = problem_of(EVERYWHERE[name]())
    model, queries = explained(problem), problem.task.splits["query"]
    g = stacked(per_example(model, problem.train, problem.task.objective.loss))
    m = stacked(per_example(model, queries, problem.task.objective.measure))
    n, size = g.shape
    eye = torch.eye(size, dtype=torch.float64)
    outers = [torch.outer(x, x) for x in g]
    for scope, mask in (("global", torch.ones(size, size)), ("block", within_modules(problem, torch.ones(size, size)))):
        mean = torch.stack([torch.linalg.inv(o * mask + DELTA * eye) for o in outers]).mean(0)
        expected = -m @ mean @ g.T / n
        assert close(scores(DataInf(scope), problem), expected, 1e-9)
        if n > 1 and name != "identical":
            assert far(oracle(problem, outer(problem, "empirical") * mask), expected)  # not the inverse of the mean


def test_datainf_without_damping_is_refused() -> None:
    problem = problem_of(replace(CASES["logistic"](), recipe=replace(CASES["logistic"]().recipe, weight_decay=0.0)))
    with pytest.raises(UserError, match=r"method\.damping\.value .*singular"):
        scores(DataInf("block"), problem, Damping("absolute", 0.0, "block"))


# --- iterative -------------------------------------------------------------------------------------------------------

ITERATIVE: dict[str, Any] = {
    "cg": ConjugateGradients("ggn", 1e-12, 500),
    "ekfac_cg": ConjugateGradients("ggn", 1e-12, 500, EKFAC("ggn")),
    "diagonal_cg": ConjugateGradients("ggn", 1e-12, 500, Diagonal("ggn")),
    "neumann": Neumann("ggn", 1e-10, 20_000, None),
    "lissa": LiSSA("ggn", 1500, 10_000, 1, None),  # a batch of everything
    "astra": ASTRA("ggn", EKFAC("ggn"), 1500, None, 1.0),
}


@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("name", ["logistic", "three_classes", "shared", "regression"])
def test_iterations_end_at_the_exact_answer(name: str, solver: str) -> None:
    problem = problem_of(EVERYWHERE[name]())
    expected = oracle(problem)
    assert close(scores(ITERATIVE[solver], problem), expected, 1e-7)
    assert far(scores(Identity(), problem), expected)
    assert far(oracle(problem, None, -DELTA), expected)  # damping of the wrong sign


@pytest.mark.parametrize("solver", [ConjugateGradients("ggn", 0.05, 500), Neumann("ggn", 0.05, 20_000, None)])
def test_a_vector_is_done_whatever_the_others_are(solver: Any) -> None:
    """At a loose tolerance, where a step more would show."""
    problem = problem_of(CASES["three_classes"]())
    queries, method = problem.task.splits["query"], Influence(solver, Damping("absolute", DELTA, "global"))
    together = method.attribute(problem, queries)
    alone = torch.cat([method.attribute(problem, queries.select([q])) for q in range(len(queries))])
    assert close(together, alone, 1e-9)


@pytest.mark.parametrize("solver", ["cg", "ekfac_cg"])
def test_conjugate_gradients_on_sequences(solver: str) -> None:
    problem = problem_of(CASES["bert"]())
    assert close(scores(ITERATIVE[solver], problem), oracle(problem), 1e-7)


def test_conjugate_gradients_of_the_hessian() -> None:
    problem = problem_of(CASES["three_classes"]())
    exact = hessian(problem)
    delta = 0.1 - torch.linalg.eigvalsh(exact)[0].item()
    found = scores(ConjugateGradients("hessian", 1e-12, 500), problem, Damping("absolute", delta - GAMMA, "global"))
    assert close(found, oracle(problem, exact, delta), 1e-7)


def test_the_matrix_itself_as_preconditioner_needs_one_step() -> None:
    problem = problem_of(CASES["three_classes"]())
    itself = Dense("ggn", "global", 1.0)
    for one in (ConjugateGradients("ggn", 1e-12, 1, itself), ASTRA("ggn", itself, 1, None, 1.0)):
        assert close(scores(one, problem), oracle(problem), 1e-8)
    with pytest.warns(
        UserWarning, match=r"conjugate gradients: \d of 5 vectors .* method\.curvature\.iterations=1; raise"
    ):
        scores(ConjugateGradients("ggn", 1e-12, 1), problem)


def test_more_vectors_than_parameters_equal_and_zero_ones() -> None:
    """pyDVL left rows of the answer at zero there; equal and zero vectors must not disturb the others."""
    problem = problem_of(CASES["logistic"]())
    source = Source(problem.task, problem.model(), tuple(blocks_of(problem.model())))
    size = source.size
    v = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v[1], v[2] = v[0], 0
    exact = Dense("ggn", "global", 1.0).fit(problem, source)
    expected = flat(exact.solve(unflat(source.blocks, v), DAMPING, GAMMA))
    for curvature in ITERATIVE.values():
        found = flat(curvature.fit(problem, source).solve(unflat(source.blocks, v), DAMPING, GAMMA))
        assert close(found, expected, 1e-7)
        assert (found[2] == 0).all() and torch.equal(found[0], found[1])
        assert (found[3:].norm(dim=1) > 0).all()


def test_looser_tolerance_is_a_residual_and_not_its_square() -> None:
    problem = problem_of(CASES["bert"]())
    source = Source(problem.task, problem.model(), tuple(blocks_of(problem.model())))
    v = torch.randn(4, source.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = torch.linalg.inv(inverse(Dense("ggn", "global", 1.0).fit(problem, source), source.blocks, DAMPING, GAMMA))
    x = flat(ConjugateGradients("ggn", 1e-2, 500).fit(problem, source).solve(unflat(source.blocks, v), DAMPING, GAMMA))
    residual = (v - x @ matrix).norm(dim=1) / v.norm(dim=1)
    assert (residual <= 1e-2).all() and residual.max() > 1e-4


def test_batches_of_lissa_and_astra_come_near() -> None:
    problem = problem_of(vector_task([3, 3], rows=60))
    expected = oracle(problem)
    assert far(scores(Identity(), problem), expected)
    found = scores(LiSSA("ggn", 2000, 10, 4, 5.0), problem)
    assert error(found, expected) < 0.1
    found = scores(ASTRA("ggn", EKFAC("ggn"), 1000, 10, 0.1), problem)
    assert error(found, expected) < 0.05


@pytest.mark.parametrize("solver", [LiSSA("ggn", 200, 1000, 1, 0.01), Neumann("ggn", 1e-6, 200, 0.01)])
def test_divergence_is_told_and_no_number_returned(solver: Curvature) -> None:
    with pytest.raises(ArithmeticError, match=r"diverged.*raise method\.curvature\.scale=0\.01"):
        scores(solver, problem_of(CASES["three_classes"]()))


# --- low rank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logistic", "three_classes", "shared"])
@pytest.mark.parametrize(
    "make", [lambda p: Arnoldi("ggn", p, p), lambda p: Eigenpairs("ggn", p, 1), lambda p: Nystrom("ggn", p)]
)
def test_full_rank_is_exact(name: str, make: Callable[[int], Curvature]) -> None:
    problem = problem_of(EVERYWHERE[name]())
    size = sum(b.size for b in blocks_of(problem.model()))
    expected = oracle(problem)
    assert close(scores(make(size), problem), expected, 1e-5)
    assert far(scores(Identity(), problem), expected)


def test_rank_of_the_matrix_is_enough_with_a_complement() -> None:
    problem = problem_of(CASES["bert"]())  # 12 examples of two classes: rank 12 at most
    for curvature in (Eigenpairs("ggn", 12, 2), Nystrom("ggn", 12)):
        assert close(scores(curvature, problem), oracle(problem), 1e-5)
    # The subspace alone: the training gradients lie in it here, so the answer is the same in another way.
    assert close(scores(Arnoldi("ggn", 12, 14), problem), oracle(problem), 1e-4)


def test_errors_fall_with_the_rank_and_the_two_forms_differ() -> None:
    problem = problem_of(vector_task([6, 5, 4], rows=40))
    expected = oracle(problem)
    falling = [error(scores(Eigenpairs("ggn", rank, 4), problem), expected) for rank in (2, 8, 30)]
    assert falling[0] > falling[1] > falling[2]
    falling = [error(scores(Nystrom("ggn", rank), problem), expected) for rank in (2, 20, 50)]
    assert falling[0] > falling[2]
    within, complemented = Arnoldi("ggn", 3, 40), Eigenpairs("ggn", 3, 10)
    assert far(scores(within, problem), scores(complemented, problem))


def test_arnoldi_keeps_negative_curvature() -> None:
    problem = problem_of(CASES["three_classes"]())
    exact = hessian(problem)
    delta = 0.1 - torch.linalg.eigvalsh(exact)[0].item()
    size = len(exact)
    found = scores(Arnoldi("hessian", size, size), problem, Damping("absolute", delta - GAMMA, "global"))
    assert close(found, oracle(problem, exact, delta), 1e-6)


@pytest.mark.parametrize("curvature", [Arnoldi("ggn", 13, 20), Eigenpairs("ggn", 13, 1), Nystrom("ggn", 13)])
def test_a_rank_above_the_dimension_is_refused(curvature: Curvature) -> None:
    with pytest.raises(UserError, match=r"method\.curvature\.rank=13 is not possible with 12 parameters"):
        scores(curvature, problem_of(CASES["logistic"]()))


# --- all -------------------------------------------------------------------------------------------------------------

EVERY: dict[str, Any] = {
    **{m: Dense(m, "global", 1.0) for m in ("ggn", "fisher", "empirical")},
    "block": Dense("ggn", "block", 1.0),
    **{k.__name__: k("ggn") for k in (KFAC, EKFAC, Shampoo, Diagonal)},
    "datainf": DataInf("block"),
    "cg": ITERATIVE["cg"],
    "ekfac_cg": ITERATIVE["ekfac_cg"],
    "neumann": ITERATIVE["neumann"],
    "astra": ITERATIVE["astra"],
    "arnoldi": Arnoldi("ggn", 20, 30),
    "eigenpairs": Eigenpairs("ggn", 20, 2),
    "nystrom": Nystrom("ggn", 20),
}


@pytest.mark.parametrize("name", EVERY)
def test_solve_is_the_inverse_of_the_contract(name: str) -> None:
    """Coordinates with precondition, and solve, are one symmetric matrix; a second call equals the first."""
    problem = problem_of(CASES["three_classes"]())
    source = Source(problem.task, problem.model(), tuple(blocks_of(problem.model())))
    fitted = EVERY[name].fit(problem, source)
    by_contract = inverse(fitted, source.blocks, DAMPING, GAMMA)
    unit = torch.eye(source.size, dtype=torch.float64)
    solved = flat(fitted.solve(unflat(source.blocks, unit), DAMPING, GAMMA))
    assert close(solved, by_contract, 1e-8)
    assert close(solved, solved.T, 1e-7)
    assert torch.equal(unit, torch.eye(source.size, dtype=torch.float64))
    other = flat(fitted.solve(unflat(source.blocks, unit), Damping("absolute", 10.0, "global"), GAMMA))
    assert far(other, solved)
    assert torch.equal(flat(fitted.solve(unflat(source.blocks, unit), DAMPING, GAMMA)), solved)


@pytest.mark.parametrize("rule", ["mean_eigenvalue", "trace"])
@pytest.mark.parametrize("name", EVERY)
def test_relative_damping_is_of_the_matrix_that_is_solved(name: str, rule: str) -> None:
    problem = problem_of(CASES["logistic"]())
    curvature = EVERY[name]
    if name in ("arnoldi", "eigenpairs", "nystrom"):
        curvature = {
            "arnoldi": Arnoldi("ggn", 12, 12),
            "eigenpairs": Eigenpairs("ggn", 12, 1),
            "nystrom": Nystrom("ggn", 12),
        }[name]
    model = explained(problem)
    matrix = {"fisher": lambda: outer(problem, "fisher"), "empirical": lambda: outer(problem, "empirical"),
              "datainf": lambda: outer(problem, "empirical")}.get(name)  # fmt: skip
    if matrix is None:
        from cases import ggn

        trace = ggn(model, problem.train).trace().item()
    else:
        trace = matrix().trace().item()
    if name == "KFAC":
        source = Source(problem.task, problem.model(), tuple(blocks_of(problem.model())))
        trace = sum(v.sum().item() for v in curvature.fit(problem, source).eigenvalues.values())
    strength = 0.3 * trace / (12 if rule == "mean_eigenvalue" else 1)
    relative = scores(curvature, problem, Damping(rule, 0.3, "block"))
    absolute = scores(curvature, problem, Damping("absolute", strength, "block"))
    assert close(relative, absolute, 1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_scores_of_one_query_do_not_depend_on_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(CASES["three_classes"]())
    queries = problem.task.splits["query"]
    method = Influence(EVERY[name], DAMPING)
    together = method.attribute(problem, queries)
    assert close(method.attribute(problem, queries.select([3, 1])), together[[3, 1]], 1e-8)
    monkeypatch.setattr("methods.influence.GRADIENT_BYTES", 1)
    assert close(method.attribute(problem_of(problem.task), queries), together, 1e-8)


def test_no_solver_warns_where_it_converged() -> None:
    """That one warns where it did not is tested above."""
    problem = problem_of(CASES["three_classes"]())
    for curvature in EVERY.values():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            scores(curvature, problem)
        assert not said, curvature


@pytest.mark.parametrize(
    ("solver", "keys"),
    [
        (ConjugateGradients("ggn", 1e-12, 1), ["method.curvature.iterations=1", "method=ekfac_cg"]),
        (Neumann("ggn", 1e-12, 1, None), ["method.curvature.iterations=1"]),
        (LiSSA("ggn", 3, 10, 1, None), ["method.curvature.depth=3", "method.curvature.batch_size=10"]),
        (LiSSA("ggn", 3, 1000, 1, 100.0), ["method.curvature.depth=3"]),
        (
            ASTRA("ggn", Identity(), 3, 50, 0.01),
            ["method.curvature.iterations=3", "method.curvature.batch_size=50"],
        ),
    ],
)
def test_a_solver_that_is_far_off_names_the_keys_to_raise(solver: Curvature, keys: list[str]) -> None:
    problem = problem_of(vector_task([3, 3], rows=60))
    with pytest.warns(UserWarning, match=r"; raise .*method\.damping\.value") as said:
        scores(solver, problem, Damping("absolute", 1e-3, "global"))
    (text,) = {str(one.message) for one in said}
    assert all(key in text for key in keys) and ("batch_size" in text) == any("batch_size" in key for key in keys)


def test_the_noise_of_batches_is_named_where_iterations_diverge() -> None:
    problem = problem_of(vector_task([3, 3], rows=60))
    for size, named in (
        (10, "method.curvature.scale=0.01, method.curvature.batch_size=10, or "),
        (60, "scale=0.01, or "),
    ):
        with pytest.raises(ArithmeticError, match=rf"diverged.*{named}method\.damping\.value"):
            scores(LiSSA("ggn", 200, size, 1, 0.01), problem)
    with pytest.raises(ArithmeticError, match=r"LiSSA diverged.*raise method\.curvature\.batch_size=2, .*depth=10 or"):
        scores(LiSSA("ggn", 10, 2, 1, 0.3), problem)


def unregularised(name: str) -> Problem:
    task = CASES[name]()
    return problem_of(replace(task, recipe=replace(task.recipe, weight_decay=0.0)))


@pytest.mark.parametrize(
    ("curvature", "what"),
    [
        (EKFAC("ggn"), "EK-FAC's block layers.1"),
        (Dense("ggn", "global", 1.0), "the matrix (all)"),
        (ConjugateGradients("ggn", 1e-6, 50), "the matrix"),
        (Nystrom("ggn", 5), "Nyström's matrix"),
    ],
)
def test_a_singular_system_names_both_keys_and_what_to_take(curvature: Curvature, what: str) -> None:
    problem = unregularised("three_classes")
    for damping in (Damping("absolute", 0.0, "global"), Damping("mean_eigenvalue", 0.0, "block")):
        with pytest.raises(UserError) as told:
            scores(curvature, problem, damping)
        start = f"method.damping.value and model.recipe.weight_decay (if l2) leave {what} singular: they add 0"
        assert str(told.value).startswith(start)
        assert str(told.value).endswith("; take method.damping.value=1e-3 or more")
        scores(curvature, problem, replace(damping, value=1e-3))


def test_a_negative_ritz_value_says_how_much_damping_is_enough() -> None:
    problem = unregularised("three_classes")
    smallest = torch.linalg.eigvalsh(hessian(problem))[0].item()
    size = sum(b.size for b in blocks_of(problem.model()))
    with pytest.raises(
        UserError, match=r"leave Arnoldi's matrix singular: they add 0 to a smallest eigenvalue of -.* is enough$"
    ) as told:
        scores(Arnoldi("hessian", size, size), problem, Damping("mean_eigenvalue", 0.0, "global"))
    enough = re.search(r"method\.damping\.rule=absolute method\.damping\.value=(\S+) is enough", str(told.value))
    assert enough and float(enough[1]) > -smallest
    scores(Arnoldi("hessian", size, size), problem, Damping("absolute", float(enough[1]), "global"))


def test_relative_damping_of_nothing_is_told_to_be_absolute() -> None:
    with pytest.raises(
        UserError, match=r"leave it singular: .*; take method\.damping\.rule=absolute method\.damping\.v"
    ):
        positive(0.0, 0.0, 0.0, "it")


def test_a_rank_above_the_iterations_names_both_keys() -> None:
    with pytest.raises(UserError, match=r"^method\.curvature\.rank=30 is above method\.curvature\.iterations=20; "):
        Arnoldi("ggn", 30, 20)


def test_modules_that_match_nothing_are_answered_by_a_few_names() -> None:
    model = problem_of(CASES["bert"]()).model()
    names = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    assert len(names) > 10
    for asked, shown in ((["nothing"], "nothing"), ([], "[]")):
        with pytest.raises(UserError) as told:
            blocks_of(model, asked)
        allowed = f"{', '.join(names[:7])}, {len(names) - 8} more, {names[-1]}"
        assert str(told.value).startswith(
            f"method.modules={shown} matches no module; allowed: {allowed}; patterns with *"
        )


@pytest.mark.parametrize("residual", [1.01, torch.nan])
def test_one_vector_that_is_worse_than_zero_is_never_returned(residual: float) -> None:
    require_solved(torch.tensor([0.1, 1.0]), "LiSSA", "")
    with pytest.raises(ArithmeticError, match="LiSSA diverged"):
        require_solved(torch.tensor([0.01, 0.01, residual]), "LiSSA", "raise it")
