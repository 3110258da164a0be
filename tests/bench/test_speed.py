"""The speed program: what it says of itself, and its parts on influence functions on tiny tasks."""

import importlib.util
import re
from dataclasses import replace

import pytest
import torch

from bench import speed, speed_ekfac, speed_own, speed_solvers, speed_trak
from bench.speed_ekfac import Took, joined, ours, report, theirs
from methods.compression.none import Uncompressed
from methods.compression.sjlt import SJLT
from methods.curvature import products
from tasks.base import Task


@pytest.fixture(scope="module")
def task() -> Task:
    sizes = ("task.n_train=30", "task.n_query=4", "task.n_val=1", "model.layers=1", "model.width=16")
    return joined(speed._task(*speed_ekfac.SETTINGS, *sizes), 24)


def linear(task: Task) -> list[str]:
    return [name for name, m in task.initial(0).named_modules() if type(m) is torch.nn.Linear]


def test_help_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert f"only={','.join(speed.PARTS)}]" in told
    assert all(f"\n{part} " in told for part in speed.PARTS)


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["only=nothing"]) == 2
    assert "only=nothing" in capsys.readouterr().err


def test_joined_texts_begin_and_end_as_texts_do(task: Task) -> None:
    plain = speed._task(*speed_ekfac.SETTINGS, "task.n_train=30", "task.n_query=4", "task.n_val=1")
    start, end = plain.train.inputs["input_ids"][0, 0], 3  # [PAD], [UNK], [CLS], [SEP]
    ids, mask = task.train.inputs["input_ids"], task.train.inputs["attention_mask"]
    lengths = mask.sum(1)
    assert ids.shape == mask.shape == (30, 24) and lengths.max() == 24 and lengths.min() < 12
    assert (ids[:, 0] == start).all() and (ids[torch.arange(30), lengths - 1] == end).all()
    assert ((ids == end).sum(1) == 1).all() and (ids[mask == 0] == 0).all()


def test_counted_products_are_at_least_those_of_the_formulas(task: Task) -> None:
    """Of linear layers in two passes: forward, a aᵀ, d dᵀ, both rotations and d aᵀ; all others are fewer."""
    took, scores = ours(task, 1e-4, linear(task), count=True)
    assert scores.shape == (4, 30)
    tokens = int(task.train.inputs["attention_mask"].sum())
    layers = [(m.out_features, m.in_features) for m in task.initial(0).modules() if isinstance(m, torch.nn.Linear)][:-1]
    least = sum(2 * tokens * (2 * o * i + 2 * (i + 1) ** 2 + 2 * o**2 + o * (i + 1)) for o, i in layers)
    assert least < took.fit < 3 * least
    assert 0 < took.score < took.both == took.fit + took.score


