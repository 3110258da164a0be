"""Configs: composed from YAML, refused in one line."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from bench.config import check, check_signature, choices, compose, compose_all, conf_dir, describe, expand, run_key
from bench.help import groups
from tasks.errors import UserError

DIGITS = "task=digits"
MODULE = """
from typing import Any, Literal

class Method:
    def __init__(self, k: int, mode: Literal["a", "b"] = "a", scale: float | None = None, layers: list[int] = ()): ...

class Wrapper:
    def __init__(self, base: Any, times: int = 1): ...

class Anything:
    def __init__(self, **keys): ...

def task(model, n: int): ...
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's own module, importable."""
    (tmp_path / "toys_of_config.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toys_of_config", raising=False)
    return "toys_of_config"


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        compose([DIGITS, *overrides])
    message = str(error.value)
    assert "\n" not in message
    return message


def test_compose_gives_the_chosen_yamls_and_their_names() -> None:
    config = compose([DIGITS, "model=mlp", "seed=3", "truth.lds.subsets=7"])
    assert (config.seed, config.truth.lds.subsets) == (3, 7)
    assert (config.choice.task, config.choice.model) == ("digits", "mlp")
    assert "hydra" not in config


def test_a_task_names_its_model_and_the_user_may_choose_another() -> None:
    assert compose([DIGITS]).choice.model == "mlp"
    assert compose([DIGITS, "model=logreg"]).choice.model == "logreg"


def test_hydra_state_of_the_caller_survives() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        compose([DIGITS])
        refused("method=foo")
        assert GlobalHydra.instance().hydra is before
        hydra_compose("config", [DIGITS])
    compose([DIGITS])
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("method=foo", ["method=foo is unknown; allowed: ", "ekfac", "self_influence"]),
        ("method=ekfak", ["method=ekfak is unknown", "did you mean ekfac?"]),
        ("method=null", ["method=null is unknown; allowed: "]),
        ("method=[ekfac]", ["method=[ekfac] is unknown; allowed: "]),
        ("executor=moon", ["executor=moon is unknown; allowed: ", "local"]),
        ("hydra/launcher=joblip", ["hydra/launcher=joblip is unknown", "did you mean joblib?"]),
        ("hydra.launcher.foo=1", ["hydra.launcher.foo is not possible"]),
        ("method@method.base=ekfac", ["method@method.base=ekfac has no place here", "nests no other"]),
        ("method.compression=logra", ["method.compression=logra is not possible", "write method/compression=logra"]),
        ("+method.compression=logra", ["method.compression=logra is not possible", "write method/compression=logra"]),
        ("method.compression=3", ["method.compression=3 is not possible: it is a choice; allowed: gaussian, ", "=..."]),
        ("method.curvature=[kfac]", ["method.curvature=[kfac] is not possible: it is a choice; allowed: arnoldi, "]),
        ("method.curvature=null", ["method.curvature=null is not possible: it is a choice; allowed: arnoldi, "]),
        ("method.damping=0.1", ["method.damping=0.1 is not possible: it holds keys; write method.damping.value=0.1"]),
        ("method.damping=1", ["method.damping=1 is not possible: it holds keys; write method.damping.value=1"]),
        ("method.damping=null", ["method.damping=null is not possible; allowed: method.damping.rule=..., "]),
        ("method.damping=trace", ["method.damping=trace is not possible; allowed: method.damping.rule=..., "]),
        ("method.damping=${seed}", ["method.damping=0 is not possible: it holds keys"]),
        ("task.corruption=0.1", ["task.corruption=0.1 is not possible", "write task.corruption.rate=0.1"]),
        ("model.recipe=3", ["model.recipe=3 is not possible; allowed: model.recipe.optimizer=..., "]),
        ("truth.lds=null", ["truth.lds=null is not possible; allowed: truth.lds.subsets=..., "]),
        ("method.damping.value=inf", ["method.damping.value=inf is not possible; allowed: a finite number"]),
        ("method.damping.value=-inf", ["method.damping.value=-inf is not possible; allowed: a finite number"]),
        ("method.damping={value: nan}", ["method.damping.value=nan is not possible; allowed: a finite number"]),
        ("model.recipe.betas=[0.9,inf]", ["model.recipe.betas=inf is not possible; allowed: a finite number"]),
        ("truth.lds.fraction=1e999", ["truth.lds.fraction=inf is not possible; allowed: a finite number"]),
        ("task/nothing=ekfac", ["task/nothing=ekfac has no place here"]),
        ("methd=ekfac", ["methd is no key; allowed: ", "did you mean method?"]),
        ("task.n_trian=3", ["task.n_trian is no key; allowed: n_train, ", "did you mean n_train?"]),
        ("task.corruption.rat=0.1", ["task.corruption.rat is no key; allowed: ", "did you mean rate?"]),
        ("seed.x=1", ["seed.x is no key; seed is a single value"]),
        ("seed=abc", ["seed=abc is not possible; allowed: an integer such as 0"]),
        ("seed=1.5", ["seed=1.5 is not possible; allowed: an integer"]),
        ("seed=null", ["seed=null is not possible; allowed: an integer"]),
        ("seed=true", ["seed=true is not possible; allowed: an integer"]),
        ("rerun=maybe", ["rerun=maybe is not possible; allowed: true, false"]),
        ("evaluation=lds", ["evaluation=lds is not possible; allowed: a list such as"]),
        ("truth.lds.fraction=half", ["truth.lds.fraction=half is not possible; allowed: a number such as 0.5"]),
        ("truth.lds=3", ["truth.lds=3 is not possible; allowed: truth.lds.subsets=..., "]),
        ("truth.lds={subset: 3}", ["truth.lds.subset is no key; allowed: ", "did you mean subsets?"]),
        ("seed=[3", ["seed=[3 cannot be read", "quotes"]),
        ("seed", ["seed is no key=value"]),
        ("seed=${nothing}", ["seed is not possible", "nothing"]),
        ("seed=1,2", ["seed=1,2 is several values; add -m"]),
        ("~seed", ["~seed is not possible"]),
        ("~method", ["~method is not possible"]),
        ("evaluation=???", ["evaluation is missing; give evaluation=..."]),
        ("method=custom", ["method._target_ is missing; give method._target_=..."]),
        ("+seed=1", ["+seed is there already; leave out the +"]),
        ("+task=digits", ["+task is there already; leave out the +"]),
        ("++method=ekfac", ["++method is not possible; leave out the ++"]),
        ("+new=1", ["new is no key; allowed: seed, "]),
        ("++new=1", ["new is no key; allowed: seed, "]),
        ("+truth.lds.new=1", ["truth.lds.new is no key; allowed: subsets, "]),
        ("+truth.new.subsets=1", ["truth.new is no key; allowed: lds, "]),
        ("+executor.new=1", ["executor.new is no key; allowed: engine, workers"]),
    ],
)
def test_a_mistake_is_refused_in_one_line(override: str, parts: list[str]) -> None:
    message = refused(override)
    assert message.startswith(parts[0])
    assert all(part in message for part in parts)


