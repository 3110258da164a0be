"""From what a user typed to a config that is known to be possible: composed by Hydra, refused in one line if it is not.

Two steps, so that nothing heavy is imported for a typing mistake. `compose` reads YAML only; `check` then imports each
`_target_` and compares the keys of its node with the signature. Only the nodes of method, task and model may gain keys,
by `+method.key=value`; everywhere else the YAML lists every key that there is, and its values tell the kind: a number
that may have a fraction is written with one (`1.0`), and a key that may be null is null.
"""

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import _locate  # what hydra.utils.get_object calls, without its log lines
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tasks.errors import UserError

SIGNED = ("method", "task", "model")  # what users may replace by a class of their own: only the signature judges it
CALLER_GIVES = {"task": ("model",)}  # arguments of a target that no YAML names: bench hands them over
DIRECTIVES = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
UNLEARNING = ("unlearner", "forget", "mask")  # groups that truth.unlearning alone reads
NOT_IN_RUN_KEY = ("out", "rerun", "plan", "executor", "hydra", "choice", *UNLEARNING)
EXAMPLES = {"modules": "a list of patterns such as [layers.linear0], or null for every block"}  # by argument's name
# Their content is fingerprinted instead, or decides nothing.
PATHS = (("task", "data_dir"), ("task", "query_file"), ("model", "path"), ("method", "path"), ("method", "store"))
MISTAKES = (HydraException, OmegaConfBaseException, ValueError, AssertionError)  # what Hydra raises for a wrong config

OmegaConf.register_new_resolver("unless_own", lambda data, value: [] if data == "folder" else value, replace=True)

Config = dict[str, Any]
Parts = Mapping[str, tuple[str, list[str]]]  # keys that are choices of their own: the group, its options
Bases = dict[tuple[str, ...], tuple[Config, dict[str, Any], Parts]]  # of the chosen YAMLs alone: config, choices, parts


