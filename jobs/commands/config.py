"""``coca config``: what can be set, what it means, and what a set of files and flags resolves to."""

import difflib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import click

from coca.errors import BadInput
from jobs.commands.options import coca_command, config_options

# kind -> module and class of its config
KINDS = {
    "refresh": ("pipelines.config", "RefreshConfig"),
    "train": ("jobs.config", "TrainRunConfig"),
    "tune": ("jobs.config", "TuneConfig"),
    "serve": ("serving.config", "ServeConfig"),
}
kind_argument = click.argument("kind", type=click.Choice(list(KINDS)))


class Setting(NamedTuple):
    """One key of a config."""

    kind: str
    name: str
    type: str
    default: Any
    description: str


@click.group(no_args_is_help=False)
def command() -> None:
    """Show, describe and explain the settings of refresh, train, tune and serve."""


@command.command("show")
@kind_argument
@click.option("--recipe", "recipe_name", metavar="NAME", help="Start from a recipe (train and tune).")
@config_options
@coca_command
def show(kind: str, recipe_name: str | None, config_file: Path | None, sets: tuple[str, ...]) -> dict[str, Any]:
    """Print a whole config as YAML: defaults, then a preset or --recipe, --config and --set.

    What a command line must give is shown as <name>.
    """
    from coca.typed_config import Config, resolve_config

    config: Config
    if kind == "refresh":
        from jobs.refresh_settings import resolve_refresh

        _base(kind, recipe_name)  # refuses a recipe
        config = resolve_refresh(None, config_file, sets)
    else:
        config = resolve_config(_base(kind, recipe_name), config_file, sets)
    click.echo(config.to_yaml(), nl=False)
    return config.model_dump(mode="json")


@command.command("schema")
@kind_argument
@coca_command
def schema(kind: str) -> dict[str, Any]:
    """Print the JSON Schema of a config, for editors and checks."""
    described: dict[str, Any] = load_kind(kind).model_json_schema()
    click.echo(json.dumps(described, indent=2))
    return described


@command.command("explain")
@click.argument("name")
@coca_command
def explain(name: str) -> dict[str, Any]:
    """Say what a key such as train.batch_size means, its type and its default; or every key of a section."""
    known = [setting for kind in KINDS for setting in settings(kind)]
    found = [s for s in known if s.name == name or s.name.startswith(f"{name}.")]
    if not found:
        near = difflib.get_close_matches(name, {s.name for s in known}, n=1, cutoff=0.0)[0]
        raise BadInput(f"there is no setting {name!r}", f"Did you mean {near!r}? All: `coca config show KIND`")
    for setting in found:
        click.echo(f"{setting.name}  ({setting.kind}; {setting.type}; default {setting.default})")
        click.echo(f"    {setting.description}")
    return {"settings": [setting._asdict() for setting in found]}


def load_kind(kind: str) -> Any:
    module, name = KINDS[kind]
    return getattr(importlib.import_module(module), name)


def settings(kind: str) -> Iterator[Setting]:
    """Every key of a config kind with its dotted name, sections excluded, in field order."""
    yield from _walk(kind, load_kind(kind), "")


def _walk(kind: str, config: Any, prefix: str) -> Iterator[Setting]:
    from coca.typed_config import config_choices

    schemas = config.model_json_schema()["properties"]
    for key, field in config.model_fields.items():
        name = f"{prefix}{key}"
        choices = config_choices(field.annotation)
        for choice in choices:
            yield from _walk(kind, choice, f"{name}.")
        if not choices:
            default = (
                "none: must be given"
                if field.is_required()
                else json.dumps(_plain(field.get_default(call_default_factory=True)))
            )
            yield Setting(kind, name, _rule(schemas[key]), default, " ".join((field.description or "").split()))


def _rule(schema: dict[str, Any]) -> str:
    """A JSON Schema in words: ``integer > 0``, ``one of adamw, muon``."""
    if "anyOf" in schema:
        return " or ".join(_rule(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    words = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    if schema.get("type") == "array" and schema.get("items"):
        return f"list of {_rule(schema['items'])}"
    return " ".join([schema.get("type", schema.get("$ref", "value").rpartition("/")[2]), " and ".join(words)]).strip()


def _plain(value: Any) -> Any:
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value)


def _placeholders(config: Any) -> dict[str, Any]:
    """``<key>`` for each value that has to be given."""
    from coca.typed_config import config_choices

    values: dict[str, Any] = {}
    for key, field in config.model_fields.items():
        if field.is_required():
            choices = config_choices(field.annotation)
            inside = _placeholders(choices[0]) if choices else f"<{key}>"
            values[key] = [inside] if choices and get_origin(field.annotation) is tuple else inside
    return values


def _base(kind: str, recipe_name: str | None) -> Any:
    from coca.typed_config import build_config

    config = load_kind(kind)
    values = _placeholders(config)
    if recipe_name is not None:
        if "train" not in config.model_fields:
            raise BadInput(f"{kind} has no recipes", "Leave --recipe away, or show train or tune")
        from jobs.recipes import recipe

        values["train"] = recipe(recipe_name).model_dump()
    return build_config(config, values)