def test_values_that_are_alike_are_accepted() -> None:
    config = compose([DIGITS, "truth.lds.fraction=1", "evaluation=[]", "executor.workers=2", "device=cuda:0"])
    assert config.truth.lds.fraction == 1 and config.evaluation == [] and config.executor.workers == 2


def test_null_is_accepted_where_the_yaml_has_it_though_a_task_hides_it(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    text = "# @package _global_\ndefaults: [digits]\ntruth: {loo: {sample: 30, repeats: 2}}\n"
    (tmp_path / "task" / "sampled.yaml").write_text(text)
    chosen = ["task=sampled", f"hydra.searchpath=['file://{tmp_path}']"]
    assert compose(chosen).truth.loo.sample == 30
    assert compose([*chosen, "truth.loo.sample=null"]).truth.loo.sample is None
    with pytest.raises(UserError, match=r"^truth\.loo\.repeats=null is not possible; allowed: an integer"):
        compose([*chosen, "truth.loo.repeats=null"])


def test_wrappers_nest() -> None:
    default = compose([DIGITS, "method=self_influence"])
    assert default.method.base == compose([DIGITS, "method=ekfac"]).method
    nested = compose(
        [DIGITS, "method=self_influence", "method@method.base=self_influence", "method@method.base.base=ekfac"]
    )
    assert nested.method.base.base == default.method.base
    assert nested.choice["method@method.base"] == "self_influence"
    assert "method@method.base=foo is unknown" in refused("method=self_influence", "method@method.base=foo")


PRECONDITIONER = "method/curvature@method.curvature.preconditioner"


@pytest.mark.parametrize(
    ("method", "place", "kept"),
    [
        (["method=cg"], "method.curvature.preconditioner", {"matrix": "fisher"}),
        (["method/curvature=cg"], "method.curvature.preconditioner", {"matrix": "fisher"}),
        (["method=ekfac_cg"], "method.curvature.preconditioner", {"matrix": "ggn"}),
        (["method=astra"], "method.curvature.preconditioner", {"matrix": "ggn"}),
        (["method=self_influence", "method@method.base=cg"], "method.base.curvature.preconditioner", {}),
    ],
)
def test_a_preconditioner_is_chosen_like_any_part(method: list[str], place: str, kept: dict[str, str]) -> None:
    config = compose([DIGITS, *method, f"method/curvature@{place}=diagonal"])
    check(config)
    chosen = OmegaConf.select(config, place)
    assert chosen._target_ == "methods.curvature.diagonal.Diagonal" and kept.items() <= chosen.items()


def test_conjugate_gradients_have_no_preconditioner_unless_one_is_chosen() -> None:
    plain, preconditioned = compose_all([[DIGITS, "method=cg"], [DIGITS, "method=ekfac_cg"]])
    assert plain.method.curvature.preconditioner is None and plain.method.curvature.iterations == 200
    assert preconditioned.method.curvature.preconditioner == {
        "_target_": "methods.curvature.ekfac.EKFAC",
        "matrix": "ggn",
    }
    assert compose([DIGITS, "method=cg", "method.curvature.preconditioner=null"]).method == plain.method


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.curvature.preconditioner=diagonal", " is not possible: it is a choice; write {}=diagonal"),
        ("method.curvature.preconditioner=3", " is not possible: it is a choice; allowed: arnoldi, "),
        ("method/curvature/preconditioner=diagonal", " has no place here; write {}=diagonal"),
        ("method/curvature@preconditioner=diagonal", " has no place here; write {}=diagonal"),
        ("method/curvature@method.base.curvature.preconditioner=kfac", " has no place here; write {}=kfac"),
        ("+method/curvature@method.curvature.preconditioner", " is there already; leave out the +"),
        ("method.curvature.preconditioner.matrix", " is no key; nothing is chosen there: write {}=..."),
    ],
)
def test_a_mistaken_preconditioner_is_told_how_to_write_it(override: str, message: str) -> None:
    given = override if "=" in override else f"{override}=ekfac"
    assert refused("method=cg", given).startswith(override + message.format(PRECONDITIONER))