def conf_dir() -> Path:
    """The folder of YAML files: inside the package where installed, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def choices(group: str) -> list[str]:
    """The options of a group, for example of `method` or `method/curvature`."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def describe(group: str, option: str) -> str:
    """The first comment line of the option's YAML."""
    for line in (conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if line.startswith("#") and text and not text.startswith("@package"):
            return text
    return ""


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """One run's config, every mistake a one-line `UserError`. `choice` tells which YAML was chosen in each group."""
    return compose_all([overrides])[0]


def compose_all(points: Sequence[Sequence[str]]) -> list[DictConfig]:
    """`compose` for each point of a sweep, sharing the work."""
    bases: Bases = {}
    with _hydra() as loader:
        return [_compose(_parse(open_custom(overrides), loader), loader, bases) for overrides in points]


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The points of a multirun, in the order in which Hydra's basic sweeper numbers its jobs."""
    with _hydra() as loader:
        parsed = _parse(open_custom(overrides), loader)
        parsed = _parse(_of_study(parsed, loader), loader) + parsed
        for_hydra = [str(o.input_line) for o in parsed if o.is_hydra_override()]
        swept = [o for o in parsed if not o.is_hydra_override()]
        for o in swept:
            if o.is_sweep_override() and not o.is_discrete_sweep():
                raise UserError(_full_key(o), o.get_value_string(), "has no end", allowed="a,b, range(..), glob(..)")
        batches = BasicSweeper.split_arguments(swept, None)
    return [[*for_hydra, *point] for batch in batches for point in batch]


def open_custom(overrides: Sequence[str]) -> list[str]:
    """`method=custom` and `model=custom` take any key: `method.k=3` becomes Hydra's `++method.k=3` (add or replace).
    A custom model's `_target_` is the callable that makes the network: the model's `make`."""
    if "model=custom" in overrides:
        overrides = [re.sub(r"^\+{0,2}model\._target_=", "model.make=", override) for override in overrides]
    opened = []
    for override in overrides:
        key, _, value = override.partition("=")
        if "custom" in re.split(r"[\s,]+", value):
            opened.append(key.rpartition("@")[2].replace("/", ".") + ".")
    return [f"++{o}" if any(o.startswith(prefix) for prefix in opened) else o for o in overrides]


def check(config: DictConfig) -> None:
    """Compares every node that has a `_target_` with the signature of that target. Imports the targets."""
    for name, value in _resolved(config).items():
        for key, node in _nodes(value, name):
            check_signature(node, key, CALLER_GIVES.get(key, ()))


def check_signature(node: Mapping[str, Any], key: str, given: Sequence[str] = ()) -> None:
    """Refuses a `node` unless its keys are arguments of its `_target_`, of the annotated type, and none is missing.

    Nested nodes likewise. `given`: arguments that the caller adds. Only plain annotations are compared (numbers, text,
    literals, unions and lists of them); what else is impossible the target says itself.
    """
    name = node["_target_"]
    try:
        target = _locate(name)
        parameters = inspect.signature(target).parameters
    except Exception as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(f"{key}._target_", name, "cannot be imported", hint=reason) from None
    hints = _hints(target)
    allowed = [p for p, v in parameters.items() if v.kind not in (v.VAR_KEYWORD, v.VAR_POSITIONAL, v.POSITIONAL_ONLY)]
    anything = any(v.kind is v.VAR_KEYWORD for v in parameters.values())
    for argument, value in node.items():
        where = f"{key}.{argument}"
        if argument in DIRECTIVES:
            continue
        if argument in given or (argument not in allowed and not anything):
            raise _unknown(where, [a for a in allowed if a not in given], f"{name} takes no other")
        nested = list(_nodes(value, where))
        for path, inner in nested:
            check_signature(inner, path)
        if not nested and argument in hints and not _fits(value, hints[argument]):
            kind = EXAMPLES.get(argument) or _type_name(hints[argument])
            raise UserError(where, _shown(value), "is not possible", allowed=kind)
    if node.get("_partial_") or "_args_" in node:
        return
    for argument in allowed:
        if parameters[argument].default is inspect.Parameter.empty and argument not in node and argument not in given:
            raise UserError(f"{key}.{argument}", None, "is missing", hint=f"{name} needs it: +{key}.{argument}=...")


def run_key(config: DictConfig) -> Config:
    """What decides the numbers of a run: the resolved config without places, launching, paths, and truths not asked."""
    key = {name: value for name, value in _resolved(config).items() if name not in NOT_IN_RUN_KEY}
    for node, path in PATHS:
        if isinstance(key.get(node), dict):
            key[node].pop(path, None)
    if "truth" in key:
        key["truth"] = {name: truth for name, truth in key["truth"].items() if name in key["evaluation"]}
    return key


def add_choice(config: DictConfig, chosen: Mapping[str, Any]) -> DictConfig:
    """The config with `choice`, the YAML chosen in each group (`method: ekfac`, `method@method.base: graddot`)."""
    with open_dict(config):
        config.choice = {group: option for group, option in chosen.items() if not group.startswith("hydra/")}
    return config


def one_line(error: BaseException) -> str:
    """The first line that an exception says, with its type unless that line is meant for users."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, (UserError, *MISTAKES[:2])):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _hydra() -> Iterator[ConfigLoader]:
    """Hydra's compose API on our folder; what a caller had initialised comes back afterwards."""
    state = GlobalHydra.instance()
    before = state.hydra
    state.clear()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), job_name="bench", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        state = GlobalHydra.instance()
        state.clear()
        if before is not None:
            state.initialize(before)


def _parse(overrides: Sequence[str], loader: ConfigLoader) -> list[Override]:
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    for override in overrides:
        try:
            parsed += parser.parse_overrides([override])
        except HydraException as error:
            if "=" not in override:
                raise UserError(override, None, "is no key=value") from None
            lines = [line for line in str(error).splitlines() if "Error parsing" not in line and "See http" not in line]
            hint = f"special characters need quotes, for the shell too: \"{override.partition('=')[0]}='...'\""
            raise UserError(override, None, f"cannot be read ({' '.join(lines)})", hint=hint) from None
    return parsed


