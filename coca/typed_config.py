"""The base of every config: frozen, documented field by field, unknown keys refused by name.

Precedence, lowest first: field default < preset or recipe < ``--config FILE.yaml`` < ``--set a.b=VALUE``.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from coca.errors import BadInput

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A frozen config node; the docstring under each field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    def to_yaml(self) -> str:
        """The whole resolved config as YAML, in field order."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def resolve_config(base: C, config_file: Path | None = None, sets: Iterable[str] = ()) -> C:
    """``base`` with a YAML file and then ``a.b=VALUE`` overrides laid over it.

    Raises:
        BadInput: a file that cannot be read, a key that does not exist, a value that breaks a rule.
    """
    values = base.model_dump()
    if config_file is not None:
        _merge(values, _read_yaml(config_file))
    for text in sets:
        _merge(values, _parse_set(text))
    return build_config(type(base), values)


def lay_over(base: C, values: Mapping[str, Any]) -> C:
    """``base`` with some values, nested as in the config, in the place of its own."""
    merged = base.model_dump()
    _merge(merged, values)
    return build_config(type(base), merged)


def build_config(kind: type[C], values: Mapping[str, Any]) -> C:
    """``kind`` from plain values; every problem becomes one ``BadInput`` that names the field."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _bad_input(kind, error) from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by their dotted names, ``{"a": {"b": 1, "c": {}}}`` as ``{"a.b": 1, "a.c": {}}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise BadInput(f"cannot read the config file {path}: {problem}", "Give --config a YAML file") from None
    except yaml.YAMLError as error:
        problem = str(error).replace("\n", " ")
        raise BadInput(f"{path} is not YAML: {problem}", "Mend the file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds a {type(values).__name__}, not a mapping", "Write it as `key: value` lines")
    return values


def _parse_set(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise BadInput(f"--set {text!r} is not of the form a.b=VALUE", "For example --set fetch.timeout_s=5")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise BadInput(f"the value of --set {text!r} is not YAML", "Quote it: --set 'a.b=\"text\"'") from None
    for key in reversed(name.strip().split(".")):
        parsed = {key: parsed}
    return parsed


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _bad_input(kind: type[Config], error: ValidationError) -> BadInput:
    problem = error.errors()[0]
    location = _without_tags(kind, [str(part) for part in problem["loc"]])
    name = ".".join(location) or kind.__name__
    if problem["type"] == "extra_forbidden":
        known = _known_keys(kind, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        way_out = f"Did you mean {near[0]!r}? " if near else ""
        return BadInput(f"unknown config key {name!r}", f"{way_out}Known here: {', '.join(known)}")
    message = problem["msg"].removeprefix("Value error, ")
    value = repr(problem["input"])
    shown = value if len(value) <= 80 else value[:77] + "..."
    return BadInput(f"config key {name!r} = {shown}: {message}", f"See `coca config explain {name}`")


def config_choices(annotation: Any) -> list[type[Config]]:
    """The configs a field may hold: one, several for a union, none for a plain value."""
    choices = get_args(annotation) or (annotation,)
    return [each for each in choices if isinstance(each, type) and issubclass(each, Config)]


def _without_tags(kind: type[BaseModel], location: list[str]) -> list[str]:
    """An error's place without the tags that pydantic adds where a field holds one of several configs."""
    kept: list[str] = []
    kinds: list[type[BaseModel]] = [kind]
    for part in location:
        tagged = [each for each in kinds if len(kinds) > 1 and each.model_fields["kind"].default == part]
        if tagged:
            kinds = list(tagged)
            continue
        kept.append(part)
        kinds = _below(kinds, part)
    return kept


def _known_keys(kind: type[BaseModel], path: list[str]) -> list[str]:
    kinds: list[type[BaseModel]] = [kind]
    for key in path:
        kinds = _below(kinds, key) or kinds
    return list(dict.fromkeys(key for each in kinds for key in each.model_fields))


def _below(kinds: list[type[BaseModel]], key: str) -> list[type[BaseModel]]:
    return [
        choice
        for each in kinds
        if key in each.model_fields
        for choice in config_choices(each.model_fields[key].annotation)
    ]