def test_what_a_wrapper_nests_is_told_how_to_write_it() -> None:
    assert refused("method=self_influence", "method.base=graddot").endswith("; write method@method.base=graddot")
    assert refused("method=self_influence", "method/curvature=kfac").endswith(
        "write method/curvature@method.base.curvature=kfac"
    )
    assert refused("method.compression.rank=3", "method.compression=logra").endswith("; write method/compression=logra")


def test_parts_of_a_class_of_ones_own_are_no_single_values() -> None:
    custom = [DIGITS, "method=custom", "method._target_=methods.influence.Influence"]
    for curvature, damping, said in (
        ("kfac", "0.1", "curvature=kfac is not possible; allowed: a Curvature by its _target_"),
        (
            "{_target_: methods.curvature.kfac.KFAC, matrix: ggn}",
            "0.1",
            "damping=0.1 is not possible; allowed: a Damping",
        ),
        (
            "{_target_: methods.curvature.kfac.KFAC, matrix: ggn}",
            "null",
            "damping=null is not possible; allowed: a Damp",
        ),
    ):
        with pytest.raises(UserError, match=rf"^method\.{said}"):
            check(compose([*custom, f"method.curvature={curvature}", f"method.damping={damping}"]))


@pytest.mark.parametrize("modules", ["[0]", "layers.linear0"])
def test_modules_are_patterns(modules: str) -> None:
    with pytest.raises(UserError) as error:
        check(compose([DIGITS, f"method.modules={modules}"]))
    assert str(error.value).startswith(
        f"method.modules={modules} is not possible; allowed: a list of patterns such as [la"
    )


