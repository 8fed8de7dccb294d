"""From YAML and ``key=value`` to a checked Recipe, and back.

A recipe is put together from three layers: the defaults of ``fedpeft.config``, the file, the
overrides (the last one of a key wins). Sections merge key by key; lists are replaced. ``adapter``
and ``strategy`` hold the settings of one kind: a layer that names another kind starts it afresh.
Interpolations (``${...}``) are refused: a recipe says what it says on every machine.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from fedpeft import strategy as strategies
from fedpeft.config import Data, Engine, Model, Recipe
from fedpeft.config_comms import check_comms
from fedpeft.config_fleet import check_fleet
from fedpeft.config_privacy import check_privacy
from fedpeft.config_rounds import check_rounds
from fedpeft.config_rules import RULES
from fedpeft.errors import FedpeftError, suggest
from fedpeft.redact import without_secrets

Layer = dict[str, Any]

_KINDS = {"adapter": "kind", "strategy": "name"}
_PATHS = (
    ("data", "source", Data().source),
    ("model", "name", Model().name),
    ("fleet", "trace", ""),
    ("fleet", "capacities", ""),
)
_KEY = re.compile(r"[^.=\[\]\s]+(\.[^.=\[\]\s]+)*")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_SUFFIXES = (".yaml", ".yml")


def load_recipe(path_or_builtin: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, or of a built-in name, with ``key=value`` overrides.

    A plain name (no slash, no .yaml) is a built-in recipe. ``data.source``, ``model.name`` and a
    fleet's files are taken as relative to the file, in overrides to the working folder, where
    something lies there; else they stay as they are (names on the hub). Raises FedpeftError for
    all that is wrong, with the key, the value and the rule.
    """
    if Path(path_or_builtin).name == path_or_builtin and not path_or_builtin.endswith(_SUFFIXES):
        return parse_recipe(_read_builtin(path_or_builtin), path_or_builtin, overrides)
    path = Path(path_or_builtin).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FedpeftError(
            f"recipe {path_or_builtin} does not exist. Built-in recipes: "
            f"{', '.join(builtin_recipes())}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FedpeftError(f"recipe {path_or_builtin} cannot be read: {error}") from None
    return parse_recipe(text, path_or_builtin, overrides, path.parent)


def parse_recipe(
    text: str, origin: str, overrides: Sequence[str] = (), folder: Path | None = None
) -> Recipe:
    """The recipe of a YAML text; ``origin`` names it in errors.

    folder: where relative paths in the text start from; without one they stay as they are.
    """
    written = plain_yaml(text, origin)
    _check_layer(written, origin)
    if folder is not None:
        written = _resolve(written, folder)
    changes: Layer = {}
    for override in overrides:
        change = parse_override(override)
        _check_layer(change, f"override {override!r}")
        changes = _merge(changes, change)
    defaults = asdict(Recipe())
    for section, tag in _KINDS.items():
        if section in written:
            defaults[section] = {tag: defaults[section][tag]}
    merged = _merge(_merge(defaults, written), _resolve(changes, Path.cwd()))
    recipe = _convert(merged, origin, overrides)
    check(recipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML; ``parse_recipe`` gives an equal recipe back."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def load_strategy(recipe: Recipe) -> strategies.Strategy[Any]:
    """The recipe's strategy with its settings. Raises FedpeftError where they do not fit it."""
    settings = dict(recipe.strategy)
    return strategies.build(settings.pop("name"), settings)


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with fedpeft."""
    folder = resources.files("fedpeft") / "recipes"
    return sorted(f.name[: -len(".yaml")] for f in folder.iterdir() if f.name.endswith(".yaml"))


def check(recipe: Recipe) -> None:
    """Raises FedpeftError that names the first key whose value breaks its rule."""
    for key, rule in RULES.items():
        value = functools.reduce(getattr, key.split("."), recipe)
        if not rule.holds(value):
            raise FedpeftError(f"{key}={value!r} must be {rule.text}.")
    if recipe.local.epochs == 0 and recipe.local.steps == 0:
        raise FedpeftError("local.epochs=0 needs local.steps to be at least 1: nothing is trained.")
    if recipe.local.clip_per == "example" and recipe.local.clip_norm == 0:
        raise FedpeftError(
            "local.clip_per='example' needs local.clip_norm above 0, the bound of each example's "
            "gradient: set local.clip_norm, or leave local.clip_per=client."
        )
    if recipe.local.clip_per == "example" and recipe.engine.compile != "none":
        raise FedpeftError(
            f"engine.compile={recipe.engine.compile} with local.clip_per=example: the passes of "
            f"per-example clipping have too many shapes to compile. Set engine.compile=none."
        )
    if recipe.partition.kind != "natural" and recipe.partition.clients == 0:
        raise FedpeftError(
            "partition.clients=0 must be at least 1; only partition.kind=natural takes 0 (all)."
        )
    _check_engine(recipe.engine)
    check_privacy(recipe)
    check_comms(recipe)
    check_fleet(recipe)
    recipe.robust.check_settings()
    recipe.attack.check()
    if not _DEVICE.fullmatch(recipe.engine.device):
        raise FedpeftError(
            f"engine.device={recipe.engine.device!r} must be auto, cpu, cuda or cuda:N."
        )
    for section, tag in _KINDS.items():
        name = getattr(recipe, section).get(tag)
        if not isinstance(name, str) or not name:
            raise FedpeftError(f"{section}.{tag}={name!r} must be a name, e.g. {_example(section)}")
    check_rounds(recipe)
    load_strategy(recipe)


def _check_engine(engine: Engine) -> None:
    if engine.kind != "cohort" and (engine.compile != "none" or engine.checkpointing):
        raise FedpeftError(
            f"engine.compile and engine.checkpointing speed up batched clients, and "
            f"engine.kind={engine.kind} trains one at a time: use engine.kind=cohort, or leave "
            f"the two out."
        )
    if engine.workers > 1 and engine.kind == "sequential":
        raise FedpeftError(
            f"engine.workers={engine.workers} with engine.kind=sequential, which trains one client "
            f"after another: use engine.kind=cohort, or engine.workers=0."
        )
    if engine.workers > 1 and engine.kind == "cohort" and engine.device.startswith("cuda:"):
        raise FedpeftError(
            f"engine.workers={engine.workers} with engine.device={engine.device!r}: each worker "
            f"has a GPU of its own. Use engine.device=cuda, or engine.workers=0."
        )


def _read_builtin(name: str) -> str:
    known = builtin_recipes()
    if name not in known:
        file = f" To load the file of that name, write ./{name}." if Path(name).is_file() else ""
        raise FedpeftError(f"recipe {name!r} does not exist. {suggest(name, known)}{file}")
    return (resources.files("fedpeft") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def plain_yaml(text: str, origin: str) -> Layer:
    """A YAML mapping as plain values; duplicate keys and interpolations are refused."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark and "\n" in text else ""
        raise FedpeftError(f"{origin}{line}: not valid YAML: {error.problem}") from None
    except GrammarParseError as error:
        raise FedpeftError(f"{origin}: {_no_interpolation(str(error.full_key))}") from None
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise FedpeftError(f"{origin}: not a recipe: {reason}") from None
    if not isinstance(found, dict):
        raise FedpeftError(f"{origin}: a recipe is a mapping of keys to values, not a list")
    return {str(key): value for key, value in found.items()}


def parse_override(override: str) -> Layer:
    """``a.b=value`` as the layer {"a": {"b": value}}.

    The value is YAML; where the key holds text, the value is taken as it stands, unless it is
    quoted or null.
    """
    key, equals, text = override.partition("=")
    origin = f"override {override!r}"
    if not equals or not _KEY.fullmatch(key):
        raise FedpeftError(f"{origin} must be KEY=VALUE with a dotted key, e.g. local.lr=1e-3")
    if not text.strip():
        raise FedpeftError(f"{origin} has no value; write {key}=null for none")
    value: Any = text.strip()
    if not _is_text(_hint(key)) or text.strip() in ("null", "~") or text.strip()[0] in "'\"":
        value = plain_yaml(f"value: {text}", origin)["value"]
    for part in reversed(key.split(".")):
        value = {part: value}
    layer: Layer = value
    return layer


def _check_layer(layer: Layer, origin: str) -> None:
    _check_plain(layer, "", origin)
    _check_section(Recipe, layer, "", origin)


def _check_plain(value: Any, key: str, origin: str) -> None:
    if isinstance(value, dict):
        for name, below in value.items():
            _check_plain(below, f"{key}.{name}".lstrip("."), origin)
    elif isinstance(value, list):
        for number, below in enumerate(value):
            _check_plain(below, f"{key}[{number}]", origin)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise FedpeftError(f"{origin}: {_no_interpolation(key)}")
    elif isinstance(value, str) and without_secrets(value) != value:
        raise FedpeftError(
            f"{without_secrets(origin)}: {key} holds what looks like a secret, and a recipe is "
            f"written to the run folder and sent to every client: leave it out, and set HF_TOKEN "
            f"instead"
        )
    elif value is not None and type(value) not in (str, int, float, bool):
        raise FedpeftError(
            f"{origin}: {key} is a {type(value).__name__}; a recipe holds text, numbers, true, "
            "false, null, lists and mappings"
        )


def _check_section(kind: type, given: object, prefix: str, origin: str) -> None:
    """Raises FedpeftError for keys that ``kind`` does not have and values that are no option."""
    if not isinstance(given, dict):
        keys = ", ".join(f.name for f in fields(kind))
        raise FedpeftError(f"{origin}: {prefix[:-1]}={given!r} must be a section with keys {keys}")
    hints = get_type_hints(kind)
    for key, value in given.items():
        full = f"{prefix}{key}"
        if key not in hints:
            raise FedpeftError(f"{origin}: unknown key {full!r}. {_near(str(key), list(hints))}")
        if is_dataclass(hints[key]):
            _check_section(hints[key], value, f"{full}.", origin)
        else:
            _check_value(full, hints[key], value, origin)


def _check_value(key: str, hint: Any, value: object, origin: str) -> None:
    if key in _KINDS and not isinstance(value, dict):
        raise FedpeftError(f"{origin}: {key}={value!r} must be a mapping; write {_example(key)}")
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise FedpeftError(f"{origin}: {key}={value!r} must be a list, e.g. [{value}]")
        for item in value:
            _check_value(key, get_args(hint)[0], item, origin)
            if get_args(hint)[0] is float and type(item) not in (int, float):
                raise FedpeftError(f"{origin}: {key} holds {item!r}: its items must be numbers")
    if get_origin(hint) is Literal and value not in get_args(hint):
        near = suggest(str(value), get_args(hint))
        raise FedpeftError(f"{origin}: {key}={value!r} is not an option. {near}")
    if _is_text(hint) and not isinstance(value, str) and (value is not None or hint is str):
        raise FedpeftError(f"{origin}: {key}={value!r} must be text; put it in quotes")


def _near(key: str, known: Sequence[str]) -> str:
    """The near name, or the section that has this key."""
    keys = _keys(Recipe)
    if key in keys:
        return f"Nest it: {{{key.replace('.', ': {')}: ...{'}' * (key.count('.') + 1)}."
    elsewhere = [full for full in keys if full.rpartition(".")[2] == key]
    if elsewhere:
        return f"Did you mean {' or '.join(repr(full) for full in elsewhere)}?"
    return suggest(key, known)


def _keys(kind: Any, prefix: str = "") -> list[str]:
    """All keys of a section, dotted."""
    found = []
    for name, hint in get_type_hints(kind).items():
        below = _keys(hint, f"{prefix}{name}.") if is_dataclass(hint) else []
        found += [f"{prefix}{name}", *below]
    return found


def _hint(key: str) -> object:
    """The type of a dotted key; None where there is no such key."""
    kind: Any = Recipe
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return kind


def _is_text(hint: object) -> bool:
    return hint is str or hint == str | None


def _convert(values: Layer, origin: str, overrides: Sequence[str]) -> Recipe:
    """The values as a Recipe. An error names the override that it comes from, if any."""
    schema = OmegaConf.structured(Recipe(adapter={}, strategy={}))
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        key, reason = str(error.full_key), str(error).split("\n")[0]
        for override in overrides:
            given, failed = f"{override.partition('=')[0]}.", f"{key}."
            if failed.startswith(given) or given.startswith(failed):
                origin = f"override {override!r}"
        raise FedpeftError(f"{origin}: {key}: {reason}") from None
    assert isinstance(recipe, Recipe)
    return recipe


def _merge(below: Layer, above: Layer) -> Layer:
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            tag = _KINDS.get(key, "")
            another = tag in old and value.get(tag, old[tag]) != old[tag]
            value = value if another else _merge(old, value)
        merged[key] = value
    return merged


def _resolve(layer: Layer, folder: Path) -> Layer:
    """The layer with the paths that lead somewhere from ``folder`` made absolute."""
    resolved = dict(layer)
    for section, key, builtin in _PATHS:
        value = layer.get(section, {}).get(key)
        if value and value != builtin:
            path = folder / Path(value).expanduser()
            if path.exists():
                resolved[section] = {**layer[section], key: str(path.resolve())}
    return resolved


def _example(section: str) -> str:
    return {"adapter": "adapter.kind=lora", "strategy": "strategy.name=fedavg"}[section]


def _no_interpolation(key: str) -> str:
    return f"{key}: '${{...}}' and '???' are not allowed in a recipe; write the value itself"