def test_without_the_peer_a_line_says_how_to_install_it(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lines = report(task, 1)
    assert lines[-1] == "kronfluence is not installed: `make peers` installs it"
    assert any(line.startswith("ours, linear layers: fit ") and "% of that rate" in line for line in lines)


def test_both_sides_give_the_same_scores(task: Task) -> None:
    pytest.importorskip("kronfluence", reason="kronfluence is not installed: make peers")
    mine, found = ours(task, 1e-4, linear(task))
    for cut in (False, True):
        took, expected = theirs(task, 1e-4, 8, cut)
        assert min(took.fit, took.score, mine.fit, mine.score) > 0
        assert speed_ekfac._correlation(found, expected) > 0.9999
        assert speed_ekfac._correlation(found.flip(1), expected) < 0.9
    assert "2.00x [2.00, 2.00]" in speed_ekfac._ratio("a", [Took(3.0, 1.0)], [Took(1.0, 1.0)])


def test_queries_are_solved_for_together_and_one_by_one() -> None:
    tiny = speed._task("task=digits", "task.n_train=60", "task.n_query=5", "model.hidden=[4]")
    before, lines = products.KEPT, speed_solvers.solvers(tiny, 2, depth=5, apart=(3, 2))
    assert before == products.KEPT
    assert len(lines) == 5 and "5 queries, 60 training examples" in lines[0]
    assert [line.split(",")[0] for line in lines[1:]] == 2 * ["conjugate gradients to 1e-03", "LiSSA"]
    assert ["kept in memory" in line for line in lines[1:]] == [True, True, False, False]
    assert all(float(line.split("differ by ")[1].split()[0]) < 2e-3 for line in lines[1:])


def test_how_much_is_kept_is_restored_after_a_failure() -> None:
    before = products.KEPT
    with pytest.raises(ZeroDivisionError), speed_solvers.kept_up_to(0):
        assert products.KEPT == 0
        raise ZeroDivisionError
    assert before == products.KEPT


def test_compressed_and_rounded_scores_stand_beside_full_ones(task: Task) -> None:
    for lines, other, least in (
        (speed_solvers.logra(task, 1, rank=16), "LoGra, 16 x 16 a layer: fit ", 0.3),
        (speed_solvers.precision(task, 1), "bf16: fit ", 0.99),
    ):
        assert lines[0].startswith("30 texts of ") and lines[2].startswith(other) and " both " in lines[3]
        assert lines[4].startswith("correlation") and least < float(lines[4].split()[-1]) < 1


def test_repeated_rows_have_ids_of_their_own(task: Task) -> None:
    more = speed_solvers.repeated(task.train, 70)
    assert len(set(more.ids)) == len(more) == 70
    assert torch.equal(more.inputs["input_ids"][60:], task.train.inputs["input_ids"][:10])


def test_memory_is_told_beside_the_scores(task: Task) -> None:
    curvature, method = speed_solvers.FirstFit(), speed_solvers._ekfac()
    more = speed_solvers._with(task, speed_solvers.repeated(task.train, 70))
    for each in (task, more):
        scores = replace(method, curvature=curvature).attribute(speed_ekfac.problem_of(each), task.splits["query"])
    assert len(curvature.made) == 1
    expected = method.attribute(speed_ekfac.problem_of(task), task.splits["query"]).repeat(1, 3)[:, :70] * 30 / 70
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-6 * expected.abs().max().item())
    lines = speed_solvers.memory(task, (30, 120))
    if len(lines) == 4:  # else the system does not tell
        assert lines[1].startswith("30 training examples: scoring adds ") and "all gradients would be" in lines[2]


def test_features_of_the_peer_are_projections_of_the_same_gradients(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inner products of both are those of the margins' gradients, as far as a random projection keeps them."""
    monkeypatch.setattr(speed_trak, "DIMENSION", 4096)
    if importlib.util.find_spec("trak") is None:
        pytest.skip("traker is not installed: make peers")
    task = replace(task, splits={**task.splits, "train": task.train.select(range(12))})
    _, exact = speed_trak.ours(task, Uncompressed())
    gram = speed_trak._gram(exact)
    for _, found in (speed_trak.ours(task, SJLT(4096)), speed_trak.theirs(task, 5)):
        scaled = speed_trak._gram(found)
        scaled = scaled * (scaled * gram).sum() / (scaled * scaled).sum()  # theirs has a scale of its own
        assert (scaled - gram).abs().max() < 0.1 * gram.abs().max()


def test_without_traker_a_line_says_how_to_install_it(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lines = speed_trak.features(task, 1)
    assert "make peers" in lines[-1] and not any("traker takes" in line for line in lines)


def test_suspects_of_a_file_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_own, "ROWS", 400)
    monkeypatch.setattr(speed_own, "METHODS", ("loss", "random"))
    lines = speed_own.report(1)
    assert re.search(r"400 rows, 40 features, 5 % wrong labels, 2 methods: \d+ s .* peak [\d.]+ GiB", lines[0])
    found = dict(part.split() for part in lines[1].partition(": ")[2].split(", "))
    assert float(found["loss"]) > 0.6 and 0.2 < float(found["random"]) < 0.8
