"""Unlearning through the program: both models, each forget set, every unlearner; what the record and the tables say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import aggregate, config, records, tables
from bench.__main__ import main
from bench.run import Outcome, report, run
from tasks.errors import UserError

SENTIMENT = [
    *("task=unlearning", "task.data=generated", "task.sentiment.n_train=60", "task.sentiment.n_val=12"),
    *("task.sentiment.n_query=6", "task.sentiment.n_nonmembers=20", "task.floor.sentiment=0", "model.layers=1"),
    *("model.width=8", "model.intermediate=8", "model.max_length=12", "model.recipe.epochs=3"),
]
AUTHORS = [
    *("task=unlearning", "model=authors_gpt", "task.data=generated", "task.authors.authors=6", "task.authors.world=6"),
    *("task.authors.strangers=2", "task.authors.asked=2", "task.floor.authors=0", "model.layers=1"),
    *("model.width=8", "model.intermediate=16", "model.recipe.epochs=2"),
]
CORPORA = {"sentiment_tiny": SENTIMENT, "authors_gpt": AUTHORS}
FORGET = {"random": (6, 4), "subset": (10, 5), "topk": (6, 4)}  # rows of 60 sentences and of 36 facts: 10 %; two
# fifths of a class of 25 sentences; the five facts of one author
UPDATES = {  # each with every mask somewhere
    "none": (["unlearner=none"], ("none", "salun", "none")),
    "influence": (["unlearner=influence", "method=ekfac"], ("salun", "none", "none")),
    "npo": (["unlearner=npo", "unlearner.steps=5"], ("none", "salun", "salun")),
}
JUDGED = {
    *(f"{of}_{what}" for of in ("forget", "retain", "test", "neighbours") for what in ("accuracy", "loss")),
    *("kl_forget", "kl_test", "kl_retain", "agreement_forget", "agreement_test", "tow"),
    *("mia_auc", "mia_gap", "ks_d"),
}
OWN = {"tow_normalised", "kl_forget_normalised", "parameter_distance", "update_seconds", "speedup"}
TEXTS = {"truth_ratio", "model_utility"}  # and no forget quality of so few questions
CONTROL = {f"{of}_{what}" for of in ("gold", "control") for what in ("forget_accuracy", "query_loss")}
ONE_SHOT = ("influence", "random_direction")
MATCHED = {
    f"matched_{loss}_{what}"
    for loss in ("0.1", "0.3", "0.6")
    for what in ("retain_loss", "retain_accuracy", "kl_test", "tow")
}
ANCHORS = {"retrain (floor)", "retrain, new initialisation", "original"}


def record_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.status == "ok", outcome.reason
    return records.read(Path(str(outcome.folder)))


def of_corpus(corpus: str, forget: str, unlearner: str) -> list[str]:
    settings, masks = UPDATES[unlearner]
    mask = masks[list(FORGET).index(forget)]
    return [*CORPORA[corpus], "method=ekfac", f"forget={forget}", f"mask={mask}", *settings]


Runs = dict[tuple[str, str, str], Outcome]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unlearning")


@pytest.fixture(scope="module")
def runs(out: Path) -> Runs:
    """Corpus, forget set, unlearner -> its run."""
    points = [(corpus, forget, update) for corpus in CORPORA for forget in FORGET for update in UPDATES]
    composed = config.compose_all([[*of_corpus(*point), f"out={out}"] for point in points])
    return {point: run(one) for point, one in zip(points, composed, strict=True)}


@pytest.mark.parametrize("forget", FORGET)
@pytest.mark.parametrize("corpus", CORPORA)
def test_a_record_has_its_figures_its_anchors_and_its_way(corpus: str, forget: str, runs: Runs) -> None:
    found = {update: record_of(runs[corpus, forget, update]) for update in UPDATES}
    texts, control = (TEXTS if corpus == "authors_gpt" else set()), (CONTROL if forget == "topk" else set())
    for update, record in found.items():
        metrics, note = record["metrics"], record["truths"]["unlearning"]
        assert set(metrics) == JUDGED | OWN | texts | control | (MATCHED if update in ONE_SHOT else set())
        assert all(metrics[name]["value"] is not None and np.isfinite(metrics[name]["value"]) for name in JUDGED)
        assert {name for name in metrics if metrics[name]["better"] is not None} <= {
            f"matched_{loss}_retain_loss" for loss in ("0.1", "0.3", "0.6")
        }, "nothing else is ranked"
        assert set(note["anchors"]) == ANCHORS
        assert all(set(figures) == JUDGED | texts for figures in note["anchors"].values())
        assert (note["forget"], note["n_forget"]) == (forget, FORGET[forget][corpus == "authors_gpt"])
        way, mask = note["trajectory"], UPDATES[update][1][list(FORGET).index(forget)]
        assert len(way) == {"none": 1, "influence": 6, "npo": 6}[update] and way[0]["step"] == 0
        for name in ("forget_loss", "retain_loss"):
            assert way[0][name] == pytest.approx(note["anchors"]["original"][name])
            assert way[-1][name] == pytest.approx(metrics[name]["value"])
        assert note["mask"] == mask and ("weights_that_move" in note) == (mask != "none")
    one, *others = (record["truths"]["unlearning"]["anchors"] for record in found.values())
    assert all(other == one for other in others), "one forget set, one reference"
    untouched = {name: found["none"]["metrics"][name]["value"] for name in JUDGED}
    assert untouched == pytest.approx({name: one["original"][name] for name in JUDGED})
    assert found["npo"]["metrics"]["forget_loss"]["value"] != untouched["forget_loss"]


def test_golds_are_trained_once_for_all(runs: Runs, out: Path) -> None:
    """Of each corpus the explained model; of each forget set two golds with its initialisation and one with another; of
    the chosen set one control."""
    assert len(runs) == 18
    assert len(list((out / "cache" / "models").rglob("*.safetensors"))) == 2 * (1 + 3 * 3 + 1)
    assert not (out / "cache" / "truth").exists()


def test_a_run_is_found_again_and_another_choice_is_another_run(runs: Runs, out: Path) -> None:
    first = runs["sentiment_tiny", "random", "npo"]
    settings = [*of_corpus("sentiment_tiny", "random", "npo"), f"out={out}"]
    again = run(config.compose(settings))
    assert again.found and again.folder == first.folder
    assert len({outcome.folder for outcome in runs.values()}) == len(runs)


def test_a_table_is_of_one_forget_set(runs: Runs, out: Path) -> None:
    found = aggregate.tables(tables.load(out))
    assert len(found) == 6 and {(t.model.split(" ")[0], t.part) for t in found} == {
        (corpus, forget if forget != "topk" else "topk_ekfac") for corpus in CORPORA for forget in FORGET
    }
    for table in found:
        forget = table.part.split("_")[0]
        ours, below = [row for row in table.rows if row.seeds and row.config], table.rows[3:]
        masks = [masks[list(FORGET).index(forget)] for _, masks in UPDATES.values()]
        names = ["none", "influence by ekfac", "npo"]
        labels = {n + (f", {m} mask" if m != "none" else "") for n, m in zip(names, masks, strict=True)}
        assert {row.label for row in ours} == labels and {row.label for row in below} == ANCHORS
        columns = {head.metric: k for k, head in enumerate(table.columns)}
        (untouched,) = [row for row in ours if row.label.startswith("none")]
        (original,) = [row for row in below if row.label == "original"]
        for name in ("forget_loss", "tow", "kl_forget"):
            values = [row.cells[columns[name]] for row in (untouched, original)]
            assert all(cell is not None for cell in values)
            assert values[0].value == pytest.approx(values[1].value)  # type: ignore[union-attr]
    text = report(out, list(runs.values()))
    written = {path.name for path in (out / "tables").iterdir()}
    for table in found:
        assert {f"{table.name}.{ending}" for ending in ("csv", "md", "tex")} <= written
        assert f"{table.name}-paths.png" in written
        assert all(label in (out / "tables" / f"{table.name}.md").read_text() for label in ANCHORS)
    assert text.count("retrain (floor)") >= 6 and text.count("figure: ") == 6


FEWER = {
    "dmm": ["unlearner.steps=5"],
    "iterated_newton": ["unlearner.steps=2", "unlearner.target=5.0"],
    **{
        name: ["unlearner.steps=5"]
        for name in ("finetune", "grad_diff", "gradient_ascent", "salun", "scrub", "simnpo", "soul")
    },
}


@pytest.mark.parametrize("unlearner", [name for name in config.choices("unlearner") if name not in UPDATES])
def test_every_unlearner_is_a_row(unlearner: str, runs: Runs, out: Path) -> None:
    settings = [*SENTIMENT, "method=ekfac", f"unlearner={unlearner}", *FEWER.get(unlearner, []), f"out={out}"]
    before = set((out / "cache" / "models").rglob("*.safetensors"))
    record = record_of(run(config.compose(settings)))
    metrics, note = record["metrics"], record["truths"]["unlearning"]
    assert set(metrics) == JUDGED | OWN | (MATCHED if unlearner in ONE_SHOT else set())
    assert note["uses_method"] == (unlearner in ("dmm", "influence", "iterated_newton"))
    assert note["mask"] == ("salun" if unlearner == "salun" else "none")
    reference = record_of(runs["sentiment_tiny", "random", "none"])["truths"]["unlearning"]["anchors"]
    assert note["anchors"] == reference and set((out / "cache" / "models").rglob("*.safetensors")) == before
    if unlearner == "retrain":  # it is a gold, so another one judges it
        assert metrics["parameter_distance"]["value"] > 0 and metrics["kl_forget"]["value"] > 0


@pytest.mark.parametrize("form", ["koh_liang", "reweight"])
def test_every_form_of_the_influence_update_runs(form: str, runs: Runs, out: Path) -> None:
    settings = [*SENTIMENT, "method=diagonal", "unlearner=influence", f"unlearner.form={form}", f"out={out}"]
    metrics = record_of(run(config.compose(settings)))["metrics"]
    default = record_of(runs["sentiment_tiny", "random", "influence"])["metrics"]
    assert metrics["forget_loss"]["value"] != default["forget_loss"]["value"]


@pytest.mark.parametrize("mask", ["random", "wagle"])
def test_other_masks_move_as_many_weights(mask: str, runs: Runs, out: Path) -> None:
    settings = [*SENTIMENT, "method=ekfac", "unlearner=npo", "unlearner.steps=5", f"mask={mask}", f"out={out}"]
    note = record_of(run(config.compose(settings)))["truths"]["unlearning"]
    others = record_of(runs["sentiment_tiny", "subset", "npo"])["truths"]["unlearning"]
    assert note["mask"] == mask and note["weights_that_move"] > 0
    assert 0.5 < note["weights_that_move"] / others["weights_that_move"] < 2


def test_a_plan_counts_the_golds_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for forget, golds in (("random", 3), ("topk", 4)):
        settings = [*SENTIMENT, "method=ekfac", f"forget={forget}", "plan=true", f"out={tmp_path / 'out'}"]
        assert run(config.compose(settings)).reason == "planned only"
        said = capsys.readouterr().out
        assert f"unlearning: {golds} " in said, said
    assert not (tmp_path / "out").exists()


# What would mean nothing

BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "an empty forget set": (["forget.fraction=0.001"], ("forget.fraction=0.001 is an empty forget set of 60 rows",)),
    "no forget set": (["forget.fraction=0"], ("forget.fraction=0 is an empty forget set of 60 rows",)),
    "everything": (["forget.fraction=1.0"], ("forget.fraction=1.0 is the whole training set of 60 rows",)),
    "more than everything": (["forget.fraction=1.5"], ("forget.fraction=1.5",)),
    "an empty chosen set": (["forget=topk", "forget.fraction=0.001"], ("forget.fraction=0.001",)),
    "all chosen": (["forget=topk", "forget.fraction=1.0"], ("forget.fraction=1.0",)),
    "no group": (["forget=subset", "forget.groups=0"], ("forget.groups=0",)),
    "all of a class": (["forget=subset", "forget.of_class=1.0"], ("forget.of_class=1.0",)),
    "no inverse": (["method=tracin"], ("method=TracIn inverts no curvature, which unlearner=influence needs", "ekfac")),
    "no inverse in the space of the weights": (
        ["method=logra"],
        ("method=Influence inverts no curvature, which unlearner=influence needs", "uncompressed"),
    ),
    "no inverse, iterated": (
        ["method=loss", "unlearner=iterated_newton"],
        ("method=Loss inverts no curvature, which unlearner=iterated_newton needs",),
    ),
    "no scores to choose by": (
        ["method=loss", "unlearner=none", "forget=topk"],
        ("method=Loss scores no query, which forget=topk needs",),
    ),
    "no scores to match": (
        ["method=loss", "unlearner=dmm"],
        ("method=Loss scores no query, which unlearner=dmm needs",),
    ),
    "scores without a unit": (
        ["method=tfidf", "unlearner=dmm"],
        ("method=TfIdf gives scores without a unit, and unlearner=dmm predicts outputs with them",),
    ),
    "an empty mask": (["mask=salun", "mask.density=0"], ("mask.density=0",)),
    "a full mask": (["mask=random", "mask.density=1.0"], ("mask.density=1.0", "mask=none")),
    "no unlearner": (["unlearner=null"], ("unlearner=null is unknown; allowed: dmm, finetune",)),
    "an unknown unlearner": (["unlearner=forgetful"], ("unlearner=forgetful is unknown",)),
    "an unknown form": (["unlearner.form=newtn"], ("unlearner.form=newtn", "koh_liang, newton, reweight")),
    "no target": (["truth.unlearning.matched=[0]"], ("truth.unlearning.matched=0",)),
    "a model of vectors": (["model=mlp"], ("model=mlp does not read text",)),
}


@pytest.mark.parametrize("mistake", BAD)
def test_what_means_nothing_ends_with_2_and_a_line(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    more, parts = BAD[mistake]
    settings = [s for s in SENTIMENT if "model" not in s or "model=mlp" not in more]
    assert main([*settings, "method=ekfac", *more, "out=out"]) == 2
    output = capfd.readouterr()
    assert output.err.count("\n") == 1 and output.out == ""
    assert output.err.startswith("error: " + parts[0]), output.err
    assert all(part in output.err for part in parts), output.err
    assert not (tmp_path / "out").exists(), "nothing was trained"


@pytest.mark.parametrize("group", ["unlearner=npo", "forget=random", "mask=none"])
def test_what_only_unlearning_reads_is_refused_elsewhere(group: str) -> None:
    for elsewhere in (["task=digits"], ["task=unlearning", "evaluation=[lds]"]):
        with pytest.raises(UserError, match=f"^{group} changes nothing here; it goes with task=unlearning"):
            config.compose([*elsewhere, group])


def test_another_task_has_no_unlearner_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^unlearner is missing; evaluation=\[unlearning\] needs one: unlearner=\.\.\."
    ):
        run(config.compose(["task=digits", "evaluation=[unlearning]", f"out={tmp_path / 'out'}"]))


@pytest.mark.parametrize("mask", ["random", "salun", "wagle"])
def test_a_mask_of_no_weight_is_named(mask: str, runs: Runs, out: Path) -> None:
    settings = [*SENTIMENT, "method=ekfac", "unlearner=npo", f"mask={mask}", "mask.density=1e-7", f"out={out}"]
    with pytest.raises(UserError, match=r"^mask\.density=1e-07 keeps nothing of \d+ weights"):
        run(config.compose(settings))


def test_an_update_that_changes_nothing_is_a_mistake_and_no_row(tmp_path: Path, capfd: Any) -> None:
    settings = [*SENTIMENT, "method=ekfac", "unlearner=npo", "unlearner.lr=1e-30", f"out={tmp_path}"]
    assert main(settings) == 2
    said = capfd.readouterr().err
    assert "error: unlearner=npo left the parameters unchanged; it takes" in said and "Traceback" not in said
    assert not (tmp_path / "runs").exists()