def test_custom_takes_any_key_and_the_signature_judges(module: str) -> None:
    custom = [DIGITS, "method=custom", f"method._target_={module}.Method"]
    for spelling in ("method.k=3", "+method.k=3", "++method.k=3"):
        config = compose([*custom, spelling])
        assert config.method.k == 3
        check_signature(config.method, "method")
    nested = compose(
        [
            *(DIGITS, "method=self_influence", "method@method.base=custom"),
            *(f"method.base._target_={module}.Method", "method.base.k=3"),
        ]
    )
    assert nested.method.base.k == 3


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"k": 1, "kk": 2}, "method.kk is no key; allowed: k, mode, scale, layers; did you mean k?"),
        ({"mode": "a"}, "method.k is missing"),
        ({"k": "x"}, "method.k=x is not possible; allowed: an integer"),
        ({"k": 1, "mode": "c"}, "method.mode=c is not possible; allowed: a, b"),
        ({"k": 1, "scale": "x"}, "method.scale=x is not possible; allowed: a number or null"),
        ({"k": 1, "layers": ["x"]}, "method.layers=[x] is not possible; allowed: a list of an integer"),
    ],
)
def test_signature_mistakes(module: str, node: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_signature({"_target_": f"{module}.Method", **node}, "method")
    assert str(error.value).startswith(message)


def test_signatures_that_fit(module: str) -> None:
    method = {"_target_": f"{module}.Method", "k": 1, "scale": 2, "layers": [1, 2]}
    check_signature(method, "method")
    check_signature({"_target_": f"{module}.Method", "_partial_": True}, "method")
    check_signature({"_target_": f"{module}.Anything", "whatever": 1}, "method")
    check_signature({"_target_": f"{module}.Wrapper", "base": method}, "method")
    check_signature({"_target_": f"{module}.task", "n": 1}, "task", given=("model",))


def test_signatures_of_nested_nodes(module: str) -> None:
    inner = {"_target_": f"{module}.Method", "k": 1, "kk": 2}
    for base, key in ((inner, "method.base.kk"), ([inner], "method.base.0.kk"), ({"a": inner}, "method.base.a.kk")):
        with pytest.raises(UserError, match=f"^{key} is no key"):
            check_signature({"_target_": f"{module}.Wrapper", "base": base}, "method")
    with pytest.raises(UserError, match=r"^task\.model is no key; allowed: n"):
        check_signature({"_target_": f"{module}.task", "n": 1, "model": 2}, "task", given=("model",))


@pytest.mark.parametrize("target", ["no_such_package.Method", "json.NoSuchName", "json", "pathlib."])
def test_a_target_that_cannot_be_imported(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as error:
        check_signature({"_target_": target}, "method")
    assert str(error.value).startswith(f"method._target_={target} cannot be imported; ")
    assert capfd.readouterr() == ("", "")


def test_a_leftover_key_below_a_target_is_refused_by_check(module: str) -> None:
    config = compose([DIGITS, "method=custom", f"method._target_={module}.Wrapper", "method.base=1", "+method.tims=2"])
    with pytest.raises(UserError, match=r"^method\.tims is no key; allowed: base, times; did you mean times\?"):
        check(config)


def test_expand_is_the_product_in_the_order_of_hydra() -> None:
    points = expand([DIGITS, "seed=range(2)", "model=mlp,logreg", "hydra/launcher=joblib"])
    assert points == [
        ["hydra/launcher=joblib", DIGITS, f"seed={seed}", f"model={model}"]
        for seed in (0, 1)
        for model in ("mlp", "logreg")
    ]
    assert expand([DIGITS]) == [[DIGITS]]
    assert [c.seed for c in compose_all(points)] == [0, 0, 1, 1]


def test_expand_knows_glob_and_refuses_what_cannot_be_enumerated() -> None:
    points = expand(["model=glob(*,exclude=bert*)"])
    assert [p[0] for p in points] == [f"model={m}" for m in choices("model") if not m.startswith("bert")]
    with pytest.raises(UserError, match=r"^seed=interval\(0.*1.*\) has no end; allowed: a,b, range"):
        expand(["seed=interval(0,1)"])


def jobs_of_hydra(overrides: list[str], folder: Path) -> list[list[str]]:
    """What Hydra's own sweeper launches."""
    jobs: list[list[str]] = []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", overrides, RunMode.MULTIRUN)
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # Hydra has just loaded it anew

        sweeper = BasicSweeper(None, config.hydra.sweeper.params)
        sweeper.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
        sweeper.hydra_context = SimpleNamespace(config_loader=loader)
        sweeper.launcher = SimpleNamespace(launch=lambda batch, initial_job_idx: jobs.extend(batch) or [])
        sweeper.validate_batch_is_legal = lambda batch: None
        sweeper.sweep(list(config.hydra.overrides.task))
    return jobs


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        (["study=epochs"], 16),
        (["study=regime"], 24),
        (["study=repeats"], 16),
        (["study=subset_size"], 24),
        (["study=width"], 20),
        (["study=subset_size", "method=ekfac"], 6),
        (["seed=0,1", "study=width", "method=ekfac,graddot"], 20),
        (["study=repeats", "truth.lds.repeats=3,1", "seed=range(2)", "hydra/launcher=joblib"], 16),
        (["seed=range(2)", "task=digits", "model=glob(logreg*)", "method=loss"], 4),
    ],
)
def test_expand_gives_the_jobs_of_hydra(tmp_path: Path, overrides: list[str], number: int) -> None:
    expanded = [[o for o in point if not o.startswith("hydra")] for point in expand(overrides)]
    assert expanded == jobs_of_hydra(overrides, tmp_path)
    assert len(expanded) == len({tuple(point) for point in expanded}) == number
    for override in overrides:
        if override.startswith("method="):
            methods = {o for point in expanded for o in point if o.startswith("method=")}
            assert methods == {f"method={m}" for m in override.removeprefix("method=").split(",")}


