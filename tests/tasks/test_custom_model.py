"""Models of a user's own: a network that his callable makes, and weights to start from, or to explain as they are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_tasks import Bag, recipe
from torch import Tensor, nn

from bench import config as configuration
from bench import records
from bench.run import run
from tasks.data.corruption import Corruption
from tasks.errors import UserError
from tasks.models.custom import Custom, custom, read_weights, started
from tasks.models.encoder import PretrainedEncoder, ScratchBert, word_pieces
from tasks.models.mlp import MLP
from tasks.tabular import tabular
from tasks.training.engines import Executor
from tasks.training.plan import planned
from tasks.training.retrain import retrain
from tasks.training.train import train

STILL = recipe(epochs=0)
ADAMW = recipe(optimizer="adamw", lr=0.01, decay="decoupled", weight_decay=0.01, epochs=1)
TEXTS = ["a good film", "a bad plot", "good cast", "bad story", "a fine plot"] * 3


def net(features: int, outputs: int, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, outputs))


class Named(nn.Module):
    """Its forward has an argument x, and it is made by its own constructor."""

    def __init__(self, features: int, outputs: int, *, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(features, outputs), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


def bag(vocabulary: int, outputs: int, dropout: float = 0.0) -> nn.Module:
    return Bag(vocabulary, outputs, dropout)


def batch_norm(features: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, outputs))


def of(make: Any, **changes: Any) -> Custom:
    keys = {"name": None, "vocabulary": 100, "max_length": 8, "dtype": "float64", "recipe": recipe(), **changes}
    return custom(make, **keys)


def wine(model: Any, seed: int = 0) -> Any:
    keys: dict[str, Any] = dict.fromkeys(("data_dir", "target", "n_train", "n_val", "n_query"))
    floor = {"accuracy": 0.5, "r2": 0.0}
    return tabular(model, "wine", kind="auto", seed=seed, corruption=Corruption(0.0, "uniform"), floor=floor, **keys)


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as told:
        make()
    assert "\n" not in str(told.value)
    return str(told.value)


# A callable


def test_a_callable_makes_the_network_and_trains() -> None:
    task = wine(of(net, width=5))
    assert (task.model, task.dtype) == ("net", torch.float64)
    model = task.initial(3)
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 13), (5,), (3, 5), (3,)]
    torch.manual_seed(3)
    for found, wanted in zip(model.parameters(), net(13, 3, 5).parameters(), strict=True):
        assert torch.equal(found, wanted.double()), "θ0 is of the seed, the trial before it draws nothing"
    made = train(task, 0)
    assert made.final_loss < task.loss(task.initial(0), task.train.batch()).mean().item()


def test_its_arguments_and_its_code_are_its_identity() -> None:
    one = wine(of(net))
    assert one.key() == wine(of(net)).key() == wine(of(f"{__name__}.net")).key()
    others = [wine(of(net, width=4)), wine(of(Named, scale=1.0)), wine(of(Named, scale=2.0))]
    assert len({task.key() for task in (one, *others)}) == 4
    assert one.fingerprint() == others[1].fingerprint()
    assert [name for name, _ in others[1].initial(0).named_parameters()] == ["layer.weight", "layer.bias"]
    batch = others[1].train.batch([0, 1])
    twice = 2 * others[1].outputs(others[1].initial(0), batch)
    torch.testing.assert_close(others[2].outputs(others[2].initial(0), batch), twice)


def test_a_callable_for_text_is_told_the_size_of_its_vocabulary() -> None:
    tokenize, build, identity = of(bag, recipe=ADAMW).prepare(TEXTS, 2)
    inputs, pieces = tokenize(TEXTS), word_pieces(TEXTS, 100)
    assert identity["vocabulary"] == pieces and int(inputs["input_ids"].max()) < len(pieces)
    model = build()
    assert model.get_parameter("embedding.weight").shape == (len(pieces), 4)
    assert model(**inputs).shape == (len(TEXTS), 2)


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        ("nowhere.net", {}, "model.make=nowhere.net cannot be imported; ModuleNotFoundError"),
        ("math.pi", {}, "model.make=math.pi cannot be called"),
        (net, {"widht": 3}, "model.widht is no key; allowed: width; net takes no other"),
        (Named, {}, "model.scale is missing; Named needs it"),
        (net, {"dtype": "int8"}, "model.dtype=int8 is not possible; allowed: float32, float64"),
        (net, {"recipe": STILL}, "model.recipe.epochs=0 is not possible; allowed: 1 or more without model.path"),
        (bag, {}, "model.make=bag has no argument 'features', so its network does not read vectors"),
        (lambda features, outputs: 3, {"name": "f"}, "model.make=f gives a int; allowed: a torch.nn.Module"),
        (lambda features, outputs: nn.Tanh(), {"name": "f"}, "model.make=f gives a network without parameters"),
        (lambda features, outputs: nn.Linear(features, 7), {}, "gives outputs (2, 7) for 2 rows; allowed: (2, 3)"),
        (lambda features, outputs: nn.Linear(5, outputs), {}, "gives a network that cannot read x (RuntimeError"),
        (batch_norm, {}, "keeps running statistics (network.0.running_mean), which are no parameters"),
    ],
)  # fmt: skip
def test_what_a_callable_cannot_be_is_told(make: Any, settings: dict[str, Any], said: str) -> None:
    assert said in refused(lambda: wine(of(make, **settings)).initial(0))


def test_a_network_of_vectors_reads_no_text() -> None:
    said = refused(lambda: of(net).prepare(TEXTS, 2)[1]())
    assert "model.make=net has no argument 'vocabulary', so its network does not read text" in said


def test_through_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def make(features: int, outputs: int, width: int) -> nn.Module:\n"
        "    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, outputs))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["model=custom", "model.make=my_nets.make", "model.width=6", "model.recipe.epochs=5"]
    config = configuration.compose(["task=tabular", "task.data=wine", *own, "method=graddot", "evaluation=[lds]",
                                    "truth.lds.subsets=4", "truth.lds.repeats=1", f"out={tmp_path}"])  # fmt: skip
    configuration.check(config)
    outcome = run(config)
    assert outcome.status in ("ok", "unfit"), outcome.reason
    record = records.read(Path(str(outcome.folder)))
    assert record["model"] == "make" and record["metrics"]["lds"]["value"] is not None
    assert record["config"]["model"]["width"] == 6
    assert record["coverage"] is not None


def test_the_callable_may_be_named_as_the_target() -> None:
    config = configuration.compose(
        ["task=tabular", "model=custom", f"model._target_={__name__}.net", "+model.width=6", "method=loss"]
    )
    assert config.model.make == f"{__name__}.net" and config.model.width == 6
    assert config.model._target_ == "tasks.models.custom.custom"


# Weights


def saved(place: Path, model: nn.Module, name: str = "weights.safetensors") -> str:
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, place / name)
    return str(place / name)


MADE: dict[str, Callable[..., Any]] = {
    "mlp": lambda path, chosen: MLP("mlp", (4,), 0.0, "float64", chosen, path=path),
    "logreg": lambda path, chosen: MLP("logreg", (), 0.0, "float64", chosen, path=path),
    "custom": lambda path, chosen: of(net, path=path, recipe=chosen),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_what_every_seed_starts_from(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    fresh = wine(MADE[kind](None, recipe()))
    source = fresh.initial(7).to(dtype)
    path = saved(tmp_path, getattr(source, "network", source))
    task = wine(MADE[kind](path, recipe()))
    for seed in (0, 1):
        for name, value in task.initial(seed).named_parameters():
            assert value.dtype == torch.float64
            assert torch.equal(value, source.get_parameter(name).double()), "to the last bit"
    assert task.key() != fresh.key() and task.fingerprint() == fresh.fingerprint()
    moved = saved(tmp_path, getattr(source, "network", source), "copy.safetensors")
    assert wine(MADE[kind](moved, recipe())).key() == task.key(), "the content counts, not the place"
    other = fresh.initial(8)
    path = saved(tmp_path, getattr(other, "network", other))
    assert wine(MADE[kind](path, recipe())).key() != task.key()


@pytest.mark.parametrize("kind", MADE)
def test_without_an_epoch_the_weights_are_explained_as_they_are(tmp_path: Path, kind: str) -> None:
    settings = {"optimizer": "lbfgs", "weight_decay": 0.1} if kind == "logreg" else {}
    source = wine(MADE[kind](None, recipe())).initial(7)
    path = saved(tmp_path, getattr(source, "network", source))
    task = wine(MADE[kind](path, recipe(epochs=0, **settings)))
    made = train(task, 0)
    assert [(c.step, c.path, c.moments) for c in made.checkpoints] == [(0, 0.0, None)]
    assert train(task, 0, keep=False).final.keys() == made.final.keys()
    for name, value in source.named_parameters():
        assert torch.equal(made.final[name], value) and torch.equal(made.initial[name], value)
    with torch.no_grad():
        wanted = float(task.loss(source, task.train.batch()).mean())
    assert made.final_loss == pytest.approx(wanted, rel=1e-12)
    weights = torch.ones(2, len(task.train), dtype=torch.float64)
    weights[1, :9] = 0
    for engine in ("vectorised", "processes"):
        rows = retrain(task, planned(weights, 1, "common", 0, 0), tmp_path / engine, Executor(engine, 1))["query"]
        measured = task.measure(source, task.splits["query"].batch()).detach().numpy()
        np.testing.assert_allclose(rows, np.stack([measured, measured]), rtol=1e-12)


def test_a_checkpoint_through_the_program(tmp_path: Path) -> None:
    chosen = ["task=tabular", "task.data=wine", "model=mlp_tabular", "model.hidden=[4]", f"out={tmp_path}"]
    first = [*chosen, "method=loss", "evaluation=[]"]
    source = wine(MADE["mlp"](None, recipe())).initial(7)
    outcome = run(configuration.compose([*first, "model.recipe.epochs=0", f"model.path={saved(tmp_path, source)}"]))
    scores, _ = records.read_scores(Path(str(outcome.folder)))
    task = wine(MADE["mlp"](None, recipe()))
    with torch.no_grad():
        wanted = -task.loss(source, task.train.batch())
    np.testing.assert_allclose(scores["value"], wanted, rtol=1e-9)
    with pytest.raises(UserError, match=r"model\.recipe\.epochs=0 .*without model\.path"):
        run(configuration.compose([*first, "model.recipe.epochs=0"]))


def test_weights_that_do_not_fit_are_told_with_both_shapes(tmp_path: Path) -> None:
    path = saved(tmp_path, nn.Sequential(nn.Linear(13, 4), nn.Tanh(), nn.Linear(4, 2)))
    said = refused(lambda: wine(of(net, path=path)).initial(0))
    assert f"model.path={path} does not fit the model: 2.weight is (2, 4) in the file and (3, 4) in the model, " in said
    assert "2.bias is (2) in the file and (3) in the model; give" in said
    said = refused(lambda: wine(MADE["mlp"](path, recipe())).initial(0))
    assert "layers.linear0.weight is missing in the file and (4, 13) in the model" in said and "and 5 more" in said
    fitting = net(13, 3).state_dict()
    save_file({**fitting, "2.bias": torch.tensor([1.0, torch.nan, 0.0])}, path)
    assert "holds numbers that are not finite, in 2.bias" in refused(lambda: wine(of(net, path=path)))


def test_tied_weights_stand_in_a_file_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    source, other = Tied(), Tied()
    save_file({k: v for k, v in source.state_dict().items() if k != "b.weight"}, tmp_path / "w.safetensors")
    started(other, read_weights(str(tmp_path / "w.safetensors")))
    assert torch.equal(other.b.weight, source.a.weight) and torch.equal(other.b.bias, source.b.bias)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.pkl"])
def test_nothing_is_unpickled(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path / "sprung").touch, ()

    torch.save({"w": Trap()}, tmp_path / name)
    said = refused(lambda: read_weights(str(tmp_path / name)))
    assert "is no .safetensors file" in said and "safetensors.torch.save_file(model.state_dict()" in said
    (tmp_path / name).rename(tmp_path / "renamed.safetensors")
    assert "cannot be read" in refused(lambda: read_weights(str(tmp_path / "renamed.safetensors")))
    assert not (tmp_path / "sprung").exists()
    assert "is no file" in refused(lambda: read_weights(str(tmp_path / "nowhere.safetensors")))


def test_a_bert_starts_from_weights_and_their_vocabulary(tmp_path: Path) -> None:
    bert = ScratchBert("tiny", 1, 8, 2, 16, 300, 16, 0.0, 0.02, "float32", ADAMW)
    tokenize, build, identity = bert.prepare(TEXTS, 2)
    source = build()
    path = saved(tmp_path, source)
    again = replace(bert, path=path, recipe=replace(ADAMW, epochs=0))
    same, rebuild, named = again.prepare(TEXTS, 2)
    assert named.keys() - identity.keys() == {"start"}
    assert all(torch.equal(a, b) for a, b in zip(rebuild().parameters(), source.parameters(), strict=True))
    others = ["a quite different corpus of other words", "which has another vocabulary"]
    assert "embeddings.weight is" in refused(lambda: again.prepare(others, 2))
    (tmp_path / "vocab.txt").write_text("\n".join(identity["vocabulary"]) + "\n", encoding="utf-8")
    theirs, rebuild, named = again.prepare(others, 2)
    assert torch.equal(theirs(TEXTS)["input_ids"], tokenize(TEXTS)["input_ids"]), "the words keep their numbers"
    assert torch.equal(same(TEXTS)["input_ids"], tokenize(TEXTS)["input_ids"])
    (tmp_path / "vocab.txt").write_text("[UNK]\n[PAD]\n")
    assert "vocab.txt is no vocabulary; allowed: a piece a line" in refused(lambda: again.prepare(others, 2))


def test_a_pretrained_encoder_is_explained_as_it_is_where_its_head_is_trained(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

    pieces = word_pieces(TEXTS, 100)
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    for kind in (BertForSequenceClassification, BertModel):
        network = kind(config)
        network.save_pretrained(tmp_path / kind.__name__)
        BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / kind.__name__)
        folder = str(tmp_path / kind.__name__)
        spec = PretrainedEncoder("mine", "nobody/nothing", "0" * 40, folder, 8, "float32", replace(ADAMW, epochs=0))
        if kind is BertModel:
            assert "has no classifier.bias, so there is no trained model" in refused(lambda: spec.prepare(TEXTS, 2))  # noqa: B023
        else:
            head = spec.prepare(TEXTS, 2)[1]().get_parameter("network.classifier.weight")
            assert torch.equal(head, network.classifier.weight)