def _compose(parsed: list[Override], loader: ConfigLoader, bases: Bases) -> DictConfig:
    """First the chosen YAMLs alone (a point of a sweep often shares them with others), then with the values."""
    groups = [o for o in parsed if o.is_hydra_override() or _is_group(o, loader)]
    for override in parsed:
        _check_form(override, override in groups, loader)
    lines = tuple(str(o.input_line) for o in groups)
    if lines not in bases:
        composed = _composed(groups, loader)
        bases[lines] = _plain(composed), _chosen(composed), _parts(_chosen(composed), loader)
    base, chosen, parts = bases[lines]
    for override in sorted(parsed, key=lambda o: o.key_or_group.count(".")):  # a choice before the keys below it
        if override not in groups:
            _check_key(override, base, parts)
    config = _composed(parsed, loader)
    with open_dict(config):
        del config["hydra"]
    resolved = _resolved(config)
    for key in sorted(OmegaConf.missing_keys(config)):
        raise UserError(key, None, "is missing", hint=f"give {key}=...")
    _check_finite(resolved, "")
    _compare(resolved, _with_defaults(base, chosen), "", parts)
    for group in UNLEARNING:
        if "unlearning" not in resolved["evaluation"] and any(o.key_or_group == group for o in parsed):
            raise UserError(
                group,
                chosen[group],
                "changes nothing here",
                hint="it goes with task=unlearning evaluation=[unlearning]",
            )
    return add_choice(config, chosen)


def _chosen(config: DictConfig) -> dict[str, Any]:
    """The YAML chosen in each group, of a config with its hydra node."""
    chosen = OmegaConf.to_container(config.hydra.runtime.choices)
    assert isinstance(chosen, dict)
    return {str(group): option for group, option in chosen.items()}


def _parts(chosen: Mapping[str, Any], loader: ConfigLoader) -> Parts:
    """Those within the nodes that users may recompose: method.compression, method.base and the like."""
    places = {_place(group): group for group in chosen}
    return {
        key: (group, loader.get_group_options(group.partition("@")[0]))
        for key, group in places.items()
        if key.partition(".")[0] in SIGNED and key not in SIGNED
    }


def _place(group: str) -> str:
    """The key that a group's choice fills: method.compression of method/compression, and what follows an @."""
    name, _, package = group.partition("@")
    return package or name.replace("/", ".")


def _with_defaults(base: Config, chosen: Mapping[str, Any]) -> Config:
    """The kinds of values of a truth are those of its own YAML: a task's setting (a number) may hide a null there."""
    truth = dict(base["truth"])
    for group, option in chosen.items():
        yaml, name = conf_dir() / "truth" / f"{option}.yaml", group.removeprefix("truth@truth.")
        if group.startswith("truth@") and yaml.is_file() and isinstance(truth.get(name), dict):
            truth[name] = {**truth[name], **_plain(OmegaConf.load(yaml))}
    return {**base, "truth": truth}


def _composed(overrides: list[Override], loader: ConfigLoader) -> DictConfig:
    """Hydra's own composition, hydra node included."""
    try:
        return hydra.compose("config", [str(o.input_line) for o in overrides], return_hydra_config=True)
    except MISTAKES as error:
        raise _explained(error, overrides, loader) from None


def _explained(error: Exception, overrides: list[Override], loader: ConfigLoader) -> UserError:
    """What Hydra says over several lines, in one."""
    text = str(error)
    by_key = {_full_key(o): o for o in overrides}
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        key = next((k for k, o in by_key.items() if o.key_or_group == group and o.value() == option), group)
        return UserError(key, option, "is unknown", allowed=error.options or None, hint=_near(option, error.options))
    if unset := re.search(r"You must specify '([^']+)'", text):
        group = unset.group(1)
        return UserError(group, None, "is missing", allowed=loader.get_group_options(group.partition("@")[0]))
    unused = re.search(r"Could not override '([^']+)'", text)
    override = by_key.get(unused.group(1)) if unused else None
    if override and (override.package or "/" in override.key_or_group or error.__cause__ is None):
        hint = _nested(override, overrides, loader)
        return UserError(_full_key(override), override.get_value_string(), "has no place here", hint=hint)
    if twice := re.search(r"Multiple values for ([\w@/.]+?)\. |^(\S+) appears more than once", text):
        return UserError(f"+{twice.group(1) or twice.group(2)}", None, "is there already", hint="leave out the +")
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None) or (unused.group(1) if unused else "config")
    return UserError(key, None, f"is not possible ({one_line(cause)})")