def test_expand_sees_the_studies_and_settings_of_a_user(tmp_path: Path) -> None:
    """A study that names no task, in a folder of the user's, beside a sweep over models."""
    (tmp_path / "study").mkdir()
    text = "# @package _global_\n# Mine\nhydra: {sweeper: {params: {seed: '0,1', task.n_train: 90}}}\n"
    (tmp_path / "study" / "mine.yaml").write_text(text)
    points = expand(["study=mine", "task=digits", "model=mlp,logreg", f"hydra.searchpath=['file://{tmp_path}']"])
    assert [point[1:] for point in points] == [
        [f"seed={seed}", "task.n_train=90", "study=mine", "task=digits", f"model={model}"]
        for seed in (0, 1)
        for model in ("mlp", "logreg")
    ]


@pytest.mark.parametrize("study", choices("study"))
def test_every_study_composes_and_fits_its_targets(study: str) -> None:
    """The first point and the last, which between them have another value of each key that is swept."""
    points = expand([f"study={study}"])
    keys = [o.partition("=")[0] for o, other in zip(points[0], points[-1], strict=True) if o != other]
    assert "method" in keys and len(keys) >= 2
    first, last = compose_all([points[0], points[-1]])
    for config in (first, last):
        check(config)
        assert config.choice.study == study and list(config.evaluation) == ["lds"] and "study" not in run_key(config)
    swept = re.search(r"x=([\w.]+)\)", describe("study", study))
    assert swept and swept.group(1) in keys, "the description names the key to draw against"
    assert OmegaConf.select(first, swept.group(1)) != OmegaConf.select(last, swept.group(1))


def test_run_key_holds_what_decides_the_numbers() -> None:
    base = run_key(compose([DIGITS]))
    assert base == run_key(compose([DIGITS, "out=elsewhere", "rerun=true", "plan=true", "executor.workers=3"]))
    for override in (
        "seed=1",
        "task.seed=1",
        "task.n_train=900",
        "truth.lds.subsets=3",
        "evaluation=[]",
    ):  # digits asks for lds
        assert base != run_key(compose([DIGITS, override]))
    assert run_key(compose([DIGITS, "evaluation=[lds]"])) == run_key(
        compose([DIGITS, "evaluation=[lds]", "truth.detection.inspected=[0.5]"])
    )
    config = OmegaConf.create({"task": {"data_dir": "x", "n": 1}, "model": {"path": "x"}, "method": {"path": "y"}})
    assert run_key(config) == {"task": {"n": 1}, "model": {}, "method": {}}
    assert config.task.data_dir == "x"


def test_run_key_is_resolved() -> None:
    assert run_key(OmegaConf.create({"seed": 3, "task": {"seed": "${seed}"}})) == {"seed": 3, "task": {"seed": 3}}


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in groups() for option in choices(group)])
def test_every_yaml_has_a_description(group: str, option: str) -> None:
    assert len(describe(group, option)) > 9


@pytest.mark.parametrize(
    "override", [f"{group}={option}" for group in ("method", "task", "model", "executor") for option in choices(group)]
)
def test_every_yaml_composes_and_fits_its_targets(override: str) -> None:
    overrides = [override] if override.startswith("task=") else [DIGITS, override]
    try:
        config = compose(overrides)
    except UserError as error:
        assert "is missing" in str(error)  # a key that only the user can give
        return
    check(config)
    assert all("_target_" in config[node] for node in ("method", "task", "model"))


def test_composing_imports_nothing_heavy() -> None:
    code = f"""
        import sys
        from bench.config import compose
        compose(["{DIGITS}"])
        print(sorted({{"torch", "transformers", "pandas", "sklearn", "datasets"}} & set(sys.modules)))
    """
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
