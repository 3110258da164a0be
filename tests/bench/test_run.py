"""End to end: methods on tasks, through the program, down to records and tables."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import bench.run
from bench import aggregate, records, tables
from bench import config as configuration
from bench.run import build_task, report, run
from tasks.base import Task
from tasks.errors import UserError

SMALL = ["task.n_train=120", "task.n_val=20", "task.n_query=12", "truth.lds.subsets=6", "truth.loo.sample=10"]
DIGITS = ["task=digits", *SMALL, "model.recipe.epochs=15", "model.recipe.batch_size=10"]
SENTIMENT = [
    "task=sst2",
    "task.data=generated",
    *SMALL,
    "model.recipe.epochs=1",
    "model.width=16",
    "model.intermediate=16",
]


def compose(out: Path, *overrides: str) -> DictConfig:
    return configuration.compose([*overrides, f"out={out}"])


@pytest.fixture(scope="module")
def digits_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def sentiment_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sentiment")


FEWER = {  # steps, where many small ones are taken: their answers are tested beside the methods
    "lissa": ["method.curvature.depth=60", "method.curvature.batch_size=120"],  # 50 of these 120 rows are too noisy
    "neumann": ["method.curvature.iterations=30"],
    "astra": ["method.curvature.iterations=20"],
    "ekfac_cg": ["method.curvature.tolerance=0.1"],
    "oporp_datainf": ["method.compression.dimension=512"],
    "bif": ["method.chains=2", "method.draws=20", "method.burn_in=10", "method.thin=2"],
    "ensemble": ["method.k=2"],
    "trak": ["method.k=2"],
    "loss_covariance": ["method.k=3"],
    "exact_hessian": ["method.damping.value=1.0"],
    "shapley": ["method.permutations=3", "method.prefixes=4"],
    "beta_shapley": ["method.permutations=3", "method.prefixes=4"],
    "banzhaf": ["method.subsets=20"],
    "datamodel": ["method.subsets=20"],
    "group": ["method.groups=5"],
    "prefilter": ["method.top=20"],
}
METHODS = [m for m in configuration.choices("method") if m not in ("custom", "from_file")]


CANNOT = {  # method: a word of the reason
    "digits": {"tfidf": "texts", "bm25": "texts", "prefilter": "texts", "tracin_adam": "Adam", "length_rule": "pairs"},
    "sentiment": {"source": "SGD", "length_rule": "pairs"},
    "regression": {
        "length_rule": "pairs",
        "tfidf": "texts",
        "bm25": "texts",
        "prefilter": "texts",
        "tracin_adam": "Adam",
        **dict.fromkeys(
            ("same_label", "contrast", "knn_shapley", "repsim", "embedding", "activation_precond"), "labels"
        ),
        **dict.fromkeys(("confidence", "entropy", "margin", "aum", "forgetting", "mahalanobis"), "labels"),
        **dict.fromkeys(("knn_disagreement", "confident_learning"), "labels"),
    },
}
REGRESSION = [
    "task=tabular", "task.data=diabetes", "model=mlp_tabular", "model.recipe.epochs=10", "task.n_query=8",
]  # fmt: skip
SMALLER = {  # what takes long, or is refused, at the preset's size
    "sentiment": {"exact_hessian": ["method.modules=[head]"], "block_ggn": ["method.modules=[head]"]},
    "regression": {
        "exact_hessian": ["method.modules=[layers.linear2]", "method.damping.value=1.0"],
        "lissa": ["method.curvature.batch_size=300"],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("ground", ["sentiment", "regression"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_texts_and_on_a_regression(method: str, ground: str, tmp_path: Path) -> None:
    settings = SENTIMENT if ground == "sentiment" else REGRESSION
    smaller = SMALLER[ground].get(method, [])
    changed = {s.partition("=")[0] for s in smaller}
    fewer = [s for s in FEWER.get(method, []) if s.partition("=")[0] not in changed]
    outcome = run(compose(tmp_path, *settings, f"method={method}", *fewer, *smaller, "evaluation=[]"))
    if method in CANNOT[ground]:
        assert outcome.status == "unsupported" and CANNOT[ground][method] in str(outcome.reason)
        return
    assert outcome.status in ("ok", "unfit"), outcome.reason
    scores, ids = records.read_scores(Path(str(outcome.folder)))
    assert scores and all(np.isfinite(s).all() and np.ptp(s) > 0 for s in scores.values())
    assert all(s.shape[-1] == len(ids["train"]) for s in scores.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_digits(method: str, digits_out: Path) -> None:
    evaluation = "evaluation=[lds,loo,detection]"
    outcome = run(
        compose(digits_out, *DIGITS, f"method={method}", *FEWER.get(method, []), evaluation, "task.corruption.rate=0.1")
    )
    expected = "unsupported" if method in CANNOT["digits"] else "ok"
    assert outcome.status in (expected, "unfit"), outcome.reason
    assert outcome.folder is not None
    record = records.read(Path(outcome.folder))
    if outcome.status == "unsupported":
        assert CANNOT["digits"][method] in record["reason"] and record["metrics"] == {}
        return
    for name, metric in record["metrics"].items():
        assert metric["value"] is not None, name
        assert metric["low"] is None or metric["low"] <= metric["value"] <= metric["high"] or metric["nan"], name
    scores, ids = records.read_scores(Path(outcome.folder))
    assert all(np.isfinite(s).all() for s in scores.values())
    for name, array in scores.items():
        assert array.shape[-1] == len(ids["train"]) == 120, name


def test_scores_taken_apart_are_in_the_record(digits_out: Path) -> None:
    outcome = run(compose(digits_out, *DIGITS, "method=graddot", "evaluation=[]", "detail=layer"))
    scores, ids = records.read_scores(Path(str(outcome.folder)))
    assert scores["detail/layers"].shape == (2, len(ids["query"]), len(ids["train"]))
    np.testing.assert_allclose(scores["detail/layers"].sum(0), scores["attribution/query"], rtol=1e-5, atol=1e-9)
    without = run(compose(digits_out, *DIGITS, "method=loss", "evaluation=[]", "detail=layer"))
    assert any("no scores by layer" in note for note in records.read(Path(str(without.folder)))["notes"])
    with pytest.raises(UserError, match=r"detail=word.*layer, token"):
        run(compose(digits_out, *DIGITS, "method=graddot", "detail=word"))


@pytest.mark.parametrize("method", ["ekfac", "tfidf", "tracin", "loss"])
def test_methods_on_sentiment(method: str, sentiment_out: Path) -> None:
    outcome = run(compose(sentiment_out, *SENTIMENT, f"method={method}"))
    assert outcome.status in ("ok", "unfit"), outcome.reason
    record = records.read(Path(str(outcome.folder)))
    assert record["data"]["source"] == "generated"
    assert record["metrics"]["base_rate"]["value"] == pytest.approx(0.1)
    assert ("lds" in record["metrics"]) == (method != "loss")
    assert record["cost"]["trainings"] == (0 if method == "tfidf" else 1)


def test_an_equal_run_is_found_and_a_forced_one_gives_the_same(tmp_path: Path) -> None:
    settings = [*DIGITS, "method=graddot", "evaluation=[lds]"]
    first = run(compose(tmp_path, *settings))
    before = records.read(Path(str(first.folder)))
    again = run(compose(tmp_path, *settings))
    assert again.found and again.folder == first.folder
    forced = run(compose(tmp_path, *settings, "rerun=true"))
    after = records.read(Path(str(forced.folder)))
    assert not forced.found and after["metrics"] == before["metrics"]


def test_what_decides_the_numbers_enters_the_run_id(tmp_path: Path) -> None:
    folders = {
        run(compose(tmp_path, *DIGITS, "method=random", "evaluation=[]", extra)).folder
        for extra in (
            "seed=0",
            "seed=1",
            "task.seed=1",
            "model.recipe.lr=0.05",
            "task.n_train=110",
            "task.corruption.rate=0.1",
        )
    }
    assert len(folders) == 6


def test_no_evaluation_gives_scores_and_trains_one_model(tmp_path: Path) -> None:
    outcome = run(compose(tmp_path, *DIGITS, "method=graddot", "evaluation=[]"))
    record = records.read(Path(str(outcome.folder)))
    assert outcome.status == "ok" and record["metrics"] == {}
    assert not (tmp_path / "cache" / "truth").exists()
    assert set(records.read_scores(Path(str(outcome.folder)))[0]) == {"attribution/query", "value"}


def test_a_plan_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(compose(tmp_path, *DIGITS, "plan=true"))
    said = capsys.readouterr().out
    assert outcome.folder is None and "12 retrainings" in said and "explained model" in said
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_a_failing_method_is_a_record_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("methods.baselines.Random.attribute", lambda *_: 1 / 0)
    outcome = run(compose(tmp_path, *DIGITS, "method=random", "evaluation=[lds]"))
    assert outcome.status == "failed" and "ZeroDivisionError" in str(outcome.reason)
    assert records.read(Path(str(outcome.folder)))["reason"] == outcome.reason
    monkeypatch.undo()
    assert run(compose(tmp_path, *DIGITS, "method=random", "evaluation=[lds]")).status == "ok"  # not "found"


def test_a_diverged_training_is_a_record(tmp_path: Path) -> None:
    settings = [*DIGITS, "method=graddot", "model.recipe.lr=1e200", "evaluation=[lds]"]
    outcome = run(compose(tmp_path, *settings))
    assert outcome.status == "diverged" and outcome.folder is not None


def test_an_unfit_task_says_why(tmp_path: Path) -> None:
    outcome = run(
        compose(tmp_path, *DIGITS, "method=random", "model.recipe.epochs=1", "model.recipe.lr=1e-6", "evaluation=[lds]")
    )
    assert outcome.status == "unfit" and "below its floor 0.8" in str(outcome.reason)


def test_random_scores_have_no_agreement_and_loo_of_the_exact_method_has(tmp_path: Path) -> None:
    settings = [
        "task=digits",
        "model=logreg",
        "task.n_train=150",
        "task.n_query=20",
        "evaluation=[lds,loo,lgo]",
        "truth.lgo={groups: 30, size: 5}",
        "method.damping.value=0",
    ]
    exact = records.read(Path(str(run(compose(tmp_path, *settings, "method=exact_ggn")).folder)))["metrics"]
    chance = records.read(Path(str(run(compose(tmp_path, *settings[:-1], "method=random")).folder)))["metrics"]
    assert exact["loo_pearson"]["value"] > 0.95 and exact["lds"]["value"] > 0.8 * exact["lds"]["ceiling"]
    assert exact["loo_slope"]["value"] > 1  # leverage
    assert exact["lgo_pearson"]["value"] > 0.9 and abs(chance["lgo_pearson"]["value"]) < 0.15
    assert chance["lds"]["low"] < 0 < chance["lds"]["high"] and abs(chance["loo_pearson"]["value"]) < 0.1


def test_a_small_change_of_weight_is_what_the_exact_method_says(tmp_path: Path) -> None:
    """The test of scale and sign, end to end: weight .98 instead of 0, slope within 2 % of 1."""
    settings = [
        "task=digits",
        "model=logreg",
        "task.n_train=150",
        "task.n_query=20",
        "evaluation=[loo]",
        "truth.loo.weight=0.98",
    ]
    outcome = run(compose(tmp_path, *settings, "method=exact_ggn", "method.damping.value=0"))
    metrics = records.read(Path(str(outcome.folder)))["metrics"]
    assert metrics["loo_slope"]["value"] == pytest.approx(1, abs=0.02)
    assert metrics["loo_pearson"]["value"] > 0.999


PBRF = [*DIGITS[:-2], "model=logreg", "evaluation=[pbrf]", "truth.pbrf.sample=12", "truth.pbrf.damping=0.05"]


def test_every_retraining_truth_on_digits(tmp_path: Path) -> None:
    settings = [
        *PBRF,
        "evaluation=[lds,lgo,removal,shapley,pbrf]",
        "truth.lgo.groups=4",
        "truth.lgo.size=10",
        "truth.removal={queries: 3, shares: [0.01], controls: 2, repeats: 1}",
        "truth.shapley.players=3",
        "method=exact_ggn",
        "method.damping.value=0.05",
    ]
    outcome = run(compose(tmp_path, *settings))
    record, folder = records.read(Path(str(outcome.folder))), Path(str(outcome.folder))
    metrics = record["metrics"]
    effects = {
        f"{k}_{name}" for k in ("lgo", "pbrf") for name in ("pearson", "spearman", "top10", "slope", "intercept")
    }
    shapley = {f"shapley_{name}" for name in ("pearson", "spearman", "top10")}
    rest = {"lds", "lds_pearson", "lds_kendall", "removal_area", "removal_noise", "qld", "qld_noise", "pbrf_exact_ggn"}
    assert set(metrics) == effects | shapley | rest
    assert outcome.status == "ok" and all(metric["value"] is not None for metric in metrics.values())
    # the truth has the method's own damping: scores are its linear prediction
    assert metrics["pbrf_pearson"]["value"] == pytest.approx(metrics["pbrf_exact_ggn"]["value"], abs=1e-4)
    assert metrics["removal_area"]["value"] > 0
    made = {name: note["made"] for name, note in record["truths"].items()}
    assert made["removal"] in range(3, 6), "two queries may have one best helper"
    assert made == {"lds": 12, "lgo": 5, "removal": made["removal"], "shapley": 7}
    queries = records.read_queries(folder)
    for name, metric in metrics.items():
        if f"{name}/value" in queries:
            assert queries[f"{name}/value"].mean() == pytest.approx(metric["value"])
            assert len(queries[f"{name}/value"]) == metric["n"] == (3 if name in ("removal_area", "qld") else 12)
            assert (f"{name}/ceiling" in queries) == (metric["ceiling"] is not None) == name.startswith("lds")
    assert len([name for name in queries if name.endswith("/value")]) == 3 + 3 * 2 + 2
    parts = records.read_replicates(folder)
    assert parts["lds"].shape == parts["pbrf_slope"].shape == (3, 1000)
    assert parts["lgo_top10"].shape == parts["qld"].shape == (1000,) and "qld_noise" not in parts


def test_a_truth_that_cannot_be_trusted_is_an_unfit_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.evaluations.pbrf.FAITHFUL", 1.01)
    outcome = run(compose(tmp_path, *PBRF, "method=graddot"))
    record = records.read(Path(str(outcome.folder)))
    assert outcome.status == record["status"] == "unfit" and record["metrics"] == {}
    assert "truth.pbrf.damping=0.05 is no truth: 0 of 12 optimisations did not converge" in record["reason"]
    (table,) = aggregate.tables(tables.load(tmp_path))
    assert table.notes == (f"† unfit: {record['reason']}",)


def test_a_report_shows_the_table_of_its_runs_and_where_they_lie(tmp_path: Path) -> None:
    settings = [*DIGITS, "evaluation=[lds]"]
    outcomes = [run(compose(tmp_path, *settings, f"method={m}")) for m in ("random", "graddot", "tfidf")]
    shown = aggregate.tables(tables.load(tmp_path))
    assert len(shown) == 1 and {row.label for row in shown[0].rows} == {"random", "graddot", "tfidf"}
    text = report(tmp_path, outcomes)
    assert all(str(outcome.folder) in text for outcome in outcomes)
    assert "graddot" in text and "unsupported" in text and list((tmp_path / "tables").glob("*.png"))


BAD = {
    "task.corruption.rate=1.5": "task.corruption.rate=1.5 is not possible; allowed: 0 <= rate < 1",
    "task.corruption.kind=funny": "allowed: uniform, one_class, hard",
    "task.n_train=99999": "at most 1496",
    "truth.lds.fraction=1.5": "truth.lds.fraction=1.5",
    "truth.lds.subsets=1": "truth.lds.subsets=1",
    "truth.lds.regime=sometimes": "allowed: fixed, common, fresh",
    "executor.engine=warp": "allowed: auto, vectorised, processes",
    "method.damping.rule=none": "allowed: absolute, mean_eigenvalue, trace",
    "method.modules=[nothing]": "matches no module",
    "model=bert_tiny": "does not read text",
    "device=warp": "device=warp is not at hand; allowed: cpu",
    "evaluation=[detection]": "labels that are known to be wrong",
    "evaluation=[lsd]": "evaluation=lsd is unknown; allowed: lds, loo, lgo, removal, shapley, pbrf, detection",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_values_are_one_line_and_leave_nothing(override: str, tmp_path: Path) -> None:
    settings = ["task=digits", "method=ekfac"]
    with pytest.raises(UserError) as caught:
        run(compose(tmp_path / "out", *settings, override))
    line = str(caught.value)
    expected = BAD[override].replace("does not read text", "does not read vectors")
    assert expected in line, line
    assert "\n" not in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=sst2", "task.data=folder", "task.data_dir=nowhere"], "task.data_dir=nowhere is no folder"),
        (["task=sst2", "task.data=hub"], "task.data=hub is not at hand"),
        (["task=sst2", "task.data=generated", "model=bert_base"], "model=bert_base is not at hand"),
        (["task=digits", "task.n_train=2000"], "task.n_train=2000"),
    ],
)
def test_the_program_exits_with_2_and_one_line(overrides: list[str], said: str, tmp_path: Path) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "OMP_NUM_THREADS": "1",
    }
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "bench", *overrides],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1
    assert not [p for p in tmp_path.iterdir() if p.name != "hub"]


def test_annotations_never_reach_a_method(tmp_path: Path) -> None:
    task = build_task(compose(tmp_path, *SENTIMENT))
    assert task.annotations is not None and len(task.annotations.flipped) == 12 and task.facts
    public = task.public()
    assert public.annotations is None and not public.facts
    assert "flipped" not in json.dumps(public.identity)


def test_an_edited_method_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "edited_method.py"
    head = "import torch\nfrom methods.base import Method\n"
    text = head + "class Ones(Method):\n    def value(self, problem):\n        return torch.ones(120)\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = [*DIGITS, "method=custom", "method._target_=edited_method.Ones", "evaluation=[]"]
    source.write_text(text)
    first = run(compose(tmp_path / "out", *settings))
    assert run(compose(tmp_path / "out", *settings)).found
    source.write_text(text.replace("torch.ones(120)", "2 * torch.ones(120)"))
    second = run(compose(tmp_path / "out", *settings))
    assert not second.found and second.folder != first.folder
    assert records.read(Path(str(second.folder)))["method_label"] == "Ones"


def test_a_wrapper_says_what_it_wraps(tmp_path: Path) -> None:
    settings = [*DIGITS, "method=self_influence", "method@method.base=graddot", "evaluation=[]"]
    assert (
        records.read(Path(str(run(compose(tmp_path, *settings)).folder)))["method_label"] == "self_influence(graddot)"
    )


def test_scores_without_a_finite_number_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("methods.baselines.Random.attribute", lambda *_: torch.full((12, 120), torch.nan))
    outcome = run(compose(tmp_path, *DIGITS, "method=random", "evaluation=[lds]"))
    assert outcome.status == "failed" and "no score is finite" in str(outcome.reason)


def test_more_generated_rows_than_there_are_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task.n_train=60000 .* at most 48700 \(generated data\)"):
        run(compose(tmp_path, "task=sst2", "task.data=generated", "task.n_train=60000"))


def test_a_sweep_reads_its_data_once_and_a_changed_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = bench.run.build_task

    def counted(config: DictConfig) -> Task:
        read.append(str(config.task.data_dir))
        return real(config)

    monkeypatch.setattr(bench.run, "build_task", counted)
    monkeypatch.setattr(bench.run, "BUILT", bench.run.Built())
    file = tmp_path / "mine.csv"
    lines = [f"{i % 7},{i % 5},{'ab'[i % 2]}" for i in range(35)]
    file.write_text("\n".join(["x,y,label", *lines]) + "\n")
    own = ["task=tabular", "task.data=folder", f"task.data_dir={file}", "task.target=label", "model=logreg"]

    def row(method: str, *more: str) -> pd.DataFrame:
        outcome = run(compose(tmp_path / "out", *own, f"method={method}", "evaluation=[]", *more))
        return pd.read_csv(Path(str(outcome.folder)) / "suspects.csv", dtype=str)

    first = row("loss")
    assert list(first.columns) == ["id", "row", "score", "label", "predicted", "why"]
    assert all(int(line) == int(i) + 2 for i, line in zip(first["id"], first["row"], strict=True))
    assert all(lines[int(i)].endswith(label) for i, label in zip(first["id"], first["label"], strict=True))
    row("margin")
    assert len(read) == 1
    row("margin", "task.seed=1")
    assert len(read) == 2
    file.write_text("\n".join(["x,y,label", *lines, "9,9,a"]) + "\n")
    assert len(row("loss")) == len(first) + 1 and len(read) == 3


def test_other_lines_of_the_same_rows_are_another_run(tmp_path: Path) -> None:
    """A file whose unusable rows were deleted holds the same rows at other lines, which suspects.csv must say."""
    file, lines = tmp_path / "mine.csv", [f"{i % 7},{i % 5},{'ab'[i % 2]}" for i in range(35)]
    own = ["task=tabular", "task.data=folder", f"task.data_dir={file}", "task.target=label", "model=logreg"]

    def suspects(*rows: str) -> pd.DataFrame:
        file.write_text("\n".join(["id,x,y,label", *rows]) + "\n")
        outcome = run(compose(tmp_path / "out", *own, "task.id=id", "method=loss"))  # nothing is judged by default
        assert not outcome.found
        return pd.read_csv(Path(str(outcome.folder)) / "suspects.csv")

    named = [f"r{i},{line}" for i, line in enumerate(lines)]
    before = suspects("broken,,1,a", *named)
    after = suspects(*named)
    assert list(before["id"]) == list(after["id"]) and list(before["row"]) == [row + 1 for row in after["row"]]


def test_a_plan_tells_seconds_disk_and_what_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, lines = tmp_path / "mine.csv", [f"{i % 7},{i % 5},{'ab'[i % 2]}" for i in range(35)]
    file.write_text("\n".join(["x,y,label", *lines]) + "\n")
    own = ["task=tabular", "task.data=folder", f"task.data_dir={file}", "task.target=label", "plan=true"]
    assert run(compose(tmp_path / "out", *own, "method=banzhaf", "method.subsets=7")).reason == "planned only"
    said = capsys.readouterr().out
    assert "12 rows are held out (4 val, 4 query, 4 test)" in said
    assert "explained model: 1 training" in said and " MiB" in said and "method: 7 retrainings of its own" in said
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_trained_are_not_judged_by_training() -> None:
    config = configuration.compose(["task=digits", "evaluation=[lds,loo]"])
    task = build_task(config)
    untrained = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, epochs=0))
    with pytest.raises(UserError, match=r"model\.recipe\.epochs=0"):
        bench.run.build_evaluations(config, untrained)
    assert set(bench.run.build_evaluations(config, task)) == {"lds", "loo"}


def test_the_command_of_a_record_names_no_place_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["task=rlhf", "model.path=/somewhere/data/models/x", "out=/elsewhere"]
    monkeypatch.setenv("BENCH_DATA", "/somewhere/data")
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: OmegaConf.create({"overrides": {"task": asked}})))
    assert bench.run._overrides() == ["task=rlhf", "model.path=$BENCH_DATA/models/x"]