def _nested(override: Override, overrides: list[Override], loader: ConfigLoader) -> str:
    """Where a choice that has no place was meant to go, or that there is none."""
    try:
        chosen = _chosen(_composed([o for o in overrides if o is not override], loader))
    except UserError:
        chosen = {}
    meant = _place(_full_key(override))
    alike = [group for group in chosen if group.startswith(f"{override.key_or_group}@")]
    places = (
        [group for group in chosen if f".{_place(group)}".endswith(f".{meant}")]
        or [group for group in alike if group.rpartition(".")[2] == meant.rpartition(".")[2]]
        or alike
    )
    if len(places) == 1:
        return f"write {places[0]}={override.get_value_string()}"
    return "the chosen method nests no other" if override.package else "nothing that was chosen has such a part"


def _is_group(override: Override, loader: ConfigLoader) -> bool:
    key = override.key_or_group
    named = override.package is not None or "/" in key or bool(loader.get_group_options(key))
    return named and (override.is_sweep_override() or not isinstance(override.value(), dict))


def _of_study(parsed: list[Override], loader: ConfigLoader) -> list[str]:
    """The values that a chosen study sweeps, as Hydra's sweeper reads them: before what the user says, which holds."""
    study = next((o for o in parsed if o.key_or_group == "study"), None)
    if study is None:
        return []
    if study.is_sweep_override():
        raise UserError("study", study.get_value_string(), "is several sweeps", hint="one at a time")
    groups = [o for o in parsed if o.is_hydra_override() or _is_group(o, loader)]
    try:  # as Hydra does before it sweeps: groups that are swept, or are not chosen, are left open
        config = loader.load_configuration("config", [str(o.input_line) for o in groups], RunMode.MULTIRUN)
    except MISTAKES as error:
        raise _explained(error, groups, loader) from None
    return [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]


def _full_key(override: Override) -> str:
    return override.key_or_group + (f"@{override.package}" if override.package else "")


def _check_form(override: Override, is_group: bool, loader: ConfigLoader) -> None:
    key = _full_key(override)
    if override.is_delete():
        raise UserError(f"~{key}", None, "is not possible", hint="a key can be changed, not removed")
    if override.is_sweep_override():
        raise UserError(key, override.get_value_string(), "is several values", hint="add -m to run one after the other")
    if is_group and override.is_force_add():
        raise UserError(f"++{key}", None, "is not possible", hint="leave out the ++")
    if is_group and not override.is_hydra_override() and not isinstance(override.value(), str):
        options = loader.get_group_options(override.key_or_group)
        raise UserError(key, override.get_value_string(), "is unknown", allowed=options)


def _check_key(override: Override, base: Config, parts: Parts) -> None:
    """The key is in the YAML, or is added (`+`) where a signature will judge it."""
    key, added = override.key_or_group, override.is_add() or override.is_force_add()
    node: Any = base
    names = key.split(".")
    for depth, name in enumerate(names):
        above = ".".join(names[:depth])
        if isinstance(node, list):
            return
        if node is None and above in parts:
            raise UserError(key, None, "is no key", hint=f"nothing is chosen there: write {parts[above][0]}=...")
        if not isinstance(node, dict):
            raise UserError(key, None, "is no key", hint=f"{above} is a single value")
        if name not in node:
            if added and "_target_" in node and names[0] in SIGNED:
                return
            raise _unknown(".".join(names[: depth + 1]), node)
        node = node[name]
    value = override.value()
    if not (isinstance(value, str) and "${" in value):
        _compare_shape(value, node, key, parts)
    if override.is_add() and not isinstance(node, dict):
        raise UserError(f"+{key}", None, "is there already", hint="leave out the +")
    if isinstance(value, dict) and isinstance(node, dict):
        _compare(value, node, key, parts)


def _check_finite(value: Any, key: str) -> None:
    """No number of a config is infinite or none: no record could hold it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_finite(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            _check_finite(inner, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(key, value, "is not possible", allowed="a finite number")


def _compare_shape(new: Any, old: Any, key: str, parts: Parts) -> None:
    """Refuses a single value, null or a list where the YAML (`old`) holds keys or a choice of its own."""
    if isinstance(new, dict) or new == old:
        return
    if key in parts:
        group, options = parts[key]
        allowed, option = (None, new) if new in options else (options, "...")
        hint = f"write {group}={option}"
        raise UserError(key, _shown(new), "is not possible: it is a choice", allowed=allowed, hint=hint)
    if not isinstance(old, dict):
        return
    below = {name: value for name, value in old.items() if name not in DIRECTIVES}
    alike = [name for name, value in below.items() if new is not None and value is not None and _alike(new, value)]
    if len(alike) == 1:
        hint = f"write {key}.{alike[0]}={_shown(new)}"
        raise UserError(key, _shown(new), "is not possible: it holds keys", hint=hint)
    raise UserError(key, _shown(new), "is not possible", allowed=[f"{key}.{name}=..." for name in below] or "a mapping")


def _compare(new: Any, old: Any, key: str, parts: Parts, judged: bool = False) -> None:
    """`new` has the keys and kinds of values of the YAML (`old`); `judged`: a signature will judge the values."""
    _compare_shape(new, old, key, parts)
    if isinstance(new, dict) and isinstance(old, dict):
        signed = "_target_" in old and key.partition(".")[0] in SIGNED
        for name, value in new.items():
            where = f"{key}.{name}" if key else str(name)
            if name in old:
                _compare(value, old[name], where, parts, judged or signed)
            elif old and not signed:
                raise _unknown(where, old)
    elif not judged and not _alike(new, old):
        raise UserError(key, _shown(new), "is not possible", allowed=_kind(old))


def _alike(new: Any, old: Any) -> bool:
    if old is None or (isinstance(old, str) and (old == "???" or "${" in old)):
        return True
    return type(new) is type(old) or (type(new) is int and type(old) is float)


def _kind(value: Any) -> str:
    kinds = {bool: "true, false", int: "an integer", float: "a number", str: "text", list: "a list"}
    return f"{kinds[type(value)]}" + ("" if isinstance(value, bool) else f" such as {_shown(value)}")


def _unknown(where: str, allowed: Iterable[str], hint: str | None = None) -> UserError:
    names = [str(a) for a in allowed]
    public = [name for name in names if name not in DIRECTIVES] or names
    return UserError(
        where, None, "is no key", allowed=public or "none", hint=_near(where.rpartition(".")[2], public) or hint
    )


def _near(word: str, allowed: Iterable[str] | None) -> str | None:
    matches = difflib.get_close_matches(word, list(allowed or ()), 1)
    return f"did you mean {matches[0]}?" if matches else None


def _plain(config: DictConfig | ListConfig) -> Config:
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "hydra"}


def _resolved(config: DictConfig) -> Config:
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(error.full_key or "config", None, f"is not possible ({one_line(error)})") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _shown(value: Any) -> str:
    """A value as one would type it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value).replace("'", "")


def _hints(target: Any) -> dict[str, Any]:
    """Annotations that can be evaluated; none where one cannot."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:
        return {}


def _nodes(value: Any, key: str) -> Iterator[tuple[str, Config]]:
    """The outermost nodes with a `_target_` in a value."""
    if isinstance(value, dict) and "_target_" in value:
        yield key, value
    elif isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _nodes(inner, f"{key}.{name}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML can be what an annotation says; true for annotations that are not plain."""
    origin, inner = typing.get_origin(hint), [a for a in typing.get_args(hint) if a is not Ellipsis]
    if origin is typing.Literal:
        return value in inner
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(any(_fits(v, i) for i in inner) for v in value)
    if _is_part(hint):
        return False  # what gives one is a node
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint in (bool, int, str, types.NoneType) else True


def _is_part(hint: Any) -> bool:
    """Whether it is a dataclass or an interface: of what a method or task is made of."""
    return inspect.isclass(hint) and (dataclasses.is_dataclass(hint) or getattr(hint, "_is_protocol", False))


def _type_name(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), [_type_name(a) for a in typing.get_args(hint) if a is not Ellipsis]
    if origin is typing.Literal:
        return ", ".join(_shown(a) for a in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(inner)
    if origin in (list, tuple, Sequence):
        return f"a list of {' or '.join(dict.fromkeys(inner))}"
    if _is_part(hint):
        return f"a {hint.__name__} by its _target_"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
    return words.get(hint) or str(getattr(hint, "__name__", hint))
